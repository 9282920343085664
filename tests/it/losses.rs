//! What a server can no longer give is noticed, named, and nothing goes on silently behind it.

use std::time::Duration;

use tidegate::event::Lsn;
use tidegate::sinks::log::LogDestination;
use tidegate::sources::postgres::SnapshotMode;

use crate::support::capture::{World, confirmed, wait_for_equality};
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
async fn a_server_that_was_set_back_is_noticed() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("back").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    let capture = world.start().await;
    capture.streaming().await;
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
    let capture = world.start().await;
    capture.streaming().await;
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
