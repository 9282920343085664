//! Positions of sources: a compacted topic with one record a source (key: its name, value: the position).
//! A position is written only when the records it covers are durable, and read back to where the topic ends when the
//! reading begins: other sources may write to it all the while.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::Message as _;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;

use super::client::{Told, blocking, fault, no_client};
use super::{ANSWER_WAIT, Inside, list_of, places_of};
use crate::log::{Log as _, LogError, StartAt, TopicSpec};

/// How long reading the whole topic may take.
const READ_WAIT: Duration = Duration::from_secs(60);

/// Makes the topic where it is missing.
pub(super) async fn ensure_topic(inside: &std::sync::Arc<Inside>) -> Result<(), LogError> {
    let log = super::KafkaLog { inside: inside.clone() };
    let compacted = [("cleanup.policy".to_owned(), "compact".to_owned())];
    log.ensure_topic(&TopicSpec {
        name: inside.settings.positions_topic.clone(),
        partitions: 1,
        replication_factor: inside.settings.positions_replication_factor,
        settings: compacted.into(),
    })
    .await
}

/// The last position of `source`.
pub(super) async fn read(inside: &std::sync::Arc<Inside>, source: &str) -> Result<Option<Vec<u8>>, LogError> {
    let topic = inside.settings.positions_topic.clone();
    let places = places_of(&topic, &inside.partitions_of(&topic).await?);
    let ends = inside.resolve(places.clone(), StartAt::End).await?;
    let source = source.as_bytes().to_owned();
    let config = inside.settings.reader()?;
    let told = inside.told.clone();
    blocking(READ_WAIT + ANSWER_WAIT, move || {
        let consumer: BaseConsumer<Told> =
            config.create_with_context(told.clone()).map_err(|e| no_client("reader", &e))?;
        let list = list_of(places.iter().map(|place| (place, rdkafka::Offset::Beginning)))?;
        consumer.assign(&list).map_err(|e| fault(&e, &told))?;
        let mut position = None;
        // An empty partition is at its end when the client says so, as one is whose last records were compacted away.
        let mut open: BTreeMap<i32, i64> = ends.into_iter().map(|(place, end)| (place.partition, end.0)).collect();
        let give_up = Instant::now() + READ_WAIT;
        while !open.is_empty() {
            if Instant::now() > give_up {
                return Err(LogError::Unavailable(format!("topic '{topic}' could not be read to its end")));
            }
            match consumer.poll(Duration::from_millis(100)) {
                None => {}
                Some(Ok(record)) => {
                    if record.key() == Some(&source) {
                        position = record.payload().map(<[u8]>::to_vec);
                    }
                    if open.get(&record.partition()).is_some_and(|end| record.offset() + 1 >= *end) {
                        open.remove(&record.partition());
                    }
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => drop(open.remove(&partition)),
                Some(Err(error)) => match fault(&error, &told) {
                    // It was seen above: a topic made just now is not known to all of a broker at once.
                    LogError::UnknownTopic(_) => std::thread::sleep(Duration::from_millis(50)),
                    error => return Err(error),
                },
            }
        }
        Ok(position)
    })
    .await
}
