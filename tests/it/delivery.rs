//! Delivery to a real ERP, and behind a fault proxy: nothing lost, nothing doubled.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tidegate::datastore::{Command, ParkedKind, command_parked};
use tidegate::systems::System;

use crate::support::shop::{Shop, settings, system};
use crate::support::{Fault, Proxy, Script, Tryton, eventually};

const LONG: Duration = Duration::from_secs(60);

pub const CUSTOMERS: &str = r#"
object: party
topics: shop.public.customers
initial: create
settle: 500ms
map: '{ name: .after.name } + if $link then {} else { code: "C\(.after.id)", addresses: [["create", [{street: .after.street, city: .after.city}]]] } end'
match: { request: GET /party.party, params: { f: addresses, d: '{{ [["code", "=", "C\(.key.id)"]] | q }}' }, id: ".[].id", keep: "{address: .[0].addresses[0]}" }
create: { request: "POST /party.party?f=addresses", id: .id, keep: "{address: .addresses[0]}" }
update: "PUT /party.party/{{ $link.id }}"
delete: { request: "PUT /party.party/{{ $link.id }}", map: "{active: false}" }
"#;

pub const ORDERS: &str = r#"
object: sale
topics: shop.public.orders, shop.public.order_lines
document: { root: public.orders, lines: public.order_lines.order_id }
when: .after.placed_at != null
settle: 500ms
map: |
  link("party"; .after.customer_id) as $party
  | { reference: .after.number, party: $party.id, company: 1, currency: 1, invoice_method: "manual",
      invoice_address: $party.address, shipment_address: $party.address,
      lines: [["create", [ .lines[] | { product: .product_id, unit: 1, quantity, unit_price: (.price | dec) } ]]] }
match: { request: GET /sale.sale, params: { d: '{{ [["reference", "=", .after.number]] | q }}' }, id: ".[].id" }
create:
  - { request: POST /sale.sale, id: .id }
  - request: POST /sale.sale/{{ $link.id }}/quote
    done: { request: "GET /sale.sale/{{ $link.id }}?f=state", when: .state != "draft" }
  - request: POST /sale.sale/{{ $link.id }}/confirm
    done: { request: "GET /sale.sale/{{ $link.id }}?f=state", when: .state != "draft" and .state != "quotation" }
update: reject
delete: POST /sale.sale/{{ $link.id }}/cancel
"#;

/// The ERP behind a proxy.
pub fn erp(tryton: &Tryton, proxy: &Proxy) -> Arc<System> {
    system("erp", &erp_file(tryton, proxy))
}

pub fn erp_file(tryton: &Tryton, proxy: &Proxy) -> String {
    format!(
        r#"
base_url: {}/{}/rest/model
auth: {{ type: bearer, token: "{}" }}
headers: {{ X-Tryton-Context: "{{{{ {{company: 1}} | q }}}}" }}
budget: {{ requests: 200, per: 1s, concurrency: 4 }}
probe: GET /party.party?s=1
timeouts.request: 4s
timeouts.turn: 4s
breaker.open: 500ms
define: |
  def q: tojson | @base64;
  def dec: {{__class__: "Decimal", decimal: tostring}};
errors:
  - {{ status: 500, when: "$probe.ok", then: reject }}
"#,
        proxy.url(),
        tryton.erp.name,
        tryton.erp.key
    )
}

pub async fn behind_proxy(tryton: &Tryton) -> Proxy {
    Proxy::start(tryton.address().parse().unwrap()).await
}

/// `code → name` of the parties that the shop made.
pub async fn parties(tryton: &Tryton) -> Vec<(String, String)> {
    let mut found: Vec<_> = tryton
        .erp
        .search("party.party", json!([["code", "like", "C%"]]), &["code", "name"])
        .await
        .iter()
        .map(|party| (party["code"].as_str().unwrap().to_owned(), party["name"].as_str().unwrap().to_owned()))
        .collect();
    found.sort();
    found
}

pub async fn settled(shop: &Shop, sink: &str) {
    eventually(LONG, "everything is delivered", async || match shop.unsettled(sink).await {
        0 => Ok(()),
        left => Err(format!("{left} left; parked: {:?}", shop.parked().await)),
    })
    .await;
}

async fn names(shop: &Shop) -> Vec<(String, String)> {
    let rows = shop.database.connect().await.query("SELECT 'C' || id, name FROM customers", &[]).await.unwrap();
    let mut names: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    names.sort();
    names
}

#[tokio::test]
async fn an_order_waits_for_its_customer_while_others_go_on_and_is_made_in_steps() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("waits").await;
    let product =
        tryton.erp.search("product.product", json!([["code", "=", "MUG-01"]]), &["code"]).await[0]["id"].clone();
    let customers = shop.sink("customers", &erp, CUSTOMERS);
    let orders = shop.sink("orders", &erp, ORDERS);
    // A step can't be sent twice: the ERP refuses to confirm what is confirmed.
    proxy.script(Script::on("POST", "/confirm", Fault::ResetAfter).times(1));
    proxy.script(Script::on("POST", "/quote", Fault::ResetAfter).times(1));
    shop.sql("INSERT INTO customers VALUES (1, 'Ann', 'Kai 3', 'Kiel', 1)").await;
    settled(&shop, "customers").await;
    // The first order's customer is not there yet, the second's is; a cart is nobody's business.
    shop.sql(&format!(
        "BEGIN; INSERT INTO orders VALUES (10, 'W-10', 2, now(), 'new'), (11, 'W-11', 1, now(), 'new'), (12, 'W-12', 1, NULL, 'cart');
         INSERT INTO order_lines VALUES (100, 10, {product}, 2, 9.90), (101, 11, {product}, 1, 5.00), (102, 11, {product}, 3, 7.25); COMMIT"
    ))
    .await;
    settled(&shop, "orders").await;
    let parked = shop.parked().await;
    assert!(!parked.is_empty() && parked.iter().all(|one| one.key == json!({"id": 10})), "{parked:?}");
    assert_eq!(parked[0].kind, ParkedKind::Waiting);
    let sales = async || {
        tryton.erp.search("sale.sale", json!([["reference", "like", "W-%"]]), &["reference", "state", "lines"]).await
    };
    let seen = sales().await;
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!((&seen[0]["reference"], seen[0]["lines"].as_array().unwrap().len()), (&json!("W-11"), 2));
    assert!(["confirmed", "processing", "done"].contains(&seen[0]["state"].as_str().unwrap()), "{seen:?}");

    shop.sql("INSERT INTO customers VALUES (2, 'Bob', 'Weg 1', 'Ulm', 1)").await;
    eventually(LONG, "the order has woken", async || shop.parked().await.is_empty()).await;
    assert_eq!(sales().await.len(), 2);
    // A deleted line's event has only the line's key; a confirmed sale is not edited: it is a dead letter.
    shop.sql("DELETE FROM order_lines WHERE id = 102").await;
    let parked = eventually(LONG, "the change is refused", async || shop.parked().await.pop()).await;
    assert_eq!((parked.key, parked.kind), (json!({"id": 11}), ParkedKind::Rejected));
    assert!(parked.reason.contains("update: reject"), "{}", parked.reason);
    // What the pull would write back changes nothing that is sent.
    let before = proxy.seen().len();
    shop.sql("UPDATE orders SET status = 'confirmed' WHERE id = 10").await;
    settled(&shop, "orders").await;
    assert_eq!(proxy.seen().len(), before);
    customers.stop().await;
    orders.stop().await;
}

#[tokio::test]
async fn a_rejected_record_is_parked_with_its_answer_and_replayed_after_the_fix() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("rejected").await;
    // The ERP answers 500 for a field that it does not know.
    let map = CUSTOMERS.replace(
        "{ name: .after.name }",
        r#"{ name: .after.name } + if .after.city == "nowhere" then {nonsense: 1} else {} end"#,
    );
    let sink = shop.sink("customers", &erp, &map);
    shop.sql("INSERT INTO customers VALUES (1, 'Ann', 'Kai 3', 'Kiel', 1), (2, 'Bad', 'x', 'nowhere', 1), (3, 'Cid', 'y', 'Ulm', 1)").await;
    settled(&shop, "customers").await;
    let wanted = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    let codes = async || parties(&tryton).await.into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    assert_eq!(codes().await, wanted(&["Ann", "Cid"]));
    let parked = shop.parked().await;
    assert_eq!((parked.len(), &parked[0].key, parked[0].kind), (1, &json!({"id": 2}), ParkedKind::Rejected));
    assert_eq!(parked[0].response.as_ref().unwrap()["status"], 500);
    assert!(parked[0].request.as_ref().unwrap()["request"].as_str().unwrap().contains("POST /party.party"));
    // A later record of the key is tried in its place, and stands behind; copies are in the dead-letter topic.
    shop.sql("UPDATE customers SET name = 'Still bad' WHERE id = 2").await;
    let parked = eventually(LONG, "refused again", async || {
        let parked = shop.parked().await;
        if parked[0].attempts == 2 { Ok(parked) } else { Err(format!("{parked:?}")) }
    })
    .await;
    let kinds: Vec<_> = parked.iter().map(|one| one.kind).collect();
    assert_eq!(kinds, [ParkedKind::Rejected, ParkedKind::Behind]);
    assert_eq!(parked[0].request.as_ref().unwrap()["body"]["name"], "Still bad");
    assert_eq!(codes().await, wanted(&["Ann", "Cid"]));
    let topics = shop.log.topics().await.unwrap();
    let dead = topics.iter().find(|topic| topic.name == "dead.customers").expect("a dead-letter topic");
    assert_eq!(dead.partitions[0].next.0, 2);
    // Mended where no event tells of it.
    shop.silently("UPDATE customers SET city = 'Bonn', name = 'Good' WHERE id = 2").await;
    let client = shop.datastore.client().await.unwrap();
    assert_eq!(command_parked(&client, "customers", None, Command::Replay).await.unwrap(), 1);
    eventually(LONG, "replayed", async || shop.parked().await.is_empty()).await;
    assert_eq!(codes().await, wanted(&["Ann", "Good", "Cid"]));
    assert_eq!(proxy.count("POST", "/party.party"), 7, "one for each, and two for each time that it was refused");
    sink.stop().await;
}

#[tokio::test]
async fn an_erp_that_is_down_loses_nothing_and_gets_everything_once_in_order() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("down").await;
    let sink = shop.sink("customers", &erp, CUSTOMERS);
    shop.sql("INSERT INTO customers SELECT i, 'n' || i, 's', 'c', 1 FROM generate_series(1, 5) i").await;
    settled(&shop, "customers").await;
    proxy.down();
    shop.sql("INSERT INTO customers SELECT i, 'n' || i, 's', 'c', 1 FROM generate_series(6, 20) i").await;
    shop.sql("UPDATE customers SET name = 'x' || id WHERE id % 3 = 0").await;
    eventually(LONG, "the breaker opens", async || erp.breaker() == tidegate::systems::BreakerState::Open).await;
    shop.sql("UPDATE customers SET name = 'y' || id WHERE id % 4 = 0; DELETE FROM customers WHERE id = 5").await;
    proxy.up().await;
    settled(&shop, "customers").await;
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    assert_eq!(parties(&tryton).await, names(&shop).await);
    sink.stop().await;
}

#[tokio::test]
async fn lost_answers_resets_errors_and_a_storm_of_429_double_and_lose_nothing() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("faults").await;
    let sink = shop.sink("customers", &erp, CUSTOMERS);
    // Each at least once, then by chance.
    proxy.script(Script::on("POST", "/party.party", Fault::LoseAnswer { hold: Duration::from_secs(6) }).times(1));
    proxy.script(Script::on("POST", "/party.party", Fault::ResetAfter).times(1));
    proxy.script(Script::on("POST", "/party.party", Fault::retry_after(429, 1)).times(3));
    proxy.script(Script::on("POST", "/party.party", Fault::ResetBefore).times(1));
    proxy.script(Script::on("PUT", "/party.party", Fault::ResetAfter).times(1));
    proxy.script(Script::on("GET", "/party.party?f", Fault::status(503)).times(1));
    proxy.script(Script::any(Fault::ResetAfter).chance(0.05).times(10));
    proxy.script(Script::any(Fault::Delay(Duration::from_millis(200))).chance(0.1));
    shop.sql("INSERT INTO customers SELECT i, 'n' || i, 's', 'c', 1 FROM generate_series(1, 30) i").await;
    shop.sql("UPDATE customers SET name = 'x' || id WHERE id % 2 = 0").await;
    settled(&shop, "customers").await;
    shop.sql("UPDATE customers SET name = 'y' || id WHERE id % 3 = 0").await;
    settled(&shop, "customers").await;
    proxy.clear();
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    let found = parties(&tryton).await;
    let codes: std::collections::BTreeSet<_> = found.iter().map(|(code, _)| code).collect();
    assert_eq!(codes.len(), found.len(), "doubled");
    assert_eq!(found, names(&shop).await);
    sink.stop().await;
}

#[tokio::test]
async fn a_crash_between_create_and_link_is_resolved_by_asking() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("crash").await;
    let sink = shop.sink("customers", &erp, CUSTOMERS);
    proxy.script(Script::on("POST", "/party.party", Fault::Delay(Duration::from_secs(30))).times(1));
    shop.sql("INSERT INTO customers VALUES (1, 'Ann', 'Kai 3', 'Kiel', 1)").await;
    eventually(LONG, "the ERP has made the party", async || parties(&tryton).await.len() == 1).await;
    sink.crash().await;
    let open: i64 = shop.unsettled("customers").await;
    assert!(open >= 2, "an intent and its event: {open}");
    let sink = shop.sink("customers", &erp, CUSTOMERS);
    settled(&shop, "customers").await;
    assert_eq!(parties(&tryton).await.len(), 1, "made once");
    assert_eq!(proxy.count("POST", "/party.party"), 1);
    let links = shop.links("party").await;
    assert!(links.len() == 1 && links[0].1.is_some(), "{links:?}");
    // The facts that the lost answer would have brought are there too.
    let kept: Value =
        shop.database.connect().await.query_one("SELECT kept FROM tidegate.links", &[]).await.unwrap().get(0);
    assert!(kept["address"].is_number(), "{kept}");
    sink.stop().await;
}

#[tokio::test]
async fn an_uncertain_create_that_nobody_can_look_up_is_parked_and_not_sent_twice() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("uncertain").await;
    let blind = "object: party\ntopics: shop.public.customers\nsettle: 100ms\nmap: '{name: .after.name}'\ncreate: POST /party.party\n";
    let sink = shop.sink("blind", &erp, blind);
    proxy.script(Script::on("POST", "/party.party", Fault::ResetAfter).times(1));
    shop.sql("INSERT INTO customers VALUES (1, 'Ann', 'Kai 3', 'Kiel', 1)").await;
    let parked = eventually(LONG, "parked", async || shop.parked().await.pop()).await;
    assert!(parked.reason.contains("nobody knows whether it was applied"), "{}", parked.reason);
    assert_eq!(proxy.count("POST", "/party.party"), 1);
    sink.stop().await;
}

#[tokio::test]
async fn a_create_that_times_out_and_is_made_just_after_is_looked_up_only_then() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("slow").await;
    let sink = shop.sink("customers", &erp, &CUSTOMERS.replace("settle: 500ms", "settle: 3s"));
    // Nothing comes of the first one but a time-out, after 4 s; the party is there a second later.
    proxy.script(Script::on("POST", "/party.party", Fault::LoseAnswer { hold: Duration::from_secs(6) }).times(1));
    let started = std::time::Instant::now();
    shop.sql("INSERT INTO customers VALUES (1, 'Ann', 'Kai 3', 'Kiel', 1)").await;
    settled(&shop, "customers").await;
    assert!(started.elapsed() > Duration::from_secs(7), "asked {:?} after the start", started.elapsed());
    assert_eq!((proxy.count("POST", "/party.party"), parties(&tryton).await.len()), (1, 1));
    sink.stop().await;
}

#[tokio::test]
async fn a_create_answered_500_is_looked_up_before_it_is_sent_again() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let settings_without_rules = erp_file(&tryton, &proxy).split("errors:").next().unwrap().to_owned();
    let erp = system("erp", &settings_without_rules);
    let shop = Shop::start("doubtful").await;
    let sink = shop.sink("customers", &erp, &CUSTOMERS.replace("settle: 500ms", "settle: 3s"));
    proxy.script(Script::on("POST", "/party.party", Fault::status(500)).times(1));
    shop.sql("INSERT INTO customers VALUES (1, 'Ann', 'Kai 3', 'Kiel', 1)").await;
    // The ERP was at it still: the party is there after the answer.
    eventually(LONG, "answered with 500", async || proxy.count("POST", "/party.party") == 1).await;
    tryton.erp.post("party.party", json!({"name": "Ann", "code": "C1"})).await;
    settled(&shop, "customers").await;
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    assert_eq!((proxy.count("POST", "/party.party"), parties(&tryton).await.len()), (1, 1));
    // With nothing to look it up by, it is a person's to say.
    let blind = "object: other\ntopics: shop.public.customers\nsettle: 100ms\nmap: '{name: .after.name}'\ninitial: create\ncreate: POST /party.party\n";
    proxy.script(Script::on("POST", "/party.party", Fault::status(500)).times(1));
    let other = shop.sink("blind", &erp, blind);
    let parked = eventually(LONG, "parked", async || shop.parked().await.pop()).await;
    assert!(parked.reason.contains("nobody knows whether it was applied"), "{}", parked.reason);
    assert_eq!(proxy.count("POST", "/party.party"), 2);
    other.stop().await;
    sink.stop().await;
}

#[tokio::test]
async fn rows_of_two_tables_do_not_share_an_object() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("shared").await;
    let sink = shop.sink("customers", &erp, CUSTOMERS);
    shop.sql("INSERT INTO customers VALUES (1, 'Ann', 'Kai 3', 'Kiel', 1)").await;
    settled(&shop, "customers").await;
    let orders = "object: party\ntopics: shop.public.orders\nmap: '{name: .after.number}'\nupdate: \"PUT /party.party/{{ $link.id }}\"\n";
    let other = shop.sink("orders", &erp, orders);
    shop.sql("INSERT INTO orders VALUES (1, 'N-1', 1, now(), 'new')").await;
    let parked = eventually(LONG, "parked", async || shop.parked().await.pop()).await;
    assert!(parked.reason.contains("is linked to a row of public.customers"), "{}", parked.reason);
    assert_eq!(proxy.count("PUT", ""), 0);
    other.stop().await;
    sink.stop().await;
}

#[tokio::test]
async fn a_changed_key_takes_its_link_along_and_a_deleted_row_its_party() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("rekey").await;
    let sink = shop.sink("customers", &erp, CUSTOMERS);
    shop.sql("INSERT INTO customers VALUES (1, 'Ann', 'Kai 3', 'Kiel', 1), (2, 'Bob', 'Weg 1', 'Ulm', 1)").await;
    settled(&shop, "customers").await;
    let first = shop.links("party").await;
    shop.sql("UPDATE customers SET id = 9, name = 'Anna' WHERE id = 1").await;
    settled(&shop, "customers").await;
    let links = shop.links("party").await;
    assert!(links.contains(&(json!({"id": 9}), first[0].1.clone())), "{links:?}");
    assert_eq!(proxy.count("POST", "/party.party"), 2, "nothing is made for the new key");
    assert_eq!(parties(&tryton).await, [("C1".to_owned(), "Anna".to_owned()), ("C2".to_owned(), "Bob".to_owned())]);
    // Deleted and there again before anybody looked: nothing is deleted outside.
    sink.stop().await;
    shop.sql("DELETE FROM customers WHERE id = 2; INSERT INTO customers VALUES (2, 'Bob', 'Weg 1', 'Ulm', 1)").await;
    let puts = proxy.count("PUT", "/party.party");
    let sink = shop.sink("customers", &erp, CUSTOMERS);
    settled(&shop, "customers").await;
    assert_eq!(proxy.count("PUT", "/party.party"), puts);
    shop.sql("DELETE FROM customers WHERE id = 2").await;
    settled(&shop, "customers").await;
    assert_eq!(parties(&tryton).await.len(), 1, "an inactive party is not listed");
    sink.stop().await;
}

#[tokio::test]
async fn a_preview_shows_the_requests_and_sends_nothing() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("preview").await;
    shop.sql("INSERT INTO customers VALUES (1, 'Ann', 'Kai 3', 'Kiel', 1)").await;
    let (context, _signal, _abort) = shop.context("customers");
    let settings = settings(&erp, CUSTOMERS);
    let shown = eventually(LONG, "the event is in the log", async || {
        tidegate::sinks::http::preview(&settings, &context, 10).await.unwrap().pop()
    })
    .await;
    assert_eq!((&shown["does"], &shown["key"]), (&json!("create"), &json!({"id": 1})));
    assert_eq!(shown["requests"][1]["request"], "POST /party.party?f=addresses");
    assert_eq!(shown["requests"][1]["body"]["name"], "Ann");
    assert!(proxy.seen().is_empty());
}
