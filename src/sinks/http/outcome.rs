//! What became of a record, or of one step towards it.

use std::time::Duration;

use serde_json::Value;

use crate::datastore::LinkKey;
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
    /// The link waited for in vain: system, object, key.
    pub waits_for: Option<Box<(String, String, Value)>>,
    /// It is for what the row is now, and nothing was applied or can be doubled: when the row changes, it is tried again.
    pub heals: bool,
    /// It is tried again by itself after this long, and ever later.
    pub again_in: Option<Duration>,
    /// The intent that is open still, to be closed when the record is parked and not before: or whoever comes back to a
    /// record that was not parked would make anew what may have been made.
    pub closes: Option<Box<Closes>>,
}

/// An intent, and the link that it is on.
#[derive(Debug)]
pub struct Closes {
    pub key: LinkKey,
    pub intent: String,
}

impl Rejection {
    /// One that only a person can mend.
    pub fn because(reason: impl Into<String>) -> Self {
        Rejection {
            reason: reason.into(),
            request: None,
            response: None,
            waits_for: None,
            heals: false,
            again_in: None,
            closes: None,
        }
    }

    /// One that a change of the row may mend.
    pub fn of_row(reason: impl Into<String>) -> Self {
        Rejection { heals: true, ..Rejection::because(reason) }
    }

    pub fn healing(mut self, heals: bool) -> Self {
        self.heals = heals;
        self
    }

    /// Once it is parked, this intent is over.
    pub fn closing(mut self, key: &LinkKey, intent: &str) -> Self {
        self.closes = Some(Box::new(Closes { key: key.clone(), intent: intent.to_owned() }));
        self
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
