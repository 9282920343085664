//! Snapshots: whole whatever happens in between, and one with the stream that follows.

use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::Value;
use tidegate::event::Operation;
use tidegate::sources::postgres::SnapshotMode;

use crate::support::capture::{Running, World, letters, rows, wait_for_equality};
use crate::support::{Postgres, Version, eventually};

/// Waits until more than `rows` are in the log, and hardly longer.
async fn until_applied(capture: &Running, rows: u64) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while capture.status.counts().applied <= rows {
        assert!(Instant::now() < deadline, "{:?}", capture.status.last_error());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_snapshot_continues_with_the_tables_left_and_leaves_no_ghosts() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("killed").await;
        // Read in the order of their names.
        database
            .execute(
                "CREATE TABLE a_small (id int PRIMARY KEY, v text); \
                 INSERT INTO a_small SELECT i, 'first' FROM generate_series(1, 100) i; \
                 CREATE TABLE t (id int PRIMARY KEY, v text); \
                 INSERT INTO t SELECT i, repeat('x', 200) FROM generate_series(1, 100000) i; \
                 CREATE TABLE z_late (id int PRIMARY KEY); INSERT INTO z_late VALUES (1)",
            )
            .await;
        let world = World::new(&database, &[r"public\..*"]);
        let client = database.connect().await;
        let mut epoch = None;
        for round in 0..2 {
            let capture = world.start().await;
            until_applied(&capture, if round == 0 { 5_000 } else { 0 }).await;
            capture.crash().await;
            let position = world.position().await.unwrap();
            assert!(position.snapshot.is_some(), "killed in its middle");
            assert_eq!(position.epoch, *epoch.get_or_insert(position.epoch), "under the same slot");
            // Of what was read, of what was not, and of a table that was done.
            client
                .batch_execute(
                    "DELETE FROM t WHERE id % 1000 = 7; DELETE FROM t WHERE id < 4; UPDATE t SET v = 'u' WHERE id = 4; \
                     INSERT INTO t SELECT max(id) + 1 FROM t; DELETE FROM a_small WHERE id = 9; \
                     INSERT INTO z_late SELECT max(id) + 1 FROM z_late; UPDATE a_small SET v = 'second' WHERE id = 10",
                )
                .await
                .unwrap();
        }
        let capture = world.start_streaming().await;
        client.batch_execute("UPDATE t SET v = 'last' WHERE id < 50").await.unwrap();
        wait_for_equality(&world, &client, "t").await;
        wait_for_equality(&world, &client, "a_small").await;
        let small = world.changes("shop.public.a_small").await;
        assert_eq!(letters(&small), "r".repeat(100) + "duu", "a table that was done is not read again");
        wait_for_equality(&world, &client, "z_late").await;
        let late = world.changes("shop.public.z_late").await;
        assert_eq!(letters(&late), "rrr", "what the second snapshot has of a table not begun is not streamed, too");
        capture.stop().await.unwrap();
        let slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()";
        eventually(Duration::from_secs(10), "the second slot is gone", async || {
            client.query_one(slots, &[]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_snapshot_whose_slot_is_lost_is_begun_anew_with_another() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("killed_lost").await;
    database
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text); \
             INSERT INTO t SELECT i, repeat('x', 200) FROM generate_series(1, 100000) i",
        )
        .await;
    let world = World::new(&database, &[r"public\.t"]);
    let capture = world.start().await;
    until_applied(&capture, 0).await;
    capture.crash().await;
    let position = world.position().await.unwrap();
    assert!(position.snapshot.is_some(), "killed in its middle");
    let client = database.connect().await;
    let slot = world.settings.slot.clone();
    let drop = "SELECT pg_drop_replication_slot($1)";
    eventually(Duration::from_secs(10), "dropped", async || client.execute(drop, &[&slot]).await).await;
    client.batch_execute("INSERT INTO t VALUES (170000, 'new')").await.unwrap();
    let capture = world.start_streaming().await;
    client.batch_execute("INSERT INTO t VALUES (170001, 'newer')").await.unwrap();
    wait_for_equality(&world, &client, "t").await;
    capture.stop().await.unwrap();
    assert!(world.position().await.unwrap().epoch > position.epoch);
}

/// Runs `ddl` when the slot is made and its snapshot is about to be used.
async fn rewritten_in_between(version: Version, tables: &str, via_root: bool, ddl: &str) {
    let server = Postgres::shared(version).await;
    let database = server.database("rewritten").await;
    database.execute(tables).await;
    let (mut world, gate) = World::gated(&database, &[r"public\..*"], "SET TRANSACTION SNAPSHOT").await;
    world.settings.via_root = via_root;
    let capture = world.start().await;
    gate.reached().await;
    database.execute(ddl).await;
    gate.open();
    capture.streaming().await;
    let client = database.connect().await;
    client.batch_execute("INSERT INTO t VALUES (2000, 5)").await.unwrap();
    wait_for_equality(&world, &client, "t").await;
    let changes = world.changes("shop.public.t").await;
    assert_eq!(letters(&changes), "r".repeat(1000) + "c", "each once");
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_rewritten_between_slot_and_snapshot_misses_no_row() {
    for version in Version::ALL {
        let table =
            "CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t SELECT i, i FROM generate_series(1, 1000) i";
        rewritten_in_between(version, table, false, "ALTER TABLE t ALTER n TYPE bigint").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_rewritten_between_slot_and_snapshot_misses_no_row_of_its_root() {
    let table = "CREATE TABLE t (id int PRIMARY KEY, n int) PARTITION BY RANGE (id); \
                 CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (501); \
                 CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (501) TO (5000); \
                 INSERT INTO t SELECT i, i FROM generate_series(1, 1000) i";
    rewritten_in_between(Version::Distribution, table, true, "ALTER TABLE t ALTER n TYPE bigint").await;
    rewritten_in_between(Version::Newest, table, true, "CLUSTER t1 USING t1_pkey").await;
}

/// What each record says of its place in the snapshot.
async fn markers(world: &World, topic: &str) -> Vec<String> {
    let raw = world.raw(topic).await;
    let marker = |(_, value): &(Value, Value)| value["source"]["snapshot"].as_str().unwrap_or_default().to_owned();
    raw.iter().map(marker).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_row_of_a_snapshot_says_so_whatever_tables_are_empty() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("markers").await;
    database
        .execute(
            "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY); CREATE TABLE c (id int PRIMARY KEY); \
             CREATE TABLE d (id int PRIMARY KEY); CREATE TABLE e (id int PRIMARY KEY); \
             INSERT INTO b VALUES (1), (2), (3); INSERT INTO d VALUES (1), (2)",
        )
        .await;
    let (world, capture) = World::streaming(&database, &[r"public\..*"]).await;
    assert_eq!(markers(&world, "shop.public.b").await, ["first", "true", "last_in_data_collection"]);
    assert_eq!(markers(&world, "shop.public.d").await, ["first_in_data_collection", "last"]);
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_data_only_what_comes_is_captured_and_a_slot_that_is_there_is_gone_on_with() {
    let server = Postgres::shared(Version::Newest).await;
    let database = server.database("no_data").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    world.settings.snapshot = SnapshotMode::NoData;
    let capture = world.start_streaming().await;
    database.execute("INSERT INTO t VALUES (2)").await;
    assert_eq!(letters(&world.wait_for_changes("shop.public.t", 1).await), "c");
    capture.stop().await.unwrap();
    database.execute("INSERT INTO t VALUES (3)").await;

    // The log is lost, the slot is not: it goes on from where the slot stands.
    let mut other = World::new(&database, &[r"public\.t"]);
    other.settings.snapshot = SnapshotMode::NoData;
    let capture = other.start().await;
    let changes = other.wait_for_changes("shop.public.t", 1).await;
    assert_eq!((letters(&changes).as_str(), changes[0].key["id"].as_i64()), ("c", Some(3)));
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn initially_only_is_the_snapshot_and_nothing_else_and_leaves_no_slot() {
    let server = Postgres::shared(Version::Newest).await;
    let database = server.database("initial_only").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1), (2)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    world.settings.snapshot = SnapshotMode::InitialOnly;
    let client = database.connect().await;
    for _ in 0..2 {
        let capture = world.start().await;
        eventually(Duration::from_secs(30), "it is finished", async || {
            capture.status.facts().get("snapshot").is_some_and(|fact| fact.as_str().unwrap().contains("whole"))
        })
        .await;
        client.batch_execute("INSERT INTO t SELECT max(id) + 1 FROM t").await.unwrap();
        let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1";
        assert_eq!(client.query_one(slots, &[&world.settings.slot]).await.unwrap().get::<_, i64>(0), 0);
        capture.stop().await.unwrap();
        assert_eq!(letters(&world.changes("shop.public.t").await), "rr");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn always_reads_at_every_start_and_still_streams_what_was_committed_in_between() {
    let server = Postgres::shared(Version::Newest).await;
    let database = server.database("always").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1), (2, 1)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    world.settings.snapshot = SnapshotMode::Always;
    let capture = world.start_streaming().await;
    capture.stop().await.unwrap();
    database.execute("DELETE FROM t WHERE id = 2; INSERT INTO t VALUES (3, 1)").await;
    let capture = world.start_streaming().await;
    let changes = world.wait_for_changes("shop.public.t", 6).await;
    assert_eq!(letters(&changes), "rrrrdc", "the second reading, then what the first one's slot kept");
    let lsns: Vec<_> = changes.iter().filter(|c| c.operation == Operation::Read).map(|c| c.lsn).collect();
    assert!(lsns.iter().all(|lsn| *lsn <= changes[4].commit_lsn), "{lsns:?}");
    let client = database.connect().await;
    wait_for_equality(&world, &client, "t").await;
    assert_eq!(rows(&client, "t").await.len(), 2);
    capture.stop().await.unwrap();
}

/// What goes while an opening is held before one of its commands.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Walsenders,
    Connections,
    Server,
}

impl Cut {
    const ALL: [Cut; 3] = [Cut::Walsenders, Cut::Connections, Cut::Server];

    async fn happen(self, server: &Postgres, database: &str) {
        let of = match self {
            Cut::Walsenders => "AND backend_type = 'walsender'",
            Cut::Connections => "AND usename = 'tidegate'",
            Cut::Server => {
                server.kill9().await;
                return server.start().await;
            }
        };
        let admin = server.try_connect("postgres", "postgres").await.unwrap();
        let sql =
            format!("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{database}' {of}");
        admin.batch_execute(&sql).await.unwrap();
    }
}

/// Openings that read rows, each cut before one of its commands: all is there and nobody has to do anything.
async fn cut_before(version: Version, commands: &[&'static str]) {
    let server = Postgres::own(version).await;
    for (words, cut) in commands.iter().flat_map(|words| Cut::ALL.map(|cut| (words, cut))) {
        let database = server.database("opening").await;
        database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 100)").await;
        let (world, gate) = World::gated(&database, &[r"public\.t"], words).await;
        let capture = world.start().await;
        gate.reached().await;
        cut.happen(&server, &database.name).await;
        gate.open();
        capture.streaming().await;
        let client = database.connect().await;
        client.batch_execute("INSERT INTO t VALUES (101)").await.unwrap();
        let changes = world.wait_for_changes("shop.public.t", 101).await;
        let ids: Vec<i64> = changes.iter().map(|change| change.key["id"].as_i64().unwrap()).collect();
        assert_eq!(ids, (1..=101).collect::<Vec<_>>(), "each once, {cut:?} cut before {words}");
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_opening_that_is_cut_before_any_of_its_commands_is_begun_anew() {
    const COMMANDS: [&str; 10] = [
        "pg_try_advisory_lock",
        "CREATE PUBLICATION",
        "CREATE_REPLICATION_SLOT",
        "SET TRANSACTION SNAPSHOT",
        "LOCK TABLE",
        "relfilenode",
        "pg_snapshot_xmax",
        "COPY (",
        "pg_advisory_unlock",
        "START_REPLICATION",
    ];
    let servers = Version::ALL.into_iter().flat_map(|version| COMMANDS.chunks(5).map(move |some| (version, some)));
    join_all(servers.map(|(version, commands)| cut_before(version, commands))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_come_change_and_go_while_a_capture_opens_stop_it_never() {
    for version in Version::ALL {
        let server = Postgres::own(version).await;
        let database = server.database("storm").await;
        database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 100)").await;
        let storm = async |number: usize| {
            let client = database.connect().await;
            for at in 0.. {
                let sql = format!(
                    "CREATE TYPE e{number} AS ENUM ('a'); \
                     CREATE TABLE s{number} (id int PRIMARY KEY, a text, e e{number}); \
                     INSERT INTO s{number} SELECT i, 'x', 'a' FROM generate_series(1, 20) i; \
                     ALTER TABLE s{number} ADD b{at} numeric(10, 2); ALTER TABLE s{number} ALTER a TYPE bytea USING a::bytea; \
                     ALTER TABLE s{number} RENAME b{at} TO c; ALTER TABLE s{number} DROP a; UPDATE s{number} SET c = 1; \
                     DROP TABLE s{number}; DROP TYPE e{number}"
                );
                for part in sql.split(';') {
                    client.batch_execute(part).await.unwrap();
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        let captures = async {
            let client = database.connect().await;
            for round in 0..12 {
                let mut world = World::new(&database, &[r"public\..*"]);
                world.settings.slot = format!("{}_{round}", database.name);
                // Read and begun anew while it is gone on with.
                for restart in 0..2 {
                    let capture = world.start_streaming().await;
                    let sql = format!("INSERT INTO t VALUES ({})", 1000 + 2 * round + restart);
                    client.batch_execute(&sql).await.unwrap();
                    wait_for_equality(&world, &client, "t").await;
                    if restart == 0 { capture.crash().await } else { capture.stop().await.unwrap() }
                }
            }
        };
        tokio::select! {
            _ = join_all([storm(1), storm(2)]) => {}
            () = captures => {}
        }
    }
}
