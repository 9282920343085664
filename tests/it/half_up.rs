//! A system that is half up: what stands before it answers for it, its first answers are errors, or it asks for no pause.
//! Nothing is taken for done, refused or missing on such a word.

use std::time::{Duration, Instant};

use serde_json::json;
use tidegate::datastore::ParkedKind;

use crate::delivery::settled;
use crate::references::{behind_proxy, item, items};
use crate::support::shop::Shop;
use crate::support::{Api, Fault, Proxy, Script, eventually};

const LONG: Duration = Duration::from_secs(60);

/// A sink that deletes, too.
pub fn deleting() -> String {
    items("{ name: .after.name }") + "delete: \"DELETE /items/{{ $link.id }}\"\n"
}

/// What a proxy shows for a system that is away.
fn page() -> Fault {
    Fault::Answer { status: 200, headers: Vec::new(), body: "<!DOCTYPE html>\n<title>Back soon</title>".to_owned() }
}

/// A delete, an update and a `match` of sink `parts` that are answered 404 once, after `script`: nothing is taken for
/// gone, made twice or set aside.
async fn met_by_404(api: &Api, proxy: &Proxy, shop: &Shop, script: impl Fn()) {
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'a'), (2, 'b')").await;
    settled(shop, "parts").await;
    api.inside.lock().unwrap().items.insert(9, json!({"id": 9, "code": 3, "name": "there already"}));
    for (method, path, sql) in [
        ("DELETE", "/items/", "DELETE FROM customers WHERE id = 1"),
        ("PUT", "/items/", "UPDATE customers SET name = 'c' WHERE id = 2"),
        ("GET", "/items?", "INSERT INTO customers (id, name) VALUES (3, 'd')"),
    ] {
        // An answer of more than a second ago says nothing of how the system is now.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        script();
        proxy.script(Script::on(method, path, Fault::status(404)).times(1));
        let before = proxy.count(method, path);
        shop.sql(sql).await;
        settled(shop, "parts").await;
        assert!(proxy.count(method, path) >= before + 2, "{method}: {:?}", proxy.seen());
        assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    }
    let mut names: Vec<_> = api.items().iter().map(|item| item["name"].clone()).collect();
    names.sort_by_key(ToString::to_string);
    assert_eq!(names, ["c", "d"], "{:?}", proxy.seen());
    assert_eq!(proxy.count("POST", ""), 2, "nothing is made that was there");
}

#[tokio::test]
async fn what_is_answered_404_while_the_probe_fails_is_neither_gone_nor_missing_nor_refused() {
    let (api, proxy, system) = behind_proxy("breaker.open: 200ms\n").await;
    let shop = Shop::start("notthere").await;
    let sink = shop.sink("parts", &system, &deleting());
    // What a gateway says whose system is not there yet; the probe of a second ago is none of now.
    met_by_404(&api, &proxy, &shop, || proxy.script(Script::on("GET", "/all", Fault::status(503)).times(1))).await;
    // With the system well, what is gone is gone.
    api.inside.lock().unwrap().items.remove(&9);
    shop.sql("DELETE FROM customers WHERE id = 3").await;
    settled(&shop, "parts").await;
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    sink.stop().await;
}

#[tokio::test]
async fn what_is_answered_404_once_as_a_system_comes_up_is_neither_gone_nor_missing_nor_refused() {
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("comingup").await;
    let sink = shop.sink("parts", &system, &deleting());
    // That it was well a second ago says nothing of now; the probe, asked after, finds it well.
    met_by_404(&api, &proxy, &shop, || {}).await;
    sink.stop().await;
    // A delete by another method is none the less one.
    let closes = deleting().replace(
        "\"DELETE /items/{{ $link.id }}\"",
        "{ request: \"PUT /items/{{ $link.id }}\", map: '{ name: \"closed\" }' }",
    );
    let sink = shop.sink("parts", &system, &closes);
    proxy.script(Script::on("PUT", "/items/", Fault::status(404)).times(1));
    shop.sql("DELETE FROM customers WHERE id = 2").await;
    settled(&shop, "parts").await;
    assert!(!item(&api, "closed").is_null(), "{:?}", proxy.seen());
    sink.stop().await;
}

#[tokio::test]
async fn a_page_for_people_is_no_answer_even_with_status_200() {
    let (api, proxy, system) = behind_proxy("breaker.open: 200ms\n").await;
    let shop = Shop::start("page").await;
    let retries = "errors.retry.count: 1\n";
    let sink = shop.sink("parts", &system, &(deleting() + retries));
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'a'), (2, 'b')").await;
    settled(&shop, "parts").await;
    // The whole system is away: nothing is done, and nobody is to blame.
    proxy.script(Script::any(page()));
    for (method, sql) in [
        ("DELETE", "DELETE FROM customers WHERE id = 1"),
        ("PUT", "UPDATE customers SET name = 'c' WHERE id = 2"),
        ("GET", "INSERT INTO customers (id, name) VALUES (3, 'd')"),
    ] {
        let before = proxy.count(method, "/items");
        shop.sql(sql).await;
        eventually(LONG, "asked twice", async || proxy.count(method, "/items") >= before + 2).await;
        assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
        let told = sink.status.last_error().map(|(_, told)| told).unwrap_or_default();
        assert!(told.contains("with a web page"), "{told}");
        proxy.clear();
        settled(&shop, "parts").await;
        proxy.script(Script::any(page()));
    }
    proxy.clear();
    let mut names: Vec<_> = api.items().iter().map(|item| item["name"].clone()).collect();
    names.sort_by_key(ToString::to_string);
    assert_eq!(names, ["c", "d"], "{:?}", proxy.seen());
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    // The page is for one record alone: it is set aside, the others go on.
    proxy.script(Script::on("PUT", "/items/", page()).body("\"bad\""));
    shop.sql("UPDATE customers SET name = 'bad' WHERE id = 2; UPDATE customers SET name = 'e' WHERE id = 3").await;
    let parked = eventually(LONG, "set aside", async || shop.parked().await.pop()).await;
    assert_eq!((&parked.key, parked.kind), (&json!({"id": 2}), ParkedKind::Rejected));
    assert!(parked.reason.contains("`errors: [{ status: 200, then: applied }]`"), "{}", parked.reason);
    settled(&shop, "parts").await;
    assert!(!item(&api, "e").is_null());
    sink.stop().await;

    // A system that answers so says it.
    let (_api, proxy, system) = behind_proxy("errors: [{ status: 2xx, then: applied }]\n").await;
    let shop = Shop::start("honest").await;
    let sink = shop.sink("parts", &system, &deleting());
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'a')").await;
    settled(&shop, "parts").await;
    for method in ["PUT", "DELETE"] {
        proxy.script(Script::on(method, "/items/", page()).times(1));
    }
    shop.sql("UPDATE customers SET name = 'b' WHERE id = 1").await;
    settled(&shop, "parts").await;
    shop.sql("DELETE FROM customers WHERE id = 1").await;
    settled(&shop, "parts").await;
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    assert_eq!((proxy.count("PUT", "/items/"), proxy.count("DELETE", "/items/")), (1, 1));
    sink.stop().await;
}

#[tokio::test]
async fn a_500_that_a_rule_refuses_counts_when_it_comes_twice() {
    let (api, proxy, system) = behind_proxy("errors: [{ status: 500, when: $probe.ok, then: reject }]\n").await;
    let shop = Shop::start("twice").await;
    let sink = shop.sink("parts", &system, &deleting());
    // Each once, as from a system whose probe was well again a moment after.
    for (method, path) in [("GET", "/items?"), ("POST", "/items"), ("PUT", "/items/"), ("DELETE", "/items/")] {
        proxy.script(Script::on(method, path, Fault::status(500)).times(1));
    }
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'a'), (2, 'b')").await;
    settled(&shop, "parts").await;
    shop.sql("UPDATE customers SET name = 'c' WHERE id = 1").await;
    shop.sql("DELETE FROM customers WHERE id = 2").await;
    settled(&shop, "parts").await;
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    let items = api.items();
    assert_eq!((items.len(), &items[0]["name"]), (1, &json!("c")), "{items:?}");
    // A record that is bad is refused at the second time.
    proxy.script(Script::on("POST", "/items", Fault::status(500)).body("\"bad\""));
    shop.sql("INSERT INTO customers (id, name) VALUES (3, 'bad'), (4, 'd')").await;
    settled(&shop, "parts").await;
    let parked = shop.parked().await;
    assert_eq!((parked.len(), &parked[0].key, parked[0].kind), (1, &json!({"id": 3}), ParkedKind::Rejected));
    let posts = proxy.seen().into_iter().filter(|seen| seen.method == "POST" && seen.body.contains("\"bad\"")).count();
    assert_eq!((posts, api.items().len()), (2, 2));
    sink.stop().await;
}

#[tokio::test]
async fn a_system_that_asks_for_no_pause_is_given_one() {
    let (_api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("nopause").await;
    let sink = shop.sink("parts", &system, &deleting());
    let started = Instant::now();
    proxy.script(Script::on("POST", "/items", Fault::retry_after(429, 0)).times(5));
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'a')").await;
    settled(&shop, "parts").await;
    // 0.15 + 0.3 + 0.6 + 1.2 + 2.4 s at the least.
    assert!(started.elapsed() > Duration::from_millis(4600), "{:?}", started.elapsed());
    assert!(shop.parked().await.is_empty());
    eventually(LONG, "made", async || proxy.count("POST", "/items") == 6).await;
    sink.stop().await;
}
