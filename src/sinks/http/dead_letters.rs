//! The dead-letter topic: copies of rejected records, for people and tools. The parked record is what counts; so a
//! copy goes out first, and may come twice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;

use crate::event::RecordBatch;
use crate::log::{ConsumedRecord, Log, LogWriter, TopicSpec};
use crate::pipeline::Fault;

const DEADLINE: Duration = Duration::from_secs(30);

pub struct DeadLetters {
    log: Arc<dyn Log>,
    connector: String,
    topic: Arc<str>,
    writer: Mutex<Option<Box<dyn LogWriter>>>,
}

impl DeadLetters {
    pub fn new(log: Arc<dyn Log>, connector: &str, topic: &str) -> Self {
        DeadLetters { log, connector: connector.to_owned(), topic: topic.into(), writer: Mutex::new(None) }
    }

    /// Copies the record, with headers that say where it is from and why it is here; their names are Kafka Connect's.
    pub async fn copy(&self, record: &ConsumedRecord, reason: &str) -> Result<(), Fault> {
        let late = |_| Fault::unavailable(format!("topic '{}' took no dead letter in time", self.topic), None);
        tokio::time::timeout(DEADLINE, self.write(record, reason)).await.map_err(late)?
    }

    async fn write(&self, record: &ConsumedRecord, reason: &str) -> Result<(), Fault> {
        let mut writer = self.writer.lock().await;
        if writer.is_none() {
            let topic = TopicSpec {
                name: self.topic.to_string(),
                partitions: 1,
                replication_factor: None,
                settings: BTreeMap::new(),
            };
            self.log.ensure_topic(&topic).await?;
            *writer = Some(self.log.writer(&format!("dead-letters/{}", self.connector)).await?);
        }
        let Some(open) = writer.as_mut() else { return Ok(()) };
        let (partition, offset) = (record.partition.to_string(), record.offset.to_string());
        let mut batch = RecordBatch::new();
        let mut headers: Vec<(&str, &[u8])> =
            record.headers.iter().map(|(name, value)| (name.as_ref(), value.as_ref())).collect();
        headers.extend([
            ("__connect.errors.topic", record.topic.as_bytes()),
            ("__connect.errors.partition", partition.as_bytes()),
            ("__connect.errors.offset", offset.as_bytes()),
            ("__connect.errors.connector.name", self.connector.as_bytes()),
            ("__connect.errors.stage", b"TASK_PUT".as_slice()),
            ("__connect.errors.exception.message", reason.as_bytes()),
        ]);
        let headers = batch.header_set(headers);
        batch.push(&self.topic, record.key.as_deref(), record.value.as_deref(), &headers);
        let written = match open.append(batch, None).await {
            Ok(ticket) => ticket.await.map(drop),
            Err(error) => Err(error),
        };
        if written.is_err() {
            // A writer that failed once fails for good.
            *writer = None;
        }
        Ok(written?)
    }
}
