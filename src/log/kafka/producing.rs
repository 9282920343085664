//! A source's producer, and what its thread ([`super::feeder`]) and its writers share.
//!
//! The invariant: a batch is counted as outstanding from before its first record is handed to librdkafka until it is
//! settled, one way or the other; one that is dropped in between is a gap, and nothing may come after it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::client::{Told, no_client};
use super::feeder::Feeder;
use super::native::Native;
use super::{Inside, lock};
use crate::event::RecordBatch;
use crate::log::{Appended, LogError};

/// In-flight bytes are counted in these units, since a semaphore counts to 2^32.
pub(super) const UNIT: usize = 1024;

/// It outlives its writers: what one of them left on the way is settled before the next starts.
pub(super) struct Producing {
    pub source: String,
    pub shared: Arc<Shared>,
    pub in_flight: Arc<Semaphore>,
    pub units: usize,
    pub unavailable_after: Duration,
    /// The writer that may write.
    pub generation: AtomicU64,
    inbox: Sender<Handed>,
    /// The thread's, and here to wake it.
    native: Option<Arc<Native>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the thread is given.
pub(super) enum Handed {
    Batch(Accepted),
    /// The end; with the last handle of the client but its own, since dropping one waits for librdkafka.
    Close(Option<Arc<Native>>),
}

pub(super) struct Shared {
    pub told: Told,
    /// Batches accepted and not settled.
    outstanding: AtomicUsize,
    start: Instant,
    /// When an acknowledgement came last, or the first batch was accepted after a silence; ms since `start`.
    progress_ms: AtomicU64,
    /// Something was not delivered: nothing after it may be.
    pub failed: OnceLock<LogError>,
}

impl Shared {
    pub fn progress(&self) {
        self.progress_ms.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn idle_for(&self) -> Duration {
        let last = Duration::from_millis(self.progress_ms.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(last)
    }
}

/// A batch counted as outstanding, until it is dropped. One that was not resolved leaves a gap: nothing may come
/// after it.
pub(super) struct Outstanding {
    shared: Arc<Shared>,
    pub resolved: bool,
}

impl Outstanding {
    pub fn new(shared: &Arc<Shared>) -> Self {
        if shared.outstanding.fetch_add(1, Ordering::AcqRel) == 0 {
            shared.progress();
        }
        Outstanding { shared: shared.clone(), resolved: false }
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        if !self.resolved {
            let _ = self.shared.failed.set(LogError::NotDurable("a batch could not be handed over to Kafka".into()));
        }
        self.shared.outstanding.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A batch that is to be written.
pub(super) struct Accepted {
    pub outstanding: Outstanding,
    pub batch: RecordBatch,
    pub position: Option<Vec<u8>>,
    pub in_flight: OwnedSemaphorePermit,
    pub reply: oneshot::Sender<Result<Appended, LogError>>,
}

impl Producing {
    pub fn new(inside: &Inside, source: &str) -> Result<Self, LogError> {
        let settings = &inside.settings;
        let told = Told::new();
        let shared = Arc::new(Shared {
            told: told.clone(),
            outstanding: AtomicUsize::new(0),
            start: Instant::now(),
            progress_ms: AtomicU64::new(0),
            failed: OnceLock::new(),
        });
        let native = Native::new(&settings.producer()?, told).map_err(|e| no_client("producer", &e))?;
        let (inbox, received) = channel();
        let feeder = Feeder::new(
            source.as_bytes(),
            &settings.positions_topic,
            native.clone(),
            shared.clone(),
            received,
            !settings.lingers(),
            settings.request_bytes(),
        )?;
        // Ends with `Close`, which the end of the `Producing` gives.
        let thread = std::thread::Builder::new()
            .name("kafka-producer".into())
            .spawn(move || feeder.run())
            .map_err(|e| no_client("producer's thread", &e))?;
        let units = (settings.in_flight_bytes / UNIT).clamp(1, u32::MAX as usize >> 4);
        Ok(Producing {
            source: source.to_owned(),
            shared,
            in_flight: Arc::new(Semaphore::new(units)),
            units,
            unavailable_after: settings.unavailable_after,
            generation: AtomicU64::new(0),
            inbox,
            native: Some(native),
            thread: Mutex::new(Some(thread)),
        })
    }

    pub fn accept(&self, accepted: Accepted) -> Result<(), LogError> {
        let closed = |_| LogError::NotDurable("the writer was closed".into());
        self.inbox.send(Handed::Batch(accepted)).map_err(closed)?;
        if let Some(native) = &self.native {
            native.wake();
        }
        Ok(())
    }

    /// Nothing has been acknowledged for long, and something waits to be.
    pub fn stalled(&self) -> Option<LogError> {
        let idle = self.shared.idle_for();
        if self.shared.outstanding.load(Ordering::Acquire) == 0 || idle < self.unavailable_after {
            return None;
        }
        let why = self.shared.told.last_error().map(|last| format!(": {last}")).unwrap_or_default();
        Some(LogError::Unavailable(format!("Kafka has acknowledged nothing for {} s{why}", idle.as_secs())))
    }

    /// Waits until nothing is on the way.
    pub async fn settle(&self, deadline: Duration) -> Result<(), LogError> {
        let give_up = Instant::now() + deadline;
        while self.shared.outstanding.load(Ordering::Acquire) > 0 {
            if Instant::now() > give_up {
                return Err(self.stalled().unwrap_or_else(|| {
                    LogError::Unavailable(format!("records of '{}' are still on their way to Kafka", self.source))
                }));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    pub async fn close(self: Arc<Self>) -> Result<(), LogError> {
        self.generation.fetch_add(1, Ordering::AcqRel);
        let result = self.settle(Duration::from_secs(30)).await;
        let thread = lock(&self.thread).take();
        drop(self);
        if let Some(thread) = thread {
            let joined = tokio::task::spawn_blocking(move || thread.join());
            let _ = tokio::time::timeout(Duration::from_secs(5), joined).await;
        }
        result
    }
}

impl Drop for Producing {
    fn drop(&mut self) {
        if let Some(native) = &self.native {
            native.wake();
        }
        let _ = self.inbox.send(Handed::Close(self.native.take()));
    }
}
