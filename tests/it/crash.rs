//! `kill -9` of everything in turn, while rows are written: nothing missing, order per key kept, and nothing twice
//! where the guarantee excludes it. Counters make it checkable: every update of a row adds one to it, so that a
//! key's events must count up without a gap.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::support::{Database, Kafka, Postgres, Process, Version, WorkerLog, Workshop, eventually};

const SOON: Duration = Duration::from_secs(120);
const KEYS: i32 = 40;

/// Adds to counters in transactions of several rows, until told to stop; goes on when the server comes back.
struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Writer {
    async fn start(database: &Database<'static>) -> Self {
        database
            .execute(&format!(
                "CREATE TABLE counters (id int PRIMARY KEY, n bigint NOT NULL, pad text);
                 INSERT INTO counters SELECT id, 0, repeat('x', 50) FROM generate_series(1, {KEYS}) id;"
            ))
            .await;
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), written.clone());
        let (server, name) = (database.server, database.name.clone());
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                let Ok(client) = server.try_connect("tidegate", &name).await else {
                    sleep(Duration::from_millis(50)).await;
                    continue;
                };
                while !stopped.load(Ordering::Relaxed) {
                    let first = rand::random_range(1..=KEYS);
                    let rows = rand::random_range(1..=5);
                    let statement = "UPDATE counters SET n = n + 1 WHERE id >= $1 AND id < $1 + $2";
                    let wrote = client.execute(statement, &[&first, &rows]).await;
                    let Ok(wrote) = wrote else { break };
                    count.fetch_add(wrote, Ordering::Relaxed);
                    sleep(Duration::from_millis(2)).await;
                }
            }
        });
        Writer { stop, written, task }
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Twice {
    Never,
    Allowed,
}

/// Waits until the last event of every key is what the table has, then looks at the whole way there.
async fn check(workshop: &Workshop, database: &Database<'_>, twice: Twice) {
    let rows = database.connect().await.query("SELECT id, n FROM counters", &[]).await.unwrap();
    let table: BTreeMap<i64, i64> = rows.iter().map(|row| (i64::from(row.get::<_, i32>(0)), row.get(1))).collect();
    let topic = format!("{}.public.counters", database.name);
    let records = eventually(SOON, "the topic ends as the table stands", async || {
        let records = workshop.consume(&topic).await;
        let last: BTreeMap<i64, i64> = records.iter().map(counted).collect();
        let behind: Vec<_> = table.iter().filter(|(id, n)| last.get(id) != Some(n)).take(3).collect();
        if behind.is_empty() { Ok(records) } else { Err(format!("{} records; behind: {behind:?}", records.len())) }
    })
    .await;
    let mut last: BTreeMap<i64, i64> = BTreeMap::new();
    let mut streamed: BTreeSet<i64> = BTreeSet::new();
    let mut doubled = 0;
    for record in &records {
        let (id, n) = counted(record);
        if record["value"]["op"] == "r" {
            // A table whose snapshot was cut is read again; the stream goes on from the first reading's slot.
            assert!(!streamed.contains(&id), "key {id}: read after it was streamed");
            let first = *last.entry(id).or_insert(n);
            assert!(n >= first, "key {id}: read as {n} after {first}");
            continue;
        }
        let before = last.insert(id, n).unwrap_or_else(|| panic!("key {id}: {n} without a read before"));
        if streamed.insert(id) && n <= before && twice == Twice::Never {
            // Read for the first time by a second reading, which sees later than its slot.
            continue;
        }
        if n <= before {
            doubled += 1;
            assert!(twice == Twice::Allowed, "key {id}: {n} after {before}, at offset {}", record["offset"]);
        } else {
            assert_eq!(n, before + 1, "key {id}: a gap before offset {}", record["offset"]);
        }
    }
    println!("{} records, {doubled} twice", records.len());
    assert!(records.len() > 200, "hardly anything was streamed");
}

fn counted(record: &Value) -> (i64, i64) {
    let number = |value: &Value| value.as_i64().unwrap_or_else(|| panic!("{record}"));
    (number(&record["key"]["id"]), number(&record["value"]["after"]["n"]))
}

/// Waits until the capture has read its snapshot and streams: what is written from then on is streamed.
async fn until_streaming(workshop: &Workshop, database: &Database<'_>) {
    eventually(SOON, "the capture streams", async || {
        let seen = workshop.connector_status(&database.name).await;
        if seen["facts"]["stage"] == "streaming" { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
}

async fn until_written(writer: &Writer, more: u64) {
    let from = writer.written.load(Ordering::Relaxed);
    eventually(SOON, "rows are written", async || writer.written.load(Ordering::Relaxed) >= from + more).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_at_twenty_random_moments_loses_and_doubles_nothing() {
    let database = Postgres::shared(Version::Distribution).await.database("killed").await;
    let workshop = Workshop::new(&database.url(), WorkerLog::Embedded, "");
    let writer = Writer::start(&database).await;
    workshop.capture(&database.name, "public.counters");
    for _ in 0..20 {
        let worker = workshop.launch();
        sleep(Duration::from_millis(rand::random_range(50..1500))).await;
        worker.kill9().await;
    }
    let _worker = workshop.start().await;
    until_streaming(&workshop, &database).await;
    until_written(&writer, 250).await;
    writer.stop().await;
    check(&workshop, &database, Twice::Never).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgresql_killed_while_captured_loses_and_doubles_nothing() {
    let server: &'static Postgres = Box::leak(Box::new(Postgres::own(Version::Distribution).await));
    let database = server.database("crashed").await;
    let workshop = Workshop::new(&database.url(), WorkerLog::Embedded, "");
    let writer = Writer::start(&database).await;
    workshop.capture(&database.name, "public.counters");
    let worker = workshop.start().await;
    for _ in 0..4 {
        until_written(&writer, 300).await;
        sleep(Duration::from_millis(rand::random_range(0..500))).await;
        server.kill9().await;
        sleep(Duration::from_millis(rand::random_range(0..1000))).await;
        server.start().await;
    }
    until_written(&writer, 300).await;
    writer.stop().await;
    check(&workshop, &database, Twice::Never).await;
    assert_eq!(worker.exited(), None, "the worker outlives its datastore: {}", worker.log_end(20));
    workshop.until_state(&database.name, "RUNNING").await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_killed_while_captured_into_loses_nothing_and_keeps_order() {
    let broker = Kafka::own().await;
    let database = Postgres::shared(Version::Distribution).await.database("broker").await;
    let workshop = Workshop::new(&database.url(), WorkerLog::Kafka(&broker.bootstrap()), "");
    let writer = Writer::start(&database).await;
    workshop.capture(&database.name, "public.counters");
    let worker = workshop.start().await;
    until_streaming(&workshop, &database).await;
    for _ in 0..2 {
        until_written(&writer, 300).await;
        broker.kill9().await;
        until_written(&writer, 300).await;
        broker.start().await;
    }
    until_written(&writer, 300).await;
    writer.stop().await;
    check(&workshop, &database, Twice::Allowed).await;
    assert_eq!(worker.exited(), None, "{}", worker.log_end(20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_while_it_captures_into_kafka_loses_nothing_and_keeps_order() {
    let broker = Kafka::shared().await;
    let database = Postgres::shared(Version::Distribution).await.database("killed_kafka").await;
    let workshop = Workshop::new(&database.url(), WorkerLog::Kafka(&broker.bootstrap()), "");
    let writer = Writer::start(&database).await;
    workshop.capture(&database.name, "public.counters");
    for _ in 0..6 {
        let worker = workshop.launch();
        sleep(Duration::from_millis(rand::random_range(300..2500))).await;
        worker.kill9().await;
    }
    let _worker = workshop.start().await;
    until_streaming(&workshop, &database).await;
    until_written(&writer, 250).await;
    writer.stop().await;
    check(&workshop, &database, Twice::Allowed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_worker_of_a_capture_waits_says_why_and_goes_on_when_the_first_is_killed() {
    let broker = Kafka::shared().await;
    let database = Postgres::shared(Version::Distribution).await.database("two_workers").await;
    let writer = Writer::start(&database).await;
    let [first, second] = [(); 2].map(|()| Workshop::new(&database.url(), WorkerLog::Kafka(&broker.bootstrap()), ""));
    first.capture(&database.name, "public.counters");
    let running = first.start().await;
    until_streaming(&first, &database).await;
    second.capture(&database.name, "public.counters");
    let waiting = second.start().await;
    let seen = eventually(SOON, "the second one waits", async || {
        let seen = second.connector_status(&database.name).await;
        if seen["state"] == "WAITING" { Ok(seen["last_error"]["message"].to_string()) } else { Err(seen.to_string()) }
    })
    .await;
    assert!(seen.contains("is in use by another (process ") && seen.contains("hint:"), "{seen}");
    let (code, health) = second.get("/health/ready").await;
    assert!(code == 503 && health.to_string().contains("in use by another"), "{code} {health}");
    until_written(&writer, 200).await;
    assert_eq!(first.connector_status(&database.name).await["state"], "RUNNING", "{}", running.log_end(20));
    running.kill9().await;
    until_streaming(&second, &database).await;
    until_written(&writer, 250).await;
    writer.stop().await;
    check(&second, &database, Twice::Allowed).await;
    second.until_state(&database.name, "RUNNING").await;
    assert_eq!(waiting.exited(), None, "{}", waiting.log_end(20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_of_pgbench_folded_by_key_are_its_tables_on_both_logs() {
    const SECONDS: u64 = 30;
    let database = Postgres::shared(Version::Distribution).await.database("pgbench").await;
    let broker = Kafka::shared().await;
    pgbench(&database, &["--initialize", "--scale", "1", "--quiet"]).await;
    let mut workers: Vec<(Workshop, Process, String)> = Vec::new();
    for (log, name) in [(WorkerLog::Embedded, "embedded"), (WorkerLog::Kafka(&broker.bootstrap()), "kafka")] {
        let workshop = Workshop::new(&database.url(), log, "");
        let name = format!("{}_{name}", database.name);
        workshop.capture(&name, r"public\.pgbench_.*");
        let worker = workshop.start().await;
        workers.push((workshop, worker, name));
    }
    let seconds = SECONDS.to_string();
    pgbench(&database, &["--time", &seconds, "--client", "4", "--no-vacuum"]).await;
    let client = database.connect().await;
    for (workshop, worker, name) in &workers {
        for (table, key, value) in [
            ("pgbench_accounts", "aid", "abalance"),
            ("pgbench_tellers", "tid", "tbalance"),
            ("pgbench_branches", "bid", "bbalance"),
        ] {
            let rows = client.query(&format!("SELECT {key}, {value} FROM {table}"), &[]).await.unwrap();
            let wanted: BTreeMap<i64, i64> =
                rows.iter().map(|row| (row.get::<_, i32>(0).into(), row.get::<_, i32>(1).into())).collect();
            let topic = format!("{name}.public.{table}");
            let began = Instant::now();
            eventually(SOON, &format!("{topic} folds to its table"), async || {
                let mut folded: BTreeMap<i64, i64> = BTreeMap::new();
                for record in workshop.consume(&topic).await {
                    let id = record["key"][key].as_i64().expect("an id");
                    match record["value"]["after"][value].as_i64() {
                        Some(balance) => folded.insert(id, balance),
                        None => folded.remove(&id),
                    };
                }
                let differ = wanted.iter().filter(|(id, balance)| folded.get(id) != Some(balance)).count();
                if differ == 0 && folded.len() == wanted.len() {
                    Ok(())
                } else {
                    Err(format!("{} keys of {}, {differ} differ; {}", folded.len(), wanted.len(), worker.log_end(3)))
                }
            })
            .await;
            println!("{topic}: {} keys equal after {:?}", wanted.len(), began.elapsed());
        }
        // A table without a key: every insert once, where nothing may come twice.
        let history: i64 = client.query_one("SELECT count(*) FROM pgbench_history", &[]).await.unwrap().get(0);
        let records = workshop.consume(&format!("{name}.public.pgbench_history")).await.len() as i64;
        assert_eq!(records, history, "{name}: history");
        assert!(history > 500, "pgbench hardly wrote: {history}");
    }
}

async fn pgbench(database: &Database<'_>, args: &[&str]) {
    let output = tokio::process::Command::new(database.server.bin().join("pgbench"))
        .args(args)
        .args(["-h", "127.0.0.1", "-U", "tidegate", "-p", &database.server.port().to_string(), &database.name])
        .env("PGPASSWORD", "tidegate")
        .output()
        .await
        .expect("pgbench runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
