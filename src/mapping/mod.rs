//! jq where a value is computed, `{{ jq }}` inside text, and what expressions may see.
//!
//! Expressions never do I/O: `link(…)` and `local(…)` answer from a [`Links`] the caller has filled; what is not
//! there yet comes back as [`MapError::Needs`], the caller fetches it and runs the expression again. The same
//! expression on the same input gives the same output: there is no clock, no environment, no randomness.
//!
//! * Numbers are exact: a decimal stays the text it was, and `+ - * /` and comparisons of decimals are those of
//!   decimals (a quotient that does not end is a double). The order of an object's names stays.
//! * `.x` of an object without `x` is null; `has("x")` tells missing from null, and an object that is built without
//!   a name has not got it: `{a} + (if has("b") then {b} else {} end)`.
//! * A run is bounded, whatever the expression: see [`watch`].

mod convert;
mod functions;
mod links;
mod number;
mod program;
mod rewrite;
mod scope;
#[cfg(test)]
mod shop_tests;
mod template;
#[cfg(test)]
mod tests;
pub mod watch;

pub use convert::equal;
pub use links::{Links, Owed, Wanted};
pub use program::{Compiler, Program};
pub use scope::{MapError, Scope};
pub use template::{Escape, Template, Tree};
