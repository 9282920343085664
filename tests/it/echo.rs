//! Both directions at once: whatever is changed on either side, they agree in the end and fall silent.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::delivery::{behind_proxy, erp, settled};
use crate::support::shop::Shop;
use crate::support::{Tryton, eventually};

/// The price loses its cents on the way up.
const DOWN: &str = r#"
name: customers
type: http-sink
system: erp
object: party
topics: shop.public.customers
settle: 500ms
map: '{ name: "\(.after.name) \(.after.price | floor)" } + if $link then {} else { code: "C\(.after.id)" } end'
match: { request: GET /party.party, params: { d: '{{ [["code", "=", "C\(.key.id)"]] | q }}' }, id: ".[].id" }
create: POST /party.party
update: "PUT /party.party/{{ $link.id }}"
"#;

const UP: &str = r#"
name: parties
type: http-pull
system: erp
object: party
every: 300ms
request: GET /party.party
params: { f: [code, name], d: '{{ [["code", "like", "C%"]] | q }}' }
into: public.customers
insert: false
conflict: upstream
held.retry: 500ms
map: '.name | split(" ") | { name: .[0], price: (.[1] | tonumber) }'
"#;

const EDITING: Duration = Duration::from_secs(12);
const SILENCE: Duration = Duration::from_secs(3);

#[tokio::test]
async fn changes_on_both_sides_a_trigger_and_a_rounding_mapping_end_in_silence_and_agreement() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    let shop = Shop::start("echo").await;
    // What is pulled in small letters becomes large ones, which the ERP must get too.
    shop.sql(
        "CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.name := upper(NEW.name); RETURN NEW; END $$;
         CREATE TRIGGER shout BEFORE INSERT OR UPDATE ON customers FOR EACH ROW EXECUTE FUNCTION shout();
         INSERT INTO customers SELECT i, 'n' || i, 's', 'c', 9.90 FROM generate_series(1, 6) i",
    )
    .await;
    let down = shop.connector(&erp, DOWN);
    settled(&shop, "customers").await;
    let up = shop.connector(&erp, UP);
    let links = shop.links("party").await;
    assert_eq!(links.len(), 6);
    let ids: Vec<String> = links.iter().map(|(_, id)| id.clone().expect("linked")).collect();

    let start = Instant::now();
    let mut turn = 0usize;
    while start.elapsed() < EDITING {
        turn += 1;
        let (row, party) = (turn % 6 + 1, &ids[turn * 5 % 6]);
        let cents = turn * 37 % 10_000;
        shop.sql(&format!("UPDATE customers SET name = 'shop{turn}', price = {cents} / 100.0 WHERE id = {row}")).await;
        tryton.erp.put(&format!("party.party/{party}"), json!({ "name": format!("erp{turn} {}", turn % 50) })).await;
        tokio::time::sleep(Duration::from_millis(turn as u64 * 83 % 400)).await;
    }

    // Silence: neither requests that change anything, nor writes to the table.
    let moves = async || {
        let events = shop.log.group_lag("tidegate-customers").await.unwrap().iter().map(|lag| lag.end.0).sum::<i64>();
        (proxy.count("PUT", "") + proxy.count("POST", ""), events, shop.unsettled("customers").await)
    };
    let mut last = (moves().await, Instant::now());
    eventually(Duration::from_secs(60), "silence", async || {
        let now = moves().await;
        if now != last.0 || now.2 != 0 {
            last = (now, Instant::now());
        }
        if last.1.elapsed() > SILENCE { Ok(()) } else { Err(format!("{now:?}; parked {:?}", shop.parked().await)) }
    })
    .await;
    let pulls = proxy.count("GET", "party.party?");
    eventually(Duration::from_secs(20), "the pull runs on", async || proxy.count("GET", "party.party?") > pulls).await;

    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    let rows = shop.database.connect().await;
    let rows =
        rows.query("SELECT 'C' || id, name || ' ' || floor(price) FROM customers ORDER BY id", &[]).await.unwrap();
    let rows: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(crate::delivery::parties(&tryton).await, rows);
    up.stop().await;
    down.stop().await;
}

/// The parties of two customers, with one connector that is told what the ERP answers and one that is not.
#[tokio::test]
async fn what_is_put_back_in_the_erp_before_the_next_pull_comes_back() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let erp = erp(&tryton, &proxy);
    for (name, record) in [("back", ""), ("answered", ", params: { f: [code, name] }, record: .")] {
        let shop = Shop::start(name).await;
        shop.sql("INSERT INTO customers SELECT i, 'n' || i, 's', 'c', 9.90 FROM generate_series(1, 2) i").await;
        let down = DOWN.replace(
            "update: \"PUT /party.party/{{ $link.id }}\"",
            &format!("update: {{ request: \"PUT /party.party/{{{{ $link.id }}}}\"{record} }}"),
        );
        let down = down.replace("C\\(", &format!("C{name}\\("));
        assert!(down.contains(&format!("$link.id }}}}\"{record}")), "{down}");
        let up = UP.replace("C%", &format!("C{name}%"));
        let sink = shop.connector(&erp, &down);
        settled(&shop, "customers").await;
        let pull = shop.connector(&erp, &up);
        let runs = || pull.status.facts().get("runs").and_then(serde_json::Value::as_u64).unwrap_or(0);
        eventually(Duration::from_secs(20), "two runs", async || runs() > 1).await;
        pull.stop().await;
        let id = shop.links("party").await[0].1.clone().expect("linked");
        let rows = shop.database.connect().await;
        let row = async || {
            let row = rows.query_one("SELECT name || ' ' || price FROM customers WHERE id = 1", &[]).await.unwrap();
            row.get::<_, String>(0)
        };
        let seen = row().await;

        // Delivered, and put back to what the pull has seen.
        shop.sql("UPDATE customers SET name = 'delivered', price = 30.40 WHERE id = 1").await;
        settled(&shop, "customers").await;
        let party = format!("party.party/{id}");
        assert_eq!(tryton.erp.get(&format!("{party}?f=name")).await["name"], "delivered 30");
        tryton.erp.put(&party, json!({ "name": "n1 9" })).await;
        let pull = shop.connector(&erp, &up);
        eventually(Duration::from_secs(20), &format!("{name}: the row is as the party again"), async || {
            let now = row().await;
            if now == "n1 9.00" { Ok(()) } else { Err(now) }
        })
        .await;
        assert_eq!(seen, "n1 9.00", "the pull takes what the ERP has made of a new row");

        // What the ERP does not hold, the cents, stays in the row where the ERP answers with what it has taken.
        shop.sql("UPDATE customers SET name = 'again', price = 40.40 WHERE id = 1").await;
        settled(&shop, "customers").await;
        let before = pull.status.facts()["runs"].clone();
        eventually(Duration::from_secs(20), "a run", async || pull.status.facts()["runs"] != before).await;
        let before = pull.status.facts()["runs"].clone();
        eventually(Duration::from_secs(20), "one more", async || pull.status.facts()["runs"] != before).await;
        assert_eq!(row().await, if record.is_empty() { "again 40.00" } else { "again 40.40" });
        pull.stop().await;
        sink.stop().await;
    }
}
