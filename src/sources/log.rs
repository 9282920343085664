//! The log as a source: a consumer group's records in batches, their offsets committed when the batch is done.
//!
//! Invariants: an offset is committed only after every record of its partition before it was acknowledged, and never
//! for a partition that has been taken away since; and a partition that is taken away is given up only when what is
//! in work of it has come to its end, or has had time enough to (CORRECTNESS 25).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::{ByteSize, ConfigError, Section};
use crate::event::{Offset, TopicPartition};
use crate::log::{ConsumedRecord, Log, LogConsumer, LogError, PollLimit, Polled};
use crate::pipeline::{Batch, Fault, Lag, Source, Status};

/// How long a partition that is taken away is kept for what is in work of it. A consumer that is not asked gives it up
/// by itself some time later.
const YIELD: Duration = Duration::from_secs(50);

/// How long a member that was made anew waits for its first records, or for why there are none, before it counts as
/// reading.
const FIRST_WORD: Duration = Duration::from_secs(4);

/// When a batch is full, whichever comes first.
#[derive(Clone, Copy, Debug)]
pub struct Batching {
    pub count: usize,
    pub byte_size: usize,
    /// How long the first record of a batch waits for more; zero takes what is there.
    pub period: Duration,
}

impl Default for Batching {
    fn default() -> Self {
        Batching { count: 500, byte_size: 4 << 20, period: Duration::ZERO }
    }
}

impl Batching {
    /// Reads `batching: {count, byte_size, period}`.
    pub fn read(section: &mut Section) -> Result<Self, ConfigError> {
        let default = Batching::default();
        let Some(mut section) = section.section("batching")? else { return Ok(default) };
        let batching = Batching {
            count: section.or("count", default.count)?,
            byte_size: section.take::<ByteSize>("byte_size")?.map_or(default.byte_size, |size| size.bytes() as usize),
            period: section.or("period", default.period)?,
        };
        if batching.count == 0 || batching.byte_size == 0 {
            return Err(ConfigError::new(section.place(), "a batch holds at least one record and one byte"));
        }
        if batching.period > Duration::from_secs(60) {
            return Err(section.error("period", "a batch waits for at most 60 s"));
        }
        section.finish()?;
        Ok(batching)
    }
}

pub struct LogSource {
    log: Arc<dyn Log>,
    group: String,
    topics: Vec<String>,
    batching: Batching,
    consumer: Option<Box<dyn LogConsumer>>,
    paused: bool,
    /// Read and not handed on yet.
    pending: Vec<ConsumedRecord>,
    pending_bytes: usize,
    pending_since: Option<Instant>,
    assigned: BTreeSet<TopicPartition>,
    revoked: Arc<Revoked>,
    /// Partitions of the batches that were handed on and are not acknowledged yet, in order.
    out: VecDeque<BTreeSet<TopicPartition>>,
    /// When a partition was last taken away.
    revoked_at: Option<Instant>,
    /// When the newest record handed on was appended, ms since 1970.
    last_timestamp_ms: i64,
    status: Arc<Status>,
    ticks: u32,
}

/// Partitions that were taken away from a member, told to whoever works on their records.
#[derive(Default)]
pub struct Revoked(watch::Sender<BTreeSet<TopicPartition>>);

impl Revoked {
    pub fn contains(&self, place: &TopicPartition) -> bool {
        self.0.borrow().contains(place)
    }

    /// Waits until `lost` says so of them.
    pub async fn until(&self, lost: impl Fn(&BTreeSet<TopicPartition>) -> bool) {
        // The sender is `self`.
        let _ = self.0.subscribe().wait_for(lost).await;
    }

    pub fn look<T>(&self, look: impl Fn(&BTreeSet<TopicPartition>) -> T) -> T {
        look(&self.0.borrow())
    }

    fn change(&self, change: impl FnOnce(&mut BTreeSet<TopicPartition>)) {
        self.0.send_modify(change);
    }
}

/// Offsets to be committed.
pub type Offsets = BTreeMap<TopicPartition, Offset>;

impl LogSource {
    pub fn new(
        log: Arc<dyn Log>,
        group: impl Into<String>,
        topics: Vec<String>,
        batching: Batching,
        status: Arc<Status>,
    ) -> Self {
        LogSource {
            log,
            group: group.into(),
            topics,
            batching,
            consumer: None,
            paused: false,
            pending: Vec::new(),
            pending_bytes: 0,
            pending_since: None,
            assigned: BTreeSet::new(),
            revoked: Arc::default(),
            out: VecDeque::new(),
            revoked_at: None,
            last_timestamp_ms: 0,
            status,
            ticks: 0,
        }
    }

    /// Partitions that this member of the group reads.
    pub fn assigned(&self) -> &BTreeSet<TopicPartition> {
        &self.assigned
    }

    /// The topics that are read, where it is this member that sees to what is left of others: it has the first
    /// partition of the first topic, which one member has.
    pub fn sees_to_strays(&self) -> Option<&[String]> {
        let first = self.topics.first()?;
        self.assigned.contains(&TopicPartition::new(first.as_str(), 0)).then_some(&self.topics)
    }

    /// Partitions that were taken away from this member.
    pub fn revoked(&self) -> Arc<Revoked> {
        self.revoked.clone()
    }

    /// Counts a batch of these partitions, which is none of the log's, as one that was handed on.
    pub fn lend(&mut self, places: BTreeSet<TopicPartition>) {
        self.out.push_back(places);
    }

    /// Polling now would give up a partition that is worked on still.
    fn must_keep(&self) -> bool {
        self.revoked_at.is_some_and(|at| at.elapsed() < YIELD)
            && self.out.iter().flatten().any(|place| self.revoked.contains(place))
    }

    async fn consumer(&mut self) -> Result<&mut Box<dyn LogConsumer>, Fault> {
        if self.consumer.is_none() {
            let consumer = self.log.consumer(&self.group, &self.topics).await.map_err(fault)?;
            self.consumer = Some(consumer);
            self.paused = false;
        }
        self.consumer.as_mut().ok_or_else(|| Fault::retry("the consumer is gone"))
    }

    async fn set_paused(&mut self, paused: bool) -> Result<(), Fault> {
        if self.paused != paused {
            self.consumer().await?.set_paused(paused).await.map_err(fault)?;
            self.paused = paused;
        }
        Ok(())
    }

    fn take(&mut self, polled: Polled) {
        match polled {
            Polled::Records(records) => {
                if self.pending.is_empty() && !records.is_empty() {
                    self.pending_since = Some(Instant::now());
                }
                self.pending_bytes += records.iter().map(size).sum::<usize>();
                self.pending.extend(records);
            }
            Polled::Assigned(partitions) => {
                self.revoked.change(|revoked| revoked.retain(|partition| !partitions.contains(partition)));
                self.assigned.extend(partitions);
            }
            Polled::Revoked(partitions) => {
                self.assigned.retain(|partition| !partitions.contains(partition));
                self.pending.retain(|record| !partitions.contains(&place(record)));
                self.pending_bytes = self.pending.iter().map(size).sum();
                self.revoked.change(|revoked| revoked.extend(partitions));
                self.revoked_at = Some(Instant::now());
            }
        }
    }

    /// Joins, and hears whether it may: a member that may not would wait with nothing to read, as one that has read
    /// everything does.
    async fn first_word(&mut self) -> Result<(), Fault> {
        let until = Instant::now() + FIRST_WORD;
        while self.pending.is_empty() && Instant::now() < until {
            let wait = until.saturating_duration_since(Instant::now());
            let limit = PollLimit { bytes: self.batching.byte_size, records: self.batching.count, wait };
            let polled = self.consumer().await?.poll(&limit).await.map_err(fault)?;
            self.take(polled);
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.pending.len() >= self.batching.count || self.pending_bytes >= self.batching.byte_size
    }

    fn batch(&mut self) -> Batch<Vec<ConsumedRecord>, Offsets> {
        let records = std::mem::take(&mut self.pending);
        let bytes = std::mem::take(&mut self.pending_bytes);
        self.pending_since = None;
        let mut offsets = Offsets::new();
        for record in &records {
            offsets.insert(place(record), Offset(record.offset.0 + 1));
            self.last_timestamp_ms = self.last_timestamp_ms.max(record.timestamp_ms);
        }
        self.out.push_back(offsets.keys().cloned().collect());
        Batch { events: records.len(), bytes, body: records, mark: offsets }
    }

    async fn tell_lag(&mut self) -> Result<(), Fault> {
        let partitions = match self.log.group_lag(&self.group).await {
            Ok(partitions) => partitions,
            Err(LogError::UnknownTopic(_)) => return Ok(()),
            Err(error) => return Err(fault(error)),
        };
        let events: u64 = partitions.iter().map(crate::log::PartitionLag::behind).sum();
        let seconds = if events == 0 {
            Some(0.0)
        } else if self.last_timestamp_ms > 0 {
            Some((chrono::Utc::now().timestamp_millis() - self.last_timestamp_ms).max(0) as f64 / 1e3)
        } else {
            None
        };
        self.status.set_lag(Lag { bytes: None, seconds, events: Some(events) });
        Ok(())
    }
}

#[async_trait]
impl Source for LogSource {
    type Batch = Vec<ConsumedRecord>;
    type Mark = Offsets;

    async fn next(&mut self) -> Result<Batch<Self::Batch, Self::Mark>, Fault> {
        self.set_paused(false).await?;
        loop {
            let now = Instant::now();
            let due = self.pending_since.map(|since| since + self.batching.period);
            if self.is_full() || due.is_some_and(|due| due <= now) {
                return Ok(self.batch());
            }
            let limit = PollLimit {
                bytes: self.batching.byte_size - self.pending_bytes,
                records: self.batching.count - self.pending.len(),
                wait: due.map_or(Duration::from_secs(1), |due| due - now),
            };
            // What a poll gave is in `pending` before the next await: dropping this future loses nothing.
            let polled = self.consumer().await?.poll(&limit).await.map_err(fault)?;
            self.take(polled);
        }
    }

    async fn acknowledge(&mut self, mut mark: Offsets) -> Result<(), Fault> {
        self.out.pop_front();
        mark.retain(|partition, _| !self.revoked.contains(partition));
        if mark.is_empty() {
            return Ok(());
        }
        self.consumer().await?.commit(&mark).await.map_err(fault)
    }

    async fn restart(&mut self) -> Result<(), Fault> {
        self.pending.clear();
        self.pending_bytes = 0;
        self.pending_since = None;
        self.out.clear();
        if let Some(consumer) = &mut self.consumer
            && let Err(error) = consumer.rewind().await
        {
            tracing::debug!(group = self.group, %error, "the consumer is made anew");
            self.consumer = None;
            self.assigned.clear();
        }
        if self.consumer.is_none() {
            self.first_word().await?;
        }
        Ok(())
    }

    async fn tick(&mut self, paused: bool) -> Result<(), Fault> {
        if paused {
            // A member that does not poll is put out of its group, and a log may forget the offsets of a group that
            // has no members: one that is paused from the start joins it too.
            self.consumer().await?;
            self.set_paused(true).await?;
            if self.must_keep() {
                return Ok(());
            }
            let limit = PollLimit { bytes: 1, records: 1, wait: Duration::from_millis(1) };
            let polled = self.consumer().await?.poll(&limit).await.map_err(fault)?;
            self.take(polled);
        }
        self.ticks = self.ticks.wrapping_add(1);
        if self.ticks % 5 == 1 {
            self.tell_lag().await?;
        }
        Ok(())
    }

    async fn close(&mut self) -> Result<(), Fault> {
        match self.consumer.take() {
            Some(consumer) => consumer.close().await.map_err(fault),
            None => Ok(()),
        }
    }
}

fn place(record: &ConsumedRecord) -> TopicPartition {
    TopicPartition::new(record.topic.clone(), record.partition)
}

fn size(record: &ConsumedRecord) -> usize {
    record.key.as_ref().map_or(0, |key| key.len()) + record.value.as_ref().map_or(0, |value| value.len())
}

/// A topic that nobody has written to yet is waited for.
fn fault(error: LogError) -> Fault {
    match error {
        LogError::UnknownTopic(topic) => Fault::unavailable(
            format!("topic '{topic}' is not there yet; it comes with the first event of its table"),
            Some(Duration::from_secs(2)),
        ),
        other => other.into(),
    }
}
