//! What became of a record, or of one step towards it.

use std::time::Duration;

use serde_json::Value;

use crate::mapping::Wanted;
use crate::systems::HttpRequest;

#[derive(Debug)]
pub enum Outcome {
    Applied,
    /// And why.
    Skipped(&'static str),
    Rejected(Rejection),
    /// For another row's link.
    Waiting(Wanted),
}

/// Why a record is refused, for people.
#[derive(Debug)]
pub struct Rejection {
    pub reason: String,
    pub request: Option<Value>,
    pub response: Option<Value>,
}

impl Rejection {
    pub fn because(reason: impl Into<String>) -> Self {
        Rejection { reason: reason.into(), request: None, response: None }
    }

    pub fn of(mut self, request: &HttpRequest) -> Self {
        self.request = Some(request.to_json());
        self
    }

    pub fn answered(mut self, response: Value) -> Self {
        self.response = Some(response);
        self
    }
}

/// How an attempt goes on.
#[derive(Debug)]
pub enum Next {
    Done(Outcome),
    /// Decide anew after this long.
    Again(Duration),
}

impl Next {
    pub fn rejected(rejection: Rejection) -> Self {
        Next::Done(Outcome::Rejected(rejection))
    }

    pub fn skipped(why: &'static str) -> Self {
        Next::Done(Outcome::Skipped(why))
    }
}
