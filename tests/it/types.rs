//! Every type, in the snapshot and in the stream, against what PostgreSQL itself says.
//!
//! A decoded value is handed back to PostgreSQL as text and cast to the column's type; its `::text` must be the
//! column's. What an event can't carry exactly (by Debezium's own forms) is listed in [`LOSSY`].

use std::collections::BTreeMap;

use serde_json::Value;
use tidegate::event::Operation;

use crate::support::capture::World;
use crate::support::{Postgres, Version};

/// Types whose Debezium form is another one on purpose: microseconds, geometry, maps, bytes; GMT for `timetz`.
const LOSSY: [&str; 14] = [
    "interval", "point", "line", "lseg", "box", "path", "polygon", "circle", "hstore", "money", "bit", "varbit",
    "bytea", "timetz",
];

/// ISO counts years before 1 as 0, -1, …; PostgreSQL as 1 BC, 2 BC, ….
fn with_era(text: &str) -> Option<String> {
    let (year, rest) = text.strip_prefix('-')?.split_once('-')?;
    let year: u32 = year.parse().ok().filter(|_| year.len() == 4)?;
    Some(format!("{:04}-{rest} BC", year + 1))
}

/// Text that PostgreSQL reads as the value.
fn as_input(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Array(items) => {
            let items: Vec<String> = items
                .iter()
                .map(|item| match as_input(item) {
                    None => "NULL".to_owned(),
                    Some(text) if item.is_array() => text,
                    Some(text) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
                })
                .collect();
            Some(format!("{{{}}}", items.join(",")))
        }
        other => Some(other.to_string()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_reads_back_as_postgresql_writes_it() {
    let golden = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/golden.sql")).unwrap();
    let (setup, _) = golden.split_once("-- ==== STREAM").unwrap();
    for version in Version::ALL {
        let server = Postgres::shared(version).await;
        let database = server.database("types").await;
        let client = database.connect_as_superuser().await;
        let missing = "SELECT count(*) = 0 FROM pg_available_extensions WHERE name = 'hstore'";
        let setup = match client.query_one(missing, &[]).await.unwrap().get(0) {
            false => setup.to_owned(),
            // A server without the contributed extensions, nor libxml: their types by name only.
            true => setup
                .replace(
                    "create extension hstore with schema public; create extension ltree with schema public; \
                     create extension citext with schema public;",
                    "create domain public.hstore as text; create domain public.ltree as text; \
                     create domain public.citext as text;",
                )
                .replace("x xml", "x text"),
        };
        client.batch_execute(&setup).await.unwrap();
        let mut world = World::new(&database, &[r"g\.t_.*"]);
        // The superuser owns the tables.
        world.url = database.url().replace("tidegate:tidegate@", "postgres:tidegate@");
        let capture = world.start().await;
        capture.streaming().await;
        client.batch_execute("CALL g.rows(1000)").await.unwrap();

        let sql = "SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), t.typname, e.typname \
                   FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid JOIN pg_type t ON t.oid = a.atttypid \
                   LEFT JOIN pg_type e ON e.oid = t.typelem AND t.typcategory = 'A' \
                   WHERE a.attndims < 2 AND c.relnamespace = 'g'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 \
                   AND NOT a.attisdropped AND c.relname LIKE 't\\_%' AND c.relname <> 't_part' ORDER BY 1, a.attnum";
        let mut tables: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
        for row in client.query(sql, &[]).await.unwrap() {
            let (plain, element): (String, Option<String>) = (row.get(3), row.get(4));
            let lossy = LOSSY.contains(&plain.as_str()) || element.is_some_and(|of| LOSSY.contains(&of.as_str()));
            let columns = tables.entry(row.get(0)).or_default();
            if !lossy {
                columns.push((row.get(1), row.get(2)));
            }
        }
        let mut compared = 0;
        let mut wrong = Vec::new();
        for (table, columns) in &tables {
            let count: i64 = client.query_one(&format!("SELECT count(*) FROM g.{table}"), &[]).await.unwrap().get(0);
            let changes = world.wait_for_changes(&format!("shop.g.{table}"), count as usize).await;
            let reads = changes.iter().filter(|change| change.operation == Operation::Read).count();
            assert_eq!(reads * 2, changes.len(), "{table}: as many rows streamed as read");
            let raw = world.raw(&format!("shop.g.{table}")).await;
            for (change, (_, raw)) in changes.iter().zip(&raw) {
                let Value::Object(key) = &change.key else { continue };
                let wanted: Vec<String> =
                    key.iter().map(|(name, value)| format!("t.\"{name}\" = '{}'", as_input(value).unwrap())).collect();
                for (name, type_name) in columns {
                    let Some(value) = change.after.get(name) else {
                        // A stored generated column is in no event (its values are not in the WAL).
                        assert!(name == "b" && table == "t_gen", "{table}.{name} is missing");
                        continue;
                    };
                    // Without a scale of its own, a number's trailing zeros say nothing.
                    let shown = if type_name == "numeric" { "trim_scale" } else { "" };
                    let sql = format!(
                        "SELECT {shown}(t.\"{name}\")::text, {shown}(($1::text)::{type_name})::text \
                         FROM g.\"{table}\" t WHERE {}",
                        wanted.join(" AND ")
                    );
                    // JSON is shown as JSON; what the event has is its text.
                    let json = type_name.starts_with("json");
                    let mut given = as_input(if json { &raw["after"][name] } else { value });
                    if type_name.starts_with("date") || type_name.starts_with("timestamp") {
                        given = given.map(|text| with_era(&text).unwrap_or(text));
                    }
                    let (have, want): (Option<String>, Option<String>) = match client.query_one(&sql, &[&given]).await {
                        Ok(row) => (row.get(1), row.get(0)),
                        Err(error) => (Some(format!("{error:?}")), given.clone()),
                    };
                    compared += 1;
                    if have != want {
                        wrong.push(format!(
                            "{table}.{name} {type_name} of {} ({:?}): {given:?} is {have:?}, not {want:?}",
                            change.key, change.operation
                        ));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
        assert!(compared > 900, "{compared}");
        capture.stop().await.unwrap();
    }
}
