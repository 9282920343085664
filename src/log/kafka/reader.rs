//! Reading a topic without a group.
//!
//! Polling runs on a thread for blocking work and puts what it finds into the shared [`State`]; so a poll that is
//! dropped loses nothing.
//!
//! Where the partitions end is found before the client is made; so the client's word that a partition's end is reached
//! is never about an end before that one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rdkafka::Message as _;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::client::{Told, blocking, fault, no_client};
use super::gather::Gatherer;
use super::{ANSWER_WAIT, Inside, list_of, lock};
use crate::event::{Offset, TopicPartition};
use crate::log::{ConsumedRecord, LogError, LogReader, PollLimit};

struct Reader {
    inside: Arc<Inside>,
    state: Arc<Mutex<State>>,
}

struct State {
    consumer: BaseConsumer<Told>,
    gatherer: Gatherer,
    /// Found and not handed out.
    found: Vec<ConsumedRecord>,
    /// Next offset to read of each partition.
    next: BTreeMap<TopicPartition, i64>,
    /// Of a reader that stops: the partitions that have not been read to their end yet, and that end.
    open: Option<BTreeMap<i32, i64>>,
    failed: Option<LogError>,
}

pub(super) fn open(
    inside: Arc<Inside>,
    mut from: BTreeMap<TopicPartition, Offset>,
    until: Option<BTreeMap<TopicPartition, Offset>>,
) -> Result<Box<dyn LogReader>, LogError> {
    let told = inside.told.clone();
    let consumer: BaseConsumer<Told> =
        inside.settings.reader()?.create_with_context(told.clone()).map_err(|e| no_client("reader", &e))?;
    if let Some(until) = &until {
        from.retain(|place, offset| until.get(place).is_some_and(|end| *offset < *end));
    }
    let open =
        until.map(|until| from.keys().filter_map(|place| Some((place.partition, until.get(place)?.0))).collect());
    let list = list_of(from.iter().map(|(place, offset)| (place, rdkafka::Offset::Offset(offset.0))))?;
    consumer.assign(&list).map_err(|e| fault(&e, &told))?;
    let state = State {
        consumer,
        gatherer: Gatherer::default(),
        found: Vec::new(),
        next: from.into_iter().map(|(place, offset)| (place, offset.0)).collect(),
        open,
        failed: None,
    };
    Ok(Box::new(Reader { inside, state: Arc::new(Mutex::new(state)) }))
}

impl State {
    fn gather(&mut self, limit: &PollLimit, told: &Told) -> Result<(), LogError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        let deadline = Instant::now() + limit.wait;
        while self.found.is_empty() && !self.gatherer.is_full(limit) && !self.all_read() {
            let wait = match self.gatherer.is_empty() {
                true => deadline.saturating_duration_since(Instant::now()),
                false => Duration::ZERO,
            };
            match self.consumer.poll(wait) {
                Some(Ok(message)) => {
                    let (partition, offset) = (message.partition(), message.offset());
                    let end = self.open.as_ref().map(|open| open.get(&partition).copied().unwrap_or(0));
                    if end.is_none_or(|end| offset < end) {
                        self.gatherer.push(&message);
                    }
                    if end.is_some_and(|end| offset + 1 >= end) {
                        drop(message);
                        self.read_whole(partition);
                    }
                }
                // The last offsets may be taken by what is not shown: markers of transactions, compacted records.
                Some(Err(KafkaError::PartitionEOF(partition))) => self.read_whole(partition),
                Some(Err(error)) => {
                    if let Some(error) = self.complaint(&error, told) {
                        self.found = self.gatherer.take();
                        self.failed = matches!(error, LogError::OutOfRange { .. }).then(|| error.clone());
                        return Err(error);
                    }
                }
                None if !self.gatherer.is_empty() || Instant::now() >= deadline => break,
                None => {}
            }
        }
        if self.found.is_empty() {
            self.found = self.gatherer.take();
        }
        Ok(())
    }

    fn all_read(&self) -> bool {
        self.open.as_ref().is_some_and(BTreeMap::is_empty)
    }

    /// Nothing more of the partition is wanted by a reader that stops.
    fn read_whole(&mut self, partition: i32) {
        if self.open.as_mut().is_some_and(|open| open.remove(&partition).is_some()) {
            let done: Vec<_> = self.next.keys().filter(|place| place.partition == partition).collect();
            // Only spares its fetching: what comes all the same is left out.
            if let Ok(list) = list_of(done.into_iter().map(|place| (place, rdkafka::Offset::Invalid))) {
                let _ = self.consumer.pause(&list);
            }
        }
    }

    fn complaint(&self, error: &KafkaError, told: &Told) -> Option<LogError> {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AutoOffsetReset) => self.out_of_range().or_else(|| Some(fault(error, told))),
            Some(RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::Resolve) => None,
            _ => Some(fault(error, told)),
        }
    }

    fn out_of_range(&self) -> Option<LogError> {
        for (place, wanted) in &self.next {
            let (first, next) = self.consumer.fetch_watermarks(&place.topic, place.partition, ANSWER_WAIT).ok()?;
            if !(first..=next).contains(wanted) {
                return Some(LogError::OutOfRange {
                    topic_partition: place.clone(),
                    wanted: Offset(*wanted),
                    first: Offset(first),
                    next: Offset(next),
                });
            }
        }
        None
    }

    fn take(&mut self) -> Vec<ConsumedRecord> {
        let records = std::mem::take(&mut self.found);
        for record in &records {
            self.next.insert(TopicPartition::new(record.topic.clone(), record.partition), record.offset.0 + 1);
        }
        records
    }
}

#[async_trait]
impl LogReader for Reader {
    async fn poll(&mut self, limit: &PollLimit) -> Result<Vec<ConsumedRecord>, LogError> {
        let (state, told, wanted) = (self.state.clone(), self.inside.told.clone(), limit.clone());
        blocking(limit.wait + ANSWER_WAIT * 2, move || lock(&state).gather(&wanted, &told)).await?;
        Ok(lock(&self.state).take())
    }

    fn at_end(&self) -> bool {
        let state = lock(&self.state);
        state.all_read() && state.found.is_empty() && state.gatherer.is_empty() && state.failed.is_none()
    }
}
