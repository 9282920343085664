//! The whole worker, from the WAL through the log to a real ERP behind a fault proxy: nothing lost, nothing doubled,
//! order per key kept, on both logs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::delivery::{CUSTOMERS, behind_proxy, erp_file, parties};
use crate::support::{
    Fault, Kafka, Postgres, Process, Proxy, Script, Tryton, Version, WorkerLog, Workshop, eventually,
};

const LONG: Duration = Duration::from_secs(120);

const TABLES: &str =
    "CREATE TABLE customers (id bigint PRIMARY KEY, name text, street text, city text, price numeric(10,2));";

const PULL: &str = r#"
name: parties
type: http-pull
system: erp
object: party
every: 500ms
request: GET /party.party
params: { f: [code, name], d: '{{ [["code", "like", "C%"]] | q }}' }
into: public.customers
insert: false
map: '{ name }'
"#;

/// A database, a worker that captures it into a log, and an ERP behind a proxy.
pub struct World {
    pub tryton: Tryton,
    pub proxy: Proxy,
    /// Of the database.
    pub url: String,
    pub sql: tokio_postgres::Client,
    pub workshop: Workshop,
    /// Of topics, and of the capture.
    pub prefix: String,
}

impl World {
    pub async fn new(name: &str, log: WorkerLog<'_>) -> World {
        let tryton = Tryton::start().await;
        let proxy = behind_proxy(&tryton).await;
        let database = Postgres::shared(Version::Distribution).await.database(name).await;
        database.execute(TABLES).await;
        let sql = database.connect().await;
        let workshop = Workshop::new(&database.url(), log, &systems(&tryton, &proxy));
        let prefix = database.name.clone();
        World { tryton, proxy, url: database.url(), sql, workshop, prefix }
    }

    /// The sink of customers, in this workshop or another.
    pub fn sink(&self) -> String {
        format!(
            "name: customers\ntype: http-sink\nsystem: erp\nerrors.retry.count: 20{}",
            CUSTOMERS.replace("shop.", &format!("{}.", self.prefix))
        )
    }

    pub async fn start(&self) -> Process {
        let capture = format!(
            "name: {0}\ntype: postgres-source\ntopic.prefix: {0}\ntable.include.list: public.customers\n\
             topic.creation.default.partitions: 4\n",
            self.prefix
        );
        self.workshop.connector("capture.yaml", &capture);
        self.workshop.connector("customers.yaml", &self.sink());
        let worker = self.workshop.start().await;
        self.workshop.until_state(&self.prefix, "RUNNING").await;
        worker
    }

    pub async fn sql(&self, sql: &str) {
        self.sql.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// `code → name`, as parties have them.
    pub async fn rows(&self) -> Vec<(String, String)> {
        let rows = self.sql.query("SELECT 'C' || id, name FROM customers ORDER BY 1", &[]).await.unwrap();
        let mut rows: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        rows.sort();
        rows
    }

    pub async fn count(&self, sql: &str) -> i64 {
        self.sql.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Waits until both sides are equal and no request is under way, and holds that nothing was set aside.
    pub async fn equal(&self) {
        let made = "SELECT count(*) FROM pg_class WHERE oid = to_regclass('tidegate.parked')";
        eventually(LONG, "the sink has begun", async || self.count(made).await == 1).await;
        eventually(LONG, "the ERP has what the table has", async || {
            let open = self.count("SELECT count(*) FROM tidegate.links WHERE intent IS NOT NULL").await;
            let (rows, found) = (self.rows().await, parties(&self.tryton).await);
            let parked = self.parked().await;
            if rows == found && open == 0 && parked.is_empty() {
                return Ok(());
            }
            let differ: Vec<_> = rows.iter().filter(|row| !found.contains(row)).take(5).collect();
            Err(format!("{} rows, {} parties, {open} open, {differ:?}; parked {parked:?}", rows.len(), found.len()))
        })
        .await;
    }

    pub async fn parked(&self) -> Vec<(String, String)> {
        let rows = self.sql.query("SELECT key::text, reason FROM tidegate.parked ORDER BY seq", &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    pub async fn metric(&self, line: &str) -> Option<f64> {
        let text = crate::support::http().get(self.workshop.url("/metrics")).send().await.ok()?.text().await.ok()?;
        let found = text.lines().find(|found| found.starts_with(line))?;
        found.rsplit(' ').next()?.parse().ok()
    }

    /// State of the ERP's breaker, as /metrics has it.
    pub async fn breaker(&self) -> Option<&'static str> {
        for state in ["closed", "half-open", "open"] {
            let line = format!("tidegate_system_breaker_state{{system=\"erp\",state=\"{state}\"}}");
            if self.metric(&line).await == Some(1.0) {
                return Some(state);
            }
        }
        None
    }

    /// Versions (`name v7`) of each party in the order that the ERP got them.
    pub fn in_order(&self) {
        let mut seen: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for request in self.proxy.seen().iter().filter(|seen| seen.forwarded && seen.method != "GET") {
            let body: Value = serde_json::from_str(&request.body).unwrap_or_default();
            let Some((name, version)) = body["name"].as_str().and_then(|name| name.split_once(" v")) else { continue };
            seen.entry(name.to_owned()).or_default().push(version.parse().unwrap());
        }
        for (name, versions) in &seen {
            assert!(versions.is_sorted(), "{name}: {versions:?}");
        }
    }
}

pub fn systems(tryton: &Tryton, proxy: &Proxy) -> String {
    // Without a rule, a 500 is the record's fault or an outage, as the probe says, and is tried again.
    let file = erp_file(tryton, proxy);
    let file = file.split("errors:").next().unwrap();
    format!("systems:\n  erp:\n    {}", file.trim().replace('\n', "\n    "))
}

/// Every fault that there is: each some times for sure, then by chance.
fn storm(proxy: &Proxy) {
    for (times, fault) in [
        (2, Fault::LoseAnswer { hold: Duration::from_secs(6) }),
        (2, Fault::ResetAfter),
        (2, Fault::status(500)),
        (3, Fault::retry_after(429, 1)),
        (2, Fault::ResetBefore),
        (1, Fault::status(503)),
        (2, Fault::Delay(Duration::from_secs(3))),
    ] {
        for method in ["POST", "PUT"] {
            proxy.script(Script::on(method, "/party.party", fault.clone()).after(3).times(times));
        }
        proxy.script(Script::on("GET", "/party.party?f", fault).after(5).times(1));
    }
    proxy.script(Script::any(Fault::ResetAfter).chance(0.03).times(12));
    proxy.script(Script::any(Fault::status(500)).chance(0.03).times(12));
    proxy.script(Script::any(Fault::retry_after(429, 1)).chance(0.02).times(6));
    proxy.script(Script::any(Fault::Delay(Duration::from_millis(300))).chance(0.1));
}

/// Inserts and changes for a while, in transactions of several rows; each change raises the row's version.
pub async fn write(world: &World, seed: u64, go_on: impl Fn() -> bool, customers: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let (mut made, mut version) = (0, 0);
    while go_on() || made < customers {
        let mut sql = String::from("BEGIN;");
        for _ in 0..random.random_range(1..4) {
            version += 1;
            if made < customers {
                made += 1;
                sql += &format!("INSERT INTO customers VALUES ({made}, 'n{made} v{version}', 's', 'c', 1);");
            }
            let id = random.random_range(1..=made);
            sql += &format!("UPDATE customers SET name = 'n{id} v{version}' WHERE id = {id};");
        }
        world.sql(&(sql + "COMMIT")).await;
        tokio::time::sleep(Duration::from_millis(random.random_range(20..200))).await;
    }
}

async fn survives_the_storm(world: &World) {
    let worker = world.start().await;
    storm(&world.proxy);
    let start = Instant::now();
    write(world, 7, || start.elapsed() < Duration::from_secs(15), 40).await;
    world.equal().await;
    world.proxy.clear();
    world.sql("UPDATE customers SET name = name || '0' WHERE id <= 10").await;
    world.equal().await;
    world.in_order();
    assert_eq!(world.count("SELECT count(*) FROM tidegate.links WHERE external_id IS NOT NULL").await, 40);

    // What is pulled is tagged in the WAL, and comes back to the sink as an echo of which nothing is sent.
    world.workshop.connector("parties.yaml", PULL);
    world.workshop.until_state("parties", "RUNNING").await;
    let party = &world.tryton.erp.search("party.party", json!([["code", "=", "C7"]]), &["code"]).await[0]["id"];
    let sent = world.proxy.count("PUT", "");
    world.tryton.erp.put(&format!("party.party/{party}"), json!({"name": "from the erp v99999"})).await;
    eventually(LONG, "the name is pulled", async || {
        world.count("SELECT count(*) FROM customers WHERE name = 'from the erp v99999'").await == 1
    })
    .await;
    eventually(LONG, "the echo is skipped", async || {
        let echoes = world.metric("tidegate_sink_skipped_total{connector=\"customers\",reason=\"echo\"}").await;
        if echoes.is_some_and(|count| count >= 1.0) { Ok(()) } else { Err(format!("{echoes:?}")) }
    })
    .await;
    let events = world.workshop.consume(&format!("{}.public.customers", world.prefix)).await;
    let tagged = events.iter().filter(|event| event["value"]["source"]["origin"] == "erp").count();
    assert_eq!(tagged, 1, "one event carries the origin");
    assert_eq!(world.proxy.count("PUT", ""), sent);
    world.equal().await;
    worker.signal("TERM");
    assert_eq!(worker.wait(Duration::from_secs(40)).await, 0, "{}", worker.log_end(30));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_faults_loses_and_doubles_no_party_over_the_embedded_log() {
    let world = World::new("storm_embedded", WorkerLog::Embedded).await;
    survives_the_storm(&world).await;
}

#[cfg(feature = "kafka")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_faults_loses_and_doubles_no_party_over_kafka() {
    let kafka = Kafka::shared().await;
    let world = World::new("storm_kafka", WorkerLog::Kafka(&kafka.bootstrap())).await;
    survives_the_storm(&world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_shows_in_status_and_metrics_and_the_probe_sees_its_end() {
    let world = World::new("outage", WorkerLog::Embedded).await;
    let worker = world.start().await;
    world.sql("INSERT INTO customers SELECT i, 'n' || i || ' v1', 's', 'c', 1 FROM generate_series(1, 5) i").await;
    world.equal().await;
    assert_eq!(world.breaker().await, Some("closed"));

    world.tryton.stop().await;
    world.sql("INSERT INTO customers SELECT i, 'n' || i || ' v1', 's', 'c', 1 FROM generate_series(6, 12) i").await;
    world.workshop.until_state("customers", "WAITING").await;
    eventually(LONG, "the breaker shows", async || {
        let status = world.workshop.connector_status("customers").await;
        let shown = (world.breaker().await, status["facts"]["breaker"].clone());
        if shown == (Some("open"), json!("open")) { Ok(()) } else { Err(format!("{shown:?} {status}")) }
    })
    .await;
    let told = world.workshop.connector_status("customers").await["last_error"]["message"].clone();
    assert!(told.as_str().is_some_and(|told| told.contains("erp")), "{told}");
    let status = String::from_utf8(world.workshop.cli(["status"]).await.stdout).unwrap();
    assert!(status.contains("breaker is open"), "{status}");
    assert_eq!(world.workshop.get("/health/ready").await.0, 503);
    // Nothing but the probe is sent meanwhile; changes go on being captured.
    world.proxy.forget_seen();
    world
        .sql("UPDATE customers SET name = 'n3 v2' WHERE id = 3; UPDATE customers SET name = 'n3 v3' WHERE id = 3")
        .await;
    eventually(LONG, "probes", async || world.proxy.count("GET", "s=1") >= 2).await;
    assert_eq!(world.proxy.seen().len(), world.proxy.count("GET", "s=1"), "{:?}", world.proxy.seen());

    world.tryton.up().await;
    world.equal().await;
    world.in_order();
    world.workshop.until_state("customers", "RUNNING").await;
    eventually(LONG, "the breaker closes", async || {
        let status = world.workshop.connector_status("customers").await;
        let shown = (world.breaker().await, status["facts"]["breaker"].clone(), status["last_error"].clone());
        if shown == (Some("closed"), json!("closed"), Value::Null) { Ok(()) } else { Err(format!("{shown:?}")) }
    })
    .await;
    let third = format!(
        "/{}",
        world.count("SELECT external_id::bigint FROM tidegate.links WHERE local_key = '{\"id\": 3}'").await
    );
    assert_eq!(world.proxy.count("PUT", &third), 1, "changes made meanwhile are one request");
    worker.signal("TERM");
    assert_eq!(worker.wait(Duration::from_secs(40)).await, 0, "{}", worker.log_end(30));
}
