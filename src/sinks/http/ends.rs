//! What is known of requests whose end could not be written to their links: the datastore went away in between, and the
//! system need not be asked, nor a person, what this process was told.
//!
//! An intent is known by its id, which is never used twice; what is known of one that nobody comes back to is forgotten.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::decide::Job;
use crate::systems::HttpResponse;

/// How many ends are remembered.
const MOST: usize = 256;

#[derive(Clone)]
pub(super) enum End {
    /// The request was not sent, or was refused.
    NotApplied,
    /// With this answer; none where what was to be deleted was gone.
    Applied(Box<(Job, Option<HttpResponse>)>),
}

#[derive(Default)]
pub(super) struct Ends(Mutex<VecDeque<(String, End)>>);

impl Ends {
    pub fn know(&self, intent: &str, end: End) {
        let mut ends = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ends.retain(|(known, _)| known != intent);
        if ends.len() >= MOST {
            ends.pop_front();
        }
        ends.push_back((intent.to_owned(), end));
    }

    pub fn of(&self, intent: &str) -> Option<End> {
        let ends = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ends.iter().find(|(known, _)| known == intent).map(|(_, end)| end.clone())
    }

    pub fn forget(&self, intent: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(known, _)| known != intent);
    }
}
