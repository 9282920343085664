//! Listings that change, lie or break off while they are read: no change of the system's may be passed over.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio_postgres::Client;

use super::{becomes, count, part, parts, pull, text, world};
use crate::support::{Asked, Database, Scripted, Stage, Told, eventually};

/// Records by id, as the system has them now.
type Records = Arc<Mutex<Vec<Value>>>;

async fn stage(database: &Database<'_>, server: &Scripted, more: &str) -> Stage {
    let settings = format!("base_url: {}\nbreaker: {{ failures: 3, open: 200ms }}\n{more}", server.url());
    Stage::new(database, &[("api", &settings)]).await
}

fn numbered(id: i64, sequence: i64) -> Value {
    json!({"id": id, "sku": format!("S{id}"), "name": format!("as of {sequence}"), "seq": sequence})
}

/// `/offset?offset&limit`, in the order that the records are in.
fn by_offset(records: &[Value], asked: &Asked) -> Value {
    let (offset, limit) = (asked.number("offset", 0), asked.number("limit", 100));
    records.iter().skip(offset).take(limit).cloned().collect()
}

async fn names(client: &Client) -> BTreeMap<i64, String> {
    let rows = client.query("SELECT substr(sku, 2)::int8, name FROM parts", &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[tokio::test]
async fn what_changes_on_a_page_read_before_is_seen_by_the_next_run_whatever_the_cursor_counts_in() {
    let (database, client) = world("counted").await;
    let records: Records = Arc::new(Mutex::new((1..=6).map(|id| numbered(id, 100 + id)).collect()));
    let (inside, mut pages) = (Arc::clone(&records), 0);
    let server = Scripted::start(move |asked| {
        let mut records = inside.lock().unwrap();
        pages += 1;
        if pages == 2 {
            // The first page has been read; one of its records changes, then one of those to come, and one is new.
            records[0] = numbered(1, 201);
            records[4] = numbered(5, 202);
            records.push(numbered(7, 203));
        }
        let since = asked.number("since", 0) as i64;
        let newer: Vec<_> = records.iter().filter(|record| record["seq"].as_i64().unwrap() > since).cloned().collect();
        by_offset(&newer, asked).into()
    })
    .await;
    let stage = stage(&database, &server, "").await;
    let running = stage.start(
        &pull(
            "/parts",
            "params: { since: '{{ $cursor }}' }\npaginator: { type: offset, limit: 3 }\n\
         incremental: { cursor: .seq, initial: 0 }\nmap: '{ sku, name }'",
        )
        .replace("map: '{ sku, name, price, at }'\n", ""),
    );
    becomes(&client, "SELECT name FROM parts WHERE sku = 'S1'", "as of 201").await;
    assert_eq!(names(&client).await.len(), 7);
    // And then the cursor is at the last change, and stays there.
    becomes(&client, "SELECT cursor ->> 'cursor' FROM tidegate.cursors", "203").await;
    running.ended_a_run().await;
    running.ended_a_run().await;
    let last = server.asked().pop().unwrap();
    assert_eq!(last.query["since"], "203");
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_record_that_slips_to_a_page_read_before_is_not_passed_over() {
    for deleted in [vec![1], vec![2, 4], vec![1, 2, 3, 4], vec![]] {
        let (database, client) = world("slipping").await;
        let records: Records =
            Arc::new(Mutex::new((1..=12).map(|id| part(id, &format!("2026-01-01T00:00:{id:02}Z"))).collect()));
        let (inside, gone) = (Arc::clone(&records), deleted.clone());
        let mut pages = 0;
        let server = Scripted::start(move |asked| {
            let mut records = inside.lock().unwrap();
            pages += 1;
            if pages == 2 {
                // The second page is asked for: meanwhile some of the first one have been removed.
                records.retain(|record| !gone.contains(&record["id"].as_i64().unwrap()));
                if gone.is_empty() {
                    // … or changed, and come last, as in a listing by time.
                    let mut changed = records.remove(0);
                    changed["at"] = json!("2026-01-01T00:01:00Z");
                    changed["name"] = json!("changed");
                    records.push(changed);
                }
            }
            let since = asked.query.get("since").cloned().unwrap_or_default();
            let newer: Vec<_> =
                records.iter().filter(|record| record["at"].as_str().unwrap() >= since.as_str()).cloned().collect();
            by_offset(&newer, asked).into()
        })
        .await;
        let stage = stage(&database, &server, "").await;
        let status = stage
            .run_once(&pull(
                "/parts",
                "params: { since: '{{ $cursor }}' }\npaginator: { type: offset, limit: 4 }\n\
             incremental: { cursor: .at, initial: '2025-01-01T00:00:00Z', lookback: 0s }",
            ))
            .await;
        let seen = names(&client).await;
        assert_eq!(seen.len(), 12, "{deleted:?}: {:?}", seen.keys());
        assert_eq!(seen[&1] == "changed", deleted.is_empty());
        assert_eq!(status.facts()["unsteady"], false);
    }
}

#[tokio::test]
async fn a_listing_without_an_order_is_read_to_its_end_and_told_and_leaves_the_cursor() {
    let (database, client) = world("unsteady").await;
    let mut turn = 0;
    let server = Scripted::start(move |asked| {
        let mut all = parts(40);
        turn += 7;
        all.rotate_left(turn % 40);
        if turn % 2 == 0 {
            all.reverse();
        }
        by_offset(&all, asked).into()
    })
    .await;
    let stage = stage(&database, &server, "").await;
    let running = stage.start(&pull(
        "/parts",
        "paginator: { type: offset, limit: 4 }\nincremental: { cursor: .at, initial: '2025-01-01T00:00:00Z' }",
    ));
    running.ended_a_run().await;
    assert_eq!(running.status.facts()["unsteady"], true);
    assert!(
        running.status.last_error().is_some_and(|error| error.1.contains("no order")),
        "{:?}",
        running.status.last_error()
    );
    assert_eq!(text(&client, "SELECT cursor ->> 'cursor' FROM tidegate.cursors").await, "NULL");
    running.stop().await.unwrap();
}

#[tokio::test]
async fn pages_that_are_not_full_end_no_listing() {
    for (request, paging) in
        [("/offset", "paginator: { type: offset, limit: 4 }"), ("/page", "paginator: { type: page_number, limit: 4 }")]
    {
        let (database, client) = world("filtered").await;
        let server = Scripted::start(move |asked| {
            // Records that we may not see are left out after the page was cut.
            let all = parts(20);
            let from = match request {
                "/offset" => asked.number("offset", 0),
                _ => (asked.number("page", 1) - 1) * 4,
            };
            let page = all.iter().skip(from).take(4).filter(|part| ![6, 7, 14].contains(&part["id"].as_i64().unwrap()));
            Value::from(page.cloned().collect::<Vec<_>>()).into()
        })
        .await;
        let stage = stage(&database, &server, "").await;
        stage.run_once(&pull(request, paging)).await;
        assert_eq!(count(&client, "parts").await, 17, "{request}");
    }
}

#[tokio::test]
async fn a_last_page_that_comes_again_beyond_the_end_ends_the_listing() {
    let (database, client) = world("clamped").await;
    let server = Scripted::start(|asked| {
        let all = parts(7);
        Value::from(all.chunks(3).nth(asked.number("page", 1).min(3) - 1).unwrap().to_vec()).into()
    })
    .await;
    let stage = stage(&database, &server, "").await;
    stage.run_once(&pull("/parts", "paginator: { type: page_number }")).await;
    assert_eq!(count(&client, "parts").await, 7);
}

#[tokio::test]
async fn a_full_page_within_the_lookback_is_gone_on_from() {
    let (database, client) = world("lookback").await;
    let records: Records =
        Arc::new(Mutex::new((1..=9).map(|id| part(id, &format!("2026-01-01T00:00:{id:02}Z"))).collect()));
    let inside = Arc::clone(&records);
    let server = Scripted::start(move |asked| {
        let records = inside.lock().unwrap();
        let newer = records.iter().filter(|record| record["at"].as_str().unwrap() >= asked.query["since"].as_str());
        Value::from(newer.take(asked.number("limit", 3)).cloned().collect::<Vec<_>>()).into()
    })
    .await;
    let stage = stage(&database, &server, "").await;
    let yaml = pull(
        "/parts",
        "params: { since: '{{ $cursor }}', limit: 3 }\npaginator: { type: single, limit: 3 }\n\
         incremental: { cursor: .at, initial: '2025-01-01T00:00:00Z' }",
    );
    stage.run_once(&yaml).await;
    assert_eq!(count(&client, "parts").await, 9);
    // Where nothing is said, a minute: these are all of them, in pages that end before the cursor.
    let before = server.asked().len();
    stage.run_once(&yaml).await;
    assert_eq!(server.asked()[before].query["since"], "2025-12-31T23:59:09Z");
    // One whose time is wrong does not take the cursor with it.
    records.lock().unwrap().extend([part(10, "2026-01-01T00:00:10Z"), part(11, "2099-01-01T00:00:00Z")]);
    stage.run_once(&yaml).await;
    assert_eq!(count(&client, "parts").await, 11);
    let cursor = text(&client, "SELECT cursor ->> 'cursor' FROM tidegate.cursors").await;
    assert!(*cursor < *"2098", "{cursor}");
    let now = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
    records.lock().unwrap().insert(10, part(12, &now));
    stage.run_once(&yaml).await;
    assert_eq!(count(&client, "parts").await, 12);
}

#[tokio::test]
async fn records_of_one_cursor_are_told_apart_by_their_tie_breaker() {
    let (database, client) = world("ties").await;
    let server = Scripted::start(|asked| {
        let tie = asked.number("after", 0) as i64;
        let all: Vec<_> = (1..=8).map(|id| part(id, "2026-01-01T00:00:00Z")).collect();
        let page = all.into_iter().filter(|part| part["id"].as_i64().unwrap() > tie).take(3);
        Value::from(page.collect::<Vec<_>>()).into()
    })
    .await;
    let stage = stage(&database, &server, "").await;
    stage
        .run_once(&pull(
            "/parts",
            "params: { since: '{{ $cursor }}', after: '{{ $page.tie }}' }\npaginator: { type: single, limit: 3 }\n\
             incremental: { cursor: .at, tie_breaker: .id, initial: '2026-01-01T00:00:00Z' }",
        ))
        .await;
    assert_eq!(count(&client, "parts").await, 8);
}

#[tokio::test]
async fn a_slow_first_page_does_not_take_the_cursor_past_what_changed_meanwhile() {
    let (database, client) = world("slow").await;
    let second = chrono::TimeDelta::seconds(1);
    let (mut pages, mut looked) = (0, chrono::Utc::now());
    let server = Scripted::start(move |asked| {
        pages += 1;
        let at = |time: chrono::DateTime<chrono::Utc>| time.to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
        let record = |id: i64, name: &str, time| {
            let mut record = part(id, &at(time));
            record["name"] = json!(name);
            record
        };
        if pages == 1 {
            looked = chrono::Utc::now();
            // It looks, then takes three seconds to answer; the header tells the time of the answer.
            return Told::from(json!([
                record(1, "old", looked - second * 100),
                record(2, "old", looked - second * 90)
            ]))
            .after(Duration::from_secs(3));
        }
        let all = [
            record(2, "old", looked - second * 90),
            record(1, "changed meanwhile", looked + second),
            record(3, "later", looked + second * 2),
        ];
        if pages == 2 {
            // By name: the one that has changed is not on this page.
            return Told::from(json!([all[0], all[2]]));
        }
        let since = asked.query.get("since").cloned().unwrap_or_default();
        let newer: Vec<_> = all.into_iter().filter(|record| record["at"].as_str().unwrap() >= since.as_str()).collect();
        by_offset(&newer, asked).into()
    })
    .await;
    let stage = stage(&database, &server, "").await;
    let running = stage.start(&pull(
        "/parts",
        "params: { since: '{{ $cursor }}' }\npaginator: { type: offset, limit: 2 }\n\
         incremental: { cursor: .at, initial: '2025-01-01T00:00:00Z', lookback: 0s }",
    ));
    becomes(&client, "SELECT name FROM parts WHERE sku = 'S1'", "changed meanwhile").await;
    running.stop().await.unwrap();
}

#[tokio::test]
async fn a_page_whose_token_has_lapsed_lets_the_listing_begin_anew() {
    let (database, client) = world("lapsed").await;
    let day = Arc::new(Mutex::new(1));
    let today = Arc::clone(&day);
    let server = Scripted::start(move |asked| {
        let day = *today.lock().unwrap();
        let (of, offset) = match asked.query.get("after").and_then(|token| token.split_once('-')) {
            Some((of, offset)) => (of.parse().unwrap(), offset.parse().unwrap()),
            None => (day, 0),
        };
        if of != day {
            return Told::status(400).body("\"this token has lapsed\"");
        }
        let all = parts(6);
        let next = (offset + 2 < all.len()).then(|| format!("{day}-{}", offset + 2));
        let answer = Told::from(json!({"data": all[offset..offset + 2], "next": next}));
        // The last page of the first day never comes.
        if day == 1 && offset == 4 { answer.after(Duration::from_secs(60)) } else { answer }
    })
    .await;
    let stage = stage(&database, &server, "").await;
    let yaml = pull("/parts", "paginator: { type: cursor, cursor_path: .next, cursor_param: after }\nrecords: .data");
    let running = stage.start(&yaml);
    eventually(Duration::from_secs(10), "the last page is asked for", async || server.asked().len() == 3).await;
    becomes(&client, "SELECT count(*)::text FROM parts", "4").await;
    running.kill().await;
    *day.lock().unwrap() = 2;
    let running = stage.start(&yaml);
    becomes(&client, "SELECT count(*)::text FROM parts", "6").await;
    running.ended_a_run().await;
    assert_eq!(server.asked()[3].query["after"], "1-4", "it goes on where it was");
    running.stop().await.unwrap();

    // One that refuses its second page for good is told, after some beginnings.
    let always = Scripted::start(|asked| match asked.query.contains_key("after") {
        true => Told::status(400).body("\"never\""),
        false => json!({"data": parts(2), "next": "x"}).into(),
    })
    .await;
    let stage = self::stage(&database, &always, "").await;
    let fault = stage.start(&yaml.replace("name: parts", "name: never")).fails().await;
    assert!(fault.contains("answered 400") && fault.contains("never"), "{fault}");
    assert_eq!(always.asked().iter().filter(|asked| asked.query.contains_key("after")).count(), 4);
}

#[tokio::test]
async fn the_next_page_is_found_among_several_link_headers_and_one_that_leads_back_is_told() {
    let (database, client) = world("links").await;
    let server = Scripted::start(|asked| {
        let page = asked.number("page", 0);
        let told = Told::from(Value::from(parts(9)[page * 3..page * 3 + 3].to_vec()));
        let told = told.header("link", format!("</parts?page={}>; rel=\"prev\"", page.max(1) - 1));
        if page < 2 { told.header("link", format!("</parts?page={}>; rel=\"next\"", page + 1)) } else { told }
    })
    .await;
    let stage = stage(&database, &server, "").await;
    stage.run_once(&pull("/parts", "paginator: { type: link }")).await;
    assert_eq!(count(&client, "parts").await, 9);

    for (paging, next) in [
        ("paginator: { type: link, path: .next }", "/parts?after="),
        ("paginator: { type: cursor, cursor_path: .next, cursor_param: after }", ""),
    ] {
        // From the third page back to the second.
        let round = Scripted::start(move |asked| {
            let page = asked.number("after", 0);
            json!({"data": parts(9)[page * 3..page * 3 + 3], "next": format!("{next}{}", [1, 2, 1][page])}).into()
        })
        .await;
        let stage = self::stage(&database, &round, "").await;
        let yaml = pull("/parts", &format!("{paging}\nrecords: .data")).replace("name: parts", "name: round");
        let fault = stage.start(&yaml).fails().await;
        assert!(fault.contains("read before"), "{fault}");
        assert!(round.asked().len() < 10, "{}", round.asked().len());
        stage.reset(&yaml, &tidegate::pipeline::ResetTo::Beginning).await;
    }
}

#[tokio::test]
async fn a_next_page_elsewhere_is_refused_and_a_key_is_sent_once_and_kept_nowhere() {
    let (database, client) = world("elsewhere").await;
    let stranger = Scripted::start(|_| json!([]).into()).await;
    let elsewhere = stranger.url();
    let server = Scripted::start(move |asked| match asked.number("page", 0) {
        0 => Told::from(json!({"data": parts(2), "next": format!("/parts?page=1&key={}", asked.query["key"])})),
        _ => Told::from(json!({"data": parts(4)[2..], "next": format!("{elsewhere}/parts?page=2")})),
    })
    .await;
    let stage = stage(&database, &server, "auth: { type: api_key, key: s3cr3t-k3y, param: key }").await;
    let fault = stage.start(&pull("/parts", "paginator: { type: link, path: .next }\nrecords: .data")).fails().await;
    assert!(fault.contains(&stranger.url()) && fault.contains("credentials are sent nowhere else"), "{fault}");
    assert!(!fault.contains("s3cr3t"), "{fault}");
    assert_eq!(stranger.asked().len(), 0);
    assert!(server.asked().iter().all(|asked| asked.query["key"] == "s3cr3t-k3y"), "{:?}", server.asked());
    let kept = text(&client, "SELECT cursor::text FROM tidegate.cursors").await;
    assert!(kept.contains("page=1") && !kept.contains("s3cr3t"), "{kept}");
}

#[tokio::test]
async fn a_record_that_no_table_can_hold_stops_only_itself() {
    let (database, client) = world("nul").await;
    let mut records = parts(8);
    records[1]["name"] = json!("a\u{0}b");
    records[2]["unmapped"] = json!({"deep": "\u{0}"});
    records[3]["id"] = json!("4\u{0}");
    records[4]["price"] = serde_json::from_str("1e400000").unwrap();
    records[5]["why"] = json!("\u{0}");
    records[6]["of"] = json!("\u{0}");
    let server = Scripted::start(move |_| Value::from(records.clone()).into()).await;
    let stage = stage(&database, &server, "").await;
    let map =
        "map: 'if .why then error(.why) else { sku, name, price, at, note: (local(\"other\"; .of) // \"none\") } end'";
    let running = stage.start(&pull("/parts", "").replace("map: '{ sku, name, price, at }'", map));
    becomes(&client, "SELECT string_agg(sku, ' ' ORDER BY sku) FROM parts", "S1 S3 S8").await;
    becomes(
        &client,
        "SELECT string_agg(coalesce(key ->> 'id', 'none'), ' ' ORDER BY key ->> 'id') FROM tidegate.parked",
        "2 5 6 7 none",
    )
    .await;
    running.ended_a_run().await;
    running.stop().await.unwrap();
}
