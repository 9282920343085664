//! A relation made ready to be written: its table, its topic, its schemas registered, its Avro plan compiled.
//!
//! Done once per Relation message, off the hot path, in a task that the source only waits for: the registry or the log
//! may take their time, and the pipeline must not.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokio::sync::{Mutex, OwnedMappedMutexGuard, OwnedMutexGuard};

use crate::avro::{self, AvroError, TablePlan};
use crate::event::{Operation, SharedTable, Table, TopicSlot};
use crate::log::Log;
use crate::pipeline::Fault;
use crate::postgres::pgoutput::Relation;
use crate::postgres::{Address, PostgresError, Purpose, Session, catalog, relation};
use crate::registry::Registry;

use super::settings::CaptureSettings;

/// What resolving needs; cheap to clone.
#[derive(Clone)]
pub(super) struct Resolver {
    pub settings: Arc<CaptureSettings>,
    pub log: Arc<dyn Log>,
    pub registry: Arc<dyn Registry>,
    pub name: Arc<str>,
    pub catalog: Catalog,
}

/// One SQL connection for the catalog, shared and made anew when it broke.
#[derive(Clone)]
pub(super) struct Catalog {
    address: Address,
    session: Arc<Mutex<Option<Session>>>,
}

impl Catalog {
    pub(super) fn new(address: Address) -> Self {
        Catalog { address, session: Arc::default() }
    }

    /// The connection, which has just answered.
    pub(super) async fn session(&self) -> Result<OwnedMappedMutexGuard<Option<Session>, Session>, PostgresError> {
        const PING: Duration = Duration::from_secs(5);
        let mut held = self.session.clone().lock_owned().await;
        let answers = match held.as_mut() {
            Some(session) if session.is_idle() => session.query("SELECT 1", PING).await.is_ok(),
            _ => false,
        };
        if !answers {
            *held = None;
            *held = Some(self.address.connect(Purpose::Sql).await?);
        }
        OwnedMutexGuard::try_map(held, Option::as_mut)
            .map_err(|_| PostgresError::Protocol("the connection to the catalog is gone".into()))
    }
}

/// A table that events are written for, or one that is passed over (`output` is `None`).
pub(super) struct Captured {
    /// As the WAL said it; `None` for a table of a snapshot.
    pub relation: Option<Arc<Relation>>,
    pub table: SharedTable,
    pub output: Option<Output>,
}

pub(super) struct Output {
    pub topic: Arc<str>,
    pub plan: TablePlan,
    /// Of the batch with this number.
    pub slot: Option<(u64, TopicSlot)>,
    pub counters: Counters,
}

/// Events since the last batch, by operation, and where they are counted.
pub(super) struct Counters {
    counts: [u64; 6],
    counters: [Counter; 6],
}

const OPERATIONS: [Operation; 6] =
    [Operation::Create, Operation::Update, Operation::Delete, Operation::Read, Operation::Truncate, Operation::Message];

impl Counters {
    pub(super) fn new(connector: &str, table: &str) -> Self {
        let counter = |operation: Operation| {
            let labels = [
                ("connector", connector.to_owned()),
                ("table", table.to_owned()),
                ("operation", operation.letter().to_owned()),
            ];
            metrics::counter!("tidegate_capture_events_total", &labels)
        };
        Counters { counts: [0; 6], counters: OPERATIONS.map(counter) }
    }

    #[inline]
    pub(super) fn add(&mut self, operation: Operation) {
        self.counts[operation as usize] += 1;
    }

    pub(super) fn flush(&mut self) {
        for (count, counter) in self.counts.iter_mut().zip(&self.counters) {
            if *count > 0 {
                counter.increment(std::mem::take(count));
            }
        }
    }
}

/// Where the table of a resolved relation comes from.
pub(super) enum Origin {
    /// The WAL, with what the relation was taken for before.
    Wal(Arc<Relation>, Option<SharedTable>),
    /// The catalog under a snapshot.
    Snapshot(SharedTable),
    /// A row had a null in this column, which the catalog says has none: the row decides.
    Nullable(Option<Arc<Relation>>, SharedTable, usize),
}

impl Resolver {
    pub(super) async fn resolve(self, origin: Origin) -> Result<Captured, Fault> {
        const DEADLINE: Duration = Duration::from_secs(60);
        let name = self.name.clone();
        tokio::time::timeout(DEADLINE, self.resolve_unbounded(origin))
            .await
            .unwrap_or_else(|_| Err(Fault::unavailable("registering a table took longer than a minute", None)))
            .map_err(|fault| fault.context(format!("capture '{name}'")))
    }

    async fn resolve_unbounded(self, origin: Origin) -> Result<Captured, Fault> {
        let (relation, table) = match origin {
            Origin::Wal(relation, before) => {
                if !self.wants(&relation).await? {
                    let table = Arc::new(relation::table(&relation, None, None, &Default::default()));
                    return Ok(Captured { relation: Some(relation), table, output: None });
                }
                let table = self.complete(&relation, before.as_deref()).await?;
                (Some(relation), Arc::new(table))
            }
            Origin::Snapshot(table) => (None, table),
            Origin::Nullable(relation, table, column) => {
                let mut table = Table::clone(&table);
                if let Some(column) = table.columns.get_mut(column) {
                    column.nullable = true;
                }
                (relation, Arc::new(table))
            }
        };
        let output = self.output(&table).await?;
        Ok(Captured { relation, table, output: Some(output) })
    }

    async fn wants(&self, relation: &Relation) -> Result<bool, Fault> {
        if self.settings.tables.wants(&relation.schema, &relation.name) {
            return Ok(true);
        }
        // It may be part of a partitioned table that is wanted.
        let mut session = self.catalog.session().await?;
        let tables = catalog::tables(&mut session).await?;
        Ok(tables.iter().any(|table| table.oid == relation.oid && self.settings.tables.wants_table(table)))
    }

    async fn complete(&self, relation: &Relation, before: Option<&Table>) -> Result<Table, Fault> {
        let type_oids: BTreeSet<_> = relation.columns.iter().map(|column| column.type_oid).collect();
        let mut session = self.catalog.session().await?;
        let now = catalog::load_tables(&mut session, &[relation.oid], true).await?;
        let types = catalog::load_types(&mut session, type_oids).await?;
        Ok(relation::table(relation, now.get(&relation.oid), before, &types))
    }

    async fn output(&self, table: &Table) -> Result<Output, Fault> {
        let encoding = &self.settings.encoding;
        let topic = avro::topic_name(&encoding.prefix, &table.schema, &table.name);
        let schemas = avro::schemas(table, encoding).map_err(encoding_fault)?;
        self.log.ensure_topic(&self.settings.topic(&topic)).await.map_err(Fault::from)?;
        let key_id = match &schemas.key {
            None => None,
            Some(schema) => Some(self.registry.register(&format!("{topic}-key"), schema).await?.0),
        };
        let value_id = self.registry.register(&format!("{topic}-value"), &schemas.value).await?.0;
        let plan = TablePlan::compile(table, encoding, key_id, value_id).map_err(encoding_fault)?;
        Ok(Output { counters: Counters::new(&self.name, &table.full_name()), topic: topic.into(), plan, slot: None })
    }
}

pub(super) fn encoding_fault(error: AvroError) -> Fault {
    Fault::stop(error.to_string())
}
