//! Tables that change while rows of their earlier shape are still to be read: the catalog is newer than the WAL
//! (CORRECTNESS 7), and every event is what a capture would have written that had never been away.

use serde_json::Value;
use tidegate::avro::split_wire;
use tidegate::log::ConsumedRecord;
use tidegate::registry::SchemaId;

use crate::support::capture::World;
use crate::support::{Database, Postgres, Version};

/// Schema and content of each record's key and value, without what differs from run to run.
async fn events(world: &World, topic: &str) -> Vec<String> {
    let mut events = Vec::new();
    for (record, (key, mut value)) in world.records(topic).await.into_iter().zip(world.raw(topic).await) {
        let mut schemas = Vec::new();
        for wire in [&record.key, &record.value].into_iter().flatten() {
            let (id, _) = split_wire(wire).unwrap();
            schemas.push(world.registry.schema(SchemaId(id)).await.unwrap());
        }
        if let Value::Object(value) = &mut value {
            value.retain(|name, _| !name.starts_with("ts_") && name != "source");
        }
        events.push(format!("{key} {value} {schemas:?}"));
    }
    events
}

/// Two captures of the same rows: one that stays, one that is away meanwhile.
struct Pair {
    stays: World,
    goes: World,
}

impl Pair {
    fn new(database: &Database<'_>) -> Self {
        let (stays, mut goes) = (World::new(database, &[r"public\..*"]), World::new(database, &[r"public\..*"]));
        goes.settings.slot += "_goes";
        Pair { stays, goes }
    }

    /// Runs each step; the one that stays has seen all of a step before the next. Then lets the other come back.
    async fn compare(&self, database: &Database<'_>, table: &str, before: &[&str], away: &[&str]) {
        let topic = format!("shop.public.{table}");
        let (stays, goes) = (self.stays.start().await, self.goes.start().await);
        stays.streaming().await;
        goes.streaming().await;
        let client = database.connect().await;
        let mut count = 0;
        let mut step = async |sql: &str| {
            client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
            count += sql.matches("INSERT").count();
            self.stays.wait_for_changes(&topic, count).await;
            count
        };
        let mut seen = 0;
        for sql in before {
            seen = step(sql).await;
        }
        self.goes.wait_for_changes(&topic, seen).await;
        goes.stop().await.unwrap();
        for sql in away {
            seen = step(sql).await;
        }
        stays.stop().await.unwrap();
        let goes = self.goes.start().await;
        self.goes.wait_for_changes(&topic, seen).await;
        goes.stop().await.unwrap();
        let (want, have) = (events(&self.stays, &topic).await, events(&self.goes, &topic).await);
        for (at, (want, have)) in want.iter().zip(&have).enumerate() {
            assert_eq!(have, want, "event {at} of {topic}");
        }
        assert_eq!(have.len(), want.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_is_written_as_if_the_capture_had_never_been_away() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("backlog").await;
        database
            .execute(
                "CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN short AS varchar(20); \
                 CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL DEFAULT 3, b text DEFAULT 'x', m mood NOT NULL, \
                 s short, z int NOT NULL DEFAULT 9)",
            )
            .await;
        let insert = "INSERT INTO t (id, m) SELECT coalesce(max(id), 0) + 1, 'sad' FROM t";
        let steps = [
            insert,
            // The rest of the backlog is of other shapes; this row is of the first.
            insert,
            "ALTER TABLE t ADD c int NOT NULL DEFAULT 5",
            insert,
            "ALTER TABLE t DROP a",
            insert,
            "ALTER TABLE t RENAME b TO bb",
            insert,
            "ALTER TABLE t ALTER c TYPE bigint",
            insert,
            "ALTER TABLE t ALTER s TYPE text",
            insert,
        ];
        Pair::new(&database).compare(&database, "t", &steps[..1], &steps[1..]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_wal_does_not_tell_is_the_catalogs_when_the_backlog_is_over() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("hidden").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY, n int DEFAULT 1)").await;
    let (world, capture) = World::streaming(&database, &[r"public\.t"]).await;
    database.execute("INSERT INTO t VALUES (1)").await;
    world.wait_for_changes("shop.public.t", 1).await;
    capture.stop().await.unwrap();
    database.execute("INSERT INTO t VALUES (2); ALTER TABLE t ALTER n SET DEFAULT 7, ALTER n SET NOT NULL").await;
    let capture = world.start().await;
    world.wait_for_changes("shop.public.t", 2).await;
    database.execute("INSERT INTO t VALUES (3)").await;
    world.wait_for_changes("shop.public.t", 3).await;
    capture.stop().await.unwrap();
    let mut defaults = Vec::new();
    for record in world.records("shop.public.t").await {
        let (id, _) = split_wire(record.value.as_deref().unwrap()).unwrap();
        let schema: Value = serde_json::from_str(&world.registry.schema(SchemaId(id)).await.unwrap()).unwrap();
        let row = &schema["fields"][0]["type"][1]["fields"][1];
        defaults.push((row["default"].as_i64(), row["type"].is_array()));
    }
    assert_eq!(defaults, [(Some(1), true), (Some(1), true), (Some(7), false)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_was_dropped_meanwhile_loses_no_row() {
    let server = Postgres::shared(Version::Newest).await;
    let database = server.database("dropped").await;
    database
        .execute(
            "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id); \
             CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)",
        )
        .await;
    let (world, capture) = World::streaming(&database, &[r"public\.p"]).await;
    capture.stop().await.unwrap();
    database
        .execute(
            "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20); INSERT INTO p VALUES (1), (11); \
             DROP TABLE p1; DROP TABLE p2",
        )
        .await;
    let capture = world.start().await;
    world.wait_for_changes("shop.public.p1", 1).await;
    world.wait_for_changes("shop.public.p2", 1).await;
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shape_is_written_down_once_and_with_the_rows_that_have_it() {
    let server = Postgres::shared(Version::Newest).await;
    let database = server.database("shapes").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let world = World::new(&database, &[r"public\.t"]);
    for round in 2..5 {
        let capture = world.start_streaming().await;
        database.execute(&format!("INSERT INTO t VALUES ({round})")).await;
        database.execute("VACUUM FULL t").await;
        world.wait_for_changes("shop.public.t", round).await;
        capture.stop().await.unwrap();
    }
    let capture = world.start_streaming().await;
    database.execute("ALTER TABLE t ADD v text; INSERT INTO t VALUES (9, 'x')").await;
    world.wait_for_changes("shop.public.t", 5).await;
    capture.stop().await.unwrap();
    let records = world.records("tidegate.schemas.capture").await;
    let shape =
        |record: &ConsumedRecord| -> Value { serde_json::from_slice(record.value.as_deref().unwrap()).unwrap() };
    let shapes: Vec<Value> = records.iter().map(shape).collect();
    let columns: Vec<usize> = shapes.iter().map(|shape| shape["table"]["columns"].as_array().unwrap().len()).collect();
    assert_eq!(columns, [1, 2], "{shapes:#?}");
}
