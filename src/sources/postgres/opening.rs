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

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::event::{CapturePosition, Lsn, Oid, SharedTable, SnapshotProgress, Table};
use crate::log::Log;
use crate::pipeline::{Fault, FaultKind, Status};
use crate::postgres::catalog::{self, CatalogTable, ServerFacts};
use crate::postgres::replication::{self, Acknowledged, Chunks, CreatedSlot, SlotKind};
use crate::postgres::snapshot::{Rewritten, SnapshotReader};
use crate::postgres::{Address, PostgresError, Purpose, Session, publication, slot};

use super::quarantine;
use super::reading::{SnapshotFeed, SnapshotItem, read_all, reading_fault};
use super::settings::{CaptureSettings, SnapshotMode};
use super::wanted::{NOT_CAPTURED, Wanted, apply, shared_topic, take_others, wanted, wish, without_publication};

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
    /// As `Store`: tables in quarantine are tried again with that.
    Release(Box<CapturePosition>),
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

impl Drop for StreamFeed {
    fn drop(&mut self) {
        // The task says goodbye by itself; it ends on its own deadline.
        self.stop.cancel();
    }
}

pub(super) struct Opening {
    pub log: Arc<dyn Log>,
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
    /// The server could not go on, for want of the publication.
    pub unpublished: bool,
    /// Tables in quarantine are to be tried again.
    pub release: bool,
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
        if self.from.is_none() && self.is_stale().await? {
            return Err(Fault::retry("another worker has written since the log's position was read: reading it again"));
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
            quarantined: BTreeMap::new(),
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
        if let Some(progress) = &stored.snapshot {
            match slot::check(&self.settings.slot, &server, &stored, stored.commit_end) {
                // What was streamed before the tables came is not in a new snapshot.
                Err(loss) if progress.adopting => return self.lost(loss, fresh(stored.epoch + 1)),
                _ if stored.system_identifier != system.system_identifier => {
                    return Ok(Opened::Store(Box::new(fresh(stored.epoch + 1))));
                }
                _ => return self.begin(session, &server, &facts, stored).await,
            }
        }
        if self.settings.snapshot == SnapshotMode::InitialOnly {
            // Nobody will read the slot: it would only keep WAL.
            slot::drop_slot(&mut session, &self.settings.slot).await?;
            return Ok(Opened::Finished);
        }
        let handed = self.from.as_ref().map_or(stored.commit_end, |from| from.commit_end);
        if let Err(loss) = slot::check(&self.settings.slot, &server, &stored, handed) {
            return self.lost(loss, fresh(stored.epoch + 1));
        }
        // Without data there may never have been one: a slot that was there is gone on with.
        let gone = self.settings.snapshot != SnapshotMode::NoData
            && publication::find(&mut session, &self.settings.publication).await?.is_none();
        if gone || self.unpublished {
            return self.lost(without_publication(&self.settings), fresh(stored.epoch + 1));
        }
        if self.settings.snapshot == SnapshotMode::Always && self.first {
            // Under the slot that is there: what was committed since is streamed, too.
            let progress = SnapshotProgress { consistent_point: stored.commit_end, ..SnapshotProgress::default() };
            return Ok(Opened::Release(Box::new(CapturePosition { snapshot: Some(progress), ..stored })));
        }
        let mut position = self.from.clone().unwrap_or(stored);
        let (mut wanted, changes) = self.compare(&mut session, &facts).await?;
        if let Some(released) = quarantine::released(&self, &position, &wanted) {
            return Ok(Opened::Release(Box::new(released)));
        }
        if changes.creates || self.settings.snapshot == SnapshotMode::NoData {
            self.publish(&mut session, &wanted, &changes).await?;
        } else if self.adopt && !changes.added.is_empty() {
            // Stored before they are published: what is published and has not been read would not be missed any more.
            let taken = |table: &CatalogTable| !changes.added.contains(&table.full_name());
            let done = wanted.tables.iter().filter(|table| taken(table)).map(CatalogTable::full_name).collect();
            let consistent_point = position.commit_end;
            let progress = SnapshotProgress { consistent_point, done, begun: Vec::new(), adopting: true };
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

    /// Whether the position that was read is not the log's any more: who had the slot until now may have written, and
    /// told the server, in between.
    async fn is_stale(&self) -> Result<bool, Fault> {
        let Some(now) = self.log.position(&self.name).await? else { return Ok(false) };
        let now: Option<CapturePosition> = serde_json::from_slice(&now).ok();
        Ok(now.is_some() && now != self.stored)
    }

    /// Changes are or may be missing in the log: all is read anew where that is asked for.
    fn lost(&self, loss: impl std::fmt::Display, anew: CapturePosition) -> Result<Opened, Fault> {
        if matches!(self.settings.snapshot, SnapshotMode::WhenNeeded | SnapshotMode::Always) {
            tracing::warn!(connector = %self.name, "{loss}; reading all tables anew (snapshot.mode). Rows that were \
                deleted meanwhile stay in the topics");
            return Ok(Opened::Store(Box::new(anew)));
        }
        Err(Fault::stop(format!(
            "{loss}. hint: 'snapshot.mode: when_needed' reads all tables anew; or compare by hand, then \
             'tidegate connectors reset {} --to end'",
            self.name
        )))
    }

    /// Another connection in place of this one, with the slot held: a walsender that has run SQL on tables has the catalog
    /// of now in its caches, and decodes older rows by it (tried: a later column, null, in rows from before it). On the
    /// stream's connection nothing that touches a table is ever run.
    async fn hand_over(&self, mut session: Session) -> Result<Session, Fault> {
        slot::release(&mut session, &self.settings.slot).await?;
        session.close().await;
        let mut session = self.address.connect(Purpose::Replication).await?;
        // A transaction is decoded and sent within one of the walsender's own.
        catalog::lift_transaction_timeout(&mut session).await?;
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
                "are asked for and not captured: only a role that owns them and the publication can publish them; \
                 hint: 'tidegate plan'");
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
        apply(session, changes).await?;
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
        let (mut wanted, mut changes) = self.compare(&mut session, facts).await?;
        // Made again under the name of one that is not read now: published unread it would not be missed any more.
        let done = stored.snapshot.as_ref().map_or(&[][..], |progress| &progress.done);
        if !changes.creates && changes.added.iter().any(|table| done.contains(table)) {
            wanted.tables.retain(|table| {
                let name = table.full_name();
                !(done.contains(&name) && changes.added.contains(&name))
            });
            let found = publication::find(&mut session, &self.settings.publication).await?;
            changes = publication::changes(found.as_ref(), &wish(&self.settings, &wanted, facts))?;
        }
        self.publish(&mut session, &wanted, &changes).await?;
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
                    let mut position = stored.clone();
                    if position.ordinal == 0 {
                        position.fingerprint = settings.fingerprint();
                    }
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
            let mut left = Wanted { tables: wanted.tables.clone(), leaves: wanted.leaves.clone(), ..Wanted::default() };
            left.tables.retain(|table| !done.contains(&table.full_name()));
            let reading = self.address.connect(Purpose::Sql).await?;
            let locked: Vec<(Oid, String, String)> = left
                .tables
                .iter()
                .chain(&left.leaves)
                .map(|table| (table.oid, table.schema.clone(), table.name.clone()))
                .collect();
            match SnapshotReader::open(reading, &snapshot, &locked).await.map_err(reading_fault)? {
                Ok(mut reader) => {
                    left.published = reader.published(&settings.publication).await.map_err(reading_fault)?;
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
