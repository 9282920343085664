//! The thread of a producer: hands records to librdkafka, takes acknowledgements, and answers batches in order: records
//! durable, then the position behind them, then the ticket.
//!
//! A request costs the client and the broker far more than a record in it, and an idempotent producer has one request
//! on the way per partition: with records behind it, librdkafka's thread asks without a pause whether it may send them
//! (half of all CPU of a capture, measured). So records are handed over in rounds. A round has for each topic what fits
//! in one request, and the next one begins when all of it is acknowledged, or after a while. While much comes, batches
//! gather for some milliseconds; one that comes when nothing is on the way goes out at once. librdkafka is told when a
//! round is handed over, and sends it then, unless its `linger.ms` was set.
//!
//! The invariant: a position is handed over only when every record that it covers, and every record before, is durable.
//! After a record that was not delivered nothing is handed over any more, and nothing that waits is durable; that is said
//! when nothing is on the way any more, since what arrives later would come behind what is written again.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::client::{Told, fault};
use super::native::{Headers, Native, Topic, Undelivered};
use super::producing::{Accepted, Handed, Shared};
use crate::event::RecordRef;
use crate::log::{Appended, LogError};

/// A round waits this long for the one before it, at the most.
const ROUND: Duration = Duration::from_millis(40);
/// What a record takes in a request beside its key, value and headers, at the most.
const FRAMING: usize = 32;
/// When so many bytes were handed over at once, more is to come: they gather …
const MUCH: usize = 64 << 10;
/// … for this long …
const GATHER: Duration = Duration::from_millis(10);
/// … or until they are so many.
const GATHER_BYTES: usize = 768 << 10;
/// Positions are written no sooner than this after one another; one that comes after a silence does not wait.
const PACE: Duration = Duration::from_millis(10);
/// How soon what found librdkafka's queue full is handed over again.
const NO_ROOM: Duration = Duration::from_millis(2);
/// What is on the way when something was not delivered is waited for so long.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// How long a wait for news lasts, at the most.
const LOOK: Duration = Duration::from_millis(250);
/// Header objects kept to be used again (about 400 bytes each), until nothing comes for a moment.
const HEADERS_KEPT: usize = 8192;
/// The tag of a position's message. All others have the number of their batch, and [`POOLED`].
const POSITION: usize = usize::MAX;
/// Set in the tag of a message whose headers are the pool's.
const POOLED: usize = 1;

pub(super) struct Feeder {
    /// The source's name.
    key: Vec<u8>,
    positions: Topic,
    topics: HashMap<Arc<str>, Route>,
    /// What fits in one request.
    request_bytes: usize,
    native: Arc<Native>,
    shared: Arc<Shared>,
    inbox: Receiver<Handed>,
    /// librdkafka is told when all has been handed over that is to go out together.
    flushes: bool,
    /// Something has been handed over since.
    unsent: bool,
    /// Not handed over, in order, and their bytes.
    waiting: VecDeque<Accepted>,
    waiting_bytes: usize,
    /// When the last round began, and its bytes.
    round_at: Instant,
    round_bytes: usize,
    /// Handed over, in order; the last one perhaps in part.
    batches: VecDeque<OnTheWay>,
    /// Number of the first of these.
    first: usize,
    /// Records of these that are handed over and not settled.
    on_the_way: usize,
    /// Records of the last batch that are handed over, where that is not all.
    partly: Option<(usize, Until)>,
    /// Since when nothing is handed over any more, because something was not delivered.
    stopped: Option<Instant>,
    /// What librdkafka has not sent has been taken from it.
    purged: bool,
    /// Durable records without their position, in order.
    settled: VecDeque<OnTheWay>,
    /// The position that is to be written for them, and when it may be.
    due: Option<Vec<u8>>,
    due_at: Instant,
    /// A position on the way: how many of the settled batches it is for.
    covers: Option<usize>,
    pool: Pool,
}

struct Route {
    topic: Topic,
    /// What this round has for it.
    bytes: Cell<usize>,
}

/// What the rest of a batch waits for.
#[derive(Clone, Copy)]
enum Until {
    /// Room in librdkafka's queue, looked for then.
    Room(Instant),
    /// The next round.
    Round,
}

struct OnTheWay {
    accepted: Accepted,
    records: usize,
    bytes: usize,
    /// Records that are not settled.
    left: usize,
    failed: Option<LogError>,
}

/// Header objects that nobody uses. Nearly all records of a run have the same headers.
#[derive(Default)]
struct Pool {
    /// What they hold, as a batch has it.
    raw: Vec<u8>,
    free: Vec<Headers>,
    /// Objects that have been given out and are to come back.
    out: usize,
}

impl Pool {
    /// The record's headers, and whether they are the pool's.
    fn take(&mut self, record: &RecordRef<'_>) -> (Option<Headers>, bool) {
        let raw = record.raw_headers();
        if raw.is_empty() {
            return (None, false);
        }
        if self.out == 0 && self.raw != raw {
            self.free.clear();
            self.raw = raw.to_vec();
        }
        if self.raw != raw {
            return (Some(Headers::new(record.headers())), false);
        }
        self.out += 1;
        (Some(self.free.pop().unwrap_or_else(|| Headers::new(record.headers()))), true)
    }

    fn put(&mut self, headers: Option<Headers>) {
        self.out = self.out.saturating_sub(1);
        if let Some(headers) = headers
            && self.free.len() < HEADERS_KEPT
        {
            self.free.push(headers);
        }
    }
}

impl Feeder {
    /// Errors: a topic for positions that can't be.
    pub fn new(
        source: &[u8],
        positions: &str,
        native: Arc<Native>,
        shared: Arc<Shared>,
        inbox: Receiver<Handed>,
        flushes: bool,
        request_bytes: usize,
    ) -> Result<Self, LogError> {
        let invalid = || LogError::Invalid(format!("no topic can be called '{positions}'"));
        let now = Instant::now();
        Ok(Feeder {
            key: source.to_vec(),
            positions: native.topic(positions).ok_or_else(invalid)?,
            topics: HashMap::new(),
            request_bytes,
            native,
            shared,
            inbox,
            flushes,
            unsent: false,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            round_at: now,
            round_bytes: 0,
            batches: VecDeque::new(),
            first: 0,
            on_the_way: 0,
            partly: None,
            stopped: None,
            purged: false,
            settled: VecDeque::new(),
            due: None,
            due_at: now,
            covers: None,
            pool: Pool::default(),
        })
    }

    /// Ends when the producer is given up.
    pub fn run(mut self) {
        loop {
            let asked_at = Instant::now();
            let until = [self.hand_over_at(asked_at), self.position_at()].into_iter();
            let wait = until.flatten().min().map_or(LOOK, |at| at.saturating_duration_since(asked_at).min(LOOK));
            // In whole milliseconds: rather late than at once, and once more.
            let wait = Duration::from_millis(wait.as_micros().div_ceil(1000) as u64);
            let mut news = self.listen(wait);
            if !news && asked_at.elapsed() >= LOOK {
                self.pool.free = Vec::new();
            }
            while news {
                news = self.listen(Duration::ZERO);
            }
            loop {
                let last = match self.inbox.try_recv() {
                    Ok(Handed::Batch(accepted)) => {
                        self.take(accepted);
                        continue;
                    }
                    Err(TryRecvError::Empty) => break,
                    Ok(Handed::Close(last)) => last,
                    Err(TryRecvError::Disconnected) => None,
                };
                self.fail(&LogError::NotDurable("the writer was closed".into()));
                // Waits for librdkafka's threads, here and not where a writer ends.
                drop((self, last));
                return;
            }
            self.settle();
            self.hand_over();
            if std::mem::take(&mut self.unsent) && self.flushes {
                self.native.flush();
            }
        }
    }

    fn take(&mut self, accepted: Accepted) {
        self.waiting_bytes += accepted.batch.byte_size();
        self.waiting.push_back(accepted);
    }

    /// When what waits is to be handed over.
    fn hand_over_at(&self, now: Instant) -> Option<Instant> {
        if self.stopped.is_some() || self.waiting.is_empty() && self.partly.is_none() {
            return None;
        }
        if let Some((_, Until::Room(at))) = self.partly {
            return Some(at);
        }
        let gathers_until = self.round_at + GATHER;
        Some(if !self.flushes {
            // librdkafka gathers by itself.
            now
        } else if self.on_the_way > 0 {
            self.round_at + ROUND
        } else if self.partly.is_none()
            && self.waiting_bytes < GATHER_BYTES
            && self.round_bytes >= MUCH
            && now < gathers_until
        {
            gathers_until
        } else {
            now
        })
    }

    /// When the position that is due is to be written.
    fn position_at(&self) -> Option<Instant> {
        (self.due.is_some() && self.covers.is_none()).then_some(self.due_at)
    }

    /// Takes one event of librdkafka; false where there is none.
    fn listen(&mut self, wait: Duration) -> bool {
        let mut position = None;
        let mut settled = false;
        let Feeder { native, shared, batches, first, on_the_way, pool, stopped, .. } = self;
        let news = native.poll(wait, |message| {
            if message.tag == POSITION {
                position = Some(message.result);
                return;
            }
            if message.tag & POOLED != 0 {
                pool.put(message.headers);
            }
            // One that is not there any more has failed with all others.
            let Some(batch) = (message.tag >> 1).checked_sub(*first).and_then(|at| batches.get_mut(at)) else { return };
            batch.left -= 1;
            *on_the_way -= 1;
            match message.result {
                Ok(()) => settled = true,
                Err(error) => {
                    stopped.get_or_insert_with(Instant::now);
                    batch.failed.get_or_insert_with(|| undelivered(&error, &shared.told));
                }
            }
        });
        if settled || matches!(position, Some(Ok(()))) {
            self.shared.progress();
        }
        if let Some(result) = position
            && let Some(covers) = self.covers.take()
        {
            match result {
                Ok(()) => self.settled.drain(..covers).for_each(|batch| resolve(batch, Ok(()))),
                Err(error) => self.fail(&undelivered(&error, &self.shared.told)),
            }
        }
        news
    }

    /// Goes as far as acknowledgements allow: positions behind durable records, tickets behind those.
    fn settle(&mut self) {
        if let Some(error) = self.shared.failed.get().cloned() {
            return self.give_up(&error);
        }
        while let Some(batch) = self.batches.front() {
            if let Some(error) = batch.failed.clone() {
                // Those before it are durable; their positions are not, and they are done again.
                return self.give_up(&error);
            }
            if batch.left > 0 {
                break;
            }
            let Some(mut batch) = self.batches.pop_front() else { break };
            self.first += 1;
            self.due = batch.accepted.position.take().or_else(|| self.due.take());
            self.settled.push_back(batch);
        }
        if self.covers.is_some() {
            return;
        }
        if self.due.is_none() {
            // Records alone, and no position before them that is not durable yet.
            self.settled.drain(..).for_each(|batch| resolve(batch, Ok(())));
        } else if Instant::now() >= self.due_at {
            self.write_position();
        }
    }

    fn write_position(&mut self) {
        let Some(position) = self.due.take() else { return };
        let sent = self.native.produce(&self.positions, Some(&self.key), Some(&position), None, now_ms(), POSITION);
        match sent {
            Ok(()) => {
                self.unsent = true;
                self.covers = Some(self.settled.len());
                self.due_at = Instant::now() + PACE;
            }
            Err((error, _)) if is_full(&error) => {
                // Records of later batches have filled the queue; acknowledgements make room.
                self.due = Some(position);
                self.due_at = Instant::now() + NO_ROOM;
            }
            Err((error, _)) => self.fail(&undelivered(&Undelivered { error, topic: None }, &self.shared.told)),
        }
    }

    /// Hands over what is to be handed over now.
    fn hand_over(&mut self) {
        let now = Instant::now();
        if self.hand_over_at(now).is_none_or(|at| at > now) {
            return;
        }
        let partly = self.partly.take();
        if !matches!(partly, Some((_, Until::Room(_)))) {
            (self.round_at, self.round_bytes) = (now, 0);
            self.topics.values().for_each(|route| route.bytes.set(0));
        }
        if let Some((from, _)) = partly {
            self.feed(from);
        }
        while self.partly.is_none()
            && self.stopped.is_none()
            && let Some(accepted) = self.waiting.pop_front()
        {
            let (records, bytes) = (accepted.batch.len(), accepted.batch.byte_size());
            self.waiting_bytes -= bytes;
            self.batches.push_back(OnTheWay { accepted, records, bytes, left: records, failed: None });
            self.feed(0);
            // Header objects come back while much is handed over.
            while self.listen(Duration::ZERO) {}
        }
    }

    /// Hands the last batch's records over, from `from` on, as far as the round and librdkafka's queue have room. What
    /// librdkafka refuses counts as not delivered.
    fn feed(&mut self, from: usize) {
        let Feeder { topics, native, batches, first, on_the_way, pool, shared, stopped, .. } = self;
        let number = *first + batches.len().saturating_sub(1);
        let Some(last) = batches.back_mut() else { return };
        let batch = &last.accepted.batch;
        let now_ms = now_ms();
        for name in batch.topics() {
            if !topics.contains_key(name)
                && let Some(topic) = native.topic(name)
            {
                topics.insert(name.clone(), Route { topic, bytes: Cell::new(0) });
            }
        }
        let routes: Vec<Option<&Route>> = batch.topics().iter().map(|name| topics.get(name)).collect();
        for at in from..last.records {
            let Some(record) = batch.get(at) else { break };
            let Some(route) = routes[record.topic_slot.index()] else {
                stopped.get_or_insert_with(Instant::now);
                last.failed = Some(LogError::Invalid(format!("no topic can be called '{}'", record.topic)));
                return;
            };
            let parts = [record.key, record.value, Some(record.raw_headers())];
            let size = FRAMING + parts.into_iter().flatten().map(<[u8]>::len).sum::<usize>();
            let bytes = route.bytes.get();
            if self.flushes && bytes > 0 && bytes + size > self.request_bytes {
                self.partly = Some((at, Until::Round));
                return;
            }
            let (headers, pooled) = pool.take(&record);
            let tag = number << 1 | if pooled { POOLED } else { 0 };
            match native.produce(&route.topic, record.key, record.value, headers, now_ms, tag) {
                Ok(()) => {
                    *on_the_way += 1;
                    self.unsent = true;
                    route.bytes.set(bytes + size);
                    self.round_bytes += size;
                }
                Err((error, headers)) => {
                    if pooled {
                        pool.put(headers);
                    }
                    if is_full(&error) {
                        self.partly = Some((at, Until::Room(Instant::now() + NO_ROOM)));
                        return;
                    }
                    let size = record.value.map_or(0, <[u8]>::len);
                    let topic = Some(format!("{}, a record of {size} bytes", record.topic));
                    stopped.get_or_insert_with(Instant::now);
                    last.failed = Some(undelivered(&Undelivered { error, topic }, &shared.told));
                    return;
                }
            }
        }
        last.accepted.batch.clear();
    }

    /// Fails when nothing is on the way any more, or has been for too long.
    fn give_up(&mut self, error: &LogError) {
        let since = *self.stopped.get_or_insert_with(Instant::now);
        if self.on_the_way == 0 && self.covers.is_none() || since.elapsed() >= LAST_WORDS {
            self.fail(error);
        }
    }

    /// Everything that is not settled, and everything that comes, fails.
    fn fail(&mut self, error: &LogError) {
        let _ = self.shared.failed.set(error.clone());
        if !std::mem::replace(&mut self.purged, true) {
            self.native.purge();
        }
        (self.due, self.covers, self.partly) = (None, None, None);
        self.stopped.get_or_insert_with(Instant::now);
        self.first += self.batches.len();
        (self.on_the_way, self.waiting_bytes) = (0, 0);
        let accepted = self.settled.drain(..).chain(self.batches.drain(..));
        accepted.for_each(|batch| resolve(batch, Err(error.clone())));
        for accepted in self.waiting.drain(..) {
            resolve(OnTheWay { accepted, records: 0, bytes: 0, left: 0, failed: None }, Err(error.clone()));
        }
    }
}

fn resolve(batch: OnTheWay, result: Result<(), LogError>) {
    let OnTheWay { accepted, records, bytes, .. } = batch;
    let Accepted { mut outstanding, batch: mut buffer, in_flight, reply, .. } = accepted;
    buffer.clear();
    drop(in_flight);
    outstanding.resolved = true;
    drop(outstanding);
    if result.is_ok() {
        metrics::counter!("tidegate_log_appended_records_total").increment(records as u64);
        metrics::counter!("tidegate_log_appended_bytes_total").increment(bytes as u64);
    }
    let _ = reply.send(result.map(|()| Appended { buffer, records, bytes }));
}

fn is_full(error: &KafkaError) -> bool {
    matches!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull))
}

/// What a message that was not delivered means for the log.
fn undelivered(undelivered: &Undelivered, told: &Told) -> LogError {
    let topic = undelivered.topic.as_deref().map(|topic| format!("topic {topic}: ")).unwrap_or_default();
    match fault(&undelivered.error, told) {
        LogError::Unavailable(text) => LogError::NotDurable(topic + &text),
        LogError::Invalid(text) => LogError::Invalid(topic + &text),
        other => other,
    }
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}
