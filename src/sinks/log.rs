//! Where capture writes: the log, records and position together.

use std::sync::Arc;

use async_trait::async_trait;

use crate::event::{CapturePosition, CapturedBatch, StoredPosition};
use crate::log::{Log, LogWriter};
use crate::pipeline::{Counts, Destination, Fault, Written};

/// Batches that may be accepted and not yet durable; the log bounds them in bytes.
const WINDOW: usize = 64;

/// The one writer of a capture.
pub struct LogDestination {
    log: Arc<dyn Log>,
    /// Name that the position is kept under.
    source: String,
    writer: Option<Box<dyn LogWriter>>,
    stored: StoredPosition,
}

/// The position as the log keeps it.
fn encode(position: &CapturePosition) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(position).map_err(|error| Fault::stop(format!("a position can't be written: {error}")))
}

fn decode(source: &str, bytes: &[u8]) -> Result<CapturePosition, Fault> {
    serde_json::from_slice(bytes).map_err(|error| {
        Fault::stop(format!(
            "the log's position of '{source}' can't be read: {error}. Was it written by a newer version?"
        ))
    })
}

/// The position that the log has for `source`, read beside a worker that may be running.
pub async fn stored_position(log: &Arc<dyn Log>, source: &str) -> Result<Option<CapturePosition>, Fault> {
    log.position(source).await?.map(|bytes| decode(source, &bytes)).transpose()
}

impl LogDestination {
    /// Opens the writer and reads the position, which is then in [`LogDestination::stored`].
    pub async fn open(log: Arc<dyn Log>, source: &str) -> Result<Self, Fault> {
        let mut destination =
            LogDestination { log, source: source.to_owned(), writer: None, stored: StoredPosition::default() };
        destination.restart().await?;
        Ok(destination)
    }

    pub fn stored(&self) -> StoredPosition {
        self.stored.clone()
    }

    /// Stores a position alone, and waits until it is durable.
    pub async fn store(&mut self, position: &CapturePosition) -> Result<(), Fault> {
        let batch = CapturedBatch { position: Some(position.clone()), ..CapturedBatch::default() };
        self.write(batch).await?.await?;
        self.stored.set(Some(position.clone()));
        Ok(())
    }
}

#[async_trait]
impl Destination for LogDestination {
    type Batch = CapturedBatch;

    async fn write(&mut self, batch: CapturedBatch) -> Result<Written, Fault> {
        let writer = self.writer.as_mut().ok_or_else(|| Fault::retry("the log's writer is not open"))?;
        let position = batch.position.as_ref().map(encode).transpose()?;
        let (own, spares) = (batch.own, batch.spares);
        let ticket = writer.append(batch.records, position).await?;
        Ok(Box::pin(async move {
            let appended = ticket.await?;
            spares.put(appended.buffer);
            Ok(Counts {
                applied: appended.records.saturating_sub(own) as u64,
                bytes: appended.bytes as u64,
                ..Counts::default()
            })
        }))
    }

    fn window(&self) -> usize {
        WINDOW
    }

    async fn restart(&mut self) -> Result<(), Fault> {
        // The old writer goes first: there may be only one.
        self.writer = None;
        let mut writer = self.log.writer(&self.source).await?;
        let position = writer.position().await?;
        self.stored.set(position.map(|bytes| decode(&self.source, &bytes)).transpose()?);
        self.writer = Some(writer);
        Ok(())
    }
}
