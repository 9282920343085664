//! What a capture hands to the log: records, and the position that they bring it to.

use std::sync::{Arc, Mutex, PoisonError};

use super::{CapturePosition, RecordBatch};

/// Committed to the log together. Without a position the records are part of a snapshot that is not whole yet.
#[derive(Clone, Debug, Default)]
pub struct CapturedBatch {
    pub records: RecordBatch,
    /// How many of the records are no events, but what the capture keeps for itself.
    pub own: usize,
    pub position: Option<CapturePosition>,
}

/// What the log holds as a capture's position: set by who opens the log's writer, read by who goes on from there.
#[derive(Clone, Debug, Default)]
pub struct StoredPosition(Arc<Mutex<Option<CapturePosition>>>);

impl StoredPosition {
    pub fn get(&self) -> Option<CapturePosition> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set(&self, position: Option<CapturePosition>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = position;
    }
}
