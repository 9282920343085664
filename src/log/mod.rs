//! The log: where events live between capture and delivery. One contract, two implementations.
//!
//! * Topics have partitions, partitions have records with offsets that rise by one (holes are allowed).
//! * A record without a key goes where the writer likes; with a key, to murmur2(key) mod partitions, as Java's
//!   default partitioner has it.
//! * `append` returns when the batch is *accepted*; its ticket resolves when every record, and the position
//!   given with it, is *durable*. Tickets of one writer resolve in order; after one failed, all later ones fail.
//! * A record's timestamp is when it was appended (CORRECTNESS 8).
//! * A group that has no offset yet starts at the beginning. An offset that retention has removed is an error
//!   ([`LogError::OutOfRange`]), never silently the latest (CORRECTNESS 10).

pub mod embedded;
#[cfg(feature = "kafka")]
pub mod kafka;
mod partitioner;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

pub use self::embedded::{EmbeddedLog, EmbeddedSettings};
#[cfg(feature = "kafka")]
pub use self::kafka::{KafkaLog, KafkaSettings};
pub use self::partitioner::{murmur2, partition_of};
use crate::event::{Offset, RecordBatch, TopicPartition};

#[async_trait]
pub trait Log: Send + Sync + 'static {
    /// `embedded` or `kafka`.
    fn kind(&self) -> &'static str;

    /// Creates the topic where it is missing; leaves one that is there as it is.
    async fn ensure_topic(&self, topic: &TopicSpec) -> Result<(), LogError>;

    async fn topics(&self) -> Result<Vec<TopicInfo>, LogError>;

    /// The one writer of `source`: a second one under the same name fences or is refused.
    async fn writer(&self, source: &str) -> Result<Box<dyn LogWriter>, LogError>;

    /// The position last committed for `source`, as [`LogWriter::position`] has it, without taking the writer's place:
    /// nothing is made or fenced. `None` where there is none yet.
    async fn position(&self, source: &str) -> Result<Option<Vec<u8>>, LogError>;

    /// Joins `group` and reads what is assigned to it.
    async fn consumer(&self, group: &str, topics: &[String]) -> Result<Box<dyn LogConsumer>, LogError>;

    /// Reads one topic without a group, all partitions, from `start`. With [`StopAt::End`] the ends are those of this
    /// call: what is written later is not returned, and a partition that ends before `start` has nothing to return.
    async fn reader(&self, topic: &str, start: StartAt, stop: StopAt) -> Result<Box<dyn LogReader>, LogError>;

    /// For each partition of the group's topics: the group's next offset and the log's.
    async fn group_lag(&self, group: &str) -> Result<Vec<PartitionLag>, LogError>;

    /// Moves the group's offsets; the group must have no running consumer.
    async fn reset_group(&self, group: &str, topics: &[String], start: StartAt) -> Result<(), LogError>;

    /// Registers a group so that retention keeps what it has not read, before its first read.
    async fn register_group(&self, group: &str, topics: &[String]) -> Result<(), LogError>;

    /// What retention took before a registered group had read it, until the group is reset or removed. Kafka's
    /// retention knows no groups: there it is always empty.
    async fn losses(&self) -> Result<Vec<Loss>, LogError>;

    /// Forgets the group and its offsets.
    async fn remove_group(&self, group: &str) -> Result<(), LogError>;

    /// Waits until all that was accepted is durable, then closes.
    async fn close(&self) -> Result<(), LogError>;
}

#[async_trait]
pub trait LogWriter: Send {
    /// The position last committed with records; opaque bytes.
    async fn position(&mut self) -> Result<Option<Vec<u8>>, LogError>;

    /// Takes the batch and, with it, the position it brings the source to. Waits while the bound on bytes in
    /// flight is reached. An empty batch with a position stores just that. All topics must have been ensured.
    async fn append(&mut self, batch: RecordBatch, position: Option<Vec<u8>>) -> Result<Ticket, LogError>;
}

/// Resolves when the batch is durable, and hands its buffers back.
pub type Ticket = Pin<Box<dyn Future<Output = Result<Appended, LogError>> + Send>>;

#[derive(Debug)]
pub struct Appended {
    /// Emptied, for the next batch.
    pub buffer: RecordBatch,
    pub records: usize,
    pub bytes: usize,
}

#[async_trait]
pub trait LogConsumer: Send {
    /// Next records in order per partition, up to about `limit.bytes`; waits up to `limit.wait` for the first.
    /// Safe to drop at its await. A batch holds one or more partitions.
    async fn poll(&mut self, limit: &PollLimit) -> Result<Polled, LogError>;

    /// Stores, for each partition, the next offset to read.
    async fn commit(&mut self, offsets: &BTreeMap<TopicPartition, Offset>) -> Result<(), LogError>;

    /// While paused, `poll` keeps the membership and returns no records.
    async fn set_paused(&mut self, paused: bool) -> Result<(), LogError>;

    /// Goes back to the committed offsets: records handed out since are read again.
    async fn rewind(&mut self) -> Result<(), LogError>;

    async fn close(self: Box<Self>) -> Result<(), LogError>;
}

#[async_trait]
pub trait LogReader: Send {
    /// As [`LogConsumer::poll`].
    async fn poll(&mut self, limit: &PollLimit) -> Result<Vec<ConsumedRecord>, LogError>;

    /// True when a reader that stops has returned everything up to where the topic ended when it was opened; `poll`
    /// then returns nothing, at once. A reader that never stops is never at an end.
    fn at_end(&self) -> bool;
}

#[derive(Clone, Debug)]
pub struct PollLimit {
    pub bytes: usize,
    pub records: usize,
    pub wait: Duration,
}

#[derive(Debug)]
pub enum Polled {
    Records(Vec<ConsumedRecord>),
    Assigned(Vec<TopicPartition>),
    /// What is in flight for these is to be finished or given up; their offsets can't be committed any more.
    Revoked(Vec<TopicPartition>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumedRecord {
    pub topic: Arc<str>,
    pub partition: i32,
    pub offset: Offset,
    /// When it was appended, ms since 1970.
    pub timestamp_ms: i64,
    pub key: Option<Bytes>,
    pub value: Option<Bytes>,
    pub headers: Vec<(Arc<str>, Bytes)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartAt {
    Beginning,
    End,
    /// The same offset in every partition.
    Offset(Offset),
    /// First record appended at or after this, ms since 1970.
    TimeMs(i64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopAt {
    Never,
    /// Where each partition ends when the reader is opened.
    End,
}

/// How a topic is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicSpec {
    pub name: String,
    pub partitions: i32,
    /// Kafka only; `None` takes the broker's default.
    pub replication_factor: Option<i32>,
    /// Kafka's topic settings by their names; the embedded log honours `retention.ms`, `retention.bytes` and
    /// `cleanup.policy` and refuses others by name.
    pub settings: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicInfo {
    pub name: String,
    pub partitions: Vec<PartitionInfo>,
    pub settings: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionInfo {
    pub partition: i32,
    /// Offset of the oldest record kept.
    pub first: Offset,
    /// Offset the next record will get.
    pub next: Offset,
    /// Bytes on disk, where the log knows.
    pub bytes: Option<u64>,
}

/// Records that a group will never read, of all partitions of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    pub group: String,
    pub topic: String,
    pub records: u64,
    /// When the last of them went, ms since 1970.
    pub at_ms: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionLag {
    pub topic_partition: TopicPartition,
    /// `None`: the group has committed nothing here yet.
    pub committed: Option<Offset>,
    /// Where the group goes on: what it has committed, else the oldest record that is kept.
    pub from: Offset,
    pub end: Offset,
}

impl PartitionLag {
    /// Records that the group has still to read.
    pub fn behind(&self) -> u64 {
        u64::try_from(self.end.0 - self.from.0).unwrap_or(0)
    }
}

/// What can go wrong with a log, with what to do about it decided by [`LogError::is_retriable`].
#[derive(Clone, Debug, thiserror::Error)]
pub enum LogError {
    #[error(
        "{topic_partition}: offset {wanted} is out of range ({first} to {next}); retention has removed it. \
             hint: 'tidegate connectors reset NAME --to beginning' reads what is left"
    )]
    OutOfRange { topic_partition: TopicPartition, wanted: Offset, first: Offset, next: Offset },
    #[error("topic '{0}' does not exist")]
    UnknownTopic(String),
    /// Another writer or worker has the log, or took the writer's place.
    #[error("{0}")]
    Fenced(String),
    /// The log is away: try again later; nothing was lost.
    #[error("the log is unavailable: {0}")]
    Unavailable(String),
    /// What was accepted last is not durable: go back to the last position that is.
    #[error("records were not written: {0}")]
    NotDurable(String),
    #[error("{0}")]
    Invalid(String),
    /// A failed fsync, a corrupt file: stop.
    #[error("{0}")]
    Fatal(String),
}

impl LogError {
    pub fn is_retriable(&self) -> bool {
        matches!(self, LogError::Unavailable(_) | LogError::NotDurable(_))
    }
}
