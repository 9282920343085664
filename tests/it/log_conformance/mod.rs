//! What both logs promise, asked of both: every function that is named below runs once over the embedded log and once
//! over a real Kafka broker. What only one of them can do is in [`embedded`], and in `kafka.rs`.

mod embedded;
mod groups;
mod processes;
mod reading;
mod writing;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate::event::{HeaderSet, Offset, RecordBatch, TopicPartition};
use tidegate::log::{
    ConsumedRecord, EmbeddedLog, EmbeddedSettings, Log, LogConsumer, LogError, LogReader, PartitionLag, PollLimit,
    Polled, StartAt, StopAt, TopicSpec, partition_of,
};

use crate::support::eventually;

/// A log of the test's own, which can be closed and opened again.
pub enum World {
    Embedded(tempfile::TempDir),
    #[cfg(feature = "kafka")]
    Kafka {
        bootstrap: String,
        /// Keeps this test's topics, groups and sources apart from those of others.
        unique: String,
    },
}

impl World {
    pub fn embedded() -> World {
        World::Embedded(tempfile::tempdir().unwrap())
    }

    #[cfg(feature = "kafka")]
    pub async fn kafka() -> World {
        let unique = uuid::Uuid::new_v4().simple().to_string()[..8].to_owned();
        World::Kafka { bootstrap: crate::support::Kafka::shared().await.bootstrap(), unique }
    }

    pub async fn log(&self) -> Arc<dyn Log> {
        match self {
            World::Embedded(folder) => Arc::new(EmbeddedLog::open(EmbeddedSettings::new(folder.path())).unwrap()),
            #[cfg(feature = "kafka")]
            World::Kafka { bootstrap, unique } => {
                let mut settings = tidegate::log::KafkaSettings::new(bootstrap);
                settings.positions_topic = format!("tidegate.positions.{unique}");
                Arc::new(tidegate::log::KafkaLog::open(settings).await.unwrap())
            }
        }
    }

    /// A name for a topic, group or source, this test's alone.
    pub fn name(&self, name: &str) -> String {
        match self {
            World::Embedded(_) => name.to_owned(),
            #[cfg(feature = "kafka")]
            World::Kafka { unique, .. } => format!("{name}.{unique}"),
        }
    }
}

pub fn topic(name: &str, partitions: i32) -> TopicSpec {
    TopicSpec { name: name.to_owned(), partitions, replication_factor: None, settings: BTreeMap::new() }
}

pub const LIMIT: PollLimit = PollLimit { bytes: 1 << 20, records: 10_000, wait: Duration::from_millis(200) };
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A batch of `(key, value)` texts for one topic.
pub fn batch<'a>(topic: &str, records: impl IntoIterator<Item = (&'a str, &'a str)>) -> RecordBatch {
    let topic: Arc<str> = topic.into();
    let mut batch = RecordBatch::new();
    for (key, value) in records {
        batch.push(&topic, Some(key.as_bytes()), Some(value.as_bytes()), &HeaderSet::default());
    }
    batch
}

/// Writes `count` records `k{i % keys}` = `{i}` from `from` on, as one batch, and waits until they are durable.
pub async fn write_numbers(log: &dyn Log, topic: &str, from: usize, count: usize, keys: usize) {
    let mut writer = log.writer("numbers").await.unwrap();
    let mut numbers = RecordBatch::new();
    let name: Arc<str> = topic.into();
    for i in from..from + count {
        let key = format!("k{}", i % keys);
        numbers.push(&name, Some(key.as_bytes()), Some(i.to_string().as_bytes()), &HeaderSet::default());
    }
    writer.append(numbers, None).await.unwrap().await.unwrap();
}

/// Ten records, then `count` more; a time, in ms since 1970, that is after the ones and not after the others.
pub async fn ten_and_then(log: &dyn Log, topic: &str, count: usize) -> i64 {
    write_numbers(log, topic, 0, 10, 1).await;
    let written = now_ms();
    let give_up = Instant::now() + DEADLINE;
    while now_ms() <= written {
        assert!(Instant::now() < give_up, "the clock stands still");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let between = now_ms();
    write_numbers(log, topic, 10, count, 1).await;
    between
}

/// Polls until `count` records have come.
pub async fn read_count(reader: &mut dyn LogReader, count: usize) -> Vec<ConsumedRecord> {
    let give_up = Instant::now() + DEADLINE;
    let mut records = Vec::new();
    while records.len() < count {
        assert!(Instant::now() < give_up, "{} of {count} records came", records.len());
        records.extend(reader.poll(&LIMIT).await.unwrap());
    }
    records
}

pub async fn read_all(log: &dyn Log, topic: &str) -> Vec<ConsumedRecord> {
    let mut reader = log.reader(topic, StartAt::Beginning, StopAt::End).await.unwrap();
    let give_up = Instant::now() + DEADLINE;
    let mut records = Vec::new();
    while !reader.at_end() {
        assert!(Instant::now() < give_up, "the end of {topic} was not reached");
        records.extend(reader.poll(&LIMIT).await.unwrap());
    }
    records
}

/// Polls a consumer until `count` records have come; keeps what was assigned.
pub async fn consume_count(consumer: &mut dyn LogConsumer, count: usize) -> Vec<ConsumedRecord> {
    let give_up = Instant::now() + DEADLINE;
    let mut records = Vec::new();
    while records.len() < count {
        assert!(Instant::now() < give_up, "{} of {count} records came", records.len());
        if let Polled::Records(more) = consumer.poll(&LIMIT).await.unwrap() {
            records.extend(more);
        }
    }
    records
}

/// The offsets to commit once `records` are done with.
pub fn done(records: &[ConsumedRecord]) -> BTreeMap<TopicPartition, Offset> {
    let mut offsets = BTreeMap::new();
    for record in records {
        offsets.insert(TopicPartition::new(record.topic.clone(), record.partition), Offset(record.offset.0 + 1));
    }
    offsets
}

pub fn text(bytes: &Option<bytes::Bytes>) -> &str {
    bytes.as_ref().map_or("", |bytes| std::str::from_utf8(bytes).unwrap())
}

pub fn values(records: &[ConsumedRecord]) -> Vec<&str> {
    records.iter().map(|record| text(&record.value)).collect()
}

pub fn now_ms() -> i64 {
    chrono::Utc::now().timestamp_millis()
}

macro_rules! over_both_logs {
    ($($of:ident: $($promise:ident)*;)*) => {
        mod over_embedded {
            $($(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                super::$of::$promise(super::World::embedded()).await;
            })*)*
        }
        #[cfg(feature = "kafka")]
        mod over_kafka {
            $($(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                super::$of::$promise(super::World::kafka().await).await;
            })*)*
        }
    };
}

over_both_logs! {
    writing:
        records_come_back_as_they_were_written
        keys_go_to_the_partitions_that_java_sends_them_to
        order_is_kept_within_a_partition_over_many_batches
        a_position_is_stored_with_its_records_and_found_after_reopening
        a_new_writer_of_a_source_takes_the_place_of_the_one_before
        an_unknown_topic_is_refused_and_so_is_everything_after;
    reading:
        a_reader_starts_at_an_offset_a_time_or_the_end
        a_reader_that_stops_ends_where_the_topic_ended_beside_a_steady_writer
        an_offset_that_is_not_there_is_an_error
        topics_are_listed_with_their_ranges;
    groups:
        a_group_starts_at_the_beginning_and_goes_on_where_it_committed
        lag_is_told_per_partition
        a_group_is_reset_to_beginning_end_offset_and_time
        members_of_a_group_share_the_partitions
        a_paused_consumer_gets_nothing_and_loses_nothing
        a_topic_made_later_is_found_by_its_group
        news_reaches_a_waiting_consumer_at_once;
}
