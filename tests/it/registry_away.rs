//! The schema registry as seen by a capture: away, back, and of another mind than the table.

use std::sync::Arc;

use serde_json::{Value, json};
use tidegate::avro::split_wire;
use tidegate::registry::BuiltinRegistry;
use tidegate::registry::{Registry, RegistryAuth, RegistryClient, SchemaId};
use tidegate::sources::postgres::OnIncompatible;

use crate::support::capture::World;
use crate::support::{Database, Fault, Office, Postgres, Proxy, Script, Version, WorkerLog, Workshop, http};

/// A worker that only keeps the registry.
fn registry(database: &Database<'_>) -> (Workshop, Arc<dyn Registry>) {
    let keeper = Workshop::new(&database.url(), WorkerLog::Embedded, "");
    let client = RegistryClient::new(&keeper.url(""), RegistryAuth::None).unwrap();
    (keeper, Arc::new(client))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_away_at_the_start_or_later_pauses_the_capture_and_loses_nothing() {
    let server = Postgres::shared(Version::Newest).await;
    let (database, of_keeper) = (server.database("away").await, server.database("keeper").await);
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let (keeper, client) = registry(&of_keeper);
    let world = World::with_registry(&database, &[r"public\.t"], client);
    let capture = world.start().await;
    capture.error("registry is unavailable").await;
    database.execute("INSERT INTO t VALUES (2)").await;

    let worker = keeper.start().await;
    capture.streaming().await;
    world.wait_for_changes("shop.public.t", 2).await;

    worker.kill9().await;
    database.execute("INSERT INTO t VALUES (3); ALTER TABLE t ADD v text; INSERT INTO t VALUES (4, 'x')").await;
    capture.error("registry is unavailable").await;
    database.execute("INSERT INTO t VALUES (5, 'y')").await;
    let _worker = keeper.start().await;
    let changes = world.wait_for_changes("shop.public.t", 5).await;
    let ids: Vec<_> = changes.iter().map(|change| change.key["id"].as_i64().unwrap()).collect();
    assert_eq!(ids, [1, 2, 3, 4, 5], "each once, in order");
    assert_eq!(changes[3].after, json!({"id": 4, "v": "x"}));
    capture.stop().await.unwrap();
}

async fn set_level(keeper: &Workshop, subject: &str, level: &str) {
    let body = json!({ "compatibility": level }).to_string();
    let request = http().put(keeper.url(&format!("/config/{subject}")));
    let request = request.header("content-type", "application/json").body(body);
    request.send().await.unwrap().error_for_status().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_the_registry_refuses_stops_the_capture_by_name_or_gets_another_subject() {
    let server = Postgres::shared(Version::Distribution).await;
    for incompatible in [OnIncompatible::Stop, OnIncompatible::NewSubject] {
        let (database, of_keeper) = (server.database("refused").await, server.database("keeper").await);
        database.execute("CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL)").await;
        let (keeper, client) = registry(&of_keeper);
        let _worker = keeper.start().await;
        let mut world = World::with_registry(&database, &[r"public\.t"], client.clone());
        world.settings.incompatible = incompatible;
        let capture = world.start_streaming().await;
        set_level(&keeper, "shop.public.t-value", "BACKWARD").await;
        database
            .execute(
                "INSERT INTO t VALUES (1, 1); ALTER TABLE t ALTER n TYPE text; INSERT INTO t VALUES (2, 'x'); \
                 ALTER TABLE t ALTER n TYPE varchar(9); INSERT INTO t VALUES (3, 'y')",
            )
            .await;
        let capture = match incompatible {
            OnIncompatible::NewSubject | OnIncompatible::Quarantine => capture,
            OnIncompatible::Stop => {
                let fault = capture.ended().await.unwrap_err().message;
                let told = ["shop.public.t-value", "public.t", "keeps", "of WAL", "max_slot_wal_keep_size", "hint"];
                assert!(told.iter().all(|part| fault.contains(part)), "{fault}");
                set_level(&keeper, "shop.public.t-value", "NONE").await;
                world.start().await
            }
        };
        let changes = world.wait_for_changes("shop.public.t", 3).await;
        let values: Vec<_> = changes.iter().map(|change| change.after["n"].clone()).collect();
        assert_eq!(values, [json!(1), json!("x"), json!("y")]);
        capture.stop().await.unwrap();
        let subjects: Value = http().get(keeper.url("/subjects")).send().await.unwrap().json().await.unwrap();
        let other = subjects.as_array().unwrap().contains(&json!("shop.public.t-value-v2"));
        assert_eq!(other, incompatible == OnIncompatible::NewSubject, "{subjects}");
        let last = world.records("shop.public.t").await.pop().unwrap();
        let (id, _) = split_wire(last.value.as_deref().unwrap()).unwrap();
        assert!(client.schema(SchemaId(id)).await.unwrap().contains("\"string\""));
    }
}

/// Frozen, it takes connections and never answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_hangs_holds_up_no_stop() {
    let server = Postgres::shared(Version::Distribution).await;
    let (database, of_keeper) = (server.database("hangs").await, server.database("keeper").await);
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let (keeper, client) = registry(&of_keeper);
    let worker = keeper.start().await;
    let world = World::with_registry(&database, &[r"public\.t"], client);
    let capture = world.start_streaming().await;
    worker.signal("STOP");
    database.execute("ALTER TABLE t ADD v text; INSERT INTO t VALUES (1, 'x')").await;
    capture.stop().await.unwrap();
    worker.signal("CONT");
    let capture = world.start().await;
    world.wait_for_changes("shop.public.t", 1).await;
    capture.stop().await.unwrap();
}

/// What answers in the registry's place, or refuses the password while that is changed, is about no schema and no record.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_answered_for_by_others_pauses_its_connectors_and_parks_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let real = crate::registry::serve(&BuiltinRegistry::open(folder.path()).unwrap()).await;
    let proxy = Proxy::start(real.trim_start_matches("http://").parse().unwrap()).await;
    let answers = |status, body: &str| {
        proxy.clear();
        proxy.script(Script::any(Fault::Answer { status, headers: Vec::new(), body: body.to_owned() }));
    };
    let url = format!("schema.registry: {}", proxy.url());
    let office = Office::open("answered", WorkerLog::Embedded, &url).await;
    office.deliver("");
    answers(404, "<html>no such host here</html>");
    let worker = office.workshop.start().await;
    office.until_not_ready(&[&format!("\"{}\"", office.capture), "404", "no such host here", "hint"]).await;
    answers(401, "");
    office.until_not_ready(&[&format!("\"{}\"", office.capture), "401", "username"]).await;
    proxy.clear();
    office.until_delivered(&["Ada", "Grace"]).await;
    office.until_ready().await;

    // The sink alone: it has forgotten every schema, and the capture needs none.
    office.workshop.ask(["connectors", "pause", &office.sink]).await;
    office.workshop.until_state(&office.sink, "PAUSED").await;
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    office.until_captured(3).await;
    drop(worker);
    let worker = office.workshop.start().await;
    office.workshop.ask(["connectors", "pause", &office.capture]).await;
    office.workshop.until_state(&office.capture, "PAUSED").await;
    answers(200, "<html>please log in</html>");
    office.workshop.ask(["connectors", "resume", &office.sink]).await;
    office.until_not_ready(&[&format!("\"{}\"", office.sink), "please log in"]).await;
    answers(403, "");
    office.until_not_ready(&[&format!("\"{}\"", office.sink), "403"]).await;
    proxy.clear();
    office.workshop.ask(["connectors", "resume", &office.capture]).await;
    office.until_delivered(&["Ada", "Cid", "Grace"]).await;
    let health = office.until_ready().await;
    assert!(!health.to_string().contains("dead letter"), "{health}");
    drop(worker);
}
