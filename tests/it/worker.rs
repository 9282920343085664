//! The running worker: its folder of connectors, pauses, health, shutdown.

use std::time::Duration;

use serde_json::Value;
use tidegate::log::{EmbeddedLog, EmbeddedSettings, Log as _};

use crate::log_conformance::{topic, write_numbers};
use crate::support::{Postgres, Version, WorkerLog, Workshop, eventually, http};

const SOON: Duration = Duration::from_secs(30);

struct Shop {
    workshop: Workshop,
    database: crate::support::Database<'static>,
}

/// A database with two tables of one row each.
async fn shop(name: &str) -> Shop {
    let database = Postgres::shared(Version::Distribution).await.database(name).await;
    database
        .execute(
            "CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL);
             CREATE TABLE orders (id int PRIMARY KEY, total numeric(10,2));
             INSERT INTO customers VALUES (1, 'Ada'); INSERT INTO orders VALUES (1, 12.50);",
        )
        .await;
    let workshop = Workshop::new(&database.url(), WorkerLog::Embedded, "shutdown.deadline: 10s");
    Shop { workshop, database }
}

impl Shop {
    /// A capture under a name that no other test's slot has.
    fn capture(&self, tables: &str) -> String {
        let name = self.database.name.clone();
        self.workshop.capture(&name, tables);
        name
    }

    async fn until_records(&self, topic: &str, count: usize) -> Vec<Value> {
        eventually(SOON, &format!("{count} records in {topic}"), async || {
            let records = self.workshop.consume(topic).await;
            if records.len() == count { Ok(records) } else { Err(format!("{} records: {records:?}", records.len())) }
        })
        .await
    }
}

#[tokio::test]
async fn what_the_size_limit_took_unread_is_shown_until_somebody_acts() {
    let shop = shop("losses").await;
    let workshop = &shop.workshop;
    let mut settings = EmbeddedSettings::new(workshop.path().join("data"));
    (settings.size_limit, settings.retention_interval) = (5000, Duration::from_millis(20));
    let log = EmbeddedLog::open(settings).unwrap();
    log.ensure_topic(&topic("rows", 1)).await.unwrap();
    log.register_group("tidegate.slow", &["rows".into()]).await.unwrap();
    for from in 0..20 {
        write_numbers(&log, "rows", from * 100, 100, 1).await;
    }
    let lost = eventually(SOON, "unread records go", async || log.losses().await.unwrap().first().map(|it| it.records));
    assert!(lost.await >= 100);
    log.close().await.unwrap();
    drop(log);

    let told = "group 'tidegate.slow' lost ";
    let topics = workshop.ask(["topics"]).await;
    assert!(topics.contains(told), "{topics}");
    let _worker = workshop.start().await;
    eventually(SOON, "status and metrics", async || {
        let status = workshop.ask(["status"]).await;
        let metrics = http().get(workshop.url("/metrics")).send().await.unwrap().text().await.unwrap();
        let shown = metrics.lines().any(|line| line.starts_with("tidegate_log_lost_records{group=\"tidegate.slow\""));
        if status.contains(told) && shown { Ok(()) } else { Err(format!("{status}\n{metrics}")) }
    })
    .await;
}

#[tokio::test]
async fn a_new_changed_broken_and_removed_file_takes_effect_and_disturbs_no_other() {
    let shop = shop("folder").await;
    let worker = shop.workshop.start().await;
    let first = shop.capture("public.customers");
    shop.workshop.until_state(&first, "RUNNING").await;
    let second = format!("{first}_more");
    shop.workshop.capture(&second, "public.orders");
    shop.workshop.until_state(&second, "RUNNING").await;
    shop.until_records(&format!("{second}.public.orders"), 1).await;

    // Broken: the last good settings run on, and health says so.
    let file = format!("{second}.yaml");
    shop.workshop.connector(&file, &format!("name: {second}\ntype: postgres-source\ntopic.prefx: {second}\n"));
    let trouble = eventually(SOON, "health tells of the file", async || {
        let (status, health) = shop.workshop.get("/health/ready").await;
        (status == 503).then(|| health.to_string())
    })
    .await;
    assert!(trouble.contains(&file) && trouble.contains("topic.prefix"), "{trouble}");
    assert_eq!(shop.workshop.connector_status(&second).await["state"], "RUNNING");
    shop.database.execute("INSERT INTO orders VALUES (2, 1)").await;
    shop.until_records(&format!("{second}.public.orders"), 2).await;

    // Another identity under the same name: refused, with the command that migrates.
    shop.workshop.connector(
        &file,
        &format!("name: {second}\ntype: postgres-source\ntopic.prefix: other\ntable.include.list: public.orders\n"),
    );
    let trouble = eventually(SOON, "the new identity is refused", async || {
        let (_, health) = shop.workshop.get("/health/ready").await;
        let text = health.to_string();
        text.contains("migrate").then_some(text)
    })
    .await;
    assert!(trouble.contains("topic.prefix was"), "{trouble}");

    // Put right and changed: both tables now.
    shop.workshop.capture(&second, "public.orders, public.customers");
    eventually(SOON, "ready again", async || shop.workshop.get("/health/ready").await.0 == 200).await;
    // It is published from some moment on: write until a row comes.
    let mut id = 100;
    eventually(SOON, "the added table is captured", async || {
        id += 1;
        shop.database.execute(&format!("INSERT INTO customers VALUES ({id}, 'Grace')")).await;
        let records = shop.workshop.consume(&format!("{second}.public.customers")).await;
        records.iter().any(|record| record["value"]["after"]["name"] == "Grace")
    })
    .await;

    // Removed: stopped, its slot told of as orphaned.
    shop.workshop.remove(&file);
    eventually(SOON, "the connector is gone", async || {
        shop.workshop.connector_status(&second).await.get("error").is_some()
    })
    .await;
    eventually(SOON, "the orphan is told of", async || {
        let (_, status) = shop.workshop.get("/status").await;
        status["orphans"][0]["name"] == second.as_str()
    })
    .await;
    assert!(worker.log().contains("orphaned"), "{}", worker.log());

    // The first one never noticed.
    assert_eq!(shop.workshop.connector_status(&first).await["state"], "RUNNING");
    let log = worker.log();
    assert_eq!(
        log.lines()
            .filter(|line| line.contains(&format!("connector=\"{first}\"")))
            .filter(|line| line.contains("restart"))
            .count(),
        0
    );

    // Forgetting it drops its slot.
    let said = shop.workshop.ask(["connectors", "forget", &second]).await;
    assert!(said.contains("forgotten"), "{said}");
    let client = shop.database.connect_as_superuser().await;
    let slot = format!("tidegate_{second}");
    let left = client.query("SELECT FROM pg_replication_slots WHERE slot_name = $1", &[&slot]).await.unwrap();
    assert!(left.is_empty(), "the slot is still there");
}

#[tokio::test]
async fn a_pause_survives_a_restart_and_what_happened_meanwhile_arrives_after_it() {
    let shop = shop("pause").await;
    let name = shop.capture("public.customers");
    let topic = format!("{name}.public.customers");
    let worker = shop.workshop.start().await;
    shop.workshop.until_state(&name, "RUNNING").await;
    shop.until_records(&topic, 1).await;
    shop.workshop.ask(["connectors", "pause", &name]).await;
    shop.workshop.until_state(&name, "PAUSED").await;
    assert_eq!(shop.workshop.get("/health/ready").await.0, 200, "a pause is no trouble");
    shop.database.execute("INSERT INTO customers VALUES (2, 'Grace')").await;
    worker.signal("TERM");
    assert_eq!(worker.wait(SOON).await, 0);

    let _worker = shop.workshop.start().await;
    shop.workshop.until_state(&name, "PAUSED").await;
    assert_eq!(shop.workshop.consume(&topic).await.len(), 1);
    shop.workshop.ask(["connectors", "resume", &name]).await;
    let records = shop.until_records(&topic, 2).await;
    assert_eq!(records[1]["value"]["after"]["name"], "Grace");
}

#[tokio::test]
async fn a_signal_drains_and_the_next_start_goes_on_without_a_gap_or_a_double() {
    let shop = shop("drain").await;
    let name = shop.capture("public.customers");
    let topic = format!("{name}.public.customers");
    let mut next = 2;
    for _ in 0..3 {
        let worker = shop.workshop.start().await;
        shop.workshop.until_state(&name, "RUNNING").await;
        for _ in 0..20 {
            shop.database.execute(&format!("INSERT INTO customers VALUES ({next}, 'n{next}')")).await;
            next += 1;
        }
        worker.signal("TERM");
        assert_eq!(worker.wait(SOON).await, 0, "{}", worker.log_end(20));
    }
    let _worker = shop.workshop.start().await;
    let records = shop.until_records(&topic, next - 1).await;
    let ids: Vec<i64> = records.iter().map(|record| record["key"]["id"].as_i64().unwrap()).collect();
    assert_eq!(ids, (1..next as i64).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_connector_that_fails_leaves_the_others_running_and_health_names_it() {
    let shop = shop("poison").await;
    let good = shop.capture("public.customers");
    let bad = format!("{good}_bad");
    shop.workshop.connector(
        "bad.yaml",
        &format!(
            "name: {bad}\ntype: postgres-source\ntopic.prefix: {bad}\ntable.include.list: public.customers\n\
             publication.name: nowhere\npublication.autocreate.mode: disabled\n"
        ),
    );
    let _worker = shop.workshop.start().await;
    shop.workshop.until_state(&bad, "FAILED").await;
    let (status, health) = shop.workshop.get("/health/ready").await;
    assert_eq!(status, 503);
    assert_eq!(health["troubles"][0]["what"], bad.as_str());
    assert!(health["troubles"][0]["message"].as_str().unwrap().contains("nowhere"), "{health}");
    shop.workshop.until_state(&good, "RUNNING").await;
    shop.database.execute("INSERT INTO customers VALUES (2, 'Grace')").await;
    shop.until_records(&format!("{good}.public.customers"), 2).await;
    let output = shop.workshop.cli(["status"]).await;
    assert_eq!(output.status.code(), Some(5), "status ends with what is not well");
    assert!(String::from_utf8_lossy(&output.stdout).contains("FAILED"));
}

#[tokio::test]
async fn a_second_worker_of_the_same_folder_is_refused() {
    let shop = shop("second").await;
    let _worker = shop.workshop.start().await;
    let second = shop.workshop.launch();
    assert_ne!(second.wait(SOON).await, 0);
    assert!(second.log().contains("another worker"), "{}", second.log());
}

#[tokio::test]
async fn metrics_and_status_tell_of_what_went_through() {
    let shop = shop("metrics").await;
    let name = shop.capture("public.customers");
    let _worker = shop.workshop.start().await;
    shop.workshop.until_state(&name, "RUNNING").await;
    shop.until_records(&format!("{name}.public.customers"), 1).await;
    let applied = format!("tidegate_records_total{{connector=\"{name}\",result=\"applied\"}} 1");
    let state = format!("tidegate_connector_state{{connector=\"{name}\",state=\"RUNNING\"}} 1");
    eventually(SOON, "the metrics", async || {
        let text =
            crate::support::http().get(shop.workshop.url("/metrics")).send().await.unwrap().text().await.unwrap();
        if text.contains(&applied) && text.contains(&state) { Ok(()) } else { Err(text) }
    })
    .await;
    let table = shop.workshop.ask(["status"]).await;
    assert!(table.contains(&name) && table.contains("RUNNING"), "{table}");
    let json: Value = serde_json::from_str(&shop.workshop.ask(["status", "--output", "json"]).await).unwrap();
    assert_eq!(json["connectors"][0]["applied"], 1);
}
