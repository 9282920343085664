//! A table that can't be written is left out by itself: its neighbours are captured whole, nothing is passed over
//! without a word, and when it is put right it is read anew, with no gap and no overlap.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate::event::Quarantine;
use tidegate::postgres::table_filter::pattern;
use tidegate::registry::{BuiltinRegistry, CompatibilityLevel};

use crate::support::capture::{Running, World, confirmed, letters, wait_for_equality};
use crate::support::{Office, Postgres, Version, WorkerLog, eventually, http};

const SOON: Duration = Duration::from_secs(60);

/// Names of the tables that the capture says are in quarantine.
fn told(capture: &Running) -> Vec<String> {
    let facts = capture.status.facts();
    let all = facts.get("quarantined").and_then(Value::as_array).cloned().unwrap_or_default();
    all.iter().map(|of| of["table"].as_str().unwrap().to_owned()).collect()
}

async fn until_told(capture: &Running, tables: &[&str]) {
    eventually(SOON, &format!("{tables:?} in quarantine"), async || {
        let seen = told(capture);
        if seen == tables { Ok(()) } else { Err(format!("{seen:?}, {:?}", capture.status.last_error())) }
    })
    .await;
}

/// What a stopped capture has stored.
async fn stored(world: &World) -> BTreeMap<String, Quarantine> {
    world.position().await.unwrap().quarantined
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_row_in_the_middle_of_a_transaction_leaves_out_its_table_alone_until_it_is_read_anew() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("middle").await;
        database
            .execute(
                "CREATE TABLE a (id int PRIMARY KEY, n numeric(4,0)); CREATE TABLE b (id int PRIMARY KEY); \
                 INSERT INTO a VALUES (1, 1), (2, 2)",
            )
            .await;
        let (world, capture) = World::streaming(&database, &[r"public\.[ab]"]).await;
        let client = database.connect().await;
        client
            .batch_execute(
                "BEGIN; INSERT INTO a VALUES (3, 3); INSERT INTO b VALUES (1); INSERT INTO a VALUES (4, 'NaN'); \
                 INSERT INTO b VALUES (2); INSERT INTO a VALUES (5, 5); UPDATE a SET n = 9 WHERE id = 1; \
                 DELETE FROM a WHERE id = 2; UPDATE a SET id = 30 WHERE id = 3; INSERT INTO b VALUES (3); COMMIT",
            )
            .await
            .unwrap();
        until_told(&capture, &["public.a"]).await;
        assert_eq!(letters(&world.wait_for_changes("shop.public.b", 3).await), "ccc", "all of the transaction");
        let changes = world.changes("shop.public.a").await;
        assert_eq!(letters(&changes), "rrcdd", "what was before, and keys that are gone");
        assert_eq!((&changes[3].key, &changes[4].key), (&json!({"id": 2}), &json!({"id": 3})));
        let reason = capture.status.facts()["quarantined"][0]["reason"].to_string();
        assert!(reason.contains("public.a.n") && reason.contains("NaN") && reason.contains("hint"), "{reason}");

        // The slot is told of it, and neither a crash nor a start stops over it or tries again.
        let end = "SELECT pg_current_wal_lsn()::text";
        let end = client.query_one(end, &[]).await.unwrap().get::<_, String>(0).parse().unwrap();
        client.batch_execute("INSERT INTO b VALUES (4)").await.unwrap();
        eventually(SOON, "it is confirmed", async || confirmed(&client, &world).await >= end).await;
        capture.crash().await;
        let quarantine = stored(&world).await;
        assert!(quarantine["public.a"].since < end, "{quarantine:?}");
        client.batch_execute("INSERT INTO a VALUES (6, 6); INSERT INTO b VALUES (5)").await.unwrap();
        let capture = world.start_streaming().await;
        until_told(&capture, &["public.a"]).await;
        client.batch_execute("INSERT INTO a VALUES (7, 7); DELETE FROM a WHERE id = 5").await.unwrap();
        client.batch_execute("INSERT INTO b VALUES (6)").await.unwrap();
        assert_eq!(letters(&world.wait_for_changes("shop.public.b", 6).await), "cccccc", "each once");
        assert_eq!(letters(&world.changes("shop.public.a").await), "rrcddd", "only what is gone");
        capture.stop().await.unwrap();
        assert_eq!(stored(&world).await["public.a"].since, quarantine["public.a"].since);

        // Not put right: tried once more, and left out again; the others go on.
        let capture = world.start_releasing().await;
        capture.streaming().await;
        until_told(&capture, &["public.a"]).await;
        client.batch_execute("INSERT INTO a VALUES (8, 8); INSERT INTO b VALUES (7)").await.unwrap();
        assert_eq!(letters(&world.wait_for_changes("shop.public.b", 7).await), "ccccccc");
        let before = world.changes("shop.public.a").await;
        client.batch_execute("UPDATE a SET n = 4 WHERE id = 4; INSERT INTO b VALUES (8)").await.unwrap();
        world.wait_for_changes("shop.public.b", 8).await;
        assert_eq!(world.changes("shop.public.a").await.len(), before.len(), "it was read once, up to the bad row");
        assert!(letters(&before).starts_with("rrcddd"), "{}", letters(&before));
        capture.stop().await.unwrap();

        // Put right, with changes that wait for the capture, and others behind them.
        client.batch_execute("INSERT INTO a VALUES (9, 9); INSERT INTO b VALUES (9)").await.unwrap();
        let capture = world.start_releasing().await;
        until_told(&capture, &[]).await;
        capture.streaming().await;
        client.batch_execute("INSERT INTO a VALUES (10, 10); INSERT INTO b VALUES (10)").await.unwrap();
        wait_for_equality(&world, &client, "a").await;
        wait_for_equality(&world, &client, "b").await;
        let anew = letters(&world.changes("shop.public.a").await)[before.len()..].to_owned();
        assert_eq!(anew, "rrrrrrrc", "each row once, then the stream");
        assert_eq!(letters(&world.changes("shop.public.b").await), "c".repeat(10), "and b no row twice");
        capture.stop().await.unwrap();
        assert_eq!(stored(&world).await, BTreeMap::new());
        let slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()";
        eventually(SOON, "the slot beside is gone", async || {
            client.query_one(slots, &[]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_in_the_middle_of_the_transaction_keeps_the_quarantine_where_it_was() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("quarantine_crash").await;
    database
        .execute("CREATE TABLE a (id int PRIMARY KEY, n numeric(4,0)); CREATE TABLE b (id int PRIMARY KEY, v text)")
        .await;
    let mut world = World::new(&database, &[r"public\.[ab]"]);
    world.settings.batch_bytes = 2000;
    let capture = world.start_streaming().await;
    let client = database.connect().await;
    client
        .batch_execute(
            "BEGIN; INSERT INTO a SELECT i, i FROM generate_series(1, 50) i; INSERT INTO a VALUES (51, 'NaN'); \
             INSERT INTO b SELECT i, repeat('x', 100) FROM generate_series(1, 20000) i; INSERT INTO a VALUES (52, 52); \
             COMMIT",
        )
        .await
        .unwrap();
    let deadline = Instant::now() + SOON;
    while capture.status.counts().applied <= 100 {
        assert!(Instant::now() < deadline, "{:?}", capture.status.last_error());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    capture.crash().await;
    let position = world.position().await.unwrap();
    assert!(position.ordinal > 51 && position.quarantined.contains_key("public.a"), "{position:?}");
    let capture = world.start_streaming().await;
    until_told(&capture, &["public.a"]).await;
    wait_for_equality(&world, &client, "b").await;
    assert_eq!(world.changes("shop.public.b").await.len(), 20_000, "each once");
    assert_eq!(letters(&world.changes("shop.public.a").await), "c".repeat(50), "what was before it, once");
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_with_a_bad_row_reads_the_other_tables_whole() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("bad").await;
        // Read in the order of their names: the first and the last have a bad row.
        database
            .execute(
                "CREATE TABLE a (id int PRIMARY KEY, n numeric(4,0)); INSERT INTO a VALUES (1, 1), (2, 'NaN'), (3, 3); \
                 CREATE TABLE b (id int PRIMARY KEY); INSERT INTO b SELECT generate_series(1, 1000); \
                 CREATE TABLE c (id int PRIMARY KEY, n numeric(4,0)); INSERT INTO c VALUES (1, 'NaN')",
            )
            .await;
        let (world, capture) = World::streaming(&database, &[r"public\.[abc]"]).await;
        until_told(&capture, &["public.a", "public.c"]).await;
        let client = database.connect().await;
        client
            .batch_execute("INSERT INTO a VALUES (4, 4); DELETE FROM a WHERE id = 1; INSERT INTO b VALUES (2000)")
            .await
            .unwrap();
        wait_for_equality(&world, &client, "b").await;
        assert_eq!(letters(&world.changes("shop.public.b").await), "r".repeat(1000) + "c");
        assert_eq!(letters(&world.changes("shop.public.a").await), "rd");
        assert_eq!(world.changes("shop.public.c").await.len(), 0);
        capture.stop().await.unwrap();
        client.batch_execute("UPDATE a SET n = 2 WHERE id = 2").await.unwrap();
        // One is put right, the other is not.
        let capture = world.start_releasing().await;
        until_told(&capture, &["public.c"]).await;
        capture.streaming().await;
        client.batch_execute("INSERT INTO a VALUES (5, 5); INSERT INTO b VALUES (2001)").await.unwrap();
        wait_for_equality(&world, &client, "a").await;
        wait_for_equality(&world, &client, "b").await;
        assert_eq!(letters(&world.changes("shop.public.a").await), "rdrrrc");
        assert_eq!(letters(&world.changes("shop.public.b").await), "r".repeat(1000) + "cc", "not read again");
        capture.stop().await.unwrap();
        // Other settings are a reason to try again.
        let mut world = world;
        world.settings.encoding.columns.exclude.push(pattern(r"public\.c\.n").unwrap());
        let capture = world.start().await;
        until_told(&capture, &[]).await;
        assert_eq!(letters(&world.wait_for_changes("shop.public.c", 1).await), "r");
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_the_registry_refuses_leaves_out_its_table_alone() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("refuses").await;
    database.execute("CREATE TABLE a (id int PRIMARY KEY, n int NOT NULL); CREATE TABLE b (id int PRIMARY KEY)").await;
    let folder = tempfile::tempdir().unwrap();
    let registry = BuiltinRegistry::open(folder.path()).unwrap();
    let world = World::with_registry(&database, &[r"public\.[ab]"], Arc::new(registry.clone()));
    let capture = world.start_streaming().await;
    let level = |level| registry.set_level(Some("shop.public.a-value"), level).unwrap();
    level(CompatibilityLevel::Backward);
    let client = database.connect().await;
    client.batch_execute("INSERT INTO a VALUES (1, 1); ALTER TABLE a ALTER n TYPE text").await.unwrap();
    client
        .batch_execute(
            "BEGIN; INSERT INTO b VALUES (1); INSERT INTO a VALUES (2, '2'); INSERT INTO b VALUES (2); COMMIT",
        )
        .await
        .unwrap();
    until_told(&capture, &["public.a"]).await;
    let reason = capture.status.facts()["quarantined"][0]["reason"].to_string();
    assert!(["shop.public.a-value", "refuses", "new-subject"].iter().all(|part| reason.contains(part)), "{reason}");
    assert_eq!(letters(&world.wait_for_changes("shop.public.b", 2).await), "cc");
    assert_eq!(letters(&world.changes("shop.public.a").await), "c");
    capture.stop().await.unwrap();

    // A shape that is refused still, in rows from before it was put right, is no reason to leave it out again.
    client.batch_execute("INSERT INTO a VALUES (3, '3'); INSERT INTO b VALUES (3)").await.unwrap();
    client.batch_execute("ALTER TABLE a ALTER n TYPE int USING n::int; INSERT INTO a VALUES (4, 4)").await.unwrap();
    let capture = world.start_releasing().await;
    until_told(&capture, &[]).await;
    capture.streaming().await;
    client.batch_execute("INSERT INTO a VALUES (5, 5); INSERT INTO b VALUES (4)").await.unwrap();
    wait_for_equality(&world, &client, "a").await;
    wait_for_equality(&world, &client, "b").await;
    assert_eq!(letters(&world.changes("shop.public.a").await), "crrrrc");
    assert_eq!(told(&capture), Vec::<String>::new());

    // Or the registry gives way.
    client.batch_execute("ALTER TABLE a ALTER n TYPE text; INSERT INTO a VALUES (6, 'six')").await.unwrap();
    until_told(&capture, &["public.a"]).await;
    level(CompatibilityLevel::None);
    capture.stop().await.unwrap();
    let capture = world.start_releasing().await;
    until_told(&capture, &[]).await;
    client.batch_execute("INSERT INTO a VALUES (7, 'seven')").await.unwrap();
    wait_for_equality(&world, &client, "a").await;
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_with_a_table_in_quarantine_is_not_ready_until_a_restart_has_read_it_anew() {
    let office = Office::open("quarantined", WorkerLog::Embedded, "").await;
    let (capture, database) = (office.capture.as_str(), &office.database);
    database
        .execute("CREATE TABLE prices (id int PRIMARY KEY, n numeric(4,0)); INSERT INTO prices VALUES (1, 1)")
        .await;
    office.workshop.capture(capture, "public.(customers|prices)");
    let gauge = format!("tidegate_capture_quarantined{{connector=\"{capture}\",table=\"public.prices\"}} ");
    let measured = async |value: &str| {
        let line = format!("{gauge}{value}");
        eventually(SOON, &line, async || {
            let text = http().get(office.workshop.url("/metrics")).send().await.unwrap().text().await.unwrap();
            if text.contains(&line) { Ok(()) } else { Err(text) }
        })
        .await;
    };
    let worker = office.workshop.start().await;
    office.workshop.until_state(capture, "RUNNING").await;
    office.until_ready().await;
    database.execute("INSERT INTO prices VALUES (2, 'NaN')").await;
    let restart = format!("tidegate connectors restart {capture}");
    office.until_not_ready(&[capture, "public.prices", "quarantine", "NaN", &restart]).await;
    measured("1").await;
    let status = office.workshop.connector_status(capture).await;
    assert_eq!(
        (&status["state"], &status["facts"]["quarantined"][0]["table"]),
        (&json!("RUNNING"), &json!("public.prices"))
    );
    let shown = office.workshop.cli(["status"]).await;
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.status.code() == Some(5) && text.contains("public.prices is in quarantine since"), "{text}");

    // The other table goes on. So it does when the process is another, which says the same.
    database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    office.until_captured(3).await;
    worker.signal("KILL");
    drop(worker);
    let worker = office.workshop.start().await;
    database.execute("INSERT INTO customers VALUES (4, 'Dan'); UPDATE prices SET n = 2 WHERE id = 2").await;
    office.until_captured(4).await;
    office.until_not_ready(&[capture, "public.prices", &restart]).await;
    measured("1").await;

    office.workshop.ask(["connectors", "restart", capture]).await;
    office.until_ready().await;
    measured("0").await;
    database.execute("INSERT INTO prices VALUES (3, 3)").await;
    let topic = format!("{capture}.public.prices");
    eventually(SOON, "each price once more, then the stream", async || {
        let seen: Vec<_> =
            office.workshop.consume(&topic).await.iter().map(|event| event["value"]["op"].clone()).collect();
        if seen == ["r", "r", "r", "c"] { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
    office.until_captured(4).await;
    drop(worker);
}
