//! The stage that streams: received bytes to batches, relations made ready on the way.
//!
//! Invariant: a relation's rows are written only when it is ready, and what it was taken for is noted in the batch of
//! the first of them ([`super::schemas`]).

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use crate::event::{CapturePosition, Lsn};
use crate::pipeline::Fault;
use crate::postgres::PostgresError;
use crate::postgres::relation;
use crate::postgres::replication::Chunk;

use super::envelope::{HeartbeatTopic, MessageTopic};
use super::opening::StreamFeed;
use super::relations::{Origin, Resolver};
use super::schemas::Schemas;
use super::writer::{Step, Writer};
use super::{Resolving, joined, now_ns, stream_ended};

/// How soon an idle slot is moved on when the server asks (it asks before it shuts down).
const ASKED: Duration = Duration::from_secs(1);

pub(super) struct Streaming {
    pub feed: StreamFeed,
    chunk: Option<Chunk>,
    cursor: usize,
    resolving: Option<Ready>,
    /// Tables to be made ready after that one, for rows from this LSN on.
    waiting: Vec<(Origin, Lsn)>,
    readying_messages: Option<JoinHandle<Result<MessageTopic, Fault>>>,
    /// Since when received bytes have been seen lying here. Not since something was handed on: changes that are in the
    /// log already, or filtered, are consumed and nothing is.
    unread: Option<Instant>,
    /// How often the server had asked when the position was last moved on.
    asked: u64,
    heartbeat: Option<Heartbeat>,
    /// The server found no publication for a row.
    pub unpublished: bool,
}

/// `heartbeat.interval.ms`
struct Heartbeat {
    every: Duration,
    due: Instant,
    topic: Option<HeartbeatTopic>,
    readying: Option<JoinHandle<Result<HeartbeatTopic, Fault>>>,
}

/// A table being made ready.
struct Ready {
    task: Resolving,
    /// Rows from here on are taken for it.
    from: Lsn,
}

/// When a position that only filtered or foreign transactions moved is to be handed on.
#[derive(Clone, Copy)]
pub(super) struct Idle {
    /// When a position was last handed on.
    pub since: Instant,
    pub every: Duration,
    /// Up to where all is handed on.
    pub handed: Option<Lsn>,
}

impl Drop for Streaming {
    fn drop(&mut self) {
        if let Some(ready) = &self.resolving {
            ready.task.abort();
        }
        if let Some(task) = &self.readying_messages {
            task.abort();
        }
        if let Some(task) = self.heartbeat.as_ref().and_then(|heartbeat| heartbeat.readying.as_ref()) {
            task.abort();
        }
    }
}

impl Streaming {
    pub(super) fn new(feed: StreamFeed, heartbeat: Option<Duration>) -> Self {
        let heartbeat =
            heartbeat.map(|every| Heartbeat { every, due: Instant::now() + every, topic: None, readying: None });
        Streaming {
            heartbeat,
            feed,
            chunk: None,
            cursor: 0,
            resolving: None,
            waiting: Vec::new(),
            readying_messages: None,
            unread: None,
            asked: 0,
            unpublished: false,
        }
    }

    fn take(&mut self, received: Result<Chunk, PostgresError>) -> Result<(), Fault> {
        /// `undefined_object`
        const UNDEFINED: &str = "42704";
        self.chunk = Some(received.map_err(|error| {
            self.unpublished = error.code() == Some(UNDEFINED);
            if self.unpublished { Fault::retry(error.to_string()) } else { error.into() }
        })?);
        self.cursor = 0;
        Ok(())
    }

    /// Goes on until a batch, or a position alone, is to be handed on. Safe to drop at its await.
    pub(super) async fn next(
        &mut self,
        writer: &mut Writer,
        schemas: &mut Schemas,
        resolver: &Resolver,
        idle: Idle,
    ) -> Result<CapturePosition, Fault> {
        loop {
            self.make_ready(writer, schemas, resolver).await?;
            if let Some(chunk) = &self.chunk {
                let step = writer.run(&chunk.bytes, &mut self.cursor, now_ns())?;
                self.unread = None;
                match step {
                    Step::Consumed => {
                        self.chunk = None;
                        // Millions of changes may be passed over in a row: acknowledgements, ticks and a stop wait for
                        // this to let go.
                        tokio::task::yield_now().await;
                    }
                    Step::Full => return Ok(writer.position.clone()),
                    step => self.begin(step, writer, schemas, resolver),
                }
                continue;
            }
            let received = match self.feed.chunks.try_recv() {
                Ok(received) => Some(received),
                Err(tokio::sync::mpsc::error::TryRecvError::Empty) => None,
                Err(tokio::sync::mpsc::error::TryRecvError::Disconnected) => return Err(stream_ended()),
            };
            if let Some(received) = received {
                self.take(received)?;
                continue;
            }
            // Nothing more is here: what is written may go, at the end of a transaction.
            let between = !writer.in_transaction();
            if between {
                self.beat(writer, resolver).await?;
            }
            if between && (!writer.batch.is_empty() || writer.quarantined) {
                return Ok(writer.position.clone());
            }
            let beat = self.heartbeat.as_ref().map(|heartbeat| heartbeat.due);
            let moved_on = between && idle.handed.is_none_or(|handed| writer.position.commit_end > handed);
            let asked = self.feed.acknowledged.asked();
            let received = if moved_on {
                let due = idle.since + if asked == self.asked { idle.every } else { ASKED };
                // Looks again a little later, since the server may ask meanwhile.
                let soon = due.min(Instant::now() + ASKED).min(beat.unwrap_or(due));
                match timeout_at(soon, self.feed.chunks.recv()).await {
                    Ok(received) => received,
                    Err(_) if Instant::now() >= due => {
                        self.asked = asked;
                        return Ok(writer.position.clone());
                    }
                    Err(_) => continue,
                }
            } else {
                self.asked = asked;
                // A transaction that is being sent goes on by itself.
                match beat.filter(|_| between) {
                    None => self.feed.chunks.recv().await,
                    Some(due) => match timeout_at(due, self.feed.chunks.recv()).await {
                        Ok(received) => received,
                        Err(_) => continue,
                    },
                }
            };
            self.take(received.ok_or_else(stream_ended)?)?;
        }
    }

    /// Writes a heartbeat when one is due.
    async fn beat(&mut self, writer: &mut Writer, resolver: &Resolver) -> Result<(), Fault> {
        let Some(heartbeat) = self.heartbeat.as_mut().filter(|heartbeat| Instant::now() >= heartbeat.due) else {
            return Ok(());
        };
        if heartbeat.topic.is_none() {
            let ready = heartbeat.readying.get_or_insert_with(|| tokio::spawn(HeartbeatTopic::ready(resolver.clone())));
            heartbeat.topic = Some(joined(ready.await)?);
            heartbeat.readying = None;
        }
        heartbeat.due = Instant::now() + heartbeat.every;
        if let Some(topic) = &heartbeat.topic {
            topic.write(&mut writer.batch, now_ns() / 1_000_000);
        }
        Ok(())
    }

    /// Waits for what the writer waits for.
    async fn make_ready(
        &mut self,
        writer: &mut Writer,
        schemas: &mut Schemas,
        resolver: &Resolver,
    ) -> Result<(), Fault> {
        loop {
            if let Some(ready) = &mut self.resolving {
                let mut captured = joined((&mut ready.task).await)?;
                let name = captured.table.full_name();
                if let Some(from) = writer.position.read_at.get(&name) {
                    captured.from = *from;
                }
                if writer.position.quarantined.contains_key(&name) {
                    captured.set_aside();
                } else if let Some(reason) = captured.refused.clone().filter(|_| writer.reached() >= captured.from) {
                    writer.quarantine(name, ready.from, reason);
                }
                if captured.output.is_some() || captured.aside.is_some() {
                    schemas.note(&captured.table, writer.position.epoch, ready.from, &mut writer.batch);
                }
                self.resolving = None;
                writer.relations.insert(captured.table.oid, captured);
            }
            if let Some(task) = &mut self.readying_messages {
                writer.messages = Some(joined(task.await)?);
                self.readying_messages = None;
            }
            let Some((origin, from)) = self.waiting.pop() else { return Ok(()) };
            let task = tokio::spawn(resolver.clone().resolve(origin));
            self.resolving = Some(Ready { task, from });
        }
    }

    fn begin(&mut self, step: Step, writer: &mut Writer, schemas: &Schemas, resolver: &Resolver) {
        match step {
            Step::Consumed | Step::Full => {}
            Step::Relations { relations, lsn } => {
                let behind = writer.behind.is_some();
                for relation in relations {
                    let last = || writer.relations.get(&relation.oid).map(|captured| captured.table.clone());
                    let before = schemas.at(relation.oid, writer.position.epoch, lsn).cloned().or_else(last);
                    self.waiting.push((Origin::Wal { relation, before, behind }, lsn));
                }
            }
            Step::Nullable { oid, column, lsn } => {
                let Some(captured) = writer.relations.get(&oid) else { return };
                let origin = Origin::Nullable(captured.relation.clone(), captured.table.clone(), column);
                self.waiting.push((origin, lsn));
            }
            Step::Messages => {
                self.readying_messages = Some(tokio::spawn(MessageTopic::ready(resolver.clone())));
            }
            Step::CaughtUp { lsn } => {
                for captured in writer.relations.values_mut().filter(|captured| captured.behind) {
                    captured.behind = false;
                    let now = self.feed.catalog.get(&captured.table.oid);
                    let (Some(relation), Some(now)) = (&captured.relation, now) else { continue };
                    if **now != *captured.table && relation::matches(now, relation) {
                        self.waiting.push((Origin::CaughtUp(relation.clone(), now.clone()), lsn));
                    }
                }
            }
        }
    }

    /// How long bytes have been lying here without anybody asking for them.
    pub(super) fn waits(&mut self) -> Duration {
        let lies = self.chunk.is_some() || !self.feed.chunks.is_empty();
        self.unread = lies.then(|| self.unread.unwrap_or_else(Instant::now));
        self.unread.map_or(Duration::ZERO, |since| since.elapsed())
    }
}
