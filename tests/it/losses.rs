//! What a server can no longer give is noticed, named, and nothing goes on silently behind it.

use std::time::Duration;

use tidegate::event::Lsn;
use tidegate::sinks::log::LogDestination;
use tidegate::sources::postgres::SnapshotMode;

use crate::support::capture::{World, confirmed, letters, wait_for_equality};
use crate::support::postgres::Options;
use crate::support::{Postgres, Version, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_gone_or_ahead_is_noticed() {
    let server = Postgres::shared(Version::Newest).await;
    let database = server.database("lost").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    let capture = world.start().await;
    world.wait_for_changes("shop.public.t", 1).await;
    capture.streaming().await;
    capture.stop().await.unwrap();

    let client = database.connect_as_superuser().await;
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    let slot = world.settings.slot.clone();
    let sql = "SELECT pg_replication_slot_advance($1, pg_current_wal_lsn())";
    eventually(Duration::from_secs(10), "the slot is free", async || client.execute(sql, &[&slot]).await).await;
    let fault = world.start().await.ended().await.unwrap_err();
    assert!(fault.message.contains("ahead of the log") && fault.message.contains(&slot), "{fault}");

    client.execute("SELECT pg_drop_replication_slot($1)", &[&slot]).await.unwrap();
    let fault = world.start().await.ended().await.unwrap_err();
    assert!(fault.message.contains("is gone"), "{fault}");

    let epoch = world.position().await.unwrap().epoch;
    world.settings.snapshot = SnapshotMode::WhenNeeded;
    let capture = world.start().await;
    wait_for_equality(&world, &client, "t").await;
    capture.stop().await.unwrap();
    assert!(world.position().await.unwrap().epoch > epoch, "LSNs may have fallen: the epoch rises");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_is_dropped_while_rows_are_committed_is_noticed() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("unpublished").await;
        database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
        let (mut world, capture) = World::streaming(&database, &[r"public\.t"]).await;
        let drop = format!("DROP PUBLICATION {}", world.settings.publication);
        database.execute(&drop).await;
        database.execute("INSERT INTO t VALUES (2)").await;
        // Told while it runs: an older server refuses to send the row, a newer one passes over it.
        let named = |fault: &tidegate::pipeline::Fault| {
            let parts = ["publication", "is gone, or was", "when_needed", "reset capture --to end"];
            assert!(parts.iter().all(|part| fault.message.contains(part)), "{fault}");
        };
        named(&capture.ended().await.unwrap_err());
        named(&world.start().await.ended().await.unwrap_err());
        assert!(world.plan().await.problems.iter().any(|problem| problem.contains("is gone, or was")));

        world.settings.snapshot = SnapshotMode::WhenNeeded;
        let capture = world.start_streaming().await;
        let client = database.connect().await;
        wait_for_equality(&world, &client, "t").await;
        // While nobody looks, too; and what is missing is read again by itself.
        capture.stop().await.unwrap();
        database.execute(&drop).await;
        database.execute("INSERT INTO t VALUES (3)").await;
        let capture = world.start().await;
        wait_for_equality(&world, &client, "t").await;
        database.execute("INSERT INTO t VALUES (4)").await;
        wait_for_equality(&world, &client, "t").await;
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_leaves_out_updates_is_noticed_while_the_capture_runs() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("inserts").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let (world, capture) = World::streaming(&database, &[r"public\.t"]).await;
    database.execute(&format!("ALTER PUBLICATION {} SET (publish = 'insert')", world.settings.publication)).await;
    let fault = capture.ended().await.unwrap_err();
    assert!(fault.message.contains("does not publish update, delete, truncate; hint: ALTER PUBLICATION"), "{fault}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_lost_while_a_new_table_is_read_is_noticed() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("adopted_lost").await;
    database.execute("CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a VALUES (1)").await;
    let (mut world, capture) = World::streaming(&database, &[r"public\.[ab]"]).await;
    let client = database.connect_as_superuser().await;
    client
        .batch_execute("CREATE TABLE b (id int PRIMARY KEY); INSERT INTO b VALUES (1); ALTER TABLE b OWNER TO tidegate")
        .await
        .unwrap();
    let mut locking = database.connect_as_superuser().await;
    // The table can't be published, and so not read, before this ends.
    let lock = locking.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE b IN ACCESS EXCLUSIVE MODE").await.unwrap();
    eventually(Duration::from_secs(30), "the table is to be read", async || {
        let sql = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'b'::regclass";
        client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    capture.crash().await;
    assert!(world.position().await.unwrap().snapshot.unwrap().adopting);
    lock.rollback().await.unwrap();
    client.batch_execute("INSERT INTO a VALUES (2); DELETE FROM a WHERE id = 1").await.unwrap();
    let slot = world.settings.slot.clone();
    let drop = "SELECT pg_drop_replication_slot($1)";
    eventually(Duration::from_secs(10), "dropped", async || client.execute(drop, &[&slot]).await).await;
    let fault = world.start().await.ended().await.unwrap_err();
    assert!(fault.message.contains("is gone") && fault.message.contains("when_needed"), "{fault}");
    world.settings.snapshot = SnapshotMode::WhenNeeded;
    let capture = world.start_streaming().await;
    wait_for_equality(&world, &client, "b").await;
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_worker_wrote_before_it_let_go_of_the_slot_is_no_loss() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("let_go").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let (mut world, gate) = World::gated(&database, &[r"public\.t"], "pg_try_advisory_lock").await;
    let through = std::mem::replace(&mut world.url, database.url());
    world.start_streaming().await.stop().await.unwrap();
    // It has read the log's position, and is about to take the slot.
    let direct = std::mem::replace(&mut world.url, through);
    let waiting = world.start().await;
    gate.reached().await;
    world.url = direct;
    let other = world.start_streaming().await;
    database.execute("INSERT INTO t VALUES (2)").await;
    world.wait_for_changes("shop.public.t", 2).await;
    other.stop().await.unwrap();
    let client = database.connect().await;
    eventually(Duration::from_secs(30), "the slot is let go of", async || {
        let sql = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database \
                   WHERE locktype = 'advisory' AND datname = current_database()";
        client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    gate.open();
    waiting.streaming().await;
    database.execute("INSERT INTO t VALUES (3)").await;
    assert_eq!(letters(&world.wait_for_changes("shop.public.t", 3).await), "rcc", "each once");
    waiting.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_set_back_is_noticed() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("back").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    let capture = world.start_streaming().await;
    capture.stop().await.unwrap();
    // The log has read further than the server now is.
    let mut position = world.position().await.unwrap();
    position.commit_end = Lsn(position.commit_end.0 + (1 << 40));
    LogDestination::open(world.log.clone(), "capture").await.unwrap().store(&position).await.unwrap();
    let client = database.connect().await;
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    let fault = world.start().await.ended().await.unwrap_err();
    assert!(fault.message.contains("was set back") && fault.message.contains("when_needed"), "{fault}");

    world.settings.snapshot = SnapshotMode::WhenNeeded;
    let capture = world.start_streaming().await;
    wait_for_equality(&world, &client, "t").await;
    capture.stop().await.unwrap();
    assert!(world.position().await.unwrap().epoch > position.epoch);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_of_somebody_else_is_not_touched() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("foreign").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let world = World::new(&database, &[r"public\.t"]);
    let client = database.connect().await;
    let sql = "SELECT pg_create_logical_replication_slot($1, 'pgoutput')";
    client.execute(sql, &[&world.settings.slot]).await.unwrap();
    let fault = world.start().await.ended().await.unwrap_err();
    assert!(fault.message.contains("somebody else's"), "{fault}");
    assert!(confirmed(&client, &world).await > Lsn::ZERO);
}

/// Writes WAL until the server gives up what the slot needs.
async fn lose_wal(client: &tokio_postgres::Client, slot: &str) {
    eventually(Duration::from_secs(60), "the slot is lost", async || {
        client.batch_execute("SELECT pg_logical_emit_message(false, 'filler', repeat('x', 8000000))").await.unwrap();
        client.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        client.batch_execute("CHECKPOINT").await.unwrap();
        let sql = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1";
        let status: String = client.query_one(sql, &[&slot]).await.unwrap().get(0);
        if status == "lost" { Ok(()) } else { Err(status) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_lost_its_wal_is_noticed_and_planned_for() {
    for version in Version::ALL {
        let settings = vec![("max_slot_wal_keep_size".into(), "16MB".into()), ("min_wal_size".into(), "32MB".into())];
        let options = Options { settings, ..Options::default() };
        let server = Postgres::own_with(version, options).await;
        let database = server.database("keep").await;
        database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
        let mut world = World::new(&database, &[r"public\.t"]);
        let capture = world.start_streaming().await;
        capture.stop().await.unwrap();
        let client = database.connect_as_superuser().await;
        client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
        lose_wal(&client, &world.settings.slot).await;
        let fault = world.start().await.ended().await.unwrap_err();
        assert!(fault.message.contains("max_slot_wal_keep_size") && fault.message.contains("hint"), "{fault}");
        let plan = world.plan().await;
        assert!(plan.problems.iter().any(|problem| problem.contains("has lost WAL")), "{:?}", plan.problems);

        let epoch = world.position().await.unwrap().epoch;
        world.settings.snapshot = SnapshotMode::WhenNeeded;
        let capture = world.start().await;
        wait_for_equality(&world, &client, "t").await;
        capture.streaming().await;
        // While it is paused, too.
        capture.pause();
        lose_wal(&client, &world.settings.slot).await;
        capture.error("has lost WAL").await;
        capture.stop().await.unwrap();
        assert!(world.position().await.unwrap().epoch > epoch);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_tells_of_a_server_that_was_set_back_and_of_a_slot_that_is_gone() {
    let server = Postgres::shared(Version::Newest).await;
    let database = server.database("planned").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let (world, capture) = World::streaming(&database, &[r"public\.t"]).await;
    assert!(world.plan().await.problems.is_empty(), "beside a capture that runs");
    capture.stop().await.unwrap();
    let client = database.connect().await;
    let slot = world.settings.slot.clone();
    let drop = "SELECT pg_drop_replication_slot($1)";
    eventually(Duration::from_secs(10), "dropped", async || client.execute(drop, &[&slot]).await).await;
    let problems = world.plan().await.problems;
    assert!(problems.iter().any(|problem| problem.contains("is gone")), "{problems:?}");
    let mut position = world.position().await.unwrap();
    position.commit_end = Lsn(position.commit_end.0 + (1 << 40));
    LogDestination::open(world.log.clone(), "capture").await.unwrap().store(&position).await.unwrap();
    let problems = world.plan().await.problems;
    assert!(problems.iter().any(|problem| problem.contains("was set back")), "{problems:?}");
}

async fn replayed(primary: &tokio_postgres::Client, standby: &Postgres) {
    let end: String = primary.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    let admin = standby.connect_as("postgres", "postgres").await;
    eventually(Duration::from_secs(30), "the standby has it", async || {
        let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{end}'::pg_lsn");
        admin.query_one(&sql, &[]).await.unwrap().get::<_, bool>(0)
    })
    .await;
}

async fn promote(standby: &Postgres) {
    let admin = standby.connect_as("postgres", "postgres").await;
    assert!(admin.query_one("SELECT pg_promote(true, 60)", &[]).await.unwrap().get::<_, bool>(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_goes_on_behind_a_failover_with_a_synchronized_slot() {
    let primary = Postgres::own(Version::Newest).await;
    let database = primary.database("failover").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    world.settings.failover = true;
    let capture = world.start_streaming().await;
    let standby = Postgres::standby_of(&primary).await;
    let client = database.connect_as_superuser().await;
    let admin = standby.connect_as("postgres", "postgres").await;
    let mut next = 0;
    eventually(Duration::from_secs(60), "the slot is synchronized", async || {
        next += 1;
        client.batch_execute(&format!("INSERT INTO t VALUES ({next})")).await.unwrap();
        client.batch_execute("SELECT pg_log_standby_snapshot()").await.unwrap();
        let sql = "SELECT synced AND NOT temporary FROM pg_replication_slots WHERE slot_name = $1";
        admin.query_opt(sql, &[&world.settings.slot]).await.unwrap().is_some_and(|row| row.get(0))
    })
    .await;
    world.wait_for_changes("shop.public.t", next).await;
    replayed(&client, &standby).await;
    let before = world.position().await.unwrap();
    capture.stop().await.unwrap();
    primary.kill9().await;
    promote(&standby).await;

    world.url = database.url_at(standby.port());
    let capture = world.start_streaming().await;
    let client = standby.connect_as("tidegate", &database.name).await;
    client.batch_execute("INSERT INTO t VALUES (100000)").await.unwrap();
    let changes = world.wait_for_changes("shop.public.t", next + 1).await;
    wait_for_equality(&world, &client, "t").await;
    capture.stop().await.unwrap();
    assert_eq!(changes.len(), next + 1, "each once");
    let after = world.position().await.unwrap();
    assert!(after.timeline > before.timeline && after.epoch > before.epoch, "{before:?} {after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_that_lost_what_the_log_has_is_named() {
    for version in Version::ALL {
        let primary = Postgres::own(version).await;
        let database = primary.database("diverged").await;
        database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
        let mut world = World::new(&database, &[r"public\.t"]);
        let capture = world.start_streaming().await;
        let standby = Postgres::standby_of(&primary).await;
        let client = database.connect().await;
        replayed(&client, &standby).await;
        standby.stop().await;
        // Captured, and never on the standby.
        client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
        world.wait_for_changes("shop.public.t", 2).await;
        capture.stop().await.unwrap();
        primary.kill9().await;
        standby.start().await;
        promote(&standby).await;

        world.url = database.url_at(standby.port());
        let client = standby.connect_as("tidegate", &database.name).await;
        for round in 0..2 {
            let fault = world.start().await.ended().await.unwrap_err();
            assert!(fault.message.contains("timeline 2") && fault.message.contains("left timeline 1"), "{fault}");
            assert_eq!(world.plan().await.problems.len(), 1, "{:?}", world.plan().await.problems);
            // The new timeline's WAL passes what was read of the old one.
            let filler = "SELECT pg_logical_emit_message(false, 'filler', repeat('x', 3000000))";
            client.batch_execute(&format!("INSERT INTO t VALUES ({}); {filler}", 10 + round)).await.unwrap();
        }
        let epoch = world.position().await.unwrap().epoch;
        world.settings.snapshot = SnapshotMode::WhenNeeded;
        let capture = world.start_streaming().await;
        client.batch_execute("INSERT INTO t VALUES (20)").await.unwrap();
        world.wait_for_changes("shop.public.t", 6).await;
        capture.stop().await.unwrap();
        let position = world.position().await.unwrap();
        assert!(position.epoch > epoch && position.timeline == 2, "{position:?}");
    }
}
