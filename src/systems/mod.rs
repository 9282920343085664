//! Systems: one HTTP client each, with its auth, budget, breaker, probe and classes of answers.
//!
//! Every connector of a system shares the one [`System`]. [`System::send`] never retries by itself (a refreshed
//! login apart): it says what became of the request, and whether it may have been applied is never guessed.

mod answer;
mod breaker;
mod budget;

pub use answer::{Answer, HttpRequest, HttpResponse};
pub use breaker::{Breaker, BreakerSettings, BreakerState, Pass};
pub use budget::{Budget, Limit, Turn};

/// One system; every connector of it shares the one.
pub struct System;
