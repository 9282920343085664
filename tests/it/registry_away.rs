//! The schema registry as seen by a capture: away, back, and of another mind than the table.

use std::sync::Arc;

use serde_json::{Value, json};
use tidegate::avro::split_wire;
use tidegate::registry::{Registry, RegistryAuth, RegistryClient, SchemaId};
use tidegate::sources::postgres::OnIncompatible;

use crate::support::capture::World;
use crate::support::{Database, Postgres, Version, WorkerLog, Workshop, http};

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
            OnIncompatible::NewSubject => capture,
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
