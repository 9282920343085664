//! Two workers on one datastore and one log: each pull runs in one of them, and in the other when that one is gone.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Api, Kafka, Postgres, Process, Version, WorkerLog, Workshop, eventually};

/// The lease's time, that of a transaction which stands still, the other's look, and some for a slow machine.
const TAKEN_OVER: Duration = Duration::from_secs(45);

fn parts(count: i64, name: &str) -> Vec<Value> {
    (1..=count).map(|id| json!({"id": id, "sku": format!("S{id}"), "name": name})).collect()
}

fn workshop(database: &str, broker: &str, api: &Api, worker: &str) -> Workshop {
    let systems = format!("systems: {{ api: {{ base_url: \"{}\" }} }}", api.url());
    let workshop = Workshop::new(database, WorkerLog::Kafka(broker), &systems);
    workshop.connector(
        "parts.yaml",
        &format!(
            "name: parts\ntype: http-pull\nsystem: api\nobject: part\nevery: 200ms\nrequest: GET /offset\n\
             params: {{ worker: {worker} }}\npaginator: {{ type: offset, limit: 5 }}\ninto: public.parts\n\
             map: '{{ sku, name }}'\n"
        ),
    );
    workshop
}

async fn stands_by(workshop: &Workshop) {
    eventually(Duration::from_secs(30), "it stands by", async || {
        let seen = workshop.connector_status("parts").await;
        if seen["facts"]["standby"] == true { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_runs_in_one_of_two_workers_and_is_taken_over_when_that_one_is_killed() {
    let broker = Kafka::shared().await;
    let database = Postgres::shared(Version::Distribution).await.database("two_workers").await;
    // No key but the table's own: a record that is applied twice would be two rows.
    database
        .execute("CREATE TABLE parts (id serial PRIMARY KEY, sku text, name text, written int NOT NULL DEFAULT 1)")
        .await;
    let sql = database.connect().await;
    let api = Api::start(parts(40, "first")).await;
    let [one, other] = ["one", "other"].map(|name| workshop(&database.url(), &broker.bootstrap(), &api, name));
    let count = async |what: &str| -> i64 {
        sql.query_one(&format!("SELECT count(*) FROM parts WHERE {what}"), &[]).await.unwrap().get(0)
    };
    let becomes = async |what: &str, wanted: i64| {
        eventually(TAKEN_OVER, what, async || match count(what).await {
            seen if seen == wanted => Ok(()),
            seen => Err(seen),
        })
        .await;
    };
    let asked_by = |worker: &str| {
        let asked = &api.inside.lock().unwrap().asked;
        asked.iter().filter(|line| line.contains(&format!("worker={worker}&"))).count()
    };

    let first: Process = one.start().await;
    becomes("name = 'first'", 40).await;
    let second = other.start().await;
    stands_by(&other).await;
    assert_eq!(asked_by("other"), 0);
    assert_eq!(other.get("/health/ready").await.0, 200, "a worker that stands by is well");

    // Killed in the middle of a listing.
    api.set(parts(400, "second"));
    eventually(Duration::from_secs(20), "some pages", async || count("name = 'second'").await > 20).await;
    first.kill9().await;
    let killed = Instant::now();
    assert!(count("name = 'second'").await < 400, "it was killed too late to tell");
    eventually(TAKEN_OVER, "the other one asks", async || asked_by("other") > 0).await;
    let after = killed.elapsed();
    assert!(after < Duration::from_secs(20), "taken over after {after:?}");
    println!("taken over after {after:?}");
    becomes("name = 'second'", 400).await;
    assert_eq!(count("true").await, 400);

    // One that only stood still, while the other took over, writes nothing any more.
    let first = one.start().await;
    stands_by(&one).await;
    second.signal("STOP");
    api.set(parts(500, "third"));
    becomes("name = 'third'", 500).await;
    let lines = asked_by("other");
    second.signal("CONT");
    stands_by(&other).await;
    api.set(parts(600, "fourth"));
    becomes("name = 'fourth'", 600).await;
    assert_eq!(count("true").await, 600);
    assert!(asked_by("other") <= lines + 2, "it went on asking");

    // One that is told to stop hands over at once.
    let stopped = Instant::now();
    first.signal("TERM");
    eventually(TAKEN_OVER, "the other one asks again", async || asked_by("other") > lines + 2).await;
    assert!(stopped.elapsed() < Duration::from_secs(12), "{:?}", stopped.elapsed());
}
