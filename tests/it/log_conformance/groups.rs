//! What a consumer group promises over both logs: offsets, lag, resets, sharing, pauses, news.

use super::*;

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
    let behind = |lags: &[PartitionLag]| -> u64 { lags.iter().map(PartitionLag::behind).sum() };
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
    let between = ten_and_then(&*log, &name, 10).await;
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

pub async fn news_reaches_a_waiting_consumer_at_once(world: World) {
    let (name, group) = (world.name("rows"), world.name("g"));
    let log = world.log().await;
    log.ensure_topic(&topic(&name, 1)).await.unwrap();
    let mut consumer = log.consumer(&group, std::slice::from_ref(&name)).await.unwrap();
    let mut writer = log.writer(&world.name("s")).await.unwrap();
    // A producer that has just begun takes a moment to find its brokers.
    writer.append(batch(&name, [("k", "first")]), None).await.unwrap().await.unwrap();
    consume_count(&mut *consumer, 1).await;
    // One that looks now and then would find every record late, since each comes as a wait has just begun.
    let limit = PollLimit { wait: Duration::from_secs(1), ..LIMIT };
    let mut late = Vec::new();
    for round in 0..50 {
        let writing = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let at = Instant::now();
            writer.append(batch(&name, [("k", round.to_string().as_str())]), None).await.unwrap().await.unwrap();
            at
        };
        let reading = async {
            while !matches!(consumer.poll(&limit).await.unwrap(), Polled::Records(records) if !records.is_empty()) {}
            Instant::now()
        };
        let both = async { tokio::join!(writing, reading) };
        let (at, came) = tokio::time::timeout(DEADLINE, both).await.expect("a record did not come");
        late.push(came - at);
    }
    late.sort_unstable();
    println!("{}: append to consumer, of 50: fifth {:?}, median {:?}", log.kind(), late[4], late[25]);
    // Not how fast it is, which `make bench` measures on a quiet machine: the quickest were woken.
    assert!(late[4] < Duration::from_millis(100), "{late:?}");
    consumer.close().await.unwrap();
}

/// One poll; keeps what is assigned up to date.
async fn follow(consumer: &mut dyn LogConsumer, held: &mut BTreeSet<i32>) {
    match consumer.poll(&LIMIT).await.unwrap() {
        Polled::Assigned(places) => held.extend(places.iter().map(|place| place.partition)),
        Polled::Revoked(places) => held.retain(|p| !places.iter().any(|place| place.partition == *p)),
        Polled::Records(_) => {}
    }
}

fn sorted(records: &[ConsumedRecord]) -> BTreeSet<(i32, Offset)> {
    records.iter().map(|record| (record.partition, record.offset)).collect()
}
