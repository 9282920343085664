//! Systems: one HTTP client each, with its auth, budget, breaker, probe and classes of answers.
//!
//! Every connector of a system shares the one [`System`]. [`System::send`] never retries by itself (a refreshed
//! login apart): it says what became of the request, and whether it may have been applied is never guessed.

mod answer;
mod auth;
mod availability;
mod breaker;
mod budget;
mod classes;
mod exchange;
mod headers;
mod judge;
mod settings;
mod system;
mod template;

pub use answer::{Answer, HttpRequest, HttpResponse};
pub use breaker::{BreakerSettings, BreakerState};
pub use settings::SystemSettings;
pub use system::System;
pub use template::RequestTemplate;
