//! Keys of every common type, from the WAL to a system: the event's key is the one that the row itself shows, or a row
//! that is delivered and pulled would have two links.

use std::time::Duration;

use serde_json::{Value, json};
use tidegate::datastore::{Datastore, DatastoreSettings, LinkKey, TableName, find_link, read_row};

use crate::support::{Api, Postgres, Version, WorkerLog, Workshop, eventually};

const LONG: Duration = Duration::from_secs(60);

/// Table, type, value.
const KEYS: [(&str, &str, &str); 16] = [
    ("k_bigint", "bigint", "'9007199254740993'"),
    ("k_smallint", "smallint", "'-7'"),
    ("k_numeric", "numeric(10,2)", "'1.50'"),
    ("k_whole", "numeric(10,0)", "'150'"),
    ("k_free", "numeric", "'12345678901234567890.123456789'"),
    ("k_date", "date", "'2024-02-29'"),
    ("k_char", "char(5)", "'ab'"),
    ("k_varchar", "varchar(20)", "'ä \"b\" '"),
    ("k_uuid", "uuid", "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'"),
    ("k_tz", "timestamptz", "'2024-05-06 07:08:09.120+02'"),
    ("k_tz0", "timestamptz(0)", "'2024-05-06 07:08:09+02'"),
    ("k_ts", "timestamp", "'2024-05-06 07:08:09.5'"),
    ("k_ts3", "timestamp(3)", "'2024-05-06 07:08:00'"),
    ("k_time", "time", "'01:02:03.4'"),
    ("k_bool", "boolean", "'t'"),
    ("k_enum", "mood", "'so so'"),
];

fn sink(prefix: &str, table: &str) -> String {
    format!(
        r#"
name: {table}
type: http-sink
system: api
object: {table}
topics: {prefix}.public.{table}
initial: create
map: '{{ name: .after.name }}'
create: {{ request: POST /items, map: '{{ name: .after.name, kind: "{table}", key: .key }}' }}
update: "PUT /items/{{{{ $link.id }}}}"
delete: "DELETE /items/{{{{ $link.id }}}}"
"#
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_of_any_type_is_the_same_in_the_event_in_the_row_and_in_the_link() {
    let database = Postgres::shared(Version::Distribution).await.database("keys").await;
    database.execute("CREATE TYPE mood AS ENUM ('well', 'so so')").await;
    for (table, kind, _) in KEYS {
        database.execute(&format!("CREATE TABLE {table} (id {kind} PRIMARY KEY, name text)")).await;
    }
    database
        .execute(
            "CREATE TABLE k_pair (day date, \"Nr\" char(3), name text, PRIMARY KEY (day, \"Nr\"));
             CREATE TABLE days (id timestamptz PRIMARY KEY, name text);
             CREATE TABLE visits (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), day timestamptz REFERENCES days, who text);",
        )
        .await;
    let api = Api::start(Vec::new()).await;
    let workshop = Workshop::new(
        &database.url(),
        WorkerLog::Embedded,
        &format!("systems:\n  api:\n    base_url: {}\n    probe: GET /all\n", api.url()),
    );
    let prefix = database.name.clone();
    workshop.capture(&prefix, "public.*");
    for (table, ..) in KEYS.iter().chain([&("k_pair", "", "")]) {
        workshop.connector(&format!("{table}.yaml"), &sink(&prefix, table));
    }
    let days = sink(&prefix, "days")
        .replace(
            "topics:",
            &format!("document: {{ root: public.days, visits: public.visits.day }}\ntopics: {prefix}.public.visits,"),
        )
        .replace("name: .after.name", "name: .after.name, who: [.visits[].who]");
    workshop.connector("days.yaml", &days);
    let worker = workshop.start().await;
    workshop.until_state(&prefix, "RUNNING").await;
    let sql = database.connect().await;
    for (table, _, value) in KEYS {
        sql.batch_execute(&format!("INSERT INTO {table} VALUES ({value}, 'first')")).await.unwrap();
    }
    sql.batch_execute("INSERT INTO k_pair VALUES ('2024-02-29', 'x', 'first'); INSERT INTO days VALUES ('2024-05-06 07:08:09.120+02', 'first')")
        .await
        .unwrap();
    let all = KEYS.len() + 2;
    let named = |name: &str| api.items().iter().filter(|item| item["name"] == name).count();
    eventually(LONG, "all are made", async || {
        let parked = workshop.ask(["dead-letters", "list"]).await;
        if named("first") == all { Ok(()) } else { Err(format!("{:?} {parked}", api.items())) }
    })
    .await;

    let datastore = Datastore::open(&DatastoreSettings::from_url(&database.url()).unwrap()).unwrap();
    let client = datastore.client().await.unwrap();
    let rows = client.query("SELECT object, table_name, local_key FROM tidegate.links", &[]).await.unwrap();
    assert_eq!(rows.len(), all);
    let mut differ = Vec::new();
    for row in rows {
        let (object, table, key): (String, String, Value) = (row.get(0), row.get(1), row.get(2));
        let table: TableName = table.parse().unwrap();
        let read =
            read_row(&client, &table, &key).await.unwrap().unwrap_or_else(|| panic!("{object}: no row has {key}"));
        for (column, value) in key.as_object().unwrap() {
            // As it is written: a pull finds the link of its row by this very value.
            if *value != read[column] {
                differ.push(format!("{object}: {value}, and the row has {}", read[column]));
            }
            // And so does `link("object"; value)`.
            let by_value = LinkKey { system: "api".into(), object: object.clone(), key: value.clone() };
            let found = find_link(&client, &by_value).await.unwrap();
            assert_eq!(found.is_some(), key.as_object().unwrap().len() == 1, "{object}: {value}");
        }
    }
    assert!(differ.is_empty(), "{differ:#?}");
    // Changed rows find their counterparts, a changed line its document, deleted rows theirs.
    for (table, ..) in KEYS.iter().chain([&("k_pair", "", ""), &("days", "", "")]) {
        sql.batch_execute(&format!("UPDATE {table} SET name = 'second'")).await.unwrap();
    }
    eventually(LONG, "all are changed", async || named("second") == all && named("first") == 0).await;
    sql.batch_execute("INSERT INTO visits (day, who) SELECT id, 'Ann' FROM days").await.unwrap();
    let who = || api.items().iter().find(|item| item["kind"] == "days").map(|item| item["who"].clone());
    eventually(LONG, "the line is there", async || who() == Some(json!(["Ann"]))).await;
    sql.batch_execute("DELETE FROM visits").await.unwrap();
    eventually(LONG, "the line is gone", async || who() == Some(json!([]))).await;
    for (table, ..) in KEYS.iter().chain([&("k_pair", "", ""), &("days", "", "")]) {
        sql.batch_execute(&format!("DELETE FROM {table}")).await.unwrap();
    }
    eventually(LONG, "all are gone", async || {
        let left = api.items();
        if left.is_empty() {
            return Ok(());
        }
        let links = sql.query("SELECT to_jsonb(l)::text FROM tidegate.links l", &[]).await.unwrap();
        let links: Vec<String> = links.iter().map(|row| row.get(0)).collect();
        let parked = workshop.ask(["dead-letters", "list"]).await;
        Err(format!("{left:?}\n{links:?}\n{parked}\n{}", workshop.told().await))
    })
    .await;
    worker.signal("TERM");
    assert_eq!(worker.wait(Duration::from_secs(40)).await, 0, "{}", worker.log_end(30));
}
