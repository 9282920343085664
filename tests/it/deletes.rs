//! Rows that are deleted while requests are under way or the system is away: what was made for them is gone in the end.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::delivery::settled;
use crate::half_up::deleting;
use crate::references::{behind_proxy, item};
use crate::support::shop::Shop;
use crate::support::{Api, Fault, Script, eventually};

const LONG: Duration = Duration::from_secs(90);

/// `(code, name)` of what is in the system, and of what is to be.
async fn both(api: &Api, shop: &Shop) -> (Vec<(i64, String)>, Vec<(i64, String)>) {
    let of = |item: &serde_json::Value| (item["code"].as_i64().unwrap(), item["name"].as_str().unwrap().to_owned());
    let mut items: Vec<_> = api.items().iter().map(of).collect();
    items.sort();
    let rows = shop.database.connect().await.query("SELECT id, name FROM customers ORDER BY id", &[]).await.unwrap();
    (items, rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

fn faults() -> [Fault; 8] {
    [
        Fault::LoseAnswer { hold: Duration::from_secs(6) },
        Fault::ResetAfter,
        Fault::ResetBefore,
        Fault::Delay(Duration::from_secs(2)),
        Fault::status(500),
        Fault::status(502),
        Fault::status(503),
        Fault::status(404),
    ]
}

#[tokio::test]
async fn a_row_that_goes_while_its_create_or_change_is_under_way_takes_its_record_along() {
    let (api, proxy, system) = behind_proxy("breaker.open: 200ms\n").await;
    let shop = Shop::start("underway").await;
    let sink = shop.sink("parts", &system, &deleting());
    for (at, fault) in faults().into_iter().enumerate() {
        let create = format!("c{at}");
        proxy.script(Script::on("POST", "/items", fault.clone()).body(&format!("\"{create}\"")).times(1));
        shop.sql(&format!("INSERT INTO customers (id, name) VALUES ({at}, '{create}'), (10 + {at}, 'x')")).await;
        eventually(LONG, "the create is under way", async || {
            proxy.seen().iter().any(|seen| seen.method == "POST" && seen.body.contains(&format!("\"{create}\"")))
        })
        .await;
        shop.sql(&format!("DELETE FROM customers WHERE id = {at}")).await;
        settled(&shop, "parts").await;
        let change = format!("u{at}");
        proxy.script(Script::on("PUT", "/items", fault).body(&format!("\"{change}\"")).times(1));
        shop.sql(&format!("UPDATE customers SET name = '{change}' WHERE id = 10 + {at}")).await;
        eventually(LONG, "the change is under way", async || {
            proxy.seen().iter().any(|seen| seen.method == "PUT" && seen.body.contains(&format!("\"{change}\"")))
        })
        .await;
        shop.sql(&format!("DELETE FROM customers WHERE id = 10 + {at}")).await;
        settled(&shop, "parts").await;
        assert!(api.items().is_empty(), "{at}: {:?} {:?}", api.items(), proxy.seen());
        assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    }
    assert!(shop.links("part").await.is_empty());
    sink.stop().await;
}

#[tokio::test]
async fn a_delete_arrives_whatever_becomes_of_its_request() {
    let (api, proxy, system) = behind_proxy("breaker.open: 200ms\n").await;
    let shop = Shop::start("gone").await;
    let sink = shop.sink("parts", &system, &deleting());
    for (at, fault) in faults().into_iter().enumerate() {
        let name = format!("d{at}");
        shop.sql(&format!("INSERT INTO customers (id, name) VALUES ({at}, '{name}')")).await;
        settled(&shop, "parts").await;
        assert!(!item(&api, &name).is_null());
        proxy.script(Script::on("DELETE", "/items/", fault).times(1));
        shop.sql(&format!("DELETE FROM customers WHERE id = {at}")).await;
        settled(&shop, "parts").await;
        assert!(api.items().is_empty(), "{at}: {:?} {:?}", api.items(), proxy.seen());
    }
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    // While it is down, and as the breaker opens and closes; and of a row that is there again by then.
    shop.sql("INSERT INTO customers (id, name) SELECT i, 'n' FROM generate_series(1, 8) i").await;
    settled(&shop, "parts").await;
    for id in 1..=6 {
        proxy.down();
        shop.sql(&format!("UPDATE customers SET name = 'u' WHERE id = 8; DELETE FROM customers WHERE id = {id}")).await;
        if id % 2 == 0 {
            shop.sql(&format!("INSERT INTO customers (id, name) VALUES ({id}, 'again')")).await;
        }
        let open = async || system.breaker() == tidegate::systems::BreakerState::Open;
        eventually(LONG, "the breaker opens", open).await;
        proxy.up().await;
        if id % 3 == 0 {
            settled(&shop, "parts").await;
        }
    }
    settled(&shop, "parts").await;
    let (items, rows) = both(&api, &shop).await;
    assert_eq!(items, rows);
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    sink.stop().await;
}

#[tokio::test]
async fn a_row_that_is_back_before_its_delete_had_an_answer_is_made_anew() {
    let (api, proxy, system) = behind_proxy("breaker.open: 200ms\n").await;
    let shop = Shop::start("back").await;
    let sink = shop.sink("parts", &system, &deleting());
    for (at, fault) in faults().into_iter().enumerate() {
        let name = format!("b{at}");
        shop.sql(&format!("INSERT INTO customers (id, name) VALUES ({at}, '{name}')")).await;
        settled(&shop, "parts").await;
        let id = item(&api, &name)["id"].clone();
        let failed = matches!(fault, Fault::Answer { status: 500 | 502, .. });
        proxy.script(Script::on("DELETE", "/items/", fault).times(1));
        shop.sql(&format!("DELETE FROM customers WHERE id = {at}")).await;
        eventually(LONG, "the delete is under way", async || proxy.count("DELETE", &format!("/items/{id}")) > 0).await;
        if failed {
            // It was done nevertheless.
            api.inside.lock().unwrap().items.remove(&id.as_u64().unwrap());
        }
        shop.sql(&format!("INSERT INTO customers (id, name) VALUES ({at}, 'back {at}')")).await;
        settled(&shop, "parts").await;
        assert!(shop.parked().await.is_empty(), "{at}: {:?} {:?}", shop.parked().await, proxy.seen());
        let (items, rows) = both(&api, &shop).await;
        assert_eq!(items, rows, "{at}: {:?}", proxy.seen());
    }
    sink.stop().await;
}

#[tokio::test]
async fn rows_come_change_and_go_through_a_storm_and_both_sides_are_equal_after() {
    let (api, proxy, system) = behind_proxy("breaker.open: 200ms\nbreaker.failures: 3\n").await;
    let shop = Shop::start("comeandgo").await;
    let sink = shop.sink("parts", &system, &deleting());
    for method in ["POST", "PUT", "DELETE", "GET"] {
        // Each once. (That a row has no record yet is believed at the first word of a system that was just well.)
        let faults =
            faults().into_iter().filter(|fault| method != "GET" || !matches!(fault, Fault::Answer { status: 404, .. }));
        for (at, fault) in faults.enumerate() {
            proxy.script(Script::on(method, "/items", fault).after(3 + 4 * at).times(1));
        }
    }
    proxy.script(Script::any(Fault::ResetAfter).chance(0.05).times(20));
    proxy.script(Script::any(Fault::Delay(Duration::from_millis(300))).chance(0.1));
    let mut random = StdRng::seed_from_u64(23);
    let (start, mut version) = (Instant::now(), 0);
    let mut next_outage = Duration::from_secs(2);
    while start.elapsed() < Duration::from_secs(15) {
        let mut sql = String::from("BEGIN;");
        for _ in 0..random.random_range(1..4) {
            version += 1;
            let id = random.random_range(1..=25);
            sql += &match random.random_range(0..4) {
                0 => format!("DELETE FROM customers WHERE id = {id};"),
                1 => format!("UPDATE customers SET name = 'v{version}' WHERE id = {id};"),
                _ => format!("INSERT INTO customers (id, name) VALUES ({id}, 'v{version}') ON CONFLICT DO NOTHING;"),
            };
        }
        shop.sql(&(sql + "COMMIT")).await;
        tokio::time::sleep(Duration::from_millis(random.random_range(5..60))).await;
        if start.elapsed() > next_outage {
            proxy.down();
            tokio::time::sleep(Duration::from_millis(random.random_range(50..900))).await;
            proxy.up().await;
            next_outage = start.elapsed() + Duration::from_secs(2);
        }
    }
    settled(&shop, "parts").await;
    proxy.clear();
    eventually(LONG, "nothing is set aside", async || {
        let parked = shop.parked().await;
        if parked.is_empty() { Ok(()) } else { Err(format!("{parked:?}")) }
    })
    .await;
    let (items, rows) = both(&api, &shop).await;
    assert_eq!(items, rows);
    sink.stop().await;
}
