//! How a worker ends: on a signal, drained and within its deadline, whatever the other side does; on a second one at
//! once; with an exit code that says which.

use std::time::{Duration, Instant};

use crate::support::{Kafka, Mood, Office, WorkerLog, eventually};

const SOON: Duration = Duration::from_secs(60);
/// After `shutdown.deadline` everything is dropped, the log closed, the process gone.
const AFTER: Duration = Duration::from_secs(9);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_system_is_waited_for_and_nothing_is_sent_twice() {
    let office = Office::open("slow_end", WorkerLog::Embedded, "shutdown.deadline: 20s").await;
    office.crm.set(Mood::Slow(Duration::from_secs(2)));
    office.deliver("");
    let worker = office.workshop.start().await;
    eventually(SOON, "both are under way", async || office.crm.writes() == 2).await;
    let began = Instant::now();
    worker.signal("TERM");
    assert_eq!(worker.wait(SOON).await, 0, "{}", worker.log_end(20));
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(office.crm.names(), ["Ada", "Grace"], "it was waited for");
    assert!(!worker.log().contains("not drained"), "{}", worker.log_end(20));

    office.crm.set(Mood::Well);
    let _worker = office.workshop.start().await;
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    office.until_delivered(&["Ada", "Cid", "Grace"]).await;
    assert_eq!(office.crm.writes(), 3, "what was drained is not sent again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_system_that_hangs_delays_the_end_by_the_deadline_and_loses_nothing() {
    let office = Office::open("hung_end", WorkerLog::Embedded, "shutdown.deadline: 3s").await;
    office.deliver("");
    let worker = office.workshop.start().await;
    office.until_delivered(&["Ada", "Grace"]).await;
    office.crm.set(Mood::Hangs);
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    eventually(SOON, "a request hangs", async || office.crm.held() > 0).await;
    let began = Instant::now();
    worker.signal("TERM");
    assert_eq!(worker.wait(SOON).await, 0, "{}", worker.log_end(20));
    let took = began.elapsed();
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(3) + AFTER, "{took:?}");
    assert!(worker.log().contains("not drained after 3s"), "{}", worker.log_end(20));

    office.crm.set(Mood::Well);
    let _worker = office.workshop.start().await;
    office.until_delivered(&["Ada", "Cid", "Grace"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_away_does_not_keep_the_worker() {
    let broker = Kafka::own().await;
    let office = Office::open("log_end", WorkerLog::Kafka(&broker.bootstrap()), "shutdown.deadline: 3s").await;
    office.deliver("");
    let worker = office.workshop.start().await;
    office.until_delivered(&["Ada", "Grace"]).await;
    // Its connections stay and nothing answers.
    broker.freeze();
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    office.until_not_ready(&[&office.capture]).await;
    let began = Instant::now();
    worker.signal("TERM");
    let code = worker.wait(SOON).await;
    let took = began.elapsed();
    assert!(took < Duration::from_secs(3) + AFTER, "{took:?}: {}", worker.log_end(20));
    assert!(code == 0 || code == 1, "{code}");
    broker.thaw();
    let _worker = office.workshop.start().await;
    office.until_delivered(&["Ada", "Cid", "Grace"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_it_at_once() {
    for signal in ["TERM", "INT"] {
        let office = Office::open("twice_end", WorkerLog::Embedded, "shutdown.deadline: 50s").await;
        office.crm.set(Mood::Hangs);
        office.deliver("");
        let worker = office.workshop.start().await;
        eventually(SOON, "it has begun", async || {
            office.workshop.connector_status(&office.sink).await["lag_events"].as_u64().is_some_and(|lag| lag > 0)
        })
        .await;
        worker.signal(signal);
        eventually(SOON, "it drains", async || worker.log().contains("stopping: draining")).await;
        assert_eq!(worker.exited(), None);
        let began = Instant::now();
        worker.signal(signal);
        assert_eq!(worker.wait(SOON).await, 130, "{}", worker.log_end(20));
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        office.crm.set(Mood::Well);
        let _worker = office.workshop.start().await;
        office.until_delivered(&["Ada", "Grace"]).await;
    }
}

#[tokio::test]
async fn a_worker_that_can_not_start_says_so_by_its_exit_code() {
    let office = Office::open("no_start", WorkerLog::Embedded, "").await;
    let _first = office.workshop.start().await;
    // The state folder is held.
    let second = office.workshop.launch();
    assert_eq!(second.wait(SOON).await, 1, "{}", second.log());
    // The address is taken.
    let settings = std::fs::read_to_string(office.workshop.config()).unwrap().replace("../data", "../other");
    std::fs::write(office.workshop.config(), settings).unwrap();
    let third = office.workshop.launch();
    assert_eq!(third.wait(SOON).await, 4, "{}", third.log());
    assert!(third.log().contains("can't listen at"), "{}", third.log());
    // The settings are wrong.
    std::fs::write(office.workshop.config(), "log: 1\n").unwrap();
    let fourth = office.workshop.launch();
    assert_eq!(fourth.wait(SOON).await, 3, "{}", fourth.log());
}
