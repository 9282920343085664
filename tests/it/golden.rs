//! Events are Debezium's: the same SQL gives the same keys, values, schemas and headers.

mod oracle;

use std::collections::BTreeMap;

use tidegate::avro::{
    EncodingSettings, EventMeta, SESSION_SETTINGS, SnapshotMarker, TablePlan, TransactionMeta, schemas,
};
use tidegate::event::{Cell, Lsn, Operation, Table};
use tidegate::postgres::{Address, Purpose, Tls, catalog};
use tokio_postgres::{Client, SimpleQueryMessage};

use self::oracle::{Comparison, Datum, Oracle};
use crate::support::{Database, Postgres, Version};

const GOLDEN_SQL: &str = include_str!("../golden/golden.sql");

/// What runs before the connector starts, and what while it streams.
fn golden_parts() -> (&'static str, &'static str) {
    GOLDEN_SQL.split_once("-- ==== STREAM").expect("golden.sql has a STREAM line")
}

/// The schema, tables and first rows of the golden SQL.
async fn before_stream(database: &Database<'_>) -> Client {
    let admin = database.connect_as_superuser().await;
    admin.batch_execute(golden_parts().0).await.expect("part 1 of golden.sql");
    admin
        .batch_execute("GRANT USAGE ON SCHEMA g TO tidegate; GRANT SELECT ON ALL TABLES IN SCHEMA g TO tidegate")
        .await
        .expect("grants");
    admin
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
    let admin = before_stream(&database).await;
    admin.batch_execute("SET timezone = 'UTC'; CALL g.rows(1000)").await.expect("the rows again");
    for (name, value) in SESSION_SETTINGS {
        admin.batch_execute(&format!("SET {name} = '{value}'")).await.expect("session settings");
    }

    let oracle = Oracle::read();
    let settings = EncodingSettings::new("golden", "bench");
    let mut comparison = Comparison::default();
    for table in tables(&database).await {
        let topic = format!("g.{}", table.name);
        let events = oracle.topic(&topic);
        // Debezium's own run took the tables t_* only; a partitioned table's rows are its partitions'.
        if events.is_empty() || table.name == "t_part" {
            continue;
        }
        let texts = schemas(&table, &settings).expect("schemas");
        let plan = TablePlan::compile(&table, &settings, texts.key.as_ref().map(|_| 1), 2).expect("plan");
        let rows = rows(&admin, &table).await;
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
    comparison.finish(|_, _| true);
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
