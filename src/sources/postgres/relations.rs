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
use crate::event::{Lsn, Operation, SharedTable, Table, TopicSlot};
use crate::log::Log;
use crate::pipeline::{Fault, Status};
use crate::postgres::pgoutput::Relation;
use crate::postgres::publication::Autocreate;
use crate::postgres::relation::Known;
use crate::postgres::{Address, PostgresError, Purpose, Session, catalog, relation, slot};
use crate::registry::{Registry, RegistryError};

use super::settings::{CaptureSettings, OnIncompatible};

/// What resolving needs; cheap to clone.
#[derive(Clone)]
pub(super) struct Resolver {
    pub settings: Arc<CaptureSettings>,
    pub log: Arc<dyn Log>,
    pub registry: Arc<dyn Registry>,
    pub name: Arc<str>,
    pub status: Arc<Status>,
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
    /// Of a table in quarantine: where its deletes go, so that no topic keeps a row that is gone.
    pub aside: Option<Box<Output>>,
    /// Why its schemas can't be had; it has neither output then.
    pub refused: Option<String>,
    /// Taken for what it was before, since its rows are of a backlog: asked again when that is over.
    pub behind: bool,
    /// What was committed before this is in the rows that a snapshot read of it.
    pub from: Lsn,
}

impl Captured {
    /// From here on its changes are passed over, but for deletes.
    pub(super) fn set_aside(&mut self) {
        if let Some(output) = self.output.take() {
            self.aside = Some(Box::new(output));
        }
    }
}

/// What a table is written with, or why it can't be.
type Made = Result<Output, String>;

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

/// A snapshot's table is let go of when it is read: what was counted since its last batch is not lost with it.
impl Drop for Counters {
    fn drop(&mut self) {
        self.flush();
    }
}

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
#[derive(Debug)]
pub(super) enum Origin {
    /// The WAL, with what the table was taken for before, and whether the row is of a backlog (CORRECTNESS 7).
    Wal { relation: Arc<Relation>, before: Option<SharedTable>, behind: bool },
    /// The backlog is over: what the catalog says of the table.
    CaughtUp(Arc<Relation>, SharedTable),
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
            Origin::Wal { relation, before, behind } => {
                if !self.wants(&relation, before.is_some()).await? {
                    let table = Arc::new(relation::table(&relation, Known::default(), &Default::default()));
                    return Ok(captured(Some(relation), table, None, false));
                }
                let table = match before {
                    Some(before) if behind && relation::matches(&before, &relation) => before,
                    before => Arc::new(self.complete(&relation, before.as_deref(), behind).await?),
                };
                let made = self.output(&table).await?;
                return Ok(captured(Some(relation), table, Some(made), behind));
            }
            Origin::CaughtUp(relation, table) => (Some(relation), table),
            Origin::Snapshot(table) => (None, table),
            Origin::Nullable(relation, table, column) => {
                let mut table = Table::clone(&table);
                if let Some(column) = table.columns.get_mut(column) {
                    column.nullable = true;
                }
                (relation, Arc::new(table))
            }
        };
        let made = self.output(&table).await?;
        Ok(captured(relation, table, Some(made), false))
    }

    /// `known`: it was captured before.
    async fn wants(&self, relation: &Relation, known: bool) -> Result<bool, Fault> {
        let tables = &self.settings.tables;
        if tables.wants(&relation.schema, &relation.name) {
            return Ok(true);
        }
        // It may be part of a partitioned table that is wanted.
        let mut session = self.catalog.session().await?;
        let all = catalog::tables(&mut session).await?;
        if let Some(table) = all.iter().find(|table| table.oid == relation.oid) {
            return Ok(tables.wants_table(table));
        }
        // It was dropped since, and nothing tells what it was a part of. A publication made for just the tables asked
        // for would not have sent it otherwise.
        let ours = known || self.settings.autocreate == Autocreate::Filtered;
        Ok(ours && !tables.excludes(&relation.schema, &relation.name))
    }

    async fn complete(&self, relation: &Relation, before: Option<&Table>, behind: bool) -> Result<Table, Fault> {
        let type_oids: BTreeSet<_> = relation.columns.iter().map(|column| column.type_oid).collect();
        let mut session = self.catalog.session().await?;
        let now = catalog::load_tables(&mut session, &[relation.oid], true).await?;
        let types = catalog::load_types(&mut session, type_oids).await?;
        let known = Known { now: now.get(&relation.oid), before, behind };
        Ok(relation::table(relation, known, &types))
    }

    async fn output(&self, table: &Table) -> Result<Made, Fault> {
        let encoding = &self.settings.encoding;
        let topic = avro::topic_name(&encoding.prefix, &table.schema, &table.name);
        let schemas = match avro::schemas(table, encoding) {
            Ok(schemas) => schemas,
            Err(error) => return Ok(Err(error.to_string())),
        };
        self.log.ensure_topic(&self.settings.topic(&topic)).await.map_err(Fault::from)?;
        let mut key_id = None;
        if let Some(schema) = &schemas.key {
            match self.register(table, &format!("{topic}-key"), schema).await? {
                Ok(id) => key_id = Some(id),
                Err(refused) => return Ok(Err(refused)),
            }
        }
        let value_id = match self.register(table, &format!("{topic}-value"), &schemas.value).await? {
            Ok(id) => id,
            Err(refused) => return Ok(Err(refused)),
        };
        let plan = match TablePlan::compile(table, encoding, key_id, value_id) {
            Ok(plan) => plan,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let counters = Counters::new(&self.name, &table.full_name());
        Ok(Ok(Output { counters, topic: topic.into(), plan, slot: None }))
    }
}

fn captured(relation: Option<Arc<Relation>>, table: SharedTable, made: Option<Made>, behind: bool) -> Captured {
    let (output, refused) = match made {
        None => (None, None),
        Some(Ok(output)) => (Some(output), None),
        Some(Err(reason)) => (None, Some(reason)),
    };
    Captured { relation, table, output, aside: None, refused, behind, from: Lsn::ZERO }
}

impl Resolver {
    /// The schema's id. Where the subject refuses it: what `on.incompatible` says; `Err` inside: why the table is to be
    /// left out.
    async fn register(&self, table: &Table, subject: &str, schema: &str) -> Result<Result<u32, String>, Fault> {
        /// Subjects tried beside the first.
        const MOST: u32 = 100;
        let refused = match self.registry.register(subject, schema).await {
            Err(RegistryError::Incompatible { reason, .. }) => reason,
            other => return Ok(Ok(other?.0)),
        };
        let name = table.full_name();
        if self.settings.incompatible == OnIncompatible::Quarantine {
            return Ok(Err(format!(
                "subject '{subject}' refuses the new schema: {reason}. hint: lower the subject's compatibility level, \
                 or set 'on.incompatible: new-subject'",
                reason = refused.trim_end_matches('.')
            )));
        }
        if self.settings.incompatible == OnIncompatible::Stop {
            return Err(Fault::stop(format!(
                "subject '{subject}' refuses the new schema of {name}: {reason}. Nothing of the capture goes on, and \
                 nothing is lost while its slot lives: {guard}. hint: lower the subject's compatibility level, then \
                 'tidegate connectors restart {connector}'; or set 'on.incompatible: new-subject'",
                reason = refused.trim_end_matches('.'),
                guard = self.slot_guard().await,
                connector = self.name,
            )));
        }
        for version in 2..=MOST {
            let next = format!("{subject}-v{version}");
            match self.registry.register(&next, schema).await {
                Err(RegistryError::Incompatible { .. }) => {}
                Err(error) => return Err(error.into()),
                Ok(id) => {
                    tracing::warn!(connector = %self.name, table = %name, %subject, registered = %next, reason = %refused,
                        "the subject refuses the new schema: registered under another (on.incompatible: new-subject)");
                    return Ok(Ok(id.0));
                }
            }
        }
        Ok(Err(format!("subject '{subject}' and {MOST} beside it refuse the schema: {refused}")))
    }

    /// How long the server goes on keeping WAL for the slot, in words.
    async fn slot_guard(&self) -> String {
        let slot = &self.settings.slot;
        let look = async { slot::find(&mut *self.catalog.session().await?, slot).await };
        match tokio::time::timeout(Duration::from_secs(10), look).await {
            Ok(Ok(Some(found))) => {
                let kept = found.kept_bytes >> 20;
                match found.safe_wal_size {
                    Some(safe) => format!(
                        "slot '{slot}' keeps {kept} MB of WAL; the server gives it up after {} MB more \
                         (max_slot_wal_keep_size)",
                        safe.max(0) >> 20
                    ),
                    None => format!(
                        "slot '{slot}' keeps {kept} MB of WAL, and nothing bounds what it goes on to keep on the \
                         server's disk (max_slot_wal_keep_size = -1)"
                    ),
                }
            }
            _ => format!("slot '{slot}' keeps WAL on the server's disk until the capture goes on"),
        }
    }
}

pub(super) fn encoding_fault(error: AvroError) -> Fault {
    Fault::stop(error.to_string())
}
