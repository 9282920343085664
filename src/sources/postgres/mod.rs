//! Capture: committed changes of a PostgreSQL database, as batches of Debezium's events.
//!
//! The way of a change: the stream's own task ([`crate::postgres::replication`]) receives bytes; [`writer`] turns them
//! into records; the pipeline has them written; [`PostgresSource::acknowledge`] lets the server know, and nothing
//! else does (CORRECTNESS 4). [`opening`] brings a capture from what is stored to a stream, with a snapshot where one is
//! due. [`relations`] makes a table ready.
//!
//! # No gap and no overlap
//! The slot's consistent point divides all commits: those before it are in the exported snapshot, those after it in
//! the stream. Rows of the snapshot are written first, then the position at the consistent point, then the stream from
//! there. Until that position is durable, a restart begins the snapshot anew with a new slot (see [`opening`]).
//!
//! # A log that is away
//! A server does not shut down while a walsender waits for a client that withholds its acknowledgement (CORRECTNESS
//! 5). When nothing has moved for [`STALLED`] although there is something to move, the connection is closed; the next
//! batch asked for opens it again, behind what was handed on.

mod envelope;
mod opening;
mod plan;
mod relations;
mod settings;
mod watch;
mod writer;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use crate::event::{CapturePosition, CapturedBatch, Oid, StoredPosition};
use crate::log::Log;
use crate::pipeline::{Batch, ConnectorState, Fault, Lag, Source, Status};
use crate::postgres::Address;
use crate::postgres::replication::Chunk;
use crate::registry::Registry;

use envelope::{Context, MessageTopic, snapshot_marker};
use opening::{Opened, Opening, SnapshotFeed, SnapshotItem, StreamFeed};
use relations::{Captured, Catalog, Origin, Resolver};
use writer::{Step, Writer};

pub use plan::{plan, preview};
pub use settings::{CaptureSettings, SnapshotMode};

/// Time without any move after which the replication connection is closed.
const STALLED: Duration = Duration::from_secs(10);
/// How soon an idle slot is moved on when the server asks (it asks before it shuts down).
const ASKED: Duration = Duration::from_secs(1);

/// What acknowledging a batch means.
#[derive(Debug)]
pub struct Mark {
    position: Option<CapturePosition>,
    /// Number of the batch.
    number: u64,
    commit_time_us: Option<i64>,
}

type Resolving = JoinHandle<Result<Captured, Fault>>;

enum Stage {
    Closed,
    /// The position that was handed on must be durable first.
    Storing,
    Opening(JoinHandle<Result<Opened, Fault>>),
    Snapshot(Box<Snapshot>),
    Streaming(Box<Streaming>),
    Finished,
}

struct Snapshot {
    feed: SnapshotFeed,
    position: CapturePosition,
    captured: Option<Captured>,
    /// Chunks that are being written: the last row of one waits, since whether it is the table's last row is known
    /// only with what follows.
    rows: BytesMut,
    more: Option<SnapshotItem>,
    resolving: Option<Resolving>,
    rows_of_table: u64,
    rows_read: u64,
    tables_done: usize,
    began: Instant,
    told: Instant,
}

struct Streaming {
    feed: StreamFeed,
    chunk: Option<Chunk>,
    cursor: usize,
    resolving: Option<(Resolving, usize)>,
    readying_messages: Option<JoinHandle<Result<MessageTopic, Fault>>>,
    /// When received bytes were last looked at, or found to be none. Apart from [`PostgresSource::moved`]: changes that
    /// are in the log already, or filtered, are consumed and nothing is handed on.
    consumed: Instant,
}

/// See the module.
pub struct PostgresSource {
    settings: Arc<CaptureSettings>,
    address: Address,
    name: Arc<str>,
    status: Arc<Status>,
    resolver: Resolver,
    stored: StoredPosition,
    stage: Stage,
    writer: Option<Writer>,
    /// Position of the last batch handed on; where to go on from without a fault.
    handed: Option<CapturePosition>,
    /// What is durable.
    durable: Option<CapturePosition>,
    batches_handed: u64,
    batches_durable: u64,
    /// When something last moved: a batch handed on, or acknowledged.
    moved: Instant,
    /// When the position was last stored.
    stored_at: Instant,
    asked: u64,
    first: bool,
    /// Columns that a snapshot found nulls in, against the catalog.
    nullable: Vec<(Oid, String)>,
    watch: watch::Watch,
}

/// Aborts the task when dropped: for the opening, which holds a slot that is being made.
fn abort<T>(task: &JoinHandle<T>) {
    task.abort();
}

impl Drop for PostgresSource {
    fn drop(&mut self) {
        self.drop_stage();
    }
}

impl PostgresSource {
    pub fn new(
        settings: CaptureSettings,
        address: Address,
        name: Arc<str>,
        log: Arc<dyn Log>,
        registry: Arc<dyn Registry>,
        status: Arc<Status>,
        stored: StoredPosition,
    ) -> Self {
        let mut settings = settings;
        settings.encoding.database.clone_from(&address.dbname);
        let settings = Arc::new(settings);
        let catalog = Catalog::new(address.clone());
        let watch = watch::Watch::new(catalog.clone(), settings.clone(), name.clone(), status.clone());
        let resolver = Resolver { settings: settings.clone(), log, registry, name: name.clone(), catalog };
        PostgresSource {
            settings,
            address,
            name,
            status,
            resolver,
            stored,
            stage: Stage::Closed,
            writer: None,
            handed: None,
            durable: None,
            batches_handed: 0,
            batches_durable: 0,
            moved: Instant::now(),
            stored_at: Instant::now(),
            asked: 0,
            first: true,
            nullable: Vec::new(),
            watch,
        }
    }

    fn drop_stage(&mut self) {
        self.status.set_fact("stage", "disconnected");
        match std::mem::replace(&mut self.stage, Stage::Closed) {
            Stage::Opening(task) => abort(&task),
            Stage::Snapshot(snapshot) => {
                if let Some(task) = &snapshot.resolving {
                    abort(task);
                }
            }
            Stage::Streaming(streaming) => {
                if let Some((task, _)) = &streaming.resolving {
                    abort(task);
                }
            }
            _ => {}
        }
    }

    fn writer(&mut self, position: &CapturePosition) -> &mut Writer {
        let context = Context::new(&self.settings.prefix);
        let settings = &self.settings;
        self.writer.get_or_insert_with(|| Writer::new(settings.clone(), context, position.clone()))
    }

    /// Hands on what is written, with the position it brings the log to.
    fn hand_on(&mut self, position: Option<CapturePosition>) -> Batch<CapturedBatch, Mark> {
        let (records, events) = self.writer.as_mut().map(Writer::take).unwrap_or_default();
        self.batches_handed += 1;
        self.moved = Instant::now();
        if let Some(position) = &position {
            self.handed = Some(position.clone());
            self.stored_at = Instant::now();
        }
        let mark = Mark {
            position: position.clone(),
            number: self.batches_handed,
            commit_time_us: self.writer.as_ref().and_then(|writer| writer.last_commit_us),
        };
        let bytes = records.byte_size();
        Batch { body: CapturedBatch { records, position }, mark, events, bytes }
    }

    fn open(&mut self) -> Stage {
        if self.durable.is_none() {
            self.durable = self.stored.get();
        }
        let opening = Opening {
            settings: self.settings.clone(),
            address: self.address.clone(),
            status: self.status.clone(),
            name: self.name.clone(),
            stored: self.durable.clone(),
            from: self.handed.clone(),
            first: self.first,
        };
        Stage::Opening(tokio::spawn(opening.open()))
    }

    fn opened(&mut self, opened: Opened) -> Option<Batch<CapturedBatch, Mark>> {
        match opened {
            Opened::Store(position) => {
                self.first = false;
                self.stage = Stage::Storing;
                if let Some(writer) = &mut self.writer {
                    writer.reset((*position).clone());
                }
                return Some(self.hand_on(Some(*position)));
            }
            Opened::Snapshot(feed, position) => {
                self.first = false;
                self.status.set_state(ConnectorState::Snapshot);
                self.status.set_fact("stage", "snapshot");
                let (time_us, xid) = (feed.time_us, feed.xid);
                let writer = self.writer(&position);
                writer.reset((*position).clone());
                writer.describe_snapshot(time_us, xid);
                let now = Instant::now();
                self.stage = Stage::Snapshot(Box::new(Snapshot {
                    feed,
                    position: *position,
                    captured: None,
                    rows: BytesMut::new(),
                    more: None,
                    resolving: None,
                    rows_of_table: 0,
                    rows_read: 0,
                    tables_done: 0,
                    began: now,
                    told: now,
                }));
            }
            Opened::Stream(feed) => self.start_stream(*feed),
            Opened::Finished => {
                self.status.set_progress(None);
                self.status.set_fact("snapshot", "whole; nothing more to do (snapshot.mode: initial_only)");
                self.stage = Stage::Finished;
            }
        }
        None
    }

    fn start_stream(&mut self, feed: StreamFeed) {
        self.first = false;
        self.status.set_fact("stage", "streaming");
        self.status.set_state(ConnectorState::Running);
        self.status.set_progress(None);
        let position = feed.position.clone();
        self.writer(&position).reset(position.clone());
        self.handed = Some(position);
        self.moved = Instant::now();
        self.asked = 0;
        self.stage = Stage::Streaming(Box::new(Streaming {
            feed,
            chunk: None,
            cursor: 0,
            resolving: None,
            readying_messages: None,
            consumed: Instant::now(),
        }));
    }

    /// When the position, moved by filtered or foreign transactions alone, is to be stored.
    fn idle_due(&self, asked: u64) -> Instant {
        let wait = if asked == self.asked { self.settings.idle_advance } else { ASKED };
        self.stored_at + wait
    }

    async fn next_of_stream(&mut self) -> Result<Option<Batch<CapturedBatch, Mark>>, Fault> {
        loop {
            let (Stage::Streaming(streaming), Some(writer)) = (&mut self.stage, &mut self.writer) else {
                return Ok(None);
            };
            if let Some((task, next)) = &mut streaming.resolving {
                let captured = joined(task.await)?;
                streaming.cursor = *next;
                streaming.resolving = None;
                writer.relations.insert(captured.table.oid, captured);
            }
            if let Some(task) = &mut streaming.readying_messages {
                writer.messages = Some(joined(task.await)?);
                streaming.readying_messages = None;
            }
            if let Some(chunk) = &streaming.chunk {
                let step = writer.run(&chunk.bytes, &mut streaming.cursor, now_ns())?;
                streaming.consumed = Instant::now();
                match step {
                    Step::Consumed => {
                        streaming.chunk = None;
                        // Millions of changes may be passed over in a row: acknowledgements, ticks and a stop wait for
                        // this to let go.
                        tokio::task::yield_now().await;
                    }
                    Step::Full => {
                        let position = writer.position.clone();
                        return Ok(Some(self.hand_on(Some(position))));
                    }
                    Step::Relation { relation, next } => {
                        let before = writer.relations.get(&relation.oid).map(|captured| captured.table.clone());
                        let work = self.resolver.clone().resolve(Origin::Wal(relation, before));
                        streaming.resolving = Some((tokio::spawn(work), next));
                    }
                    Step::Nullable { oid, column } => {
                        let Some(captured) = writer.relations.get(&oid) else { continue };
                        let origin = Origin::Nullable(captured.relation.clone(), captured.table.clone(), column);
                        let work = self.resolver.clone().resolve(origin);
                        streaming.resolving = Some((tokio::spawn(work), streaming.cursor));
                    }
                    Step::Messages => {
                        streaming.readying_messages = Some(tokio::spawn(MessageTopic::ready(self.resolver.clone())));
                    }
                }
                continue;
            }
            let received = match streaming.feed.chunks.try_recv() {
                Ok(received) => Some(received),
                Err(tokio::sync::mpsc::error::TryRecvError::Empty) => None,
                Err(tokio::sync::mpsc::error::TryRecvError::Disconnected) => return Err(stream_ended()),
            };
            if let Some(received) = received {
                streaming.chunk = Some(received?);
                streaming.cursor = 0;
                continue;
            }
            // Nothing more is here: what is written may go, at the end of a transaction.
            let between = !writer.in_transaction();
            if between && !writer.batch.is_empty() {
                let position = writer.position.clone();
                return Ok(Some(self.hand_on(Some(position))));
            }
            let moved_on =
                between && self.handed.as_ref().is_none_or(|handed| writer.position.commit_end > handed.commit_end);
            let asked = streaming.feed.acknowledged.asked();
            let position = writer.position.clone();
            if !moved_on {
                self.asked = asked;
            }
            let due = self.idle_due(asked);
            let Stage::Streaming(streaming) = &mut self.stage else { return Ok(None) };
            let received = if moved_on {
                // Looks again a little later, since the server may ask meanwhile.
                let soon = due.min(Instant::now() + ASKED);
                match timeout_at(soon, streaming.feed.chunks.recv()).await {
                    Ok(received) => received,
                    Err(_) if Instant::now() >= due => {
                        self.asked = asked;
                        return Ok(Some(self.hand_on(Some(position))));
                    }
                    Err(_) => continue,
                }
            } else {
                streaming.feed.chunks.recv().await
            };
            streaming.chunk = Some(received.ok_or_else(stream_ended)??);
            streaming.cursor = 0;
        }
    }

    async fn next_of_snapshot(&mut self) -> Result<Option<Batch<CapturedBatch, Mark>>, Fault> {
        loop {
            let (Stage::Snapshot(snapshot), Some(writer)) = (&mut self.stage, &mut self.writer) else {
                return Ok(None);
            };
            if let Some(task) = &mut snapshot.resolving {
                snapshot.captured = Some(joined(task.await)?);
                snapshot.resolving = None;
            }
            // All rows but the last one there is: whether that is the table's last, what follows will say.
            let last_too = snapshot.more.as_ref().is_some_and(|item| !matches!(item, SnapshotItem::Rows(..)));
            if let Some(captured) = &mut snapshot.captured {
                let (total, now) = (snapshot.feed.tables.len(), now_ns());
                while let Some((frame, length)) = crate::postgres::frames::next_frame(&snapshot.rows)? {
                    let is_last = length == snapshot.rows.len();
                    if is_last && !last_too {
                        break;
                    }
                    let row_starts = length - frame.body.len();
                    let marker = snapshot_marker(
                        snapshot.rows_read == 0,
                        snapshot.rows_of_table == 0,
                        is_last,
                        is_last && snapshot.tables_done + 1 == total,
                    );
                    let mut row = snapshot.rows.split_to(length);
                    let nullable = writer.snapshot_row(captured, &mut row[row_starts..], marker, now)?;
                    if let Some(column) = nullable {
                        // A constraint that was never validated (NOT NULL NOT VALID): the rows decide.
                        return Err(self.remember_nullable(column));
                    }
                    snapshot.rows_read += 1;
                    snapshot.rows_of_table += 1;
                    if writer.is_full() {
                        self.tell_progress();
                        return Ok(Some(self.hand_on(None)));
                    }
                }
            }
            match snapshot.more.take() {
                None => {}
                Some(SnapshotItem::Rows(rows, share)) => {
                    if snapshot.rows.is_empty() {
                        snapshot.rows = rows;
                    } else {
                        // One row was held back: it is put before the next ones.
                        snapshot.rows.unsplit(rows);
                    }
                    drop(share);
                    continue;
                }
                Some(SnapshotItem::Table(mut table)) => {
                    snapshot.rows_of_table = 0;
                    for (oid, name) in &self.nullable {
                        if *oid != table.oid {
                            continue;
                        }
                        tracing::debug!(%oid, column = %name, "taken for nullable");
                        let columns = &mut Arc::make_mut(&mut table).columns;
                        columns.iter_mut().filter(|column| column.name == *name).for_each(|c| c.nullable = true);
                    }
                    let work = self.resolver.clone().resolve(Origin::Snapshot(table));
                    snapshot.resolving = Some(tokio::spawn(work));
                    continue;
                }
                Some(SnapshotItem::TableDone(table)) => {
                    snapshot.captured = None;
                    snapshot.tables_done += 1;
                    tracing::info!(connector = %self.name, %table, rows = snapshot.rows_of_table, "read");
                    continue;
                }
                Some(SnapshotItem::Done) => {
                    let position = CapturePosition { snapshot: None, ..snapshot.position.clone() };
                    tracing::info!(connector = %self.name, rows = snapshot.rows_read, tables = snapshot.tables_done,
                        at = %position.commit_end, seconds = snapshot.began.elapsed().as_secs(), "snapshot is whole");
                    self.status.set_progress(None);
                    writer.position = position.clone();
                    self.stage = Stage::Storing;
                    return Ok(Some(self.hand_on(Some(position))));
                }
            }
            match snapshot.feed.items.recv().await {
                Some(Ok(item)) => snapshot.more = Some(item),
                Some(Err(fault)) => return Err(fault),
                None => return Err(Fault::retry("the reading of the snapshot ended without a word")),
            }
        }
    }

    /// The snapshot is begun anew, with this column taken for nullable.
    fn remember_nullable(&mut self, column: usize) -> Fault {
        let Stage::Snapshot(snapshot) = &self.stage else { return stream_ended() };
        let Some(captured) = &snapshot.captured else { return stream_ended() };
        let name = captured.table.columns.get(column).map(|column| column.name.clone()).unwrap_or_default();
        let fault = Fault::retry(format!(
            "{}.{name} has a null although the catalog says it has none; reading again with a nullable column",
            captured.table.full_name()
        ));
        self.nullable.push((captured.table.oid, name));
        fault
    }

    fn tell_progress(&mut self) {
        let Stage::Snapshot(snapshot) = &mut self.stage else { return };
        if snapshot.told.elapsed() < Duration::from_millis(500) {
            return;
        }
        snapshot.told = Instant::now();
        let estimated: u64 = snapshot.feed.tables.iter().map(|(_, rows)| rows).sum();
        let seconds = snapshot.began.elapsed().as_secs_f64().max(0.001);
        let rate = snapshot.rows_read as f64 / seconds;
        let left = estimated.saturating_sub(snapshot.rows_read) as f64 / rate.max(1.0);
        self.status.set_progress(Some(format!(
            "snapshot: {} of about {} rows, {} of {} tables, {:.0} rows/s, about {:.0} s left",
            snapshot.rows_read,
            estimated.max(snapshot.rows_read),
            snapshot.tables_done,
            snapshot.feed.tables.len(),
            rate,
            left
        )));
        metrics::gauge!("tidegate_snapshot_rows", "connector" => self.name.to_string()).set(snapshot.rows_read as f64);
    }

    fn tell_lag(&self) {
        let Stage::Streaming(streaming) = &self.stage else { return };
        let server = streaming.feed.acknowledged.server_end();
        let durable = streaming.feed.acknowledged.durable();
        let bytes = server.bytes_since(durable);
        let idle = self.batches_handed == self.batches_durable
            && self.writer.as_ref().is_none_or(|writer| writer.batch.is_empty() && !writer.in_transaction());
        let seconds = match self.writer.as_ref().and_then(|writer| writer.last_commit_us) {
            Some(time) if !idle => (now_us() - time).max(0) as f64 / 1e6,
            _ => 0.0,
        };
        self.status.set_lag(Lag { bytes: Some(bytes), seconds: Some(seconds), events: None });
        let name = self.name.to_string();
        metrics::gauge!("tidegate_replication_lag_bytes", "connector" => name.clone()).set(bytes as f64);
        metrics::gauge!("tidegate_replication_lag_seconds", "connector" => name).set(seconds);
    }

    /// What was handed on does not become durable, or what was received is not asked for.
    fn stalled(&mut self) -> bool {
        let Stage::Streaming(streaming) = &mut self.stage else { return false };
        if streaming.chunk.is_none() && streaming.feed.chunks.is_empty() {
            streaming.consumed = Instant::now();
        }
        let in_flight = self.batches_handed != self.batches_durable;
        (in_flight && self.moved.elapsed() > STALLED) || streaming.consumed.elapsed() > STALLED
    }
}

fn now_us() -> i64 {
    chrono::Utc::now().timestamp_micros()
}

fn now_ns() -> i64 {
    now_us().saturating_mul(1000)
}

fn stream_ended() -> Fault {
    Fault::retry("the replication stream ended without a word")
}

fn joined<T>(result: Result<Result<T, Fault>, tokio::task::JoinError>) -> Result<T, Fault> {
    result.unwrap_or_else(|error| Err(Fault::retry(format!("a task of the capture ended: {error}"))))
}

#[async_trait]
impl Source for PostgresSource {
    type Batch = CapturedBatch;
    type Mark = Mark;

    async fn next(&mut self) -> Result<Batch<CapturedBatch, Mark>, Fault> {
        loop {
            let batch = match &mut self.stage {
                Stage::Closed => {
                    self.stage = self.open();
                    None
                }
                Stage::Opening(task) => {
                    let opened = joined(task.await);
                    self.stage = Stage::Closed;
                    self.opened(opened?)
                }
                Stage::Storing => {
                    // Everything handed on must be durable before the server is asked for more.
                    if self.batches_handed != self.batches_durable {
                        return std::future::pending().await;
                    }
                    self.stage = Stage::Closed;
                    None
                }
                Stage::Snapshot(_) => self.next_of_snapshot().await?,
                Stage::Streaming(_) => self.next_of_stream().await?,
                Stage::Finished => return std::future::pending().await,
            };
            if let Some(batch) = batch {
                return Ok(batch);
            }
        }
    }

    async fn acknowledge(&mut self, mark: Mark) -> Result<(), Fault> {
        self.batches_durable = mark.number;
        self.moved = Instant::now();
        if let Some(position) = mark.position {
            if position.snapshot.is_none()
                && let Stage::Streaming(streaming) = &self.stage
            {
                streaming.feed.acknowledged.advance(position.commit_end);
            }
            self.durable = Some(position);
        }
        if let Some(time) = mark.commit_time_us {
            metrics::gauge!("tidegate_capture_last_commit_seconds", "connector" => self.name.to_string())
                .set(time as f64 / 1e6);
        }
        Ok(())
    }

    async fn restart(&mut self) -> Result<(), Fault> {
        self.drop_stage();
        // What the log says, not what was acknowledged: a write may have landed without our hearing of it.
        self.durable = self.stored.get();
        self.handed = None;
        self.batches_durable = self.batches_handed;
        if let (Some(writer), Some(durable)) = (&mut self.writer, &self.durable) {
            writer.reset(durable.clone());
        }
        Ok(())
    }

    async fn tick(&mut self, paused: bool) -> Result<(), Fault> {
        self.watch.tick();
        self.tell_lag();
        if self.stalled() {
            tracing::warn!(connector = %self.name, paused,
                "nothing has moved for {} s: closing the replication connection, so that the server is not held up",
                STALLED.as_secs());
            self.drop_stage();
            if let (Some(writer), Some(handed)) = (&mut self.writer, &self.handed) {
                writer.reset(handed.clone());
            }
        }
        Ok(())
    }

    async fn close(&mut self) -> Result<(), Fault> {
        if let Stage::Streaming(streaming) = &mut self.stage {
            streaming.feed.stop.cancel();
            let _ = tokio::time::timeout(Duration::from_secs(3), &mut streaming.feed.task).await;
        }
        self.drop_stage();
        Ok(())
    }
}
