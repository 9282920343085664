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
use crate::registry::{BuiltinRegistry, Registry, RegistryClient, RegistryError};

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
    /// Where the registry is the built-in one.
    pub builtin: Option<BuiltinRegistry>,
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
        let log = open_log(&settings.log, access).await?;
        let OpenRegistry { registry, builtin } = open_registry(settings, access)?;
        let datastore = Datastore::open(&settings.datastore)?;
        Ok(Resources { log, registry, builtin, datastore })
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

    /// Parked records by connector: those that need a person, and those that wait for something.
    pub async fn parked(&self) -> Result<BTreeMap<String, [u64; 2]>, DatastoreError> {
        let client = self.datastore.client().await?;
        let mut all: BTreeMap<String, [u64; 2]> = BTreeMap::new();
        // Captures alone never make it.
        if !datastore::has_parked(&client).await? {
            return Ok(all);
        }
        for (name, kind, count) in datastore::parked_counts(&client, None).await? {
            all.entry(name).or_default()[usize::from(kind != ParkedKind::Rejected)] += count.max(0) as u64;
        }
        Ok(all)
    }

    /// Removes what a connector left behind: its slot (unless that is to be kept), its consumer groups, its cursor and
    /// its parked records.
    pub async fn forget(&self, name: &str, known: &Remembered, keep_slot: bool) -> Result<String, Fault> {
        let mut said = Vec::new();
        match (&known.server, keep_slot) {
            (_, true) => {}
            (None, false) => said.push(kinds::forget(&known.kind, &known.identity, &self.still(name)).await?),
            (Some(server), false) => {
                return Err(Fault::stop(format!(
                    "what '{name}' left is on {server}, which only its file had the password of; hint: run there: {} \
                     and then 'tidegate connectors forget {name} --keep-slot'",
                    kinds::forget_sql(&known.kind, &known.identity).join(" ")
                )));
            }
        }
        for group in &known.groups {
            self.log.remove_group(group).await?;
            said.push(format!("consumer group '{group}' removed"));
        }
        // After the group, which is not removed while another worker is in it.
        let client = self.datastore.client().await?;
        match datastore::forget_connector(&client, name).await? {
            0 => {}
            1 => said.push("1 parked record dropped".to_owned()),
            parked => said.push(format!("{parked} parked records dropped")),
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
            registry: Arc::new(AbsentRegistry),
            builtin: None,
            datastore: Datastore::open(&nowhere).unwrap(),
        }
    }

    pub async fn close(&self) -> Result<(), Fault> {
        self.log.close().await?;
        self.datastore.close();
        Ok(())
    }
}

pub async fn open_log(settings: &LogSettings, access: Access) -> Result<Arc<dyn Log>, LogError> {
    Ok(match settings {
        LogSettings::Embedded(settings) => match access {
            Access::Write => Arc::new(EmbeddedLog::open(settings.clone())?),
            Access::Plan if !settings.path.join("log.db").exists() => Arc::new(AbsentLog),
            Access::Read | Access::Plan => Arc::new(EmbeddedLog::open_reader(&settings.path)?),
        },
        #[cfg(feature = "kafka")]
        LogSettings::Kafka(settings) => Arc::new(crate::log::KafkaLog::open(settings.clone()).await?),
    })
}

pub fn open_registry(settings: &WorkerSettings, access: Access) -> Result<OpenRegistry, OpenError> {
    let folder = &settings.state;
    let builtin = match (&settings.registry, access) {
        (RegistrySettings::Url { url, auth }, _) => {
            let client =
                RegistryClient::new(url, auth.clone()).map_err(|error| OpenError::Registry(error.to_string()))?;
            return Ok(OpenRegistry { registry: Arc::new(client), builtin: None });
        }
        (RegistrySettings::Builtin, Access::Write) => BuiltinRegistry::open(folder),
        (RegistrySettings::Builtin, Access::Read | Access::Plan) => {
            match BuiltinRegistry::open_reader(folder) {
                // Before the first run there is none: everything is still to be registered.
                Err(RegistryError::Rejected(_)) if access == Access::Plan => {
                    return Ok(OpenRegistry { registry: Arc::new(AbsentRegistry), builtin: None });
                }
                opened => opened,
            }
        }
    };
    let builtin = builtin.map_err(|error| OpenError::Registry(error.to_string()))?;
    Ok(OpenRegistry { registry: Arc::new(builtin.clone()), builtin: Some(builtin) })
}

/// A registry by its contract, and the built-in one itself where it is that, to be served over HTTP.
pub struct OpenRegistry {
    pub registry: Arc<dyn Registry>,
    pub builtin: Option<BuiltinRegistry>,
}
