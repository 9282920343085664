//! A capture from one database into an embedded log, run in the test's own process, and what it wrote, decoded.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tidegate::datastore::{Datastore, DatastoreSettings};
use tidegate::event::{CapturePosition, Change, Lsn};
use tidegate::log::embedded::{EmbeddedLog, EmbeddedSettings};
use tidegate::log::{ConsumedRecord, Log, PollLimit, StartAt, StopAt};
use tidegate::pipeline::{ConnectorContext, Control, Fault, Plan, Signal, Status};
use tidegate::postgres::table_filter::pattern;
use tidegate::registry::{EventDecoder, Registry, RegistryError, SchemaId};

use tidegate::sinks::log::{LogDestination, stored_position};
use tidegate::sources::postgres::{CaptureSettings, PostgresSource};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Database, Gate, eventually};

/// Schemas in memory: what a capture needs of a registry.
#[derive(Default)]
pub struct MemoryRegistry {
    schemas: Mutex<Vec<(String, Arc<str>)>>,
}

#[async_trait]
impl Registry for MemoryRegistry {
    async fn register(&self, subject: &str, schema: &str) -> Result<SchemaId, RegistryError> {
        let mut schemas = self.schemas.lock().unwrap();
        let known = schemas.iter().position(|(name, text)| name == subject && &**text == schema);
        let at = known.unwrap_or_else(|| {
            schemas.push((subject.to_owned(), schema.into()));
            schemas.len() - 1
        });
        Ok(SchemaId(at as u32 + 1))
    }

    async fn schema(&self, id: SchemaId) -> Result<Arc<str>, RegistryError> {
        let schemas = self.schemas.lock().unwrap();
        schemas.get(id.0 as usize - 1).map(|(_, text)| text.clone()).ok_or(RegistryError::UnknownId(id.0))
    }

    async fn lookup(&self, subject: &str, schema: &str) -> Result<Option<SchemaId>, RegistryError> {
        let schemas = self.schemas.lock().unwrap();
        let known = schemas.iter().position(|(name, text)| name == subject && &**text == schema);
        Ok(known.map(|at| SchemaId(at as u32 + 1)))
    }
}

/// What changes did, a letter each.
pub fn letters(changes: &[Change]) -> String {
    changes.iter().map(|change| change.operation.letter()).collect()
}

/// A log in a folder of its own, and a registry.
pub struct World {
    pub log: Arc<dyn Log>,
    pub registry: Arc<dyn Registry>,
    pub url: String,
    pub settings: CaptureSettings,
    decoder: EventDecoder,
    /// What the capture started last says of itself, for a wait that ends in vain.
    last: Mutex<Option<Arc<Status>>>,
    pub folder: tempfile::TempDir,
}

/// A capture that runs.
pub struct Running {
    pub status: Arc<Status>,
    signal: watch::Sender<Signal>,
    abort: CancellationToken,
    task: JoinHandle<Result<(), Fault>>,
}

impl World {
    /// Captures the tables that match, with a slot named after the database.
    pub fn new(database: &Database<'_>, tables: &[&str]) -> Self {
        Self::with_registry(database, tables, Arc::new(MemoryRegistry::default()))
    }

    /// One whose capture has read what there is, and streams.
    pub async fn streaming(database: &Database<'_>, tables: &[&str]) -> (Self, Running) {
        let world = Self::new(database, tables);
        let capture = world.start_streaming().await;
        (world, capture)
    }

    /// One whose captures are held, while the gate is shut, before they send `text` to the server.
    pub async fn gated(database: &Database<'_>, tables: &[&str], text: &'static str) -> (Self, Gate) {
        let gate = Gate::before(database.server.port(), text).await;
        let mut world = Self::new(database, tables);
        world.url = database.url_at(gate.port);
        (world, gate)
    }

    pub fn with_registry(database: &Database<'_>, tables: &[&str], registry: Arc<dyn Registry>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = EmbeddedLog::open(EmbeddedSettings::new(folder.path())).unwrap();
        let mut settings = CaptureSettings::new(&database.name);
        settings.prefix = "shop".into();
        settings.encoding.prefix = "shop".into();
        settings.idle_advance = Duration::from_secs(1);
        settings.tables.table_include = tables.iter().map(|table| pattern(table).unwrap()).collect();
        World {
            log: Arc::new(log),
            decoder: EventDecoder::new(registry.clone()),
            registry,
            url: database.url(),
            settings,
            last: Mutex::default(),
            folder,
        }
    }

    /// The position that the log holds.
    pub async fn position(&self) -> Option<CapturePosition> {
        let mut writer = self.log.writer("capture").await.unwrap();
        writer.position().await.unwrap().map(|bytes| serde_json::from_slice(&bytes).unwrap())
    }

    /// What `plan` says in a process of its own, which only reads the log.
    pub async fn plan(&self) -> Plan {
        let log: Arc<dyn Log> = Arc::new(EmbeddedLog::open_reader(self.folder.path()).unwrap());
        let stored = stored_position(&log, "capture").await.unwrap();
        let datastore = DatastoreSettings::from_url(&self.url).unwrap();
        let address = self.settings.address(&datastore).unwrap();
        tidegate::sources::postgres::plan("capture", &self.settings, &address, &log, &self.registry, stored.as_ref())
            .await
            .unwrap()
    }

    pub async fn start(&self) -> Running {
        self.begin(false).await
    }

    /// As a person's restart does: tables in quarantine are read anew.
    pub async fn start_releasing(&self) -> Running {
        self.begin(true).await
    }

    async fn begin(&self, release: bool) -> Running {
        let datastore = DatastoreSettings::from_url(&self.url).unwrap();
        let (signal, receiver) = watch::channel(Signal::Run);
        let abort = CancellationToken::new();
        let status = Arc::new(Status::default());
        *self.last.lock().unwrap() = Some(status.clone());
        let context = ConnectorContext {
            name: "capture".into(),
            log: self.log.clone(),
            registry: self.registry.clone(),
            datastore: Datastore::open(&datastore).unwrap(),
            control: Control::new(receiver, abort.clone()),
            status: status.clone(),
        };
        let address = self.settings.address(&datastore).unwrap();
        let destination = LogDestination::open(self.log.clone(), "capture").await.unwrap();
        let source = PostgresSource::new(
            self.settings.clone(),
            address,
            context.name.clone(),
            self.log.clone(),
            self.registry.clone(),
            status.clone(),
            destination.stored(),
        )
        .releasing(release);
        let task = tokio::spawn(async move { tidegate::pipeline::run(source, destination, &context).await });
        Running { status, signal, abort, task }
    }

    /// Starts it, and waits until it streams.
    pub async fn start_streaming(&self) -> Running {
        let capture = self.start().await;
        capture.streaming().await;
        capture
    }

    /// All records of a topic so far; none where it is not there.
    pub async fn records(&self, topic: &str) -> Vec<ConsumedRecord> {
        let mut all = Vec::new();
        let Ok(mut reader) = self.log.reader(topic, StartAt::Beginning, StopAt::End).await else { return all };
        let limit = PollLimit { bytes: 8 << 20, records: 100_000, wait: Duration::from_millis(20) };
        while !reader.at_end() {
            all.extend(reader.poll(&limit).await.unwrap());
        }
        all
    }

    /// Change events of a topic so far, without tombstones.
    pub async fn changes(&self, topic: &str) -> Vec<Change> {
        let mut changes = Vec::new();
        for record in self.records(topic).await {
            changes.extend(self.decoder.change(&record).await.unwrap());
        }
        changes
    }

    /// Keys and values of a topic with numbers as in Avro; null for a tombstone.
    pub async fn raw(&self, topic: &str) -> Vec<(Value, Value)> {
        let mut all = Vec::new();
        for record in self.records(topic).await {
            let mut both = [Value::Null, Value::Null];
            for (to, bytes) in both.iter_mut().zip([&record.key, &record.value]) {
                if let Some(bytes) = bytes {
                    *to = self.decoder.raw(bytes).await.unwrap();
                }
            }
            let [key, value] = both;
            all.push((key, value));
        }
        all
    }

    /// The table as the topic has it: the last row of each key.
    pub async fn folded(&self, topic: &str) -> BTreeMap<String, Value> {
        let mut rows = BTreeMap::new();
        for change in self.changes(topic).await {
            match &change.after {
                Value::Null => rows.remove(&change.key.to_string()),
                row => rows.insert(change.key.to_string(), row.clone()),
            };
        }
        rows
    }

    /// Waits until the topic has this many change events.
    pub async fn wait_for_changes(&self, topic: &str, count: usize) -> Vec<Change> {
        eventually(Duration::from_secs(60), &format!("{count} changes in {topic}"), async || {
            let changes = self.changes(topic).await;
            if changes.len() >= count {
                return Ok(changes);
            }
            Err(format!("{} changes; the capture: {}", changes.len(), self.told()))
        })
        .await
    }

    /// What the capture started last says of itself.
    fn told(&self) -> String {
        let last = self.last.lock().unwrap();
        let Some(status) = &*last else { return "never started".into() };
        format!("{:?}, {:?}, {:?}, {:?}", status.state(), status.facts(), status.progress(), status.last_error())
    }
}

/// The table as PostgreSQL has it: rows as JSON by key `id`.
pub async fn rows(client: &tokio_postgres::Client, table: &str) -> BTreeMap<String, Value> {
    let sql = format!("SELECT json_build_object('id', id)::text, to_json(t)::text FROM {table} t");
    let mut rows = BTreeMap::new();
    for row in client.query(&sql, &[]).await.unwrap() {
        let key: Value = serde_json::from_str(row.get(0)).unwrap();
        rows.insert(key.to_string(), serde_json::from_str(row.get(1)).unwrap());
    }
    rows
}

/// Waits until the topic, folded by key, is the table.
pub async fn wait_for_equality(world: &World, client: &tokio_postgres::Client, table: &str) {
    eventually(Duration::from_secs(60), "the folded topic equals the table", async || {
        let (have, want) = (world.folded(&format!("shop.public.{table}")).await, rows(client, table).await);
        if have == want {
            return Ok(());
        }
        let wrong: Vec<_> = want.iter().filter(|(key, row)| have.get(*key) != Some(row)).take(3).collect();
        let extra: Vec<_> = have.keys().filter(|key| !want.contains_key(*key)).take(3).collect();
        Err(format!("{} rows, not {}; of the table: {wrong:?}; not of it: {extra:?}", have.len(), want.len()))
    })
    .await;
}

/// What the server knows to be durable.
pub async fn confirmed(client: &tokio_postgres::Client, world: &World) -> Lsn {
    let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
    let row = client.query_one(sql, &[&world.settings.slot]).await.unwrap();
    row.get::<_, Option<String>>(0).map(|lsn| lsn.parse().unwrap()).unwrap_or_default()
}

impl Running {
    /// Waits until the snapshot is whole and changes are streamed.
    pub async fn streaming(&self) {
        eventually(Duration::from_secs(60), "streaming", async || match self.status.facts().get("stage") {
            Some(stage) if stage == "streaming" => Ok(()),
            other => Err(format!("{other:?}, {:?}", self.status.last_error())),
        })
        .await;
    }

    /// Waits until the server is asked for a slot, which it makes when every transaction under way has ended.
    pub async fn making_slot(&self) {
        eventually(Duration::from_secs(30), "the slot is being made", async || {
            self.status.progress().is_some_and(|progress| progress.contains("making slot"))
        })
        .await;
    }

    /// Waits until the connector shows this error.
    pub async fn error(&self, part: &str) -> String {
        eventually(Duration::from_secs(60), &format!("an error with '{part}'"), async || {
            match self.status.last_error() {
                Some((_, error)) if error.contains(part) => Ok(error),
                other => Err(format!("{other:?}")),
            }
        })
        .await
    }

    pub fn pause(&self) {
        self.signal.send_replace(Signal::Pause);
    }

    pub fn resume(&self) {
        self.signal.send_replace(Signal::Run);
    }

    pub async fn stop(self) -> Result<(), Fault> {
        self.signal.send_replace(Signal::Stop);
        tokio::time::timeout(Duration::from_secs(60), self.task).await.expect("stops").expect("no panic")
    }

    /// Ends it where it stands, as a crash would.
    pub async fn crash(self) {
        self.abort.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(10), self.task).await;
    }

    /// What it ended with by itself.
    pub async fn ended(self) -> Result<(), Fault> {
        tokio::time::timeout(Duration::from_secs(60), self.task).await.expect("ends").expect("no panic")
    }
}
