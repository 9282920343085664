//! Compiling and running one expression.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use jaq_core::compile::Undefined;
use jaq_core::load::parse::{Def, Term};
use jaq_core::load::{Arena, File, Lexer, Loader, Parser};
use jaq_core::{Ctx, Vars};
use jaq_json::Val;
use serde_json::Value;

use super::convert::{from_val, to_val};
use super::functions::{ABSENT, Jq, Run, functions, names, standard};
use super::rewrite::{self, Compare};
use super::scope::{MapError, Scope, VARIABLES};
use super::template::{Escape, Template, Tree};
use super::watch::{Exceeded, Watch};
use crate::config::names::nearest;
use crate::config::{ConfigError, Node, Spanned};

type Filter = jaq_core::Filter<Jq>;

/// What the program is called inside; no expression can write it by chance.
const MAIN: &str = "__tidegate_main";
/// The parser and the compiler recurse along the expression, some kilobytes of stack a level: these bounds and the
/// stack of the thread that compiles go together.
const LONGEST: usize = 16 << 10;
const DEEPEST: usize = 256;
/// Terms inside each other, counted by [`rewrite::depth`]: running recurses along them.
const DEEPEST_TERM: usize = 400;
const COMPILE_STACK: usize = 256 << 20;

/// Compiles expressions, with a system's `define:` known to all of them.
#[derive(Clone, Debug, Default)]
pub struct Compiler {
    define: Option<Arc<Spanned<String>>>,
}

/// A compiled expression. Cheap to clone; may run in several threads at once.
#[derive(Clone)]
pub struct Program(Arc<Compiled>);

struct Compiled {
    filter: Filter,
    text: Spanned<String>,
}

impl Compiler {
    /// With the definitions (`def name: …;`) of a system, or none.
    pub fn new(define: Option<&Spanned<String>>) -> Result<Self, ConfigError> {
        let compiler = Compiler { define: define.map(|define| Arc::new(define.clone())) };
        compiler.compile(&Spanned::new(".".to_owned(), crate::config::Place::outside("define")))?;
        Ok(compiler)
    }

    /// A jq expression.
    pub fn jq(&self, text: &Spanned<String>) -> Result<Program, ConfigError> {
        Ok(Program(Arc::new(Compiled { filter: self.compile(text)?, text: text.clone() })))
    }

    /// A text with `{{ jq }}` in it.
    pub fn template(&self, text: &Spanned<String>, escape: Escape) -> Result<Template, ConfigError> {
        Template::compile(self, text, escape)
    }

    /// A free map of templates (`params`, `headers`).
    pub fn tree(&self, node: &Node) -> Result<Tree, ConfigError> {
        Tree::compile(self, node)
    }

    fn compile(&self, text: &Spanned<String>) -> Result<Filter, ConfigError> {
        for text in [Some(text), self.define.as_deref()].into_iter().flatten() {
            bounded(text)?;
        }
        let define = self.define.as_deref();
        let compiled = std::thread::scope(|scope| {
            let builder = std::thread::Builder::new().name("jq".to_owned()).stack_size(COMPILE_STACK);
            builder.spawn_scoped(scope, || compile(define, text)).map(|thread| thread.join())
        });
        match compiled {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(ConfigError::new(&text.place, "this expression cannot be compiled")
                .hint("write it in a simpler way; jq gave up inside")),
            Err(cause) => Err(ConfigError::new(&text.place, format!("no thread to compile with: {cause}"))),
        }
    }
}

fn bounded(text: &Spanned<String>) -> Result<(), ConfigError> {
    let error = |at, what: String| ConfigError::new(&text.place_in(at), what).hint("write it in several parts");
    if text.len() > LONGEST {
        return Err(error(0, format!("an expression of more than {LONGEST} bytes")));
    }
    let mut depth: usize = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > DEEPEST {
            return Err(error(at, format!("an expression nested more than {DEEPEST} deep")));
        }
    }
    Ok(())
}

fn shallow(text: &Spanned<String>, at: usize, term: &Term<&str>) -> Result<(), ConfigError> {
    if rewrite::depth(term) <= DEEPEST_TERM {
        return Ok(());
    }
    Err(ConfigError::new(
        &text.place_in(at),
        format!("an expression of more than {DEEPEST_TERM} terms inside each other"),
    )
    .hint("every `|`, `,` and operator of a chain counts; a list of constants is shorter as \"a,b,c\" / \",\""))
}

fn compile(define: Option<&Spanned<String>>, text: &Spanned<String>) -> Result<Filter, ConfigError> {
    let mut defs: Vec<Def<&str>> = standard().to_vec();
    let mut defined = Vec::new();
    if let Some(define) = define {
        for def in parse(define, |parser| parser.defs())? {
            shallow(define, offset(define, def.name).unwrap_or(0), &def.body)?;
            defined.push(def.name);
            defs.push(rewrite::def(def, Compare::Exact));
        }
    }
    let main: Term<&str> = parse(text, |parser| parser.term())?;
    shallow(text, 0, &main)?;
    defs.push(Def { name: MAIN, args: Vec::new(), body: rewrite::term(main, Compare::Exact) });
    let arena = Arena::default();
    let inside = |what: &str| ConfigError::new(&text.place, format!("this expression cannot be compiled: {what}"));
    let modules =
        Loader::new(defs).load(&arena, File { code: MAIN, path: () }).map_err(|_| inside("it cannot be loaded"))?;
    let compiler = jaq_core::Compiler::default().with_funs(functions()).with_global_vars(VARIABLES);
    compiler.compile(modules).map_err(|errors| {
        let errors = errors.into_iter().flat_map(|(_, errors)| errors);
        let told = errors.map(|(name, undefined)| {
            let (within, at) = [Some(text), define]
                .into_iter()
                .flatten()
                .find_map(|text| Some((text, offset(text, name)?)))
                .unwrap_or((text, 0));
            undefined_name(within, at, name, &undefined, &defined)
        });
        told.reduce(ConfigError::and).unwrap_or_else(|| inside("its names cannot be resolved"))
    })
}

/// Where `part` begins in `whole`, if it is a part of it.
fn offset(whole: &str, part: &str) -> Option<usize> {
    let at = (part.as_ptr() as usize).checked_sub(whole.as_ptr() as usize)?;
    (at + part.len() <= whole.len()).then_some(at)
}

fn parse<'s, T: Default>(
    text: &'s Spanned<String>,
    read: impl for<'t> FnOnce(&mut Parser<'s, 't>) -> jaq_core::load::parse::Result<'s, 't, T>,
) -> Result<T, ConfigError> {
    let tokens = Lexer::new(text.as_str()).lex().map_err(|errors| {
        // What follows the first is most often its consequence.
        let told = errors.into_iter().next().map(|(expected, rest)| {
            let at = offset(text, rest).unwrap_or(0);
            let found = rest.chars().next().map_or_else(|| "the end".to_owned(), |found| format!("`{found}`"));
            not_jq(text, at, expected.as_str(), &found)
        });
        told.unwrap_or_else(|| not_jq(text, 0, "an expression", "something else"))
    })?;
    Parser::new(&tokens).parse(read).map_err(|errors| match errors.into_iter().next() {
        Some((expected, token)) => {
            let token = token.map(|token| token.0);
            let at = token.and_then(|token| offset(text, token)).unwrap_or(text.trim_end().len());
            let found = token.map_or_else(|| "the end".to_owned(), |token| format!("`{}`", first_line(token)));
            not_jq(text, at, expected.as_str(), &found)
        }
        None => not_jq(text, 0, "an expression", "something else"),
    })
}

fn first_line(token: &str) -> String {
    let line = token.lines().next().unwrap_or_default();
    if line.chars().count() > 30 { line.chars().take(29).chain("…".chars()).collect() } else { line.to_owned() }
}

fn not_jq(text: &Spanned<String>, at: usize, expected: &str, found: &str) -> ConfigError {
    let found = if text.masked() { "something else" } else { found };
    let error = ConfigError::new(&text.place_in(at), format!("this is not jq: expected {expected}, found {found}"));
    let rest = text.get(at..).unwrap_or_default();
    let before = text.get(..at).unwrap_or_default();
    let hint = if rest.starts_with('\'') {
        "jq texts are in double quotes: \"…\""
    } else if rest.starts_with("&&") || rest.starts_with('&') {
        "write `and`"
    } else if rest.starts_with("||") || before.ends_with('|') && rest.starts_with('|') {
        "write `or` (or `//` for a default)"
    } else if rest.starts_with('!') {
        "write `… | not`"
    } else if rest.starts_with("{{") || before.ends_with("{{") || before.ends_with('{') && rest.starts_with('{') {
        "this setting is jq as it stands; `{{ … }}` is for texts"
    } else if rest.trim().is_empty() && text.place.line_text().is_some_and(|line| line.contains(" #")) {
        "YAML takes ` #` and what follows as a comment: put quotes around the expression"
    } else if before.trim_end().ends_with("else if") || rest.starts_with("if") && before.trim_end().ends_with("else") {
        "write `elif`"
    } else if rest.starts_with(['\u{201c}', '\u{201d}', '\u{2018}', '\u{2019}']) {
        "these are typographic quotes: jq texts are in plain double quotes, \"…\""
    } else if rest.starts_with('`') {
        "jq texts are in double quotes: \"…\", with \\(…) for a value inside"
    } else if rest.starts_with(')') && before.trim_end().ends_with('(') {
        "a function without arguments is called without `()`"
    } else if rest.starts_with(':') && before.contains('?') {
        "write `if … then … else … end`, or `.a // .b` for a default"
    } else if expected == "end" || expected == "else or end" {
        "`if … then … else … end`"
    } else {
        return error;
    };
    error.hint(hint)
}

fn undefined_name(
    text: &Spanned<String>,
    at: usize,
    name: &str,
    undefined: &Undefined,
    defined: &[&str],
) -> ConfigError {
    let place = text.place_in(at);
    let masked = text.masked();
    match undefined {
        Undefined::Filter(arity) => {
            let written = match arity {
                _ if masked => "…".to_owned(),
                0 => name.to_owned(),
                _ => format!("{name}({})", vec!["…"; *arity].join("; ")),
            };
            let error = ConfigError::new(&place, format!("jq has no function `{written}` here"));
            if let Some((_, why)) = ABSENT.iter().find(|(absent, why)| *absent == name && !why.is_empty()) {
                return error.hint(*why);
            }
            let known = names();
            let same: Vec<usize> = standard().iter().filter(|def| def.name == name).map(|def| def.args.len()).collect();
            if !same.is_empty() || known.contains(&name) || defined.contains(&name) {
                return error.hint(format!("`{name}` takes another number of arguments; they are parted by `;`"));
            }
            match nearest(name, known.iter().chain(defined).copied()) {
                Some(near) => error.hint(format!("did you mean `{near}`? (`.{name}` is the field of that name)")),
                None => error.hint(format!("`.{name}` is the field of that name; a text is \"{name}\"")),
            }
        }
        Undefined::Var => {
            let error =
                ConfigError::new(&place, format!("there is no variable `{}`", if masked { "$…" } else { name }));
            match nearest(name, VARIABLES) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint(format!("there are {}, and what `… as $name |` binds", VARIABLES.join(", "))),
            }
        }
        other => ConfigError::new(&place, format!("there is no {} `{name}`", other.as_str())),
    }
}

impl Program {
    /// All values the expression gives.
    pub fn run(&self, input: &Value, scope: &Scope<'_>) -> Result<Vec<Value>, MapError> {
        self.outputs(input, scope, usize::MAX)
    }

    /// The first value the expression gives; null where it gives none.
    pub fn first(&self, input: &Value, scope: &Scope<'_>) -> Result<Value, MapError> {
        Ok(self.outputs(input, scope, 1)?.pop().unwrap_or(Value::Null))
    }

    /// Whether the first value is neither null nor false.
    pub fn holds(&self, input: &Value, scope: &Scope<'_>) -> Result<bool, MapError> {
        Ok(!matches!(self.first(input, scope)?, Value::Null | Value::Bool(false)))
    }

    /// The expression as written.
    pub fn text(&self) -> &str {
        &self.0.text.value
    }

    /// Whether a reference (`${env:…}`, `${file:…}`) went into it.
    pub fn masked(&self) -> bool {
        self.0.text.masked()
    }

    /// Where it is written.
    pub fn place(&self) -> &crate::config::Place {
        &self.0.text.place
    }

    fn outputs(&self, input: &Value, scope: &Scope<'_>, most: usize) -> Result<Vec<Value>, MapError> {
        let watch = Watch::new(scope.links);
        let ran = catch_unwind(AssertUnwindSafe(|| self.evaluate(input, scope, &watch, most)));
        if let Some(wanted) = watch.waits.take() {
            return Err(MapError::Waits(wanted));
        }
        let needs = watch.needs.take();
        if !needs.is_empty() {
            return Err(MapError::Needs(needs));
        }
        let why = match ran {
            Ok(Ok(values)) => return Ok(values),
            Ok(Err(why)) => why,
            Err(unwound) => match unwound.downcast_ref::<Exceeded>() {
                Some(Exceeded(why)) => format!("stopped: {why}"),
                None => "jq failed inside".to_owned(),
            },
        };
        Err(self.failed(&why, input, scope))
    }

    fn evaluate(&self, input: &Value, scope: &Scope<'_>, watch: &Watch<'_>, most: usize) -> Result<Vec<Value>, String> {
        let filter = &self.0.filter;
        let context = Ctx::<Jq>::new(Run { lut: &filter.lut, watch }, Vars::new(scope.values()));
        let mut values = Vec::new();
        for output in filter.id.run((context, to_val(input))).take(most) {
            watch.step();
            match output {
                Ok(value) => values.push(from_val(&value)?),
                Err(exception) => {
                    return Err(exception.get_err().map_or_else(|_| "halted".to_owned(), |error| told(&error)));
                }
            }
        }
        Ok(values)
    }

    fn failed(&self, why: &str, input: &Value, scope: &Scope<'_>) -> MapError {
        let mut text =
            format!("{}: {}; the input was {}", self.0.text.place, shorten(why, 300), shorten(&input.to_string(), 300));
        if let Some(secret) = scope.secret.filter(|secret| !secret.is_empty()) {
            let quoted = Value::from(secret).to_string();
            text = text.replace(quoted.trim_matches('"'), "***").replace(secret, "***");
        }
        MapError::Failed(text)
    }
}

impl std::fmt::Debug for Program {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "jq({:?})", self.0.text)
    }
}

fn told(error: &jaq_core::Error<Val>) -> String {
    match error.clone().into_val() {
        Val::TStr(text) | Val::BStr(text) => String::from_utf8_lossy(&text).into_owned(),
        other => other.to_string(),
    }
}

fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() > most { text.chars().take(most).chain(" …".chars()).collect() } else { text.to_owned() }
}
