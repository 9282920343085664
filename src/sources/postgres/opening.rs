//! Getting from a stored position to a stream: checks, publication, slot, snapshot.
//!
//! [`open`] looks at what is stored and at what the server has, and says what is to be done first ([`Opened`]). It is
//! run in a task of its own, since making a slot may take long and the pipeline must not wait for it.
//!
//! # A first run, and a killed one
//! Before anything is made on the server, an *intent* is stored in the log: a position with a snapshot that has no
//! consistent point yet. So a slot of our name is known to be ours to drop: one without an intent or a position in the
//! log is somebody's, or the log was lost, and is not touched. With the slot made, its consistent point is stored before
//! the first row.
//!
//! A snapshot that was killed keeps that slot. The tables that are left are read under a second, temporary slot's
//! snapshot, and dated with the first one's consistent point, from which everything is then streamed. A row that was
//! read, and deleted before it could be read again, is so deleted by the stream; what the second reading saw of changes
//! since, the stream tells again in order. A fold by key is the table. Of a table that no row was read of before the cut,
//! the stream leaves out what the second snapshot has: nothing of it comes twice. Where the slot is lost meanwhile, a new one is
//! made and all tables are read again; rows deleted in between then stay in the topics, and it is said.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::avro;
use crate::event::{CapturePosition, Lsn, Oid, SharedTable, SnapshotProgress, Table};
use crate::pipeline::{Fault, FaultKind, Status};
use crate::postgres::catalog::{self, CatalogTable, ServerFacts};
use crate::postgres::publication::{Autocreate, Published};
use crate::postgres::replication::{self, Acknowledged, Chunks, CreatedSlot, SlotKind};
use crate::postgres::snapshot::{Rewritten, SnapshotReader};
use crate::postgres::{Address, PostgresError, Purpose, Session, publication, slot};

use super::settings::{CaptureSettings, SnapshotMode};

/// Name of the fact of tables that are asked for and can't be had.
pub(super) const NOT_CAPTURED: &str = "not_captured";
/// How soon a slot that another has is asked for again.
const TAKEN: Duration = Duration::from_secs(1);

impl From<PostgresError> for Fault {
    fn from(error: PostgresError) -> Self {
        let message = error.to_string();
        match &error {
            PostgresError::Connection { .. } | PostgresError::Timeout { .. } => Fault::unavailable(message, None),
            _ if error.is_passing() => Fault::retry(message),
            _ => Fault::stop(message),
        }
    }
}

/// What is to be done next.
pub(super) enum Opened {
    /// Store this, then open again.
    Store(Box<CapturePosition>),
    Snapshot(SnapshotFeed, Box<CapturePosition>),
    Stream(Box<StreamFeed>),
    /// There is nothing to do any more (`snapshot.mode: initial_only`).
    Finished,
}

/// The stream, and the reins on the task that owns it.
pub(super) struct StreamFeed {
    pub chunks: Chunks,
    pub acknowledged: Arc<Acknowledged>,
    pub stop: CancellationToken,
    pub task: tokio::task::JoinHandle<()>,
    /// The stored position, with the epoch of this timeline.
    pub position: CapturePosition,
    /// The tables asked for as the catalog has them, and an end of the server's WAL after that: what commits behind it
    /// has them so, or is announced by the stream (CORRECTNESS 7).
    pub catalog: BTreeMap<Oid, SharedTable>,
    pub behind: Lsn,
}

/// Rows of a snapshot, table by table.
pub(super) struct SnapshotFeed {
    pub items: mpsc::Receiver<Result<SnapshotItem, Fault>>,
    pub task: tokio::task::JoinHandle<()>,
    pub time_us: i64,
    pub xid: u32,
    /// Where in the WAL tables have the shape that they are read in.
    pub shapes_from: Lsn,
    /// Tables, with the planner's guess at their rows.
    pub tables: Vec<(String, u64)>,
}

pub(super) enum SnapshotItem {
    /// The rows of this table follow.
    Table(Arc<Table>),
    /// Whole CopyData messages.
    Rows(BytesMut, OwnedSemaphorePermit),
    TableDone(String),
    Done,
}

impl Drop for SnapshotFeed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drop for StreamFeed {
    fn drop(&mut self) {
        // The task says goodbye by itself; it ends on its own deadline.
        self.stop.cancel();
    }
}

/// Tables that are asked for.
#[derive(Default)]
pub(super) struct Wanted {
    /// With rows of their own, or roots where partitions are published through them.
    pub tables: Vec<CatalogTable>,
    pub parents: Vec<CatalogTable>,
    /// Partitions that have the rows of roots.
    pub leaves: Vec<CatalogTable>,
    /// How much of each table is published.
    pub published: Vec<Published>,
}

pub(super) async fn wanted(session: &mut Session, settings: &CaptureSettings) -> Result<Wanted, PostgresError> {
    let all = catalog::tables(session).await?;
    let asked: Vec<CatalogTable> = all.into_iter().filter(|table| settings.tables.wants_table(table)).collect();
    let (parents, leaves): (Vec<_>, Vec<_>) = asked.into_iter().partition(|table| table.partitioned);
    if !settings.via_root {
        return Ok(Wanted { tables: leaves, parents, ..Wanted::default() });
    }
    // Through the root: a partition of a wanted root has no topic of its own.
    let covered = |table: &CatalogTable| {
        table
            .ancestors
            .iter()
            .any(|(schema, name)| parents.iter().any(|parent| parent.schema == *schema && parent.name == *name))
    };
    let (leaves, mut tables): (Vec<_>, Vec<_>) = leaves.into_iter().partition(covered);
    tables.extend(parents.iter().filter(|table| !covered(table)).cloned());
    Ok(Wanted { tables, leaves, ..Wanted::default() })
}

/// Takes out of `wanted` the tables that are not in the publication and that only another role can add; their names.
/// A first publication is all or nothing.
fn take_others(
    wanted: &mut Wanted,
    found: Option<&publication::Publication>,
    settings: &CaptureSettings,
    facts: &ServerFacts,
) -> Vec<String> {
    let Some(found) = found else { return Vec::new() };
    if facts.superuser || settings.autocreate != Autocreate::Filtered {
        return Vec::new();
    }
    let others = |table: &CatalogTable| !table.owned && !found.has(&table.schema, &table.name);
    let names = wanted.tables.iter().filter(|table| others(table)).map(CatalogTable::full_name).collect();
    wanted.tables.retain(|table| !others(table));
    names
}

/// Two tables whose rows would be mixed in one topic: their names differ in what Kafka forbids in a topic's.
pub(super) fn shared_topic(wanted: &Wanted, settings: &CaptureSettings) -> Option<String> {
    let mut topics: BTreeMap<String, String> = BTreeMap::new();
    for table in &wanted.tables {
        let topic = avro::topic_name(&settings.prefix, &table.schema, &table.name);
        if let Some(other) = topics.insert(topic.clone(), table.full_name()) {
            return Some(format!(
                "{other} and {} would share topic '{topic}'. hint: rename one, or leave it out with table.exclude.list",
                table.full_name()
            ));
        }
    }
    None
}

/// Tables that are asked for and not published: those that this role can add, and those of others.
pub(super) async fn unpublished(
    session: &mut Session,
    settings: &CaptureSettings,
) -> Result<(Vec<String>, Vec<String>), PostgresError> {
    let facts = catalog::server_facts(session).await?;
    let mut wanted = wanted(session, settings).await?;
    let found = publication::find(session, &settings.publication).await?;
    let others = take_others(&mut wanted, found.as_ref(), settings, &facts);
    // A publication that is gone, or that somebody else keeps, is told of at the next opening.
    let ours = match found.is_some() && settings.autocreate == Autocreate::Filtered {
        true => publication::changes(found.as_ref(), &wish(settings, &wanted, &facts))?.added,
        false => Vec::new(),
    };
    Ok((ours, others))
}

pub(super) struct Opening {
    pub settings: Arc<CaptureSettings>,
    pub address: Address,
    pub status: Arc<Status>,
    pub name: Arc<str>,
    /// What the log has.
    pub stored: Option<CapturePosition>,
    /// Where to go on: `stored`, or further where batches are still in flight.
    pub from: Option<CapturePosition>,
    /// The first opening of this run: `snapshot.mode: always` counts from here.
    pub first: bool,
    /// All is handed on that was committed before tables were found that are asked for and not published: they are
    /// taken now.
    pub adopt: bool,
}

impl Opening {
    pub(super) async fn open(self) -> Result<Opened, Fault> {
        let context = format!("capture '{}'", self.name);
        self.decide().await.map_err(|fault| fault.context(context))
    }

    async fn decide(self) -> Result<Opened, Fault> {
        let mut session = self.address.connect(Purpose::Replication).await?;
        // The slot's snapshot is exported by a transaction that lasts until all is read.
        catalog::lift_transaction_timeout(&mut session).await?;
        let facts = catalog::server_facts(&mut session).await?;
        if let Some(problem) = facts.problems().first() {
            let sql = facts.dba_sql().join(" ");
            return Err(Fault::stop(format!("{problem}. hint: {sql}")));
        }
        if let Some(holder) = slot::hold(&mut session, &self.settings.slot).await? {
            return Err(self.taken(&holder));
        }
        let server = slot::look(&mut session, &self.settings.slot, self.stored.as_ref()).await?;
        let (system, found) = (&server.system, server.slot.as_ref());
        if let Some(found) = found
            && (found.plugin != "pgoutput" || found.database != facts.database)
        {
            return Err(Fault::stop(format!(
                "replication slot '{}' belongs to database '{}' and plugin '{}'; hint: give another slot.name",
                self.settings.slot, found.database, found.plugin
            )));
        }
        let fresh = |epoch: u64| CapturePosition {
            epoch,
            system_identifier: system.system_identifier.clone(),
            timeline: system.timeline,
            slot: self.settings.slot.clone(),
            commit_end: Lsn::ZERO,
            last_commit: Lsn::ZERO,
            ordinal: 0,
            ordinal_xid: 0,
            fingerprint: self.settings.fingerprint(),
            snapshot: Some(SnapshotProgress::default()),
            read_at: BTreeMap::new(),
        };
        let Some(stored) = self.stored.clone() else {
            return match found {
                None => Ok(Opened::Store(Box::new(fresh(1)))),
                Some(found) if self.settings.snapshot == SnapshotMode::NoData => {
                    let confirmed = found.confirmed_flush.unwrap_or_default();
                    let position =
                        CapturePosition { commit_end: confirmed, last_commit: confirmed, snapshot: None, ..fresh(1) };
                    Ok(Opened::Store(Box::new(position)))
                }
                Some(_) => Err(Fault::stop(format!(
                    "replication slot '{0}' is there already, but the log has no position for it: it is somebody \
                     else's, or the log was lost. hint: give another slot.name; or, where it is to be given up, SELECT \
                     pg_drop_replication_slot('{0}'); or set snapshot.mode to no_data to go on from where it stands",
                    self.settings.slot
                ))),
            };
        };
        if stored.slot != self.settings.slot {
            return Err(Fault::stop(format!(
                "slot.name was '{}' and is now '{}': the slot is part of what this capture is. hint: set it back, or \
                 give the connector another name to begin anew",
                stored.slot, self.settings.slot
            )));
        }
        if stored.snapshot.is_some() {
            if stored.system_identifier != system.system_identifier {
                return Ok(Opened::Store(Box::new(fresh(stored.epoch + 1))));
            }
            return self.begin(session, &server, &facts, stored).await;
        }
        if self.settings.snapshot == SnapshotMode::InitialOnly {
            // Nobody will read the slot: it would only keep WAL.
            slot::drop_slot(&mut session, &self.settings.slot).await?;
            return Ok(Opened::Finished);
        }
        let handed = self.from.as_ref().map_or(stored.commit_end, |from| from.commit_end);
        if let Err(loss) = slot::check(&self.settings.slot, &server, &stored, handed) {
            if matches!(self.settings.snapshot, SnapshotMode::WhenNeeded | SnapshotMode::Always) {
                tracing::warn!(connector = %self.name, "{loss}; reading all tables anew (snapshot.mode). Rows that were \
                    deleted meanwhile stay in the topics");
                return Ok(Opened::Store(Box::new(fresh(stored.epoch + 1))));
            }
            return Err(Fault::stop(format!(
                "{loss}. hint: 'snapshot.mode: when_needed' reads all tables anew; or compare by hand, then \
                 'tidegate connectors reset {} --to end'",
                self.name
            )));
        }
        if self.settings.snapshot == SnapshotMode::Always && self.first {
            // Under the slot that is there: what was committed since is streamed, too.
            let progress = SnapshotProgress { consistent_point: stored.commit_end, ..SnapshotProgress::default() };
            return Ok(Opened::Store(Box::new(CapturePosition { snapshot: Some(progress), ..stored })));
        }
        let mut position = self.from.clone().unwrap_or(stored);
        let (mut wanted, changes) = self.compare(&mut session, &facts).await?;
        if changes.creates || self.settings.snapshot == SnapshotMode::NoData {
            self.publish(&mut session, &wanted, &changes).await?;
        } else if self.adopt && !changes.added.is_empty() {
            // Stored before they are published: what is published and has not been read would not be missed any more.
            let taken = |table: &CatalogTable| !changes.added.contains(&table.full_name());
            let done = wanted.tables.iter().filter(|table| taken(table)).map(CatalogTable::full_name).collect();
            let begun = Vec::new();
            let progress = SnapshotProgress { consistent_point: position.commit_end, done, begun };
            tracing::info!(connector = %self.name, tables = %changes.added.join(", "), "new: reading them, then on");
            return Ok(Opened::Store(Box::new(CapturePosition { snapshot: Some(progress), ..position })));
        } else {
            // Taken when all is handed on that was committed before: a table may have taken the place of another.
            wanted.tables.retain(|table| !changes.added.contains(&table.full_name()));
        }
        if position.timeline != system.timeline {
            tracing::warn!(connector = %self.name, from = position.timeline, to = system.timeline,
                "the server is on a new timeline: a standby was promoted or a backup restored");
            position.timeline = system.timeline;
            position.epoch += 1;
        }
        let oids: Vec<Oid> = wanted.tables.iter().map(|table| table.oid).collect();
        let catalog = catalog::load_tables(&mut session, &oids, facts.version >= 180_000).await?;
        let mut session = self.hand_over(session).await?;
        let behind = replication::identify_system(&mut session).await?.wal_end;
        self.stream(session, position, catalog, behind).await
    }

    /// Another connection in place of this one, with the slot held: a walsender that has run SQL on tables has the catalog
    /// of now in its caches, and decodes older rows by it (tried: a later column, null, in rows from before it). On the
    /// stream's connection nothing that touches a table is ever run.
    async fn hand_over(&self, mut session: Session) -> Result<Session, Fault> {
        slot::release(&mut session, &self.settings.slot).await?;
        session.close().await;
        let mut session = self.address.connect(Purpose::Replication).await?;
        match slot::hold(&mut session, &self.settings.slot).await? {
            None => Ok(session),
            Some(holder) => Err(self.taken(&holder)),
        }
    }

    /// Passing: the other may end, or be our own connection that the server has not missed yet.
    fn taken(&self, holder: &str) -> Fault {
        let message = format!(
            "replication slot '{}' is in use by another ({holder}): only one worker may run a capture. hint: stop that \
             one; or give this connector another name, slot.name and topic.prefix; this one waits",
            self.settings.slot
        );
        Fault { kind: FaultKind::Retry { after: Some(TAKEN) }, message }
    }

    /// Starts the stream behind `position`.
    async fn stream(
        self,
        mut session: Session,
        position: CapturePosition,
        catalog: BTreeMap<Oid, Table>,
        behind: Lsn,
    ) -> Result<Opened, Fault> {
        let catalog = catalog.into_iter().map(|(oid, table)| (oid, Arc::new(table))).collect();
        let durable = self.stored.as_ref().map_or(position.commit_end, |stored| stored.commit_end);
        let settings = &self.settings;
        let started =
            replication::start_replication(&mut session, &settings.slot, position.commit_end, &settings.publication);
        if let Err(error) = started.await {
            if error.code() != Some("55006") {
                return Err(error.into());
            }
            // Not one of ours: it has the slot without holding it. This connection ends with the error.
            let mut asking = self.address.connect(Purpose::Sql).await?;
            return Err(self.taken(&slot::user(&mut asking, &settings.slot).await?));
        }
        let acknowledged = Acknowledged::new(durable);
        let stop = CancellationToken::new();
        let (chunks, task) = replication::spawn_stream(session, acknowledged.clone(), stop.clone());
        tracing::info!(connector = %self.name, slot = %settings.slot, from = %position.commit_end, "streaming");
        Ok(Opened::Stream(Box::new(StreamFeed { chunks, acknowledged, stop, task, position, catalog, behind })))
    }

    /// The tables asked for that can be had, and what is to be run for them to be published.
    async fn compare(
        &self,
        session: &mut Session,
        facts: &ServerFacts,
    ) -> Result<(Wanted, publication::Changes), Fault> {
        let mut wanted = wanted(session, &self.settings).await?;
        let found = publication::find(session, &self.settings.publication).await?;
        let others = take_others(&mut wanted, found.as_ref(), &self.settings, facts);
        if !others.is_empty() {
            tracing::warn!(connector = %self.name, tables = %others.join(", "),
                "are asked for and not captured: only their owner can publish them; hint: 'tidegate plan'");
        }
        self.status.set_fact(NOT_CAPTURED, others);
        if let Some(problem) = shared_topic(&wanted, &self.settings) {
            return Err(Fault::stop(problem));
        }
        let changes = publication::changes(found.as_ref(), &wish(&self.settings, &wanted, facts))?;
        for table in wanted.tables.iter().filter(|table| !table.has_identity()) {
            tracing::warn!(connector = %self.name, table = %table.full_name(),
                "has no replica identity: PostgreSQL refuses its updates and deletes while it is published; \
                 hint: ALTER TABLE … REPLICA IDENTITY FULL");
        }
        Ok((wanted, changes))
    }

    /// Makes the publication, or adds tables to it; warns of what it means.
    async fn publish(
        &self,
        session: &mut Session,
        wanted: &Wanted,
        changes: &publication::Changes,
    ) -> Result<(), Fault> {
        publication::apply(session, changes).await.map_err(|error| match error.code() {
            Some("42501") => {
                Fault::stop(format!("{error}. hint: a role that owns the tables must run: {};", changes.sql.join("; ")))
            }
            // Somebody else has just made it, or a table was just dropped.
            Some("42710" | "23505" | "42P01") => Fault::retry(error.to_string()),
            _ => error.into(),
        })?;
        if !changes.added.is_empty() {
            tracing::info!(connector = %self.name, publication = %self.settings.publication,
                tables = %changes.added.join(", "), of = wanted.tables.len(), "published");
        }
        if !changes.added.is_empty() && self.stored.as_ref().is_some_and(|p| p.snapshot.is_none()) {
            tracing::warn!(connector = %self.name, tables = %changes.added.join(", "),
                "are captured from here on; rows from before are not in the log");
        }
        Ok(())
    }

    /// A slot, where there is none of this snapshot yet, and the snapshot where one is asked for. Only entered with an
    /// intent stored.
    async fn begin(
        self,
        mut session: Session,
        server: &slot::Server,
        facts: &ServerFacts,
        stored: CapturePosition,
    ) -> Result<Opened, Fault> {
        let (mut wanted, changes) = self.compare(&mut session, facts).await?;
        self.publish(&mut session, &wanted, &changes).await?;
        wanted.published =
            publication::find(&mut session, &self.settings.publication).await?.unwrap_or_default().tables;
        let settings = self.settings.clone();
        let with_data = settings.snapshot != SnapshotMode::NoData;
        let begun = stored.snapshot.as_ref().is_some_and(|progress| progress.consistent_point != Lsn::ZERO);
        let keeps = match slot::check(&settings.slot, server, &stored, stored.commit_end) {
            Ok(()) => begun && with_data,
            Err(loss) => {
                if begun {
                    tracing::warn!(connector = %self.name, "{loss}; the snapshot is begun anew with another slot. Rows \
                        that were read before and deleted since stay in the topics");
                }
                false
            }
        };
        for attempt in 1..=5 {
            self.status.set_progress(Some(format!(
                "making slot '{}': waiting for transactions that are under way",
                settings.slot
            )));
            let made = self.make_slot(&mut session, keeps, with_data).await;
            self.status.set_progress(None);
            let made = made?;
            let position = match keeps {
                true => {
                    let mut position = CapturePosition { fingerprint: settings.fingerprint(), ..stored.clone() };
                    // Of a table that no row was read of before, all that this snapshot has can be left out of the stream.
                    let progress = stored.snapshot.clone().unwrap_or_default();
                    let whole = wanted.tables.iter().map(CatalogTable::full_name);
                    let whole = whole.filter(|name| !progress.done.contains(name) && !progress.begun.contains(name));
                    if settings.snapshot != SnapshotMode::Always {
                        position.read_at.extend(whole.map(|name| (name, made.consistent_point)));
                    }
                    position
                }
                false => CapturePosition {
                    epoch: stored.epoch + u64::from(attempt > 1 || begun),
                    timeline: server.system.timeline,
                    commit_end: made.consistent_point,
                    last_commit: made.consistent_point,
                    ordinal: 0,
                    ordinal_xid: 0,
                    fingerprint: settings.fingerprint(),
                    snapshot: with_data.then(|| SnapshotProgress {
                        consistent_point: made.consistent_point,
                        ..SnapshotProgress::default()
                    }),
                    read_at: BTreeMap::new(),
                    ..stored.clone()
                },
            };
            let Some(snapshot) = made.snapshot.filter(|_| with_data) else {
                return Ok(Opened::Store(Box::new(position)));
            };
            let done = position.snapshot.as_ref().map_or(&[][..], |progress| &progress.done);
            let mut left = Wanted {
                tables: wanted.tables.clone(),
                leaves: wanted.leaves.clone(),
                published: wanted.published.clone(),
                ..Wanted::default()
            };
            left.tables.retain(|table| !done.contains(&table.full_name()));
            let reading = self.address.connect(Purpose::Sql).await?;
            let locked: Vec<(Oid, String, String)> = left
                .tables
                .iter()
                .chain(&left.leaves)
                .map(|table| (table.oid, table.schema.clone(), table.name.clone()))
                .collect();
            match SnapshotReader::open(reading, &snapshot, &locked).await.map_err(reading_fault)? {
                Ok(reader) => {
                    if keeps {
                        tracing::info!(connector = %self.name, slot = %settings.slot, since = %position.commit_end,
                            tables = left.tables.len(), "reading the tables that are left");
                    }
                    return Ok(self.snapshot(session, reader, left, position, made.consistent_point, facts));
                }
                Err(Rewritten(tables)) => {
                    tracing::warn!(connector = %self.name, tables = %tables.join(", "),
                        "rewritten since the slot was made; taking the snapshot anew");
                    if keeps {
                        // The temporary slot goes with its session.
                        session = self.hand_over(session).await?;
                    }
                }
            }
        }
        Err(Fault::retry("tables were rewritten again and again while the snapshot was to begin"))
    }

    /// The capture's own slot, made anew; or a temporary one beside it, for its snapshot.
    async fn make_slot(&self, session: &mut Session, beside: bool, export: bool) -> Result<CreatedSlot, Fault> {
        let settings = &self.settings;
        let deadline = settings.slot_creation;
        if !beside {
            slot::drop_slot(session, &settings.slot).await?;
            let kind = SlotKind::Lasting { failover: settings.failover };
            return Ok(replication::create_slot(session, &settings.slot, kind, export, deadline).await?);
        }
        let stem: String = settings.slot.chars().take(45).collect();
        let name = format!("{stem}_{:08x}", rand::random::<u32>());
        replication::create_slot(session, &name, SlotKind::Temporary, export, deadline).await.map_err(|error| {
            match error.code() {
                // All slots are taken.
                Some("53400") => Fault::unavailable(
                    format!("{error}. A snapshot that was cut is gone on with by a second, temporary slot"),
                    None,
                ),
                _ => error.into(),
            }
        })
    }

    fn snapshot(
        &self,
        exporter: Session,
        mut reader: SnapshotReader,
        wanted: Wanted,
        position: CapturePosition,
        shapes_from: Lsn,
        facts: &ServerFacts,
    ) -> Opened {
        let (sender, items) = mpsc::channel(64);
        let (time_us, xid) = (reader.time_us, reader.xid);
        let generated = facts.version >= 180_000;
        let tables = wanted.tables.iter().map(|table| (table.full_name(), table.estimated_rows)).collect();
        let name = self.name.clone();
        let task = tokio::spawn(async move {
            let began = Instant::now();
            let result = read_all(&mut reader, &wanted, generated, &sender).await;
            let last = match result {
                Ok(()) => match reader.finish().await {
                    Ok(()) => Ok(SnapshotItem::Done),
                    Err(error) => Err(reading_fault(error)),
                },
                Err(error) => Err(reading_fault(error)),
            };
            // Until here the slot's session has kept the exported snapshot.
            exporter.close().await;
            tracing::info!(connector = %name, seconds = began.elapsed().as_secs(), "all tables are read");
            let _ = sender.send(last).await;
        });
        Opened::Snapshot(SnapshotFeed { items, task, time_us, xid, shapes_from, tables }, Box::new(position))
    }
}

/// A table that was dropped, renamed or lost a column between the slot and its lock is found anew by the next reading.
fn reading_fault(error: PostgresError) -> Fault {
    match error.code() {
        Some("42P01" | "42703" | "3F000") => {
            Fault::retry(format!("a table was altered while the snapshot began, which is taken anew: {error}"))
        }
        Some("42501") if error.to_string().contains("row-level security") => {
            Fault::stop(format!("{error}. hint: ALTER ROLE … BYPASSRLS: a snapshot without the hidden rows is none"))
        }
        _ => error.into(),
    }
}

/// The tables' rows, in order, into the queue.
async fn read_all(
    reader: &mut SnapshotReader,
    all: &Wanted,
    generated: bool,
    queue: &mpsc::Sender<Result<SnapshotItem, Fault>>,
) -> Result<(), PostgresError> {
    const QUEUE_BYTES: usize = 8 << 20;
    const SILENCE: Duration = Duration::from_secs(300);
    let room = Arc::new(Semaphore::new(QUEUE_BYTES >> 10));
    let gone = |_| PostgresError::Protocol("nobody reads the snapshot".into());
    for wanted in &all.tables {
        let published = all.published.iter().find(|of| of.schema == wanted.schema && of.name == wanted.name);
        let Some(table) = reader.table(wanted.oid, generated, published).await? else { continue };
        if table.columns.is_empty() {
            continue;
        }
        let table = Arc::new(table);
        queue.send(Ok(SnapshotItem::Table(table.clone()))).await.map_err(gone)?;
        let late =
            |_| PostgresError::Timeout { what: format!("the next rows of {}", table.full_name()), after: SILENCE };
        let sql = timeout(SILENCE, reader.begin(&table, wanted.partitioned, published)).await.map_err(late)??;
        loop {
            let rows = timeout(SILENCE, reader.rows(&sql)).await.map_err(late)??;
            let Some(rows) = rows else { break };
            let share = (rows.len() >> 10).clamp(1, QUEUE_BYTES >> 10) as u32;
            let Ok(share) = room.clone().acquire_many_owned(share).await else { break };
            queue.send(Ok(SnapshotItem::Rows(rows, share))).await.map_err(gone)?;
        }
        queue.send(Ok(SnapshotItem::TableDone(table.full_name()))).await.map_err(gone)?;
    }
    Ok(())
}

pub(super) fn wish<'a>(
    settings: &'a CaptureSettings,
    wanted: &'a Wanted,
    facts: &ServerFacts,
) -> publication::Wish<'a> {
    publication::Wish {
        name: &settings.publication,
        autocreate: settings.autocreate,
        via_root: settings.via_root,
        tables: &wanted.tables,
        parents: &wanted.parents,
        server: facts.version,
    }
}
