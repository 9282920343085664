//! Pulls into a real PostgreSQL: from a real Tryton, and from a small API for the ways of paging Tryton has not.

mod erp;
mod lasting;
mod listing;
mod older;

use std::time::Duration;

use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::support::capture::World;
use crate::support::{Api, Database, Postgres, Stage, Version, WorkerLog, Workshop, eventually};

pub const PARTS: &str = "CREATE TABLE parts (
    id serial PRIMARY KEY, sku text UNIQUE, name text, price numeric(10,2) CHECK (price >= 0), note text DEFAULT 'none',
    at timestamptz, version int NOT NULL DEFAULT 0);
    CREATE FUNCTION count_version() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.version := OLD.version + 1; RETURN NEW; END $$;
    CREATE TRIGGER version BEFORE UPDATE ON parts FOR EACH ROW EXECUTE FUNCTION count_version();";

fn part(id: i64, at: &str) -> Value {
    json!({"id": id, "sku": format!("S{id}"), "name": format!("part {id}"), "price": "9.90", "at": at})
}

fn parts(count: i64) -> Vec<Value> {
    (1..=count).map(|id| part(id, &format!("2026-01-01T00:00:{:02}Z", id % 60))).collect()
}

async fn world(name: &str) -> (Database<'static>, Client) {
    let database = Postgres::shared(Version::Distribution).await.database(name).await;
    database.execute(PARTS).await;
    let client = database.connect().await;
    (database, client)
}

async fn stage(database: &Database<'_>, api: &Api) -> Stage {
    let settings = format!("base_url: {}\nbreaker: {{ failures: 3, open: 200ms }}", api.url());
    Stage::new(database, &[("api", &settings)]).await
}

pub fn pull(request: &str, more: &str) -> String {
    format!(
        "name: parts\ntype: http-pull\nsystem: api\nobject: part\nevery: 150ms\nrequest: GET {request}\n\
         into: public.parts\nmatch: {{ columns: [sku] }}\nheld.retry: 100ms\n\
         map: '{{ sku, name, price, at }}'\n{more}\n"
    )
}

async fn count(client: &Client, what: &str) -> i64 {
    client.query_one(&format!("SELECT count(*) FROM {what}"), &[]).await.unwrap().get(0)
}

async fn text(client: &Client, query: &str) -> String {
    match client.query_opt(query, &[]).await.unwrap_or_else(|error| panic!("{query}: {error:?}")) {
        Some(row) => row.get::<_, Option<String>>(0).unwrap_or_else(|| "NULL".to_owned()),
        None => "no row".to_owned(),
    }
}

async fn becomes(client: &Client, query: &str, wanted: &str) {
    eventually(Duration::from_secs(15), query, async || {
        let seen = text(client, query).await;
        if seen == wanted { Ok(()) } else { Err(seen) }
    })
    .await;
}

#[tokio::test]
async fn nothing_is_written_where_nothing_changed() {
    let (database, client) = world("quiet").await;
    let api = Api::start(parts(5)).await;
    let stage = stage(&database, &api).await;
    let incremental = "incremental: { cursor: .at, initial: '2025-01-01T00:00:00Z', lookback: 5m }";
    let running = stage.start(&pull("/all", incremental));
    running.ended_a_run().await;
    running.ended_a_run().await;
    let own = async || {
        let mut all = String::new();
        for table in ["links", "cursors", "held", "parked", "leases"] {
            all += &text(&client, &format!("SELECT md5(string_agg(t::text || t.xmin, ',')) FROM tidegate.{table} t"))
                .await;
        }
        all
    };
    let before = text(&client, "SELECT md5(string_agg(p::text || p.xmin, ',' ORDER BY id)) FROM parts p").await;
    let links = own().await;
    api.asked();
    eventually(Duration::from_secs(10), "four more runs", async || api.inside.lock().unwrap().asked.len() > 4).await;
    assert_eq!(own().await, links);
    running.stop().await.unwrap();
    assert_eq!(text(&client, "SELECT md5(string_agg(p::text || p.xmin, ',' ORDER BY id)) FROM parts p").await, before);
}

#[tokio::test]
async fn records_pair_with_rows_that_are_there_and_missing_is_not_null() {
    let (database, client) = world("pairing").await;
    client
        .batch_execute(
            "INSERT INTO parts (sku, name, price, note) VALUES ('S1', 'old', 1, 'mine'), ('S2', 'old', 1, 'mine')",
        )
        .await
        .unwrap();
    let api = Api::start(vec![
        json!({"id": 1, "sku": "S1", "name": "new", "note": null}),
        json!({"id": 2, "sku": "S2", "name": "new"}),
        json!({"id": 3, "sku": "S3", "name": "new", "price": 5.50}),
    ])
    .await;
    let stage = stage(&database, &api).await;
    let yaml = pull("/all", "keep: '{ grade: .id }'").replace("map: '{ sku, name, price, at }'", "map: 'del(.id)'");
    stage.run_once(&yaml).await;
    let rows = text(
        &client,
        "SELECT string_agg(concat_ws(' ', sku, name, price, coalesce(note, 'NULL')), ', ' ORDER BY id) FROM parts",
    )
    .await;
    assert_eq!(rows, "S1 new 1.00 NULL, S2 new 1.00 mine, S3 new 5.50 none");
    assert_eq!(
        text(&client, "SELECT string_agg(external_id || ' ' || (local_key ->> 'id') || ' ' || (kept ->> 'grade'), ', ' ORDER BY external_id) FROM tidegate.links").await,
        "1 1 1, 2 2 2, 3 3 3"
    );
}

#[tokio::test]
async fn a_record_that_cant_be_written_is_parked_and_the_others_go_on() {
    let (database, client) = world("parked").await;
    let mut records = parts(5);
    records[1]["price"] = json!("-1");
    records[2]["price"] = json!("many");
    records[3]["at"] = json!("yesterday evening");
    let api = Api::start(records.clone()).await;
    let stage = stage(&database, &api).await;
    let running = stage.start(&pull("/all", ""));
    becomes(&client, "SELECT string_agg(sku, ' ' ORDER BY sku) FROM parts", "S1 S5").await;
    let reasons =
        text(&client, "SELECT string_agg((key ->> 'id') || ': ' || reason, E'\\n' ORDER BY key) FROM tidegate.parked")
            .await;
    for reason in ["2: ", "parts_price_check", "3: ", "\"many\"", "4: ", "yesterday evening"] {
        assert!(reasons.contains(reason), "{reason} in {reasons}");
    }
    // Put right upstream, it is applied, and is no dead letter any more.
    api.set(parts(5));
    becomes(&client, "SELECT string_agg(sku, ' ' ORDER BY sku) FROM parts", "S1 S2 S3 S4 S5").await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.parked", "0").await;
    // Wrong again in the very same way, it is one again.
    api.set(records);
    becomes(&client, "SELECT string_agg(key ->> 'id', ' ' ORDER BY key ->> 'id') FROM tidegate.parked", "2 3 4").await;
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_record_is_shown_copied_once_replayed_and_dropped() {
    let (database, client) = world("letters").await;
    let mut records = parts(4);
    records[1]["price"] = json!("-1");
    records[2]["price"] = json!("many");
    let api = Api::start(records).await;
    let systems = format!("systems: {{ api: {{ base_url: \"{}\" }} }}", api.url());
    let workshop = Workshop::new(&database.url(), WorkerLog::Embedded, &systems);
    workshop.connector("parts.yaml", &pull("/all", "errors.deadletterqueue.topic.name: dead.parts"));
    let _worker = workshop.start().await;
    becomes(&client, "SELECT string_agg(sku, ' ' ORDER BY sku) FROM parts", "S1 S4").await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.parked", "2").await;
    let listed: Value =
        serde_json::from_str(&workshop.ask(["dead-letters", "list", "--output", "json"]).await).unwrap();
    let id = |of: i64| {
        let letters = listed.as_array().unwrap();
        letters.iter().find(|letter| letter["key"]["id"] == of).unwrap()["id"].as_str().unwrap().to_owned()
    };
    let shown = workshop.ask(["dead-letters", "show", "parts", &id(2)]).await;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["record"]["sku"], "S2", "{shown}");
    assert!(shown["reason"].as_str().unwrap().contains("parts_price_check"), "{shown}");
    // It comes with every listing, and is neither tried nor copied each time.
    let runs = async || workshop.connector_status("parts").await["facts"]["runs"].as_u64().unwrap_or(0);
    let before = runs().await;
    eventually(Duration::from_secs(20), "three more runs", async || runs().await > before + 3).await;
    assert_eq!(workshop.consume("dead.parts").await.len(), 2);
    assert_eq!(text(&client, "SELECT string_agg(attempts::text, ' ') FROM tidegate.parked").await, "1 1");
    // The table takes it by now; the other one is given up, though the listing still has it.
    client.batch_execute("ALTER TABLE parts DROP CONSTRAINT parts_price_check").await.unwrap();
    workshop.ask(["dead-letters", "replay", "parts", &id(2)]).await;
    becomes(&client, "SELECT string_agg(sku, ' ' ORDER BY sku) FROM parts", "S1 S2 S4").await;
    workshop.ask(["dead-letters", "drop", "parts", &id(3)]).await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.parked", "0").await;
    let before = runs().await;
    eventually(Duration::from_secs(20), "two more runs", async || runs().await > before + 2).await;
    assert_eq!(count(&client, "tidegate.parked").await, 0);
    // Put right upstream it is another record.
    api.set(parts(4));
    becomes(&client, "SELECT string_agg(sku, ' ' ORDER BY sku) FROM parts", "S1 S2 S3 S4").await;
}

#[tokio::test]
async fn a_pull_that_was_forgotten_reads_everything_again_under_its_old_name() {
    let (database, client) = world("forgotten_pull").await;
    let api = Api::start(parts(3)).await;
    let systems = format!("systems: {{ api: {{ base_url: \"{}\" }} }}", api.url());
    let workshop = Workshop::new(&database.url(), WorkerLog::Embedded, &systems);
    let file = pull("/all", "incremental: { cursor: .at, initial: '2025-01-01T00:00:00Z', lookback: 5m }");
    workshop.connector("parts.yaml", &file);
    let _worker = workshop.start().await;
    becomes(&client, "SELECT string_agg(sku, ' ' ORDER BY sku) FROM parts", "S1 S2 S3").await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.cursors WHERE cursor IS NOT NULL", "1").await;
    workshop.remove("parts.yaml");
    eventually(Duration::from_secs(60), "it is forgotten", async || {
        let output = workshop.cli(["connectors", "forget", "parts"]).await;
        if output.status.success() { Ok(()) } else { Err(format!("{output:?}")) }
    })
    .await;
    assert_eq!(count(&client, "tidegate.cursors").await, 0);
    assert_eq!(count(&client, "tidegate.links").await, 3, "links belong to the system");
    workshop.connector("parts.yaml", &file);
    becomes(&client, "SELECT count(*)::text FROM tidegate.cursors WHERE cursor IS NOT NULL", "1").await;
}

#[tokio::test]
async fn what_the_table_refused_is_tried_again_by_itself_until_it_takes_it() {
    let (database, client) = world("refused").await;
    database
        .execute("CREATE TABLE makers (id int PRIMARY KEY); ALTER TABLE parts ADD maker int REFERENCES makers (id)")
        .await;
    let mut record = part(1, "2026-01-01T00:00:00Z");
    record["maker"] = json!(7);
    let api = Api::start(vec![record]).await;
    let stage = stage(&database, &api).await;
    let running = stage.start(&pull("/all", "").replace("{ sku,", "{ maker, sku,"));
    becomes(&client, "SELECT count(*)::text FROM tidegate.parked WHERE reason LIKE '%parts_maker_fkey%'", "1").await;
    let wait = "SELECT (attempts, round(extract(epoch FROM retry_at - tried_at)))::text FROM tidegate.parked";
    assert_eq!(text(&client, wait).await, "(1,60)");
    let due = "UPDATE tidegate.parked SET retry_at = now()";
    client.batch_execute(due).await.unwrap();
    becomes(&client, wait, "(2,120)").await;
    client.batch_execute("UPDATE tidegate.parked SET attempts = 30").await.unwrap();
    client.batch_execute(due).await.unwrap();
    becomes(&client, wait, "(31,3600)").await;
    // What it refers to has come.
    client.batch_execute("INSERT INTO makers VALUES (7)").await.unwrap();
    client.batch_execute(due).await.unwrap();
    becomes(&client, "SELECT string_agg(sku || maker, ' ') FROM parts", "S17").await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.parked", "0").await;
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pull_writes_is_captured_with_its_system_as_origin() {
    let (database, client) = world("pull_origin").await;
    let api = Api::start(parts(2)).await;
    let stage = stage(&database, &api).await;
    let world = World::new(&database, &[r"public\.parts"]);
    let capture = world.start().await;
    capture.streaming().await;
    stage.run_once(&pull("/all", "")).await;
    client.batch_execute("UPDATE parts SET note = 'by hand' WHERE sku = 'S1'").await.unwrap();
    let changes = world.wait_for_changes("shop.public.parts", 3).await;
    let origins: Vec<_> = changes.iter().map(|change| change.origin.as_deref()).collect();
    assert_eq!(origins, [Some("api"), Some("api"), None]);
    capture.stop().await.unwrap();
}

#[tokio::test]
async fn a_locked_row_is_passed_and_applied_later() {
    let (database, mut client) = world("locked").await;
    let api = Api::start(parts(3)).await;
    let stage = stage(&database, &api).await;
    let yaml = pull("/all", "");
    stage.run_once(&yaml).await;
    let mut changed = parts(3);
    changed.iter_mut().for_each(|part| part["name"] = json!("new"));
    api.set(changed);
    let watching = database.connect().await;
    let lock = client.transaction().await.unwrap();
    lock.execute("SELECT FROM parts WHERE sku = 'S2' FOR UPDATE", &[]).await.unwrap();
    let running = stage.start(&yaml);
    becomes(&watching, "SELECT string_agg(sku, ' ' ORDER BY sku) FROM parts WHERE name = 'new'", "S1 S3").await;
    becomes(&watching, "SELECT reason FROM tidegate.held", "the row is locked by another transaction").await;
    lock.commit().await.unwrap();
    becomes(&watching, "SELECT string_agg(sku, ' ' ORDER BY sku) FROM parts WHERE name = 'new'", "S1 S2 S3").await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_deadlock_is_survived() {
    let (database, mut client) = world("deadlock").await;
    // Writing S1 also locks the row of a table that the other transaction holds while it wants the parts.
    client
        .batch_execute(
            "CREATE TABLE totals (id int PRIMARY KEY, n int); INSERT INTO totals VALUES (1, 0);
             CREATE FUNCTION total() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE totals SET n = n + 1; RETURN NEW; END $$;
             CREATE TRIGGER total AFTER INSERT ON parts FOR EACH ROW EXECUTE FUNCTION total();",
        )
        .await
        .unwrap();
    let api = Api::start(parts(2)).await;
    let stage = stage(&database, &api).await;
    let other = client.transaction().await.unwrap();
    other.execute("UPDATE totals SET n = n", &[]).await.unwrap();
    let running = stage.start(&pull("/all", "lock.timeout: 20s"));
    let watching = database.connect().await;
    eventually(Duration::from_secs(10), "the pull waits for the total", async || {
        count(&watching, "pg_locks WHERE NOT granted").await > 0
    })
    .await;
    // Now each waits for the other: the server ends one of them, and the pull's page comes again if it was the pull's.
    let inserted = other.execute("INSERT INTO parts (sku, name) VALUES ('S1', 'first')", &[]).await;
    match inserted {
        Ok(_) => other.commit().await.unwrap(),
        Err(_) => other.rollback().await.unwrap(),
    }
    becomes(&watching, "SELECT string_agg(sku || ' ' || name, ', ' ORDER BY sku) FROM parts", "S1 part 1, S2 part 2")
        .await;
    assert_eq!(count(&watching, "tidegate.parked").await, 0);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn rows_beside_a_linked_one_are_found_through_its_link() {
    let (database, client) = world("beside").await;
    client
        .batch_execute("CREATE TABLE stock (part_id int PRIMARY KEY REFERENCES parts, on_hand numeric)")
        .await
        .unwrap();
    let api = Api::start(parts(2)).await;
    let stage = stage(&database, &api).await;
    let stock = "name: stock\ntype: http-pull\nsystem: api\nobject: part\nevery: 150ms\nrequest: GET /all\ninto: public.stock\n\
        held.retry: 100ms\nmap: '{ part_id: local(\"part\"; .id), on_hand: (.id * 10) }'\n";
    let running = stage.start(stock);
    running.ended_a_run().await;
    assert_eq!(count(&client, "stock").await, 0);
    stage.run_once(&pull("/all", "")).await;
    becomes(&client, "SELECT string_agg(on_hand::text, ' ' ORDER BY part_id) FROM stock", "10 20").await;
    assert_eq!(count(&client, "tidegate.links").await, 2);
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_preview_says_what_would_be_written_and_writes_nothing() {
    let (database, client) = world("preview").await;
    client.batch_execute("INSERT INTO parts (sku, name) VALUES ('S2', 'old')").await.unwrap();
    let mut records = parts(3);
    records[2]["price"] = json!("many");
    let api = Api::start(records).await;
    let stage = stage(&database, &api).await;
    let seen = stage.preview(&pull("/all", "")).await;
    let done: Vec<&str> = seen.iter().map(|line| line["do"].as_str().unwrap()).collect();
    assert_eq!(done, ["insert", "pair and update", "park"], "{seen:?}");
    assert_eq!(seen[0]["row"]["price"].to_string(), "9.90");
    assert_eq!((count(&client, "parts").await, count(&client, "tidegate.links").await), (1, 0));
    assert_eq!(count(&client, "tidegate.cursors").await, 0);
}
