//! What Kafka refuses for a while: a writer and a source go on by themselves when it does so no more, and say meanwhile
//! why they do not.
#![cfg(feature = "kafka")]

use std::sync::Arc;
use std::time::Duration;

use rdkafka::mocking::MockCluster;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use tidegate::log::{KafkaLog, KafkaSettings, Log, LogError, TopicSpec};
use tidegate::pipeline::{Fault, FaultKind, Source as _};
use tidegate::sources::log::{Batching, LogSource};

use crate::log_conformance::{DEADLINE, batch, read_all, text, topic, write_numbers};
use crate::support::{Kafka, Office, WorkerLog, eventually};

const LONG: Duration = Duration::from_secs(90);

/// Writes the value until it is durable; every refusal on the way has to be one that passes.
async fn until_written(log: &KafkaLog, topic: &str, value: &str) {
    let write = async || {
        let mut writer = log.writer("s").await?;
        writer.append(batch(topic, [("k", value)]), Some(value.into())).await?.await
    };
    eventually(LONG, &format!("{value} is written"), async || {
        let written = write().await.map(drop);
        assert!(written.as_ref().err().is_none_or(LogError::is_retriable), "{value}: {written:?}");
        written
    })
    .await;
}

/// No real broker can be asked to say these: librdkafka's own one can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_the_broker_no_longer_knows_is_made_anew() {
    let cluster = MockCluster::new(1).unwrap();
    for topic in ["t", "tidegate.positions"] {
        cluster.create_topic(topic, 1, 1).unwrap();
    }
    let log = KafkaLog::open(KafkaSettings::new(&cluster.bootstrap_servers())).await.unwrap();
    until_written(&log, "t", "first").await;
    for error in [
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_INVALID_PRODUCER_EPOCH,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_PRODUCER_FENCED,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_PRODUCER_ID,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNSUPPORTED_VERSION,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_KAFKA_STORAGE_ERROR,
    ] {
        cluster.request_errors(RDKafkaApiKey::Produce, &[error]);
        until_written(&log, "t", &format!("{error:?}")).await;
    }
    log.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_acl_forbids_goes_on_when_it_is_allowed() {
    let kafka = Kafka::guarded().await;
    // Whoever may do everything: nobody's asking makes a topic.
    let open = KafkaLog::open(KafkaSettings::new(&kafka.bootstrap())).await.unwrap();
    for name in ["t", "tidegate.positions"] {
        open.ensure_topic(&topic(name, 1)).await.unwrap();
    }
    let mut settings = KafkaSettings::new(&kafka.secure_bootstrap());
    settings.librdkafka.extend(kafka.secure_settings());
    let log = Arc::new(KafkaLog::open(settings).await.unwrap());

    let refused = log.ensure_topic(&topic("u", 1)).await.unwrap_err();
    assert!(refused.is_retriable() && refused.to_string().contains("ACL"), "{refused}");
    let refused = log.writer("s").await.err().expect("refused");
    assert!(refused.is_retriable() && refused.to_string().contains("ACL"), "{refused}");
    for what in ["TOPIC WRITE", "TOPIC READ", "GROUP READ"] {
        kafka.allow(what, true).await;
    }
    until_written(&log, "t", "0").await;

    // While one writes.
    kafka.allow("TOPIC WRITE", false).await;
    let refused = eventually(LONG, "writing is refused", async || {
        let mut writer = log.writer("s").await?;
        match writer.append(batch("t", [("k", "1")]), Some(b"1".to_vec())).await?.await {
            Ok(_) => Ok::<_, LogError>(None),
            Err(error) => Ok(Some(error)),
        }
        .map(|refused| refused.ok_or_else(|| LogError::Unavailable("it was written".into())))?
    });
    let refused = refused.await;
    assert!(refused.is_retriable(), "{refused}");
    kafka.allow("TOPIC WRITE", true).await;
    until_written(&log, "t", "2").await;

    // While one reads, and before.
    let status: Arc<tidegate::pipeline::Status> = Arc::default();
    let mut source = LogSource::new(log.clone(), "g", vec!["t".into()], Batching::default(), status);
    tokio::time::timeout(DEADLINE, source.next()).await.unwrap().unwrap();
    for what in ["TOPIC READ", "GROUP READ"] {
        kafka.allow(what, false).await;
        let mut refused: Fault =
            eventually(LONG, &format!("{what} is refused"), async || {
                match tokio::time::timeout(Duration::from_secs(5), source.next()).await {
                    Ok(Err(fault)) => Some(fault),
                    _ => None,
                }
            })
            .await;
        // And is so, every time that it begins anew.
        for again in 0..2 {
            assert!(matches!(refused.kind, FaultKind::Unavailable { .. }), "{what}: {refused}");
            assert!(refused.message.contains("ACL"), "{what}: {refused}");
            let begun = tokio::time::timeout(LONG, source.restart()).await.unwrap();
            refused = begun.expect_err(&format!("{what}, begun anew {again}"));
        }
        kafka.allow(what, true).await;
        eventually(LONG, "it begins", async || source.restart().await).await;
        let seen = tokio::time::timeout(DEADLINE, source.next()).await.unwrap().unwrap();
        assert_eq!(text(&seen.body[0].value), "0", "from where the group stands");
    }
    source.close().await.unwrap();
    open.close().await.unwrap();
    log.close().await.unwrap();
}

/// As while brokers are restarted one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_wants_more_brokers_than_there_are_waits_for_them() {
    let log = KafkaLog::open(KafkaSettings::new(&Kafka::shared().await.bootstrap())).await.unwrap();
    let name = format!("replicated.{}", uuid::Uuid::new_v4().simple());
    let refused = log.ensure_topic(&TopicSpec { replication_factor: Some(3), ..topic(&name, 1) }).await.unwrap_err();
    assert!(refused.is_retriable(), "{refused}");
    assert!([&*name, "replication factor", "hint"].iter().all(|part| refused.to_string().contains(part)), "{refused}");
}

/// Kafka makes no topic by itself here, and the capture had made it long ago.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_removed_under_a_capture_is_made_again() {
    let kafka = Kafka::guarded().await;
    let office = Office::open("removed", WorkerLog::Kafka(&kafka.bootstrap()), "").await;
    let _worker = office.workshop.start().await;
    office.until_captured(2).await;
    office.until_ready().await;
    let admin: rdkafka::admin::AdminClient<rdkafka::client::DefaultClientContext> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", kafka.bootstrap()).create().unwrap();
    admin.delete_topics(&[&office.topic], &Default::default()).await.unwrap().remove(0).unwrap();
    office.database.execute("INSERT INTO customers VALUES (3, 'Cid')").await;
    office.until_captured(1).await;
    office.until_ready().await;
    let log = KafkaLog::open(KafkaSettings::new(&kafka.bootstrap())).await.unwrap();
    assert_eq!(read_all(&log, &office.topic).await.len(), 1);
    write_numbers(&log, &office.topic, 0, 1, 1).await;
}
