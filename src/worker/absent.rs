//! A log and a registry that are not there yet: `plan` looks at them before the first run. Everything is still to
//! be made, and nothing can be written.

use std::sync::Arc;

use async_trait::async_trait;

use crate::log::{
    Log, LogConsumer, LogError, LogReader, LogWriter, Loss, PartitionLag, StartAt, StopAt, TopicInfo, TopicSpec,
};
use crate::registry::{Registry, RegistryError, SchemaId};

pub struct AbsentLog;

fn absent<T>() -> Result<T, LogError> {
    Err(LogError::Invalid("the log is not there yet. hint: 'tidegate run' makes it".into()))
}

#[async_trait]
impl Log for AbsentLog {
    fn kind(&self) -> &'static str {
        "embedded"
    }

    async fn ensure_topic(&self, _: &TopicSpec) -> Result<(), LogError> {
        absent()
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>, LogError> {
        Ok(Vec::new())
    }

    async fn writer(&self, _: &str) -> Result<Box<dyn LogWriter>, LogError> {
        absent()
    }

    async fn position(&self, _: &str) -> Result<Option<Vec<u8>>, LogError> {
        Ok(None)
    }

    async fn consumer(&self, _: &str, _: &[String]) -> Result<Box<dyn LogConsumer>, LogError> {
        absent()
    }

    async fn reader(&self, topic: &str, _: StartAt, _: StopAt) -> Result<Box<dyn LogReader>, LogError> {
        Err(LogError::UnknownTopic(topic.to_owned()))
    }

    async fn group_lag(&self, _: &str) -> Result<Vec<PartitionLag>, LogError> {
        Ok(Vec::new())
    }

    async fn losses(&self) -> Result<Vec<Loss>, LogError> {
        Ok(Vec::new())
    }

    async fn reset_group(&self, _: &str, _: &[String], _: StartAt) -> Result<(), LogError> {
        absent()
    }

    async fn register_group(&self, _: &str, _: &[String]) -> Result<(), LogError> {
        absent()
    }

    async fn remove_group(&self, _: &str) -> Result<(), LogError> {
        absent()
    }

    async fn close(&self) -> Result<(), LogError> {
        Ok(())
    }
}

pub struct AbsentRegistry;

#[async_trait]
impl Registry for AbsentRegistry {
    async fn register(&self, _: &str, _: &str) -> Result<SchemaId, RegistryError> {
        Err(RegistryError::Rejected("the registry is not there yet. hint: 'tidegate run' makes it".into()))
    }

    async fn schema(&self, id: SchemaId) -> Result<Arc<str>, RegistryError> {
        Err(RegistryError::UnknownId(id.0))
    }

    async fn lookup(&self, _: &str, _: &str) -> Result<Option<SchemaId>, RegistryError> {
        Ok(None)
    }
}
