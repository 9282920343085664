//! Tables that come, go and change their names while a capture runs: none is passed over without a word.

use std::time::Duration;

use serde_json::json;

use tidegate::postgres::publication::Autocreate;

use crate::support::capture::{World, letters, wait_for_equality};
use crate::support::{Postgres, Version, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn tables_made_made_again_or_swapped_while_running_are_captured_whole() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("come").await;
        database
            .execute(
                "CREATE TABLE a (id int PRIMARY KEY, v text); CREATE TABLE b (id int PRIMARY KEY); \
                 INSERT INTO a VALUES (1, 'first'); INSERT INTO b VALUES (1)",
            )
            .await;
        let (world, capture) = World::streaming(&database, &[r"public\.[abc]"]).await;
        let client = database.connect().await;
        client.batch_execute("CREATE TABLE c (id int PRIMARY KEY); INSERT INTO c VALUES (1), (2)").await.unwrap();
        wait_for_equality(&world, &client, "c").await;
        client.batch_execute("INSERT INTO c VALUES (3)").await.unwrap();
        wait_for_equality(&world, &client, "c").await;
        assert_eq!(letters(&world.changes("shop.public.c").await), "rrc", "each once");

        client.batch_execute("UPDATE a SET v = 'last'").await.unwrap();
        client
            .batch_execute("DROP TABLE a; CREATE TABLE a (id int PRIMARY KEY, w int); INSERT INTO a VALUES (1, 5)")
            .await
            .unwrap();
        client
            .batch_execute(
                "ALTER TABLE b RENAME TO b_old; CREATE TABLE b (id int PRIMARY KEY); INSERT INTO b VALUES (7)",
            )
            .await
            .unwrap();
        let again = world.wait_for_changes("shop.public.a", 3).await;
        assert_eq!(letters(&again), "rur", "what the first had, then the second");
        assert_eq!(again[2].after, json!({"id": 1, "w": 5}));
        let swapped = world.wait_for_changes("shop.public.b", 2).await;
        assert_eq!((letters(&swapped).as_str(), &swapped[1].key), ("rr", &json!({"id": 7})));
        client.batch_execute("UPDATE a SET w = 6; INSERT INTO b VALUES (8)").await.unwrap();
        wait_for_equality(&world, &client, "a").await;
        assert_eq!(letters(&world.wait_for_changes("shop.public.b", 3).await), "rrc");
        // Also when it was away meanwhile, behind what was committed before.
        client.batch_execute("INSERT INTO c VALUES (4)").await.unwrap();
        capture.stop().await.unwrap();
        client
            .batch_execute("DELETE FROM c WHERE id = 4; DROP TABLE c; CREATE TABLE c (id int PRIMARY KEY); INSERT INTO c VALUES (9)")
            .await
            .unwrap();
        let capture = world.start().await;
        let both = world.wait_for_changes("shop.public.c", 6).await;
        assert_eq!(letters(&both), "rrccdr", "{both:?}");
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_somebody_else_is_told_and_holds_nothing_up() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("others").await;
    database.execute("CREATE TABLE a (id int PRIMARY KEY)").await;
    let (world, capture) = World::streaming(&database, &[r"public\..*"]).await;
    let owner = database.connect_as_superuser().await;
    owner.batch_execute("CREATE TABLE b (id int PRIMARY KEY); GRANT SELECT ON b TO tidegate").await.unwrap();
    eventually(Duration::from_secs(30), "it is told", async || {
        capture.status.facts().get("not_captured") == Some(&json!(["public.b"]))
    })
    .await;
    database.execute("INSERT INTO a VALUES (1)").await;
    world.wait_for_changes("shop.public.a", 1).await;
    owner.batch_execute("INSERT INTO b VALUES (1); ALTER TABLE b OWNER TO tidegate").await.unwrap();
    wait_for_equality(&world, &owner, "b").await;
    assert_eq!(capture.status.facts().get("not_captured"), Some(&json!([])));
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_table_stops_nothing_where_another_role_has_the_publication() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("publication").await;
    database.execute("CREATE TABLE a (id int PRIMARY KEY)").await;
    let world = World::new(&database, &[r"public\..*"]);
    let owner = database.connect_as_superuser().await;
    let publication = &world.settings.publication;
    owner.batch_execute(&format!("CREATE PUBLICATION {publication} FOR TABLE a")).await.unwrap();
    let capture = world.start_streaming().await;
    database.execute("CREATE TABLE b (id int PRIMARY KEY); INSERT INTO b VALUES (1)").await;
    eventually(Duration::from_secs(30), "it is told", async || {
        capture.status.facts().get("not_captured") == Some(&json!(["public.b"]))
    })
    .await;
    let plan = world.plan().await;
    assert!(plan.problems.iter().any(|problem| problem.contains("may not change the publication")), "{plan:?}");
    assert!(plan.dba_sql.iter().any(|sql| sql.contains("ADD TABLE \"public\".\"b\"")), "{plan:?}");
    database.execute("INSERT INTO a VALUES (1)").await;
    world.wait_for_changes("shop.public.a", 1).await;
    owner.batch_execute(&format!("ALTER PUBLICATION {publication} OWNER TO tidegate")).await.unwrap();
    wait_for_equality(&world, &owner, "b").await;
    capture.stop().await.unwrap();
}

/// `ddl` is run when the slot is made and its snapshot is about to be used.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_altered_while_a_snapshot_begins_is_read_as_it_is_then() {
    let server = Postgres::shared(Version::Distribution).await;
    for ddl in ["ALTER TABLE t DROP n", "ALTER TABLE t RENAME n TO m", "ALTER TABLE t ADD m int", "DROP TABLE gone"] {
        let database = server.database("altered").await;
        database
            .execute(
                "CREATE TABLE gone (id int PRIMARY KEY); CREATE TABLE t (id int PRIMARY KEY, n int); \
                 INSERT INTO t SELECT i, i FROM generate_series(1, 100) i",
            )
            .await;
        let (world, gate) = World::gated(&database, &[r"public\..*"], "SET TRANSACTION SNAPSHOT").await;
        let capture = world.start().await;
        gate.reached().await;
        database.execute(ddl).await;
        gate.open();
        capture.streaming().await;
        let client = database.connect().await;
        client.batch_execute("UPDATE t SET id = id").await.unwrap();
        wait_for_equality(&world, &client, "t").await;
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_changed_in_every_way_within_a_transaction_keeps_every_row() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("within").await;
        database
            .execute(
                "CREATE SCHEMA other; CREATE TABLE t (id int PRIMARY KEY, a int, b text); \
                 CREATE TABLE u (id int PRIMARY KEY); INSERT INTO t VALUES (1, 1, 'x')",
            )
            .await;
        let mut world = World::new(&database, &[r".*\.[tuvw]"]);
        world.settings.skipped.clear();
        let capture = world.start_streaming().await;
        let client = database.connect().await;
        client
            .batch_execute(
                "BEGIN; INSERT INTO t VALUES (2, 2, 'y'); ALTER TABLE t DROP a; INSERT INTO t VALUES (3, 'z'); \
                 ALTER TABLE t ADD a bigint; INSERT INTO t VALUES (4, 'w', 4); ALTER TABLE t RENAME b TO c; \
                 INSERT INTO t VALUES (5, 'v', 5); ALTER TABLE t ALTER a TYPE text; INSERT INTO t VALUES (6, 'u', '6'); \
                 SAVEPOINT s; ALTER TABLE t ADD gone int; INSERT INTO t VALUES (7, 'n', '7', 7); ROLLBACK TO s; \
                 INSERT INTO t VALUES (8, 't', '8'); ALTER TABLE t RENAME TO v; INSERT INTO v VALUES (9, 's', '9'); \
                 ALTER TABLE v SET SCHEMA other; INSERT INTO other.v VALUES (10, 'r', '10'); INSERT INTO u VALUES (1); \
                 TRUNCATE other.v, u; INSERT INTO other.v VALUES (11, 'q', '11'); COMMIT",
            )
            .await
            .unwrap();
        let last = world.wait_for_changes("shop.other.v", 3).await;
        assert_eq!(letters(&last), "ctc");
        let rows: Vec<_> = world.changes("shop.public.t").await.into_iter().map(|change| change.after).collect();
        assert_eq!(
            rows,
            [
                json!({"id": 1, "a": 1, "b": "x"}),
                json!({"id": 2, "a": 2, "b": "y"}),
                json!({"id": 3, "b": "z"}),
                json!({"id": 4, "b": "w", "a": 4}),
                json!({"id": 5, "c": "v", "a": 5}),
                json!({"id": 6, "c": "u", "a": "6"}),
                json!({"id": 8, "c": "t", "a": "8"}),
            ]
        );
        assert_eq!(letters(&world.changes("shop.public.v").await), "c");
        assert_eq!(letters(&world.changes("shop.public.u").await), "ct");
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_comes_while_the_slot_is_made_is_in_the_rows_that_are_read() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("meanwhile").await;
        database
            .execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE w (id int); INSERT INTO t VALUES (1), (2)")
            .await;
        let mut writer = database.connect().await;
        // A slot is made only when every transaction that was under way has ended.
        let open = writer.transaction().await.unwrap();
        open.batch_execute("INSERT INTO w VALUES (1)").await.unwrap();
        let world = World::new(&database, &[r"public\.t"]);
        let capture = world.start().await;
        capture.making_slot().await;
        database.execute("ALTER TABLE t ADD c int DEFAULT 5").await;
        open.commit().await.unwrap();
        capture.streaming().await;
        wait_for_equality(&world, &writer, "t").await;
        capture.stop().await.unwrap();
    }
}

/// What is kept from the stream is kept from the snapshot, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_publication_of_some_columns_and_rows_is_read_as_it_is_streamed() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("some").await;
        let mut world = World::new(&database, &[r"public\.[tg]"]);
        world.settings.autocreate = Autocreate::Disabled;
        database
            .execute(&format!(
                "CREATE TABLE t (id int PRIMARY KEY, secret text NOT NULL, n int); \
                 CREATE TABLE g (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED); \
                 INSERT INTO t VALUES (1, 's', 1), (2, 's', 2); INSERT INTO g VALUES (1); \
                 CREATE PUBLICATION {} FOR TABLE t (id, n) WHERE (id > 1), g",
                world.settings.publication
            ))
            .await;
        let capture = world.start_streaming().await;
        database.execute("INSERT INTO t VALUES (0, 's', 0), (3, 's', 3); INSERT INTO g VALUES (2)").await;
        let rows: Vec<_> =
            world.wait_for_changes("shop.public.t", 2).await.into_iter().map(|change| change.after).collect();
        assert_eq!(rows, [json!({"id": 2, "n": 2}), json!({"id": 3, "n": 3})]);
        let rows: Vec<_> =
            world.wait_for_changes("shop.public.g", 2).await.into_iter().map(|change| change.after).collect();
        assert_eq!(rows, [json!({"id": 1}), json!({"id": 2})], "a publication that leaves generated columns out");
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tables_that_would_share_a_topic_are_refused_by_name() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("one_topic").await;
    database.execute("CREATE TABLE \"a b\" (id int PRIMARY KEY); CREATE TABLE a_b (id int PRIMARY KEY)").await;
    let world = World::new(&database, &[r"public\..*"]);
    let fault = world.start().await.ended().await.unwrap_err();
    assert!(
        ["public.a b", "public.a_b", "table.exclude.list"].iter().all(|part| fault.message.contains(part)),
        "{fault}"
    );
    let problems = world.plan().await.problems;
    assert!(problems.iter().any(|problem| problem.contains("public.a b")), "{problems:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_every_kind_have_their_own_rows_and_keys() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("kinds").await;
        database
            .execute(
                "CREATE TABLE parent (id int PRIMARY KEY, v text); CREATE TABLE child (w int, PRIMARY KEY (id)) INHERITS (parent); \
                 CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY); CREATE TEMP TABLE passing (id int); \
                 CREATE TABLE silent (id int PRIMARY KEY, v text); ALTER TABLE silent REPLICA IDENTITY NOTHING; \
                 CREATE TABLE numbered (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text); \
                 CREATE TABLE bare (); CREATE TABLE keyless (v text); \
                 INSERT INTO parent VALUES (1, 'a'); INSERT INTO child VALUES (2, 'b', 5); \
                 INSERT INTO fleeting VALUES (1); INSERT INTO silent VALUES (1, 'x'); INSERT INTO numbered (v) VALUES ('n'); \
                 INSERT INTO bare DEFAULT VALUES; INSERT INTO keyless VALUES ('k')",
            )
            .await;
        let (world, capture) = World::streaming(&database, &[r"public\..*"]).await;
        database
            .execute(
                "INSERT INTO parent VALUES (3, 'c'); INSERT INTO child VALUES (4, 'd', 6); \
                 INSERT INTO silent VALUES (2, 'y'); INSERT INTO numbered (v) VALUES ('m'); \
                 INSERT INTO bare DEFAULT VALUES; INSERT INTO keyless VALUES ('l'); INSERT INTO fleeting VALUES (2); \
                 ALTER TABLE fleeting SET LOGGED",
            )
            .await;
        let after = async |table: &str, count: usize| -> Vec<_> {
            let changes = world.wait_for_changes(&format!("shop.public.{table}"), count).await;
            changes.into_iter().map(|change| (change.key, change.after)).collect()
        };
        let id = |id: i32| json!({ "id": id });
        assert_eq!(
            after("parent", 2).await,
            [(id(1), json!({"id": 1, "v": "a"})), (id(3), json!({"id": 3, "v": "c"}))]
        );
        assert_eq!(
            after("child", 2).await,
            [(id(2), json!({"id": 2, "v": "b", "w": 5})), (id(4), json!({"id": 4, "v": "d", "w": 6}))]
        );
        let silent = after("silent", 2).await;
        assert_eq!(silent[1], (id(2), json!({"id": 2, "v": "y"})));
        let numbered = after("numbered", 2).await;
        assert_eq!(numbered[1], (id(2), json!({"id": 2, "v": "m"})));
        let keyless = after("keyless", 2).await;
        assert!(keyless.iter().all(|(key, _)| key.is_null()), "{keyless:?}");
        assert_eq!(after("bare", 1).await[0].1, json!({}));
        // What is logged from now on is taken whole.
        assert_eq!(after("fleeting", 2).await.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>(), [id(1), id(2)]);
        capture.stop().await.unwrap();
    }
}
