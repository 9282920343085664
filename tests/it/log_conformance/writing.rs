//! What a writer promises over both logs: records as they were written, order, positions, one writer a source.

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
    assert!(matches!(log.reader(&missing, StartAt::Beginning, StopAt::Never).await, Err(LogError::UnknownTopic(_))));
}
