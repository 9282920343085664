//! Events are Debezium's: the same SQL gives the same keys, values, schemas and headers.

mod oracle;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tidegate::avro::{
    DecimalMode, EncodingSettings, EventMeta, HstoreMode, IntervalMode, SESSION_SETTINGS, SnapshotMarker, TablePlan,
    TimeMode, TransactionMeta, schemas, split_wire,
};
use tidegate::event::{Cell, Lsn, Operation, Table};
use tidegate::postgres::table_filter::pattern;
use tidegate::postgres::{Address, ChannelBinding, Purpose, Tls, catalog};
use tidegate::registry::SchemaId;
use tidegate::sources::postgres::CaptureSettings;
use tokio_postgres::{Client, SimpleQueryMessage};

use self::oracle::{Comparison, Datum, Event, KNOWN, KNOWN_OF_OPTIONS, Known, Oracle};
use crate::support::capture::World;
use crate::support::{Database, Postgres, Version, eventually};

const GOLDEN_SQL: &str = include_str!("../golden/golden.sql");

/// What runs before the connector starts, and what while it streams.
fn golden_parts() -> (&'static str, &'static str) {
    GOLDEN_SQL.split_once("-- ==== STREAM").expect("golden.sql has a STREAM line")
}

/// The schema, tables and first rows of the golden SQL.
async fn before_stream(database: &Database<'_>) -> Client {
    let owner = database.connect().await;
    owner.batch_execute(golden_parts().0).await.expect("part 1 of golden.sql");
    owner
}

/// What runs while the connector streams: statement by statement, since several in one message are one transaction.
async fn while_streaming(owner: &Client) {
    let sql: String = golden_parts().1.lines().filter(|line| !line.starts_with("--")).collect::<Vec<_>>().join(" ");
    for statement in sql.split(';').map(str::trim).filter(|statement| !statement.is_empty()) {
        owner.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
}

/// The tables of schema g as capture knows them.
async fn tables(database: &Database<'_>) -> Vec<Table> {
    let address = Address {
        host: "127.0.0.1".into(),
        port: database.server.port(),
        user: "tidegate".into(),
        password: Some(b"tidegate".to_vec()),
        dbname: database.name.clone(),
        tls: Tls::Disable,
        channel_binding: ChannelBinding::Prefer,
        settings: SESSION_SETTINGS.to_vec(),
    };
    let mut session = address.connect(Purpose::Sql).await.expect("a session");
    let found = catalog::tables(&mut session).await.expect("tables");
    let oids: Vec<_> = found.iter().filter(|table| table.schema == "g").map(|table| table.oid).collect();
    let tables = catalog::load_tables(&mut session, &oids, false).await.expect("columns").into_values().collect();
    session.close().await;
    tables
}

/// All rows in the order they were written, as PostgreSQL's text.
async fn rows(client: &Client, table: &Table) -> Vec<Vec<Option<String>>> {
    let columns: Vec<String> = table.columns.iter().map(|column| format!("\"{}\"", column.name)).collect();
    let sql = format!("SELECT {} FROM ONLY g.\"{}\" ORDER BY ctid", columns.join(", "), table.name);
    let messages = client.simple_query(&sql).await.expect("rows");
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|at| row.get(at).map(str::to_owned)).collect()),
        _ => None,
    };
    messages.iter().filter_map(row).collect()
}

fn cells(row: &[Option<String>]) -> Vec<Cell<'_>> {
    row.iter().map(|text| text.as_ref().map_or(Cell::Null, |text| Cell::Text(text.as_bytes()))).collect()
}

fn marker(name: &str) -> SnapshotMarker {
    use SnapshotMarker::*;
    [False, First, FirstInDataCollection, True, LastInDataCollection, Last, Incremental]
        .into_iter()
        .find(|marker| marker.name() == name)
        .expect("a snapshot marker")
}

#[tokio::test]
async fn every_golden_row_is_encoded_as_debezium_encodes_it() {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("golden_rows").await;
    let owner = before_stream(&database).await;
    owner.batch_execute("SET timezone = 'UTC'; CALL g.rows(1000)").await.expect("the rows again");
    for (name, value) in SESSION_SETTINGS {
        owner.batch_execute(&format!("SET {name} = '{value}'")).await.expect("session settings");
    }

    let oracle = Oracle::read();
    let settings = EncodingSettings::new("golden", "bench");
    let mut comparison = Comparison::new(KNOWN);
    for table in tables(&database).await {
        let topic = format!("g.{}", table.name);
        let events = oracle.topic(&topic);
        // Debezium's own run took the tables t_* only; a partitioned table's rows are its partitions'.
        if events.is_empty() || table.name == "t_part" {
            continue;
        }
        let texts = schemas(&table, &settings).expect("schemas");
        let plan = TablePlan::compile(&table, &settings, texts.key.as_ref().map(|_| 1), 2).expect("plan");
        let rows = rows(&owner, &table).await;
        assert!(
            !rows.is_empty() && events.len() >= rows.len(),
            "{topic}: {} rows, {} events",
            rows.len(),
            events.len()
        );
        for (row, golden) in rows.iter().zip(&events) {
            let flat = golden.value.as_ref().expect("no tombstone among the inserts").flat();
            let snapshot = marker(flat["source.snapshot"].trim_start_matches("String(\"").trim_end_matches("\")"));
            let operation = if snapshot == SnapshotMarker::False { Operation::Create } else { Operation::Read };
            let transaction = TransactionMeta::new(&settings, 1, Some(7), Some(Lsn(9)), None);
            let meta = EventMeta {
                transaction: &transaction,
                operation,
                lsn: Lsn(11),
                snapshot,
                block: None,
                processed_ns: 3,
            };
            let cells = cells(row);
            let (mut key, mut value) = (Vec::new(), Vec::new());
            plan.write_key(&cells, &mut key).expect("key");
            plan.write_value(None, Some(&cells), &meta, &mut value).expect("value");
            let datum = |schema: &str, wire: &[u8]| Datum { schema: schema.to_owned(), body: wire[5..].to_vec() };
            let key = texts.key.as_deref().map(|schema| datum(schema, &key));
            let place = format!("{topic} {row:.60?}");
            comparison.keys(&place, golden.key.as_ref(), key.as_ref());
            comparison.values(&place, &table.name, golden.value.as_ref(), Some(&datum(&texts.value, &value)));
        }
    }
    assert!(comparison.compared > 250, "{}", comparison.compared);
    comparison.finish();
}

/// The events of a topic as Tidegate wrote them.
async fn written(world: &World, topic: &str) -> Vec<Event> {
    let mut events = Vec::new();
    for record in world.records(&format!("{}.{topic}", world.settings.prefix)).await {
        let mut both = Vec::new();
        for wire in [&record.key, &record.value] {
            both.push(match wire {
                None => None,
                Some(wire) => {
                    let (schema_id, body) = split_wire(wire).expect("the wire format");
                    let schema = world.registry.schema(SchemaId(schema_id)).await.expect("a registered schema");
                    Some(Datum { schema: schema.to_string(), body: body.to_vec() })
                }
            });
        }
        let headers = record.headers.iter().map(|(name, value)| (name.to_string(), value.to_vec())).collect();
        let (value, key) = (both.pop().flatten(), both.pop().flatten());
        events.push(Event { topic: topic.to_owned(), key, value, headers });
    }
    events
}

/// Headers that are the same in every run.
fn lasting_headers(event: &Event) -> Vec<(&str, String)> {
    let of_the_run = |name: &str| name.ends_with(".taskId") || name.ends_with(".runId");
    let shown = |(name, value): &(String, Vec<u8>)| {
        let value = if of_the_run(name) { String::new() } else { String::from_utf8_lossy(value).into_owned() };
        (name.clone(), value)
    };
    event.headers.iter().map(|header| (header.0.as_str(), shown(header).1)).collect()
}

/// Runs the golden SQL through a capture of prefix `prefix`, and compares every event.
async fn replay(oracle: Oracle, prefix: &str, known: &'static [Known], set: impl FnOnce(&mut CaptureSettings)) {
    let server = Postgres::shared(Version::Distribution).await;
    let database = server.database("golden").await;
    let owner = before_stream(&database).await;
    let topics: BTreeSet<&str> = oracle.events.iter().map(|event| event.topic.as_str()).collect();
    // A partitioned table's rows are in the topics of its partitions, in the snapshot as in the stream.
    let topics: Vec<&str> = topics.into_iter().filter(|topic| !matches!(*topic, "g.t_part" | "transaction")).collect();

    let mut world = World::new(&database, &[r"g\.t_.*"]);
    world.settings.prefix = prefix.into();
    world.settings.encoding.prefix = prefix.into();
    world.settings.skipped.clear();
    set(&mut world.settings);
    let capture = world.start().await;
    let counts = |only_snapshot: bool| -> BTreeMap<String, usize> {
        let is_wanted = |event: &&Event| {
            !only_snapshot || event.value.as_ref().is_some_and(|value| value.flat()["op"] == "String(\"r\")")
        };
        let count = |topic: &str| oracle.topic(topic).into_iter().filter(is_wanted).count();
        topics.iter().map(|topic| ((*topic).to_owned(), count(topic))).collect()
    };
    let (snapshot, all) = (counts(true), counts(false));
    let wait_for = async |counts: &BTreeMap<String, usize>| {
        eventually(Duration::from_secs(60), "the golden events", async || {
            for (topic, count) in counts {
                let got = world.records(&format!("{prefix}.{topic}")).await.len();
                if got < *count {
                    return Err(format!("{got} events in {topic}, not {count}; {:?}", capture.status.last_error()));
                }
            }
            Ok(())
        })
        .await;
    };
    wait_for(&snapshot).await;
    while_streaming(&owner).await;
    wait_for(&all).await;
    capture.stop().await.expect("a clean end");

    let mut comparison = Comparison::new(known);
    for topic in topics {
        let (golden, ours) = (oracle.topic(topic), written(&world, topic).await);
        assert_eq!(ours.len(), golden.len(), "events in {topic}");
        for (at, (golden, ours)) in golden.iter().zip(&ours).enumerate() {
            let place = format!("{topic} {at}");
            comparison.keys(&place, golden.key.as_ref(), ours.key.as_ref());
            let table = topic.trim_start_matches("g.");
            comparison.values(&place, table, golden.value.as_ref(), ours.value.as_ref());
            comparison.equal(&format!("{place}: headers"), &lasting_headers(golden), &lasting_headers(ours));
        }
    }
    assert!(world.records(&format!("{prefix}.g.t_part")).await.is_empty());
    comparison.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_golden_sql_gives_the_golden_events() {
    replay(Oracle::read(), "golden", KNOWN, |_| {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_golden_sql_gives_the_golden_events_of_other_handling_modes() {
    replay(Oracle::of("options", "gopts."), "gopts", KNOWN_OF_OPTIONS, |settings| {
        settings.tables.table_include = vec![pattern(r"g\..*").unwrap()];
        settings.encoding.hstore = HstoreMode::Map;
        settings.encoding.interval = IntervalMode::String;
        settings.encoding.time = TimeMode::Connect;
        settings.encoding.decimal = DecimalMode::String;
    })
    .await;
}

/// Names of the schemas, so that no subject is forgotten.
#[test]
fn the_oracle_has_every_subject() {
    let oracle = Oracle::read();
    let mut subjects: BTreeMap<&str, usize> = BTreeMap::new();
    for name in oracle.schemas.keys() {
        *subjects.entry(name.split('/').next().unwrap()).or_default() += 1;
    }
    assert_eq!(subjects["g.t_ddl-value"], 6);
    assert_eq!(oracle.events.len(), 268);
    let context = |event: &oracle::Event| event.headers.iter().filter(|(name, _)| name.contains(".context.")).count();
    assert!(oracle.events.iter().filter(|event| event.topic != "message").all(|event| context(event) == 4));
}
