//! The first run against systems that have data already: paired before anything is made.

use serde_json::json;

use crate::delivery::{CUSTOMERS, behind_proxy, erp, parties, settled};
use crate::support::Tryton;
use crate::support::shop::Shop;

#[tokio::test]
async fn rows_and_parties_that_are_there_already_are_paired_and_none_is_doubled() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("populated").await;
    for id in 1..=10 {
        tryton.erp.post("party.party", json!({"name": format!("erp {id}"), "code": format!("C{id}")})).await;
    }
    shop.silently("INSERT INTO customers SELECT i, 'shop ' || i, 's', 'c', 1 FROM generate_series(6, 15) i").await;
    shop.snapshot("customers").await;
    // By default what is not there is left alone.
    let matching = CUSTOMERS.replace("initial: create", "initial: match");
    let sink = shop.sink("matching", &erp, &matching);
    settled(&shop, "matching").await;
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    assert_eq!(parties(&tryton).await.len(), 10);
    let asked: Vec<_> = proxy.seen().into_iter().map(|seen| format!("{} {}", seen.method, seen.path)).collect();
    assert_eq!(shop.links("party").await.len(), 5, "{asked:?}");
    assert_eq!(proxy.count("POST", ""), 0);
    assert_eq!(proxy.count("PUT", ""), 0, "which side is right is not for the sink to say");
    sink.stop().await;
    // Told to, it makes those that are missing.
    let sink = shop.sink("creating", &erp, CUSTOMERS);
    settled(&shop, "creating").await;
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    let found = parties(&tryton).await;
    assert_eq!(found.len(), 15, "{found:?}");
    assert_eq!(shop.links("party").await.len(), 10);
    assert_eq!(proxy.count("POST", ""), 5);
    sink.stop().await;
}
