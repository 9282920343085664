//! Rows that refer to each other: waiting for a link, going first without it, and what the steps of a create leave.

use std::time::Duration;

use serde_json::{Value, json};
use tidegate::datastore::ParkedKind;

use crate::delivery::settled;
use crate::support::shop::{Shop, system};
use crate::support::{Api, Fault, Proxy, Script, eventually};

const LONG: Duration = Duration::from_secs(60);

/// A sink of customers as items, which have their ids as codes and are found by them.
pub fn items(map: &str) -> String {
    format!(
        r#"
object: part
topics: shop.public.customers
initial: create
settle: 200ms
map: '{map}'
match: {{ request: GET /items, params: {{ code: "{{{{ .key.id }}}}" }}, id: ".[].id" }}
create: {{ request: POST /items, map: '{{ code: .key.id }} + ({map})' }}
update: "PUT /items/{{{{ $link.id }}}}"
"#
    )
}

/// Of customers, of whom the one whose id is in `street` is the parent.
pub fn parts() -> String {
    items(r#"{ name: .after.name, parent: link_later("part"; .after.street).id }"#)
}

pub async fn behind_proxy(more: &str) -> (Api, Proxy, std::sync::Arc<tidegate::systems::System>) {
    let api = Api::start(Vec::new()).await;
    let proxy = Proxy::start(api.address).await;
    let settings =
        format!("base_url: {}/v1\ntimeouts: {{ request: 3s, turn: 3s }}\nprobe: GET /all\n{more}", proxy.url());
    let system = system("api", &settings);
    (api, proxy, system)
}

pub fn item(api: &Api, name: &str) -> Value {
    api.items().into_iter().find(|item| item["name"] == name).unwrap_or_default()
}

#[tokio::test]
async fn rows_that_refer_to_each_other_go_first_without_and_get_the_reference_after() {
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("cycle").await;
    let sink = shop.sink("parts", &system, &parts());
    // A pair, a ring of three, and one that is its own parent.
    shop.sql(
        "INSERT INTO customers (id, name, street) VALUES (1, 'a', '2'), (2, 'b', '1'), (3, 'c', '4'), (4, 'd', '5'), (5, 'e', '3'), (6, 'f', '6')",
    )
    .await;
    eventually(LONG, "every reference is there", async || {
        let items = api.items();
        let id = |code: i64| items.iter().find(|item| item["code"] == code).map(|item| item["id"].clone());
        let parent = |code: i64| items.iter().find(|item| item["code"] == code).map(|item| item["parent"].clone());
        let ring = [(1, 2), (2, 1), (3, 4), (4, 5), (5, 3), (6, 6)];
        match ring.iter().all(|(one, other)| id(*other).is_some() && parent(*one) == id(*other)) {
            true => Ok(()),
            false => Err(format!("{items:?} {:?}", shop.parked().await)),
        }
    })
    .await;
    settled(&shop, "parts").await;
    eventually(LONG, "nothing is owed", async || shop.parked().await.is_empty()).await;
    assert_eq!(proxy.count("POST", "/items"), 6, "each made once");
    assert!(proxy.count("PUT", "/items") <= 6, "each patched once at the most: {:?}", proxy.seen());

    // What is owed holds nothing back, survives other changes, and is paid after a restart.
    shop.sql("INSERT INTO customers (id, name, street) VALUES (10, 'child', '11')").await;
    settled(&shop, "parts").await;
    shop.sql("UPDATE customers SET name = 'kid' WHERE id = 10").await;
    settled(&shop, "parts").await;
    assert_eq!(item(&api, "kid")["parent"], Value::Null);
    let parked = shop.parked().await;
    assert_eq!(parked.len(), 1, "{parked:?}");
    assert_eq!((parked[0].kind, &parked[0].key), (ParkedKind::Owing, &json!({"id": 10})));
    assert!(parked[0].reason.contains("sent without the link of part"), "{}", parked[0].reason);
    sink.crash().await;
    let sink = shop.sink("parts", &system, &parts());
    shop.sql("INSERT INTO customers (id, name) VALUES (11, 'father')").await;
    eventually(LONG, "the reference came after", async || {
        let father = item(&api, "father")["id"].clone();
        !father.is_null() && item(&api, "kid")["parent"] == father && shop.parked().await.is_empty()
    })
    .await;
    // Both sides agree: nothing more is sent.
    let sent = proxy.count("PUT", "");
    shop.sql("UPDATE customers SET city = 'x' WHERE id IN (10, 11)").await;
    settled(&shop, "parts").await;
    assert_eq!(proxy.count("PUT", ""), sent);
    sink.stop().await;
}

#[tokio::test]
async fn who_waits_too_long_for_a_link_becomes_a_dead_letter_and_says_what_to_do() {
    let (api, _proxy, system) = behind_proxy("").await;
    let shop = Shop::start("deadline").await;
    let waiting = parts().replace("link_later", "link").replace("settle:", "link.timeout: 2s\nsettle:");
    let sink = shop.sink("parts", &system, &waiting);
    shop.sql("INSERT INTO customers (id, name, street) VALUES (1, 'a', '2'), (2, 'b', '1'), (3, 'c', '9')").await;
    settled(&shop, "parts").await;
    let dead = eventually(LONG, "all are dead letters", async || {
        let parked = shop.parked().await;
        if parked.iter().filter(|one| one.kind == ParkedKind::Rejected).count() == 3 {
            Ok(parked)
        } else {
            Err(format!("{parked:?}"))
        }
    })
    .await;
    assert!(
        dead.iter().all(|one| one.reason.contains("waited too long") && one.reason.contains("link_later")),
        "{dead:?}"
    );
    assert!(api.items().is_empty());
    // The dead letter's copy carries the reason.
    let topics = shop.log.topics().await.unwrap();
    assert_eq!(topics.iter().find(|topic| topic.name == "dead.parts").unwrap().partitions[0].next.0, 3);
    sink.stop().await;

    // So does one that went first, and whose reference never came; it is delivered all the same.
    let (api, _proxy, system) = behind_proxy("").await;
    let shop = Shop::start("owed").await;
    let sink = shop.sink("parts", &system, &parts().replace("settle:", "link.timeout: 2s\nsettle:"));
    shop.sql("INSERT INTO customers (id, name, street) VALUES (3, 'c', '9')").await;
    let dead = eventually(LONG, "a dead letter", async || {
        shop.parked().await.into_iter().find(|one| one.kind == ParkedKind::Rejected)
    })
    .await;
    assert!(dead.reason.contains("waited too long: was sent without the link of part"), "{}", dead.reason);
    assert_eq!(api.items().len(), 1);
    sink.stop().await;
}

#[tokio::test]
async fn a_row_that_changes_between_the_steps_of_its_create_is_sent_as_it_is_in_the_end() {
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("between").await;
    let steps = r#"
object: order
topics: shop.public.customers
initial: create
settle: 1s
map: '{ name: .after.name }'
match: { request: GET /items, params: { code: "{{ .key.id }}" }, id: ".[].id" }
create:
  - { request: POST /items, map: "{ code: .key.id, name: .after.name }" }
  - request: POST /items/{{ $link.id }}/quote
    done: { request: "GET /items/{{ $link.id }}", when: '.done // [] | index("quote")' }
update: "PUT /items/{{ $link.id }}"
"#;
    // The second step is not done, and is sent with the row as it is by then; or it is done, asked for, and not sent again.
    for (id, fault, sent) in [(1, Fault::Delay(Duration::from_secs(30)), 1), (2, Fault::ResetBefore, 2)] {
        let sink = shop.sink("orders", &system, steps);
        let before = proxy.count("POST", "/quote");
        proxy.script(Script::on("POST", "/quote", fault).times(1));
        shop.sql(&format!("INSERT INTO customers (id, name) VALUES ({id}, 'first')")).await;
        eventually(LONG, "the second step is under way", async || proxy.count("POST", "/quote") > before).await;
        sink.crash().await;
        // Both events are one attempt after the restart: only the row tells of the change.
        shop.sql(&format!("UPDATE customers SET name = 'second' WHERE id = {id}")).await;
        let sink = shop.sink("orders", &system, steps);
        settled(&shop, "orders").await;
        let items = api.items();
        let last = items.last().unwrap();
        assert_eq!((items.len(), &last["name"], &last["done"]), (id, &json!("second"), &json!(["quote"])), "{items:?}");
        assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
        assert_eq!(proxy.count("POST", "/quote") - before, sent);
        sink.stop().await;
    }
}

#[tokio::test]
async fn a_create_known_by_its_key_is_sent_again_as_it_was_and_the_change_made_since_follows() {
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("same").await;
    let keyed = r#"
object: order
topics: shop.public.customers
initial: create
settle: 500ms
map: '{ name: .after.name }'
create: { request: POST /items, headers: { Idempotency-Key: "{{ $idempotency_key }}" } }
update: { request: "PUT /items/{{ $link.id }}", headers: { Idempotency-Key: "{{ $idempotency_key }}" } }
"#;
    let sink = shop.sink("orders", &system, keyed);
    proxy.script(Script::on("POST", "/items", Fault::ResetAfter).times(1));
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'first')").await;
    eventually(LONG, "made, and the answer lost", async || api.items().len() == 1).await;
    shop.sql("UPDATE customers SET name = 'second' WHERE id = 1").await;
    settled(&shop, "orders").await;
    assert_eq!((api.items().len(), &api.items()[0]["name"]), (1, &json!("second")), "{:?}", proxy.seen());
    assert_eq!(proxy.count("POST", "/items"), 2);

    // The same over a crash, which finds no other worker to ask.
    proxy.script(Script::on("POST", "/items", Fault::Delay(Duration::from_secs(30))).times(1));
    shop.sql("INSERT INTO customers (id, name) VALUES (2, 'third')").await;
    eventually(LONG, "made again", async || api.items().len() == 2).await;
    sink.crash().await;
    shop.sql("UPDATE customers SET name = 'fourth' WHERE id = 2").await;
    let sink = shop.sink("orders", &system, keyed);
    settled(&shop, "orders").await;
    assert_eq!((api.items().len(), &api.items()[1]["name"]), (2, &json!("fourth")), "{:?}", proxy.seen());

    // An update whose answer is lost: the row moves on meanwhile, and is what it is in the end.
    proxy.script(Script::on("PUT", "/items", Fault::ResetAfter).times(1));
    shop.sql("UPDATE customers SET name = 'fifth' WHERE id = 2").await;
    eventually(LONG, "applied", async || api.items()[1]["name"] == "fifth").await;
    shop.sql("UPDATE customers SET name = 'sixth' WHERE id = 2").await;
    settled(&shop, "orders").await;
    assert_eq!(api.items()[1]["name"], "sixth");
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    sink.stop().await;
}
