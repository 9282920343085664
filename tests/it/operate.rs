//! Operating a worker by its command line: plan, preview, status, pause and reset, dead letters.

use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::postgres::Options;
use crate::support::{Office, Postgres, Version, WorkerLog, Workshop, eventually, tidegate};

const SOON: Duration = Duration::from_secs(60);

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

async fn rows(office: &Office, sql: &str) -> i64 {
    office.database.connect().await.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_plan_misses_is_one_script_after_which_it_is_clean_and_the_worker_runs() {
    let settings = vec![("wal_level".to_owned(), "replica".to_owned())];
    let options = Options { settings, ..Options::default() };
    let server = Postgres::own_with(Version::Distribution, options).await;
    let admin = server.connect_as("postgres", "postgres").await;
    for sql in ["CREATE DATABASE shop", "CREATE ROLE \"app-user\" LOGIN PASSWORD 'tidegate'"] {
        admin.batch_execute(sql).await.unwrap();
    }
    let owner = server.connect_as("postgres", "shop").await;
    owner
        .batch_execute(
            "CREATE SCHEMA \"Sales\"; CREATE TABLE \"Sales\".customers (id int PRIMARY KEY, name text);
             CREATE TABLE \"Sales\".notes (at timestamptz, note text);
             CREATE TABLE public.parts (id serial PRIMARY KEY, sku text UNIQUE, name text);
             INSERT INTO \"Sales\".customers VALUES (1, 'Ada'); INSERT INTO \"Sales\".notes VALUES (now(), 'x');",
        )
        .await
        .unwrap();
    let url = format!("postgres://app-user:tidegate@127.0.0.1:{}/shop", server.port());
    let workshop = Workshop::new(&url, WorkerLog::Embedded, "systems: { crm: { base_url: \"http://127.0.0.1:1\" } }");
    workshop.connector(
        "shop.yaml",
        "name: shop\ntype: postgres-source\ntopic.prefix: shop\ntable.include.list: 'Sales\\..*'\n",
    );
    workshop.connector(
        "sink.yaml",
        "name: sink\ntype: http-sink\nsystem: crm\nobject: customer\ntopics: shop.Sales.customers\n\
         match: { request: GET /customers, id: '.[].id' }\ncreate: POST /customers\n",
    );
    workshop.connector(
        "pull.yaml",
        "name: pull\ntype: http-pull\nsystem: crm\nobject: part\nrequest: GET /parts\ninto: public.parts\n\
         match: { columns: [sku] }\nmap: '{ sku, name }'\n",
    );

    let output = workshop.cli(["plan"]).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(5), "{said}{output:?}");
    for part in [
        "! wal_level is 'replica', it must be 'logical' (needs a restart)",
        "! role 'app-user' may not replicate",
        "Sales.notes has no replica identity",
        "create slot tidegate_shop",
        "create publication tidegate_shop",
        "create topic shop.Sales.customers",
        "create subject shop.Sales.customers-value",
        "create group tidegate-sink",
        "! role 'app-user' may not SELECT, INSERT, UPDATE public.parts, nor use sequence public.parts_id_seq",
        "! schema tidegate is not there and role app-user may not create it",
        "For the DBA",
    ] {
        assert!(said.contains(part), "no '{part}' in:\n{said}");
    }
    let as_json = json(&String::from_utf8_lossy(&workshop.cli(["plan", "--output", "json"]).await.stdout));
    let connectors = as_json["connectors"].as_array().unwrap();
    assert_eq!(connectors.len(), 3);
    let shop = connectors.iter().find(|connector| connector["name"] == "shop").unwrap();
    assert!(shop["plan"]["steps"].as_array().unwrap().iter().any(|step| {
        step == &json!({"action": "create", "what": "slot", "name": "tidegate_shop", "detail": "pgoutput, then a snapshot"})
    }));
    assert!(!as_json["dba_sql"].as_array().unwrap().is_empty());
    assert!(said.contains("await topic shop.Sales.customers") && !said.contains("no capture here makes it"), "{said}");
    let sink = std::fs::read_to_string(workshop.path().join("connectors/sink.yaml")).unwrap();
    workshop.connector("sink.yaml", &sink.replace("shop.Sales.customers", "shop.Sales.custmers"));
    let said = String::from_utf8_lossy(&workshop.cli(["plan"]).await.stdout).into_owned();
    assert!(said.contains("! topic shop.Sales.custmers is not there, and no capture here makes it"), "{said}");
    workshop.connector("sink.yaml", &sink);

    // Nothing was made by looking.
    let made = "SELECT count(*) FROM pg_publication, pg_replication_slots";
    assert_eq!(owner.query_one(made, &[]).await.unwrap().get::<_, i64>(0), 0);

    // As the DBA runs it: through psql, stopping at the first error.
    let script = workshop.cli(["plan", "--sql"]).await.stdout;
    let script = String::from_utf8_lossy(&script).into_owned();
    psql(&server, "shop", &script);
    drop((admin, owner));
    server.stop().await;
    server.start().await;
    let output = workshop.cli(["plan"]).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "after\n{script}\nthe plan is\n{said}");
    assert!(!said.contains("For the DBA"), "{said}");

    let _worker = workshop.start().await;
    eventually(SOON, "it streams", async || workshop.connector_status("shop").await["facts"]["stage"] == "streaming")
        .await;
    let owner = server.connect_as("postgres", "shop").await;
    owner
        .batch_execute("UPDATE \"Sales\".notes SET note = 'y'; INSERT INTO \"Sales\".customers VALUES (2, 'Bo')")
        .await
        .unwrap();
    eventually(SOON, "it captures", async || workshop.consume("shop.Sales.customers").await.len() == 2).await;
    eventually(SOON, "updates too", async || workshop.consume("shop.Sales.notes").await.len() == 2).await;
    let output = workshop.cli(["plan"]).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    let shop = said.split("\n\n").find(|part| part.starts_with("shop\n")).unwrap();
    assert!(!shop.contains("create") && shop.contains("keep slot"), "all is there now:\n{said}");
    server.stop().await;
}

fn psql(server: &Postgres, database: &str, script: &str) {
    use std::io::Write;
    let folder = server.data().parent().unwrap().to_owned();
    let mut psql = std::process::Command::new(server.bin().join("psql"))
        .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", database, "-p", &server.port().to_string()])
        .arg("-h")
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("psql runs");
    psql.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let output = psql.wait_with_output().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_preview_shows_the_exact_requests_and_rows_and_neither_sends_nor_writes() {
    let office = Office::open("previewed", WorkerLog::Embedded, "").await;
    office.database.execute("CREATE TABLE contacts (id int PRIMARY KEY, name text)").await;
    let worker = office.workshop.start().await;
    office.until_captured(2).await;
    worker.signal("TERM");
    assert_eq!(worker.wait(SOON).await, 0);

    // The sink has never run, and nothing of Tidegate is in the database yet.
    office.deliver("");
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'tidegate'";
    let before = rows(&office, schemas).await;
    let shown = json(&office.workshop.ask(["preview", &office.sink, "--output", "json"]).await);
    assert_eq!(shown.as_array().unwrap().len(), 2, "{shown}");
    assert_eq!((&shown[0]["key"], &shown[0]["does"]), (&json!({"id": 1}), &json!("create")), "{shown}");
    let requests = shown[0]["requests"].to_string();
    for part in ["GET", "/customers?ref=1", "POST", "\"name\":\"Ada\"", "\"ref\":1"] {
        assert!(requests.contains(part), "no {part} in {requests}");
    }
    let human = office.workshop.ask(["preview", &office.sink, "--limit", "1"]).await;
    assert!(human.contains("create {\"id\":1}") && human.contains("  POST /customers\n    body {"), "{human}");
    assert!(!human.contains("Grace"), "the limit holds: {human}");
    assert_eq!((office.crm.writes(), rows(&office, schemas).await), (0, before));

    // A pull: the rows it would write.
    office.crm.add(json!({"id": 7, "name": "Dora", "ref": 0}));
    office.workshop.connector(
        "pull.yaml",
        "name: contacts\ntype: http-pull\nsystem: crm\nobject: contact\nrequest: GET /customers\n\
         into: public.contacts\nmap: '{ id, name }'\nevery: 200ms\n",
    );
    let shown = json(&office.workshop.ask(["preview", "contacts", "--output", "json"]).await);
    assert_eq!(shown.as_array().unwrap().len(), 1, "{shown}");
    assert!(shown.to_string().contains("\"name\":\"Dora\""), "{shown}");
    let human = office.workshop.ask(["preview", "contacts"]).await;
    assert!(human.contains("Dora"), "{human}");
    assert_eq!(rows(&office, "SELECT count(*) FROM contacts").await, 0);
    assert_eq!(rows(&office, schemas).await, before);

    // Beside the running worker: what is left to do, which is nothing.
    let _worker = office.workshop.start().await;
    office.until_delivered(&["Ada", "Dora", "Grace"]).await;
    eventually(SOON, "nothing is left", async || {
        office.workshop.ask(["preview", &office.sink]).await == "nothing to do now\n"
    })
    .await;
    // Of a page only what would change something is shown, and counts against the limit.
    eventually(SOON, "the pull has nothing to do", async || {
        office.workshop.ask(["preview", "contacts"]).await == "nothing to do now\n"
    })
    .await;
    office.workshop.ask(["connectors", "pause", "contacts"]).await;
    office.workshop.until_state("contacts", "PAUSED").await;
    office.crm.add(json!({"id": 8, "name": "Eve", "ref": 0}));
    let human = office.workshop.ask(["preview", "contacts", "--limit", "1"]).await;
    assert!(human.contains("Eve") && human.starts_with("insert"), "{human}");
    let human = office.workshop.ask(["preview", &office.capture, "--limit", "1"]).await;
    assert!(human.starts_with("event {\"id\":1}\n") && human.lines().count() == 3, "{human}");
    let output = office.workshop.cli(["preview", "no-such"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(&office.sink), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_are_listed_shown_replayed_and_dropped() {
    let office = Office::open("letters", WorkerLog::Embedded, "").await;
    office.crm.refuse(Some("Bad"));
    office.deliver("");
    let _worker = office.workshop.start().await;
    assert_eq!(office.workshop.ask(["dead-letters", "list"]).await, "no dead letters\n");
    office.until_delivered(&["Ada", "Grace"]).await;
    let insert = "INSERT INTO customers VALUES (3, 'Bad'), (4, 'Bad'), (5, 'Cid'), (6, 'Bad')";
    office.database.execute(insert).await;
    office.until_delivered(&["Ada", "Cid", "Grace"]).await;
    let list = async || json(&office.workshop.ask(["dead-letters", "list", "--output", "json"]).await);
    let letters = eventually(SOON, "three letters", async || {
        let letters = list().await;
        (letters.as_array().unwrap().len() == 3).then_some(letters)
    })
    .await;
    // Keys go out in parallel: either may have come first.
    let of = |key: i32| {
        letters.as_array().unwrap().iter().find(|letter| letter["key"] == json!({ "id": key })).expect("parked")
    };
    let id = |key: i32| of(key)["id"].as_str().unwrap().to_owned();
    assert_eq!(of(3)["kind"], "rejected");
    // The worker's HTTP says the same.
    assert_eq!(office.workshop.get("/dead-letters").await, (200, letters.clone()));
    let table = office.workshop.ask(["dead-letters", "list", &office.sink]).await;
    assert!(table.contains(&id(3)) && table.contains("answered 422") && table.contains("{\"id\":3}"), "{table}");

    let shown = json(&office.workshop.ask(["dead-letters", "show", &office.sink, &id(3)]).await);
    assert_eq!(shown["record"]["after"]["name"], "Bad", "{shown}");
    assert!(shown["request"].to_string().contains("POST"), "{shown}");
    assert_eq!(shown["response"]["status"], 422, "{shown}");
    assert!(shown["response"].to_string().contains("we know nobody of this name"), "{shown}");

    // Mended in the row, it goes by itself, as the row is now.
    let writes = office.crm.writes();
    office.database.execute("UPDATE customers SET name = 'Dora' WHERE id = 3").await;
    office.until_delivered(&["Ada", "Cid", "Dora", "Grace"]).await;
    eventually(SOON, "its queue is empty", async || list().await.as_array().unwrap().len() == 2).await;
    assert_eq!(office.crm.writes(), writes + 1);

    // A change that mends nothing stands behind, and is not counted as a letter of its own.
    office.database.execute("UPDATE customers SET note = 'x' WHERE id = 4").await;
    let tries = async |key: i32| {
        let left = list().await;
        let letters: Vec<_> =
            left.as_array().unwrap().iter().filter(|one| one["key"] == json!({ "id": key })).collect();
        (letters.len(), letters[0]["attempts"].as_i64().unwrap())
    };
    eventually(SOON, "it stands behind, and was tried", async || tries(4).await == (2, 2)).await;

    // Not mended: the replay is refused again, and it stays, with one try more.
    office.workshop.ask(["dead-letters", "replay", &office.sink, "--all"]).await;
    eventually(SOON, "refused again", async || tries(4).await == (2, 3) && tries(6).await == (1, 2)).await;
    // Mended in the system: the replay of one sends that one.
    office.crm.refuse(None);
    let said = office.workshop.ask(["dead-letters", "replay", &office.sink, &id(6)]).await;
    assert!(said.contains("replay of 1"), "{said}");
    office.until_delivered(&["Ada", "Bad", "Cid", "Dora", "Grace"]).await;
    // Dropped: what stood behind is delivered, or refused for itself.
    let said = office.workshop.ask(["dead-letters", "drop", &office.sink, &id(4)]).await;
    assert!(said.contains("drop of 1"), "{said}");
    office.until_delivered(&["Ada", "Bad", "Bad", "Cid", "Dora", "Grace"]).await;
    eventually(SOON, "none is left", async || list().await == json!([])).await;

    let output = office.workshop.cli(["dead-letters", "replay", &office.sink, &id(4)]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("hint: 'tidegate dead-letters list'"), "{output:?}");
    let output = office.workshop.cli(["dead-letters", "show", &office.sink, "nonsense"]).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_is_reset_to_an_offset_a_time_and_the_beginning() {
    let office = Office::open("reset", WorkerLog::Embedded, "").await;
    office.deliver_events();
    let _worker = office.workshop.start().await;
    let names =
        || office.crm.events().iter().map(|event| event["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    // Keys go out in parallel: what counts is how often each came.
    let until = async |wanted: &[&str]| {
        let mut wanted = wanted.to_vec();
        wanted.sort_unstable();
        eventually(SOON, &format!("events {wanted:?}"), async || {
            let mut seen = names();
            seen.sort();
            if seen == wanted { Ok(()) } else { Err(format!("{seen:?}")) }
        })
        .await;
    };
    until(&["Ada", "Grace"]).await;
    tokio::time::sleep(Duration::from_millis(20)).await; // another millisecond than the snapshot's
    let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    until(&["Ada", "Grace", "Cid"]).await;
    let reset = async |to: &str| office.workshop.ask(["connectors", "reset", &office.sink, "--to", to]).await;
    let said = reset("1").await;
    assert!(said.contains("offset 1"), "{said}");
    until(&["Ada", "Grace", "Cid", "Grace", "Cid"]).await;
    reset(&time).await;
    until(&["Ada", "Grace", "Cid", "Grace", "Cid", "Cid"]).await;
    reset("beginning").await;
    until(&["Ada", "Grace", "Cid", "Grace", "Cid", "Cid", "Ada", "Grace", "Cid"]).await;
    reset("end").await;
    office.database.execute("INSERT INTO customers VALUES (4, 'Dora')").await;
    until(&["Ada", "Grace", "Cid", "Grace", "Cid", "Cid", "Ada", "Grace", "Cid", "Dora"]).await;
    let output = office.workshop.cli(["connectors", "reset", &office.sink, "--to", "999999"]).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let output = office.workshop.cli(["connectors", "pause", "no-such"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(&office.sink), "it lists what there is: {output:?}");
    let list = office.workshop.ask(["connectors", "list"]).await;
    assert!(list.contains("sink.yaml") && list.contains("http-sink"), "{list}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_is_reset_to_a_new_snapshot_or_to_the_end_and_a_pull_to_a_cursor() {
    let office = Office::open("recapture", WorkerLog::Embedded, "").await;
    let _worker = office.workshop.start().await;
    office.until_captured(2).await;
    office.workshop.until_state(&office.capture, "RUNNING").await;
    office.workshop.ask(["connectors", "reset", &office.capture, "--to", "beginning"]).await;
    office.until_captured(4).await;
    let last = office.workshop.consume(&office.topic).await.pop().unwrap();
    assert_eq!((&last["value"]["op"], &last["value"]["after"]["name"]), (&json!("r"), &json!("Grace")));
    office.workshop.until_state(&office.capture, "RUNNING").await;
    // What is committed while it is paused is left out by a reset to the end.
    office.workshop.ask(["connectors", "pause", &office.capture]).await;
    office.workshop.until_state(&office.capture, "PAUSED").await;
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    let said = office.workshop.ask(["connectors", "reset", &office.capture, "--to", "end"]).await;
    assert!(said.contains("is left out"), "{said}");
    office.workshop.ask(["connectors", "resume", &office.capture]).await;
    office.workshop.until_state(&office.capture, "RUNNING").await;
    office.database.execute("INSERT INTO customers VALUES (4, 'Dora')").await;
    office.until_captured(5).await;
    let last = office.workshop.consume(&office.topic).await.pop().unwrap();
    assert_eq!(last["value"]["after"]["name"], "Dora");
    let output = office.workshop.cli(["connectors", "reset", &office.capture, "--to", "3"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("'beginning'"), "{output:?}");

    office.database.execute("CREATE TABLE contacts (id int PRIMARY KEY, name text)").await;
    for id in 1..=3 {
        office.crm.add(json!({"id": id, "name": format!("n{id}"), "ref": 0}));
    }
    office.workshop.connector(
        "pull.yaml",
        "name: contacts\ntype: http-pull\nsystem: crm\nobject: contact\nrequest: GET /customers\nevery: 200ms\n\
         into: public.contacts\nmap: '{ id, name }'\nincremental: { cursor: .id }\nwhen: .id > ($cursor // 0)\n",
    );
    let contacts = "SELECT count(*) FROM contacts";
    eventually(SOON, "three contacts", async || rows(&office, contacts).await == 3).await;
    office.workshop.ask(["connectors", "pause", "contacts"]).await;
    office.workshop.until_state("contacts", "PAUSED").await;
    office.workshop.ask(["connectors", "reset", "contacts", "--cursor", "1"]).await;
    let cursor = "SELECT cursor->>'cursor' FROM tidegate.cursors WHERE connector = 'contacts'";
    let client = office.database.connect().await;
    let stands: Option<String> = client.query_one(cursor, &[]).await.unwrap().get(0);
    assert_eq!(stands.as_deref(), Some("1"));
    office.workshop.ask(["connectors", "resume", "contacts"]).await;
    eventually(SOON, "it goes on from there", async || {
        client.query_one(cursor, &[]).await.unwrap().get::<_, Option<String>>(0).as_deref() == Some("3")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_tells_people_and_scripts_and_watches() {
    let office = Office::open("told", WorkerLog::Embedded, "").await;
    office.deliver("");
    let worker = office.workshop.start().await;
    office.until_delivered(&["Ada", "Grace"]).await;
    office.workshop.until_state(&office.capture, "RUNNING").await;
    let table = eventually(SOON, "all has settled", async || {
        let table = office.workshop.ask(["status"]).await;
        let row = table.lines().find(|line| line.starts_with(&office.sink)).unwrap_or_default();
        if row.contains("0 records") && row.contains("2") { Ok(table) } else { Err(table) }
    })
    .await;
    let lines: Vec<&str> = table.lines().collect();
    for (column, part) in [("STATE", "RUNNING"), ("TYPE", "http-sink")] {
        let at = lines[0].find(column).unwrap();
        assert!(
            lines.iter().any(|line| line.get(at..).is_some_and(|rest| rest.starts_with(part))),
            "{column}:\n{table}"
        );
    }
    let report = json(&office.workshop.ask(["status", "--output", "json"]).await);
    let sink = report["connectors"].as_array().unwrap().iter().find(|one| one["name"] == office.sink.as_str()).unwrap();
    assert_eq!((&sink["state"], &sink["applied"], &sink["lag_events"]), (&json!("RUNNING"), &json!(2), &json!(0)));
    assert_eq!(report["health"]["ready"], true);
    assert_eq!(report["systems"][0]["breaker"], "closed");

    let config = office.workshop.config();
    let mut watch = tidegate(["status", "--watch", "--config"]).arg(&config).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut heads = 0;
    while heads < 3 {
        let line = tokio::time::timeout(SOON, lines.next_line()).await.expect("a line").unwrap().expect("it goes on");
        heads += usize::from(line.starts_with("CONNECTOR"));
    }
    // It goes on watching while the worker is away, and says so.
    worker.signal("TERM");
    worker.wait(SOON).await;
    loop {
        let line = tokio::time::timeout(SOON, lines.next_line()).await.expect("a line").unwrap().expect("it goes on");
        if line.contains("no worker answers") {
            break;
        }
    }
    watch.kill().await.unwrap();

    let topics = office.workshop.ask(["topics"]).await;
    let row: Vec<&str> =
        topics.lines().find(|line| line.starts_with(&office.topic)).unwrap().split_whitespace().collect();
    assert_eq!(row[1..4], ["1", "2", "0..2"], "{topics}");
    let found = json(&office.workshop.ask(["topics", &office.topic, "--output", "json"]).await);
    assert_eq!(found[0]["partitions"][0]["next"], 2, "{found}");
    assert_eq!(json(&office.workshop.ask(["topics", "no-such", "--output", "json"]).await), json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_work_shows_rows_rate_and_time_left_in_status_and_log() {
    let office = Office::open("long", WorkerLog::Embedded, "").await;
    office
        .database
        .execute(
            "INSERT INTO customers SELECT n, repeat('x', 300) FROM generate_series(10, 600000) n; ANALYZE customers",
        )
        .await;
    let worker = office.workshop.start().await;
    let told = eventually(SOON, "the snapshot tells how far it is", async || {
        let seen = office.workshop.connector_status(&office.capture).await;
        let progress = seen["progress"].as_str().filter(|text| text.starts_with("snapshot of")).map(str::to_owned);
        progress.ok_or_else(|| seen.to_string())
    })
    .await;
    for part in ["snapshot of 1 tables", "rows, ", "rows/s", " left"] {
        assert!(told.contains(part), "{told}");
    }
    office.workshop.until_state(&office.capture, "RUNNING").await;
    // A sink that has it all to do.
    office.crm.set(crate::support::Mood::Slow(Duration::from_millis(30)));
    office.deliver_events();
    let told = eventually(SOON, "the sink tells how far it is", async || {
        let seen = office.workshop.connector_status(&office.sink).await;
        let progress = seen["progress"].as_str().filter(|text| text.contains("left")).map(str::to_owned);
        progress.ok_or_else(|| seen.to_string())
    })
    .await;
    for part in ["catching up: ", " records, ", "records/s", " left"] {
        assert!(told.contains(part), "{told}");
    }
    let table = office.workshop.ask(["status"]).await;
    assert!(table.contains("catching up: "), "{table}");
    eventually(SOON, "the log tells", async || worker.log().contains("catching up: ")).await;
}
