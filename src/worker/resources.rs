//! What connectors share: the log, the registry, the datastore.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::absent::{AbsentLog, AbsentRegistry};
use super::kinds;
use super::settings::{LogSettings, RegistrySettings, WorkerSettings};
use super::state::{Remembered, StateError};
use crate::datastore::{self, Datastore, DatastoreError, ParkedKind};
use crate::log::{EmbeddedLog, Log, LogError};
use crate::pipeline::{ConnectorContext, Control, Fault, Signal, Status};
use crate::registry::Registry;

/// Why a worker, or a command, could not open what the settings name.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("{0}")]
    Folder(String),
    #[error("{0}")]
    Log(#[from] LogError),
    #[error("{0}")]
    Registry(String),
    #[error("{0}")]
    Datastore(#[from] DatastoreError),
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Resources {
    pub log: Arc<dyn Log>,
    pub registry: Arc<dyn Registry>,
    pub datastore: Datastore,
}

/// How far a command may go with what it opens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The worker's: one at a time for the embedded log and the built-in registry.
    Write,
    /// Beside a running worker; the log must be there.
    Read,
    /// Beside a running worker, or before the first.
    Plan,
}

impl Resources {
    pub async fn open(settings: &WorkerSettings) -> Result<Self, OpenError> {
        Self::open_for(settings, Access::Write).await
    }

    pub async fn open_for(settings: &WorkerSettings, access: Access) -> Result<Self, OpenError> {
        let log = open_log(&settings.log, access)?;
        let registry = open_registry(settings, access)?;
        let datastore = Datastore::open(&settings.datastore)?;
        Ok(Resources { log, registry, datastore })
    }

    pub fn context(&self, name: Arc<str>, control: Control, status: Arc<Status>) -> ConnectorContext {
        ConnectorContext {
            name,
            log: self.log.clone(),
            registry: self.registry.clone(),
            datastore: self.datastore.clone(),
            control,
            status,
        }
    }

    /// A context for work outside of a running connector: plan, preview, reset.
    pub fn still(&self, name: &str) -> ConnectorContext {
        let (_, signal) = tokio::sync::watch::channel(Signal::Run);
        self.context(name.into(), Control::new(signal, Default::default()), Arc::default())
    }

    /// Parked records that need a person, by connector.
    pub async fn dead_letters(&self) -> Result<BTreeMap<String, u64>, DatastoreError> {
        let client = self.datastore.client().await?;
        let counted = datastore::parked_counts(&client).await?;
        let rejected = counted.into_iter().filter(|(_, kind, _)| *kind == ParkedKind::Rejected);
        Ok(rejected.map(|(name, _, count)| (name, count.max(0) as u64)).collect())
    }

    /// Removes what a connector left behind: its slot, its consumer groups.
    pub async fn forget(&self, name: &str, known: &Remembered) -> Result<String, Fault> {
        let mut said = vec![kinds::forget(&known.kind, &known.identity, &self.still(name)).await?];
        for group in &known.groups {
            self.log.remove_group(group).await?;
            said.push(format!("consumer group '{group}' removed"));
        }
        said.retain(|text| !text.is_empty());
        said.push(format!("'{name}' is forgotten"));
        Ok(said.join("; "))
    }

    #[cfg(test)]
    pub fn for_tests(folder: &std::path::Path) -> Self {
        let nowhere = crate::datastore::DatastoreSettings::from_url("postgres://nobody@127.0.0.1:1/none").unwrap();
        Resources {
            log: Arc::new(EmbeddedLog::open(crate::log::EmbeddedSettings::new(folder)).unwrap()),
            registry: Arc::new(super::absent::AbsentRegistry),
            datastore: Datastore::open(&nowhere).unwrap(),
        }
    }

    pub async fn close(&self) -> Result<(), Fault> {
        self.log.close().await?;
        self.datastore.close();
        Ok(())
    }
}

pub fn open_log(settings: &LogSettings, access: Access) -> Result<Arc<dyn Log>, LogError> {
    Ok(match settings {
        LogSettings::Embedded(settings) => match access {
            Access::Write => Arc::new(EmbeddedLog::open(settings.clone())?),
            Access::Plan if !settings.path.join("log.db").exists() => Arc::new(AbsentLog),
            Access::Read | Access::Plan => Arc::new(EmbeddedLog::open_reader(&settings.path)?),
        },
        #[cfg(feature = "kafka")]
        LogSettings::Kafka(settings) => return Err(LogError::Invalid(format!("not yet: {}", settings.len()))),
        #[cfg(not(feature = "kafka"))]
        LogSettings::Kafka(_) => {
            return Err(LogError::Invalid(
                "this tidegate was built without Kafka. hint: build it with the feature 'kafka', or use log.type: embedded".into(),
            ));
        }
    })
}

pub fn open_registry(settings: &WorkerSettings, _access: Access) -> Result<Arc<dyn Registry>, OpenError> {
    match &settings.registry {
        RegistrySettings::Builtin => Ok(Arc::new(AbsentRegistry)),
        RegistrySettings::Url { url, .. } => Err(OpenError::Registry(format!("{url} can't be asked yet"))),
    }
}
