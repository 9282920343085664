//! A pull from a real ERP.

use std::time::Duration;

use serde_json::{Value, json};

use super::{becomes, count, text};
use crate::support::{Postgres, Stage, Tryton, Version, eventually};

#[tokio::test]
async fn products_and_stock_come_from_a_real_erp() {
    let tryton = Tryton::start().await;
    let database = Postgres::shared(Version::Distribution).await.database("erp_pull").await;
    database
        .execute(
            "CREATE TABLE products (id serial PRIMARY KEY, sku text UNIQUE, name text, price numeric(10,2));
             CREATE TABLE inventory (product_id int PRIMARY KEY REFERENCES products, on_hand numeric);",
        )
        .await;
    let client = database.connect().await;
    let settings = format!(
        r#"
base_url: {}
auth: {{ type: bearer, token: "{}" }}
headers: {{ X-Tryton-Context: "{{{{ {{company: 1}} | tojson | @base64 }}}}" }}
budget: {{ requests: 100, per: 1s, concurrency: 4 }}
probe: "GET /party.party?s=1"
define: |
  def dt: [.year, .month - 1, .day, .hour, .minute, .second, 0, 0] | mktime | todate;
  def undt: fromdate | gmtime | {{__class__: "datetime", year: .[0], month: (.[1] + 1), day: .[2],
            hour: .[3], minute: .[4], second: (.[5] | floor), microsecond: 0}};
  def q: tojson | @base64;
"#,
        tryton.erp.url(),
        tryton.erp.key
    );
    let stage = Stage::new(&database, &[("erp", &settings)]).await;
    let products = r#"
name: erp-products
type: http-pull
system: erp
object: product
every: 300ms
request: GET /product.product
params:
  f: [code, name, default_uom, list_price_used, write_date, create_date]
  d: '{{ ($cursor | undt) as $t | [["OR", ["write_date", ">=", $t], ["create_date", ">=", $t]]] | q }}'
paginator: { type: offset, limit_param: s, offset_param: p, limit: 100, stop: short }
incremental: { cursor: "(.write_date // .create_date) | dt", tie_breaker: .id, initial: "1970-01-01T00:00:00Z", lookback: 10m }
into: public.products
match: { columns: [sku] }
map: '{ sku: .code, name, price: .list_price_used.decimal }'
keep: '{ uom: .default_uom }'
conflict: upstream
"#;
    let stock = r#"
name: erp-stock
type: http-pull
system: erp
object: product
every: 300ms
request: GET /product.product
headers: { X-Tryton-Context: '{{ {company: 1, locations: [3]} | q }}' }
params: { f: [quantity] }
paginator: { type: offset, limit_param: s, offset_param: p, limit: 50 }
into: public.inventory
map: '{ product_id: local("product"; .id), on_hand: .quantity }'
"#;
    let upstream = tryton.erp.search("product.product", json!([]), &["code"]).await.len() as i64;
    assert!(upstream > 50, "{upstream}");
    let running = stage.start(products);
    becomes(&client, "SELECT count(*)::text FROM products", &upstream.to_string()).await;
    assert_eq!(text(&client, "SELECT price::text FROM products WHERE sku = 'MUG-01'").await, "18.00");
    assert_eq!(count(&client, "tidegate.links WHERE kept ->> 'uom' IS NOT NULL").await, upstream);
    stage.run_once(stock).await;
    assert_eq!(count(&client, "inventory").await, upstream);
    assert!(count(&client, "inventory WHERE on_hand > 0").await > 10);
    // A change upstream is seen by the next run.
    let mug = &tryton.erp.search("product.product", json!([["code", "=", "MUG-01"]]), &["template"]).await[0];
    tryton.erp.put(&format!("product.template/{}", mug["template"]), json!({"name": "Mug, blue"})).await;
    tryton.erp.put(&format!("product.product/{}", mug["id"]), json!({"description": "touched"})).await;
    becomes(&client, "SELECT name FROM products WHERE sku = 'MUG-01'", "Mug, blue").await;

    // From now on every run reads what lies within the lookback once more, and leaves everything as it is.
    // The cursor never passes the time at which the system says that a run began: it reaches the newest record in a
    // run of the second after.
    let dates = tryton.erp.search("product.product", json!([]), &["write_date", "create_date"]).await;
    let moment = |product: &Value| {
        let date = if product["write_date"].is_null() { &product["create_date"] } else { &product["write_date"] };
        let part = |name: &str| date[name].as_i64().unwrap();
        let (year, month, day) = (part("year"), part("month"), part("day"));
        format!("{year}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", part("hour"), part("minute"), part("second"))
    };
    let newest = dates.iter().map(moment).max().unwrap();
    eventually(Duration::from_secs(20), "the cursor is at the newest record", async || {
        let cursor = running.status.facts().get("cursor").cloned();
        if cursor == Some(json!(newest)) { Ok(()) } else { Err(format!("{cursor:?}, not {newest}")) }
    })
    .await;
    running.ended_a_run().await;
    running.ended_a_run().await;
    let runs = || running.status.facts()["runs"].as_u64().unwrap();
    let asked = || tryton.log().lines().filter(|line| line.contains("/product.product?")).count() as u64;
    let written = async || {
        let sql = "SELECT 'link ' || local_key::text || ' ' || xmin::text FROM tidegate.links \
             UNION ALL SELECT 'cursor ' || xmin::text FROM tidegate.cursors \
             UNION ALL SELECT 'product ' || id || ' ' || xmin::text FROM products";
        let rows = client.query(sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get::<_, String>(0)).collect::<std::collections::BTreeSet<_>>()
    };
    let committed = async || {
        let row = client.query_one("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()", &[]);
        row.await.unwrap().get::<_, i64>(0)
    };
    let (first, asked_before, written_before, committed_before) = (runs(), asked(), written().await, committed().await);
    eventually(Duration::from_secs(60), "thirty runs", async || runs() >= first + 30).await;
    let (ran, requests) = (runs() - first, asked() - asked_before);
    let transactions = committed().await - committed_before;
    println!("{ran} idle runs: {requests} requests, {transactions} reading transactions");
    let after = written().await;
    let anew: Vec<_> = after.difference(&written_before).collect();
    assert!(anew.is_empty(), "written while idle: {anew:?}");
    assert!(requests <= ran + 2, "{requests} requests for {ran} runs");
    assert!(transactions <= 6 * ran as i64, "{transactions} transactions for {ran} runs");
    running.stop().await.unwrap();
}
