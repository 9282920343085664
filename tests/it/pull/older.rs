//! Both sides at once: records that meet unsent changes, or that are older than what is known of them.

use std::time::Duration;

use serde_json::json;
use tidegate::datastore::{drop_unlisted, listing_begins, put_aside};
use tidegate::pipeline::ResetTo;

use super::{becomes, count, part, parts, pull, stage, text, world};
use crate::support::{Api, Fault, Proxy, Script, Stage, eventually};

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

const HELD: &str = "INSERT INTO tidegate.held (connector, system, object, external_id, record, reason, push_seq, cursor) \
     SELECT 'parts', 'api', 'part', n::text, '{}', 'older', $1::bigint, $2::json FROM generate_series($3::int, $4::int) n";

#[tokio::test]
async fn what_is_held_while_a_listing_is_read_waits_for_the_next_one() {
    let (database, client) = world("meanwhile").await;
    let api = Api::start(parts(2)).await;
    let stage = stage(&database, &api).await;
    stage.run_once(&pull("/all", "")).await;
    client
        .batch_execute(
            "UPDATE tidegate.links SET pushed_seq = nextval('tidegate.push_seq') WHERE external_id IN ('1', '2')",
        )
        .await
        .unwrap();
    let own = stage.datastore.client().await.unwrap();
    let before = json!("2026-01-01T00:00:01Z");
    client.execute(HELD, &[&0_i64, &before, &1, &1]).await.unwrap();
    let (listed, stale) = listing_begins(&own, "parts").await.unwrap();
    assert_eq!(stale, Some(vec![before]));
    // A dead letter that is replayed between two pages is as old as can be, and this listing did not go back for it.
    client.execute(HELD, &[&0_i64, &json!("2025-01-01T00:00:00Z"), &2, &2]).await.unwrap();
    assert_eq!(drop_unlisted(&own, "parts", listed).await.unwrap(), 1);
    assert_eq!(text(&client, "SELECT external_id FROM tidegate.held").await, "2");
    let (listed, stale) = listing_begins(&own, "parts").await.unwrap();
    assert_eq!(stale, Some(vec![json!("2025-01-01T00:00:00Z")]));
    assert_eq!(drop_unlisted(&own, "parts", listed).await.unwrap(), 1);
}

#[tokio::test]
async fn a_listing_goes_back_for_what_is_being_sent_and_for_everything_where_much_is_old() {
    let (database, client) = world("back").await;
    let api = Api::start(parts(1)).await;
    let stage = stage(&database, &api).await;
    stage.run_once(&pull("/all", "")).await;
    let own = stage.datastore.client().await.unwrap();
    let (early, late) = (json!("2025-01-01T00:00:00Z"), json!("2026-01-01T00:00:00Z"));
    client.execute(HELD, &[&0_i64, &early, &1, &1]).await.unwrap();
    client
        .batch_execute(
            "UPDATE tidegate.links SET intent = '{\"id\":\"i\",\"operation\":\"update\",\"request\":\"PUT /\",\"idempotency_key\":\"k\",\"owner\":\"o\",\"started_ms\":0,\"document\":{}}'",
        )
        .await
        .unwrap();
    // A push has its number, and its transaction is not at its end.
    let mut other = database.connect().await;
    let pushing = other.transaction().await.unwrap();
    pushing
        .batch_execute("UPDATE tidegate.links SET intent = NULL, pushed_seq = nextval('tidegate.push_seq')")
        .await
        .unwrap();
    let (listed, stale) = listing_begins(&own, "parts").await.unwrap();
    pushing.commit().await.unwrap();
    assert_eq!(stale, Some(vec![early.clone()]), "since the end of this listing takes it for unlisted");
    assert_eq!(drop_unlisted(&own, "parts", listed).await.unwrap(), 1);

    client
        .batch_execute(
            "INSERT INTO tidegate.links (system, object, table_name, local_key, external_id, pushed_seq) \
             SELECT 'api', 'part', 'public.parts', jsonb_build_object('id', n), n, 9 FROM generate_series(2, 10001) n",
        )
        .await
        .unwrap();
    client.execute(HELD, &[&0_i64, &late, &2, &10_000]).await.unwrap();
    client.execute(HELD, &[&0_i64, &early, &1, &1]).await.unwrap();
    let stale = listing_begins(&own, "parts").await.unwrap().1.unwrap();
    assert!(stale.len() == 10_000 && stale.contains(&early), "{}", stale.len());
    client.execute(HELD, &[&0_i64, &late, &10_001, &10_001]).await.unwrap();
    assert_eq!(listing_begins(&own, "parts").await.unwrap().1, None);
}
