//! A shop's datastore with an embedded log, in this process: changes of its tables become events by triggers, so that
//! deliveries are tried by themselves, whatever captures for real.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tidegate::config::{Section, parse_text};
use tidegate::datastore::{Datastore, DatastoreSettings, ParkedSummary, list_parked};
use tidegate::event::RecordBatch;
use tidegate::log::{EmbeddedLog, EmbeddedSettings, Log, TopicSpec};
use tidegate::pipeline::{self, ConnectorContext, Control, Fault, Signal, Status};
use tidegate::registry::{Registry, RegistryError, SchemaId};
use tidegate::sinks::http;
use tidegate::systems::{System, SystemSettings};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::postgres::{Database, Postgres, Version};
use super::process::Folder;

pub struct Shop {
    pub database: Database<'static>,
    pub datastore: Datastore,
    pub log: Arc<dyn Log>,
    registry: Arc<dyn Registry>,
    sql: tokio_postgres::Client,
    capture: JoinHandle<()>,
    folder: Folder,
}

const TABLES: &str = "
CREATE TABLE customers (id bigint PRIMARY KEY, name text, street text, city text, price numeric(10,2));
CREATE TABLE orders (id bigint PRIMARY KEY, number text, customer_id bigint, placed_at timestamptz, status text);
CREATE TABLE order_lines (id bigint PRIMARY KEY, order_id bigint, product_id bigint, quantity int, price numeric(10,2));
CREATE SCHEMA capture;
CREATE TABLE capture.events (seq bigserial PRIMARY KEY, op text, tab text, old jsonb, new jsonb);
CREATE FUNCTION capture.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO capture.events (op, tab, old, new) VALUES (lower(left(TG_OP, 1)), TG_TABLE_NAME, to_jsonb(OLD), to_jsonb(NEW));
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON customers FOR EACH ROW EXECUTE FUNCTION capture.note();
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON orders FOR EACH ROW EXECUTE FUNCTION capture.note();
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON order_lines FOR EACH ROW EXECUTE FUNCTION capture.note();";

impl Shop {
    pub async fn start(name: &str) -> Shop {
        let postgres = Postgres::shared(Version::Distribution).await;
        let database = postgres.database(name).await;
        database.execute(TABLES).await;
        let datastore = Datastore::open(&DatastoreSettings::from_url(&database.url()).unwrap()).unwrap();
        datastore.migrate().await.unwrap();
        let folder = Folder::new("shop");
        let log: Arc<dyn Log> = Arc::new(EmbeddedLog::open(EmbeddedSettings::new(folder.path().join("log"))).unwrap());
        for table in ["customers", "orders", "order_lines"] {
            let spec = TopicSpec {
                name: format!("shop.public.{table}"),
                partitions: 1,
                replication_factor: None,
                settings: Default::default(),
            };
            log.ensure_topic(&spec).await.unwrap();
        }
        let capture = tokio::spawn(capture(database.connect().await, log.clone()));
        let sql = database.connect().await;
        Shop { database, datastore, log, registry: Arc::new(Schemas), sql, capture, folder }
    }

    pub async fn sql(&self, sql: &str) {
        self.sql.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Makes the rows that are there into a snapshot's events.
    pub async fn snapshot(&self, table: &str) {
        self.sql(&format!(
            "INSERT INTO capture.events (op, tab, new) SELECT 'r', '{table}', to_jsonb(t) FROM {table} t ORDER BY id"
        ))
        .await;
    }

    /// Rows that nobody hears of.
    pub async fn silently(&self, sql: &str) {
        let superuser = self.database.connect_as_superuser().await;
        superuser.batch_execute(&format!("SET session_replication_role = replica; {sql}")).await.unwrap();
    }

    pub fn context(&self, name: &str) -> (ConnectorContext, watch::Sender<Signal>, CancellationToken) {
        let (signal, receiver) = watch::channel(Signal::Run);
        let abort = CancellationToken::new();
        let context = ConnectorContext {
            name: name.into(),
            log: self.log.clone(),
            registry: self.registry.clone(),
            datastore: self.datastore.clone(),
            control: Control::new(receiver, abort.clone()),
            status: Arc::new(Status::default()),
        };
        (context, signal, abort)
    }

    /// Runs a sink until told to stop.
    pub fn sink(&self, name: &str, system: &Arc<System>, connector: &str) -> Sink {
        let (context, signal, abort) = self.context(name);
        let settings = settings(system, connector);
        let status = context.status.clone();
        let task = tokio::spawn(async move {
            let (source, sink) = http::open(settings, &context).await?;
            let farewell = sink.farewell();
            let result = pipeline::run(source, sink, &context).await;
            farewell.await;
            result
        });
        Sink { signal, abort, task, status }
    }

    /// Runs a connector of any kind, as its file has it.
    pub fn connector(&self, system: &Arc<System>, file: &str) -> Sink {
        let systems = std::collections::BTreeMap::from([(system.name().to_owned(), system.clone())]);
        let world = tidegate::worker::World { systems: &systems, state: self.folder.path() };
        let loaded = tidegate::worker::load("connector.yaml".as_ref(), file, &world).unwrap_or_else(|e| panic!("{e}"));
        let (context, signal, abort) = self.context(&loaded.name);
        let status = context.status.clone();
        let task = tokio::spawn(async move { loaded.connector.run(context).await });
        Sink { signal, abort, task, status }
    }

    pub async fn parked(&self) -> Vec<ParkedSummary> {
        list_parked(&self.datastore.client().await.unwrap(), None, 1000).await.unwrap()
    }

    /// `local key → external id` of an object's links.
    pub async fn links(&self, object: &str) -> Vec<(Value, Option<String>)> {
        let rows = self
            .sql
            .query(
                "SELECT local_key, external_id FROM tidegate.links WHERE object = $1 AND NOT deleted ORDER BY 1",
                &[&object],
            )
            .await
            .unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    /// Open intents, and events that the sink's group has not committed.
    pub async fn unsettled(&self, sink: &str) -> i64 {
        let row =
            self.sql.query_one("SELECT count(*) FROM tidegate.links WHERE intent IS NOT NULL", &[]).await.unwrap();
        let intents: i64 = row.get(0);
        let row = self.sql.query_one("SELECT count(*) FROM capture.events", &[]).await.unwrap();
        let events: i64 = row.get(0);
        let lag = self.log.group_lag(&http::group_of(sink)).await.unwrap();
        if lag.is_empty() {
            return 1; // it has not begun
        }
        intents + events + lag.iter().map(|lag| lag.behind() as i64).sum::<i64>()
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        self.capture.abort();
        let _ = &self.folder;
    }
}

pub fn settings(system: &Arc<System>, connector: &str) -> Arc<http::Settings> {
    let node = parse_text(connector, "connector.yaml").unwrap_or_else(|error| panic!("{error}"));
    let mut section = Section::new(node, "connector").unwrap();
    let settings = http::Settings::read(&mut section, system.clone()).unwrap_or_else(|error| panic!("{error}"));
    section.finish().unwrap_or_else(|error| panic!("{error}"));
    Arc::new(settings)
}

pub fn system(name: &str, yaml: &str) -> Arc<System> {
    let section = Section::new(parse_text(yaml, "tidegate.yaml").unwrap(), name).unwrap();
    let settings = SystemSettings::read(name, section).unwrap_or_else(|error| panic!("{error}"));
    System::new(settings).unwrap_or_else(|error| panic!("{error}"))
}

pub struct Sink {
    signal: watch::Sender<Signal>,
    abort: CancellationToken,
    task: JoinHandle<Result<(), Fault>>,
    pub status: Arc<Status>,
}

impl Sink {
    pub async fn stop(self) {
        self.signal.send_replace(Signal::Stop);
        tokio::time::timeout(Duration::from_secs(40), self.task).await.expect("stops").unwrap().unwrap();
    }

    /// As a crash would end it: nothing is finished, nothing is said.
    pub async fn crash(self) {
        self.task.abort();
        self.abort.cancel();
        let _ = self.task.await;
    }
}

struct Schemas;

const KEY: &str = r#"{"type":"record","name":"Key","fields":[{"name":"id","type":"long"}]}"#;
const VALUE: &str = r#"{"type":"record","name":"Envelope","fields":[
    {"name":"before","type":["null",{"type":"record","name":"Row","fields":[
        {"name":"id","type":"long"},{"name":"order_id","type":["null","long"]}]}]},
    {"name":"after","type":["null","Row"]},
    {"name":"source","type":{"type":"record","name":"Source","fields":[
        {"name":"schema","type":"string"},{"name":"table","type":"string"},{"name":"lsn","type":"long"},
        {"name":"ts_ms","type":"long"}]}},
    {"name":"op","type":"string"}]}"#;

#[async_trait]
impl Registry for Schemas {
    async fn register(&self, subject: &str, _: &str) -> Result<SchemaId, RegistryError> {
        Err(RegistryError::Rejected(format!("{subject}: nothing is registered here")))
    }

    async fn schema(&self, id: SchemaId) -> Result<Arc<str>, RegistryError> {
        match id.0 {
            1 => Ok(KEY.into()),
            2 => Ok(VALUE.into()),
            other => Err(RegistryError::UnknownId(other)),
        }
    }

    async fn lookup(&self, _: &str, _: &str) -> Result<Option<SchemaId>, RegistryError> {
        Ok(None)
    }
}

fn long(value: i64, out: &mut Vec<u8>) {
    let mut zigzag = ((value << 1) ^ (value >> 63)) as u64;
    while zigzag >= 0x80 {
        out.push(zigzag as u8 | 0x80);
        zigzag >>= 7;
    }
    out.push(zigzag as u8);
}

fn text(value: &str, out: &mut Vec<u8>) {
    long(value.len() as i64, out);
    out.extend_from_slice(value.as_bytes());
}

fn row(row: Option<&Value>, key_only: bool, out: &mut Vec<u8>) {
    let Some(row) = row.filter(|row| row.is_object()) else { return long(0, out) };
    long(1, out);
    long(row["id"].as_i64().unwrap(), out);
    match row["order_id"].as_i64().filter(|_| !key_only) {
        Some(id) => {
            long(1, out);
            long(id, out);
        }
        None => long(0, out),
    }
}

fn event(op: &str, table: &str, before: Option<&Value>, after: Option<&Value>, seq: i64) -> Vec<u8> {
    let mut out = vec![0, 0, 0, 0, 2];
    // As with the default replica identity: of what was, only the key is known.
    row(before, true, &mut out);
    row(after, false, &mut out);
    text("public", &mut out);
    text(table, &mut out);
    long(seq, &mut out);
    long(1_700_000_000_000 + seq, &mut out);
    text(op, &mut out);
    out
}

async fn capture(sql: tokio_postgres::Client, log: Arc<dyn Log>) {
    let mut writer = log.writer("capture").await.unwrap();
    loop {
        let Ok(rows) = sql.query("SELECT seq, op, tab, old, new FROM capture.events ORDER BY seq LIMIT 500", &[]).await
        else {
            return;
        };
        if rows.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        }
        let mut batch = RecordBatch::new();
        let mut seen = Vec::new();
        for found in &rows {
            let (seq, op, table): (i64, String, String) = (found.get(0), found.get(1), found.get(2));
            let (old, new): (Option<Value>, Option<Value>) = (found.get(3), found.get(4));
            seen.push(seq);
            let topic: Arc<str> = format!("shop.public.{table}").into();
            let id = |row: &Option<Value>| row.as_ref().and_then(|row| row["id"].as_i64());
            let key = |id: i64| {
                let mut out = vec![0, 0, 0, 0, 1];
                long(id, &mut out);
                out
            };
            let mut push =
                |op: &str, id: i64, before: Option<&Value>, after: Option<&Value>, header: Option<(&str, i64)>| {
                    let other = header.map(|(name, other)| (name, json!({ "id": other }).to_string()));
                    let headers = batch.header_set(other.iter().map(|(name, json)| (*name, json.as_bytes())));
                    batch.push(&topic, Some(&key(id)), Some(&event(op, &table, before, after, seq)), &headers);
                    if op == "d" {
                        batch.push(&topic, Some(&key(id)), None, &headers);
                    }
                };
            match (op.as_str(), id(&old), id(&new)) {
                ("u", Some(was), Some(is)) if was != is => {
                    push("d", was, old.as_ref(), None, Some(("__debezium.newkey", is)));
                    push("c", is, None, new.as_ref(), Some(("__debezium.oldkey", was)));
                }
                ("d", Some(was), _) => push("d", was, old.as_ref(), None, None),
                ("i", _, Some(is)) => push("c", is, None, new.as_ref(), None),
                (op, _, Some(is)) => push(op, is, old.as_ref(), new.as_ref(), None),
                other => panic!("{other:?}"),
            }
        }
        writer.append(batch, None).await.unwrap().await.unwrap();
        // Another transaction may have taken an earlier number and committed since.
        if sql.execute("DELETE FROM capture.events WHERE seq = ANY($1)", &[&seen]).await.is_err() {
            return;
        }
    }
}
