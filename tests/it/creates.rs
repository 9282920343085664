//! When a record may be made, and what a refused one shows: restores, sinks that are no more, credentials said back.

use std::time::Duration;

use serde_json::json;
use tidegate::config::{Section, parse_text};
use tidegate::datastore::{Command, ParkedKind, command_parked, open_create, restored_at, show_parked};
use tidegate::event::{HeaderSet, RecordBatch};
use tidegate::log::{EmbeddedLog, EmbeddedSettings, Log, PollLimit, StartAt, StopAt, TopicSpec};
use tidegate::pipeline::{Source, Status};
use tidegate::sources::log::{Batching, LogSource};

use crate::delivery::settled;
use crate::references::{behind_proxy, parts};
use crate::support::shop::Shop;
use crate::support::{Fault, Script, eventually};

const LONG: Duration = Duration::from_secs(60);

const KEYED: &str = r#"
object: order
topics: shop.public.customers
initial: create
settle: 200ms
map: '{ name: .after.name }'
create: { request: POST /items, headers: { Idempotency-Key: "{{ $idempotency_key }}" } }
update: "PUT /items/{{ $link.id }}"
"#;

#[tokio::test]
async fn after_a_restore_nothing_is_made_twice_that_was_made_before() {
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("restored").await;
    let client = shop.datastore.client().await.unwrap();
    let sink = shop.sink("orders", &system, KEYED);
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'a')").await;
    settled(&shop, "orders").await;
    assert_eq!(restored_at(&client).await.unwrap(), None);
    sink.stop().await;
    // The backup is older than the link, and a cluster restored from one has a timeline of its own.
    let restore = "DELETE FROM tidegate.links; UPDATE tidegate.history SET timeline = '00000000'";
    shop.sql(restore).await;
    let sink = shop.sink("orders", &system, KEYED);
    shop.sql("UPDATE customers SET name = 'b' WHERE id = 1").await;
    let parked = eventually(LONG, "parked", async || shop.parked().await.pop()).await;
    assert!(parked.reason.contains("the datastore was restored"), "{}", parked.reason);
    assert_eq!((api.items().len(), proxy.count("POST", "")), (1, 1));
    // A person has looked, and says that it is to be made.
    assert_eq!(command_parked(&client, "orders", None, Command::Replay).await.unwrap(), 1);
    eventually(LONG, "made", async || shop.parked().await.is_empty() && api.items().len() == 2).await;
    sink.stop().await;
    // What is inserted since is new for sure.
    assert!(restored_at(&client).await.unwrap().is_some());
    shop.sql("UPDATE tidegate.history SET restored_lsn = '0/1'").await;
    let sink = shop.sink("orders", &system, KEYED);
    shop.sql("INSERT INTO customers (id, name) VALUES (2, 'c')").await;
    settled(&shop, "orders").await;
    assert_eq!((api.items().len(), shop.parked().await.len()), (3, 0));
    sink.stop().await;

    // With `match` it is looked up.
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("restored").await;
    let sink = shop.sink("parts", &system, &parts());
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'a')").await;
    settled(&shop, "parts").await;
    sink.stop().await;
    shop.sql(restore).await;
    let sink = shop.sink("parts", &system, &parts());
    shop.sql("UPDATE customers SET name = 'b' WHERE id = 1").await;
    settled(&shop, "parts").await;
    assert_eq!((api.items().len(), &api.items()[0]["name"]), (1, &json!("b")));
    assert_eq!((proxy.count("POST", ""), shop.parked().await.len()), (1, 0));
    sink.stop().await;
}

#[tokio::test]
async fn a_try_that_went_through_late_is_found_when_the_next_one_is_refused() {
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("late").await;
    let steps = r#"
object: order
topics: shop.public.customers
settle: 2s
map: '{ name: .after.name }'
match: { request: GET /items, params: { code: "{{ .key.id }}" }, id: ".[].id" }
create:
  - { request: POST /items, map: "{ code: .key.id, name: .after.name }" }
  - request: POST /items/{{ $link.id }}/quote
    done: { request: "GET /items/{{ $link.id }}", when: '.done // [] | index("quote")' }
"#;
    let refused = Fault::Answer { status: 400, headers: Vec::new(), body: r#"{"error":"there already"}"#.to_owned() };
    proxy.script(Script::on("POST", "/quote", Fault::ResetBefore).times(1));
    proxy.script(Script::on("POST", "/quote", refused.clone()).times(1));
    proxy.script(Script::on("POST", "/items", Fault::ResetBefore).times(1));
    proxy.script(Script::on("POST", "/items", refused.clone()).times(1));
    let sink = shop.sink("orders", &system, steps);
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'a')").await;
    eventually(LONG, "tried again", async || proxy.count("POST", "/items") == 2).await;
    api.inside.lock().unwrap().items.insert(7, json!({"id": 7, "code": 1, "name": "a"}));
    eventually(LONG, "the step is tried again", async || proxy.count("POST", "/7/quote") == 2).await;
    api.inside.lock().unwrap().items.get_mut(&7).unwrap()["done"] = json!(["quote"]);
    settled(&shop, "orders").await;
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    assert_eq!((api.items().len(), proxy.count("POST", "")), (1, 4));
    // What is refused for good is a dead letter with the answer that it got.
    proxy.script(Script::on("POST", "/items", Fault::ResetBefore).times(1));
    proxy.script(Script::on("POST", "/items", refused).times(1));
    shop.sql("INSERT INTO customers (id, name) VALUES (2, 'b')").await;
    let parked = eventually(LONG, "a dead letter", async || shop.parked().await.pop()).await;
    assert!(parked.reason.contains("there already"), "{}", parked.reason);
    assert_eq!(api.items().len(), 1);
    sink.stop().await;
}

#[tokio::test]
async fn a_create_of_a_sink_that_is_no_more_holds_back_records_for_a_time_only() {
    let shop = Shop::start("no_more").await;
    let client = shop.datastore.client().await.unwrap();
    let intent = r#"{"id":"i","operation":"create","request":"POST /x","idempotency_key":"k","owner":"gone:1","started_ms":1,"document":{}}"#;
    shop.sql(&format!(
        "INSERT INTO tidegate.links (system, object, table_name, local_key, intent) VALUES ('api', 'part', 'public.customers', '{{\"id\": 1}}', '{intent}')"
    ))
    .await;
    let holds = async || open_create(&client, "api", "part").await.unwrap().is_some();
    assert!(holds().await, "a young one does");
    shop.sql("UPDATE tidegate.links SET updated_at = now() - interval '25 hours'").await;
    assert!(!holds().await, "an old one does not, where nobody is left to resolve it");
    for (lease, holds_then) in
        [("now()", true), ("now() - interval '6 days'", true), ("now() - interval '8 days'", false)]
    {
        shop.sql(&format!(
            "DELETE FROM tidegate.leases; INSERT INTO tidegate.leases (name, owner, expires_at) VALUES ('delivery/gone/gone:2', 'gone:2', {lease})"
        ))
        .await;
        assert_eq!(holds().await, holds_then, "a lease until {lease}");
    }
}

#[tokio::test]
async fn a_dead_letter_shows_request_and_answer_without_credentials_and_its_copy_is_the_record() {
    let (_api, proxy, system) = behind_proxy("auth: { type: bearer, token: sesame-opens }\n").await;
    let shop = Shop::start("shown").await;
    let body = r#"{"error":"sesame-opens is not allowed","sent":["Bearer sesame-opens"]}"#.to_owned();
    proxy.script(Script::on("POST", "/items", Fault::Answer { status: 422, headers: Vec::new(), body }));
    let keyed = KEYED.replace("headers: {", "headers: { X-Api-Key: hush-hush, ");
    let sink = shop.sink("orders", &system, &keyed);
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'a')").await;
    let parked = eventually(LONG, "parked", async || shop.parked().await.pop()).await;
    assert_eq!(parked.kind, ParkedKind::Rejected);
    let request = parked.request.clone().unwrap();
    assert_eq!((&request["request"], &request["body"]), (&json!("POST /items"), &json!({"name": "a"})));
    let response = parked.response.clone().unwrap();
    assert_eq!((&response["status"], &response["body"]["error"]), (&json!(422), &json!("*** is not allowed")));
    let shown = format!("{} {request} {response}", parked.reason);
    assert!(!shown.contains("sesame") && !shown.contains("hush"), "{shown}");
    // The copy.
    let mut reader = shop.log.reader("dead.orders", StartAt::Beginning, StopAt::Never).await.unwrap();
    let limit = PollLimit { bytes: 1 << 20, records: 10, wait: Duration::from_secs(5) };
    let copies = reader.poll(&limit).await.unwrap();
    let client = shop.datastore.client().await.unwrap();
    let whole = show_parked(&client, "orders", &parked.topic, parked.partition, parked.offset).await.unwrap().unwrap();
    assert_eq!((copies.len(), &copies[0].key, &copies[0].value), (1, &whole.record.key, &whole.record.value));
    let header = |name: &str| {
        let found = copies[0].headers.iter().find(|(header, _)| &**header == name);
        found.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).unwrap_or_default()
    };
    assert_eq!(header("__connect.errors.topic"), "shop.public.customers");
    assert_eq!(header("__connect.errors.offset"), "0");
    assert_eq!(header("__connect.errors.exception.message"), parked.reason);
    sink.stop().await;
}

/// A source of a log of ten records of 100 bytes, in this batching.
async fn source(log: &std::sync::Arc<dyn Log>, batching: &str) -> LogSource {
    let mut section = Section::new(parse_text(batching, "sink.yaml").unwrap(), "sink").unwrap();
    let batching = Batching::read(&mut section).unwrap();
    let group = uuid::Uuid::new_v4().to_string();
    LogSource::new(log.clone(), group, vec!["t".to_owned()], batching, std::sync::Arc::new(Status::default()))
}

async fn append(log: &std::sync::Arc<dyn Log>, records: usize) {
    let mut writer = log.writer("w").await.unwrap();
    let topic: std::sync::Arc<str> = "t".into();
    let mut batch = RecordBatch::new();
    (0..records).for_each(|_| batch.push(&topic, None, Some(&[7; 100]), &HeaderSet::default()));
    writer.append(batch, None).await.unwrap().await.unwrap();
}

#[tokio::test]
async fn a_batch_is_full_by_count_by_bytes_or_by_time() {
    let folder = tempfile::tempdir().unwrap();
    let log: std::sync::Arc<dyn Log> =
        std::sync::Arc::new(EmbeddedLog::open(EmbeddedSettings::new(folder.path())).unwrap());
    let spec = TopicSpec { name: "t".into(), partitions: 1, replication_factor: None, settings: Default::default() };
    log.ensure_topic(&spec).await.unwrap();
    append(&log, 10).await;
    let sizes = async |batching: &str, batches: usize| {
        let mut source = source(&log, batching).await;
        let mut sizes = Vec::new();
        for _ in 0..batches {
            let batch = tokio::time::timeout(LONG, source.next()).await.expect("in time").unwrap();
            assert_eq!((batch.events, batch.bytes), (batch.body.len(), batch.body.len() * 100));
            sizes.push(batch.body.len());
            source.acknowledge(batch.mark).await.unwrap();
        }
        sizes
    };
    assert_eq!(sizes("batching: { count: 4, period: 100ms }", 3).await, [4, 4, 2], "by count, and the rest by time");
    assert_eq!(sizes("batching: { byte_size: 250, period: 100ms }", 4).await, [3, 3, 3, 1], "by bytes");
    assert_eq!(sizes("batching: {}", 1).await, [10], "what is there");
    // By time: what comes within the period of the first record goes with it.
    let mut waiting = source(&log, "batching: { period: 2s }").await;
    let began = std::time::Instant::now();
    let (batch, ()) = tokio::join!(waiting.next(), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        append(&log, 3).await;
    });
    assert_eq!(batch.unwrap().events, 13);
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
    let wrong = Section::new(parse_text("batching: { count: 0 }", "sink.yaml").unwrap(), "sink");
    assert!(Batching::read(&mut wrong.unwrap()).is_err());
}

#[tokio::test]
async fn a_create_that_is_sent_again_keeps_its_key_whatever_comes_between() {
    let (api, proxy, system) = behind_proxy("breaker.open: 200ms\n").await;
    let shop = Shop::start("keepskey").await;
    let keyed = r#"
object: order
topics: shop.public.customers
initial: create
settle: 200ms
map: '{ name: .after.name }'
create: { request: POST /items, headers: { Idempotency-Key: "{{ $idempotency_key }}" } }
"#;
    let sink = shop.sink("orders", &system, keyed);
    for (at, fault) in
        [Fault::retry_after(429, 0), Fault::status(503), Fault::status(404), Fault::status(502)].into_iter().enumerate()
    {
        // Made, and the answer lost; then it is not taken for a time.
        let name = format!("\"k{at}\"");
        proxy.script(Script::on("POST", "/items", Fault::ResetAfter).body(&name).times(1));
        proxy.script(Script::on("POST", "/items", fault).body(&name).times(1));
        shop.sql(&format!("INSERT INTO customers (id, name) VALUES ({at}, 'k{at}')")).await;
        settled(&shop, "orders").await;
        assert_eq!(api.items().len(), at + 1, "{:?}", api.items());
        assert_eq!(proxy.seen().iter().filter(|seen| seen.body.contains(&name)).count(), 3);
    }
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    sink.stop().await;
}
