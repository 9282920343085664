//! What a reader without a group promises over both logs: where it starts, where it ends, what is not there.

use super::*;

pub async fn a_reader_starts_at_an_offset_a_time_or_the_end(world: World) {
    let name = world.name("rows");
    let log = world.log().await;
    log.ensure_topic(&topic(&name, 1)).await.unwrap();
    let between = ten_and_then(&*log, &name, 3).await;
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
        let (mut writer, name, written) = (log.writer(&world.name("s")).await.unwrap(), name.clone(), written.clone());
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
