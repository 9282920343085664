//! The datastore cuts a sink or a pull off at each of its commands: right before it, and where a change was committed and
//! the word of that lost. Each time it goes on by itself: both sides are equal, nothing is sent or made twice, nothing is
//! left for a person.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use tidegate::datastore::{Datastore, DatastoreSettings, list_parked};
use tidegate::pipeline::ConnectorState;
use tidegate::sinks::http;

use crate::references::behind_proxy;
use crate::support::shop::{Shop, Sink};
use crate::support::{Api, Cuts, Database, Postgres, Proxy, Running, Said, Stage, Version, When, eventually};

const LONG: Duration = Duration::from_secs(60);
/// What is said now and then, such as that a lease goes on, is said within so many rounds.
const MOST_ROUNDS: usize = 15;

/// Commands of a round to be cut at: every one before it; after it, the ones that change something by themselves, and
/// each `COMMIT`, which is told by how many of the round were before it.
fn places(said: &[Said], when: When) -> Vec<(String, usize)> {
    let mut places = Vec::new();
    // What a session begins with is said when one is wanted.
    let opens =
        |text: &str| text.starts_with("SHOW transaction_read_only") || text.starts_with("SET statement_timeout");
    let changes = |text: &str| ["INSERT", "UPDATE", "DELETE"].iter().any(|verb| text.starts_with(verb));
    for one in said {
        let place = (one.text.clone(), 0);
        let wanted = match when {
            When::Before => one.text != "ROLLBACK" && !opens(&one.text),
            When::After => !one.within && changes(&one.text),
        };
        if wanted && !places.contains(&place) {
            places.push(place);
        }
    }
    let commits = said.iter().filter(|one| one.text == "COMMIT").count();
    if when == When::After {
        places.extend((0..commits).map(|skip| ("COMMIT".to_owned(), skip)));
    }
    places
}

fn open(url: &str) -> Datastore {
    Datastore::open(&DatastoreSettings::from_url(url).unwrap()).unwrap()
}

/// Nobody knows of a create here what became of it, but who was told.
const BLIND: &str = r#"
object: part
topics: shop.public.customers
initial: create
settle: 200ms
map: 'if .after.name == null then error("no name") else { name: .after.name } end'
create: { request: POST /items, map: '{ code: .key.id, name: .after.name }' }
update: "PUT /items/{{ $link.id }}"
delete: "POST /items/{{ $link.id }}/gone"
"#;

struct Deliveries {
    shop: Shop,
    /// Past the door.
    direct: Datastore,
    cuts: Cuts,
    api: Api,
    proxy: Proxy,
    sink: Sink,
    rounds: i64,
}

impl Deliveries {
    async fn start(name: &str) -> Deliveries {
        let (api, proxy, system) = behind_proxy("").await;
        let mut shop = Shop::start(name).await;
        let cuts = Cuts::start(&shop.database).await;
        let direct = std::mem::replace(&mut shop.datastore, open(&cuts.url(&shop.database)));
        let sink = shop.sink("parts", &system, BLIND);
        let mut all = Deliveries { shop, direct, cuts, api, proxy, sink, rounds: 0 };
        all.round().await;
        all.round().await;
        all
    }

    async fn settled(&self, what: &str) {
        let client = self.direct.client().await.unwrap();
        eventually(LONG, what, async || {
            let row = client
                .query_one(
                    "SELECT (SELECT count(*) FROM tidegate.links WHERE intent IS NOT NULL), \
                         (SELECT count(*) FROM capture.events)",
                    &[],
                )
                .await
                .unwrap();
            let lag = self.shop.log.group_lag(&http::group_of("parts")).await.unwrap();
            let behind = lag.iter().map(|lag| lag.behind() as i64).sum::<i64>();
            let (open, events): (i64, i64) = (row.get(0), row.get(1));
            match open + events + behind + i64::from(lag.is_empty()) {
                0 => Ok(()),
                _ => Err(format!("{open} {events} {behind} {:?}", self.sink.status.last_error())),
            }
        })
        .await;
    }

    /// A row is made, one changed, one gets another key, one goes; one can't be delivered, and is mended.
    async fn round(&mut self) {
        let n = self.rounds * 10;
        self.rounds += 1;
        let was = n - 10;
        self.shop
            .sql(&format!(
                "INSERT INTO customers (id, name) VALUES ({n}, 'new {n}');
                 UPDATE customers SET name = 'changed {n}' WHERE id = {was};
                 UPDATE customers SET id = {was} + 3 WHERE id = {was} + 2;
                 DELETE FROM customers WHERE id = {was} - 10;
                 INSERT INTO customers (id) VALUES ({n} + 2)"
            ))
            .await;
        let client = self.direct.client().await.unwrap();
        eventually(LONG, "one is set aside", async || {
            let parked = list_parked(&client, None, 10).await.unwrap();
            if parked.len() == 1 && parked[0].reason.contains("no name") { Ok(()) } else { Err(format!("{parked:?}")) }
        })
        .await;
        self.shop.sql(&format!("UPDATE customers SET name = 'mended' WHERE id = {n} + 2")).await;
        self.settled("all is delivered").await;
        eventually(LONG, "nothing is set aside", async || {
            let parked = list_parked(&client, None, 10).await.unwrap();
            if parked.is_empty() { Ok(()) } else { Err(format!("{parked:?}")) }
        })
        .await;
    }

    /// Both sides are equal, and nothing was sent twice.
    async fn check(&self, after: &str) {
        let rows =
            self.shop.database.connect().await.query("SELECT name FROM customers ORDER BY 1", &[]).await.unwrap();
        let rows: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        let items = self.api.items().into_iter().filter(|item| item["done"].is_null());
        let mut items: Vec<String> = items.map(|item| item["name"].as_str().unwrap().to_owned()).collect();
        items.sort();
        assert_eq!(items, rows, "after {after}: {:?}", self.proxy.seen());
        let count = |method, path| self.proxy.count(method, path) as i64;
        let rounds = self.rounds;
        assert_eq!(
            (count("POST", "/items"), count("PUT", "/items"), count("POST", "/gone")),
            (rounds * 2 + rounds - 2, rounds - 1, rounds - 2),
            "after {after}: {:?}",
            self.proxy.seen()
        );
        eventually(LONG, "it runs", async || match self.sink.status.state() {
            ConnectorState::Running => Ok(()),
            other => Err(format!("after {after}: {other:?} {:?}", self.sink.status.last_error())),
        })
        .await;
    }

    async fn cut_at_each(mut self, when: When) {
        // What two rounds have in common is said in the next ones, too.
        let mut said = Vec::new();
        for _ in 0..2 {
            self.cuts.said();
            self.round().await;
            said.push(self.cuts.said());
        }
        let mut places = places(&said[1], when);
        places.retain(|(text, skip)| said[0].iter().filter(|one| one.text == *text).count() > *skip);
        assert!(places.len() > 5, "{places:?}");
        for (text, skip) in places {
            let place = format!("a cut {when:?} {text}, number {skip}");
            self.cuts.cut(&text, when, skip);
            for round in 0.. {
                assert!(round < MOST_ROUNDS, "not said: {place}");
                self.round().await;
                if self.cuts.is_made(Duration::from_secs(1)).await {
                    break;
                }
            }
            self.settled(&place).await;
            self.check(&place).await;
        }
        self.sink.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_goes_on_when_it_is_cut_off_before_any_of_its_commands() {
    Deliveries::start("before").await.cut_at_each(When::Before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_goes_on_when_it_does_not_hear_that_a_change_was_committed() {
    Deliveries::start("committed").await.cut_at_each(When::After).await;
}

struct Pulling {
    database: Database<'static>,
    cuts: Cuts,
    api: Api,
    _stage: Stage,
    running: Running,
    rounds: i64,
}

fn part(id: i64, name: &str, price: &str) -> Value {
    json!({ "id": id, "sku": format!("S{id}"), "name": name, "price": price })
}

impl Pulling {
    async fn start(name: &str) -> Pulling {
        let database = Postgres::shared(Version::Distribution).await.database(name).await;
        database.execute(crate::pull::PARTS).await;
        let cuts = Cuts::start(&database).await;
        let api = Api::start(Vec::new()).await;
        let settings = format!("base_url: {}\nbreaker: {{ failures: 3, open: 200ms }}", api.url());
        let mut stage = Stage::new(&database, &[("api", &settings)]).await;
        stage.datastore = open(&cuts.url(&database));
        let running = stage.start(&crate::pull::pull("/all", ""));
        let mut all = Pulling { database, cuts, api, _stage: stage, running, rounds: 0 };
        all.round().await;
        all.round().await;
        all
    }

    /// Of a record of each round before it: its price is what the table takes.
    async fn round(&mut self) {
        self.rounds += 1;
        let n = self.rounds;
        let client = self.database.connect().await;
        let list = |last_price: &str| -> Vec<Value> {
            (1..=n)
                .flat_map(|id| {
                    let name = if id < n { "changed" } else { "new" };
                    let price = if id < n { "5.00" } else { last_price };
                    [part(id, name, "9.90"), part(1000 + id, "other", price)]
                })
                .collect()
        };
        self.api.set(list("-1"));
        let parked = "SELECT count(*) FROM tidegate.parked WHERE reason LIKE '%parts_price_check%'";
        eventually(LONG, "one is parked", async || {
            let count: i64 = client.query_one(parked, &[]).await.unwrap().get(0);
            if count == 1 { Ok(()) } else { Err(format!("{count} {:?}", self.running.status.last_error())) }
        })
        .await;
        self.api.set(list("5.00"));
        // Each row was written as often as its record changed: once made, once renamed.
        let all = "SELECT count(*), count(*) FILTER (WHERE name = 'changed' AND version = 1 AND price = 9.90), \
                       count(*) FILTER (WHERE name = 'new' AND version = 0), \
                       count(*) FILTER (WHERE name = 'other' AND version = 0 AND price = 5), \
                       (SELECT count(*) FROM tidegate.links), \
                       (SELECT count(*) FROM tidegate.parked) + (SELECT count(*) FROM tidegate.held) FROM parts";
        eventually(LONG, "all is there, and once", async || {
            let row = client.query_one(all, &[]).await.unwrap();
            let seen: Vec<i64> = (0..6).map(|at| row.get(at)).collect();
            let wanted = [2 * n, n - 1, 1, n, 2 * n, 0];
            if seen == wanted {
                Ok(())
            } else {
                Err(format!("{seen:?} {wanted:?} {:?}", self.running.status.last_error()))
            }
        })
        .await;
    }

    async fn cut_at_each(mut self, when: When) {
        let mut said = Vec::new();
        for _ in 0..2 {
            self.cuts.said();
            self.round().await;
            said.push(self.cuts.said());
        }
        let known: BTreeSet<&str> = said[0].iter().map(|one| one.text.as_str()).collect();
        let places: Vec<_> = places(&said[1], when)
            .into_iter()
            .filter(|(text, skip)| known.contains(text.as_str()) && *skip < 3)
            .collect();
        assert!(places.len() >= 2, "{places:?}");
        for (text, skip) in places {
            let place = format!("a cut {when:?} {text}, number {skip}");
            self.cuts.cut(&text, when, skip);
            for round in 0.. {
                assert!(round < MOST_ROUNDS, "not said: {place}");
                self.round().await;
                if self.cuts.is_made(Duration::from_secs(1)).await {
                    break;
                }
            }
            eventually(LONG, "it runs", async || match self.running.state() {
                ConnectorState::Running => Ok(()),
                other => Err(format!("after {place}: {other:?} {:?}", self.running.status.last_error())),
            })
            .await;
        }
        self.running.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_goes_on_when_it_is_cut_off_before_any_of_its_commands() {
    Pulling::start("pull_before").await.cut_at_each(When::Before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_goes_on_when_it_does_not_hear_that_a_page_was_committed() {
    Pulling::start("pull_committed").await.cut_at_each(When::After).await;
}
