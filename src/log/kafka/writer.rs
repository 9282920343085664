//! Writing to Kafka: the writer of a source gives batches to the source's producer, whose thread ([`super::feeder`])
//! settles them.
//!
//! The invariant: a position is written only behind records that are durable. On a delivery failure everything after
//! it fails, what waits is purged, and the source goes back to the stored position with a new producer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::producing::{Accepted, Outstanding, Producing, UNIT};
use super::{Inside, lock, positions};
use crate::event::RecordBatch;
use crate::log::{Appended, LogError, LogWriter, Ticket};

/// How often waits look whether Kafka has gone.
const LOOK: Duration = Duration::from_millis(250);

/// Opens the writer of `source`; one before it is fenced. Waits for what that one left on the way.
pub(super) async fn open(inside: &Arc<Inside>, source: &str) -> Result<Box<dyn LogWriter>, LogError> {
    positions::ensure_topic(inside).await?;
    let found = lock(&inside.producers).get(source).cloned();
    let producing = match found {
        Some(producing) if producing.shared.failed.get().is_none() => producing,
        found => {
            if let Some(failed) = found {
                // What was purged is settled soon; nothing of the old producer may come after the new one's.
                failed.settle(Duration::from_secs(5)).await?;
                lock(&inside.producers).remove(source);
                // Topics may be gone: they are looked for again.
                lock(&inside.known).clear();
            }
            let producing = Arc::new(Producing::new(inside, source)?);
            lock(&inside.producers).entry(source.to_owned()).or_insert(producing).clone()
        }
    };
    let generation = producing.generation.fetch_add(1, Ordering::AcqRel) + 1;
    producing.settle(producing.unavailable_after).await?;
    Ok(Box::new(Writer { inside: inside.clone(), producing, generation, broken: Arc::default(), cut: false }))
}

struct Writer {
    inside: Arc<Inside>,
    producing: Arc<Producing>,
    generation: u64,
    /// A ticket of this writer has failed: so do all later ones.
    broken: Arc<AtomicBool>,
    /// An append has begun and not ended well: it failed, or its caller dropped it.
    cut: bool,
}

impl Writer {
    fn refusal(&self) -> Option<LogError> {
        let producing = &self.producing;
        if producing.generation.load(Ordering::Acquire) != self.generation {
            return Some(LogError::Fenced(format!(
                "another writer has taken the place of this one of '{}'",
                producing.source
            )));
        }
        if self.cut || self.broken.load(Ordering::Acquire) {
            return Some(LogError::NotDurable("records before these were not written".into()));
        }
        producing.shared.failed.get().cloned().or_else(|| producing.stalled())
    }

    fn check(&self) -> Result<(), LogError> {
        match self.refusal() {
            None => Ok(()),
            Some(error) => {
                self.broken.store(true, Ordering::Release);
                Err(error)
            }
        }
    }

    /// Waits for room within the bound.
    async fn room(&self, bytes: usize) -> Result<OwnedSemaphorePermit, LogError> {
        let units = (bytes / UNIT + 1).min(self.producing.units) as u32;
        let mut room = std::pin::pin!(self.producing.in_flight.clone().acquire_many_owned(units));
        loop {
            match tokio::time::timeout(LOOK, &mut room).await {
                Ok(Ok(permit)) => return Ok(permit),
                Ok(Err(_)) => return Err(LogError::NotDurable("the writer was closed".into())),
                Err(_) => self.check()?,
            }
        }
    }
}

impl Writer {
    async fn accept(&self, batch: RecordBatch, position: Option<Vec<u8>>) -> Result<Ticket, LogError> {
        for topic in batch.topics() {
            if !self.inside.knows(topic).await? {
                self.broken.store(true, Ordering::Release);
                return Err(LogError::UnknownTopic(topic.to_string()));
            }
        }
        let in_flight = self.room(batch.byte_size()).await?;
        let (reply, answer) = oneshot::channel();
        let outstanding = Outstanding::new(&self.producing.shared);
        self.producing.accept(Accepted { outstanding, batch, position, in_flight, reply })?;
        Ok(Box::pin(wait(answer, self.producing.clone(), self.broken.clone())))
    }
}

#[async_trait]
impl LogWriter for Writer {
    async fn position(&mut self) -> Result<Option<Vec<u8>>, LogError> {
        positions::read(&self.inside, &self.producing.source).await
    }

    async fn append(&mut self, batch: RecordBatch, position: Option<Vec<u8>>) -> Result<Ticket, LogError> {
        self.check()?;
        self.cut = true;
        let ticket = self.accept(batch, position).await;
        self.cut = ticket.is_err();
        ticket
    }
}

/// The ticket: resolves with the batch, or when Kafka is away.
async fn wait(
    mut answer: oneshot::Receiver<Result<Appended, LogError>>,
    producing: Arc<Producing>,
    broken: Arc<AtomicBool>,
) -> Result<Appended, LogError> {
    loop {
        let result = match tokio::time::timeout(LOOK, &mut answer).await {
            Ok(Ok(result)) if broken.load(Ordering::Acquire) => {
                result.and(Err(LogError::NotDurable("records before these were not written".into())))
            }
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(LogError::NotDurable("the writer was closed".into())),
            Err(_) => match producing.stalled() {
                Some(stalled) => Err(stalled),
                None => continue,
            },
        };
        if result.is_err() {
            broken.store(true, Ordering::Release);
        }
        return result;
    }
}
