//! Two workers in one consumer group on Kafka: partitions move while deliveries run and records are set aside.
#![cfg(feature = "kafka")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::delivery::CUSTOMERS;
use crate::support::{Fault, Kafka, Process, Script, WorkerLog, Workshop, eventually};
use crate::whole::{World, systems, write};

const LONG: Duration = Duration::from_secs(120);

/// A worker that has the sink alone, and asks the first one's registry.
struct Second(Workshop);

impl Second {
    fn new(world: &World, kafka: &Kafka) -> Second {
        let more = format!(
            "{}\nschema.registry: \"{}\"",
            systems(&world.tryton, &world.proxy),
            world.workshop.url("").trim_end_matches('/')
        );
        let workshop = Workshop::new(&world.url, WorkerLog::Kafka(&kafka.bootstrap()), &more);
        workshop.connector("customers.yaml", &sink(world));
        Second(workshop)
    }

    /// Starts it, and waits until partitions have come over to it and it works on them.
    async fn join(&self) -> Process {
        let worker = self.0.start().await;
        eventually(LONG, "the second worker delivers", async || {
            let status = self.0.connector_status("customers").await;
            if status["applied"].as_u64().is_some_and(|applied| applied > 0) { Ok(()) } else { Err(status.to_string()) }
        })
        .await;
        worker
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
    let second = Second::new(&world, kafka);
    let writing = AtomicBool::new(true);
    let moving = async {
        let worker = second.join().await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        worker.kill9().await;
        let worker = second.join().await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        worker.signal("TERM");
        assert_eq!(worker.wait(Duration::from_secs(60)).await, 0, "{}", worker.log_end(30));
        let worker = second.join().await;
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
