//! Records that are set aside, and go on by themselves when what they were set aside for is mended.

use std::time::Duration;

use serde_json::json;
use tidegate::datastore::{Command, ParkedKind, command_parked};

use crate::delivery::settled;
use crate::references::{behind_proxy, item, items, parts};
use crate::support::shop::Shop;
use crate::support::{Fault, Script, eventually};

const LONG: Duration = Duration::from_secs(60);

fn named() -> String {
    items(r#"if .after.name == null then error("no name") else { name: .after.name, city: .after.city } end"#)
}

#[tokio::test]
async fn a_dead_letter_is_tried_again_in_its_place_when_its_row_changes() {
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("heals").await;
    let sink = shop.sink(
        "parts",
        &system,
        &named().replace("else {", r#"elif .after.city == "nowhere" then error("no city") elif .after.city == "zero" then error("zero \u0000") else {"#),
    );
    shop.sql("INSERT INTO customers (id, name) VALUES (1, NULL), (2, 'b')").await;
    settled(&shop, "parts").await;
    let parked = shop.parked().await;
    assert_eq!((parked.len(), parked[0].kind, api.items().len()), (1, ParkedKind::Rejected, 1));
    assert!(parked[0].reason.contains("no name"), "{}", parked[0].reason);
    // A change that mends it not: the present reason, and the change stands behind.
    shop.sql("UPDATE customers SET name = 'a', city = 'nowhere' WHERE id = 1").await;
    let parked = eventually(LONG, "refused anew", async || {
        let parked = shop.parked().await;
        if parked[0].reason.contains("no city") { Ok(parked) } else { Err(format!("{parked:?}")) }
    })
    .await;
    let kinds: Vec<_> = parked.iter().map(|one| (one.kind, one.attempts)).collect();
    assert_eq!(kinds, [(ParkedKind::Rejected, 2), (ParkedKind::Behind, 2)]);
    shop.sql("UPDATE customers SET city = 'Ulm' WHERE id = 1").await;
    eventually(LONG, "no dead letter", async || shop.parked().await.is_empty()).await;
    assert_eq!((&item(&api, "a")["code"], proxy.count("POST", "/items")), (&json!(1), 2));
    // A linked row, and what the system refused.
    let refused = Fault::Answer { status: 422, headers: Vec::new(), body: "{}".to_owned() };
    proxy.script(Script::on("PUT", "/items", refused).times(1));
    shop.sql("UPDATE customers SET city = 'Bonn' WHERE id = 2").await;
    eventually(LONG, "refused", async || shop.parked().await.len() == 1).await;
    shop.sql("UPDATE customers SET city = 'Kiel' WHERE id = 2").await;
    eventually(LONG, "no dead letter", async || shop.parked().await.is_empty()).await;
    assert_eq!(item(&api, "b")["city"], "Kiel");
    // What is said of a failure is any text.
    shop.sql("INSERT INTO customers (id, name, city) VALUES (4, 'd', 'zero')").await;
    let parked = eventually(LONG, "refused", async || shop.parked().await.pop()).await;
    assert!(parked.reason.contains("zero \u{fffd}"), "{}", parked.reason);
    shop.sql("DELETE FROM customers WHERE id = 4").await;
    eventually(LONG, "no dead letter", async || shop.parked().await.is_empty()).await;
    // A row that is gone has nothing to be mended.
    shop.sql("INSERT INTO customers (id, name) VALUES (3, NULL)").await;
    eventually(LONG, "refused", async || shop.parked().await.len() == 1).await;
    shop.sql("DELETE FROM customers WHERE id = 3").await;
    eventually(LONG, "no dead letter", async || shop.parked().await.is_empty()).await;
    assert_eq!(proxy.count("POST", "/items"), 2);
    sink.stop().await;
}

#[tokio::test]
async fn what_only_a_person_can_decide_is_not_tried_again_for_a_change() {
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("person").await;
    let blind = "object: part\ntopics: shop.public.customers\nsettle: 100ms\ninitial: create\n\
                 map: '{name: .after.name, city: .after.city}'\ncreate: POST /items\nupdate: \"PUT /items/{{ $link.id }}\"\n";
    let sink = shop.sink("blind", &system, blind);
    // One is made and the answer lost, the other is refused.
    proxy.script(Script::on("POST", "/items", Fault::ResetAfter).body("\"a\"").times(1));
    let refused = Fault::Answer { status: 422, headers: Vec::new(), body: "{}".to_owned() };
    proxy.script(Script::on("POST", "/items", refused).body("\"b\"").times(1));
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'a'), (2, 'b')").await;
    eventually(LONG, "both are parked", async || shop.parked().await.len() == 2).await;
    shop.sql("UPDATE customers SET city = 'Ulm'").await;
    // Both changes came at the same time: what is tried again is tried by now.
    eventually(LONG, "the refused one is made", async || !item(&api, "b").is_null()).await;
    let parked = eventually(LONG, "one is left", async || {
        let parked = shop.parked().await;
        if parked.iter().all(|one| one.key == json!({"id": 1})) { Ok(parked) } else { Err(format!("{parked:?}")) }
    })
    .await;
    let kinds: Vec<_> = parked.iter().map(|one| (one.kind, one.attempts)).collect();
    assert_eq!(kinds, [(ParkedKind::Rejected, 1), (ParkedKind::Behind, 1)]);
    assert_eq!((proxy.count("POST", "/items"), api.items().len()), (3, 2));
    // Each change by itself has an order to keep: it stands behind.
    let each = r#"
topics: shop.public.customers
send: change
request: POST /items
map: '{ name: "k\(.key.id) \(.op)" }'
"#;
    proxy.script(Script::on("POST", "/items", Fault::status(422)).body("k7 c").times(1));
    let other = shop.sink("each", &system, each);
    settled(&shop, "each").await;
    shop.sql("INSERT INTO customers (id, name) VALUES (7, 'x')").await;
    shop.sql("UPDATE customers SET name = 'y' WHERE id = 7").await;
    let of = async || {
        shop.parked().await.into_iter().filter(|one| one.connector == "each").map(|one| one.kind).collect::<Vec<_>>()
    };
    eventually(LONG, "one stands behind", async || of().await == [ParkedKind::Rejected, ParkedKind::Behind]).await;
    shop.sql("INSERT INTO customers (id, name) VALUES (8, 'z')").await;
    settled(&shop, "each").await;
    assert_eq!(of().await, [ParkedKind::Rejected, ParkedKind::Behind]);
    assert!(item(&api, "k7 u").is_null());
    let client = shop.datastore.client().await.unwrap();
    command_parked(&client, "each", None, Command::Replay).await.unwrap();
    eventually(LONG, "replayed in order", async || !item(&api, "k7 u").is_null()).await;
    assert!(item(&api, "k7 c")["id"].as_u64() < item(&api, "k7 u")["id"].as_u64());
    other.stop().await;
    sink.stop().await;
}

#[tokio::test]
async fn what_waited_too_long_goes_on_when_the_link_comes_and_what_needs_none_any_more_at_once() {
    let (api, _proxy, system) = behind_proxy("").await;
    let shop = Shop::start("toolate").await;
    let reference = r#"if .after.street then link("part"; .after.street).id else null end"#;
    let waiting = parts().replace(r#"link_later("part"; .after.street).id"#, &format!("({reference})"));
    let sink = shop.sink("parts", &system, &waiting.replace("settle:", "link.timeout: 1s\nsettle:"));
    shop.sql("INSERT INTO customers (id, name, street) VALUES (1, 'child', '2'), (3, 'other', '4')").await;
    let dead = async || shop.parked().await.iter().filter(|one| one.kind == ParkedKind::Rejected).count();
    eventually(LONG, "both are dead letters", async || dead().await == 2).await;
    assert!(api.items().is_empty());
    shop.sql("INSERT INTO customers (id, name) VALUES (2, 'parent')").await;
    eventually(LONG, "made", async || shop.parked().await.len() == 1).await;
    assert_eq!(item(&api, "child")["parent"], item(&api, "parent")["id"]);
    shop.sql("UPDATE customers SET street = NULL WHERE id = 3").await;
    eventually(LONG, "made", async || shop.parked().await.is_empty()).await;
    assert!(!item(&api, "other").is_null());
    sink.stop().await;

    // The same of one that waits still, for days.
    let sink = shop.sink("parts", &system, &waiting);
    shop.sql("INSERT INTO customers (id, name, street) VALUES (5, 'waits', '6')").await;
    eventually(LONG, "waits", async || shop.parked().await.iter().any(|one| one.kind == ParkedKind::Waiting)).await;
    shop.sql("UPDATE customers SET street = NULL WHERE id = 5").await;
    eventually(LONG, "made", async || shop.parked().await.is_empty()).await;
    assert!(!item(&api, "waits").is_null());
    sink.stop().await;
}

#[tokio::test]
async fn a_queue_that_is_longer_than_what_is_taken_up_at_once_goes_on_to_its_end() {
    let (api, proxy, system) = behind_proxy("").await;
    let shop = Shop::start("long").await;
    let sink = shop.sink("parts", &system, &named());
    shop.sql("INSERT INTO customers (id, name) VALUES (1, NULL), (2, NULL)").await;
    settled(&shop, "parts").await;
    let changes = "DO $$ BEGIN FOR i IN 1..2300 LOOP UPDATE customers SET street = i::text; END LOOP; END $$";
    shop.sql(changes).await;
    settled(&shop, "parts").await;
    let client = shop.database.connect().await;
    let count = async || -> i64 { client.query_one("SELECT count(*) FROM tidegate.parked", &[]).await.unwrap().get(0) };
    assert_eq!(count().await, 2 * 2301);
    shop.sql("UPDATE customers SET name = 'n' || id").await;
    eventually(LONG, "both queues are empty", async || {
        let left = count().await;
        if left == 0 { Ok(()) } else { Err(left.to_string()) }
    })
    .await;
    assert_eq!((api.items().len(), proxy.count("POST", "/items")), (2, 2));
    sink.stop().await;
}
