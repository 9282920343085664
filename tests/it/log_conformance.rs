//! What both logs promise, asked of both: every function in `promises` runs once over the embedded log and once
//! over a real Kafka broker. What only one of them can do is in `embedded` below, and in `kafka.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate::event::{HeaderSet, Offset, RecordBatch, TopicPartition};
use tidegate::log::{
    ConsumedRecord, EmbeddedLog, EmbeddedSettings, Log, LogConsumer, LogError, LogReader, PollLimit, Polled, StartAt,
    StopAt, TopicSpec, partition_of,
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

mod promises {
    use super::*;

    pub async fn records_come_back_as_they_were_written(world: World) {
        let log = world.log().await;
        let name: Arc<str> = world.name("rows").into();
        log.ensure_topic(&topic(&name, 1)).await.unwrap();
        let mut writer = log.writer(&world.name("s")).await.unwrap();
        let mut records = RecordBatch::new();
        let headers = records.header_set([("a", b"1".as_slice()), ("b", b"".as_slice()), ("a", b"\xff\x00")]);
        records.push(&name, Some(b"k"), Some(b"v"), &headers);
        records.push(&name, Some(b"k"), None, &HeaderSet::default());
        records.push(&name, None, Some(b""), &HeaderSet::default());
        records.push(&name, Some(b""), Some(&[7; 100_000]), &headers);
        let before = now_ms();
        let appended = writer.append(records, None).await.unwrap().await.unwrap();
        assert_eq!((appended.records, appended.buffer.len()), (4, 0));

        let read = read_all(&*log, &name).await;
        let parts = |r: &ConsumedRecord| {
            let headers: Vec<_> = r.headers.iter().map(|(n, v)| (n.to_string(), v.to_vec())).collect();
            (r.offset.0, r.key.as_ref().map(|k| k.to_vec()), r.value.as_ref().map(|v| v.to_vec()), headers)
        };
        let shared = vec![("a".into(), b"1".to_vec()), ("b".into(), vec![]), ("a".into(), b"\xff\x00".to_vec())];
        assert_eq!(
            read.iter().map(parts).collect::<Vec<_>>(),
            [
                (0, Some(b"k".to_vec()), Some(b"v".to_vec()), shared.clone()),
                (1, Some(b"k".to_vec()), None, vec![]),
                (2, None, Some(vec![]), vec![]),
                (3, Some(vec![]), Some(vec![7; 100_000]), shared),
            ]
        );
        assert!(read.iter().all(|r| (before - 1..=now_ms() + 1).contains(&r.timestamp_ms)), "{}", read[0].timestamp_ms);
    }

    pub async fn keys_go_to_the_partitions_that_java_sends_them_to(world: World) {
        let log = world.log().await;
        let name: Arc<str> = world.name("rows").into();
        log.ensure_topic(&topic(&name, 7)).await.unwrap();
        // Hashes from Kafka's own tests (UtilsTest.testMurmur2), then `toPositive(hash) % 7`.
        let known: [(&str, i32); 4] =
            [("21", -973932308), ("foobar", -790332482), ("a-little-bit-long-string", -985981536), ("abc", 479470107)];
        let mut writer = log.writer(&world.name("s")).await.unwrap();
        let records = batch(&name, known.iter().map(|(key, _)| (*key, "v")));
        writer.append(records, None).await.unwrap().await.unwrap();
        let read = read_all(&*log, &name).await;
        for (key, hash) in known {
            let record = read.iter().find(|record| text(&record.key) == key).unwrap();
            assert_eq!(record.partition, (hash & 0x7fff_ffff) % 7, "{key}");
            assert_eq!(record.partition, partition_of(key.as_bytes(), 7));
        }
    }

    pub async fn order_is_kept_within_a_partition_over_many_batches(world: World) {
        let log = world.log().await;
        let name: Arc<str> = world.name("rows").into();
        log.ensure_topic(&topic(&name, 3)).await.unwrap();
        let mut writer = log.writer(&world.name("s")).await.unwrap();
        let mut tickets = Vec::new();
        for number in 0..100 {
            let mut records = RecordBatch::new();
            for i in 0..50 {
                let i = number * 50 + i;
                let key = format!("k{}", i % 11);
                records.push(&name, Some(key.as_bytes()), Some(i.to_string().as_bytes()), &HeaderSet::default());
            }
            tickets.push(writer.append(records, None).await.unwrap());
        }
        for ticket in tickets {
            ticket.await.unwrap();
        }
        let read = read_all(&*log, &name).await;
        assert_eq!(read.len(), 5000);
        let mut last: BTreeMap<i32, (i64, usize)> = BTreeMap::new();
        for record in &read {
            let value: usize = text(&record.value).parse().unwrap();
            if let Some((offset, before)) = last.insert(record.partition, (record.offset.0, value)) {
                assert_eq!(record.offset.0, offset + 1);
                assert!(value > before);
            }
        }
        assert_eq!(last.len(), 3);
    }

    pub async fn a_position_is_stored_with_its_records_and_found_after_reopening(world: World) {
        let (name, source) = (world.name("rows"), world.name("s"));
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 2)).await.unwrap();
        let mut writer = log.writer(&source).await.unwrap();
        assert_eq!(writer.position().await.unwrap(), None);
        for i in 0..10 {
            let value = i.to_string();
            let position = format!("p{i}").into_bytes();
            let ticket = writer.append(batch(&name, [("k", value.as_str())]), Some(position)).await.unwrap();
            ticket.await.unwrap();
        }
        writer.append(RecordBatch::new(), Some(b"alone".to_vec())).await.unwrap().await.unwrap();
        writer.append(batch(&name, [("k", "10")]), None).await.unwrap().await.unwrap();
        drop(writer);
        log.close().await.unwrap();
        drop(log);

        let log = world.log().await;
        let mut writer = log.writer(&source).await.unwrap();
        assert_eq!(writer.position().await.unwrap(), Some(b"alone".to_vec()));
        assert_eq!(log.writer(&world.name("other")).await.unwrap().position().await.unwrap(), None);
        let expected: Vec<String> = (0..11).map(|i| i.to_string()).collect();
        assert_eq!(values(&read_all(&*log, &name).await), expected);
    }

    pub async fn a_new_writer_of_a_source_takes_the_place_of_the_one_before(world: World) {
        let (name, source) = (world.name("rows"), world.name("s"));
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 1)).await.unwrap();
        let mut old = log.writer(&source).await.unwrap();
        let first = old.append(batch(&name, [("k", "1")]), Some(b"1".to_vec())).await.unwrap();
        let mut new = log.writer(&source).await.unwrap();
        assert_eq!(new.position().await.unwrap(), Some(b"1".to_vec()));
        first.await.unwrap();
        let refused = match old.append(batch(&name, [("k", "2")]), Some(b"2".to_vec())).await {
            Ok(ticket) => ticket.await.map(drop),
            Err(error) => Err(error),
        };
        assert!(matches!(refused, Err(LogError::Fenced(_))), "{refused:?}");
        new.append(batch(&name, [("k", "3")]), Some(b"3".to_vec())).await.unwrap().await.unwrap();
        assert_eq!(values(&read_all(&*log, &name).await), ["1", "3"]);
    }

    pub async fn an_unknown_topic_is_refused_and_so_is_everything_after(world: World) {
        let name = world.name("rows");
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 1)).await.unwrap();
        let mut writer = log.writer(&world.name("s")).await.unwrap();
        let lost = async |writer: &mut Box<dyn tidegate::log::LogWriter>, topic: &str| match writer
            .append(batch(topic, [("k", "v")]), Some(b"p".to_vec()))
            .await
        {
            Ok(ticket) => ticket.await.map(drop),
            Err(error) => Err(error),
        };
        let missing = world.name("missing");
        assert!(matches!(lost(&mut writer, &missing).await, Err(LogError::UnknownTopic(topic)) if topic == missing));
        assert!(lost(&mut writer, &name).await.is_err());
        let mut again = log.writer(&world.name("s")).await.unwrap();
        assert_eq!(again.position().await.unwrap(), None);
        lost(&mut again, &name).await.unwrap();
        assert_eq!(read_all(&*log, &name).await.len(), 1);
        assert!(matches!(
            log.reader(&missing, StartAt::Beginning, StopAt::Never).await,
            Err(LogError::UnknownTopic(_))
        ));
    }

    pub async fn a_group_starts_at_the_beginning_and_goes_on_where_it_committed(world: World) {
        let (name, group) = (world.name("rows"), world.name("g"));
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 3)).await.unwrap();
        write_numbers(&*log, &name, 0, 30, 30).await;
        let topics = [name.clone()];
        let mut consumer = log.consumer(&group, &topics).await.unwrap();
        let first = consume_count(&mut *consumer, 30).await;
        assert_eq!(first.len(), 30);
        consumer.commit(&done(&first)).await.unwrap();
        write_numbers(&*log, &name, 30, 10, 30).await;
        let not_committed = consume_count(&mut *consumer, 10).await;
        assert_eq!(not_committed.len(), 10);
        consumer.close().await.unwrap();
        log.close().await.unwrap();
        drop(log);

        let log = world.log().await;
        let mut consumer = log.consumer(&group, &topics).await.unwrap();
        let again = consume_count(&mut *consumer, 10).await;
        assert_eq!(sorted(&again), sorted(&not_committed));
        consumer.rewind().await.unwrap();
        assert_eq!(sorted(&consume_count(&mut *consumer, 10).await), sorted(&not_committed));
        consumer.commit(&done(&again)).await.unwrap();
        consumer.close().await.unwrap();
    }

    pub async fn lag_is_told_per_partition(world: World) {
        let (name, group) = (world.name("rows"), world.name("g"));
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 2)).await.unwrap();
        log.register_group(&group, std::slice::from_ref(&name)).await.unwrap();
        write_numbers(&*log, &name, 0, 20, 20).await;
        let behind = |lags: &[tidegate::log::PartitionLag]| -> i64 {
            lags.iter().map(|lag| lag.end.0 - lag.committed.unwrap_or_default().0).sum()
        };
        let lags = log.group_lag(&group).await.unwrap();
        assert_eq!((lags.len(), behind(&lags)), (2, 20));
        let mut consumer = log.consumer(&group, std::slice::from_ref(&name)).await.unwrap();
        let records = consume_count(&mut *consumer, 20).await;
        consumer.commit(&done(&records)).await.unwrap();
        assert_eq!(behind(&log.group_lag(&group).await.unwrap()), 0);
        write_numbers(&*log, &name, 20, 5, 20).await;
        assert_eq!(behind(&log.group_lag(&group).await.unwrap()), 5);
        consumer.close().await.unwrap();
        log.remove_group(&group).await.unwrap();
        assert_eq!(log.group_lag(&group).await.unwrap(), []);
    }

    pub async fn a_group_is_reset_to_beginning_end_offset_and_time(world: World) {
        let (name, group) = (world.name("rows"), world.name("g"));
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 1)).await.unwrap();
        write_numbers(&*log, &name, 0, 10, 1).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        let between = now_ms();
        tokio::time::sleep(Duration::from_millis(20)).await;
        write_numbers(&*log, &name, 10, 10, 1).await;
        let topics = [name.clone()];
        let committed = async || log.group_lag(&group).await.unwrap()[0].committed;
        for (start, expected) in [
            (StartAt::End, 20),
            (StartAt::Beginning, 0),
            (StartAt::Offset(Offset(7)), 7),
            (StartAt::TimeMs(between), 10),
            (StartAt::TimeMs(now_ms() + 3_600_000), 20),
        ] {
            log.reset_group(&group, &topics, start).await.unwrap();
            assert_eq!(committed().await, Some(Offset(expected)), "{start:?}");
        }
        log.reset_group(&group, &topics, StartAt::Offset(Offset(15))).await.unwrap();
        let mut consumer = log.consumer(&group, &topics).await.unwrap();
        let records = consume_count(&mut *consumer, 5).await;
        assert_eq!(values(&records), ["15", "16", "17", "18", "19"]);
        let refused = log.reset_group(&group, &topics, StartAt::Beginning).await;
        assert!(matches!(refused, Err(LogError::Invalid(_))), "a running consumer: {refused:?}");
        consumer.close().await.unwrap();
    }

    pub async fn a_reader_starts_at_an_offset_a_time_or_the_end(world: World) {
        let name = world.name("rows");
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 1)).await.unwrap();
        write_numbers(&*log, &name, 0, 10, 1).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        let between = now_ms();
        tokio::time::sleep(Duration::from_millis(20)).await;
        write_numbers(&*log, &name, 10, 3, 1).await;
        let mut tail = log.reader(&name, StartAt::End, StopAt::Never).await.unwrap();
        let mut from_offset = log.reader(&name, StartAt::Offset(Offset(9)), StopAt::Never).await.unwrap();
        assert_eq!(values(&read_count(&mut *from_offset, 4).await), ["9", "10", "11", "12"]);
        let mut from_time = log.reader(&name, StartAt::TimeMs(between), StopAt::Never).await.unwrap();
        assert_eq!(values(&read_count(&mut *from_time, 3).await), ["10", "11", "12"]);
        write_numbers(&*log, &name, 13, 1, 1).await;
        assert_eq!(values(&read_count(&mut *tail, 1).await), ["13"]);
    }

    pub async fn a_reader_that_stops_ends_where_the_topic_ended_beside_a_steady_writer(world: World) {
        let name: Arc<str> = world.name("rows").into();
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 3)).await.unwrap();
        let written = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let writer = {
            let (mut writer, name, written) =
                (log.writer(&world.name("s")).await.unwrap(), name.clone(), written.clone());
            tokio::spawn(async move {
                for number in 0.. {
                    let texts: Vec<String> = (number * 20..number * 20 + 20).map(|i| i.to_string()).collect();
                    let records = batch(&name, texts.iter().map(|text| (text.as_str(), text.as_str())));
                    writer.append(records, None).await.unwrap().await.unwrap();
                    written.fetch_add(20, std::sync::atomic::Ordering::Release);
                }
            })
        };
        let count = || written.load(std::sync::atomic::Ordering::Acquire);
        eventually(DEADLINE, "enough to read", async || count() > 2000).await;
        // Few at a time, and never faster than the writer writes: only a fixed end is ever reached.
        let few = PollLimit { records: 50, ..LIMIT };
        for start in [StartAt::Beginning, StartAt::TimeMs(now_ms() - 100), StartAt::End] {
            let before = count();
            let mut reader = log.reader(&name, start, StopAt::End).await.unwrap();
            let opened = count();
            let give_up = Instant::now() + DEADLINE;
            let mut seen = BTreeSet::new();
            while !reader.at_end() {
                assert!(Instant::now() < give_up, "{start:?}: no end after {} records", seen.len());
                let polled_at = count();
                let records = reader.poll(&few).await.unwrap();
                seen.extend(records.iter().map(|record| text(&record.value).parse::<usize>().unwrap()));
                eventually(DEADLINE, "the writer is ahead", async || count() > polled_at + records.len()).await;
            }
            assert!(reader.poll(&few).await.unwrap().is_empty(), "nothing comes after the end");
            // One batch may have been on its way when the ends were looked for.
            assert!(seen.last().is_none_or(|last| *last < opened + 20), "{start:?}: {:?} of {opened}", seen.last());
            if start == StartAt::Beginning {
                assert!((0..before).all(|number| seen.contains(&number)), "{} of {before}", seen.len());
            }
        }
        writer.abort();
        // Nothing there: at the end from the start.
        let empty = world.name("empty");
        log.ensure_topic(&topic(&empty, 2)).await.unwrap();
        assert!(log.reader(&empty, StartAt::Beginning, StopAt::End).await.unwrap().at_end());
    }

    pub async fn an_offset_that_is_not_there_is_an_error(world: World) {
        let (name, group) = (world.name("rows"), world.name("g"));
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 1)).await.unwrap();
        write_numbers(&*log, &name, 0, 3, 1).await;
        let mut reader = log.reader(&name, StartAt::Offset(Offset(77)), StopAt::Never).await.unwrap();
        let error = eventually(DEADLINE, "an error", async || reader.poll(&LIMIT).await.err()).await;
        let LogError::OutOfRange { wanted, next, .. } = &error else { panic!("{error}") };
        assert_eq!((wanted.0, next.0), (77, 3), "{error}");
        let refused = log.reset_group(&group, &[name], StartAt::Offset(Offset(77))).await;
        assert!(matches!(refused, Err(LogError::OutOfRange { .. })), "{refused:?}");
    }

    pub async fn members_of_a_group_share_the_partitions(world: World) {
        let (name, group) = (world.name("rows"), world.name("g"));
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 4)).await.unwrap();
        let topics = [name.clone()];
        let mut first = log.consumer(&group, &topics).await.unwrap();
        let mut held: [BTreeSet<i32>; 2] = Default::default();
        eventually(DEADLINE, "the first has all four", async || {
            follow(&mut *first, &mut held[0]).await;
            held[0].len() == 4
        })
        .await;
        let mut second = log.consumer(&group, &topics).await.unwrap();
        eventually(DEADLINE, "two each", async || {
            let (one, two) = held.split_at_mut(1);
            tokio::join!(follow(&mut *first, &mut one[0]), follow(&mut *second, &mut two[0]));
            assert!(one[0].is_disjoint(&two[0]), "{one:?} {two:?}");
            one[0].len() == 2 && two[0].len() == 2
        })
        .await;
        write_numbers(&*log, &name, 0, 100, 100).await;
        let mut records = Vec::new();
        eventually(DEADLINE, "all records, each once", async || {
            let (one, two) = tokio::join!(first.poll(&LIMIT), second.poll(&LIMIT));
            for polled in [one.unwrap(), two.unwrap()] {
                if let Polled::Records(more) = polled {
                    records.extend(more);
                }
            }
            records.len() >= 100
        })
        .await;
        let distinct: BTreeSet<_> = records.iter().map(|r| (r.partition, r.offset)).collect();
        assert_eq!((records.len(), distinct.len()), (100, 100));
        second.close().await.unwrap();
        eventually(DEADLINE, "the first has all four again", async || {
            follow(&mut *first, &mut held[0]).await;
            held[0].len() == 4
        })
        .await;
        first.close().await.unwrap();
    }

    /// One poll; keeps what is assigned up to date.
    async fn follow(consumer: &mut dyn LogConsumer, held: &mut BTreeSet<i32>) {
        match consumer.poll(&LIMIT).await.unwrap() {
            Polled::Assigned(places) => held.extend(places.iter().map(|place| place.partition)),
            Polled::Revoked(places) => held.retain(|p| !places.iter().any(|place| place.partition == *p)),
            Polled::Records(_) => {}
        }
    }

    pub async fn a_paused_consumer_gets_nothing_and_loses_nothing(world: World) {
        let (name, group) = (world.name("rows"), world.name("g"));
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 1)).await.unwrap();
        write_numbers(&*log, &name, 0, 10, 1).await;
        let mut consumer = log.consumer(&group, std::slice::from_ref(&name)).await.unwrap();
        let few = PollLimit { records: 3, ..LIMIT };
        let give_up = Instant::now() + DEADLINE;
        let first = loop {
            assert!(Instant::now() < give_up);
            match consumer.poll(&few).await.unwrap() {
                Polled::Records(records) if !records.is_empty() => break records,
                _ => {}
            }
        };
        assert!(first.len() <= 3, "{}", first.len());
        consumer.set_paused(true).await.unwrap();
        for _ in 0..5 {
            let polled = consumer.poll(&LIMIT).await.unwrap();
            assert!(matches!(&polled, Polled::Records(records) if records.is_empty()), "{polled:?}");
        }
        consumer.set_paused(false).await.unwrap();
        let rest = consume_count(&mut *consumer, 10 - first.len()).await;
        let all: Vec<_> = first.iter().chain(&rest).map(|record| text(&record.value).to_owned()).collect();
        assert_eq!(all, (0..10).map(|i| i.to_string()).collect::<Vec<_>>());
        consumer.close().await.unwrap();
    }

    pub async fn a_topic_made_later_is_found_by_its_group(world: World) {
        let (early, late, group) = (world.name("early"), world.name("late"), world.name("g"));
        let log = world.log().await;
        log.ensure_topic(&topic(&early, 1)).await.unwrap();
        let mut consumer = log.consumer(&group, &[early, late.clone()]).await.unwrap();
        for _ in 0..3 {
            consumer.poll(&LIMIT).await.unwrap();
        }
        log.ensure_topic(&topic(&late, 2)).await.unwrap();
        write_numbers(&*log, &late, 0, 20, 20).await;
        assert_eq!(consume_count(&mut *consumer, 20).await.len(), 20);
        consumer.close().await.unwrap();
    }

    pub async fn topics_are_listed_with_their_ranges(world: World) {
        let name = world.name("rows");
        let log = world.log().await;
        let settings = BTreeMap::from([("retention.ms".to_owned(), "86400000".to_owned())]);
        let spec = TopicSpec { settings, ..topic(&name, 2) };
        log.ensure_topic(&spec).await.unwrap();
        log.ensure_topic(&TopicSpec { partitions: 5, ..spec }).await.unwrap();
        write_numbers(&*log, &name, 0, 10, 10).await;
        let topics = log.topics().await.unwrap();
        let found = topics.iter().find(|topic| topic.name == name).unwrap();
        assert_eq!(found.partitions.len(), 2);
        assert_eq!(found.partitions.iter().map(|p| p.next.0 - p.first.0).sum::<i64>(), 10);
        assert_eq!(found.settings.get("retention.ms").map(String::as_str), Some("86400000"));
    }

    pub async fn news_reaches_a_waiting_consumer_at_once(world: World) {
        let (name, group) = (world.name("rows"), world.name("g"));
        let log = world.log().await;
        log.ensure_topic(&topic(&name, 1)).await.unwrap();
        let mut consumer = log.consumer(&group, std::slice::from_ref(&name)).await.unwrap();
        let mut writer = log.writer(&world.name("s")).await.unwrap();
        // A producer that has just begun takes a moment to find its brokers.
        writer.append(batch(&name, [("k", "first")]), None).await.unwrap().await.unwrap();
        consume_count(&mut *consumer, 1).await;
        let start = Instant::now();
        let writing = async {
            let mut every = tokio::time::interval(Duration::from_millis(2));
            for _ in 0..300 {
                every.tick().await;
                let at = start.elapsed().as_micros().to_string();
                // Not awaited: the ticket resolves by itself.
                drop(writer.append(batch(&name, [("k", at.as_str())]), None).await.unwrap());
            }
        };
        let reading = async {
            let mut late = Vec::new();
            while late.len() < 300 {
                assert!(start.elapsed() < DEADLINE, "{} came", late.len());
                if let Polled::Records(records) = consumer.poll(&LIMIT).await.unwrap() {
                    let now = start.elapsed().as_micros() as u64;
                    late.extend(records.iter().map(|r| now - text(&r.value).parse::<u64>().unwrap()));
                }
            }
            late
        };
        let ((), mut late) = tokio::join!(writing, reading);
        late.sort_unstable();
        let (p50, p99) = (late[150], late[297]);
        println!("{}: append to consumer p50 {p50} us, p99 {p99} us", log.kind());
        // Single-digit milliseconds on an idle machine; the bound leaves room for a busy one.
        assert!(p50 < 50_000, "p50 {p50} us");
        consumer.close().await.unwrap();
    }

    fn sorted(records: &[ConsumedRecord]) -> BTreeSet<(i32, Offset)> {
        records.iter().map(|record| (record.partition, record.offset)).collect()
    }

    pub fn now_ms() -> i64 {
        chrono::Utc::now().timestamp_millis()
    }
}

macro_rules! over_both_logs {
    ($($promise:ident)*) => {
        mod over_embedded {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                super::promises::$promise(super::World::embedded()).await;
            })*
        }
        #[cfg(feature = "kafka")]
        mod over_kafka {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                super::promises::$promise(super::World::kafka().await).await;
            })*
        }
    };
}

over_both_logs! {
    records_come_back_as_they_were_written
    keys_go_to_the_partitions_that_java_sends_them_to
    order_is_kept_within_a_partition_over_many_batches
    a_position_is_stored_with_its_records_and_found_after_reopening
    a_new_writer_of_a_source_takes_the_place_of_the_one_before
    an_unknown_topic_is_refused_and_so_is_everything_after
    a_group_starts_at_the_beginning_and_goes_on_where_it_committed
    lag_is_told_per_partition
    a_group_is_reset_to_beginning_end_offset_and_time
    a_reader_starts_at_an_offset_a_time_or_the_end
    a_reader_that_stops_ends_where_the_topic_ended_beside_a_steady_writer
    an_offset_that_is_not_there_is_an_error
    members_of_a_group_share_the_partitions
    a_paused_consumer_gets_nothing_and_loses_nothing
    a_topic_made_later_is_found_by_its_group
    topics_are_listed_with_their_ranges
    news_reaches_a_waiting_consumer_at_once
}

/// What only the embedded log has: one file, one writing process, retention of its own.
mod embedded {
    use super::*;

    fn settings(folder: &tempfile::TempDir) -> EmbeddedSettings {
        EmbeddedSettings { retention_interval: Duration::from_millis(20), ..EmbeddedSettings::new(folder.path()) }
    }

    async fn first_offset(log: &dyn Log, name: &str) -> i64 {
        let topics = log.topics().await.unwrap();
        topics.iter().find(|topic| topic.name == name).unwrap().partitions[0].first.0
    }

    #[tokio::test]
    async fn a_second_writer_of_the_file_is_refused_until_the_first_has_closed() {
        let folder = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(settings(&folder)).unwrap();
        let refused = EmbeddedLog::open(settings(&folder)).err().unwrap();
        assert!(
            matches!(&refused, LogError::Fenced(text) if text.contains(&std::process::id().to_string())),
            "{refused}"
        );
        log.close().await.unwrap();
        EmbeddedLog::open(settings(&folder)).unwrap();
    }

    #[tokio::test]
    async fn settings_that_it_does_not_know_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(settings(&folder)).unwrap();
        for (name, value) in [("min.insync.replicas", "2"), ("cleanup.policy", "compact"), ("retention.ms", "1d")] {
            let spec = TopicSpec { settings: BTreeMap::from([(name.into(), value.into())]), ..topic("t", 1) };
            let refused = log.ensure_topic(&spec).await.unwrap_err();
            assert!(matches!(&refused, LogError::Invalid(text) if text.contains(name)), "{refused}");
        }
    }

    #[tokio::test]
    async fn retention_removes_what_is_old_but_not_what_a_registered_group_has_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(settings(&folder)).unwrap();
        let old = BTreeMap::from([("retention.ms".to_owned(), "50".to_owned())]);
        log.ensure_topic(&TopicSpec { settings: old, ..topic("t", 1) }).await.unwrap();
        log.register_group("slow", &["t".into()]).await.unwrap();
        for i in 0..10 {
            write_numbers(&log, "t", i * 10, 10, 1).await;
        }
        // Long past its age, swept many times over, and all there.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(first_offset(&log, "t").await, 0);
        let mut consumer = log.consumer("slow", &["t".into()]).await.unwrap();
        let records = consume_count(&mut *consumer, 100).await;
        consumer.commit(&done(&records[..50])).await.unwrap();
        eventually(DEADLINE, "what was read is removed", async || first_offset(&log, "t").await == 50).await;
        consumer.rewind().await.unwrap();
        assert_eq!(consume_count(&mut *consumer, 50).await[0].offset, Offset(50));
        drop(consumer);
        log.remove_group("slow").await.unwrap();
        eventually(DEADLINE, "nobody wants the rest", async || first_offset(&log, "t").await == 100).await;
        write_numbers(&log, "t", 100, 1, 1).await;
        let topics = log.topics().await.unwrap();
        assert_eq!(topics[0].partitions[0].next, Offset(101), "offsets go on");
        // The offset that is gone is an error, not silently the next.
        let mut reader = log.reader("t", StartAt::Offset(Offset(10)), StopAt::Never).await.unwrap();
        let error = reader.poll(&LIMIT).await.unwrap_err();
        assert!(matches!(error, LogError::OutOfRange { wanted: Offset(10), .. }), "{error}");
    }

    #[tokio::test]
    async fn a_topics_size_is_kept_once_read() {
        let folder = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(settings(&folder)).unwrap();
        let small = BTreeMap::from([("retention.bytes".to_owned(), "2000".to_owned())]);
        log.ensure_topic(&TopicSpec { settings: small, ..topic("t", 1) }).await.unwrap();
        for i in 0..10 {
            write_numbers(&log, "t", i * 100, 100, 1).await;
        }
        eventually(DEADLINE, "the rest is small", async || {
            let partition = log.topics().await.unwrap()[0].partitions[0].clone();
            partition.first.0 > 0 && partition.bytes.unwrap() <= 2000 && partition.next == Offset(1000)
        })
        .await;
    }

    #[tokio::test]
    async fn the_size_limit_takes_unread_records_at_last_and_says_whose_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(EmbeddedSettings { size_limit: 5000, ..settings(&folder) }).unwrap();
        log.ensure_topic(&topic("read", 1)).await.unwrap();
        log.ensure_topic(&topic("unread", 1)).await.unwrap();
        log.register_group("slow", &["unread".into()]).await.unwrap();
        for i in 0..3 {
            write_numbers(&log, "unread", i * 100, 100, 1).await;
            write_numbers(&log, "read", i * 100, 100, 1).await;
        }
        // About 1.1 KB each: two of the read ones have to go, none of the unread.
        eventually(DEADLINE, "read ones go first", async || first_offset(&log, "read").await > 0).await;
        assert_eq!(first_offset(&log, "unread").await, 0);
        for i in 3..10 {
            write_numbers(&log, "unread", i * 100, 100, 1).await;
        }
        eventually(DEADLINE, "unread ones go too", async || first_offset(&log, "unread").await > 0).await;
        let mut consumer = log.consumer("slow", &["unread".into()]).await.unwrap();
        let error = eventually(DEADLINE, "an error", async || consumer.poll(&LIMIT).await.err()).await;
        assert!(matches!(error, LogError::OutOfRange { wanted: Offset(0), .. }), "{error}");
        drop(consumer);
        let first = first_offset(&log, "unread").await;
        log.close().await.unwrap();
        // Told by any process, also later, until somebody has done something about it.
        let other = EmbeddedLog::open_reader(folder.path()).unwrap();
        let lost = other.losses().await.unwrap();
        let told: Vec<_> = lost.iter().map(|loss| (&*loss.group, &*loss.topic, loss.records as i64)).collect();
        assert_eq!(told, [("slow", "unread", first)]);
        assert!((promises::now_ms() - lost[0].at_ms).abs() < 60_000, "{lost:?}");
        let log = EmbeddedLog::open(settings(&folder)).unwrap();
        log.reset_group("slow", &[], StartAt::Beginning).await.unwrap();
        assert_eq!(log.losses().await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_damaged_record_is_noticed_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(settings(&folder)).unwrap();
        log.ensure_topic(&topic("t", 1)).await.unwrap();
        write_numbers(&log, "t", 0, 10, 1).await;
        log.close().await.unwrap();
        let file = rusqlite::Connection::open(folder.path().join("log.db")).unwrap();
        file.execute("UPDATE blobs SET data = CAST(replace(data, '5', '6') AS BLOB)", []).unwrap();
        drop(file);
        let log = EmbeddedLog::open(settings(&folder)).unwrap();
        let error = log.reader("t", StartAt::Beginning, StopAt::Never).await.unwrap().poll(&LIMIT).await.unwrap_err();
        assert!(
            matches!(&error, LogError::Fatal(text) if text.contains("t-0") && text.contains("checksum")),
            "{error}"
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn bytes_in_flight_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(EmbeddedSettings { in_flight_bytes: 1 << 20, ..settings(&folder) }).unwrap();
        log.ensure_topic(&topic("t", 1)).await.unwrap();
        let mut writer = log.writer("s").await.unwrap();
        let large = "x".repeat(600_000);
        let mut tickets = Vec::new();
        // More than fits at once: each append waits for room, and a batch larger than the bound gets through too.
        for _ in 0..5 {
            tickets.push(writer.append(batch("t", [("k", large.as_str())]), None).await.unwrap());
        }
        tickets.push(writer.append(batch("t", [("k", large.repeat(3).as_str())]), None).await.unwrap());
        for ticket in tickets {
            ticket.await.unwrap();
        }
        assert_eq!(read_all(&log, "t").await.len(), 6);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_second_process_reads_while_the_first_writes_and_after_it_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(settings(&folder)).unwrap();
        log.ensure_topic(&topic("t", 2)).await.unwrap();
        write_numbers(&log, "t", 0, 10, 10).await;
        let mut reading = helper("read", folder.path());
        reading.expect_line("read 10").await;
        write_numbers(&log, "t", 10, 10, 10).await;
        reading.expect_line("read 20").await;
        // Topics made meanwhile are seen, and the reader may not write.
        let other = EmbeddedLog::open_reader(folder.path()).unwrap();
        log.ensure_topic(&topic("new", 1)).await.unwrap();
        assert_eq!(other.topics().await.unwrap().len(), 2);
        assert!(matches!(other.writer("s").await, Err(LogError::Invalid(_))));
        assert!(matches!(other.consumer("g", &["t".into()]).await, Err(LogError::Invalid(_))));
        drop(other);
        drop(reading);
        log.close().await.unwrap();
        drop(log);
        let alone = EmbeddedLog::open_reader(folder.path()).unwrap();
        assert_eq!(read_all(&alone, "t").await.len(), 20);
        let nothing = tempfile::tempdir().unwrap();
        let missing = EmbeddedLog::open_reader(nothing.path()).err().unwrap();
        assert!(matches!(&missing, LogError::Invalid(text) if text.contains("no embedded log")), "{missing}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whatever_a_killed_process_was_told_is_durable_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let mut next = 0;
        for round in 0..4u64 {
            let mut writing = helper("write", folder.path());
            // Each line is said after its ticket; run long enough to have many commits behind it.
            let mut told = 0;
            let end = Instant::now() + Duration::from_millis(150 + 70 * round);
            while Instant::now() < end {
                if let Some(line) = writing.line().await {
                    told = line.strip_prefix("durable ").and_then(|n| n.parse().ok()).unwrap_or(told);
                }
            }
            writing.kill9();
            assert!(told > next, "round {round}: {told} after {next}");

            let log = EmbeddedLog::open(settings(&folder)).unwrap();
            let records = read_all(&log, "t").await;
            let mut numbers: Vec<u64> = records.iter().map(|r| text(&r.value).parse().unwrap()).collect();
            numbers.sort_unstable();
            let count = numbers.len() as u64;
            assert_eq!(numbers, (0..count).collect::<Vec<_>>(), "each once, no hole");
            assert!(count >= told, "{told} told, {count} there");
            // The position and the records it covers are one.
            let position = log.writer("s").await.unwrap().position().await.unwrap().unwrap();
            assert_eq!(String::from_utf8(position).unwrap(), count.to_string());
            next = count;
            log.close().await.unwrap();
        }
    }

    /// This test binary again, as another process that does one thing to an embedded log.
    struct Helper {
        child: std::process::Child,
        lines: tokio::sync::mpsc::UnboundedReceiver<String>,
    }

    fn helper(what: &str, folder: &std::path::Path) -> Helper {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "log_conformance::embedded::helper_process", "--nocapture", "--test-threads=1"])
            .env("TIDEGATE_TEST_HELPER", what)
            .env("TIDEGATE_TEST_FOLDER", folder)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        let (send, lines) = tokio::sync::mpsc::unbounded_channel();
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(std::io::BufReader::new(out)).map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Helper { child, lines }
    }

    impl Helper {
        async fn line(&mut self) -> Option<String> {
            tokio::time::timeout(Duration::from_millis(50), self.lines.recv()).await.ok().flatten()
        }

        async fn expect_line(&mut self, expected: &str) {
            eventually(DEADLINE, expected, async || self.line().await.filter(|line| line == expected)).await;
        }

        fn kill9(&mut self) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }

    impl Drop for Helper {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// What the other process does; nothing when it is run as a test among others.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn helper_process() {
        let (Ok(what), Ok(folder)) = (std::env::var("TIDEGATE_TEST_HELPER"), std::env::var("TIDEGATE_TEST_FOLDER"))
        else {
            return;
        };
        match what.as_str() {
            "read" => {
                let log = EmbeddedLog::open_reader(&folder).unwrap();
                let mut reader = log.reader("t", StartAt::Beginning, StopAt::Never).await.unwrap();
                let mut count = 0;
                println!();
                while count < 20 {
                    let records = reader.poll(&LIMIT).await.unwrap();
                    if !records.is_empty() {
                        count += records.len();
                        if count.is_multiple_of(10) {
                            println!("read {count}");
                        }
                    }
                }
            }
            _ => {
                let log = EmbeddedLog::open(EmbeddedSettings::new(&folder)).unwrap();
                log.ensure_topic(&topic("t", 3)).await.unwrap();
                let mut writer = log.writer("s").await.unwrap();
                let mut next: u64 = writer
                    .position()
                    .await
                    .unwrap()
                    .map_or(0, |position| String::from_utf8(position).unwrap().parse().unwrap());
                println!();
                let mut tickets = std::collections::VecDeque::new();
                loop {
                    let mut records = RecordBatch::new();
                    for _ in 0..1 + next % 20 {
                        let number = next.to_string();
                        records.push(
                            &"t".into(),
                            Some(number.as_bytes()),
                            Some(number.as_bytes()),
                            &HeaderSet::default(),
                        );
                        next += 1;
                    }
                    let position = Some(next.to_string().into_bytes());
                    tickets.push_back((next, writer.append(records, position).await.unwrap()));
                    if tickets.len() > 4
                        && let Some((upto, ticket)) = tickets.pop_front()
                    {
                        ticket.await.unwrap();
                        println!("durable {upto}");
                    }
                }
            }
        }
    }
}
