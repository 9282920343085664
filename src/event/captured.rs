//! What a capture hands to the log: records, and the position that they bring it to; and the way back of the emptied
//! buffers, so that a steady capture allocates none.

use std::sync::{Arc, Mutex, PoisonError};

use super::{CapturePosition, RecordBatch};

/// Committed to the log together. Without a position the records are part of a snapshot that is not whole yet.
#[derive(Clone, Debug, Default)]
pub struct CapturedBatch {
    pub records: RecordBatch,
    /// How many of the records are no events, but what the capture keeps for itself.
    pub own: usize,
    pub position: Option<CapturePosition>,
    /// Where the emptied buffer of `records` goes when they are durable.
    pub spares: Spares,
}

/// Buffers to be filled again.
#[derive(Clone, Debug, Default)]
pub struct Spares(Arc<Mutex<Vec<RecordBatch>>>);

impl Spares {
    /// More are not needed: a batch is written while another is filled and some are on their way to the disk.
    const MOST: usize = 4;
    /// A buffer that one large row has blown up is let go.
    const LARGEST: usize = 4 << 20;

    pub fn take(&self) -> RecordBatch {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    pub fn put(&self, mut buffer: RecordBatch) {
        buffer.clear();
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spares.len() < Self::MOST && (1..=Self::LARGEST).contains(&buffer.capacity()) {
            spares.push(buffer);
        }
    }

    /// Lets them go: nothing is to be written for a while.
    pub fn shed(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
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
