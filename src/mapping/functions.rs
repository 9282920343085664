//! The functions expressions may call: jq's standard ones, without the clock, the environment, input and output;
//! `link`, `link_later` and `local`; and what `rewrite` puts in.

use std::cmp::Ordering;
use std::sync::LazyLock;

use jaq_core::box_iter::box_once;
use jaq_core::data::HasLut;
use jaq_core::load::parse::Def;
use jaq_core::native::{Fun, bome, v};
use jaq_core::ops::{Cmp, Math};
use jaq_core::{Cv, DataT, Error, Exn, Lut, Native, RunPtr, ValXs};
use jaq_json::{Num, Val};
use serde_json::Value;

use super::convert::{from_val, to_val};
use super::links::Wanted;
use super::rewrite::{CMP, GROWS, HEAVY, ITEM, MATH, TURN};
use super::watch::Watch;

/// What jaq runs expressions on.
pub(super) struct Jq;

impl DataT for Jq {
    type V<'a> = Val;
    type Data<'a> = Run<'a>;
}

/// The context of a run. Cloning it is a step.
pub(super) struct Run<'a> {
    pub(super) lut: &'a Lut<Jq>,
    pub(super) watch: &'a Watch<'a>,
}

impl Clone for Run<'_> {
    fn clone(&self) -> Self {
        self.watch.step();
        Run { lut: self.lut, watch: self.watch }
    }
}

impl<'a> HasLut<'a, Jq> for Run<'a> {
    fn lut(&self) -> &'a Lut<Jq> {
        self.lut
    }
}

/// Standard functions that there are not, and why.
pub(super) const ABSENT: [(&str, &str); 14] = [
    ("now", CLOCK),
    ("localtime", ZONE),
    ("strflocaltime", ZONE),
    ("env", "use ${env:NAME} in the file"),
    ("input", "an expression sees one input, `.`"),
    ("inputs", "an expression sees one input, `.`"),
    ("halt", "use `error(\"why\")`"),
    ("halt_error", "use `error(\"why\")`"),
    ("debug", OUTPUT),
    ("debug_empty", OUTPUT),
    ("stderr", OUTPUT),
    ("stderr_empty", OUTPUT),
    ("limit_depth", ""),
    ("input_line_number", "an expression sees one input, `.`"),
];

const CLOCK: &str = "there is no clock: the same input must map to the same output; take a time from the record";
const ZONE: &str = "there is no local time zone: use `gmtime` and `strftime`";
const OUTPUT: &str = "expressions print nothing: try them with `tidegate preview`";

fn absent(name: &str) -> bool {
    ABSENT.iter().any(|(known, _)| *known == name)
}

/// Definitions of the standard library, loops watched and arithmetic exact.
pub(super) fn standard() -> &'static [Def<&'static str>] {
    static STANDARD: LazyLock<Vec<Def<&'static str>>> = LazyLock::new(|| {
        let defs = jaq_core::defs().chain(jaq_std::defs()).chain(jaq_json::defs());
        let kept = defs.filter(|def| !absent(def.name));
        kept.map(|def| super::rewrite::def(def, super::rewrite::Compare::AsIs)).collect()
    });
    &STANDARD
}

/// Names that may be called, for "did you mean".
pub(super) fn names() -> Vec<&'static str> {
    let defs = standard().iter().map(|def| def.name);
    let native = functions().into_iter().map(|(name, ..)| name);
    let mut names: Vec<&str> = defs.chain(native).filter(|name| !name.starts_with(['\u{1}', '@'])).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Native functions.
pub(super) fn functions() -> Vec<Fun<Jq>> {
    let taken = |name: &str| absent(name) || matches!(name, "range" | "fromjson" | "tojson");
    let given = jaq_core::funs::<Jq>().chain(jaq_std::funs()).chain(jaq_json::funs());
    let mut functions: Vec<Fun<Jq>> = given.filter(|(name, ..)| !taken(name)).collect();
    let mut add = |name: &'static str, arguments: usize, run: RunPtr<Jq>| {
        functions.push((name, v(arguments), Native::<Jq>::new(run)));
    };
    add("range", 3, range);
    add("fromjson", 0, |cv| bome(from_json(&cv.1)));
    add("tojson", 0, |cv| bome(to_json(&cv)));
    add(ITEM, 0, |cv| {
        cv.0.data().watch.charge(2 * size_of::<Val>());
        box_once(Ok(cv.1))
    });
    add(HEAVY, 0, |cv| charged(cv, 64));
    add(GROWS, 0, |cv| charged(cv, 6));
    add("link", 2, |cv| link(cv));
    add("link_later", 2, |cv| link_later(cv));
    add("local", 2, |cv| local(cv));
    for (op, name) in MATH {
        let run: RunPtr<Jq> = match op {
            Math::Add => |cv| calculate(cv, Math::Add),
            Math::Sub => |cv| calculate(cv, Math::Sub),
            Math::Mul => |cv| calculate(cv, Math::Mul),
            Math::Div => |cv| calculate(cv, Math::Div),
            Math::Rem => |cv| calculate(cv, Math::Rem),
        };
        add(name, 2, run);
    }
    for (op, name) in CMP {
        let run: RunPtr<Jq> = match op {
            Cmp::Lt => |cv| compare(cv, Cmp::Lt),
            Cmp::Le => |cv| compare(cv, Cmp::Le),
            Cmp::Gt => |cv| compare(cv, Cmp::Gt),
            Cmp::Ge => |cv| compare(cv, Cmp::Ge),
            Cmp::Eq => |cv| compare(cv, Cmp::Eq),
            Cmp::Ne => |cv| compare(cv, Cmp::Ne),
        };
        add(name, 2, run);
    }
    let turn: RunPtr<Jq> = |cv| {
        cv.0.data().watch.turn(&cv.1);
        box_once(Ok(cv.1))
    };
    let turn = Native::<Jq>::new(turn)
        .with_paths(|cv| {
            cv.0.data().watch.turn(&cv.1.0);
            box_once(Ok(cv.1))
        })
        .with_update(|cv, update| {
            cv.0.data().watch.turn(&cv.1);
            update(cv.1)
        });
    functions.push((TURN, v(0), turn));
    functions
}

/// `link("object"; key)`: the link of another row, `{id, …kept facts}`; null for a null key.
fn link(mut cv: Cv<'_, Jq>) -> ValXs<'_, Val> {
    let (key, object) = (cv.0.pop_var(), cv.0.pop_var());
    let watch = cv.0.data().watch;
    let (object, key) = match asked("link", &object, &key) {
        Ok(Some(asked)) => asked,
        Ok(None) => return box_once(Ok(Val::Null)),
        Err(error) => return bome(Err(error)),
    };
    match watch.links.and_then(|links| links.link(&object, &key)) {
        Some(Some(link)) => box_once(Ok(to_val(link))),
        Some(None) => {
            watch.waits.borrow_mut().get_or_insert(Wanted::Link { object, key });
            box_once(Err(Exn::halt(0)))
        }
        None => {
            needs(watch, Wanted::Link { object, key });
            box_once(Ok(Val::Null))
        }
    }
}

/// `link_later("object"; key)`: as `link`, but null where the other row has no counterpart yet.
fn link_later(mut cv: Cv<'_, Jq>) -> ValXs<'_, Val> {
    let (key, object) = (cv.0.pop_var(), cv.0.pop_var());
    let watch = cv.0.data().watch;
    let (object, key) = match asked("link_later", &object, &key) {
        Ok(Some(asked)) => asked,
        Ok(None) => return box_once(Ok(Val::Null)),
        Err(error) => return bome(Err(error)),
    };
    match watch.links.and_then(|links| links.later(&object, &key)) {
        Some(answer) => box_once(Ok(answer.as_ref().map_or(Val::Null, to_val))),
        None => {
            needs(watch, Wanted::Later { object, key });
            box_once(Ok(Val::Null))
        }
    }
}

/// `local("object"; id)`: the key of the local row that is linked to the system's `id`; null where there is none.
fn local(mut cv: Cv<'_, Jq>) -> ValXs<'_, Val> {
    let (id, object) = (cv.0.pop_var(), cv.0.pop_var());
    let watch = cv.0.data().watch;
    let (object, id) = match asked("local", &object, &id) {
        Ok(Some(asked)) => asked,
        Ok(None) => return box_once(Ok(Val::Null)),
        Err(error) => return bome(Err(error)),
    };
    match watch.links.and_then(|links| links.local(&object, &id)) {
        Some(answer) => box_once(Ok(answer.as_ref().map_or(Val::Null, to_val))),
        None => {
            needs(watch, Wanted::Local { object, id });
            box_once(Ok(Val::Null))
        }
    }
}

/// The run goes on with null, so that one run finds all it needs; what it gives is thrown away.
fn needs(watch: &Watch<'_>, wanted: Wanted) {
    let mut needs = watch.needs.borrow_mut();
    if !needs.contains(&wanted) {
        needs.push(wanted);
    }
}

fn asked(function: &str, object: &Val, key: &Val) -> Result<Option<(String, Value)>, Error<Val>> {
    let Val::TStr(name) = object else {
        return Err(Error::str(format!("{function}(object; key) wants the name of an object, not {object}")));
    };
    let key = from_val(key).map_err(Error::str)?;
    let empty = match &key {
        Value::Null => true,
        Value::Object(fields) => fields.is_empty() || fields.values().any(Value::is_null),
        Value::Array(_) | Value::Bool(_) => {
            return Err(Error::str(format!("{function}(object; key) wants a scalar or an object as key, not {key}")));
        }
        Value::Number(_) | Value::String(_) => false,
    };
    if key.to_string().contains("\\u0000") {
        return Err(Error::str(format!("{function}(object; key): {key} holds a NUL, which no key does")));
    }
    Ok((!empty).then(|| (String::from_utf8_lossy(name).into_owned(), key)))
}

fn calculate(mut cv: Cv<'_, Jq>, op: Math) -> ValXs<'_, Val> {
    let (right, left) = (cv.0.pop_var(), cv.0.pop_var());
    if let (Val::Num(left), Val::Num(right)) = (&left, &right)
        && let Some(exact) = super::number::calculate(op, left, right)
    {
        if let Val::Num(Num::BigInt(whole)) = &exact {
            cv.0.data().watch.charge(whole.bits() as usize / 8);
        }
        return box_once(Ok(exact));
    }
    // Whole numbers of more than some thousand digits: multiplying them on takes longer and longer.
    if [&left, &right].iter().any(|value| matches!(value, Val::Num(Num::BigInt(whole)) if whole.bits() > 32_000)) {
        cv.0.data().watch.charge(usize::MAX);
    }
    let times = |count: &Val| match count {
        Val::Num(Num::Int(count)) => usize::try_from(*count).unwrap_or(0),
        Val::Num(Num::Float(count)) => count.max(0.0) as usize,
        Val::Num(Num::Dec(count)) => count.parse::<f64>().map_or(0, |count| count.max(0.0) as usize),
        Val::Num(Num::BigInt(_)) => usize::MAX,
        _ => 0,
    };
    let made = match op {
        Math::Add => size(&left).saturating_add(size(&right)),
        Math::Mul => match (&left, &right) {
            (Val::BStr(text) | Val::TStr(text), count) | (count, Val::BStr(text) | Val::TStr(text)) => {
                text.len().saturating_mul(times(count))
            }
            (left, right) => size(left).saturating_add(size(right)),
        },
        Math::Sub | Math::Div | Math::Rem => 0,
    };
    cv.0.data().watch.charge(made);
    bome(op.run(left, right))
}

/// Charges so many times the text that is passed on.
fn charged(cv: Cv<'_, Jq>, times: usize) -> ValXs<'_, Val> {
    if let Val::BStr(text) | Val::TStr(text) = &cv.1 {
        cv.0.data().watch.charge(text.len().saturating_mul(times));
    }
    box_once(Ok(cv.1))
}

fn size(value: &Val) -> usize {
    match value {
        Val::BStr(bytes) | Val::TStr(bytes) => bytes.len(),
        Val::Arr(items) => items.len() * size_of::<Val>(),
        Val::Obj(fields) => fields.len() * 3 * size_of::<Val>(),
        Val::Num(Num::BigInt(whole)) => whole.bits() as usize / 8,
        Val::Null | Val::Bool(_) | Val::Num(_) => 0,
    }
}

fn compare(mut cv: Cv<'_, Jq>, op: Cmp) -> ValXs<'_, Val> {
    let (right, left) = (cv.0.pop_var(), cv.0.pop_var());
    let exact = match (&left, &right) {
        (Val::Num(left), Val::Num(right)) => super::number::compare(op, left, right),
        _ => None,
    };
    box_once(Ok(Val::Bool(exact.unwrap_or_else(|| op.run(&left, &right)))))
}

/// As jaq's own, with every value a step.
fn range(mut cv: Cv<'_, Jq>) -> ValXs<'_, Val> {
    let (by, to, from) = (cv.0.pop_var(), cv.0.pop_var(), cv.0.pop_var());
    let watch = cv.0.data().watch;
    let direction = by.cmp(&Val::from(0_isize));
    let mut next = Some(from);
    Box::new(std::iter::from_fn(move || {
        watch.step();
        let value = next.take()?;
        let goes_on = match direction {
            Ordering::Greater => value < to,
            Ordering::Less => value > to,
            Ordering::Equal => value != to,
        };
        if !goes_on {
            return None;
        }
        match value.clone() + by.clone() {
            Ok(following) => {
                next = Some(following);
                Some(Ok(value))
            }
            Err(error) => Some(Err(Exn::from(error))),
        }
    }))
}

/// By serde_json, whose depth is bounded: the text may come from outside.
fn from_json(text: &Val) -> Result<Val, Error<Val>> {
    let Val::TStr(bytes) = text else { return Err(Error::typ(text.clone(), "string")) };
    match serde_json::from_slice::<Value>(bytes) {
        Ok(value) => Ok(to_val(&value)),
        Err(error) => Err(Error::str(format!("cannot parse {text} as JSON: {error}"))),
    }
}

/// With the same numbers as at the end of an expression.
fn to_json(cv: &Cv<'_, Jq>) -> Result<Val, Error<Val>> {
    let text = from_val(&cv.1).map_err(Error::str)?.to_string();
    cv.0.data().watch.charge(text.len());
    Ok(Val::from(text))
}
