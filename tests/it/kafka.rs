//! What can happen to a broker, and what the log makes of it: nothing missing, order per key kept.
#![cfg(feature = "kafka")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tidegate::event::{HeaderSet, Offset, RecordBatch, TopicPartition};
use tidegate::log::{ConsumedRecord, KafkaLog, KafkaSettings, Log, LogError, PollLimit, Polled, StartAt, TopicSpec};
use tidegate::pipeline::Source as _;
use tidegate::sources::log::{Batching, LogSource};

use crate::log_conformance::{DEADLINE, LIMIT, batch, consume_count, done, read_all, text, topic, write_numbers};
use crate::support::{Kafka, eventually};

async fn open(kafka: &Kafka) -> KafkaLog {
    let mut settings = KafkaSettings::new(&kafka.bootstrap());
    settings.unavailable_after = Duration::from_secs(2);
    KafkaLog::open(settings).await.unwrap()
}

/// How far a writer and a reader have come that run until they are stopped.
#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    durable: AtomicU64,
    failures: AtomicU64,
    consumed: AtomicU64,
}

impl Progress {
    fn stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Waits until both have gone on by a hundred numbers. The broker's machine may be busy.
    async fn goes_on(&self, when: &str) {
        let (durable, consumed) = (self.durable.load(Relaxed), self.consumed.load(Relaxed));
        let start = Instant::now();
        eventually(Duration::from_secs(120), when, async || {
            let now = (self.durable.load(Relaxed), self.consumed.load(Relaxed));
            let on = now.0 >= durable + 100 && now.1 >= consumed + 100;
            if on { Ok(()) } else { Err(format!("{durable} durable and {consumed} consumed became {now:?}")) }
        })
        .await;
        println!("{when}: going on after {:?}", start.elapsed());
    }

    /// Waits until the writer has been refused.
    async fn is_refused(&self, when: &str) {
        let failures = self.failures.load(Relaxed);
        eventually(Duration::from_secs(60), when, async || self.failures.load(Relaxed) > failures).await;
    }
}

/// Numbers in batches of ten, each with the position behind it, until it is stopped; goes back to the stored position
/// after every failure, as a source does.
async fn write_until(log: &KafkaLog, progress: &Progress) {
    let name: Arc<str> = "numbers".into();
    let mut durable = 0;
    let failed = || progress.failures.fetch_add(1, Relaxed);
    let stopped = || progress.stopped();
    'again: loop {
        let Ok(mut writer) = log.writer("s").await else {
            failed();
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(position) = writer.position().await else { continue };
        let stored = position.map_or(0, |position| String::from_utf8(position).unwrap().parse().unwrap());
        assert!(stored >= durable, "told {durable}, stored {stored}");
        durable = stored;
        let mut next: u64 = stored;
        let mut tickets = std::collections::VecDeque::new();
        loop {
            if !stopped() {
                let mut records = RecordBatch::new();
                for _ in 0..10 {
                    let key = format!("k{}", next % 7);
                    records.push(&name, Some(key.as_bytes()), Some(next.to_string().as_bytes()), &HeaderSet::default());
                    next += 1;
                }
                match writer.append(records, Some(next.to_string().into_bytes())).await {
                    Ok(ticket) => tickets.push_back((next, ticket)),
                    Err(error) => {
                        assert!(error.is_retriable(), "{error}");
                        failed();
                        continue 'again;
                    }
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            while tickets.len() > 20 || (stopped() && !tickets.is_empty()) {
                let Some((upto, ticket)) = tickets.pop_front() else { break };
                match ticket.await {
                    Ok(_) => {
                        durable = upto;
                        progress.durable.store(durable, Relaxed);
                    }
                    Err(error) => {
                        assert!(error.is_retriable(), "{error}");
                        failed();
                        continue 'again;
                    }
                }
            }
            if stopped() && tickets.is_empty() {
                return;
            }
        }
    }
}

/// Every number is there, and per key each first appears in order.
fn nothing_missing(records: &[ConsumedRecord], durable: u64) -> usize {
    let mut seen: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for record in records {
        let numbers = seen.entry(text(&record.key).to_owned()).or_default();
        let number = text(&record.value).parse().unwrap();
        if !numbers.contains(&number) {
            assert!(numbers.last().is_none_or(|last| *last < number), "{}: {number} came late", text(&record.key));
            numbers.push(number);
        }
    }
    let all: BTreeSet<u64> = seen.into_values().flatten().collect();
    let missing: Vec<u64> = (0..durable).filter(|number| !all.contains(number)).take(5).collect();
    assert!(missing.is_empty(), "{durable} durable, missing {missing:?} …");
    records.len() - all.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_stopped_and_killed_loses_nothing_and_says_that_it_is_away() {
    let kafka = Kafka::own().await;
    let log = Arc::new(open(&kafka).await);
    log.ensure_topic(&topic("numbers", 3)).await.unwrap();
    let progress = Arc::new(Progress::default());
    let writing = {
        let (log, progress) = (log.clone(), progress.clone());
        tokio::spawn(async move { write_until(&log, &progress).await })
    };
    let consuming = {
        let (log, progress) = (log.clone(), progress.clone());
        tokio::spawn(async move {
            let mut consumer = log.consumer("folder", &["numbers".to_owned()]).await.unwrap();
            while !progress.stopped() {
                match consumer.poll(&LIMIT).await {
                    Ok(Polled::Records(records)) if !records.is_empty() => {
                        progress.consumed.fetch_add(records.len() as u64, Relaxed);
                        if consumer.commit(&done(&records)).await.is_err() {
                            while consumer.rewind().await.is_err() {}
                        }
                    }
                    Ok(_) => {}
                    Err(error) => assert!(error.is_retriable(), "{error}"),
                }
            }
            consumer.close().await.unwrap();
        })
    };
    progress.goes_on("from the start").await;
    kafka.kill9().await;
    progress.is_refused("the killed broker is noticed").await;
    kafka.start().await;
    progress.goes_on("after kill -9").await;
    kafka.stop().await;
    // Whoever asks meanwhile is told, and soon.
    let asked = Instant::now();
    let away = log.topics().await.unwrap_err();
    assert!(matches!(away, LogError::Unavailable(_)) && asked.elapsed() < Duration::from_secs(35), "{away}");
    progress.is_refused("the stopped broker is noticed").await;
    kafka.start().await;
    progress.goes_on("after a stop").await;
    progress.stop.store(true, Relaxed);
    tokio::time::timeout(Duration::from_secs(60), writing).await.unwrap().unwrap();
    tokio::time::timeout(Duration::from_secs(60), consuming).await.unwrap().unwrap();
    let [durable, failures, consumed] =
        [&progress.durable, &progress.failures, &progress.consumed].map(|count| count.load(Relaxed));
    let records = read_all(&*log, "numbers").await;
    let doubled = nothing_missing(&records, durable);
    println!("{durable} durable, {failures} failures, {doubled} doubled, {consumed} consumed meanwhile");
    assert_eq!(doubled, 0, "one process over an outage doubles nothing");
    log.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_hangs_is_unavailable_within_seconds_and_what_was_accepted_arrives_later() {
    let kafka = Kafka::own().await;
    let log = open(&kafka).await;
    log.ensure_topic(&topic("t", 1)).await.unwrap();
    let mut writer = log.writer("s").await.unwrap();
    writer.append(batch("t", [("k", "0")]), Some(b"0".to_vec())).await.unwrap().await.unwrap();
    kafka.freeze();
    let start = Instant::now();
    let first = writer.append(batch("t", [("k", "1")]), Some(b"1".to_vec())).await.unwrap();
    let second = writer.append(batch("t", [("k", "2")]), Some(b"2".to_vec())).await.unwrap();
    let error = first.await.unwrap_err();
    assert!(matches!(error, LogError::Unavailable(_)), "{error}");
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    assert!(second.await.is_err(), "and so is what came after");
    let refused = writer.append(batch("t", [("k", "3")]), None).await;
    assert!(refused.is_err_and(|error| error.is_retriable()));
    kafka.thaw();
    let mut writer = eventually(DEADLINE, "a new writer", async || log.writer("s").await).await;
    // What was accepted has been settled before the new writer began: nothing has to be written again.
    assert_eq!(writer.position().await.unwrap(), Some(b"2".to_vec()));
    writer.append(batch("t", [("k", "3")]), Some(b"3".to_vec())).await.unwrap().await.unwrap();
    let records = read_all(&log, "t").await;
    assert_eq!(records.iter().map(|r| text(&r.value)).collect::<Vec<_>>(), ["0", "1", "2", "3"]);
    log.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_that_took_unread_records_is_an_error_until_the_group_is_reset() {
    let kafka = Kafka::shared().await;
    let log = open(kafka).await;
    let name = format!("gone.{}", uuid::Uuid::new_v4().simple());
    let (topics, group) = ([name.clone()], format!("{name}.group"));
    log.ensure_topic(&topic(&name, 1)).await.unwrap();
    write_numbers(&log, &name, 0, 10, 1).await;
    let mut consumer = log.consumer(&group, &topics).await.unwrap();
    let records = consume_count(&mut *consumer, 10).await;
    consumer.commit(&done(&records[..3])).await.unwrap();
    consumer.close().await.unwrap();
    // As retention would: the first six are removed.
    let admin: rdkafka::admin::AdminClient<rdkafka::client::DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", kafka.bootstrap()).create().unwrap();
    let mut list = rdkafka::TopicPartitionList::new();
    list.add_partition_offset(&name, 0, rdkafka::Offset::Offset(6)).unwrap();
    admin.delete_records(&list, &Default::default()).await.unwrap();
    // One that has read nothing yet is behind what is left, and no more.
    let late = format!("{name}.late");
    log.register_group(&late, &topics).await.unwrap();
    let lag = log.group_lag(&late).await.unwrap();
    assert_eq!((lag.len(), lag[0].committed, lag[0].behind()), (1, None, 4), "{lag:?}");

    let mut consumer = log.consumer(&group, &topics).await.unwrap();
    for _ in 0..2 {
        let error = eventually(DEADLINE, "an error", async || consumer.poll(&LIMIT).await.err()).await;
        let LogError::OutOfRange { wanted, first, next, .. } = error else { panic!("{error}") };
        assert_eq!((wanted.0, first.0, next.0), (3, 6, 10));
    }
    consumer.close().await.unwrap();
    log.reset_group(&group, &topics, StartAt::Beginning).await.unwrap();
    let mut consumer = log.consumer(&group, &topics).await.unwrap();
    assert_eq!(consume_count(&mut *consumer, 4).await[0].offset, Offset(6));
    consumer.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn offsets_that_stand_still_are_committed_again() {
    let mut settings = KafkaSettings::new(&Kafka::shared().await.bootstrap());
    settings.recommit_after = Duration::from_millis(200);
    let log = KafkaLog::open(settings).await.unwrap();
    let name = format!("still.{}", uuid::Uuid::new_v4().simple());
    log.ensure_topic(&topic(&name, 2)).await.unwrap();
    write_numbers(&log, &name, 0, 20, 20).await;
    let mut consumer = log.consumer(&name, std::slice::from_ref(&name)).await.unwrap();
    let records = consume_count(&mut *consumer, 20).await;
    consumer.commit(&done(&records)).await.unwrap();
    let stood = log.group_lag(&name).await.unwrap();
    // What the broker keeps of the group's commits, one record a partition and commit.
    let commits = async || {
        let kept = read_all(&log, "__consumer_offsets").await;
        let of_group = |record: &&ConsumedRecord| {
            let key = record.key.as_deref().unwrap_or_default();
            key.starts_with(&[0, 1]) && key.windows(name.len()).any(|part| part == name.as_bytes())
        };
        kept.iter().filter(of_group).count()
    };
    let before = commits().await;
    assert!(before >= 2, "{before}");
    // The member rests by itself after a while; then it is paused for good.
    eventually(DEADLINE, "committed again while nobody asks", async || commits().await >= before + 2).await;
    consumer.set_paused(true).await.unwrap();
    let before = commits().await;
    eventually(DEADLINE, "committed again while paused", async || commits().await >= before + 2).await;
    assert_eq!(log.group_lag(&name).await.unwrap(), stood, "and stand where they stood");
    consumer.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_is_read_beside_another_source_that_never_stops() {
    let kafka = Kafka::shared().await;
    let mut settings = KafkaSettings::new(&kafka.bootstrap());
    settings.positions_topic = format!("positions.{}", uuid::Uuid::new_v4().simple());
    let log = KafkaLog::open(settings.clone()).await.unwrap();
    let mut mine = log.writer("mine").await.unwrap();
    mine.append(RecordBatch::new(), Some(b"here".to_vec())).await.unwrap().await.unwrap();
    let busy = {
        let mut writer = log.writer("busy").await.unwrap();
        tokio::spawn(async move {
            loop {
                writer.append(RecordBatch::new(), Some(b"on".to_vec())).await.unwrap().await.unwrap();
            }
        })
    };
    for _ in 0..5 {
        let read = tokio::time::timeout(DEADLINE, log.position("mine")).await.expect("it ends").unwrap();
        assert_eq!(read.as_deref(), Some(b"here".as_slice()));
    }
    busy.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_paused_from_the_start_is_a_member_of_its_group() {
    let log: Arc<dyn Log> = Arc::new(open(Kafka::shared().await).await);
    let name = format!("asleep.{}", uuid::Uuid::new_v4().simple());
    log.ensure_topic(&topic(&name, 1)).await.unwrap();
    write_numbers(&*log, &name, 0, 5, 1).await;
    let topics = vec![name.clone()];
    let mut source = LogSource::new(log.clone(), &*name, topics.clone(), Batching::default(), Arc::default());
    eventually(DEADLINE, "a member that reads nothing", async || {
        source.tick(true).await.unwrap();
        let refused = log.reset_group(&name, &topics, StartAt::Beginning).await;
        matches!(refused, Err(LogError::Invalid(text)) if text.contains("running consumers"))
    })
    .await;
    let batch = tokio::time::timeout(DEADLINE, source.next()).await.unwrap().unwrap();
    assert_eq!(batch.body.first().map(|record| record.offset), Some(Offset(0)));
    source.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_is_too_large_is_named_and_nothing_after_it_is_written() {
    let log = open(Kafka::shared().await).await;
    let name = format!("large.{}", uuid::Uuid::new_v4().simple());
    log.ensure_topic(&topic(&name, 1)).await.unwrap();
    let mut writer = log.writer(&name).await.unwrap();
    // The three of them are together on their way.
    let before = writer.append(batch(&name, [("k", "before")]), None).await.unwrap();
    let large = "x".repeat(3 << 20);
    let too_large = writer.append(batch(&name, [("k", large.as_str())]), Some(b"1".to_vec())).await.unwrap();
    let after = writer.append(batch(&name, [("k", "small")]), Some(b"2".to_vec())).await;
    let error = too_large.await.unwrap_err();
    assert!(matches!(&error, LogError::Invalid(t) if t.contains(&name) && t.contains("message.max.bytes")), "{error}");
    assert!(match after {
        Ok(ticket) => ticket.await.is_err(),
        Err(_) => true,
    });
    let _ = before.await;
    assert_eq!(log.writer(&name).await.unwrap().position().await.unwrap(), None);
    assert_eq!(read_all(&log, &name).await.iter().map(|r| text(&r.value)).collect::<Vec<_>>(), ["before"]);
    log.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_smaller_than_what_is_on_its_way_only_slows_down() {
    let mut settings = KafkaSettings::new(&Kafka::shared().await.bootstrap());
    settings.librdkafka.insert("queue.buffering.max.messages".into(), "5".into());
    let log = KafkaLog::open(settings).await.unwrap();
    let name = format!("narrow.{}", uuid::Uuid::new_v4().simple());
    log.ensure_topic(&topic(&name, 1)).await.unwrap();
    let mut writer = log.writer(&name).await.unwrap();
    let mut tickets = Vec::new();
    for number in 0..100 {
        let values: Vec<String> = (number * 10..number * 10 + 10).map(|value| value.to_string()).collect();
        let records = batch(&name, values.iter().map(|value| ("k", value.as_str())));
        tickets.push(writer.append(records, Some(number.to_string().into_bytes())).await.unwrap());
    }
    for ticket in tickets {
        tokio::time::timeout(DEADLINE, ticket).await.expect("in time").unwrap();
    }
    assert_eq!(writer.position().await.unwrap().as_deref(), Some(b"99".as_slice()));
    assert_eq!(read_all(&log, &name).await.len(), 1000);
    log.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secure_broker_takes_us_with_the_right_password_and_topics_get_their_settings() {
    let kafka = Kafka::own_secure().await;
    let mut settings = KafkaSettings::new(&kafka.secure_bootstrap());
    settings.librdkafka.extend(kafka.secure_settings());
    let log = KafkaLog::open(settings.clone()).await.unwrap();
    let configured = BTreeMap::from([("cleanup.policy".to_owned(), "compact".to_owned())]);
    log.ensure_topic(&TopicSpec { settings: configured.clone(), replication_factor: Some(1), ..topic("t", 2) })
        .await
        .unwrap();
    write_numbers(&log, "t", 0, 5, 5).await;
    assert_eq!(read_all(&log, "t").await.len(), 5);
    let made = log.topics().await.unwrap().into_iter().find(|topic| topic.name == "t").unwrap();
    assert_eq!((made.partitions.len(), made.settings), (2, configured));
    let bad = TopicSpec { settings: BTreeMap::from([("retention.mss".into(), "1".into())]), ..topic("u", 1) };
    let refused = log.ensure_topic(&bad).await.unwrap_err();
    assert!(matches!(&refused, LogError::Invalid(text) if text.contains("retention.mss")), "{refused}");
    log.close().await.unwrap();

    settings.librdkafka.insert("sasl.password".into(), "wrong".into());
    let refused = KafkaLog::open(settings).await.unwrap().topics().await.unwrap_err();
    assert!(matches!(&refused, LogError::Unavailable(text) if text.contains("uthentication")), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poll_that_is_dropped_loses_nothing_and_an_idle_member_stays() {
    let log = open(Kafka::shared().await).await;
    let name = format!("dropped.{}", uuid::Uuid::new_v4().simple());
    log.ensure_topic(&topic(&name, 2)).await.unwrap();
    let mut consumer = log.consumer(&name, std::slice::from_ref(&name)).await.unwrap();
    let few = PollLimit { records: 5, ..LIMIT };
    let mut places: BTreeSet<TopicPartition> = BTreeSet::new();
    eventually(DEADLINE, "both partitions", async || {
        if let Polled::Assigned(more) = consumer.poll(&few).await.unwrap() {
            places.extend(more);
        }
        places.len() == 2
    })
    .await;
    write_numbers(&log, &name, 0, 200, 20).await;
    let mut seen = BTreeSet::new();
    let give_up = Instant::now() + DEADLINE;
    let mut turn = 0;
    while seen.len() < 200 {
        assert!(Instant::now() < give_up, "{} of 200 came", seen.len());
        turn += 1;
        // Sometimes long idle: the member rests and comes back.
        if turn == 10 {
            tokio::time::sleep(Duration::from_millis(4500)).await;
        }
        // Dropped after a moment, wherever it is.
        let moment = Duration::from_micros(if turn % 2 == 0 { 200 } else { 200_000 });
        if let Ok(polled) = tokio::time::timeout(moment, consumer.poll(&few)).await
            && let Polled::Records(records) = polled.unwrap()
        {
            for record in records {
                assert!(seen.insert((record.partition, record.offset)), "{record:?} came twice");
            }
        }
    }
    consumer.close().await.unwrap();
}
