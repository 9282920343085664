//! Changes to a parsed expression before it is compiled: arithmetic becomes exact, loops are watched.
//!
//! The names of what is put in begin with a character that no expression can write.

use jaq_core::load::lex::StrPart;
use jaq_core::load::parse::{BinaryOp, Def, Pattern, Term};
use jaq_core::ops::{Cmp, Math};
use jaq_core::path::{Part, Path};

/// Passes its input on; a step of the watch.
pub(super) const TURN: &str = "\u{1}turn";
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
        Term::Arr(inside) => Term::Arr(inside.map(boxed)),
        Term::Obj(fields) => Term::Obj(fields.into_iter().map(|(key, value)| (one(key), value.map(one))).collect()),
        Term::Neg(inside) => Term::Neg(boxed(inside)),
        Term::Label(name, inside) => Term::Label(name, boxed(inside)),
        Term::TryCatch(inside, catch) => Term::TryCatch(boxed(inside), catch.map(boxed)),
        Term::IfThenElse(branches, otherwise) => Term::IfThenElse(
            branches.into_iter().map(|(condition, branch)| (one(condition), one(branch))).collect(),
            otherwise.map(boxed),
        ),
        Term::Call(name, arguments) => Term::Call(name, arguments.into_iter().map(one).collect()),
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
    let any = |tree: &Term<&str>| calls(tree, name);
    match tree {
        Term::Id | Term::Recurse | Term::Num(_) | Term::Break(_) | Term::Var(_) => false,
        Term::Str(_, parts) => parts.iter().any(|part| matches!(part, StrPart::Term(inner) if any(inner))),
        Term::Arr(inside) => inside.as_deref().is_some_and(any),
        Term::Obj(fields) => fields.iter().any(|(key, value)| any(key) || value.as_ref().is_some_and(any)),
        Term::Neg(inside) | Term::Label(_, inside) => any(inside),
        Term::BinOp(left, op, right) => {
            any(left) || any(right) || matches!(op, BinaryOp::Pipe(Some(bound)) if pattern_calls(bound, name))
        }
        Term::Fold(_, values, bound, parts) => any(values) || pattern_calls(bound, name) || parts.iter().any(any),
        Term::TryCatch(inside, catch) => any(inside) || catch.as_deref().is_some_and(any),
        Term::IfThenElse(branches, otherwise) => {
            branches.iter().any(|(condition, branch)| any(condition) || any(branch))
                || otherwise.as_deref().is_some_and(any)
        }
        Term::Def(defs, body) => defs.iter().any(|def| any(&def.body)) || any(body),
        Term::Call(called, arguments) => *called == name || arguments.iter().any(any),
        Term::Path(inside, Path(parts)) => {
            any(inside)
                || parts.iter().any(|(part, _)| match part {
                    Part::Index(index) => any(index),
                    Part::Range(from, to) => from.as_ref().is_some_and(any) || to.as_ref().is_some_and(any),
                })
        }
    }
}

fn pattern_calls(bound: &Pattern<&str>, name: &str) -> bool {
    match bound {
        Pattern::Var(_) => false,
        Pattern::Arr(items) => items.iter().any(|item| pattern_calls(item, name)),
        Pattern::Obj(fields) => fields.iter().any(|(key, value)| calls(key, name) || pattern_calls(value, name)),
    }
}
