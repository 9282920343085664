//! Both directions at once: whatever is changed on either side, they agree in the end and fall silent.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::delivery::{behind_proxy, erp, erp_file, settled};
use crate::support::shop::Shop;
use crate::support::{Postgres, Tryton, Version, WorkerLog, Workshop, eventually};

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

const EDITING: Duration = Duration::from_secs(60);
const SILENCE: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_on_both_sides_a_trigger_and_a_rounding_mapping_end_in_silence_and_agreement() {
    let tryton = Tryton::start().await;
    let proxy = behind_proxy(&tryton).await;
    let database = Postgres::shared(Version::Distribution).await.database("echo").await;
    // What is pulled in small letters becomes large ones, which the ERP must get too.
    database
        .execute(
            "CREATE TABLE customers (id bigint PRIMARY KEY, name text, price numeric(10,2));
             CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.name := upper(NEW.name); RETURN NEW; END $$;
             CREATE TRIGGER shout BEFORE INSERT OR UPDATE ON customers FOR EACH ROW EXECUTE FUNCTION shout();
             INSERT INTO customers SELECT i, 'n' || i, 9.90 FROM generate_series(1, 60) i",
        )
        .await;
    let sql = database.connect().await;
    let system: String = erp_file(&tryton, &proxy).lines().map(|line| format!("    {line}\n")).collect();
    let workshop = Workshop::new(&database.url(), WorkerLog::Embedded, &format!("systems:\n  erp:\n{system}"));
    workshop.capture(&database.name, r"public\.customers");
    let down = DOWN.replace("shop.public", &format!("{}.public", database.name));
    workshop.connector("customers.yaml", &format!("{down}initial: create\n"));
    let worker = workshop.start().await;
    let linked =
        "SELECT external_id FROM tidegate.links WHERE external_id IS NOT NULL AND intent IS NULL ORDER BY external_id";
    let ids = eventually(Duration::from_secs(60), "the parties", async || {
        let rows = sql.query(linked, &[]).await.unwrap_or_default();
        let ids: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        if ids.len() == 60 { Ok(ids) } else { Err(workshop.connector_status("customers").await.to_string()) }
    })
    .await;
    workshop.connector("parties.yaml", UP);

    let start = Instant::now();
    let mut turn = 0usize;
    while start.elapsed() < EDITING {
        turn += 1;
        let (row, party) = (turn % 60 + 1, &ids[turn * 7 % 60]);
        let cents = turn * 37 % 10_000;
        let update = format!("UPDATE customers SET name = 'shop{turn}', price = {cents} / 100.0 WHERE id = {row}");
        sql.batch_execute(&update).await.unwrap();
        tryton.erp.put(&format!("party.party/{party}"), json!({ "name": format!("erp{turn} {}", turn % 50) })).await;
        tokio::time::sleep(Duration::from_millis(turn as u64 * 83 % 400)).await;
    }

    // Silence: neither requests that change anything, nor writes to the table, nor anything on its way.
    let moves = async || {
        let row = sql
            .query_one(
                "SELECT (SELECT sum(c.xmin::text::bigint)::text FROM customers c), \
                     (SELECT count(*) FROM tidegate.links WHERE intent IS NOT NULL), \
                     (SELECT count(*) FROM tidegate.held), (SELECT json_agg(p.reason)::text FROM tidegate.parked p)",
                &[],
            )
            .await
            .unwrap();
        let written: Option<String> = row.get(0);
        let open: (i64, i64, Option<String>) = (row.get(1), row.get(2), row.get(3));
        let lag = workshop.connector_status("customers").await["lag_events"].as_i64();
        (proxy.count("PUT", "") + proxy.count("POST", ""), written, open, lag)
    };
    let mut last = (moves().await, Instant::now());
    eventually(Duration::from_secs(90), "silence", async || {
        let now = moves().await;
        if now != last.0 || now.2 != (0, 0, None) || now.3 != Some(0) {
            last = (now.clone(), Instant::now());
        }
        if last.1.elapsed() > SILENCE { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
    let pulls = proxy.count("GET", "party.party?");
    eventually(Duration::from_secs(20), "the pull runs on", async || proxy.count("GET", "party.party?") > pulls).await;
    assert_eq!(moves().await, last.0, "and changes nothing");

    let rows =
        sql.query("SELECT 'C' || id, name || ' ' || floor(price) FROM customers ORDER BY id", &[]).await.unwrap();
    let mut rows: Vec<(String, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    rows.sort();
    let parties = crate::delivery::parties(&tryton).await;
    if let Some((party, row)) = parties.iter().zip(&rows).find(|(party, row)| party != row) {
        let query = format!(
            "SELECT to_jsonb(l)::text, external_id FROM tidegate.links l WHERE local_key ->> 'id' = '{}'",
            row.0.trim_start_matches('C')
        );
        let link = sql.query_one(&query, &[]).await.unwrap();
        let id: String = link.get(1);
        let asked: Vec<_> = proxy
            .seen()
            .into_iter()
            .filter(|seen| seen.method == "GET" || seen.path.ends_with(&format!("/{id}")))
            .collect();
        let events = workshop.consume(&format!("{}.public.customers", database.name)).await;
        let events: Vec<_> = events
            .iter()
            .filter(|event| event.to_string().contains(&format!("\"id\":{}", row.0.trim_start_matches('C'))))
            .collect();
        let told = workshop.told().await;
        panic!("{party:?} is not {row:?}\n{}\n{asked:#?}\n{events:#?}\n{told}", link.get::<_, String>(0));
    }
    assert_eq!(parties, rows);
    assert_eq!(worker.exited(), None, "{}", worker.log_end(20));
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

/// The pull sees late what the sink has sent, when the row has changed again: it is no change of the system's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_changes_again_before_the_pull_has_seen_what_was_sent_keeps_its_change() {
    for conflict in ["hold", "upstream", "datastore", "merge"] {
        let (api, _proxy, system) = crate::references::behind_proxy("").await;
        let shop = Shop::start("late").await;
        let down = r#"
name: down
type: http-sink
system: api
object: part
topics: shop.public.customers
settle: 200ms
map: '{ name: .after.name }'
create: POST /items
update: "PUT /items/{{ $link.id }}"
"#;
        let owner = if conflict == "merge" { "owner: { name: upstream }" } else { "" };
        let up = format!(
            "name: up\ntype: http-pull\nsystem: api\nobject: part\nevery: 100ms\nrequest: GET /items\n\
             into: public.customers\ninsert: false\nconflict: {conflict}\nheld.retry: 100ms\nmap: '{{ name }}'\n{owner}\n"
        );
        let two_runs = async |pull: &crate::support::shop::Sink| {
            let runs = || pull.status.facts().get("runs").and_then(serde_json::Value::as_u64).unwrap_or(0);
            let before = runs();
            eventually(Duration::from_secs(60), "two runs", async || runs() > before + 1).await;
        };
        let sink = shop.connector(&system, down);
        shop.sql("INSERT INTO customers (id, name) VALUES (1, 'first')").await;
        settled(&shop, "down").await;
        let pull = shop.connector(&system, &up);
        two_runs(&pull).await;
        pull.stop().await;

        shop.sql("UPDATE customers SET name = 'second'").await;
        settled(&shop, "down").await;
        sink.stop().await;
        assert_eq!(api.items()[0]["name"], "second");
        shop.sql("UPDATE customers SET name = 'third'").await;
        let pull = shop.connector(&system, &up);
        two_runs(&pull).await;
        let sql = shop.database.connect().await;
        let row = async || sql.query_one("SELECT name FROM customers", &[]).await.unwrap().get::<_, String>(0);
        assert_eq!(row().await, "third", "{conflict}");
        assert!(sql.query("SELECT reason FROM tidegate.held", &[]).await.unwrap().is_empty(), "{conflict}");
        let sink = shop.connector(&system, down);
        eventually(Duration::from_secs(60), "delivered", async || {
            let seen = api.items()[0]["name"].clone();
            if seen == "third" { Ok(()) } else { Err(format!("{conflict}: {seen}")) }
        })
        .await;
        two_runs(&pull).await;
        assert_eq!(row().await, "third", "{conflict}");
        pull.stop().await;
        sink.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fast_edits_in_turn_are_no_fight_and_rules_that_undo_each_other_are_one() {
    let (api, proxy, system) = crate::references::behind_proxy("").await;
    let shop = Shop::start("turns").await;
    let down = r#"
name: down
type: http-sink
system: api
object: part
topics: shop.public.customers
settle: 200ms
map: '{ name: .after.name }'
match: { request: GET /items, params: { code: "{{ .key.id }}" }, id: ".[].id" }
create: { request: POST /items, map: '{ code: .key.id, name: .after.name }' }
update: "PUT /items/{{ $link.id }}"
"#;
    let up = r#"
name: up
type: http-pull
system: api
object: part
every: 100ms
request: GET /items
into: public.customers
insert: false
conflict: upstream
held.retry: 100ms
map: '{ name }'
"#;
    let sink = shop.connector(&system, down);
    shop.sql("INSERT INTO customers (id, name) VALUES (1, 'first')").await;
    settled(&shop, "down").await;
    let pull = shop.connector(&system, up);
    let runs = || pull.status.facts().get("runs").and_then(serde_json::Value::as_u64).unwrap_or(0);
    eventually(Duration::from_secs(20), "two runs", async || runs() > 1).await;
    let sql = shop.database.connect().await;
    let row = async || sql.query_one("SELECT name FROM customers", &[]).await.unwrap().get::<_, String>(0);
    let put = |name: &str| api.inside.lock().unwrap().items.get_mut(&1).unwrap()["name"] = json!(name);
    let long = Duration::from_secs(90);
    // More changes of direction than a fight is allowed, each to a value that is new.
    for turn in 0..25 {
        let (ours, theirs) = (format!("shop {turn}"), format!("api {turn}"));
        shop.sql(&format!("UPDATE customers SET name = '{ours}'")).await;
        eventually(
            long,
            &ours,
            async || if api.items()[0]["name"] == ours { Ok(()) } else { Err(api.items()[0].to_string()) },
        )
        .await;
        put(&theirs);
        eventually(long, &theirs, async || if row().await == theirs { Ok(()) } else { Err(row().await) }).await;
    }
    assert!(shop.parked().await.is_empty(), "{:?}", shop.parked().await);
    // The table makes it one thing, the system another.
    shop.sql(
        "CREATE FUNCTION ours() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.name := 'ours'; RETURN NEW; END $$;
         CREATE TRIGGER ours BEFORE UPDATE ON customers FOR EACH ROW EXECUTE FUNCTION ours();
         UPDATE customers SET name = 'ours'",
    )
    .await;
    let before = proxy.count("PUT", "");
    // The system undoes what a run has listed since it was sent: what is undone before that counts as a value that it
    // does not take, which is sent once more and then left.
    eventually(long, "both are told apart", async || {
        let listed = sql.query_one("SELECT base_remote ->> 'name' FROM tidegate.links", &[]).await.unwrap();
        if listed.get::<_, Option<String>>(0).as_deref() == Some("ours") && api.items()[0]["name"] == "ours" {
            put("theirs");
        }
        let held = sql.query_opt("SELECT reason FROM tidegate.held", &[]).await.unwrap();
        let held: Option<String> = held.map(|row| row.get(0));
        let parked = shop.parked().await.pop().map(|parked| parked.reason);
        let told = |reason: &Option<String>, text: &str| reason.as_ref().is_some_and(|reason| reason.contains(text));
        match told(&held, "undo each other") || told(&parked, "again and again") {
            true => Ok(()),
            false => Err(format!("{} requests, {held:?} {parked:?}", proxy.count("PUT", "") - before)),
        }
    })
    .await;
    assert!(proxy.count("PUT", "") - before <= 25, "{}", proxy.count("PUT", "") - before);
    pull.stop().await;
    sink.stop().await;
}
