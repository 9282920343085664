//! Pulls into a real PostgreSQL: from a real Tryton, and from a small API for the ways of paging Tryton has not.

use std::time::Duration;

use serde_json::{Value, json};
use tidegate::datastore::put_aside;
use tidegate::pipeline::{ConnectorState, ResetTo};
use tidegate::systems::BreakerState;
use tokio_postgres::Client;

use crate::support::capture::World;
use crate::support::{
    Api, Database, Fault, Postgres, Proxy, Script, Stage, Tryton, Version, WorkerLog, Workshop, eventually,
};

const PARTS: &str = "CREATE TABLE parts (
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

fn pull(request: &str, more: &str) -> String {
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
async fn every_way_of_paging_brings_every_record_once() {
    for (request, more) in [
        ("/all", ""),
        ("/offset", "paginator: { type: offset, limit: 3 }"),
        ("/page", "paginator: { type: page_number, limit_param: size, limit: 2 }\nrecords: .results"),
        ("/cursor", "paginator: { type: cursor, cursor_path: .paging.next, cursor_param: after }\nrecords: .data"),
        ("/link", "paginator: { type: link }"),
        (
            "/since",
            "params: { since: '{{ $cursor }}', limit: 3 }\npaginator: { type: single, limit: 3 }\n\
             incremental: { cursor: .at, tie_breaker: .id, initial: '2026-01-01T00:00:00Z' }",
        ),
    ] {
        let (database, client) = world("paging").await;
        let api = Api::start(parts(7)).await;
        let stage = stage(&database, &api).await;
        let status = stage.run_once(&pull(request, more)).await;
        assert_eq!(count(&client, "parts").await, 7, "{request}");
        assert_eq!(count(&client, "tidegate.links WHERE system = 'api' AND object = 'part'").await, 7, "{request}");
        assert_eq!(status.counts().applied, 7, "{request}");
    }
}

#[tokio::test]
async fn a_system_that_gives_fewer_than_asked_for_is_still_read_to_its_end() {
    let (database, client) = world("capped").await;
    let api = Api::start(parts(7)).await;
    api.inside.lock().unwrap().most = Some(3);
    let stage = stage(&database, &api).await;
    stage.run_once(&pull("/offset", "paginator: { type: offset, limit: 100 }")).await;
    assert_eq!(count(&client, "parts").await, 7);
}

#[tokio::test]
async fn a_listing_that_gets_nowhere_stops_with_what_to_look_at() {
    let (database, _client) = world("stalled").await;
    let api = Api::start(parts(7)).await;
    let stage = stage(&database, &api).await;
    let fault = stage.start(&pull("/broken", "paginator: { type: offset, limit: 3 }")).fails().await;
    assert!(fault.contains("same as the page before") && fault.contains("paginator"), "{fault}");

    // Five records of one time, and three to a page.
    api.set((1..=5).map(|id| part(id, "2026-01-01T00:00:00Z")).collect());
    let since = "params: { since: '{{ $cursor }}', limit: 3 }\npaginator: { type: single, limit: 3 }\n\
        incremental: { cursor: .at, initial: '2026-01-01T00:00:00Z' }";
    let fault = stage.start(&pull("/since", since).replace("name: parts", "name: ties")).fails().await;
    assert!(fault.contains("share the cursor") && fault.contains("limit"), "{fault}");
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
async fn a_row_with_unsent_changes_holds_its_record_back_until_they_are_gone() {
    let (database, client) = world("held").await;
    let api = Api::start(parts(2)).await;
    let stage = stage(&database, &api).await;
    let running = stage.start(&pull("/all", ""));
    running.ended_a_run().await;
    client.batch_execute("UPDATE parts SET name = 'mine' WHERE sku = 'S1'").await.unwrap();
    let mut changed = parts(2);
    changed[0]["name"] = json!("theirs");
    changed[1]["name"] = json!("theirs");
    api.set(changed);
    becomes(&client, "SELECT name FROM parts WHERE sku = 'S2'", "theirs").await;
    becomes(&client, "SELECT reason FROM tidegate.held", "the row has unsent changes in name").await;
    assert_eq!(text(&client, "SELECT name FROM parts WHERE sku = 'S1'").await, "mine");
    assert!(running.status.counts().waiting > 0);
    // Taken back, so that nothing is unsent any more.
    client.batch_execute("UPDATE parts SET name = 'part 1' WHERE sku = 'S1'").await.unwrap();
    becomes(&client, "SELECT name FROM parts WHERE sku = 'S1'", "theirs").await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.held", "0").await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn whose_value_wins_goes_by_the_conflict_setting() {
    for (setting, name, note) in [
        ("conflict: upstream", "theirs", "theirs"),
        ("conflict: datastore", "mine", "mine"),
        ("conflict: merge\nowner: { name: datastore, note: upstream }", "mine", "theirs"),
    ] {
        let (database, client) = world("conflict").await;
        let record = |text: &str| json!({"id": 1, "sku": "S1", "name": text, "note": text});
        let api = Api::start(vec![record("agreed")]).await;
        let stage = stage(&database, &api).await;
        let yaml = pull("/all", setting).replace("{ sku, name, price, at }", "{ sku, name, note }");
        stage.run_once(&yaml).await;
        client.batch_execute("UPDATE parts SET name = 'mine', note = 'mine'").await.unwrap();
        api.set(vec![record("theirs")]);
        stage.run_once(&yaml).await;
        assert_eq!(text(&client, "SELECT name || ' ' || note FROM parts").await, format!("{name} {note}"), "{setting}");
        // What the datastore keeps differs from what is agreed on: a sink sends it.
        assert_eq!(text(&client, "SELECT base_doc #>> '{after,name}' FROM tidegate.links").await, "theirs");
    }
}

#[tokio::test]
async fn the_later_change_wins_and_within_the_clocks_skew_it_is_held() {
    let (database, client) = world("newest").await;
    let record = |text: &str, at: &str| json!({"id": 1, "sku": "S1", "name": text, "changed": at});
    let api = Api::start(vec![record("agreed", "2026-01-01T00:00:00Z")]).await;
    let stage = stage(&database, &api).await;
    let yaml = pull("/all", "conflict: newest\nnewest: { record: .changed, column: at, skew: 5s }")
        .replace("{ sku, name, price, at }", "{ sku, name }");
    stage.run_once(&yaml).await;
    let edit = async |name: &str, at: &str| {
        client.execute("UPDATE parts SET name = $1, at = $2::text::timestamptz", &[&name, &at]).await.unwrap();
    };
    edit("mine, later", "2026-01-01T00:20:00Z").await;
    api.set(vec![record("theirs, earlier", "2026-01-01T00:10:00Z")]);
    stage.run_once(&yaml).await;
    assert_eq!(text(&client, "SELECT name FROM parts").await, "mine, later");
    edit("mine, earlier", "2026-01-01T00:30:00Z").await;
    api.set(vec![record("theirs, later", "2026-01-01T00:40:00Z")]);
    stage.run_once(&yaml).await;
    assert_eq!(text(&client, "SELECT name FROM parts").await, "theirs, later");
    edit("mine, at the same time", "2026-01-01T00:50:00Z").await;
    api.set(vec![record("theirs, at the same time", "2026-01-01T00:50:03Z")]);
    stage.run_once(&yaml).await;
    assert_eq!(text(&client, "SELECT name FROM parts").await, "mine, at the same time");
    assert_eq!(text(&client, "SELECT reason FROM tidegate.held").await, "the row has unsent changes in name");
}

#[tokio::test]
async fn a_record_that_cant_be_written_is_parked_and_the_others_go_on() {
    let (database, client) = world("parked").await;
    let mut records = parts(5);
    records[1]["price"] = json!("-1");
    records[2]["price"] = json!("many");
    records[3]["at"] = json!("yesterday evening");
    let api = Api::start(records).await;
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
async fn the_cursor_moves_with_ties_and_lookback_and_survives_a_restart() {
    let (database, client) = world("cursor").await;
    let api = Api::start(vec![part(1, "2026-01-01T00:10:00Z"), part(2, "2026-01-01T00:10:00Z")]).await;
    let stage = stage(&database, &api).await;
    let yaml = pull(
        "/since",
        "params: { since: '{{ $cursor }}' }\n\
         incremental: { cursor: .at, tie_breaker: .id, initial: '2025-01-01T00:00:00Z', lookback: 5m }",
    );
    stage.run_once(&yaml).await;
    assert!(api.asked()[0].contains("since=2025-01-01T00:00:00Z"));
    // One that was committed late, within the lookback, and one of the very same time.
    api.inside.lock().unwrap().records.extend([part(3, "2026-01-01T00:06:00Z"), part(4, "2026-01-01T00:10:00Z")]);
    stage.run_once(&yaml).await;
    assert!(api.asked()[0].contains("since=2026-01-01T00:05:00Z"));
    assert_eq!(text(&client, "SELECT string_agg(sku, ' ' ORDER BY sku) FROM parts").await, "S1 S2 S3 S4");
    stage.reset(&yaml, &ResetTo::Cursor(json!("2026-01-01T00:08:00Z"))).await;
    stage.run_once(&yaml).await;
    assert!(api.asked()[0].contains("since=2026-01-01T00:03:00Z"));
}

#[tokio::test]
async fn a_killed_run_goes_on_at_its_page() {
    let (database, client) = world("killed").await;
    let api = Api::start(parts(20)).await;
    let proxy = Proxy::start(api.address).await;
    let settings = format!("base_url: {}/v1", proxy.url());
    let stage = Stage::new(&database, &[("api", &settings)]).await;
    let yaml = pull("/offset", "paginator: { type: offset, limit: 5 }");
    proxy.script(Script::on("GET", "offset=10", Fault::Delay(Duration::from_secs(60))).times(1));
    let running = stage.start(&yaml);
    eventually(Duration::from_secs(10), "the third page is asked for", async || proxy.count("GET", "offset=10") == 1)
        .await;
    running.kill().await;
    assert_eq!(count(&client, "parts").await, 10);
    proxy.forget_seen();
    stage.run_once(&yaml).await;
    assert_eq!(count(&client, "parts").await, 20);
    assert!(proxy.seen()[0].path.contains("offset=10"), "{:?}", proxy.seen()[0]);
}

/// Ways of paging, with a page that is not the first, as the proxy sees its request.
const WAYS: [(&str, &str, &str); 5] = [
    ("/offset", "paginator: { type: offset, limit: 2 }", "offset=4"),
    ("/page", "paginator: { type: page_number, limit_param: size, limit: 2 }\nrecords: .results", "page=3"),
    (
        "/cursor",
        "paginator: { type: cursor, cursor_path: .paging.next, cursor_param: after }\nrecords: .data",
        "after=4",
    ),
    ("/link", "paginator: { type: link }", "page=2"),
    (
        "/since",
        "params: { since: '{{ $cursor }}', limit: 3 }\npaginator: { type: single, limit: 3 }",
        "since=2026-01-01T00%3A00%3A05",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_between_pages_goes_on_at_its_page_whatever_the_way_and_skips_nothing() {
    for (index, (request, paging, page)) in WAYS.into_iter().enumerate() {
        let (database, client) = world("pages").await;
        let api = Api::start(parts(7)).await;
        let proxy = Proxy::start(api.address).await;
        let systems = format!("systems: {{ api: {{ base_url: \"{}/v1\" }} }}", proxy.url());
        let workshop = Workshop::new(&database.url(), WorkerLog::Embedded, &systems);
        let incremental =
            "incremental: { cursor: .at, tie_breaker: .id, initial: '2025-01-01T00:00:00Z', lookback: 5m }";
        let mut yaml = pull(request, &format!("{paging}\n{incremental}"));
        if index % 2 == 0 {
            // A listing that was broken off goes on at once; the next one is a minute away.
            yaml = yaml.replace("every: 150ms", "cron: '* * * * *'");
        }
        workshop.connector("parts.yaml", &yaml);
        proxy.script(Script::on("GET", page, Fault::Delay(Duration::from_secs(60))).times(1));
        let worker = workshop.start().await;
        eventually(Duration::from_secs(20), &format!("{request}: {page}"), async || match proxy.count("GET", page) {
            0 => Err(format!("{:?}", proxy.seen().iter().map(|seen| seen.path.clone()).collect::<Vec<_>>())),
            _ => Ok(()),
        })
        .await;
        worker.kill9().await;
        let there = count(&client, "parts").await;
        assert!((1..7).contains(&there), "{request}: {there} of 7 when it was killed");
        proxy.forget_seen();
        let _worker = workshop.start().await;
        becomes(&client, "SELECT count(*)::text FROM parts", "7").await;
        assert!(proxy.seen()[0].path.contains(page), "{request}: {:?}", proxy.seen()[0]);
        assert_eq!(count(&client, "tidegate.links").await, 7);
        if index % 2 == 1 {
            // Committed late: before the cursor, within the lookback; and one of the cursor's own time.
            api.inside
                .lock()
                .unwrap()
                .records
                .extend([part(8, "2026-01-01T00:00:02Z"), part(9, "2026-01-01T00:00:07Z")]);
            becomes(&client, "SELECT count(*)::text FROM parts", "9").await;
        }
    }
}

#[tokio::test]
async fn a_page_older_than_a_delivery_is_held_and_listed_again() {
    let (database, client) = world("older").await;
    let api = Api::start(parts(1)).await;
    let proxy = Proxy::start(api.address).await;
    let settings = format!("base_url: {}/v1", proxy.url());
    let stage = Stage::new(&database, &[("api", &settings)]).await;
    let yaml = pull("/all", "conflict: upstream").replace("150ms", "1h");
    stage.run_once(&yaml).await;
    // A page is on its way while a delivery sends a newer name.
    let mut old = parts(1);
    old[0]["name"] = json!("before the delivery");
    api.set(old);
    proxy.script(Script::on("GET", "/all", Fault::Delay(Duration::from_millis(700))).times(1));
    proxy.forget_seen();
    let running = stage.start(&yaml);
    eventually(Duration::from_secs(10), "the page is asked for", async || proxy.count("GET", "/all") == 1).await;
    tokio::time::sleep(Duration::from_millis(200)).await; // the server has answered, the proxy has not
    client
        .batch_execute(
            "UPDATE parts SET name = 'delivered'; UPDATE tidegate.links SET pushed_seq = nextval('tidegate.push_seq'), \
             base_doc = jsonb_set(base_doc::jsonb, '{after,name}', '\"delivered\"')::json",
        )
        .await
        .unwrap();
    let mut new = parts(1);
    new[0]["name"] = json!("after the delivery");
    api.set(new);
    becomes(&client, "SELECT reason FROM tidegate.held", "it was sent to the system after this page was fetched").await;
    assert_eq!(text(&client, "SELECT name FROM parts").await, "delivered");
    // It is listed again at once, though the next run is an hour away.
    becomes(&client, "SELECT name FROM parts", "after the delivery").await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.held", "0").await;
    assert!(text(&client, "SELECT string_agg(name, '') FROM parts").await != "before the delivery");
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_record_older_than_what_is_known_is_held_and_listed_again() {
    let (database, client) = world("version").await;
    let versioned = |name: &str, version: i64| {
        let mut record = part(1, "2026-01-01T00:00:01Z");
        record["name"] = json!(name);
        record["version"] = json!(version);
        record
    };
    let api = Api::start(vec![versioned("nine", 9)]).await;
    let stage = stage(&database, &api).await;
    let yaml = pull("/all", "conflict: upstream\nversion: .version");
    stage.run_once(&yaml).await;
    // A delivery was answered with version 11, and the listing lags behind it.
    client
        .batch_execute(
            "UPDATE parts SET name = 'eleven'; UPDATE tidegate.links SET remote_version = '11', generation = generation + 1, \
             base_doc = jsonb_set(base_doc::jsonb, '{after,name}', '\"eleven\"')::json",
        )
        .await
        .unwrap();
    api.set(vec![versioned("ten", 10)]);
    let hourly = yaml.replace("150ms", "1h");
    let running = stage.start(&hourly);
    becomes(&client, "SELECT reason FROM tidegate.held", "its version 10 is older than 11, which was seen before")
        .await;
    assert_eq!(text(&client, "SELECT name FROM parts").await, "eleven");
    // Asked again, though the next run is an hour away, until the system shows as much.
    api.set(vec![versioned("twelve", 12)]);
    becomes(&client, "SELECT name FROM parts", "twelve").await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.held", "0").await;
    assert_eq!(text(&client, "SELECT remote_version FROM tidegate.links").await, "12");
    // One that is gone from the listing is not waited for.
    api.set(vec![versioned("eight", 8)]);
    running.stop().await.unwrap();
    let running = stage.start(&hourly);
    becomes(&client, "SELECT count(*)::text FROM tidegate.held", "1").await;
    api.set(vec![]);
    becomes(&client, "SELECT count(*)::text FROM tidegate.held", "0").await;
    running.stop().await.unwrap();
    // A system that was set back: a reset makes its versions count anew.
    api.set(vec![versioned("three", 3)]);
    stage.reset(&yaml, &ResetTo::Beginning).await;
    stage.run_once(&yaml).await;
    assert_eq!(text(&client, "SELECT name FROM parts").await, "three");
}

#[tokio::test]
async fn a_replayed_dead_letter_does_not_overwrite_a_row_delivered_since() {
    let (database, client) = world("replayed").await;
    let api = Api::start(parts(1)).await;
    let stage = stage(&database, &api).await;
    let yaml = pull("/all", "conflict: upstream").replace("150ms", "1h");
    stage.run_once(&yaml).await;
    let mut bad = parts(1);
    bad[0]["price"] = json!("many");
    api.set(bad);
    let running = stage.start(&yaml);
    becomes(&client, "SELECT count(*)::text FROM tidegate.parked", "1").await;
    let mut new = parts(1);
    new[0]["name"] = json!("after the delivery");
    api.set(new);
    client
        .batch_execute(
            "UPDATE parts SET name = 'delivered'; UPDATE tidegate.links SET pushed_seq = nextval('tidegate.push_seq'), \
             base_doc = jsonb_set(base_doc::jsonb, '{after,name}', '\"delivered\"')::json;
             UPDATE tidegate.parked SET command = 'replay', \
             record_value = convert_to('{\"id\": 1, \"sku\": \"S1\", \"name\": \"old letter\", \"price\": \"1.00\"}', 'UTF8')",
        )
        .await
        .unwrap();
    // The letter is as old as can be: it is listed again, though the next run is an hour away.
    becomes(&client, "SELECT name FROM parts", "after the delivery").await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.parked", "0").await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.held", "0").await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn only_a_push_that_is_done_asks_for_a_new_listing() {
    let (database, client) = world("due").await;
    let api = Api::start(parts(1)).await;
    let stage = stage(&database, &api).await;
    stage.run_once(&pull("/all", "")).await;
    client
        .batch_execute(
            "UPDATE tidegate.links SET intent = '{\"id\":\"i\",\"operation\":\"update\",\"request\":\"PUT /\",\"idempotency_key\":\"k\",\"owner\":\"o\",\"started_ms\":0,\"document\":{}}';
             INSERT INTO tidegate.held (connector, system, object, external_id, record, reason, push_seq, cursor, retry_at) \
                 VALUES ('parts', 'api', 'part', '1', '{}', 'in flight', 0, 'null', now())",
        )
        .await
        .unwrap();
    let held = stage.datastore.client().await.unwrap();
    assert!(!put_aside(&held, "parts").await.unwrap().stale, "the push is under way");
    client.batch_execute("UPDATE tidegate.links SET intent = NULL, pushed_seq = 1").await.unwrap();
    assert!(put_aside(&held, "parts").await.unwrap().stale, "the push is done");
}

#[tokio::test]
async fn a_record_without_an_id_or_a_cursor_stops_only_itself() {
    let (database, client) = world("lone").await;
    let mut records = parts(4);
    records[1].as_object_mut().unwrap().remove("id");
    records[2]["at"] = json!("zzz");
    records[3]["at"] = json!({"no": "time"});
    let api = Api::start(records).await;
    let stage = stage(&database, &api).await;
    let yaml = pull("/all", "incremental: { cursor: .at, initial: '2025-01-01T00:00:00Z', lookback: 5m }");
    let running = stage.start(&yaml);
    becomes(&client, "SELECT string_agg(sku, ' ') FROM parts", "S1").await;
    becomes(&client, "SELECT count(*)::text FROM tidegate.parked", "3").await;
    assert_eq!(count(&client, "tidegate.parked WHERE key ? 'record' AND reason LIKE '%no id%'").await, 1);
    assert_eq!(
        count(&client, "tidegate.parked WHERE reason LIKE '%incremental.cursor%' OR reason LIKE '%lookback%'").await,
        2
    );
    assert!(text(&client, "SELECT cursor ->> 'cursor' FROM tidegate.cursors").await.starts_with("2026-01-01T00:00:02"));
    running.stop().await.unwrap();

    // Where no record has one, it is the setting.
    let fault = stage.start(&(pull("/all", "id: .nothing").replace("name: parts", "name: none"))).fails().await;
    assert!(fault.contains("id: .nothing"), "{fault}");
}

#[tokio::test]
async fn an_answer_over_the_limit_says_so_and_leaves_the_breaker_closed() {
    let (database, _client) = world("long").await;
    let api = Api::start(parts(50)).await;
    let settings = format!("base_url: {}\nbreaker: {{ failures: 1, open: 200ms }}\nresponse.limit: 1kb", api.url());
    let stage = Stage::new(&database, &[("api", &settings)]).await;
    let fault = stage.start(&pull("/all", "")).fails().await;
    assert!(fault.contains("longer than 1kb") && fault.contains("response.limit"), "{fault}");
    assert_eq!(stage.systems["api"].breaker(), BreakerState::Closed);
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
async fn records_without_a_link_wait_while_a_create_is_under_way() {
    let (database, client) = world("creating").await;
    let api = Api::start(parts(1)).await;
    let stage = stage(&database, &api).await;
    client
        .batch_execute(
            "INSERT INTO parts (sku, name) VALUES ('X', 'being created');
             INSERT INTO tidegate.links (system, object, table_name, local_key, intent) VALUES ('api', 'part', 'public.parts', '{\"id\": 1}',
               '{\"id\":\"i\",\"operation\":\"create\",\"request\":\"POST /\",\"idempotency_key\":\"k\",\"owner\":\"o\",\"started_ms\":0,\"document\":{}}')",
        )
        .await
        .unwrap();
    let running = stage.start(&pull("/all", ""));
    becomes(&client, "SELECT reason FROM tidegate.held", "it may be what the open create of row {\"id\":1} has made")
        .await;
    assert_eq!(count(&client, "parts").await, 1);
    // It was: the create's answer came.
    client
        .batch_execute(
            "UPDATE tidegate.links SET intent = NULL, external_id = '1', external_json = '1', \
             base_doc = json_build_object('key', local_key, 'after', (SELECT row_to_json(p) FROM parts p))",
        )
        .await
        .unwrap();
    becomes(&client, "SELECT count(*)::text FROM tidegate.held", "0").await;
    assert_eq!(count(&client, "parts").await, 1);
    running.stop().await.unwrap();
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

#[tokio::test]
async fn a_pull_pauses_behind_the_breaker_and_goes_on_when_the_system_is_back() {
    let (database, client) = world("away").await;
    let api = Api::start(parts(2)).await;
    let proxy = Proxy::start(api.address).await;
    let settings = format!("base_url: {}/v1\nprobe: GET /all\nbreaker: {{ failures: 2, open: 200ms }}", proxy.url());
    let stage = Stage::new(&database, &[("api", &settings)]).await;
    proxy.down();
    let running = stage.start(&pull("/all", ""));
    eventually(Duration::from_secs(20), "the connector waits", async || running.state() == ConnectorState::Waiting)
        .await;
    proxy.up().await;
    becomes(&client, "SELECT count(*)::text FROM parts", "2").await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn products_and_stock_come_from_a_real_erp() {
    let tryton = Tryton::start().await;
    let database = Postgres::shared(Version::Distribution).await.database("erp_pull").await;
    database
        .execute(
            "CREATE TABLE products (id serial PRIMARY KEY, sku text UNIQUE, name text, price numeric(10,2));
             CREATE TABLE inventory (product_id int PRIMARY KEY REFERENCES products, on_hand numeric);",
        )
        .await;
    let client = database.connect().await;
    let settings = format!(
        r#"
base_url: {}
auth: {{ type: bearer, token: "{}" }}
headers: {{ X-Tryton-Context: "{{{{ {{company: 1}} | tojson | @base64 }}}}" }}
budget: {{ requests: 100, per: 1s, concurrency: 4 }}
probe: "GET /party.party?s=1"
define: |
  def dt: [.year, .month - 1, .day, .hour, .minute, .second, 0, 0] | mktime | todate;
  def undt: fromdate | gmtime | {{__class__: "datetime", year: .[0], month: (.[1] + 1), day: .[2],
            hour: .[3], minute: .[4], second: (.[5] | floor), microsecond: 0}};
  def q: tojson | @base64;
"#,
        tryton.erp.url(),
        tryton.erp.key
    );
    let stage = Stage::new(&database, &[("erp", &settings)]).await;
    let products = r#"
name: erp-products
type: http-pull
system: erp
object: product
every: 300ms
request: GET /product.product
params:
  f: [code, name, default_uom, list_price_used, write_date, create_date]
  d: '{{ ($cursor | undt) as $t | [["OR", ["write_date", ">=", $t], ["create_date", ">=", $t]]] | q }}'
paginator: { type: offset, limit_param: s, offset_param: p, limit: 100, stop: short }
incremental: { cursor: "(.write_date // .create_date) | dt", tie_breaker: .id, initial: "1970-01-01T00:00:00Z", lookback: 10m }
into: public.products
match: { columns: [sku] }
map: '{ sku: .code, name, price: .list_price_used.decimal }'
keep: '{ uom: .default_uom }'
conflict: upstream
"#;
    let stock = r#"
name: erp-stock
type: http-pull
system: erp
object: product
every: 300ms
request: GET /product.product
headers: { X-Tryton-Context: '{{ {company: 1, locations: [3]} | q }}' }
params: { f: [quantity] }
paginator: { type: offset, limit_param: s, offset_param: p, limit: 50 }
into: public.inventory
map: '{ product_id: local("product"; .id), on_hand: .quantity }'
"#;
    let upstream = tryton.erp.search("product.product", json!([]), &["code"]).await.len() as i64;
    assert!(upstream > 50, "{upstream}");
    let running = stage.start(products);
    becomes(&client, "SELECT count(*)::text FROM products", &upstream.to_string()).await;
    assert_eq!(text(&client, "SELECT price::text FROM products WHERE sku = 'MUG-01'").await, "18.00");
    assert_eq!(count(&client, "tidegate.links WHERE kept ->> 'uom' IS NOT NULL").await, upstream);
    stage.run_once(stock).await;
    assert_eq!(count(&client, "inventory").await, upstream);
    assert!(count(&client, "inventory WHERE on_hand > 0").await > 10);
    // A change upstream is seen by the next run.
    let mug = &tryton.erp.search("product.product", json!([["code", "=", "MUG-01"]]), &["template"]).await[0];
    tryton.erp.put(&format!("product.template/{}", mug["template"]), json!({"name": "Mug, blue"})).await;
    tryton.erp.put(&format!("product.product/{}", mug["id"]), json!({"description": "touched"})).await;
    becomes(&client, "SELECT name FROM products WHERE sku = 'MUG-01'", "Mug, blue").await;

    // From now on every run reads what lies within the lookback once more, and leaves everything as it is.
    // The cursor never passes the time at which the system says that a run began: it reaches the newest record in a
    // run of the second after.
    let dates = tryton.erp.search("product.product", json!([]), &["write_date", "create_date"]).await;
    let moment = |product: &Value| {
        let date = if product["write_date"].is_null() { &product["create_date"] } else { &product["write_date"] };
        let part = |name: &str| date[name].as_i64().unwrap();
        let (year, month, day) = (part("year"), part("month"), part("day"));
        format!("{year}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", part("hour"), part("minute"), part("second"))
    };
    let newest = dates.iter().map(moment).max().unwrap();
    eventually(Duration::from_secs(20), "the cursor is at the newest record", async || {
        let cursor = running.status.facts().get("cursor").cloned();
        if cursor == Some(json!(newest)) { Ok(()) } else { Err(format!("{cursor:?}, not {newest}")) }
    })
    .await;
    running.ended_a_run().await;
    running.ended_a_run().await;
    let runs = || running.status.facts()["runs"].as_u64().unwrap();
    let asked = || tryton.log().lines().filter(|line| line.contains("/product.product?")).count() as u64;
    let written = async || {
        let sql = "SELECT 'link ' || local_key::text || ' ' || xmin::text FROM tidegate.links \
             UNION ALL SELECT 'cursor ' || xmin::text FROM tidegate.cursors \
             UNION ALL SELECT 'product ' || id || ' ' || xmin::text FROM products";
        let rows = client.query(sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get::<_, String>(0)).collect::<std::collections::BTreeSet<_>>()
    };
    let committed = async || {
        let row = client.query_one("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()", &[]);
        row.await.unwrap().get::<_, i64>(0)
    };
    let (first, asked_before, written_before, committed_before) = (runs(), asked(), written().await, committed().await);
    eventually(Duration::from_secs(60), "thirty runs", async || runs() >= first + 30).await;
    let (ran, requests) = (runs() - first, asked() - asked_before);
    let transactions = committed().await - committed_before;
    println!("{ran} idle runs: {requests} requests, {transactions} reading transactions");
    let after = written().await;
    let anew: Vec<_> = after.difference(&written_before).collect();
    assert!(anew.is_empty(), "written while idle: {anew:?}");
    assert!(requests <= ran + 2, "{requests} requests for {ran} runs");
    assert!(transactions <= 6 * ran as i64, "{transactions} transactions for {ran} runs");
    running.stop().await.unwrap();
}
