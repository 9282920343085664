//! What only the embedded log has: one file, one writing process, retention of its own.

use super::*;

pub fn settings(folder: &tempfile::TempDir) -> EmbeddedSettings {
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
    assert!(matches!(&refused, LogError::Fenced(text) if text.contains(&std::process::id().to_string())), "{refused}");
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
    // Who comes now is behind what is left, and no more.
    log.register_group("late", &["t".into()]).await.unwrap();
    let lag = log.group_lag("late").await.unwrap();
    assert!(lag.len() == 1 && lag[0].committed.is_none() && lag[0].behind() <= 1, "{lag:?}");
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
    log.close().await.unwrap();
    // Told by any process, also later, until somebody has done something about it. Nothing is removed any more.
    let other = EmbeddedLog::open_reader(folder.path()).unwrap();
    let first = first_offset(&other, "unread").await;
    let lost = other.losses().await.unwrap();
    let told: Vec<_> = lost.iter().map(|loss| (&*loss.group, &*loss.topic, loss.records as i64)).collect();
    assert_eq!(told, [("slow", "unread", first)]);
    assert!((now_ms() - lost[0].at_ms).abs() < 60_000, "{lost:?}");
    let log = EmbeddedLog::open(settings(&folder)).unwrap();
    log.reset_group("slow", &[], StartAt::Beginning).await.unwrap();
    assert_eq!(log.losses().await.unwrap(), []);
}

#[tokio::test]
async fn a_group_that_has_left_a_topic_loses_nothing_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(EmbeddedSettings { size_limit: 5000, ..settings(&folder) }).unwrap();
    log.ensure_topic(&topic("t", 1)).await.unwrap();
    for topics in [vec!["t".to_owned(), "other".to_owned()], vec!["other".to_owned()]] {
        log.register_group("elsewhere", &topics).await.unwrap();
    }
    log.register_group("slow", &["t".into()]).await.unwrap();
    for i in 0..10 {
        write_numbers(&log, "t", i * 100, 100, 1).await;
    }
    eventually(DEADLINE, "the oldest go", async || first_offset(&log, "t").await > 0).await;
    let lost = log.losses().await.unwrap();
    assert_eq!(lost.iter().map(|loss| &*loss.group).collect::<Vec<_>>(), ["slow"], "{lost:?}");
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
    assert!(matches!(&error, LogError::Fatal(text) if text.contains("t-0") && text.contains("checksum")), "{error}");
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
