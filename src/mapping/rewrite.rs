//! Changes to a parsed expression before it is compiled: arithmetic becomes exact, loops are watched.
//!
//! The names of what is put in begin with a character that no expression can write.

use jaq_core::load::lex::StrPart;
use jaq_core::load::parse::{BinaryOp, Def, Pattern, Term};
use jaq_core::ops::{Cmp, Math};
use jaq_core::path::{Part, Path};

/// Passes its input on; a step of the watch.
pub(super) const TURN: &str = "\u{1}turn";
/// Passes a value of a list that is being made on, and charges for its place.
pub(super) const ITEM: &str = "\u{1}item";
/// Passes a text on to what makes far more of it, and charges for that before it is made.
pub(super) const HEAVY: &str = "\u{1}heavy";
/// The same for what makes some times more of it.
pub(super) const GROWS: &str = "\u{1}grows";
const RIGHT: &str = "$\u{1}right";

pub(super) const MATH: [(Math, &str); 5] =
    [(Math::Add, "\u{1}+"), (Math::Sub, "\u{1}-"), (Math::Mul, "\u{1}*"), (Math::Div, "\u{1}/"), (Math::Rem, "\u{1}%")];

pub(super) const CMP: [(Cmp, &str); 6] = [
    (Cmp::Lt, "\u{1}<"),
    (Cmp::Le, "\u{1}<="),
    (Cmp::Gt, "\u{1}>"),
    (Cmp::Ge, "\u{1}>="),
    (Cmp::Eq, "\u{1}=="),
    (Cmp::Ne, "\u{1}!="),
];

fn math(op: Math) -> &'static str {
    MATH.iter().find(|(known, _)| *known == op).map_or("", |(_, name)| name)
}

fn cmp(op: Cmp) -> &'static str {
    CMP.iter().find(|(known, _)| *known == op).map_or("", |(_, name)| name)
}

/// Whether comparisons are made exact too: in the standard library, which tells types apart by them, they are not.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Compare {
    Exact,
    AsIs,
}

pub(super) fn def(def: Def<&str>, compare: Compare) -> Def<&str> {
    let recursive = calls(&def.body, def.name);
    let body = term(def.body, compare);
    let body = if recursive { then(Term::Call(TURN, Vec::new()), body) } else { body };
    Def { name: def.name, args: def.args, body }
}

fn then<'s>(left: Term<&'s str>, right: Term<&'s str>) -> Term<&'s str> {
    Term::BinOp(left.into(), BinaryOp::Pipe(None), right.into())
}

pub(super) fn term<'s>(tree: Term<&'s str>, compare: Compare) -> Term<&'s str> {
    let one = |tree: Term<&'s str>| term(tree, compare);
    let boxed = |tree: Box<Term<&'s str>>| Box::new(term(*tree, compare));
    match tree {
        Term::BinOp(left, op, right) => {
            let (left, right) = (boxed(left), boxed(right));
            match op {
                BinaryOp::Math(op) => Term::Call(math(op), vec![*left, *right]),
                BinaryOp::Cmp(op) if compare == Compare::Exact => Term::Call(cmp(op), vec![*left, *right]),
                // `l += r` is `r as $r | l |= . + $r`.
                BinaryOp::UpdateMath(op) => {
                    let sum = Term::Call(math(op), vec![Term::Id, Term::Var(RIGHT)]);
                    let update = Term::BinOp(left, BinaryOp::Update, sum.into());
                    Term::BinOp(right, BinaryOp::Pipe(Some(Pattern::Var(RIGHT))), update.into())
                }
                BinaryOp::Pipe(pattern) => {
                    Term::BinOp(left, BinaryOp::Pipe(pattern.map(|p| self::pattern(p, compare))), right)
                }
                op => Term::BinOp(left, op, right),
            }
        }
        Term::Fold(name, values, bound, mut parts) => {
            parts = parts.into_iter().map(one).collect();
            if let Some(update) = parts.get_mut(1) {
                *update = then(std::mem::take(update), Term::Call(TURN, Vec::new()));
            }
            Term::Fold(name, boxed(values), pattern(bound, compare), parts)
        }
        Term::Def(defs, body) => Term::Def(defs.into_iter().map(|inner| def(inner, compare)).collect(), boxed(body)),
        Term::Str(format, parts) => {
            let part = |part| match part {
                StrPart::Term(inner) => StrPart::Term(one(inner)),
                StrPart::Str(text) => StrPart::Str(text),
                StrPart::Char(character) => StrPart::Char(character),
            };
            Term::Str(format, parts.into_iter().map(part).collect())
        }
        Term::Arr(inside) => Term::Arr(inside.map(|inside| Box::new(then(one(*inside), Term::Call(ITEM, Vec::new()))))),
        Term::Obj(fields) => Term::Obj(fields.into_iter().map(|(key, value)| (one(key), value.map(one))).collect()),
        Term::Neg(inside) => Term::Neg(boxed(inside)),
        Term::Label(name, inside) => Term::Label(name, boxed(inside)),
        Term::TryCatch(inside, catch) => Term::TryCatch(boxed(inside), catch.map(boxed)),
        Term::IfThenElse(branches, otherwise) => Term::IfThenElse(
            branches.into_iter().map(|(condition, branch)| (one(condition), one(branch))).collect(),
            otherwise.map(boxed),
        ),
        Term::Call(name, arguments) => {
            let call = Term::Call(name, arguments.into_iter().map(one).collect());
            match name {
                // A value for every character, or a description of every match.
                "explode" | "split" | "split_" | "matches" | "split_matches" | "indices" | "fromjson" => {
                    then(Term::Call(HEAVY, Vec::new()), call)
                }
                "encode_uri" | "escape_html" | "escape_sh" => then(Term::Call(GROWS, Vec::new()), call),
                _ => call,
            }
        }
        Term::Path(inside, Path(parts)) => {
            let part = |(part, optional)| {
                let part = match part {
                    Part::Index(index) => Part::Index(one(index)),
                    Part::Range(from, to) => Part::Range(from.map(one), to.map(one)),
                };
                (part, optional)
            };
            Term::Path(boxed(inside), Path(parts.into_iter().map(part).collect()))
        }
        same @ (Term::Id | Term::Recurse | Term::Num(_) | Term::Break(_) | Term::Var(_)) => same,
    }
}

fn pattern(bound: Pattern<&str>, compare: Compare) -> Pattern<&str> {
    match bound {
        Pattern::Var(name) => Pattern::Var(name),
        Pattern::Arr(items) => Pattern::Arr(items.into_iter().map(|item| pattern(item, compare)).collect()),
        Pattern::Obj(fields) => {
            Pattern::Obj(fields.into_iter().map(|(key, value)| (term(key, compare), pattern(value, compare))).collect())
        }
    }
}

/// Whether a term calls `name` anywhere.
fn calls(tree: &Term<&str>, name: &str) -> bool {
    let mut found = matches!(tree, Term::Call(called, _) if *called == name);
    each(tree, &mut |inner| found = found || calls(inner, name));
    found
}

/// How many terms stand inside each other; a pipe stands around what follows it.
pub(super) fn depth(tree: &Term<&str>) -> usize {
    let mut deepest = 0;
    each(tree, &mut |inner| deepest = deepest.max(depth(inner)));
    deepest + 1
}

/// The terms right inside a term.
fn each(tree: &Term<&str>, visit: &mut dyn FnMut(&Term<&str>)) {
    match tree {
        Term::Id | Term::Recurse | Term::Num(_) | Term::Break(_) | Term::Var(_) => {}
        Term::Str(_, parts) => parts.iter().for_each(|part| match part {
            StrPart::Term(inner) => visit(inner),
            StrPart::Str(_) | StrPart::Char(_) => {}
        }),
        Term::Arr(inside) => inside.iter().for_each(|inner| visit(inner)),
        Term::Obj(fields) => fields.iter().for_each(|(key, value)| {
            visit(key);
            value.iter().for_each(&mut *visit);
        }),
        Term::Neg(inside) | Term::Label(_, inside) => visit(inside),
        Term::BinOp(left, op, right) => {
            visit(left);
            if let BinaryOp::Pipe(Some(bound)) = op {
                each_of_pattern(bound, visit);
            }
            visit(right);
        }
        Term::Fold(_, values, bound, parts) => {
            visit(values);
            each_of_pattern(bound, visit);
            parts.iter().for_each(visit);
        }
        Term::TryCatch(inside, catch) => {
            visit(inside);
            catch.iter().for_each(|inner| visit(inner));
        }
        Term::IfThenElse(branches, otherwise) => {
            branches.iter().for_each(|(condition, branch)| {
                visit(condition);
                visit(branch);
            });
            otherwise.iter().for_each(|inner| visit(inner));
        }
        Term::Def(defs, body) => {
            defs.iter().for_each(|def| visit(&def.body));
            visit(body);
        }
        Term::Call(_, arguments) => arguments.iter().for_each(visit),
        Term::Path(inside, Path(parts)) => {
            visit(inside);
            parts.iter().for_each(|(part, _)| match part {
                Part::Index(index) => visit(index),
                Part::Range(from, to) => from.iter().chain(to).for_each(&mut *visit),
            });
        }
    }
}

fn each_of_pattern(bound: &Pattern<&str>, visit: &mut dyn FnMut(&Term<&str>)) {
    match bound {
        Pattern::Var(_) => {}
        Pattern::Arr(items) => items.iter().for_each(|item| each_of_pattern(item, visit)),
        Pattern::Obj(fields) => fields.iter().for_each(|(key, value)| {
            visit(key);
            each_of_pattern(value, visit);
        }),
    }
}
