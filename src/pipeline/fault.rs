//! What stops a connector, and what is done about it: decided by the kind alone, in one place.

use std::time::Duration;

/// A fault as the pipeline sees it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub kind: FaultKind,
    /// What happened, where, and what to do.
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Passing: go back to what is durable and try again, with growing pauses.
    Retry { after: Option<Duration> },
    /// The other side is down or busy: wait for its breaker, nothing is lost.
    Unavailable { after: Option<Duration> },
    /// Needs a person: the connector stops, is shown as failed, and health says so.
    Stop,
}

impl Fault {
    pub fn retry(message: impl Into<String>) -> Self {
        Fault { kind: FaultKind::Retry { after: None }, message: message.into() }
    }

    pub fn unavailable(message: impl Into<String>, after: Option<Duration>) -> Self {
        Fault { kind: FaultKind::Unavailable { after }, message: message.into() }
    }

    pub fn stop(message: impl Into<String>) -> Self {
        Fault { kind: FaultKind::Stop, message: message.into() }
    }

    /// Says where it happened: `context: message`.
    pub fn context(mut self, context: impl std::fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl From<crate::log::LogError> for Fault {
    fn from(error: crate::log::LogError) -> Self {
        let message = error.to_string();
        match error {
            // Who writes makes it, and makes it again when somebody has removed it; brokers hear of a new one one after
            // the other.
            crate::log::LogError::UnknownTopic(_) => Fault::unavailable(message, None),
            error if error.is_retriable() => Fault::unavailable(message, None),
            _ => Fault::stop(message),
        }
    }
}

impl From<crate::registry::RegistryError> for Fault {
    fn from(error: crate::registry::RegistryError) -> Self {
        let message = error.to_string();
        match error {
            crate::registry::RegistryError::Unavailable(_) => Fault::unavailable(message, None),
            _ => Fault::stop(message),
        }
    }
}

impl From<crate::datastore::DatastoreError> for Fault {
    fn from(error: crate::datastore::DatastoreError) -> Self {
        use crate::datastore::DatastoreErrorKind;
        match error.kind {
            // What is not set up may be on its way: shown as waiting, and well again by itself.
            DatastoreErrorKind::Unavailable | DatastoreErrorKind::Setup => Fault::unavailable(error.message, None),
            DatastoreErrorKind::Conflict | DatastoreErrorKind::Lost => Fault::retry(error.message),
            DatastoreErrorKind::Rejected => Fault::stop(error.message),
        }
    }
}
