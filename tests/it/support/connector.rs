//! A connector of its YAML text, run inside the test on a real database, without a worker around it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tidegate::config::{Section, Spanned, parse_text};
use tidegate::datastore::{Datastore, DatastoreSettings};
use tidegate::log::{EmbeddedLog, EmbeddedSettings, Log};
use tidegate::pipeline::{ConnectorContext, ConnectorState, Control, Fault, Signal, Status};
use tidegate::registry::{Registry, RegistryError, SchemaId};
use tidegate::systems::{System, SystemSettings};
use tidegate::worker::kinds::{Connector, World, read};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::postgres::Database;
use super::process::Folder;
use super::wait::eventually;

/// What connectors of a test share.
pub struct Stage {
    pub systems: BTreeMap<String, Arc<System>>,
    pub datastore: Datastore,
    log: Arc<dyn Log>,
    folder: Folder,
}

/// For connectors that write no events.
struct NoRegistry;

#[async_trait]
impl Registry for NoRegistry {
    async fn register(&self, _: &str, _: &str) -> Result<SchemaId, RegistryError> {
        Err(RegistryError::Unavailable("this test has none".into()))
    }

    async fn schema(&self, _: SchemaId) -> Result<Arc<str>, RegistryError> {
        Err(RegistryError::Unavailable("this test has none".into()))
    }

    async fn lookup(&self, _: &str, _: &str) -> Result<Option<SchemaId>, RegistryError> {
        Err(RegistryError::Unavailable("this test has none".into()))
    }
}

/// A system of the YAML text of its settings.
pub fn system(name: &str, yaml: &str) -> Arc<System> {
    let section = Section::new(parse_text(yaml, "systems.yaml").unwrap(), name).unwrap();
    System::new(SystemSettings::read(name, section).unwrap()).unwrap()
}

impl Stage {
    /// `systems`: name and YAML text of each.
    pub async fn new(database: &Database<'_>, systems: &[(&str, &str)]) -> Stage {
        let datastore = Datastore::open(&DatastoreSettings::from_url(&database.url()).unwrap()).unwrap();
        datastore.migrate().await.unwrap();
        let folder = Folder::new("stage");
        let log = EmbeddedLog::open(EmbeddedSettings::new(folder.path().join("log"))).unwrap();
        let systems = systems.iter().map(|(name, yaml)| ((*name).to_owned(), system(name, yaml))).collect();
        Stage { systems, datastore, log: Arc::new(log), folder }
    }

    pub fn connector(&self, yaml: &str) -> (String, Arc<dyn Connector>) {
        let mut section = Section::new(parse_text(yaml, "connector.yaml").unwrap(), "connector").unwrap();
        let name: String = section.require("name").unwrap();
        let kind: Spanned<String> = section.require("type").unwrap();
        let world = World { systems: &self.systems, state: self.folder.path() };
        let connector = read(&kind, &mut section, &world).unwrap_or_else(|error| panic!("{error}"));
        section.finish().unwrap_or_else(|error| panic!("{error}"));
        (name, connector)
    }

    fn context(&self, name: &str) -> (ConnectorContext, watch::Sender<Signal>) {
        let (signal, receiver) = watch::channel(Signal::Run);
        let context = ConnectorContext {
            name: Arc::from(name),
            log: Arc::clone(&self.log),
            registry: Arc::new(NoRegistry),
            datastore: self.datastore.clone(),
            control: Control::new(receiver, CancellationToken::new()),
            status: Arc::new(Status::default()),
        };
        (context, signal)
    }

    pub fn start(&self, yaml: &str) -> Running {
        let (name, connector) = self.connector(yaml);
        let (context, signal) = self.context(&name);
        let status = Arc::clone(&context.status);
        let task = tokio::spawn(async move { connector.run(context).await });
        Running { status, signal, task }
    }

    pub async fn preview(&self, yaml: &str) -> Vec<Value> {
        let (name, connector) = self.connector(yaml);
        let (context, _signal) = self.context(&name);
        connector.preview(&context, 100).await.unwrap()
    }

    pub async fn reset(&self, yaml: &str, to: &tidegate::pipeline::ResetTo) -> String {
        let (name, connector) = self.connector(yaml);
        let (context, _signal) = self.context(&name);
        connector.reset(&context, to).await.unwrap()
    }

    /// Runs it until it has come to the end of a listing, then stops it. There is one only: a second one, begun before
    /// the stop, would be left in its middle, and the next start would go on there.
    pub async fn run_once(&self, yaml: &str) -> Arc<Status> {
        let hourly = yaml.lines().map(|line| if line.starts_with("every:") { "every: 1h" } else { line });
        let running = self.start(&hourly.collect::<Vec<_>>().join("\n"));
        running.ended_a_run().await;
        let status = Arc::clone(&running.status);
        running.stop().await.unwrap();
        status
    }
}

pub struct Running {
    pub status: Arc<Status>,
    signal: watch::Sender<Signal>,
    task: JoinHandle<Result<(), Fault>>,
}

impl Running {
    /// The first run that ends from now on.
    pub async fn ended_a_run(&self) {
        let runs = || self.status.facts().get("runs").and_then(Value::as_u64).unwrap_or(0);
        let before = runs();
        eventually(Duration::from_secs(20), "a run has ended", async || {
            if self.task.is_finished() {
                panic!("the connector has ended: {:?}", self.status.last_error());
            }
            if runs() > before { Ok(()) } else { Err(format!("{:?}", self.status.last_error())) }
        })
        .await;
    }

    pub async fn stop(self) -> Result<(), Fault> {
        let _ = self.signal.send(Signal::Stop);
        tokio::time::timeout(Duration::from_secs(20), self.task).await.expect("it stops").expect("no panic")
    }

    /// As when the process is killed: everything is dropped where it stands.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// The fault that it ended with by itself.
    pub async fn fails(self) -> String {
        let ended = tokio::time::timeout(Duration::from_secs(20), self.task).await.expect("it ends").expect("no panic");
        ended.expect_err("a fault").message
    }

    pub fn state(&self) -> ConnectorState {
        self.status.state()
    }
}
