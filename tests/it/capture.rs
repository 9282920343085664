//! Capture on real servers: what was committed is in the topics, whole, in order, whatever happens in between.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate::event::{Lsn, Operation};
use tidegate::pipeline::ConnectorState;

use crate::support::capture::{World, confirmed, letters, wait_for_equality};
use crate::support::{Postgres, Version, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn rows_from_before_and_changes_from_after_are_in_the_topic() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("basic").await;
        database
            .execute(
                "CREATE TABLE orders (id int PRIMARY KEY, what text, amount numeric(10,2)); \
                 INSERT INTO orders VALUES (1, 'before', 1.50), (2, E'tab\\there', NULL)",
            )
            .await;
        let world = World::new(&database, &[r"public\.orders"]);
        let capture = world.start().await;
        world.wait_for_changes("shop.public.orders", 2).await;
        database
            .execute(
                "INSERT INTO orders VALUES (3, 'after', 3); UPDATE orders SET amount = 4 WHERE id = 1; \
                 DELETE FROM orders WHERE id = 2; UPDATE orders SET id = 30 WHERE id = 3",
            )
            .await;
        let changes = world.wait_for_changes("shop.public.orders", 7).await;
        assert_eq!(letters(&changes), "rrcuddc");
        assert_eq!(changes[1].after, json!({"id": 2, "what": "tab\there", "amount": null}));
        assert_eq!(changes[5].new_key, Some(json!({"id": 30})));
        assert_eq!(changes[6].old_key, Some(json!({"id": 3})));
        let folded = world.folded("shop.public.orders").await;
        assert_eq!(folded.keys().collect::<Vec<_>>(), [r#"{"id":1}"#, r#"{"id":30}"#]);
        let tombstones = world.records("shop.public.orders").await.iter().filter(|r| r.value.is_none()).count();
        assert_eq!(tombstones, 2);
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_under_concurrent_writers_leaves_no_gap() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("writers").await;
        database
            .execute(
                "CREATE TABLE stock (id int PRIMARY KEY, n int NOT NULL, who text); \
                 INSERT INTO stock SELECT i, 0, 'start' FROM generate_series(1, 3000) i",
            )
            .await;
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = Vec::new();
        for writer in 0..4 {
            let (client, stop) = (database.connect().await, stop.clone());
            writers.push(tokio::spawn(async move {
                let mut round = 0i32;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let at = (round * 7919 + writer * 31) % 3000 + 1;
                    let new = 10_000 + writer * 1_000_000 + round;
                    let sql = format!(
                        "BEGIN; UPDATE stock SET n = n + 1, who = 'w{writer}' WHERE id = {at}; \
                         INSERT INTO stock VALUES ({new}, {round}, 'new'); \
                         DELETE FROM stock WHERE id = {}; COMMIT",
                        new - 5
                    );
                    client.batch_execute(&sql).await.unwrap();
                }
                round
            }));
        }
        let world = World::new(&database, &[r"public\.stock"]);
        let capture = world.start().await;
        world.wait_for_changes("shop.public.stock", 4000).await;
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            assert!(writer.await.unwrap() > 10);
        }
        wait_for_equality(&world, &database.connect().await, "stock").await;
        // No overlap: what the snapshot has is not created again by the stream.
        let mut there = BTreeSet::new();
        for change in world.changes("shop.public.stock").await {
            let key = change.key.to_string();
            match change.operation {
                Operation::Read | Operation::Create => assert!(there.insert(key.clone()), "{key} twice"),
                Operation::Delete => assert!(there.remove(&key), "{key} was not there"),
                _ => assert!(there.contains(&key), "{key} is updated before it is there"),
            }
        }
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replica_identities_toast_truncate_and_tables_without_a_key() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("identity").await;
        database
            .execute(
                "CREATE TABLE toast (id int PRIMARY KEY, small text, big text); \
                 ALTER TABLE toast ALTER big SET STORAGE EXTERNAL; \
                 CREATE TABLE whole (id int PRIMARY KEY, small text, big text); \
                 ALTER TABLE whole ALTER big SET STORAGE EXTERNAL; ALTER TABLE whole REPLICA IDENTITY FULL; \
                 CREATE TABLE by_index (a int NOT NULL, b text NOT NULL); \
                 CREATE UNIQUE INDEX by_b ON by_index (b); ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_b; \
                 CREATE TABLE keyless (a int, b text); ALTER TABLE keyless REPLICA IDENTITY FULL; \
                 CREATE TABLE swapped (a int, b text, c int, PRIMARY KEY (b, a))",
            )
            .await;
        let mut world = World::new(&database, &[r"public\..*"]);
        world.settings.skipped.clear();
        let capture = world.start_streaming().await;
        database
            .execute(
                "INSERT INTO toast VALUES (1, 'a', repeat('x', 9000)); UPDATE toast SET small = 'b' WHERE id = 1; \
                 INSERT INTO whole VALUES (1, 'a', repeat('x', 9000)); UPDATE whole SET small = 'b' WHERE id = 1; \
                 INSERT INTO by_index VALUES (1, 'k'); UPDATE by_index SET b = 'l'; DELETE FROM by_index; \
                 INSERT INTO keyless VALUES (1, 'x'); UPDATE keyless SET b = 'y'; DELETE FROM keyless; \
                 INSERT INTO swapped VALUES (1, 'k', 2); TRUNCATE swapped",
            )
            .await;
        let toast = world.wait_for_changes("shop.public.toast", 2).await;
        assert_eq!(toast[1].after, json!({"id": 1, "small": "b"}), "an unchanged TOAST value is left out");
        let whole = world.wait_for_changes("shop.public.whole", 2).await;
        assert_eq!(whole[1].after["big"].as_str().unwrap().len(), 9000);
        assert_eq!(whole[1].before["small"], "a");
        let by_index = world.wait_for_changes("shop.public.by_index", 4).await;
        assert_eq!(letters(&by_index), "cdcd");
        assert_eq!(by_index[0].key, json!({"b": "k"}));
        assert_eq!(by_index[1].new_key, Some(json!({"b": "l"})));
        let keyless = world.wait_for_changes("shop.public.keyless", 3).await;
        assert_eq!(letters(&keyless), "cud");
        assert!(keyless.iter().all(|change| change.key == Value::Null));
        let swapped = world.wait_for_changes("shop.public.swapped", 2).await;
        assert_eq!(letters(&swapped), "ct");
        assert_eq!(swapped[0].key.to_string(), r#"{"b":"k","a":1}"#, "the order of the index");
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_come_and_go_while_running() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("ddl").await;
        database.execute("CREATE TABLE t (id int PRIMARY KEY, a int); INSERT INTO t VALUES (1, 1)").await;
        let world = World::new(&database, &[r"public\.t"]);
        let capture = world.start().await;
        world.wait_for_changes("shop.public.t", 1).await;
        // In one go, so that the catalog is ahead of the WAL when the rows are read.
        database
            .execute(
                "ALTER TABLE t ADD b text; INSERT INTO t VALUES (2, 2, 'new'); \
                 ALTER TABLE t ADD c int NOT NULL DEFAULT 5; INSERT INTO t VALUES (3, 3, 'x', 6); \
                 ALTER TABLE t DROP a; INSERT INTO t VALUES (4, 'y', 7); \
                 ALTER TABLE t RENAME b TO bb; INSERT INTO t VALUES (5, 'z', 8); \
                 ALTER TABLE t ALTER c TYPE bigint; INSERT INTO t VALUES (6, 'w', 9)",
            )
            .await;
        let changes = world.wait_for_changes("shop.public.t", 6).await;
        let after: Vec<_> = changes.iter().map(|change| change.after.clone()).collect();
        assert_eq!(after[1], json!({"id": 2, "a": 2, "b": "new"}));
        assert_eq!(after[2], json!({"id": 3, "a": 3, "b": "x", "c": 6}));
        assert_eq!(after[3], json!({"id": 4, "b": "y", "c": 7}));
        assert_eq!(after[4], json!({"id": 5, "bb": "z", "c": 8}));
        assert_eq!(after[5], json!({"id": 6, "bb": "w", "c": 9}));
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_database_in_a_busy_server_moves_its_slot_on() {
    let server = Postgres::shared(Version::Distribution).await;
    let (quiet, busy) = (server.database("quiet").await, server.database("busy").await);
    quiet.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    busy.execute("CREATE TABLE t (id int)").await;
    let (world, capture) = World::streaming(&quiet, &[r"public\.t"]).await;
    let client = quiet.connect().await;
    busy.execute("INSERT INTO t SELECT generate_series(1, 100000)").await;
    let row = client.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap();
    let written: Lsn = row.get::<_, String>(0).parse().unwrap();
    eventually(Duration::from_secs(30), "the slot has moved on", async || {
        let confirmed = confirmed(&client, &world).await;
        if confirmed >= written { Ok(()) } else { Err(format!("{confirmed} of {written}")) }
    })
    .await;
    capture.stop().await.unwrap();
    let stored = world.position().await.unwrap().commit_end;
    assert!(stored >= confirmed(&client, &world).await, "what is acknowledged was stored first");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_capture_has_no_lag_while_its_position_moves() {
    let server = Postgres::shared(Version::Distribution).await;
    let (database, other) = (server.database("unmoved").await, server.database("moving").await);
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    other.execute("CREATE TABLE noise (id int)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    // There is nearly always one on its way to the log.
    world.settings.idle_advance = Duration::from_millis(1);
    let capture = world.start_streaming().await;
    database.execute("INSERT INTO t VALUES (1)").await;
    let committed = Instant::now();
    world.wait_for_changes("shop.public.t", 1).await;
    let client = other.connect().await;
    while committed.elapsed() < Duration::from_secs(12) {
        client.batch_execute("INSERT INTO noise VALUES (1)").await.unwrap();
        if committed.elapsed() > Duration::from_secs(4) {
            // Told each second: what was written may then have been on its way, what was written before is through.
            let seconds = capture.status.lag().seconds.unwrap_or_default();
            assert!(seconds < 3.0, "{seconds} s, though the last commit is in the log");
        }
    }
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_right_behind_a_message_outside_its_transaction_is_not_passed_over() {
    for version in Version::ALL {
        let server = Postgres::own(version).await;
        let database = server.database("message").await;
        database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
        let (world, capture) = World::streaming(&database, &[r"public\.t"]).await;
        let client = database.connect().await;
        for id in 0..40 {
            let sql = format!(
                "BEGIN; INSERT INTO t VALUES ({id}); SELECT pg_logical_emit_message(false, 'x', '{id}'); COMMIT"
            );
            client.batch_execute(&sql).await.unwrap();
        }
        wait_for_equality(&world, &client, "t").await;
        let messages = world.wait_for_changes("shop.message", 40).await;
        assert_eq!(messages.len(), 40, "each once");
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_when_the_walsender_or_the_server_goes() {
    for version in Version::ALL {
        let server = Postgres::own(version).await;
        let database = server.database("restart").await;
        database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)").await;
        let world = World::new(&database, &[r"public\.t"]);
        let capture = world.start().await;
        let mut next = 0;
        for round in 0..4 {
            eventually(Duration::from_secs(60), "writing", async || {
                let client = server.try_connect("tidegate", &database.name).await.map_err(|e| e.to_string())?;
                for _ in 0..50 {
                    let sql = format!("INSERT INTO t VALUES ({next}, repeat('x', 500))");
                    client.batch_execute(&sql).await.map_err(|e| e.to_string())?;
                    next += 1;
                }
                Ok::<_, String>(())
            })
            .await;
            match round {
                0 => {
                    let admin = database.connect_as_superuser().await;
                    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_replication";
                    admin.batch_execute(sql).await.unwrap();
                }
                1 => {
                    server.stop().await;
                    server.start().await;
                }
                2 => {
                    server.kill9().await;
                    server.start().await;
                }
                _ => {}
            }
        }
        let changes = world.wait_for_changes("shop.public.t", next).await;
        let ids: Vec<i64> = changes.iter().map(|change| change.key["id"].as_i64().unwrap()).collect();
        assert_eq!(ids, (0..next as i64).collect::<Vec<_>>(), "each once, in order");
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_can_shut_down_while_the_capture_is_paused() {
    let server = Postgres::own(Version::Distribution).await;
    let database = server.database("paused").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let (world, capture) = World::streaming(&database, &[r"public\.t"]).await;
    capture.pause();
    eventually(Duration::from_secs(30), "paused", async || capture.status.state() == ConnectorState::Paused).await;
    database.execute("INSERT INTO t VALUES (1)").await;
    // Waits for the walsender, which waits for us: until the connection is closed.
    server.stop().await;
    server.start().await;
    capture.resume();
    world.wait_for_changes("shop.public.t", 1).await;
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_in_many_batches_goes_on_where_it_was_cut() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("cut").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    world.settings.batch_bytes = 16 << 10;
    let capture = world.start_streaming().await;
    database.execute("INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 40000) i").await;
    eventually(Duration::from_secs(30), "some", async || capture.status.counts().applied > 100).await;
    capture.crash().await;
    let cut = world.position().await.unwrap();
    assert!(cut.ordinal > 0 && cut.ordinal < 40_000, "cut within the transaction: {cut:?}");
    let capture = world.start().await;
    let changes = world.wait_for_changes("shop.public.t", 40_000).await;
    let ids: Vec<i64> = changes.iter().map(|change| change.key["id"].as_i64().unwrap()).collect();
    assert_eq!(ids, (1..=40_000).collect::<Vec<_>>(), "each once, in order");
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tagged_transaction_names_its_origin_in_every_row() {
    let server = Postgres::shared(Version::Newest).await;
    let database = server.database("origin").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let (world, capture) = World::streaming(&database, &[r"public\.t"]).await;
    database.execute("INSERT INTO t VALUES (1)").await;
    database
        .execute(
            "SELECT pg_logical_emit_message(true, 'tidegate.origin', '{\"system\":\"erp\",\"connector\":\"c\"}'); \
             INSERT INTO t VALUES (2), (3)",
        )
        .await;
    database.execute("INSERT INTO t VALUES (4); SELECT pg_logical_emit_message(true, 'mine', 'hello')").await;
    let changes = world.wait_for_changes("shop.public.t", 4).await;
    let origins: Vec<_> = changes.iter().map(|change| change.origin.as_deref()).collect();
    assert_eq!(origins, [None, Some("erp"), Some("erp"), None]);
    let messages = world.wait_for_changes("shop.message", 1).await;
    assert_eq!(messages.len(), 1, "a tidegate message is never published");
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_have_topics_of_their_own_or_their_roots() {
    for via_root in [false, true] {
        let server = Postgres::shared(Version::Distribution).await;
        let database = server.database("partitions").await;
        database
            .execute(
                "CREATE TABLE p (id int, k int, PRIMARY KEY (id, k)) PARTITION BY RANGE (k); \
                 CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); INSERT INTO p VALUES (1, 1)",
            )
            .await;
        let mut world = World::new(&database, &[r"public\.p"]);
        world.settings.via_root = via_root;
        let capture = world.start().await;
        let topic = if via_root { "shop.public.p" } else { "shop.public.p1" };
        world.wait_for_changes(topic, 1).await;
        // A partition made later belongs to it, too.
        database
            .execute(
                "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20); INSERT INTO p VALUES (2, 2), (3, 12)",
            )
            .await;
        let later = if via_root {
            world.wait_for_changes(topic, 3).await
        } else {
            world.wait_for_changes("shop.public.p2", 1).await
        };
        assert_eq!(later.last().unwrap().after, json!({"id": 3, "k": 12}));
        let both = world.wait_for_changes(topic, 2).await;
        assert_eq!(letters(&both[..2]), "rc");
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_names_what_is_missing_and_changes_nothing() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("plan").await;
    let owner = database.connect_as_superuser().await;
    owner.batch_execute("CREATE TABLE foreign_one (id int)").await.unwrap();
    let world = World::new(&database, &[r"public\.foreign_one"]);
    let plan = world.plan().await;
    let steps: Vec<_> = plan.steps.iter().map(|step| (step.action, step.what)).collect();
    assert!(steps.contains(&("create", "slot")) && steps.contains(&("create", "publication")), "{steps:?}");
    assert!(steps.contains(&("create", "topic")) && steps.contains(&("create", "subject")), "{steps:?}");
    let sql = plan.dba_sql.join("\n");
    assert!(
        sql.contains("CREATE PUBLICATION") && sql.contains("GRANT SELECT") && sql.contains("REPLICA IDENTITY"),
        "{sql}"
    );
    owner.batch_execute(&sql.replace("GRANT USAGE", "; GRANT USAGE")).await.unwrap();
    let sql = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1";
    assert_eq!(owner.query_one(sql, &[&world.settings.slot]).await.unwrap().get::<_, i64>(0), 0);
    // With the script run, it works.
    let capture = world.start().await;
    owner.batch_execute("INSERT INTO foreign_one VALUES (1)").await.unwrap();
    world.wait_for_changes("shop.public.foreign_one", 1).await;
    // Beside a capture that runs: its slot is known for its own, and it keeps its writer.
    let plan = world.plan().await;
    assert!(plan.problems.is_empty(), "{:?}", plan.problems);
    assert!(plan.steps.iter().any(|step| (step.action, step.what) == ("keep", "slot")));
    owner.batch_execute("INSERT INTO foreign_one VALUES (2)").await.unwrap();
    world.wait_for_changes("shop.public.foreign_one", 2).await;
    capture.stop().await.unwrap();
}

fn resident_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// CPU time of this process, seconds.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

/// `TIDEGATE_ROWS=10000000` for the large one.
#[tokio::test(flavor = "multi_thread")]
async fn a_huge_transaction_takes_bounded_memory() {
    let count: u64 = std::env::var("TIDEGATE_ROWS").map_or(300_000, |rows| rows.parse().unwrap());
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("huge").await;
    database.execute("CREATE TABLE t (id bigint PRIMARY KEY, v text, n numeric)").await;
    let (_world, capture) = World::streaming(&database, &[r"public\.t"]).await;
    let sql = format!("INSERT INTO t SELECT i, repeat('x', 200), i FROM generate_series(1, {count}) i");
    database.connect().await.batch_execute(&sql).await.unwrap();
    let (before, cpu, began) = (resident_mb(), cpu_seconds(), std::time::Instant::now());
    let mut most = before;
    let deadline = Duration::from_secs(60 + count / 10_000);
    eventually(deadline, "all rows", async || {
        most = most.max(resident_mb());
        let applied = capture.status.counts().applied;
        if applied >= count { Ok(()) } else { Err(applied.to_string()) }
    })
    .await;
    println!(
        "{count} rows in one transaction: {:.1} s, {:.2} CPU-s per million, RSS {before} -> {most} MB",
        began.elapsed().as_secs_f64(),
        (cpu_seconds() - cpu) * 1e6 / count as f64
    );
    // Other tests of this process grow, too: far below the transaction's size is all that can be said.
    assert!(most - before < 250, "{before} MB -> {most} MB");
    capture.stop().await.unwrap();
}

/// `cargo test --release --test it capture::figures -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: prints figures and judges none, so it is run by hand"]
async fn figures() {
    let count: u64 = std::env::var("TIDEGATE_ROWS").map_or(1_000_000, |rows| rows.parse().unwrap());
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("figures").await;
    database
        .execute(
            "CREATE TABLE t (id bigint PRIMARY KEY, a int, b text, c numeric(12,2), d timestamptz, e bool, f uuid, \
             g double precision, h date, i text)",
        )
        .await;
    let (_world, capture) = World::streaming(&database, &[r"public\.t"]).await;
    capture.pause();
    eventually(Duration::from_secs(30), "paused", async || capture.status.state() == ConnectorState::Paused).await;
    let sql = format!(
        "DO $$ BEGIN FOR n IN 0..{} LOOP INSERT INTO t SELECT n * 1000 + i, i, 'text of row ' || i, i * 1.25, now(), \
         i % 2 = 0, md5(i::text)::uuid, i / 7.0, '2026-01-01', repeat('y', 60) FROM generate_series(1, 1000) i; \
         COMMIT; END LOOP; END $$",
        count / 1000 - 1
    );
    database.connect().await.batch_execute(&sql).await.unwrap();
    let (cpu, began, before) = (cpu_seconds(), std::time::Instant::now(), capture.status.counts().applied);
    capture.resume();
    eventually(Duration::from_secs(400), "all rows", async || {
        let applied = capture.status.counts().applied - before;
        if applied >= count { Ok(()) } else { Err(applied.to_string()) }
    })
    .await;
    println!(
        "{count} rows in transactions of 1000: {:.0} rows/s, {:.2} CPU-s per million, RSS {} MB",
        count as f64 / began.elapsed().as_secs_f64(),
        (cpu_seconds() - cpu) * 1e6 / count as f64,
        resident_mb()
    );
    capture.stop().await.unwrap();
}
