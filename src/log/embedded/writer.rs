//! Writing to the embedded log: a source's batches, handed to the commit thread.
//!
//! The invariant: after a ticket that failed, or that was not answered in time, all later ones of its writer fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Semaphore, oneshot};

use super::command::{Append, Command};
use super::commit::Shared;
use super::database::ReadPool;
use super::{ANSWER_WAIT, UNIT, answered, gone, not_answered, position_of};
use crate::event::RecordBatch;
use crate::log::{LogError, LogWriter, Ticket};

pub(super) struct Writer {
    pub source: Arc<str>,
    pub generation: u64,
    pub shared: Arc<Shared>,
    pub commands: Sender<Command>,
    pub in_flight: Arc<Semaphore>,
    pub units: usize,
    pub pool: ReadPool,
    /// A ticket of this writer has failed: so do all later ones.
    pub broken: Arc<AtomicBool>,
}

/// A batch before was not told to be durable in time, or failed.
fn behind_a_failure() -> LogError {
    LogError::NotDurable("records before these were not written".into())
}

/// The ticket of a batch: durable, unless one before it has failed.
async fn settled<T>(
    answer: oneshot::Receiver<Result<T, LogError>>,
    shared: Arc<Shared>,
    broken: Arc<AtomicBool>,
    deadline: Duration,
) -> Result<T, LogError> {
    let mut result = answered(answer, &shared, deadline).await;
    if broken.load(Ordering::Acquire) {
        result = result.and(Err(behind_a_failure()));
    }
    if result.is_err() {
        broken.store(true, Ordering::Release);
    }
    result
}

#[async_trait]
impl LogWriter for Writer {
    async fn position(&mut self) -> Result<Option<Vec<u8>>, LogError> {
        position_of(&self.pool, self.source.clone()).await
    }

    async fn append(&mut self, batch: RecordBatch, position: Option<Vec<u8>>) -> Result<Ticket, LogError> {
        if let Some(fatal) = self.shared.fatal.get() {
            return Err(fatal.clone());
        }
        if self.broken.load(Ordering::Acquire) {
            return Err(behind_a_failure());
        }
        let wanted = (batch.byte_size() / UNIT + 1).min(self.units) as u32;
        let room = self.in_flight.clone().acquire_many_owned(wanted);
        let in_flight = match tokio::time::timeout(ANSWER_WAIT, room).await {
            Ok(in_flight) => in_flight.map_err(|_| gone(&self.shared))?,
            Err(_) => return Err(not_answered(ANSWER_WAIT)),
        };
        let (reply, answer) = oneshot::channel();
        let append =
            Append { source: self.source.clone(), generation: self.generation, batch, position, in_flight, reply };
        self.commands.send(Command::Append(append)).map_err(|_| gone(&self.shared))?;
        Ok(Box::pin(settled(answer, self.shared.clone(), self.broken.clone(), ANSWER_WAIT)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::new_shared;
    use super::*;

    #[tokio::test]
    async fn what_comes_behind_a_batch_that_was_not_answered_in_time_is_not_durable_either() {
        let (shared, broken) = (new_shared(), Arc::new(AtomicBool::new(false)));
        let (told, answer) = oneshot::channel();
        let first = settled::<u8>(answer, shared.clone(), broken.clone(), Duration::from_millis(5)).await;
        assert!(matches!(first, Err(LogError::Unavailable(_))), "{first:?}");
        assert!(told.send(Ok(1)).is_err(), "nobody waits any more");
        let (told, answer) = oneshot::channel();
        told.send(Ok(2)).unwrap();
        let second = settled(answer, shared, broken, Duration::from_secs(5)).await;
        assert!(matches!(second, Err(LogError::NotDurable(_))), "{second:?}");
    }
}
