//! Reading a topic without a group.
//!
//! Polling runs on a thread for blocking work and puts what it finds into the shared [`State`]; so a poll that is
//! dropped loses nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

use super::client::{Told, blocking, fault};
use super::gather::Gatherer;
use super::{ANSWER_WAIT, Inside, list_of, lock};
use crate::event::{Offset, TopicPartition};
use crate::log::{ConsumedRecord, LogError, LogReader, PollLimit, StartAt};

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
    /// Where the partitions ended when `at_end` looked last.
    ends: BTreeMap<TopicPartition, Offset>,
    failed: Option<LogError>,
}

pub(super) fn open(
    inside: Arc<Inside>,
    from: BTreeMap<TopicPartition, Offset>,
) -> Result<Box<dyn LogReader>, LogError> {
    let told = inside.told.clone();
    let consumer: BaseConsumer<Told> = inside
        .settings
        .reader()?
        .create_with_context(told.clone())
        .map_err(|e| LogError::Invalid(format!("the Kafka reader can't be made: {e}")))?;
    let list = list_of(from.iter().map(|(place, offset)| (place, rdkafka::Offset::Offset(offset.0))))?;
    consumer.assign(&list).map_err(|e| fault(&e, &told))?;
    let state = State {
        consumer,
        gatherer: Gatherer::default(),
        found: Vec::new(),
        next: from.into_iter().map(|(place, offset)| (place, offset.0)).collect(),
        ends: BTreeMap::new(),
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
        while self.found.is_empty() && !self.gatherer.is_full(limit) {
            let wait = match self.gatherer.is_empty() {
                true => deadline.saturating_duration_since(Instant::now()),
                false => Duration::ZERO,
            };
            match self.consumer.poll(wait) {
                Some(Ok(message)) => self.gatherer.push(&message),
                Some(Err(KafkaError::PartitionEOF(partition))) => self.reached_end(partition),
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

    /// The last offsets may be taken by what is not shown (markers of transactions, compacted records).
    fn reached_end(&mut self, partition: i32) {
        for (place, end) in &self.ends {
            if place.partition == partition
                && let Some(next) = self.next.get_mut(place)
            {
                *next = (*next).max(end.0);
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

    async fn at_end(&mut self) -> Result<bool, LogError> {
        let places: Vec<_> = lock(&self.state).next.keys().cloned().collect();
        let ends = self.inside.resolve(places, StartAt::End).await?;
        let mut state = lock(&self.state);
        let there = ends.iter().all(|(place, end)| state.next.get(place).is_some_and(|next| *next >= end.0));
        state.ends = ends;
        Ok(there && state.found.is_empty())
    }
}
