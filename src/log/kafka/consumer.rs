//! A member of a consumer group, on a thread of its own.
//!
//! The thread serves the requests of a [`LogConsumer`]. While nobody asks, because the sink is slow or waits behind
//! its breaker, it pauses the partitions and keeps polling, or the group would evict the member (CORRECTNESS 10).
//!
//! * A partition without a committed offset is read from its beginning, explicitly; the reset policy is `error`, so
//!   an offset that retention has removed is said and never skipped.
//! * A revocation is shown by one poll and carried out by the next one, so that what is in flight may be finished
//!   and committed in between; a member that does not poll again loses the partitions all the same in the end.
//! * Offsets that stand still, because the member is paused, waits, or has nothing to read, are committed again before
//!   Kafka forgets them (CORRECTNESS 10).
//! * The invariant: records are handed out once, in order. An answer lies in a slot that both ends reach until it is
//!   taken, and whoever takes it returns it without another wait, so that a poll dropped at any moment loses nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rdkafka::ClientContext;
use rdkafka::TopicPartitionList;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::types::RDKafkaRespErr;
use tokio::sync::oneshot;

use super::client::{Told, fault, is_denied, no_client};
use super::gather::Gatherer;
use super::{ANSWER_WAIT, Inside, list_of, lock, offsets_of};
use crate::event::{Offset, TopicPartition};
use crate::log::{ConsumedRecord, LogConsumer, LogError, PollLimit, Polled};

/// Without a request for this long, the member keeps itself alive.
const IDLE: Duration = Duration::from_secs(2);
/// A revocation that nobody carries out is carried out after this.
const REVOKE_WAIT: Duration = Duration::from_secs(60);
/// How long a request may take beyond the wait it asked for.
const REQUEST_WAIT: Duration = Duration::from_secs(30);

pub(super) fn join(inside: Arc<Inside>, group: &str, topics: &[String]) -> Result<Box<dyn LogConsumer>, LogError> {
    let member = Member { told: inside.told.clone(), changes: Mutex::default(), closing: AtomicBool::new(false) };
    let invalid = |e: KafkaError| LogError::Invalid(format!("group '{group}': {e}"));
    let consumer: BaseConsumer<Member> =
        inside.settings.consumer(group)?.create_with_context(member).map_err(|e| no_client("consumer", &e))?;
    let names: Vec<&str> = topics.iter().map(String::as_str).collect();
    consumer.subscribe(&names).map_err(invalid)?;
    let (requests, received) = channel();
    let slot = Slot::default();
    let actor = Actor {
        slot: slot.clone(),
        consumer,
        inside,
        group: group.to_owned(),
        requests: received,
        gatherer: Gatherer::default(),
        held: VecDeque::new(),
        assigned: BTreeSet::new(),
        committed: BTreeMap::new(),
        committed_at: Instant::now(),
        to_assign: None,
        revoking: None,
        out_of_range: None,
        denied: None,
        paused: false,
        resting: false,
    };
    let thread = std::thread::Builder::new()
        .name("kafka-consumer".into())
        .spawn(move || actor.run())
        .map_err(|e| no_client("consumer's thread", &e))?;
    Ok(Box::new(Consumer { requests: Some(requests), thread: Some(thread), slot }))
}

type Reply<T> = oneshot::Sender<Result<T, LogError>>;

/// The answer to a poll, until it is taken. A channel would drop what was sent and not yet received.
type Slot = Arc<Mutex<Option<Result<Polled, LogError>>>>;

enum Request {
    /// Answered in the slot.
    Poll(PollLimit, Reply<()>),
    Commit(BTreeMap<TopicPartition, Offset>, Reply<()>),
    SetPaused(bool, Reply<()>),
    Rewind(Reply<()>),
}

/// The asking end.
struct Consumer {
    requests: Option<Sender<Request>>,
    thread: Option<std::thread::JoinHandle<()>>,
    slot: Slot,
}

impl Consumer {
    async fn ask<T>(&self, wait: Duration, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, LogError> {
        let ended = || LogError::Fatal("the consumer's thread has ended".into());
        let (reply, answer) = oneshot::channel();
        let requests = self.requests.as_ref().ok_or_else(ended)?;
        requests.send(request(reply)).map_err(|_| ended())?;
        match tokio::time::timeout(wait + REQUEST_WAIT, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(ended()),
            Err(_) => Err(LogError::Unavailable("Kafka has not answered a consumer for long".into())),
        }
    }
}

#[async_trait]
impl LogConsumer for Consumer {
    async fn poll(&mut self, limit: &PollLimit) -> Result<Polled, LogError> {
        loop {
            if let Some(answer) = lock(&self.slot).take() {
                return answer;
            }
            self.ask(limit.wait, |reply| Request::Poll(limit.clone(), reply)).await?;
        }
    }

    async fn commit(&mut self, offsets: &BTreeMap<TopicPartition, Offset>) -> Result<(), LogError> {
        self.ask(Duration::ZERO, |reply| Request::Commit(offsets.clone(), reply)).await
    }

    async fn set_paused(&mut self, paused: bool) -> Result<(), LogError> {
        self.ask(Duration::ZERO, |reply| Request::SetPaused(paused, reply)).await
    }

    async fn rewind(&mut self) -> Result<(), LogError> {
        self.ask(Duration::ZERO, Request::Rewind).await
    }

    async fn close(mut self: Box<Self>) -> Result<(), LogError> {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let joined = tokio::task::spawn_blocking(move || thread.join());
            if tokio::time::timeout(REQUEST_WAIT, joined).await.is_err() {
                return Err(LogError::Unavailable("Kafka has not answered a consumer that leaves".into()));
            }
        }
        Ok(())
    }
}

/// librdkafka's view of the member: notes what the group changes, for the actor to carry out.
struct Member {
    told: Told,
    changes: Mutex<VecDeque<Change>>,
    /// Changes are carried out at once: nobody is there to be told.
    closing: AtomicBool,
}

enum Change {
    Assign(Vec<TopicPartition>),
    Revoke(Vec<TopicPartition>),
}

impl ClientContext for Member {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.told.log(level, facility, message);
    }

    fn stats_raw(&self, _: &[u8]) {}

    fn error(&self, error: KafkaError, reason: &str) {
        self.told.error(error, reason);
    }
}

impl ConsumerContext for Member {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, what: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let assign = what == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        if self.closing.load(Ordering::Acquire) {
            if !assign {
                let _ = unassign(consumer, list);
            }
            return;
        }
        let places = list.elements().iter().map(|e| TopicPartition::new(e.topic(), e.partition())).collect();
        lock(&self.changes).push_back(if assign { Change::Assign(places) } else { Change::Revoke(places) });
    }
}

fn unassign(consumer: &BaseConsumer<Member>, list: &TopicPartitionList) -> Result<(), KafkaError> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_unassign(list),
        _ => consumer.unassign(),
    }
}

struct Revoking {
    places: Vec<TopicPartition>,
    /// When the user was shown it.
    told: Option<Instant>,
}

struct Actor {
    consumer: BaseConsumer<Member>,
    inside: Arc<Inside>,
    group: String,
    requests: Receiver<Request>,
    slot: Slot,
    gatherer: Gatherer,
    /// Read and not handed out.
    held: VecDeque<ConsumedRecord>,
    assigned: BTreeSet<TopicPartition>,
    /// The group's offsets in what is assigned, as far as it has any; and when they were committed last.
    committed: BTreeMap<TopicPartition, Offset>,
    committed_at: Instant,
    to_assign: Option<Vec<TopicPartition>>,
    revoking: Option<Revoking>,
    /// Said again until the consumer is rewound: librdkafka says it once.
    out_of_range: Option<LogError>,
    /// librdkafka says this once too, and a rewound consumer would wait in silence: a new one is told again.
    denied: Option<LogError>,
    paused: bool,
    /// Paused because nobody asks.
    resting: bool,
}

impl Actor {
    fn run(mut self) {
        loop {
            match self.requests.recv_timeout(IDLE) {
                Ok(Request::Poll(limit, reply)) => {
                    // What a poll that was dropped has not taken comes first.
                    if !reply.is_closed() && lock(&self.slot).is_none() {
                        let answer = self.poll(&limit);
                        *lock(&self.slot) = Some(answer);
                    }
                    let _ = reply.send(Ok(()));
                }
                Ok(Request::Commit(offsets, reply)) => drop(reply.send(self.commit(&offsets))),
                Ok(Request::SetPaused(paused, reply)) => {
                    self.take_back();
                    drop(reply.send(self.set_paused(paused)));
                }
                Ok(Request::Rewind(reply)) => {
                    self.take_back();
                    drop(reply.send(self.rewind()));
                }
                Err(RecvTimeoutError::Timeout) => self.rest(),
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.commit_again();
        }
        let member = self.consumer.context();
        member.closing.store(true, Ordering::Release);
        // A revocation that is waiting would keep the client from closing.
        if self.revoking.is_some() || !lock(&member.changes).is_empty() {
            let _ = self.consumer.unassign();
        }
    }

    fn poll(&mut self, limit: &PollLimit) -> Result<Polled, LogError> {
        if self.revoking.as_ref().is_some_and(|revoking| revoking.told.is_some()) {
            self.finish_revoking()?;
        }
        if self.resting && !self.paused {
            self.resting = false;
            self.consumer.resume(&self.list(&self.assigned)?).map_err(|e| self.fault(&e))?;
        }
        let deadline = Instant::now() + limit.wait;
        loop {
            if let Some(change) = self.follow_group()? {
                return Ok(change);
            }
            if let Some(error) = &self.out_of_range {
                return Err(error.clone());
            }
            if !self.held.is_empty() && !self.paused {
                return Ok(Polled::Records(self.take_held(limit)));
            }
            // Revocations and assignments come between messages.
            let wait = deadline.saturating_duration_since(Instant::now()).min(Duration::from_millis(100));
            self.gather(wait, limit)?;
            if !self.gatherer.is_empty() {
                let records = self.gatherer.take();
                if !self.paused && !self.has_changes() {
                    return Ok(Polled::Records(records));
                }
                self.held.extend(records);
                continue;
            }
            if Instant::now() >= deadline && !self.has_changes() {
                return Ok(Polled::Records(Vec::new()));
            }
        }
    }

    /// Records that nobody took are held again.
    fn take_back(&mut self) {
        let mut slot = lock(&self.slot);
        match slot.take() {
            Some(Ok(Polled::Records(records))) => {
                for record in records.into_iter().rev() {
                    self.held.push_front(record);
                }
            }
            other => *slot = other,
        }
    }

    fn has_changes(&self) -> bool {
        !lock(&self.consumer.context().changes).is_empty()
    }

    /// Waits for a message, then takes what is there.
    fn gather(&mut self, mut wait: Duration, limit: &PollLimit) -> Result<(), LogError> {
        while !self.gatherer.is_full(limit) {
            match self.consumer.poll(wait) {
                Some(Ok(message)) => self.gatherer.push(&message),
                None => return Ok(()),
                Some(Err(error)) => match self.complaint(&error) {
                    None => {}
                    Some(error) => {
                        self.held.extend(self.gatherer.take());
                        return Err(error);
                    }
                },
            }
            wait = Duration::ZERO;
        }
        Ok(())
    }

    /// What of librdkafka's complaints the user has to know.
    fn complaint(&mut self, error: &KafkaError) -> Option<LogError> {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AutoOffsetReset) => {
                let error = self.find_out_of_range().unwrap_or_else(|| self.fault(error));
                if matches!(error, LogError::OutOfRange { .. }) {
                    self.out_of_range = Some(error.clone());
                }
                Some(error)
            }
            // A topic that is not there yet; one broker of several: librdkafka goes on by itself.
            Some(
                RDKafkaErrorCode::UnknownTopicOrPartition
                | RDKafkaErrorCode::UnknownTopic
                | RDKafkaErrorCode::BrokerTransportFailure
                | RDKafkaErrorCode::Resolve,
            ) => {
                tracing::debug!(group = self.group, "{error}");
                None
            }
            _ => {
                let said = self.fault(error);
                if is_denied(error) {
                    self.denied = Some(said.clone());
                }
                Some(said)
            }
        }
    }

    fn find_out_of_range(&self) -> Option<LogError> {
        let list = self.list(&self.assigned).ok()?;
        let committed = self.consumer.committed_offsets(list, ANSWER_WAIT).ok()?;
        for (place, wanted) in offsets_of(&committed) {
            let (first, next) = self.consumer.fetch_watermarks(&place.topic, place.partition, ANSWER_WAIT).ok()?;
            if !(first..=next).contains(&wanted.0) {
                let (first, next) = (Offset(first), Offset(next));
                return Some(LogError::OutOfRange { topic_partition: place, wanted, first, next });
            }
        }
        None
    }

    /// Carries out assignments; shows revocations.
    fn follow_group(&mut self) -> Result<Option<Polled>, LogError> {
        loop {
            if let Some(places) = self.to_assign.take() {
                let mut new: Vec<_> = places.iter().filter(|place| !self.assigned.contains(place)).cloned().collect();
                if let Err(error) = self.assign(&places) {
                    self.to_assign = Some(places);
                    return Err(error);
                }
                new.sort();
                self.assigned.extend(places);
                if !new.is_empty() {
                    return Ok(Some(Polled::Assigned(new)));
                }
            }
            let change = lock(&self.consumer.context().changes).pop_front();
            match change {
                None => return Ok(None),
                Some(Change::Assign(places)) => self.to_assign = Some(places),
                Some(Change::Revoke(places)) => {
                    let shown = places.iter().any(|place| self.assigned.contains(place));
                    self.let_go(&places);
                    self.revoking = Some(Revoking { places: places.clone(), told: Some(Instant::now()) });
                    if shown {
                        return Ok(Some(Polled::Revoked(places)));
                    }
                    self.finish_revoking()?;
                }
            }
        }
    }

    fn assign(&mut self, places: &[TopicPartition]) -> Result<(), LogError> {
        let list = self.standing(places.iter())?;
        self.committed.extend(offsets_of(&list));
        let assigned = match self.consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => self.consumer.incremental_assign(&list),
            _ => self.consumer.assign(&list),
        };
        assigned.map_err(|e| self.fault(&e))?;
        if self.paused || self.resting {
            self.consumer.pause(&list).map_err(|e| self.fault(&e))?;
        }
        Ok(())
    }

    /// Where the group stands: committed offsets, else the beginning, by name and not by a reset policy.
    fn standing<'a>(&self, places: impl Iterator<Item = &'a TopicPartition>) -> Result<TopicPartitionList, LogError> {
        let list = list_of(places.map(|place| (place, rdkafka::Offset::Invalid)))?;
        if list.count() == 0 {
            return Ok(list);
        }
        let mut list = self.consumer.committed_offsets(list, ANSWER_WAIT).map_err(|e| self.fault(&e))?;
        let missing: Vec<_> = list
            .elements()
            .iter()
            .filter(|element| !matches!(element.offset(), rdkafka::Offset::Offset(_)))
            .map(|element| (element.topic().to_owned(), element.partition()))
            .collect();
        for (topic, partition) in missing {
            list.set_partition_offset(&topic, partition, rdkafka::Offset::Beginning).map_err(|e| self.fault(&e))?;
        }
        Ok(list)
    }

    fn finish_revoking(&mut self) -> Result<(), LogError> {
        let Some(revoking) = self.revoking.take() else { return Ok(()) };
        let done = self
            .list(&revoking.places)
            .and_then(|list| unassign(&self.consumer, &list).map_err(|error| self.fault(&error)));
        if let Err(error) = done {
            // The group waits for it: the next poll tries again.
            self.revoking = Some(revoking);
            return Err(error);
        }
        for place in &revoking.places {
            self.assigned.remove(place);
            self.committed.remove(place);
        }
        // What came in since the revocation was shown belongs to another member now.
        self.let_go(&revoking.places);
        Ok(())
    }

    /// Drops what is held of `places`.
    fn let_go(&mut self, places: &[TopicPartition]) {
        self.held.retain(|record| !places.iter().any(|p| p.partition == record.partition && p.topic == record.topic));
    }

    fn take_held(&mut self, limit: &PollLimit) -> Vec<ConsumedRecord> {
        let mut bytes = 0;
        let mut records = Vec::new();
        while records.len() < limit.records && bytes < limit.bytes {
            let Some(record) = self.held.pop_front() else { break };
            bytes += record.key.as_ref().map_or(0, |key| key.len()) + record.value.as_ref().map_or(0, |v| v.len());
            records.push(record);
        }
        records
    }

    fn commit(&mut self, offsets: &BTreeMap<TopicPartition, Offset>) -> Result<(), LogError> {
        let mine = offsets.iter().filter(|(place, _)| {
            let mine = self.assigned.contains(place);
            if !mine {
                tracing::debug!(group = self.group, %place, "offset not committed: the partition was revoked");
            }
            mine
        });
        let list = list_of(mine.map(|(place, offset)| (place, rdkafka::Offset::Offset(offset.0))))?;
        if list.count() == 0 {
            return Ok(());
        }
        self.consumer.commit(&list, CommitMode::Sync).map_err(|e| self.fault(&e))?;
        self.committed.extend(offsets_of(&list));
        self.committed_at = Instant::now();
        Ok(())
    }

    /// Commits offsets that stand still once more, in time. Not waited for: the next time is long before they expire.
    fn commit_again(&mut self) {
        if self.committed.is_empty() || self.committed_at.elapsed() < self.inside.settings.recommit_after {
            return;
        }
        self.committed_at = Instant::now();
        let staying = self.staying();
        let still = self.committed.iter().filter(|(place, _)| staying.contains(place));
        let again = list_of(still.map(|(place, offset)| (place, rdkafka::Offset::Offset(offset.0))))
            .and_then(|list| self.consumer.commit(&list, CommitMode::Async).map_err(|e| self.fault(&e)));
        if let Err(error) = again {
            tracing::debug!(group = self.group, "offsets not committed again: {error}");
        }
    }

    fn set_paused(&mut self, paused: bool) -> Result<(), LogError> {
        if paused == self.paused {
            return Ok(());
        }
        let list = self.list(&self.assigned)?;
        let done = if paused { self.consumer.pause(&list) } else { self.consumer.resume(&list) };
        done.map_err(|e| self.fault(&e))?;
        self.paused = paused;
        self.resting = false;
        Ok(())
    }

    /// Errors: also that this consumer was not allowed to read; another may be.
    fn rewind(&mut self) -> Result<(), LogError> {
        if let Some(denied) = &self.denied {
            return Err(denied.clone());
        }
        self.held.clear();
        let _ = self.gatherer.take();
        let give_up = Instant::now() + ANSWER_WAIT;
        loop {
            // What the group changes comes only to who polls; what is read meanwhile is read again.
            for _ in 0..1000 {
                match self.consumer.poll(Duration::ZERO) {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => tracing::debug!(group = self.group, "while rewinding: {error}"),
                    None => break,
                }
            }
            let staying = self.staying();
            if staying.is_empty() {
                break;
            }
            // Partitions that were assigned just now can't be moved for a moment.
            let list = self.standing(staying.iter())?;
            let moved = self.consumer.seek_partitions(list, ANSWER_WAIT).map_err(|e| self.fault(&e))?;
            let failed = moved.elements().iter().find_map(|element| element.error().err());
            match failed {
                None => break,
                Some(error) if Instant::now() > give_up => return Err(self.fault(&error)),
                Some(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
        self.out_of_range = None;
        Ok(())
    }

    /// What is assigned and not about to be revoked: what the group has taken can't be moved.
    fn staying(&self) -> BTreeSet<TopicPartition> {
        let mut staying = self.assigned.clone();
        let mut leave = |places: &[TopicPartition]| staying.retain(|place| !places.contains(place));
        if let Some(revoking) = &self.revoking {
            leave(&revoking.places);
        }
        for change in &*lock(&self.consumer.context().changes) {
            if let Change::Revoke(places) = change {
                leave(places);
            }
        }
        staying
    }

    /// Nobody asks: keeps the membership.
    fn rest(&mut self) {
        self.take_back();
        if !self.resting && !self.paused {
            self.resting = true;
            if let Ok(list) = self.list(&self.assigned) {
                let _ = self.consumer.pause(&list);
            }
        }
        if self.revoking.as_ref().and_then(|r| r.told).is_some_and(|told| told.elapsed() > REVOKE_WAIT) {
            let _ = self.finish_revoking();
        }
        // Enough to serve what is queued; paused partitions give at most what was on its way.
        for _ in 0..200 {
            match self.consumer.poll(Duration::ZERO) {
                Some(Ok(message)) => self.gatherer.push(&message),
                Some(Err(error)) => drop(self.complaint(&error)),
                None => {}
            }
        }
        let records = self.gatherer.take();
        self.held.extend(records);
    }

    fn list<'a>(&self, places: impl IntoIterator<Item = &'a TopicPartition>) -> Result<TopicPartitionList, LogError> {
        list_of(places.into_iter().map(|place| (place, rdkafka::Offset::Invalid)))
    }

    fn fault(&self, error: &KafkaError) -> LogError {
        fault(error, &self.inside.told)
    }
}
