//! A worker that is started while nothing that it needs is up: it says what is missing, and goes on as each thing comes,
//! in whatever order.
#![cfg(feature = "kafka")]

use tidegate::registry::BuiltinRegistry;

use crate::support::{Kafka, Office, Postgres, Proxy, Version, WorkerLog};

#[derive(Clone, Copy, Debug)]
enum Part {
    Kafka,
    Postgres,
    Registry,
    System,
}

/// `order`: what comes up, and a reason that is told before it does.
async fn goes_on(name: &str, order: [(Part, &str); 4]) {
    let server: &'static Postgres = Box::leak(Box::new(Postgres::own(Version::Distribution).await));
    let kafka = Kafka::own().await;
    let folder = tempfile::tempdir().unwrap();
    let real = crate::registry::serve(&BuiltinRegistry::open(folder.path()).unwrap()).await;
    let registry = Proxy::start(real.trim_start_matches("http://").parse().unwrap()).await;
    let crm = crate::support::office::Crm::start().await;
    let system = Proxy::start(crm.address()).await;
    let more = format!(
        "  erp:\n    base_url: {}\n    probe: GET /ping\n    breaker.open: 500ms\nschema.registry: {}",
        system.url(),
        registry.url()
    );
    let office = Office::on(server, name, WorkerLog::Kafka(&kafka.bootstrap()), &more).await;
    office.deliver("");
    let sink = office.workshop.path().join("connectors/sink.yaml");
    std::fs::write(&sink, std::fs::read_to_string(&sink).unwrap().replace("system: crm", "system: erp")).unwrap();
    kafka.stop().await;
    server.stop().await;
    registry.down();
    system.down();

    let _worker = office.workshop.start().await;
    let both = [format!("\"{}\"", office.capture), format!("\"{}\"", office.sink)];
    office.until_not_ready(&[&both[0], &both[1], "\"log\"", "\"datastore\""]).await;
    for (part, reason) in order {
        office.until_not_ready(&[reason]).await;
        match part {
            Part::Kafka => kafka.start().await,
            Part::Postgres => server.start().await,
            Part::Registry => registry.up().await,
            Part::System => system.up().await,
        }
    }
    crate::support::eventually(std::time::Duration::from_secs(100), "both customers are there", async || {
        let names = crm.names();
        if names == ["Ada", "Grace"] { Ok(()) } else { Err(format!("{names:?}")) }
    })
    .await;
    let health = office.until_ready().await;
    assert!(!health.to_string().contains("dead letter"), "{health}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_started_before_everything_else_goes_on_as_it_comes() {
    let order = [
        (Part::Kafka, "log is unavailable"),
        (Part::Postgres, "onnect"),
        (Part::Registry, "registry is unavailable"),
        (Part::System, "'erp' is unavailable"),
    ];
    goes_on("order_down", order).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_started_before_everything_else_goes_on_as_it_comes_the_other_way_round() {
    let order = [
        (Part::System, "log is unavailable"),
        (Part::Registry, "log is unavailable"),
        (Part::Postgres, "log is unavailable"),
        (Part::Kafka, "log is unavailable"),
    ];
    goes_on("order_up", order).await;
}
