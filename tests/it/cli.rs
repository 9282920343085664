//! The command line as people and scripts meet it.

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::{Postgres, Version, WorkerLog, Workshop, eventually, tidegate};

const SOON: Duration = Duration::from_secs(30);
const NOWHERE: &str = "postgres://nobody@127.0.0.1:1/none";

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn help_teaches_every_command_with_an_example() {
    let commands = ["run", "validate", "plan", "preview", "status", "topics", "consume", "dead-letters", "connectors"];
    let whole = text(&tidegate(["--help"]).output().await.unwrap().stdout);
    for command in commands {
        assert!(whole.contains(command), "{command} is not in\n{whole}");
        let help = text(&tidegate([command, "--help"]).output().await.unwrap().stdout);
        assert!(help.contains(&format!("tidegate {command}")) && help.contains("Examples"), "{command}: {help}");
    }
}

#[tokio::test]
async fn errors_have_a_hint_and_an_exit_code_that_scripts_can_tell_apart() {
    let workshop = Workshop::new(NOWHERE, WorkerLog::Embedded, "");
    let output = workshop.cli(["status"]).await;
    assert_eq!(output.status.code(), Some(4), "no worker runs: {output:?}");
    assert!(text(&output.stderr).contains("hint: 'tidegate run'"), "{output:?}");

    let output = workshop.cli(["status", "--output", "json"]).await;
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["code"], 4);

    let output = tidegate(["status", "--config", "/nowhere.yaml"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");

    std::fs::write(workshop.config(), "datastore: { url: \"postgres://a@b/c\" }\nconectors: x\n").unwrap();
    let output = workshop.cli(["topics"]).await;
    assert_eq!(output.status.code(), Some(3));
    let said = text(&output.stderr);
    assert!(said.contains("tidegate.yaml:2:1") && said.contains("did you mean `connectors`"), "{said}");

    let output = workshop.cli(["consume", "t", "--from", "yesterday"]).await;
    assert_eq!(output.status.code(), Some(2));
}

#[tokio::test]
async fn a_worker_that_anyone_could_reach_is_refused_without_a_token() {
    let workshop = Workshop::new(NOWHERE, WorkerLog::Embedded, "");
    let settings = std::fs::read_to_string(workshop.config()).unwrap().replace("127.0.0.1", "0.0.0.0");
    std::fs::write(workshop.config(), settings).unwrap();
    let output = workshop.cli(["run"]).await;
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("rest.token"), "{output:?}");
}

#[tokio::test]
async fn consume_follows_a_topic_from_a_second_process() {
    let database = Postgres::shared(Version::Distribution).await.database("consume").await;
    database
        .execute(
            "CREATE TABLE orders (id int PRIMARY KEY, total numeric(10,2), placed timestamptz);
             INSERT INTO orders SELECT n, n * 1.10, '2026-01-01T00:00:00Z' FROM generate_series(1, 5) n;",
        )
        .await;
    let workshop = Workshop::new(&database.url(), WorkerLog::Embedded, "");
    let name = database.name.as_str();
    workshop.capture(name, "public.orders");
    let _worker = workshop.start().await;
    let topic = format!("{name}.public.orders");
    let seen = eventually(SOON, "the snapshot", async || {
        let seen = workshop.consume(&topic).await;
        (seen.len() == 5).then_some(seen)
    })
    .await;
    assert_eq!(seen[0]["value"]["after"]["total"].to_string().trim_matches('"'), "1.10", "decimals are exact");
    assert_eq!(seen[0]["value"]["op"], "r");
    assert!(seen[0]["value"]["after"]["placed"].as_str().unwrap().starts_with("2026-01-01T00:00:00"), "{}", seen[0]);

    let config = workshop.config();
    let mut follower = tidegate(["consume", &topic, "--follow", "--from", "end", "--output", "json", "--config"])
        .arg(&config)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    // It may not have found its end yet: write until a line comes.
    let mut id = 100;
    let line = eventually(SOON, "a line", async || {
        id += 1;
        database.execute(&format!("INSERT INTO orders VALUES ({id}, 1, now())")).await;
        tokio::time::timeout(Duration::from_secs(1), lines.next_line()).await.ok()?.unwrap()
    })
    .await;
    let record: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(record["value"]["op"], "c");
    assert!(record["key"]["id"].as_i64().unwrap() > 100);
    follower.kill().await.unwrap();

    let two = workshop.ask(["consume", &topic, "--from", "2", "--max", "2", "--output", "json"]).await;
    let offsets: Vec<i64> =
        two.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["offset"].as_i64().unwrap()).collect();
    assert_eq!(offsets, [2, 3]);
    let recent = workshop.ask(["consume", &topic, "--from", "-1h", "--output", "json"]).await;
    assert!(recent.lines().count() >= 6);
    let human = workshop.ask(["consume", &topic, "--max", "1"]).await;
    assert!(human.contains("offset 0 read {\"id\":1}"), "{human}");
    let raw = workshop.ask(["consume", &topic, "--raw", "--max", "1", "--output", "json"]).await;
    assert_ne!(raw, workshop.ask(["consume", &topic, "--max", "1", "--output", "json"]).await);

    let topics = workshop.ask(["topics"]).await;
    assert!(topics.contains(&topic), "{topics}");
    let output = workshop.cli(["consume", "no.such.topic"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("tidegate topics"), "{output:?}");
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_it_without_a_word() {
    let workshop = Workshop::new(NOWHERE, WorkerLog::Embedded, "");
    let _worker = workshop.start().await;
    let (binary, config) = (env!("CARGO_BIN_EXE_tidegate"), workshop.config());
    let shell = async |line: &str| {
        let line = line.replace("TIDEGATE", binary);
        let run = tokio::process::Command::new("sh").args(["-c", &line]).env("TIDEGATE_CONFIG", &config).output();
        tokio::time::timeout(SOON, run).await.expect("it ends").unwrap()
    };
    // A name is one part of a path, whatever is in it.
    for odd in ["../../status?x", "a/b", "..", "a%2Fb"] {
        let output = workshop.cli(["connectors", "pause", odd]).await;
        assert!(text(&output.stderr).contains(&format!("there is no connector '{odd}'")), "{output:?}");
    }
    // An error into a pipe that nobody reads: its exit code is told, and no panic.
    let output = shell("{ TIDEGATE connectors pause none; echo $? >&3; } 3>&1 2>&1 >/dev/null | true").await;
    assert!(!text(&output.stdout).contains("101"), "{output:?}");
    let output = shell("sleep 1 | (TIDEGATE connectors pause none; echo code $? >&3) 3>&1 2>/dev/full").await;
    assert!(text(&output.stdout).contains("code 1\n"), "{output:?}");
    let output = shell("(TIDEGATE status; echo code $?) 2>&1 | head -1").await;
    assert!(text(&output.stdout).starts_with("CONNECTOR") && output.stderr.is_empty(), "{output:?}");
    // Nothing is to be printed any more, so that no failing write would tell.
    let output = shell("(TIDEGATE status --watch; echo code $? >&2) | head -1").await;
    assert_eq!(text(&output.stderr), "code 0\n");
}

#[tokio::test]
async fn a_follower_notices_that_nobody_reads_any_more() {
    let database = Postgres::shared(Version::Distribution).await.database("unread").await;
    database.execute("CREATE TABLE orders (id int PRIMARY KEY); INSERT INTO orders VALUES (1)").await;
    let workshop = Workshop::new(&database.url(), WorkerLog::Embedded, "");
    workshop.capture(&database.name, "public.orders");
    let _worker = workshop.start().await;
    let topic = format!("{}.public.orders", database.name);
    eventually(SOON, "the snapshot", async || (workshop.consume(&topic).await.len() == 1).then_some(())).await;
    let line = format!("({} consume {topic} --follow; echo code $? >&2) | head -1", env!("CARGO_BIN_EXE_tidegate"));
    let run = tokio::process::Command::new("sh").args(["-c", &line]).env("TIDEGATE_CONFIG", workshop.config()).output();
    let output = tokio::time::timeout(SOON, run).await.expect("it ends, though no further record comes").unwrap();
    assert!(text(&output.stdout).contains("offset 0"), "{output:?}");
    assert_eq!(text(&output.stderr), "code 0\n");
}

#[tokio::test]
async fn what_is_no_level_is_refused_and_a_flag_goes_before_the_environment() {
    let workshop = Workshop::new(NOWHERE, WorkerLog::Embedded, "");
    let output = workshop.cli(["topics", "--log-level", "inof"]).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let config = workshop.config();
    let lines = async |level: &[&str]| {
        let mut command = tidegate(["topics"]);
        command.args(level).arg("--config").arg(&config).env("RUST_LOG", "trace");
        text(&command.output().await.unwrap().stderr).lines().count()
    };
    let (all, few) = (lines(&[]).await, lines(&["--log-level", "error"]).await);
    assert!(few < 3 && all > few, "{all} {few}");
    let settings = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{settings}logging.level: inof\n")).unwrap();
    let output = workshop.cli(["validate"]).await;
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(text(&output.stdout).contains("`inof` is no log level"), "{output:?}");
}
