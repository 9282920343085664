//! What table events carry beside key and value, and the topic of logical messages.

use std::sync::Arc;

use crate::avro::{EventMeta, HeartbeatPlan, MessagePlan, SnapshotMarker};
use crate::event::{HeaderSet, RecordBatch};
use crate::log::TopicSpec;
use crate::pipeline::Fault;

use super::relations::Resolver;

/// The `__debezium.context.*` headers of this run.
pub(super) struct Context {
    prefix: String,
    run: String,
}

impl Context {
    pub(super) fn new(prefix: &str) -> Self {
        Context { prefix: prefix.to_owned(), run: uuid::Uuid::now_v7().to_string() }
    }

    /// Writes the headers into a batch, behind `first` where a row got another key.
    pub(super) fn headers(&self, batch: &mut RecordBatch, first: Option<(&str, &[u8])>) -> HeaderSet {
        let context = [
            ("__debezium.context.connectorLogicalName", self.prefix.as_bytes()),
            ("__debezium.context.taskId", b"0".as_slice()),
            ("__debezium.context.connectorName", b"postgresql".as_slice()),
            ("__debezium.context.runId", self.run.as_bytes()),
        ];
        batch.header_set(first.into_iter().chain(context))
    }
}

/// `source.snapshot` of a row by its place. Of several the first here wins, as Debezium has it: the snapshot's last, its
/// first, a table's last, a table's first.
pub(super) fn snapshot_marker(very_first: bool, first: bool, last: bool, very_last: bool) -> SnapshotMarker {
    match (very_last, very_first, last, first) {
        (true, ..) => SnapshotMarker::Last,
        (_, true, ..) => SnapshotMarker::First,
        (_, _, true, _) => SnapshotMarker::LastInDataCollection,
        (.., true) => SnapshotMarker::FirstInDataCollection,
        _ => SnapshotMarker::True,
    }
}

/// Where logical messages go.
pub(super) struct MessageTopic {
    topic: Arc<str>,
    plan: MessagePlan,
}

impl MessageTopic {
    /// Makes the topic and registers its schemas.
    pub(super) async fn ready(resolver: Resolver) -> Result<Self, Fault> {
        let topic = format!("{}.message", resolver.settings.prefix);
        resolver.log.ensure_topic(&resolver.settings.topic(&topic)).await.map_err(Fault::from)?;
        let schemas = MessagePlan::schemas();
        let key = resolver.registry.register(&format!("{topic}-key"), &schemas.key).await?;
        let value = resolver.registry.register(&format!("{topic}-value"), &schemas.value).await?;
        Ok(MessageTopic { topic: topic.into(), plan: MessagePlan::new(key.0, value.0) })
    }

    pub(super) fn write(&self, batch: &mut RecordBatch, meta: &EventMeta<'_>, prefix: &str, content: &[u8]) {
        let slot = batch.topic_slot(&self.topic);
        let mut record = batch.record(slot, &HeaderSet::default());
        record.key(|out| self.plan.write_key(prefix, out));
        record.value(|out| self.plan.write_value(prefix, content, meta, out));
        record.finish();
    }
}

/// Where heartbeats go.
pub(super) struct HeartbeatTopic {
    topic: Arc<str>,
    prefix: String,
    plan: HeartbeatPlan,
}

impl HeartbeatTopic {
    /// Makes the topic and registers its schemas.
    pub(super) async fn ready(resolver: Resolver) -> Result<Self, Fault> {
        let prefix = resolver.settings.prefix.clone();
        let topic = HeartbeatPlan::topic(&prefix);
        let spec = TopicSpec { partitions: 1, ..resolver.settings.topic(&topic) };
        resolver.log.ensure_topic(&spec).await.map_err(Fault::from)?;
        let schemas = HeartbeatPlan::schemas();
        let key = resolver.registry.register(&format!("{topic}-key"), &schemas.key).await?;
        let value = resolver.registry.register(&format!("{topic}-value"), &schemas.value).await?;
        Ok(HeartbeatTopic { topic: topic.into(), prefix, plan: HeartbeatPlan::new(key.0, value.0) })
    }

    pub(super) fn write(&self, batch: &mut RecordBatch, now_ms: i64) {
        let slot = batch.topic_slot(&self.topic);
        let mut record = batch.record(slot, &HeaderSet::default());
        record.key(|out| self.plan.write_key(&self.prefix, out));
        record.value(|out| self.plan.write_value(now_ms, out));
        record.finish();
    }
}
