//! How listings are read: every way of paging, the cursor, and runs that are broken off.

use std::time::Duration;

use serde_json::json;
use tidegate::pipeline::{ConnectorState, ResetTo};
use tidegate::systems::BreakerState;

use super::{becomes, count, part, parts, pull, stage, text, world};
use crate::support::{Api, Fault, Proxy, Script, Stage, WorkerLog, Workshop, eventually};

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
    let yaml = pull("/offset", "paginator: { type: offset, limit: 5, overlap: 0 }");
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
