//! Writing to Kafka: one idempotent producer a source.
//!
//! A batch's records are handed to librdkafka, each with a reference to the batch's counter; the last
//! acknowledgement wakes the [`Settling`] task, which takes batches in order: when all records of a batch and of all
//! before it are durable, its position is written, and when that is durable the ticket resolves.
//!
//! The invariant: a position is written only behind records that are durable. On a delivery failure everything after
//! it fails, what waits is purged, and the source goes back to the stored position with a new producer.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rdkafka::ClientContext;
use rdkafka::Message as _;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, PurgeConfig, ThreadedProducer};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::client::{Told, fault};
use super::{Inside, lock, positions};
use crate::event::RecordBatch;
use crate::log::{Appended, LogError, LogWriter, Ticket};

/// In-flight bytes are counted in these units, since a semaphore counts to 2^32.
const UNIT: usize = 1024;
/// How often waits look whether Kafka has gone.
const LOOK: Duration = Duration::from_millis(250);
/// Batches with more records than this are handed over on a thread for blocking work.
const INLINE_RECORDS: usize = 200;

/// A source's producer. It outlives its writers: what one of them left on the way is settled before the next starts.
pub(super) struct Producing {
    source: String,
    producer: ThreadedProducer<Deliveries>,
    shared: Arc<Shared>,
    accepted: mpsc::UnboundedSender<Accepted>,
    in_flight: Arc<Semaphore>,
    units: usize,
    unavailable_after: Duration,
    /// The writer that may write.
    generation: AtomicU64,
}

/// What the producer's callbacks, the writer and the settling task share.
struct Shared {
    told: Told,
    /// A batch or a position has been settled by the brokers, one way or the other.
    news: Notify,
    /// Batches accepted and not settled.
    outstanding: AtomicUsize,
    start: Instant,
    /// When an acknowledgement came last, or the first batch was accepted after a silence; ms since `start`.
    progress_ms: AtomicU64,
    /// Something was not delivered: nothing after it may be.
    failed: OnceLock<LogError>,
}

impl Shared {
    fn progress(&self) {
        self.progress_ms.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn idle_for(&self) -> Duration {
        let last = Duration::from_millis(self.progress_ms.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(last)
    }
}

/// Counts a batch's records (or its one position record) back in.
struct Delivery {
    /// Records not settled yet, and one more until all have been handed over.
    left: AtomicUsize,
    failed: OnceLock<LogError>,
}

impl Delivery {
    fn settled(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }
}

struct Deliveries {
    shared: Arc<Shared>,
}

impl ClientContext for Deliveries {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.shared.told.log(level, facility, message);
    }

    fn stats_raw(&self, _: &[u8]) {}

    fn error(&self, error: KafkaError, reason: &str) {
        self.shared.told.error(error, reason);
    }
}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = Arc<Delivery>;

    fn delivery(&self, result: &DeliveryResult<'_>, delivery: Arc<Delivery>) {
        if let Err((error, record)) = result {
            let _ = delivery.failed.set(match fault(error, &self.shared.told) {
                LogError::Unavailable(text) => LogError::NotDurable(format!("topic '{}': {text}", record.topic())),
                LogError::Invalid(text) => LogError::Invalid(format!("topic '{}': {text}", record.topic())),
                other => other,
            });
        }
        let left = delivery.left.fetch_sub(1, Ordering::AcqRel) - 1;
        if left == 0 {
            self.shared.news.notify_one();
        }
        if result.is_ok() && left.is_multiple_of(256) {
            self.shared.progress();
        }
    }
}

/// A batch counted as outstanding, until it is dropped. One that was not resolved leaves a gap: nothing may come
/// after it.
struct Outstanding {
    shared: Arc<Shared>,
    resolved: bool,
}

impl Outstanding {
    fn new(shared: &Arc<Shared>) -> Self {
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
            self.shared.news.notify_one();
        }
        self.shared.outstanding.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A batch on its way.
struct Accepted {
    outstanding: Outstanding,
    delivery: Arc<Delivery>,
    position: Option<Vec<u8>>,
    buffer: RecordBatch,
    records: usize,
    bytes: usize,
    in_flight: OwnedSemaphorePermit,
    reply: oneshot::Sender<Result<Appended, LogError>>,
}

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
                tokio::task::spawn_blocking(move || drop(failed));
            }
            let producing = Arc::new(Producing::new(inside, source)?);
            lock(&inside.producers).entry(source.to_owned()).or_insert(producing).clone()
        }
    };
    let generation = producing.generation.fetch_add(1, Ordering::AcqRel) + 1;
    producing.settle(producing.unavailable_after).await?;
    Ok(Box::new(Writer { inside: inside.clone(), producing, generation, broken: Arc::default(), cut: false }))
}

impl Producing {
    fn new(inside: &Inside, source: &str) -> Result<Self, LogError> {
        let settings = &inside.settings;
        let shared = Arc::new(Shared {
            told: Told::new(),
            news: Notify::new(),
            outstanding: AtomicUsize::new(0),
            start: Instant::now(),
            progress_ms: AtomicU64::new(0),
            failed: OnceLock::new(),
        });
        let producer: ThreadedProducer<Deliveries> = settings
            .producer()?
            .create_with_context(Deliveries { shared: shared.clone() })
            .map_err(|e| LogError::Invalid(format!("the Kafka producer can't be made: {e}")))?;
        let (accepted, waiting) = mpsc::unbounded_channel();
        let settling = Settling {
            source: source.to_owned(),
            topic: settings.positions_topic.clone(),
            producer: producer.clone(),
            shared: shared.clone(),
            waiting,
            batches: VecDeque::new(),
            settled: Vec::new(),
            position: None,
        };
        // Ends when the sender is dropped with the `Producing`.
        tokio::spawn(settling.run());
        let units = (settings.in_flight_bytes / UNIT).clamp(1, u32::MAX as usize >> 4);
        Ok(Producing {
            source: source.to_owned(),
            producer,
            shared,
            accepted,
            in_flight: Arc::new(Semaphore::new(units)),
            units,
            unavailable_after: settings.unavailable_after,
            generation: AtomicU64::new(0),
        })
    }

    /// Nothing has been acknowledged for long, and something waits to be.
    fn stalled(&self) -> Option<LogError> {
        let idle = self.shared.idle_for();
        if self.shared.outstanding.load(Ordering::Acquire) == 0 || idle < self.unavailable_after {
            return None;
        }
        let why = self.shared.told.last_error().map(|last| format!(": {last}")).unwrap_or_default();
        Some(LogError::Unavailable(format!("Kafka has acknowledged nothing for {} s{why}", idle.as_secs())))
    }

    /// Waits until nothing is on the way.
    async fn settle(&self, deadline: Duration) -> Result<(), LogError> {
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
        // Dropping a producer waits for its thread.
        let dropped = tokio::task::spawn_blocking(move || drop(self));
        let _ = tokio::time::timeout(Duration::from_secs(5), dropped).await;
        result
    }
}

/// Takes batches in order: records durable, then the position, then the ticket.
struct Settling {
    source: String,
    topic: String,
    producer: ThreadedProducer<Deliveries>,
    shared: Arc<Shared>,
    waiting: mpsc::UnboundedReceiver<Accepted>,
    batches: VecDeque<Accepted>,
    /// Durable records whose position is on the way.
    settled: Vec<Accepted>,
    position: Option<Arc<Delivery>>,
}

impl Settling {
    async fn run(mut self) {
        loop {
            tokio::select! {
                accepted = self.waiting.recv() => match accepted {
                    Some(accepted) => self.batches.push_back(accepted),
                    None => break,
                },
                () = self.shared.news.notified() => {}
                // Only for a position that could not be handed over at once.
                () = tokio::time::sleep(LOOK), if !self.settled.is_empty() => {}
            }
            self.advance();
        }
        self.fail(&LogError::NotDurable("the writer was closed".into()));
        // The last handle waits for the producer's thread.
        tokio::task::spawn_blocking(move || drop(self.producer));
    }

    fn advance(&mut self) {
        if let Some(error) = self.shared.failed.get().cloned() {
            return self.fail(&error);
        }
        if let Some(position) = &self.position {
            if !position.settled() {
                return;
            }
            if let Some(error) = position.failed.get().cloned() {
                return self.fail(&error);
            }
            self.position = None;
            self.resolve_settled();
        }
        let mut position = None;
        while let Some(batch) = self.batches.front() {
            if !batch.delivery.settled() {
                break;
            }
            if let Some(error) = batch.delivery.failed.get().cloned() {
                // Those before it are durable; their positions are not, and they are done again.
                return self.fail(&error);
            }
            if let Some(mut batch) = self.batches.pop_front() {
                position = batch.position.take().or(position);
                self.settled.push(batch);
            }
        }
        match position {
            Some(position) => self.write_position(&position),
            None => self.resolve_settled(),
        }
    }

    fn resolve_settled(&mut self) {
        for batch in self.settled.drain(..) {
            resolve(batch, Ok(()));
        }
    }

    fn write_position(&mut self, position: &[u8]) {
        let delivery = Arc::new(Delivery { left: AtomicUsize::new(1), failed: OnceLock::new() });
        let record =
            BaseRecord::with_opaque_to(&self.topic, delivery.clone()).key(self.source.as_bytes()).payload(position);
        match self.producer.send(record) {
            Ok(()) => self.position = Some(delivery),
            Err((error, _)) => {
                let error = fault(&error, &self.shared.told);
                self.fail(&LogError::NotDurable(format!("the position of '{}': {error}", self.source)));
            }
        }
    }

    /// Everything that is not settled, and everything that comes, fails.
    fn fail(&mut self, error: &LogError) {
        let _ = self.shared.failed.set(error.clone());
        self.producer.purge(PurgeConfig::default().queue().inflight());
        self.position = None;
        for batch in self.settled.drain(..).chain(self.batches.drain(..)) {
            resolve(batch, Err(error.clone()));
        }
    }
}

fn resolve(batch: Accepted, result: Result<(), LogError>) {
    let Accepted { mut outstanding, buffer, records, bytes, in_flight, reply, .. } = batch;
    drop(in_flight);
    outstanding.resolved = true;
    drop(outstanding);
    if result.is_ok() {
        metrics::counter!("tidegate_log_appended_records_total").increment(records as u64);
        metrics::counter!("tidegate_log_appended_bytes_total").increment(bytes as u64);
    }
    let _ = reply.send(result.map(|()| Appended { buffer, records, bytes }));
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
        let records = batch.len();
        let in_flight = self.room(batch.byte_size()).await?;
        let outstanding = Outstanding::new(&self.producing.shared);
        let (reply, answer) = oneshot::channel();
        let producing = self.producing.clone();
        // From here on it is done to its end, even if the caller does not wait for it.
        let accept = move || accept(&producing, outstanding, batch, position, in_flight, reply);
        let accepted = if records <= INLINE_RECORDS {
            accept()
        } else {
            let ended = |e| Err(LogError::NotDurable(format!("a batch was not handed over to Kafka: {e}")));
            tokio::task::spawn_blocking(accept).await.unwrap_or_else(ended)
        };
        accepted?;
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

/// Hands a batch over and tells the settling task of it.
fn accept(
    producing: &Producing,
    outstanding: Outstanding,
    batch: RecordBatch,
    position: Option<Vec<u8>>,
    in_flight: OwnedSemaphorePermit,
    reply: oneshot::Sender<Result<Appended, LogError>>,
) -> Result<(), LogError> {
    let (records, bytes) = (batch.len(), batch.byte_size());
    let delivery = Arc::new(Delivery { left: AtomicUsize::new(records + 1), failed: OnceLock::new() });
    let buffer = hand_over(producing, batch, &delivery);
    if delivery.left.fetch_sub(1, Ordering::AcqRel) == 1 {
        producing.shared.news.notify_one();
    }
    let accepted = Accepted { outstanding, delivery, position, buffer, records, bytes, in_flight, reply };
    producing.accepted.send(accepted).map_err(|_| LogError::NotDurable("the writer was closed".into()))
}

/// Hands the batch's records to librdkafka, which copies them. What it refuses counts as not delivered, and nothing
/// after it is handed over.
fn hand_over(producing: &Producing, mut batch: RecordBatch, delivery: &Arc<Delivery>) -> RecordBatch {
    let mut headers_made: HashMap<u32, OwnedHeaders> = HashMap::new();
    let mut handed = 0;
    for record in batch.iter() {
        let mut out = BaseRecord::<[u8], [u8], _>::with_opaque_to(record.topic, delivery.clone());
        out.key = record.key;
        out.payload = record.value;
        if !record.raw_headers().is_empty() {
            let made = headers_made.entry(record.headers_id()).or_insert_with(|| {
                record
                    .headers()
                    .fold(OwnedHeaders::new(), |made, (key, value)| made.insert(Header { key, value: Some(value) }))
            });
            out.headers = Some(made.clone());
        }
        if let Err(error) = send(producing, out) {
            let _ = delivery.failed.set(match error {
                LogError::Invalid(text) => LogError::Invalid(format!(
                    "topic '{}', a record of {} bytes: {text}",
                    record.topic,
                    record.value.map_or(0, <[u8]>::len)
                )),
                other => other,
            });
            break;
        }
        handed += 1;
    }
    // Those that were not handed over have no acknowledgement to wait for.
    delivery.left.fetch_sub(batch.len() - handed, Ordering::AcqRel);
    batch.clear();
    batch
}

fn send(producing: &Producing, mut record: BaseRecord<'_, [u8], [u8], Arc<Delivery>>) -> Result<(), LogError> {
    loop {
        match producing.producer.send(record) {
            Ok(()) => return Ok(()),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                // A queue set smaller than the bytes in flight: wait for acknowledgements.
                if let Some(stalled) = producing.stalled() {
                    return Err(LogError::NotDurable(stalled.to_string()));
                }
                std::thread::sleep(Duration::from_millis(2));
                record = back;
            }
            Err((error, _)) => {
                return Err(match fault(&error, &producing.shared.told) {
                    LogError::Unavailable(text) => LogError::NotDurable(text),
                    other => other,
                });
            }
        }
    }
}
