//! The watched folder: files that are renamed, linked, half written or removed; identities that may not change.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use crate::support::{Office, WorkerLog, eventually};

const SOON: Duration = Duration::from_secs(40);

async fn slots(office: &Office) -> Vec<String> {
    let client = office.database.connect_as_superuser().await;
    let sql = "SELECT slot_name::text FROM pg_replication_slots WHERE database = $1 ORDER BY 1";
    client.query(sql, &[&office.database.name]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renamed_file_and_links_turned_to_other_files_as_kubernetes_does() {
    let office = Office::open("linked", WorkerLog::Embedded, "").await;
    let folder = office.workshop.path().join("connectors");
    let file = format!("{}.yaml", office.capture);
    let worker = office.workshop.start().await;
    office.until_captured(2).await;
    office.workshop.until_state(&office.capture, "RUNNING").await;

    // Renamed: it runs on, and nobody calls its slot orphaned.
    std::fs::rename(folder.join(&file), folder.join("renamed.yaml")).unwrap();
    eventually(SOON, "the new name is known", async || {
        let seen = office.workshop.connector_status(&office.capture).await;
        if seen["file"].to_string().contains("renamed.yaml") { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
    assert!(!worker.log().contains("orphaned"), "{}", worker.log_end(20));
    let starts = |log: &str| log.lines().filter(|line| line.contains(": starting")).count();
    let log = worker.log();
    assert_eq!(log.matches("settings changed: restarting").count(), 0, "{log}");

    // A mounted ConfigMap: the files are links through `..data`, which is turned to a new folder at once.
    let write = |version: &str, tables: &str| {
        let data = folder.join(version);
        std::fs::create_dir(&data).unwrap();
        let name = &office.capture;
        let text =
            format!("name: {name}\ntype: postgres-source\ntopic.prefix: {name}\ntable.include.list: public.{tables}\n");
        std::fs::write(data.join("shop.yaml"), text).unwrap();
        // Times say nothing: both files may be of the same second.
        let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        std::fs::File::options().append(true).open(data.join("shop.yaml")).unwrap().set_modified(time).unwrap();
    };
    let turn = |version: &str| {
        symlink(version, folder.join("..data_tmp")).unwrap();
        std::fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
    };
    office.database.execute("CREATE TABLE customerz (id int PRIMARY KEY)").await;
    write("..v1", "customers");
    turn("..v1");
    std::fs::remove_file(folder.join("renamed.yaml")).unwrap();
    symlink("..data/shop.yaml", folder.join("shop.yaml")).unwrap();
    eventually(SOON, "the link is read", async || {
        let seen = office.workshop.connector_status(&office.capture).await;
        seen["file"].to_string().contains("shop.yaml")
    })
    .await;
    // The same size and the same time: another file all the same.
    write("..v2", "customerz");
    turn("..v2");
    std::fs::remove_dir_all(folder.join("..v1")).unwrap();
    eventually(SOON, "the turned link is read", async || worker.log().contains("settings changed: restarting")).await;
    let topic = format!("{}.public.customerz", office.capture);
    let mut id = 0;
    eventually(SOON, "the other table is captured", async || {
        id += 1;
        office.database.execute(&format!("INSERT INTO customerz VALUES ({id})")).await;
        !office.workshop.consume(&topic).await.is_empty()
    })
    .await;
    assert!(!worker.log().contains("orphaned"), "{}", worker.log_end(20));
    assert_eq!(starts(&worker.log()), starts(&log), "started once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_that_is_gone_is_told_and_what_runs_runs_on() {
    let office = Office::open("folder_gone", WorkerLog::Embedded, "").await;
    let folder = office.workshop.path().join("connectors");
    let away = office.workshop.path().join("away");
    let _worker = office.workshop.start().await;
    office.until_captured(2).await;
    std::fs::rename(&folder, &away).unwrap();
    office.until_not_ready(&["the connectors folder can't be read"]).await;
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    office.until_captured(3).await;
    std::fs::rename(&away, &folder).unwrap();
    office.until_ready().await;
    assert_eq!(office.workshop.connector_status(&office.capture).await["state"], "RUNNING");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_position_counts_in_is_changed_only_by_the_command_that_migrates() {
    let office = Office::open("identity", WorkerLog::Embedded, "").await;
    let (name, other) = (office.capture.clone(), office.database.server.database("identity_other").await);
    let file = format!("{name}.yaml");
    let good = std::fs::read_to_string(office.workshop.path().join("connectors").join(&file)).unwrap();
    let worker = office.workshop.start().await;
    office.until_captured(2).await;
    let port = office.database.server.port();
    let database = format!(
        "{good}database: {{ hostname: 127.0.0.1, port: {port}, user: tidegate, password: tidegate, dbname: {} }}\n",
        other.name
    );
    for (text, told) in [
        (good.replace("topic.prefix: ", "topic.prefix: other_"), "topic.prefix was"),
        (format!("{good}slot.name: another\n"), "slot.name was"),
        (format!("{good}publication.name: another\n"), "publication.name was"),
        (database, "database.dbname was"),
        (
            good.replace("name: ", "name: new_").replace("topic.prefix: new_", "topic.prefix: "),
            "its position belongs to the name",
        ),
    ] {
        office.workshop.connector(&file, &text);
        let health = office.until_not_ready(&[told]).await.to_string();
        let command =
            if told.contains("name") && !told.contains('.') { "connectors forget" } else { "connectors migrate" };
        assert!(health.contains(command), "{health}");
        assert_eq!(office.workshop.connector_status(&name).await["state"], "RUNNING", "the old one runs on");
    }
    office.workshop.connector(&file, &good);
    office.until_ready().await;
    assert_eq!(slots(&office).await, [format!("tidegate_{name}")], "nothing was made meanwhile");

    // The command does it: a new slot, all tables read into it, the old slot told as left behind.
    let moved = format!("{good}slot.name: {name}_new\npublication.name: {name}_new\n");
    office.workshop.connector(&file, &moved);
    office.until_not_ready(&["slot.name was"]).await;
    let said = office.workshop.ask(["connectors", "migrate", &name]).await;
    let orphan = format!("{name}@tidegate_{name}");
    assert!(said.contains("starts anew") && said.contains(&orphan), "{said}");
    office.until_ready().await;
    office.until_captured(4).await;
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    office.until_captured(5).await;
    assert_eq!(slots(&office).await, [format!("{name}_new"), format!("tidegate_{name}")]);
    let said = office.workshop.ask(["connectors", "forget", &orphan]).await;
    assert!(said.contains("dropped slot"), "{said}");
    assert_eq!(slots(&office).await, [format!("{name}_new")]);
    assert_eq!(office.workshop.ask(["connectors", "migrate", &name]).await.matches("nothing to do").count(), 1);

    // The name is right after a restart of the worker, too.
    worker.signal("TERM");
    assert_eq!(worker.wait(SOON).await, 0);
    let _worker = office.workshop.start().await;
    office.database.execute("INSERT INTO customers VALUES (4, 'Dora')").await;
    office.until_captured(6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_of_the_worker_is_told_and_taken_up_at_the_next_start() {
    let office = Office::open("changed", WorkerLog::Embedded, "").await;
    let worker = office.workshop.start().await;
    let settings = std::fs::read_to_string(office.workshop.config()).unwrap();
    let more = settings.replace("systems:\n", "systems:\n  erp: { base_url: \"http://127.0.0.1:1\" }\n");
    std::fs::write(office.workshop.config(), &more).unwrap();
    let told = async || office.workshop.get("/health/ready").await.1["warnings"].to_string();
    eventually(SOON, "it is told", async || told().await.contains("restart the worker")).await;
    assert!(office.workshop.ask(["status"]).await.contains("has changed since the worker read it"));
    // A connector of the new system is refused with that.
    let sink = "name: late\ntype: http-sink\nsystem: erp\nobject: x\ntopics: t\n\
         match: { request: GET /x, id: '.[].id' }\ncreate: POST /x\n";
    office.workshop.connector("late.yaml", sink);
    office.until_not_ready(&["there is no system `erp`", "restart"]).await;
    worker.signal("TERM");
    assert_eq!(worker.wait(SOON).await, 0);
    let _worker = office.workshop.start().await;
    eventually(SOON, "it is taken up", async || office.workshop.connector_status("late").await["type"] == "http-sink")
        .await;
    assert!(!told().await.contains("restart the worker"));
    assert!(Path::new(&office.workshop.config()).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_comes_back_while_its_connector_is_forgotten_waits_for_that() {
    let office = Office::open("forgotten", WorkerLog::Embedded, "").await;
    let name = &office.capture;
    let file = office.workshop.path().join("connectors").join(format!("{name}.yaml"));
    let text = std::fs::read_to_string(&file).unwrap();
    let worker = office.workshop.start().await;
    office.until_captured(2).await;
    office.workshop.until_state(name, "RUNNING").await;
    std::fs::remove_file(&file).unwrap();
    eventually(SOON, "it has stopped", async || office.workshop.connector_status(name).await.get("error").is_some())
        .await;

    // Its publication can't be dropped yet: the command is in the middle.
    let mut client = office.database.connect_as_superuser().await;
    let change = client.transaction().await.unwrap();
    change.batch_execute(&format!("ALTER PUBLICATION tidegate_{name} SET (publish = 'insert')")).await.unwrap();
    let forgetting = async {
        // Until it has stopped, the command is refused.
        eventually(SOON, "it is forgotten", async || {
            let output = office.workshop.cli(["connectors", "forget", name]).await;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            if output.status.success() { Ok(said) } else { Err(format!("{output:?}")) }
        })
        .await
    };
    let meanwhile = async {
        eventually(SOON, "the slot is dropped", async || slots(&office).await.is_empty()).await;
        std::fs::write(&file, &text).unwrap();
        // The folder has been looked at when it is told what is wrong with this one.
        office.workshop.connector("wrong.yaml", "nme: wrong");
        office.until_not_ready(&["wrong.yaml"]).await;
        let seen = office.workshop.connector_status(name).await;
        assert!(seen.get("error").is_some(), "it started while it was forgotten: {seen}");
        let twice = office.workshop.cli(["connectors", "forget", name]).await;
        assert!(String::from_utf8_lossy(&twice.stderr).contains("is being forgotten"), "{twice:?}");
        change.rollback().await.unwrap();
    };
    let (said, ()) = tokio::join!(forgetting, meanwhile);
    assert!(said.contains("dropped slot") && said.contains("is forgotten"), "{said}");
    eventually(SOON, "the file counts", async || {
        office.workshop.connector_status(name).await["type"] == "postgres-source"
    })
    .await;
    assert!(!worker.log().contains("panicked"), "{}", worker.log_end(20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_file_refers_to_may_come_later_and_a_file_that_cannot_be_read_keeps_nothing_waiting() {
    let office = Office::open("later", WorkerLog::Embedded, "").await;
    let folder = office.workshop.path().join("connectors");
    // To read it fails, whoever asks.
    symlink("/proc/self/mem", folder.join("bad.yaml")).unwrap();
    let later = format!("{}_later", office.capture);
    let text = format!(
        "name: {later}\ntype: postgres-source\ntopic.prefix: '${{file:prefix}}'\ntable.include.list: public.customers\n"
    );
    office.workshop.connector("later.yaml", &text);
    let _worker = office.workshop.start().await;
    office.until_captured(2).await;
    office.until_not_ready(&["bad.yaml", "cannot be read", "later.yaml"]).await;
    let checked = office.workshop.cli(["validate"]).await;
    assert_eq!(checked.status.code(), Some(3));
    let checked = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.contains("bad.yaml:1:1: cannot be read") && checked.contains("2 errors in 2 of them"), "{checked}");

    // From here on nothing happens to the connector files themselves.
    std::fs::remove_file(folder.join("bad.yaml")).unwrap();
    eventually(SOON, "the bad one is gone", async || {
        !office.workshop.get("/health/ready").await.1["troubles"].to_string().contains("bad.yaml")
    })
    .await;
    std::fs::write(folder.join("prefix"), &later).unwrap();
    office.workshop.until_state(&later, "RUNNING").await;
    office.until_ready().await;
}
