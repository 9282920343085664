//! What a capture's settings change, and which of Debezium's are refused.

use std::time::Duration;

use serde_json::json;
use tidegate::avro::split_wire;
use tidegate::config::{Section, parse_text};
use tidegate::postgres::table_filter::pattern;
use tidegate::registry::SchemaId;
use tidegate::sources::postgres::CaptureSettings;

use crate::support::capture::{World, letters};
use crate::support::{Postgres, Version, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn columns_left_out_are_in_no_value_and_no_schema_and_stay_in_keys() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("columns").await;
    database
        .execute(
            "CREATE TABLE t (id int PRIMARY KEY, secret text NOT NULL, bad numeric NOT NULL, v text); \
             ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, 's', 'NaN', 'a')",
        )
        .await;
    for (include, exclude) in [("", r"public\.t\.(id|secret|bad)"), (r"public\.t\.v", "")] {
        let mut world = World::new(&database, &[r"public\.t"]);
        world.settings.slot += if include.is_empty() { "_exclude" } else { "_include" };
        let list = |text: &str| Some(text).filter(|text| !text.is_empty()).map(|text| pattern(text).unwrap());
        world.settings.encoding.columns.include = list(include).into_iter().collect();
        world.settings.encoding.columns.exclude = list(exclude).into_iter().collect();
        let capture = world.start_streaming().await;
        database.execute("UPDATE t SET v = 'b'; DELETE FROM t; INSERT INTO t VALUES (1, 's', 'NaN', 'a')").await;
        let changes = world.wait_for_changes("shop.public.t", 4).await;
        assert_eq!(letters(&changes), "rudc");
        assert!(changes.iter().all(|change| change.key == json!({"id": 1})));
        assert_eq!((&changes[1].before, &changes[1].after), (&json!({"v": "a"}), &json!({"v": "b"})));
        capture.stop().await.unwrap();
        let record = world.records("shop.public.t").await.remove(0);
        let (id, _) = split_wire(record.value.as_deref().unwrap()).unwrap();
        assert!(!world.registry.schema(SchemaId(id)).await.unwrap().contains("secret"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_come_at_their_interval_also_without_changes() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("heartbeat").await;
    database.execute("CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut world = World::new(&database, &[r"public\.t"]);
    world.settings.heartbeat = Some(Duration::from_millis(300));
    let capture = world.start_streaming().await;
    let topic = "__debezium-heartbeat.shop";
    let beats = eventually(Duration::from_secs(30), "heartbeats", async || {
        let beats = world.raw(topic).await;
        if beats.len() >= 4 { Ok(beats) } else { Err(beats.len()) }.map_err(|count| count.to_string())
    })
    .await;
    let times: Vec<i64> = beats.iter().map(|(_, value)| value["ts_ms"].as_i64().unwrap()).collect();
    assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= 290), "{times:?}");
    assert_eq!(beats[0].0, json!({"serverName": "shop"}));
    database.execute("INSERT INTO t VALUES (1)").await;
    world.wait_for_changes("shop.public.t", 1).await;
    capture.stop().await.unwrap();
}

pub fn read(more: &str) -> Result<CaptureSettings, String> {
    let text = format!("topic.prefix: shop\n{more}\n");
    let mut section = Section::new(parse_text(&text, "shop.yaml").unwrap(), "connector").unwrap();
    let settings = CaptureSettings::read(&mut section).map_err(|error| error.to_string())?;
    section.finish().map_err(|error| error.to_string())?;
    Ok(settings)
}

#[test]
fn a_setting_of_debezium_that_does_nothing_here_is_refused_by_name_with_a_hint() {
    for harmless in ["plugin.name: pgoutput", "tasks.max: 1", "provide.transaction.metadata: false"] {
        read(harmless).unwrap_or_else(|error| panic!("{harmless}: {error}"));
    }
    for (setting, hint) in [
        ("plugin.name: wal2json", "pgoutput is"),
        ("provide.transaction.metadata: true", "source.txId"),
        ("max.batch.size: 2048", "batch.bytes"),
        ("transforms: unwrap", "jq"),
        ("transforms.unwrap.type: io.debezium.transforms.ExtractNewRecordState", "jq"),
        ("key.converter: io.confluent.connect.avro.AvroConverter", "Confluent"),
        ("message.key.columns: public.t:id", "primary key"),
        ("snapshot.mode: never", "no_data"),
        ("column.exclude.list: a.b.c\ncolumn.include.list: a.b.d", "one of them"),
    ] {
        let error = read(setting).expect_err(setting);
        let name = setting.split(':').next().unwrap();
        let family = name.split('.').next().unwrap();
        assert!(error.contains(name) || error.contains(family), "{error}");
        assert!(error.contains(hint), "{setting}: {error}");
    }
    let unknown = read("snapshot.moode: initial").unwrap_err();
    assert!(unknown.contains("did you mean") && !unknown.contains("max.batch.size"), "{unknown}");
}
