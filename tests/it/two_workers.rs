//! Two workers in one consumer group on Kafka: partitions move while deliveries run and records are set aside.
#![cfg(feature = "kafka")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::delivery::CUSTOMERS;
use crate::support::{Api, Fault, Kafka, Postgres, Process, Proxy, Script, Version, WorkerLog, Workshop, eventually};
use crate::whole::{World, systems, write};

const LONG: Duration = Duration::from_secs(120);

/// A worker that has a sink alone, and asks the first one's registry.
struct Second {
    workshop: Workshop,
    sink: &'static str,
}

impl Second {
    fn new(first: &Workshop, url: &str, kafka: &Kafka, systems: &str, sink: &'static str, file: &str) -> Second {
        let more = format!("{systems}\nschema.registry: \"{}\"", first.url("").trim_end_matches('/'));
        let workshop = Workshop::new(url, WorkerLog::Kafka(&kafka.bootstrap()), &more);
        workshop.connector("sink.yaml", file);
        Second { workshop, sink }
    }

    /// Starts it, and waits until partitions have come over to it and it works on them.
    async fn join(&self) -> Process {
        let worker = self.workshop.start().await;
        eventually(LONG, "the second worker delivers", async || {
            let status = self.workshop.connector_status(self.sink).await;
            if status["applied"].as_u64().is_some_and(|applied| applied > 0) { Ok(()) } else { Err(status.to_string()) }
        })
        .await;
        worker
    }

    /// Joins, is killed, joins, leaves, and joins for good.
    async fn come_and_go(&self) -> Process {
        let worker = self.join().await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        worker.kill9().await;
        let worker = self.join().await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        worker.signal("TERM");
        assert_eq!(worker.wait(Duration::from_secs(60)).await, 0, "{}", worker.log_end(30));
        self.join().await
    }
}

fn sink(world: &World) -> String {
    assert!(CUSTOMERS.contains("map: '{ name: .after.name }"));
    let bad = r#"map: 'if .after.city == "nowhere" then error("no such city") else . end | { name: .after.name }"#;
    world.sink().replace("map: '{ name: .after.name }", bad)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_that_move_during_deliveries_lose_and_double_nothing_and_keep_the_order() {
    let kafka = Kafka::shared().await;
    let world = World::new("moving", WorkerLog::Kafka(&kafka.bootstrap())).await;
    let first = world.start().await;
    world.workshop.connector("customers.yaml", &sink(&world));
    // However late the folder is looked at, the new file counts from here on.
    world.workshop.ask(["connectors", "restart", "customers"]).await;
    // A batch takes longer than a stalled one may: revocations come while it is under way.
    world.proxy.script(Script::on("POST", "/party.party", Fault::Delay(Duration::from_secs(2))));
    world.proxy.script(Script::on("PUT", "/party.party", Fault::Delay(Duration::from_millis(500))));
    world.sql("INSERT INTO customers SELECT i, 'n' || i || ' v0', 's', CASE WHEN i % 10 = 0 THEN 'nowhere' ELSE 'c' END, 1 FROM generate_series(101, 140) i").await;
    let systems = systems(&world.tryton, &world.proxy);
    let second = Second::new(&world.workshop, &world.url, kafka, &systems, "customers", &sink(&world));
    let writing = AtomicBool::new(true);
    let moving = async {
        let worker = second.come_and_go().await;
        writing.store(false, Ordering::Relaxed);
        worker
    };
    let (worker, ()) = tokio::join!(moving, write(&world, 11, || writing.load(Ordering::Relaxed), 60));
    world.proxy.clear();
    // Four records are set aside.
    eventually(LONG, "delivered, but for what is set aside", async || {
        let parked = world.parked().await;
        let heads = parked.iter().filter(|(_, reason)| reason.contains("no such city")).count();
        let open = world.count("SELECT count(*) FROM tidegate.links WHERE intent IS NOT NULL").await;
        let links = world.count("SELECT count(*) FROM tidegate.links WHERE external_id IS NOT NULL").await;
        if (heads, open, links) == (4, 0, 96) { Ok(()) } else { Err(format!("{open} open, {links} links, {parked:?}")) }
    })
    .await;
    world.sql("UPDATE customers SET city = 'c', name = 'n' || id || ' v99999' WHERE city = 'nowhere'").await;
    // The changes go out in the place of what was set aside.
    world.equal().await;
    assert!(world.parked().await.is_empty(), "{:?}", world.parked().await);
    world.in_order();
    let codes: Vec<String> = world
        .proxy
        .seen()
        .iter()
        .filter(|seen| seen.method == "POST" && seen.forwarded)
        .map(|seen| seen.body.clone())
        .collect();
    assert!(codes.len() >= 100, "{}", codes.len());
    let lag = eventually(LONG, "the group has read everything", async || {
        let status = world.workshop.connector_status("customers").await;
        if status["lag_events"] == json!(0) { Ok(status) } else { Err(status.to_string()) }
    })
    .await;
    assert_eq!(lag["state"], "RUNNING");
    for worker in [first, worker] {
        worker.signal("TERM");
        assert_eq!(worker.wait(Duration::from_secs(60)).await, 0, "{}", worker.log_end(30));
    }
}

/// `key -> versions`, in their order.
type Versions = BTreeMap<i64, Vec<i64>>;

fn versions<'a>(events: impl Iterator<Item = &'a Value>) -> Versions {
    let mut versions = Versions::new();
    for event in events {
        versions.entry(event["key"].as_i64().unwrap()).or_default().push(event["version"].as_i64().unwrap());
    }
    versions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_change_by_itself_arrives_in_order_though_partitions_move_and_some_come_twice() {
    let kafka = Kafka::shared().await;
    let api = Api::start(Vec::new()).await;
    let proxy = Proxy::start(api.address).await;
    let database = Postgres::shared(Version::Distribution).await.database("each").await;
    database.execute("CREATE TABLE counters (id bigint PRIMARY KEY, version bigint)").await;
    let name = &database.name;
    let systems =
        format!("systems:\n  api: {{ base_url: '{}/v1', probe: GET /all, timeouts.request: 4s }}", proxy.url());
    let sink = format!(
        "name: each\ntype: http-sink\nsystem: api\nsend: change\ntopics: {name}.public.counters\n\
         request: {{ request: POST /items, headers: {{ Idempotency-Key: '{{{{ $idempotency_key }}}}' }} }}\n\
         map: '{{ key: .key.id, version: .after.version }}'\n"
    );
    let first = Workshop::new(&database.url(), WorkerLog::Kafka(&kafka.bootstrap()), &systems);
    first.connector(
        "capture.yaml",
        &format!(
            "name: {name}\ntype: postgres-source\ntopic.prefix: {name}\ntable.include.list: public.counters\n\
             topic.creation.default.partitions: 4\n"
        ),
    );
    first.connector("sink.yaml", &sink);
    let worker = first.start().await;
    first.until_state(name, "RUNNING").await;
    // A batch takes longer than a stalled one may; and one event is refused, those after it stand behind.
    proxy.script(Script::on("POST", "/items", Fault::status(422)).body("{\"key\":7,\"version\":3}").times(1));
    proxy.script(Script::on("POST", "/items", Fault::Delay(Duration::from_millis(300))));
    let sql = database.connect().await;
    sql.batch_execute("INSERT INTO counters SELECT i, 0 FROM generate_series(1, 40) i").await.unwrap();
    let second = Second::new(&first, &database.url(), kafka, &systems, "each", &sink);
    let writing = AtomicBool::new(true);
    let moving = async {
        let worker = second.come_and_go().await;
        writing.store(false, Ordering::Relaxed);
        worker
    };
    let write = async {
        let mut expected: Versions = (1..=40).map(|id| (id, vec![0])).collect();
        let mut random = StdRng::seed_from_u64(5);
        while writing.load(Ordering::Relaxed) {
            let mut change = String::from("BEGIN;");
            for _ in 0..random.random_range(1..4) {
                let id = random.random_range(1..=40);
                let known = expected.get_mut(&id).unwrap();
                known.push(known.len() as i64);
                change += &format!("UPDATE counters SET version = version + 1 WHERE id = {id};");
            }
            sql.batch_execute(&(change + "COMMIT")).await.unwrap();
            tokio::time::sleep(Duration::from_millis(random.random_range(50..150))).await;
        }
        expected
    };
    let (other, mut expected) = tokio::join!(moving, write);
    for _ in 0..5 {
        let known = expected.get_mut(&7).unwrap();
        known.push(known.len() as i64);
        sql.batch_execute("UPDATE counters SET version = version + 1 WHERE id = 7").await.unwrap();
    }
    proxy.clear();
    let arrived = || versions(api.items().iter());
    let without =
        |versions: &Versions| versions.iter().filter(|(key, _)| **key != 7).map(|(_, v)| v.len()).sum::<usize>();
    eventually(LONG, "delivered, but for what is set aside", async || {
        let (here, there) = (without(&arrived()), without(&expected));
        if here == there { Ok(()) } else { Err(format!("{here} of {there}")) }
    })
    .await;
    let letters = async || -> Vec<Value> {
        serde_json::from_str(&first.ask(["dead-letters", "list", "--output", "json"]).await).unwrap()
    };
    let parked = letters().await;
    assert!(parked.len() > 1 && parked[0]["kind"] == "rejected", "{parked:?}");
    assert!(parked.iter().all(|one| one["key"] == json!({"id": 7})), "{parked:?}");
    assert_eq!(arrived()[&7], [0, 1, 2], "nothing has overtaken");
    first.ask(["dead-letters", "replay", "each", "--all"]).await;
    eventually(LONG, "replayed", async || {
        let left = letters().await.len();
        if left == 0 { Ok(()) } else { Err(left.to_string()) }
    })
    .await;
    assert_eq!(arrived(), expected, "each once by its key, in the order of the table");
    // On the wire some come again, but none before the one ahead of it, and what comes again goes on from there.
    let bodies: Vec<Value> = proxy
        .seen()
        .iter()
        .filter(|seen| seen.method == "POST" && seen.forwarded)
        .map(|seen| serde_json::from_str(&seen.body).unwrap())
        .collect();
    for (key, sent) in versions(bodies.iter()) {
        let steps = sent.windows(2).all(|pair| pair[1] <= pair[0] + 1);
        assert!(steps, "{key}: {sent:?}");
    }
    for worker in [worker, other] {
        worker.signal("TERM");
        assert_eq!(worker.wait(Duration::from_secs(60)).await, 0, "{}", worker.log_end(30));
    }
}
