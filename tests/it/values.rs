//! Values at the edges of what a type or an event can hold: none is written as another.

use serde_json::json;
use tidegate::sources::postgres::CaptureSettings;

use crate::support::capture::{World, letters};
use crate::support::{Postgres, Version};

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_toast_value_of_any_array_is_left_out_and_no_null() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("toast").await;
    let columns = [
        ("flags", "bool[]", "array_fill(true, ARRAY[9000])"),
        ("bits", "bit(1)[]", "array_fill(B'1', ARRAY[9000])"),
        ("points", "point[]", "array_fill(point(1, 2), ARRAY[900])"),
        ("lines", "line[]", "array_fill(line '{1,2,3}', ARRAY[900])"),
        ("circles", "circle[]", "array_fill(circle '<(1,2),3>', ARRAY[900])"),
        ("boxes", "box[]", "array_fill(box '(2,2),(1,1)', ARRAY[900])"),
        ("prices", "money[]", "array_fill(1::money, ARRAY[9000])"),
        ("numbers", "numeric[]", "array_fill(1.5::numeric, ARRAY[9000])"),
        ("floats", "float4[]", "array_fill(1.5::float4, ARRAY[9000])"),
        ("times", "timetz[]", "array_fill('12:00+00'::timetz, ARRAY[9000])"),
        ("lengths", "interval[]", "array_fill('1 day'::interval, ARRAY[9000])"),
    ];
    let declared: Vec<_> = columns.map(|(name, of, _)| format!("{name} {of}")).into();
    let external: Vec<_> = columns.map(|(name, ..)| format!("ALTER {name} SET STORAGE EXTERNAL")).into();
    let values: Vec<_> = columns.map(|(.., value)| value).into();
    database
        .execute(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, small text, {}); ALTER TABLE t {}",
            declared.join(", "),
            external.join(", ")
        ))
        .await;
    let (world, capture) = World::streaming(&database, &[r"public\.t"]).await;
    let client = database.connect().await;
    client.batch_execute("SET lc_monetary = 'C'").await.unwrap();
    client.batch_execute(&format!("INSERT INTO t VALUES (1, 'a', {})", values.join(", "))).await.unwrap();
    client.batch_execute("UPDATE t SET small = 'b'; UPDATE t SET flags = NULL, points = '{}'").await.unwrap();
    let changes = world.wait_for_changes("shop.public.t", 3).await;
    assert_eq!(changes[0].after["flags"].as_array().unwrap().len(), 9000);
    assert_eq!(changes[1].after, json!({"id": 1, "small": "b"}));
    assert_eq!(changes[2].after, json!({"id": 1, "small": "b", "flags": null, "points": []}));
    capture.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn types_that_only_look_like_arrays_and_arrays_with_marks_of_their_own() {
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("marks").await;
        database
            .execute(
                "CREATE DOMAIN frame AS box; CREATE DOMAIN ints AS int[]; CREATE TYPE pair AS (a int, b text); \
                 CREATE TABLE t (id int PRIMARY KEY, v int2vector, o oidvector, f frame[], g box[], i ints, p pair[], \
                 b int[]); \
                 INSERT INTO t VALUES (1, '1 2 3', '4 5', ARRAY[box '(2,2),(1,1)', box '(4,4),(3,3)']::frame[], \
                 ARRAY[box '(2,2),(1,1)', NULL], '{1,NULL,3}', ARRAY[ROW(1, 'x,\"y')::pair, NULL], '[5:6]={7,8}')",
            )
            .await;
        let (world, capture) = World::streaming(&database, &[r"public\.t"]).await;
        database.execute("UPDATE t SET id = id").await;
        let changes = world.wait_for_changes("shop.public.t", 2).await;
        assert_eq!(letters(&changes), "ru");
        for change in &changes {
            let row = &change.after;
            assert_eq!((&row["v"], &row["o"]), (&json!("1 2 3"), &json!("4 5")));
            assert_eq!(row["f"].as_array().unwrap().len(), 2, "{row}");
            assert_eq!((row["g"].as_array().unwrap().len(), &row["g"][1]), (2, &json!(null)));
            assert_eq!(row["i"], json!([1, null, 3]));
            assert_eq!(row["p"], json!([r#"(1,"x,""y")"#, null]));
            assert_eq!(row["b"], json!([7, 8]), "elements, whatever their bounds");
        }
        capture.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_infinite_interval_is_the_end_of_the_range_or_its_name() {
    let server = Postgres::shared(Version::Newest).await;
    let database = server.database("endless").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY, a interval); INSERT INTO t VALUES (1, 'infinity')").await;
    let text: CaptureSettings = crate::options::read("interval.handling.mode: string").unwrap();
    for interval in [text.encoding.interval, CaptureSettings::new("x").encoding.interval] {
        let mut world = World::new(&database, &[r"public\.t"]);
        world.settings.slot += interval.name();
        world.settings.encoding.interval = interval;
        let capture = world.start_streaming().await;
        database.execute("UPDATE t SET a = '-infinity'; UPDATE t SET a = 'infinity'").await;
        world.wait_for_changes("shop.public.t", 3).await;
        let values: Vec<_> =
            world.raw("shop.public.t").await.into_iter().map(|(_, value)| value["after"]["a"].clone()).collect();
        match interval.name() {
            "numeric" => assert_eq!(values, [json!(i64::MAX), json!(i64::MIN), json!(i64::MAX)]),
            _ => assert_eq!(values, ["infinity", "-infinity", "infinity"]),
        }
        capture.stop().await.unwrap();
    }
}

/// The catalog is newer than the rows: it says that there are no nulls.
#[tokio::test(flavor = "multi_thread")]
async fn a_null_of_the_old_row_stays_one_where_the_whole_row_is_told() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("old_null").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY, n int); ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, NULL), (2, NULL)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    world.settings.snapshot = tidegate::sources::postgres::SnapshotMode::NoData;
    let capture = world.start_streaming().await;
    capture.stop().await.unwrap();
    database.execute("UPDATE t SET n = 5 WHERE id = 1; DELETE FROM t WHERE id = 2").await;
    database.execute("ALTER TABLE t ALTER n SET NOT NULL").await;
    let capture = world.start().await;
    let changes = world.wait_for_changes("shop.public.t", 2).await;
    assert_eq!(letters(&changes), "ud");
    assert_eq!(changes[0].before, json!({"id": 1, "n": null}));
    assert_eq!(changes[1].before, json!({"id": 2, "n": null}));
    capture.stop().await.unwrap();
}
