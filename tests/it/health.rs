//! What the worker tells of itself: metrics with right values in known situations, and a readiness that names every
//! way of being stuck.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::support::postgres::Options;
use crate::support::{Kafka, Mood, Office, Postgres, Version, WorkerLog, eventually, http};

const SOON: Duration = Duration::from_secs(60);

/// Values by name with labels, labels sorted, as in `name{a="1",b="2"}`.
async fn metrics(office: &Office) -> BTreeMap<String, f64> {
    let text = http().get(office.workshop.url("/metrics")).send().await.unwrap().text().await.unwrap();
    let mut values = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let name = match name.split_once('{') {
            None => name.to_owned(),
            Some((name, labels)) => {
                let mut labels: Vec<&str> = labels.trim_end_matches('}').split(',').collect();
                labels.sort_unstable();
                format!("{name}{{{}}}", labels.join(","))
            }
        };
        values.insert(name, value.parse().unwrap());
    }
    values
}

/// Waits until every one of these metrics has its value.
async fn until_measured(office: &Office, wanted: &[(String, f64)]) {
    eventually(SOON, "the metrics", async || {
        let seen = metrics(office).await;
        let wrong: Vec<String> = wanted
            .iter()
            .filter(|(name, value)| seen.get(name) != Some(value))
            .map(|(name, value)| format!("{name} {value}, but {:?}", seen.get(name)))
            .collect();
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_has_its_value_in_a_known_situation() {
    let office = Office::open("measured", WorkerLog::Embedded, "").await;
    let (capture, sink, topic) = (office.capture.as_str(), office.sink.as_str(), office.topic.as_str());
    office.crm.refuse(Some("Bad"));
    office.deliver("");
    let worker = office.workshop.start().await;
    office.until_delivered(&["Ada", "Grace"]).await;
    office.workshop.until_state(capture, "RUNNING").await;
    office.database.execute("INSERT INTO customers VALUES (3, 'Bad'), (4, 'Cid'); UPDATE customers SET name = 'Dora' WHERE id = 4; DELETE FROM customers WHERE id = 2").await;
    let of = |name: &str, labels: &str| format!("{name}{{{labels}}}");
    let events = |operation: &str| {
        of(
            "tidegate_capture_events_total",
            &format!("connector=\"{capture}\",operation=\"{operation}\",table=\"public.customers\""),
        )
    };
    let slot = format!("connector=\"{capture}\",slot=\"tidegate_{capture}\"");
    let records = |result: &str| of("tidegate_records_total", &format!("connector=\"{sink}\",result=\"{result}\""));
    let consumer = format!("connector=\"{sink}\",group=\"tidegate-{sink}\",partition=\"0\",topic=\"{topic}\"");
    let breaker = |state: &str| of("tidegate_system_breaker_state", &format!("state=\"{state}\",system=\"crm\""));
    let state =
        |name: &str, state: &str| of("tidegate_connector_state", &format!("connector=\"{name}\",state=\"{state}\""));
    until_measured(
        &office,
        &[
            ("tidegate_ready".to_owned(), 1.0),
            (events("r"), 2.0),
            (events("c"), 2.0),
            (events("u"), 1.0),
            (events("d"), 1.0),
            // Two rows of the snapshot, Cid with its update in one or two, and the one that was refused.
            (records("rejected"), 1.0),
            (of("tidegate_dead_letters", &format!("connector=\"{sink}\"")), 1.0),
            (of("tidegate_waiting_records", &format!("connector=\"{sink}\"")), 0.0),
            (of("tidegate_consumer_lag_records", &consumer), 0.0),
            (of("tidegate_delivery_lag_seconds", &format!("connector=\"{sink}\"")), 0.0),
            (of("tidegate_queue_bytes", &format!("connector=\"{sink}\"")), 0.0),
            (of("tidegate_queue_bytes", &format!("connector=\"{capture}\"")), 0.0),
            (of("tidegate_replication_lag_bytes", &format!("connector=\"{capture}\"")), 0.0),
            (of("tidegate_replication_lag_seconds", &format!("connector=\"{capture}\"")), 0.0),
            (of("tidegate_slot_wal_status", &format!("{slot},wal_status=\"reserved\"")), 1.0),
            (of("tidegate_slot_wal_status", &format!("{slot},wal_status=\"lost\"")), 0.0),
            (breaker("closed"), 1.0),
            (breaker("open"), 0.0),
            (state(capture, "RUNNING"), 1.0),
            (state(sink, "RUNNING"), 1.0),
            (state(sink, "WAITING"), 0.0),
        ],
    )
    .await;
    let seen = metrics(&office).await;
    let done: f64 = ["applied", "skipped", "rejected", "waiting"].iter().map(|result| seen[&records(result)]).sum();
    assert_eq!(done, 7.0, "every event has one result, the tombstone too: {seen:#?}");
    // The server keeps what it says it keeps.
    let client = office.database.connect_as_superuser().await;
    let kept = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::float8 FROM pg_replication_slots WHERE slot_name = $1";
    eventually(SOON, "the slot's WAL is measured", async || {
        let kept: f64 = client.query_one(kept, &[&format!("tidegate_{capture}")]).await.unwrap().get(0);
        let seen = metrics(&office).await[&of("tidegate_slot_wal_kept_bytes", &slot)];
        // Other tests write to the same server meanwhile.
        if seen > 0.0 && (kept - seen).abs() < 64e6 { Ok(()) } else { Err(format!("{seen}, but {kept}")) }
    })
    .await;

    // With the CRM away: the breaker opens, lag and its age grow.
    office.crm.set(Mood::Fails);
    office.database.execute("INSERT INTO customers SELECT n, 'n' || n FROM generate_series(100, 139) n").await;
    until_measured(
        &office,
        &[
            (breaker("open"), 1.0),
            (breaker("closed"), 0.0),
            (of("tidegate_consumer_lag_records", &consumer), 40.0),
            (state(sink, "WAITING"), 1.0),
            (events("c"), 42.0),
            ("tidegate_ready".to_owned(), 0.0),
        ],
    )
    .await;
    eventually(SOON, "the lag grows old", async || {
        metrics(&office).await[&of("tidegate_delivery_lag_seconds", &format!("connector=\"{sink}\""))] > 3.0
    })
    .await;
    office.crm.set(Mood::Well);
    until_measured(&office, &[(breaker("closed"), 1.0), (of("tidegate_consumer_lag_records", &consumer), 0.0)]).await;

    // By Prometheus' conventions: counters end in _total, everything has its help, units are base units.
    let text = http().get(office.workshop.url("/metrics")).send().await.unwrap().text().await.unwrap();
    for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
        let mut words = line.split(' ').skip(2);
        let (name, kind) = (words.next().unwrap(), words.next().unwrap());
        assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        assert!(name.starts_with("tidegate_"), "{line}");
        assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help");
        assert!(!name.contains("_ms") && !name.contains("_mb"), "{line}");
    }
    drop(worker);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_capture_lags_by_nothing_while_others_write_wal() {
    let office = Office::open("idle", WorkerLog::Embedded, "").await;
    let _worker = office.workshop.start().await;
    office.until_captured(2).await;
    let other = office.database.server.database("busy").await;
    other.execute("CREATE TABLE noise (id int)").await;
    let client = other.connect().await;
    let mut most = 0;
    // In the moment in which the stream opens it is some microseconds behind.
    eventually(SOON, "it streams, and lags by nothing", async || {
        let seen = office.workshop.connector_status(&office.capture).await;
        if seen["facts"]["stage"] == "streaming" && seen["lag_seconds"] == 0.0 { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
    // Longer than it takes to look at the slot twice, and than an idle slot is moved on.
    for _ in 0..60 {
        client.batch_execute("INSERT INTO noise SELECT generate_series(1, 200)").await.unwrap();
        let seen = office.workshop.connector_status(&office.capture).await;
        if seen["facts"]["stage"] == "streaming" {
            most = most.max(seen["lag_bytes"].as_u64().unwrap_or(0));
            assert_eq!(seen["lag_seconds"].as_f64().unwrap_or(0.0), 0.0, "{seen}");
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    eventually(SOON, "nothing is to come", async || {
        let seen = office.workshop.connector_status(&office.capture).await;
        if seen["lag_bytes"] == 0 { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
    // The noise is some 12 kB a round: what was decoded and filtered is no lag, though the slot is told only later.
    assert!(most < 200_000, "{most} bytes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_without_its_server_is_not_ready_and_its_lag_grows() {
    let server: &'static Postgres = Box::leak(Box::new(Postgres::own(Version::Distribution).await));
    let office = Office::on(server, "gone", WorkerLog::Embedded, "").await;
    let _worker = office.workshop.start().await;
    office.until_captured(2).await;
    assert_eq!(office.until_ready().await["troubles"], Value::Array(Vec::new()));
    let lag = async || office.workshop.connector_status(&office.capture).await["lag_seconds"].clone();
    eventually(SOON, "the lag is known", async || lag().await == 0.0).await;
    server.stop().await;
    let health = office.until_not_ready(&[&office.capture, "waiting for"]).await;
    assert!(health["troubles"][0]["message"].as_str().unwrap().len() > 20, "the reason: {health}");
    eventually(SOON, "the lag grows", async || {
        let seen = office.workshop.connector_status(&office.capture).await;
        let seconds = seen["lag_seconds"].as_f64().unwrap_or(0.0);
        if seconds > 10.0 { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
    office.until_not_ready(&["\"datastore\"", "no answer"]).await;
    server.start().await;
    office.until_ready().await;
    eventually(SOON, "no lag", async || office.workshop.connector_status(&office.capture).await["lag_seconds"] == 0.0)
        .await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_whose_system_is_away_or_hangs_is_not_ready_and_one_that_is_slow_is() {
    let office = Office::open("stuck", WorkerLog::Embedded, "").await;
    office.deliver("");
    let _worker = office.workshop.start().await;
    office.until_delivered(&["Ada", "Grace"]).await;
    office.until_ready().await;

    office.crm.set(Mood::Fails);
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    office.until_not_ready(&[&office.sink, "'crm' is unavailable"]).await;
    office.crm.set(Mood::Well);
    office.until_delivered(&["Ada", "Cid", "Grace"]).await;
    office.until_ready().await;

    // It takes the request and never answers: told before the request's own time is up.
    office.crm.set(Mood::Hangs);
    office.database.execute("INSERT INTO customers VALUES (4, 'Dora')").await;
    office.until_not_ready(&[&office.sink, "does not answer"]).await;
    office.crm.set(Mood::Well);
    office.until_delivered(&["Ada", "Cid", "Dora", "Grace"]).await;
    office.until_ready().await;

    // A batch that takes long while its records go out one after the other is no trouble.
    office.crm.set(Mood::Slow(Duration::from_millis(900)));
    office.database.execute("INSERT INTO customers SELECT n, 'n' || n FROM generate_series(100, 179) n").await;
    let before = office.crm.names().len();
    eventually(SOON, "it has begun", async || office.crm.names().len() > before).await;
    let mut looks = 0;
    while office.crm.names().len() < before + 70 {
        let (status, health) = office.workshop.get("/health/ready").await;
        assert_eq!(status, 200, "{health}");
        looks += 1;
        assert!(looks < 400, "slower than thought: {} customers", office.crm.names().len());
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert!(looks > 40, "the batch took less than the 10 s after which one counts as stalled");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_log_is_away_is_not_ready() {
    let broker = Kafka::own().await;
    let office = Office::open("log_away", WorkerLog::Kafka(&broker.bootstrap()), "").await;
    office.deliver("");
    let _worker = office.workshop.start().await;
    office.until_delivered(&["Ada", "Grace"]).await;
    office.until_ready().await;
    broker.stop().await;
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    // Both sides of it, and the log itself by name.
    office.until_not_ready(&[&format!("\"{}\"", office.capture), &format!("\"{}\"", office.sink), "\"log\""]).await;
    broker.start().await;
    office.until_delivered(&["Ada", "Cid", "Grace"]).await;
    office.until_ready().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_the_server_gives_up_is_told_before_it_is_lost() {
    let small = vec![("max_slot_wal_keep_size".to_owned(), "1MB".to_owned())];
    let options = Options { settings: small, ..Options::default() };
    let server: &'static Postgres = Box::leak(Box::new(Postgres::own_with(Version::Distribution, options).await));
    let office = Office::on(server, "given_up", WorkerLog::Embedded, "").await;
    let _worker = office.workshop.start().await;
    office.until_captured(2).await;
    office.until_ready().await;
    // Paused, it confirms nothing, and the server's WAL goes beyond what it may keep.
    office.workshop.ask(["connectors", "pause", &office.capture]).await;
    office.workshop.until_state(&office.capture, "PAUSED").await;
    let client = office.database.connect_as_superuser().await;
    client.batch_execute("CREATE TABLE noise (t text)").await.unwrap();
    let told = eventually(SOON, "it is told", async || {
        client
            .batch_execute("INSERT INTO noise SELECT repeat('x', 1000) FROM generate_series(1, 20000)")
            .await
            .unwrap();
        client.query("SELECT pg_switch_wal()", &[]).await.unwrap();
        let (status, health) = office.workshop.get("/health/ready").await;
        if status == 503 { Ok(health.to_string()) } else { Err(health.to_string()) }
    })
    .await;
    assert!(told.contains("is giving up the WAL of slot") && told.contains("max_slot_wal_keep_size"), "{told}");
    server.stop().await;
}

#[tokio::test]
async fn dead_letters_and_slots_left_behind_are_warnings_that_leave_the_worker_ready() {
    let office = Office::open("warned", WorkerLog::Embedded, "").await;
    office.crm.refuse(Some("Grace"));
    office.deliver("");
    let _worker = office.workshop.start().await;
    office.until_delivered(&["Ada"]).await;
    let warned = eventually(SOON, "a warning", async || {
        let (status, health) = office.workshop.get("/health/ready").await;
        assert_eq!(status, 200, "{health}");
        (health["warnings"] != Value::Array(Vec::new())).then_some(health)
    })
    .await;
    assert_eq!(warned["warnings"][0]["what"], office.sink.as_str());
    assert!(warned["warnings"][0]["message"].as_str().unwrap().starts_with("1 dead letter;"), "{warned}");
    office.workshop.remove(&format!("{}.yaml", office.capture));
    let warned = eventually(SOON, "the slot's WAL is told", async || {
        let (status, health) = office.workshop.get("/health/ready").await;
        assert_eq!(status, 200, "{health}");
        let text = health["warnings"].to_string();
        if text.contains("bytes of WAL") { Ok(text) } else { Err(text) }
    })
    .await;
    assert!(warned.contains(&format!("connectors forget {}", office.capture)), "{warned}");
    let table = office.workshop.ask(["status"]).await;
    assert!(table.contains("1 dead letter") && table.contains("of WAL"), "{table}");

    // Whoever forgets the sink is rid of them: no connector is left that could drop them.
    let letters = format!("tidegate_dead_letters{{connector=\"{}\"}}", office.sink);
    until_measured(&office, &[(letters.clone(), 1.0)]).await;
    office.workshop.remove("sink.yaml");
    let gone = async || office.workshop.connector_status(&office.sink).await.get("error").is_some();
    eventually(SOON, "the sink is gone", gone).await;
    let said = eventually(SOON, "it has stopped", async || {
        let output = office.workshop.cli(["connectors", "forget", &office.sink]).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() { Ok(said) } else { Err(format!("{output:?}")) }
    })
    .await;
    assert!(said.contains("consumer group") && said.contains("1 parked record dropped"), "{said}");
    until_measured(&office, &[(letters, 0.0)]).await;
    let (_, health) = office.workshop.get("/health/ready").await;
    assert!(!health.to_string().contains("dead letter"), "{health}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_is_gone_is_behind_nothing() {
    let office = Office::open("behind", WorkerLog::Embedded, "").await;
    office.crm.set(Mood::Fails);
    office.deliver("");
    let _worker = office.workshop.start().await;
    let (sink, topic) = (&office.sink, &office.topic);
    let lag = format!(
        "tidegate_consumer_lag_records{{connector=\"{sink}\",group=\"tidegate-{sink}\",partition=\"0\",topic=\"{topic}\"}}"
    );
    until_measured(&office, &[(lag.clone(), 2.0)]).await;
    office.workshop.remove("sink.yaml");
    until_measured(&office, &[(lag, 0.0)]).await;
}

#[tokio::test]
async fn what_is_asked_wrongly_is_answered_as_every_error_is() {
    let office = Office::open("wrongly", WorkerLog::Embedded, "").await;
    let _worker = office.workshop.start().await;
    let capture = &office.capture;
    let client = http();
    let url = |path: &str| office.workshop.url(path);
    let json = "application/json";
    for (request, status) in [
        (client.get(url("/nothing")), 404),
        (client.get(url("/connectors/none")), 404),
        (client.get(url(&format!("/connectors/{capture}/pause"))), 405),
        (client.post(url("/connectors/none/pause")), 404),
        (client.post(url(&format!("/connectors/{capture}/stop"))), 404),
        (client.post(url(&format!("/connectors/{capture}/reset"))), 400),
        (client.post(url(&format!("/connectors/{capture}/reset"))).body("{").header("content-type", json), 400),
        (client.post(url(&format!("/connectors/{capture}/reset"))).body(vec![b' '; 2 << 20]), 413),
        (client.post(url(&format!("/connectors/{capture}/reset"))).body("{\"to\": \"end\", \"of\": 1}"), 400),
        (client.post(url("/connectors/gone/forget")).body("{\"keepSlot\": true}"), 400),
        (client.post(url("/connectors/gone/forget")).body("{\"keep_slot\": \"yes\"}"), 400),
        (client.post(url(&format!("/connectors/{capture}/pause"))).header("origin", "http://evil.example"), 403),
        (client.post(url(&format!("/connectors/{capture}/pause"))).header("host", "evil.example"), 403),
        (client.get(url("/status")).header("host", "evil.example"), 403),
        (client.get(url("/dead-letters?limit=many")), 400),
        (client.get(url("/dead-letters/none/t:0")), 400),
        (client.get(url("/dead-letters/none/t:0:0")), 404),
        (client.post(url("/dead-letters/none/all/replay")), 404),
    ] {
        // One connection each: after a body that is too long it is closed.
        let response = request.header("connection", "close").send().await.unwrap();
        assert_eq!(response.status(), status, "{response:?}");
        let body: Value = response.json().await.unwrap();
        assert!(body["error"].as_str().is_some_and(|error| error.len() > 8), "{status}: {body}");
    }
    office.workshop.until_state(capture, "RUNNING").await;
    let (status, _) = office.workshop.get("/health/live").await;
    assert_eq!(status, 200);
}
