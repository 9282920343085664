//! Settings of the Kafka log, and the configurations of librdkafka's clients made of them.
//!
//! Every librdkafka setting is passed through, to all clients, or with `producer.` or `consumer.` before its name to
//! these alone. The settings that carry a promise of the log can't be changed: they are refused by name.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;

use crate::log::LogError;

#[derive(Clone)]
pub struct KafkaSettings {
    pub bootstrap_servers: String,
    /// librdkafka settings by their names: SASL, TLS, time-outs, batching …
    pub librdkafka: BTreeMap<String, String>,
    /// Compacted topic that holds the positions of sources.
    pub positions_topic: String,
    /// Replication factor of that topic; `None` takes the broker's default.
    pub positions_replication_factor: Option<i32>,
    /// Bytes accepted and not yet acknowledged, at the most; `append` waits at this bound.
    pub in_flight_bytes: usize,
    /// Records that wait this long without any being acknowledged mean that Kafka is away.
    pub unavailable_after: Duration,
    /// A group's offsets are committed again when they have not moved for this long: Kafka forgets offsets that are
    /// not (`offsets.retention.minutes`).
    pub recommit_after: Duration,
}

/// Values never shown: settings may hold passwords.
impl std::fmt::Debug for KafkaSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KafkaSettings")
            .field("bootstrap_servers", &self.bootstrap_servers)
            .field("librdkafka", &self.librdkafka.keys())
            .field("positions_topic", &self.positions_topic)
            .finish_non_exhaustive()
    }
}

/// What a promise of the log hangs on: the name, the value it has (a setting that says the same is let through;
/// `None`: it is not a constant), and the promise.
const OWN: [(&str, Option<&str>, &str); 13] = [
    ("bootstrap.servers", None, "it is given beside `type: kafka`"),
    ("acks", Some("all"), "a record is durable only when all in-sync replicas have it"),
    ("request.required.acks", Some("all"), "a record is durable only when all in-sync replicas have it"),
    ("enable.idempotence", Some("true"), "a retry must not double or reorder records"),
    ("delivery.report.only.error", Some("false"), "a batch is durable when each of its records has been acknowledged"),
    ("message.timeout.ms", Some("0"), "a time-out would drop records from the middle of a batch"),
    ("delivery.timeout.ms", Some("0"), "a time-out would drop records from the middle of a batch"),
    ("partitioner", Some("murmur2_random"), "keys go where Java's clients send them"),
    ("transactional.id", None, "this log does not use transactions"),
    ("group.id", None, "groups are named after connectors"),
    ("enable.auto.commit", Some("false"), "an offset is committed only when its record has been delivered"),
    ("auto.offset.reset", Some("error"), "records that retention removed must not be skipped silently"),
    ("enable.partition.eof", None, "it is used inside"),
];

impl KafkaSettings {
    pub fn new(bootstrap_servers: &str) -> Self {
        KafkaSettings {
            bootstrap_servers: bootstrap_servers.to_owned(),
            librdkafka: BTreeMap::new(),
            positions_topic: "tidegate.positions".to_owned(),
            positions_replication_factor: None,
            in_flight_bytes: 64 << 20,
            unavailable_after: Duration::from_secs(5),
            recommit_after: Duration::from_secs(3600),
        }
    }

    /// Refuses what librdkafka does not know, and what would break a promise.
    pub(super) fn check(&self) -> Result<(), LogError> {
        if self.bootstrap_servers.trim().is_empty() {
            return Err(LogError::Invalid("'bootstrap.servers' is empty; it is a list of host:port".into()));
        }
        for (given, value) in &self.librdkafka {
            let name = bare(given);
            let own = OWN.iter().find(|(own, ..)| *own == name);
            if let Some((_, fixed, why)) = own
                && *fixed != Some(value.as_str())
            {
                return Err(LogError::Invalid(format!("the Kafka setting '{given}' can't be changed: {why}")));
            }
        }
        for config in [self.client()?, self.producer()?, self.consumer("check")?] {
            native(&config)?;
        }
        Ok(())
    }

    /// What all clients share.
    fn base(&self, role: &str) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.bootstrap_servers);
        config.set("client.id", "tidegate");
        // The default waits for up to 10 s before it looks for a broker that came back.
        config.set("reconnect.backoff.max.ms", "1000");
        config.set("socket.keepalive.enable", "true");
        config.set("log.connection.close", "false");
        config.set_log_level(RDKafkaLogLevel::Info);
        for (name, value) in &self.librdkafka {
            let for_role = match name.split_once('.') {
                Some(("producer", _)) => role == "producer",
                Some(("consumer", _)) => role == "consumer",
                _ => true,
            };
            if for_role {
                config.set(bare(name), value);
            }
        }
        config
    }

    /// A client that asks and makes topics.
    pub(super) fn client(&self) -> Result<ClientConfig, LogError> {
        Ok(self.base("client"))
    }

    pub(super) fn producer(&self) -> Result<ClientConfig, LogError> {
        let mut config = self.base("producer");
        let default = |config: &mut ClientConfig, name: &str, value: &str| {
            if config.get(name).is_none() {
                config.set(name, value);
            }
        };
        if config.get("compression.type").is_none() {
            default(&mut config, "compression.codec", "lz4");
        }
        // What the producer's thread hands over is to be one request: librdkafka waits until it is told that this was
        // all. With no wait it would send the first record alone, and a few after it, and so on.
        if !self.lingers() {
            config.set("linger.ms", "5");
        }
        default(&mut config, "batch.num.messages", "100000");
        // `in_flight_bytes` is the bound; librdkafka's queue is a little larger, so that it is never the one that
        // is reached: records there cost some bytes more than their own.
        default(&mut config, "queue.buffering.max.messages", "0");
        default(&mut config, "queue.buffering.max.kbytes", &(self.in_flight_bytes / 512).max(65536).to_string());
        default(&mut config, "retry.backoff.max.ms", "1000");
        config.set("acks", "all");
        config.set("enable.idempotence", "true");
        config.set("message.timeout.ms", "0");
        config.set("partitioner", "murmur2_random");
        Ok(config)
    }

    /// What librdkafka puts into one request of a partition, before it is compressed.
    pub(super) fn request_bytes(&self) -> usize {
        let config = self.base("producer");
        let limit = |name| config.get(name).and_then(|value| value.parse().ok()).unwrap_or(1_000_000);
        // Less the frame around the records.
        usize::min(limit("batch.size"), limit("message.max.bytes")).saturating_sub(512)
    }

    /// Somebody has set how long librdkafka waits for more before it sends.
    pub(super) fn lingers(&self) -> bool {
        let given = self.base("producer");
        given.get("linger.ms").or_else(|| given.get("queue.buffering.max.ms")).is_some()
    }

    fn reading(&self) -> ClientConfig {
        let mut config = self.base("consumer");
        for (name, value) in [
            // What a consumer may hold that nobody has asked for yet.
            ("queued.max.messages.kbytes", "16384"),
            ("fetch.message.max.bytes", "4194304"),
            // The default pauses a second whenever that is reached.
            ("fetch.queue.backoff.ms", "5"),
            // Topics made later are found soon.
            ("topic.metadata.refresh.interval.ms", "5000"),
        ] {
            if config.get(name).is_none() {
                config.set(name, value);
            }
        }
        config.set("enable.auto.commit", "false");
        config.set("enable.auto.offset.store", "false");
        config.set("auto.offset.reset", "error");
        config
    }

    pub(super) fn consumer(&self, group: &str) -> Result<ClientConfig, LogError> {
        let mut config = self.reading();
        config.set("group.id", group);
        if config.get("partition.assignment.strategy").is_none() {
            // A member that comes or goes disturbs only the partitions that move.
            config.set("partition.assignment.strategy", "cooperative-sticky");
        }
        Ok(config)
    }

    /// Reads partitions without a group's help; librdkafka wants a group's name all the same.
    pub(super) fn reader(&self) -> Result<ClientConfig, LogError> {
        let mut config = self.reading();
        config.set("group.id", "tidegate-reader");
        config.set("enable.partition.eof", "true");
        Ok(config)
    }

    /// A client that is only asked for metadata and offsets.
    pub(super) fn asking(&self, group: Option<&str>) -> Result<ClientConfig, LogError> {
        let mut config = self.base("consumer");
        config.set("enable.auto.commit", "false");
        if let Some(group) = group {
            config.set("group.id", group);
        }
        Ok(config)
    }
}

fn bare(name: &str) -> &str {
    name.strip_prefix("producer.").or_else(|| name.strip_prefix("consumer.")).unwrap_or(name)
}

/// Lets librdkafka look at the names and values.
fn native(config: &ClientConfig) -> Result<(), LogError> {
    match config.create_native_config() {
        Ok(_) => Ok(()),
        Err(KafkaError::ClientConfig(_, why, name, _)) => Err(LogError::Invalid(format!(
            "the Kafka setting '{name}' is refused by librdkafka: {why}. \
             hint: its settings are listed in librdkafka's CONFIGURATION.md"
        ))),
        Err(other) => Err(LogError::Invalid(format!("the Kafka settings are refused by librdkafka: {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(name: &str, value: &str) -> String {
        let mut settings = KafkaSettings::new("127.0.0.1:9092");
        settings.librdkafka.insert(name.into(), value.into());
        settings.check().unwrap_err().to_string()
    }

    #[test]
    fn settings_that_librdkafka_does_not_know_are_refused_by_name() {
        assert!(refusal("lingr.ms", "5").contains("'lingr.ms'"));
        assert!(refusal("producer.linger.ms", "soon").contains("'linger.ms'"));
    }

    #[test]
    fn settings_that_carry_a_promise_can_not_be_changed() {
        for name in [
            "acks",
            "producer.message.timeout.ms",
            "consumer.auto.offset.reset",
            "partitioner",
            "delivery.report.only.error",
        ] {
            assert!(refusal(name, "1").contains("can't be changed"), "{name}");
        }
    }

    #[test]
    fn other_settings_reach_the_clients_they_are_for() {
        let mut settings = KafkaSettings::new("127.0.0.1:9092");
        for (name, value) in
            [("linger.ms", "50"), ("consumer.fetch.min.bytes", "7"), ("acks", "all"), ("sasl.password", "secret")]
        {
            settings.librdkafka.insert(name.into(), value.into());
        }
        settings.check().unwrap();
        let (producer, consumer) = (settings.producer().unwrap(), settings.consumer("g").unwrap());
        assert_eq!(producer.get("linger.ms"), Some("50"));
        assert_eq!(producer.get("fetch.min.bytes"), None);
        assert_eq!(consumer.get("fetch.min.bytes"), Some("7"));
        assert!(!format!("{settings:?}").contains("secret"));
    }

    #[test]
    fn librdkafka_is_told_when_to_send_unless_a_linger_was_set() {
        let mut settings = KafkaSettings::new("127.0.0.1:9092");
        settings.librdkafka.insert("consumer.linger.ms".into(), "7".into());
        assert!(!settings.lingers());
        assert_eq!(settings.producer().unwrap().get("linger.ms"), Some("5"));
        for name in ["linger.ms", "producer.queue.buffering.max.ms"] {
            let mut settings = settings.clone();
            settings.librdkafka.insert(name.into(), "50".into());
            assert!(settings.lingers(), "{name}");
            let producer = settings.producer().unwrap();
            assert_eq!(producer.get(bare(name)), Some("50"));
            assert_eq!(producer.get("linger.ms").is_some(), name == "linger.ms");
        }
    }
}
