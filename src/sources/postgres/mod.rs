//! Capture: committed changes of a PostgreSQL database, as batches of Debezium's events.
//!
//! The way of a change: the stream's own task ([`crate::postgres::replication`]) receives bytes; [`writer`] turns them
//! into records; the pipeline has them written; [`PostgresSource::acknowledge`] lets the server know, and nothing
//! else does (CORRECTNESS 4). [`opening`] brings a capture from what is stored to a stream, with a snapshot where one is
//! due; [`snapshot`] and [`stream`] are the two stages that write. [`relations`] makes a table ready, [`schemas`] keeps
//! what it was taken for.
//!
//! # No gap and no overlap
//! The slot's consistent point divides all commits: those before it are in the exported snapshot, those after it in
//! the stream. Rows of the snapshot are written first, then the position at the consistent point, then the stream from
//! there. Until then a restart reads the tables that are left, under the same slot (see [`opening`]).
//!
//! # A log that is away
//! A server does not shut down while a walsender waits for a client that withholds its acknowledgement (CORRECTNESS
//! 5). When nothing has moved for [`STALLED`] although there is something to move, the connection is closed; the next
//! batch asked for opens it again, behind what was handed on.

mod debezium;
mod envelope;
mod opening;
mod page;
mod plan;
mod quarantine;
mod reading;
mod relations;
mod schemas;
mod settings;
mod snapshot;
mod stream;
mod wanted;
mod watch;
mod writer;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::event::{CapturePosition, CapturedBatch, Lsn, Quarantine, StoredPosition};
use crate::log::Log;
use crate::pipeline::{Batch, ConnectorState, Fault, Lag, Source, Status};
use crate::postgres::Address;
use crate::registry::Registry;

use envelope::Context;
use opening::{Opened, Opening, StreamFeed};
use relations::{Captured, Catalog, Resolver};
use schemas::{Found, Schemas};
use snapshot::{Nullable, Read, Snapshot};
use stream::{Idle, Streaming};
use writer::Writer;

pub use plan::{plan, preview};
pub use settings::{CaptureSettings, OnIncompatible, SnapshotMode};
pub use wanted::ensure_publication;
pub use watch::measure_slot;

/// Time without any move after which the replication connection is closed.
const STALLED: Duration = Duration::from_secs(10);
/// Silence after which buffers are given up.
const RESTING: Duration = Duration::from_secs(5);

/// What acknowledging a batch means.
#[derive(Debug)]
pub struct Mark {
    position: Option<CapturePosition>,
    /// Number of the batch.
    number: u64,
    commit_time_us: Option<i64>,
}

type Resolving = JoinHandle<Result<Captured, Fault>>;
/// What an opening came to, and the tables' shapes where they were to be read.
type Begun = (Opened, Option<Vec<Found>>);

enum Stage {
    Closed,
    /// The position that was handed on must be durable first.
    Storing,
    Opening(JoinHandle<Result<Begun, Fault>>),
    Snapshot(Box<Snapshot>),
    Streaming(Box<Streaming>),
    Finished,
}

/// See the module.
pub struct PostgresSource {
    settings: Arc<CaptureSettings>,
    address: Address,
    name: Arc<str>,
    status: Arc<Status>,
    resolver: Resolver,
    stored: StoredPosition,
    schemas: Schemas,
    stage: Stage,
    writer: Option<Writer>,
    /// Position of the last batch handed on; where to go on from without a fault.
    handed: Option<CapturePosition>,
    /// What is durable.
    durable: Option<CapturePosition>,
    batches_handed: u64,
    batches_durable: u64,
    /// The last batch that had events: later ones only move the position.
    batches_filled: u64,
    /// Up to here nothing is to come: all is durable, or was filtered.
    clear: Lsn,
    /// When something last moved: a batch handed on, or acknowledged.
    moved: Instant,
    /// When the position was last stored.
    stored_at: Instant,
    first: bool,
    /// Since when an opening is through and nobody has asked for what it came to.
    unasked: Option<Instant>,
    /// The next opening takes tables that are new.
    adopt: bool,
    /// The server could not go on, for want of the publication.
    unpublished: bool,
    /// A person asked for tables in quarantine to be read anew.
    release: bool,
    /// What was last told of quarantines.
    told: BTreeMap<String, Quarantine>,
    nullable: Nullable,
    watch: watch::Watch,
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
        let resolver =
            Resolver { settings: settings.clone(), log, registry, name: name.clone(), status: status.clone(), catalog };
        PostgresSource {
            settings,
            address,
            schemas: Schemas::new(&name),
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
            batches_filled: 0,
            clear: Lsn::ZERO,
            moved: Instant::now(),
            stored_at: Instant::now(),
            first: true,
            unasked: None,
            adopt: false,
            unpublished: false,
            release: false,
            told: BTreeMap::new(),
            nullable: Nullable::new(),
            watch,
        }
    }

    /// Reads tables in quarantine anew when it begins, where `release` is true.
    pub fn releasing(mut self, release: bool) -> Self {
        self.release = release;
        self
    }

    fn drop_stage(&mut self) {
        self.status.set_fact("stage", "disconnected");
        self.schemas.given_up();
        if let Stage::Opening(task) = std::mem::replace(&mut self.stage, Stage::Closed) {
            // It may hold a slot that is being made.
            task.abort();
        }
    }

    fn writer(&mut self, position: &CapturePosition) -> &mut Writer {
        let context = Context::new(&self.settings.prefix);
        let settings = &self.settings;
        self.writer.get_or_insert_with(|| Writer::new(settings.clone(), context, position.clone()))
    }

    fn tell_quarantine(&mut self, of: &BTreeMap<String, Quarantine>) {
        if self.told != *of {
            quarantine::tell(&self.name, &self.status, &self.told, of);
            self.told.clone_from(of);
        }
    }

    /// Hands on what is written, with the position it brings the log to.
    fn hand_on(&mut self, position: CapturePosition) -> Batch<CapturedBatch, Mark> {
        self.tell_quarantine(&position.quarantined);
        let (records, events) = self.writer.as_mut().map(Writer::take).unwrap_or_default();
        let own = self.schemas.handed_on();
        self.batches_handed += 1;
        if events > 0 {
            self.batches_filled = self.batches_handed;
        }
        self.moved = Instant::now();
        self.handed = Some(position.clone());
        self.stored_at = Instant::now();
        let mark = Mark {
            position: Some(position.clone()),
            number: self.batches_handed,
            commit_time_us: self.writer.as_ref().and_then(|writer| writer.last_commit_us),
        };
        let bytes = records.byte_size();
        let spares = self.writer.as_ref().map(|writer| writer.spares.clone()).unwrap_or_default();
        Batch { body: CapturedBatch { records, own, position: Some(position), spares }, mark, events, bytes }
    }

    fn open(&mut self) -> Stage {
        if self.durable.is_none() {
            self.durable = self.stored.get();
        }
        if let Some(quarantined) = self.durable.as_ref().map(|durable| durable.quarantined.clone()) {
            self.tell_quarantine(&quarantined);
        }
        let opening = Opening {
            log: self.resolver.log.clone(),
            settings: self.settings.clone(),
            address: self.address.clone(),
            status: self.status.clone(),
            name: self.name.clone(),
            stored: self.durable.clone(),
            from: self.handed.clone(),
            first: self.first,
            adopt: self.adopt,
            unpublished: self.unpublished,
            release: self.release,
        };
        let (log, load) = (self.resolver.log.clone(), !self.schemas.is_loaded());
        Stage::Opening(tokio::spawn(async move {
            let found = match load {
                true => Some(schemas::read(&log, &opening.name, &opening.settings).await?),
                false => None,
            };
            Ok((opening.open().await?, found))
        }))
    }

    fn opened(&mut self, opened: Opened) -> Option<Batch<CapturedBatch, Mark>> {
        self.first = false;
        self.adopt = false;
        self.unpublished = false;
        if matches!(opened, Opened::Release(_) | Opened::Stream(_)) {
            self.release = false;
        }
        match opened {
            Opened::Store(position) | Opened::Release(position) => {
                self.stage = Stage::Storing;
                if let Some(writer) = &mut self.writer {
                    writer.reset((*position).clone());
                }
                Some(self.hand_on(*position))
            }
            Opened::Snapshot(feed, position) => {
                self.status.set_state(ConnectorState::Snapshot);
                self.status.set_fact("stage", "snapshot");
                let (time_us, xid) = (feed.time_us, feed.xid);
                let writer = self.writer(&position);
                writer.reset((*position).clone());
                writer.describe_snapshot(time_us, xid);
                self.stage = Stage::Snapshot(Box::new(Snapshot::new(feed, (*position).clone())));
                // Before the first row: after a crash it is known under which slot rows were read.
                Some(self.hand_on(*position))
            }
            Opened::Stream(feed) => {
                self.start_stream(*feed);
                None
            }
            Opened::Finished => {
                self.status.set_progress(None);
                self.status.set_fact("snapshot", "whole; nothing more to do (snapshot.mode: initial_only)");
                self.stage = Stage::Finished;
                None
            }
        }
    }

    fn start_stream(&mut self, feed: StreamFeed) {
        self.status.set_fact("stage", "streaming");
        self.status.set_state(ConnectorState::Running);
        self.status.set_progress(None);
        let position = feed.position.clone();
        let writer = self.writer(&position);
        writer.reset(position.clone());
        writer.behind = Some(feed.behind);
        self.clear = feed.acknowledged.durable();
        self.watch.take_wrong();
        self.handed = Some(position);
        self.moved = Instant::now();
        self.stage = Stage::Streaming(Box::new(Streaming::new(feed, self.settings.heartbeat)));
    }

    /// What the present stage has to hand on.
    async fn next_of_stage(&mut self) -> Result<Option<Batch<CapturedBatch, Mark>>, Fault> {
        let Some(writer) = &mut self.writer else { return Err(stream_ended()) };
        let position = match &mut self.stage {
            Stage::Snapshot(snapshot) => {
                match snapshot.next(writer, &mut self.schemas, &self.resolver, &mut self.nullable).await? {
                    Read::Part(position) => position,
                    Read::Whole(position) => {
                        writer.position = position.clone();
                        self.stage = Stage::Storing;
                        position
                    }
                }
            }
            Stage::Streaming(streaming) => {
                let idle = Idle {
                    since: self.stored_at,
                    every: self.settings.idle_advance,
                    handed: self.handed.as_ref().map(|handed| handed.commit_end),
                };
                let next = streaming.next(writer, &mut self.schemas, &self.resolver, idle).await;
                self.unpublished |= streaming.unpublished;
                next?
            }
            _ => return Ok(None),
        };
        Ok(Some(self.hand_on(position)))
    }

    fn tell_lag(&mut self) {
        let Stage::Streaming(streaming) = &mut self.stage else { return };
        let Some(writer) = &self.writer else { return };
        let acknowledged = &streaming.feed.acknowledged;
        let durable = acknowledged.durable();
        // The server tells how far it has decoded, not how far its WAL goes: that was asked on the side, long enough
        // ago that it has told of it since if it is not behind.
        let end = acknowledged.server_end().max(self.watch.wal_end());
        let written = writer.in_transaction() || writer.events > 0 || self.batches_filled > self.batches_durable;
        if !written {
            // The slot is told of it only now and then, and what waits to be looked at may be a word on others' WAL.
            self.clear = writer.position.commit_end;
        }
        let waits = streaming.waits();
        let seconds = match writer.commit_us() {
            Some(time) if written => (now_us() - time).max(0) as f64 / 1e6,
            // Whether it has a commit, and of when, is not known before it is looked at.
            _ => waits.as_secs_f64(),
        };
        let bytes = end.bytes_since(self.clear.max(durable));
        self.status.set_lag(Lag { bytes: Some(bytes), seconds: Some(seconds), events: None });
    }

    /// Ends the stream; the next batch asked for begins another, behind what was handed on.
    fn disconnect(&mut self) {
        self.drop_stage();
        if let (Some(writer), Some(handed)) = (&mut self.writer, &self.handed) {
            writer.reset(handed.clone());
        }
    }

    /// What was handed on does not become durable, or what was opened or received is not asked for.
    fn stalled(&mut self) -> bool {
        // A pause may come while a stream is being opened: the server waits for an answer from then on.
        let opened = matches!(&self.stage, Stage::Opening(task) if task.is_finished());
        self.unasked = opened.then(|| self.unasked.unwrap_or_else(Instant::now));
        if self.unasked.is_some_and(|since| since.elapsed() > STALLED) {
            return true;
        }
        let in_flight = self.batches_handed != self.batches_durable;
        let Stage::Streaming(streaming) = &mut self.stage else { return false };
        let unread = streaming.waits() > STALLED;
        (in_flight && self.moved.elapsed() > STALLED) || unread
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
                    let (opened, found) = opened?;
                    if let Some(found) = found {
                        self.schemas.load(found);
                    }
                    self.opened(opened)
                }
                Stage::Storing => {
                    // Everything handed on must be durable before the server is asked for more.
                    if self.batches_handed != self.batches_durable {
                        return std::future::pending().await;
                    }
                    self.stage = Stage::Closed;
                    None
                }
                Stage::Snapshot(_) | Stage::Streaming(_) => self.next_of_stage().await?,
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
        self.schemas.unload();
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
        // Not while a slot may be in the making.
        let settled = matches!(self.stage, Stage::Streaming(_) | Stage::Closed)
            && self.durable.as_ref().is_some_and(|position| position.snapshot.is_none());
        self.watch.tick(settled);
        self.tell_lag();
        if self.moved.elapsed() > RESTING
            && self.batches_handed == self.batches_durable
            && let Some(writer) = &mut self.writer
        {
            writer.rest();
        }
        if self.stalled() {
            tracing::warn!(connector = %self.name, paused,
                "nothing has moved for {} s: closing the replication connection, so that the server is not held up",
                STALLED.as_secs());
            self.disconnect();
        }
        let handed = self.handed.as_ref().filter(|_| matches!(self.stage, Stage::Streaming(_)));
        if let Some(wrong) = handed.and_then(|_| self.watch.take_wrong()) {
            tracing::warn!(connector = %self.name, "{wrong}");
            self.unpublished = wrong == wanted::without_publication(&self.settings);
            // The next opening says what becomes of it.
            self.disconnect();
        } else if handed.is_some_and(|handed| self.watch.finds_tables(handed.commit_end)) {
            self.watch.forget_tables();
            self.adopt = true;
            self.disconnect();
        }
        Ok(())
    }

    fn is_reading(&self) -> bool {
        matches!(self.stage, Stage::Snapshot(_) | Stage::Streaming(_) | Stage::Finished)
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
