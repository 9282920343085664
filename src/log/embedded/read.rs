//! Reading the embedded log: a cursor per partition, a consumer (member of a group), a reader (without one).
//!
//! The invariant: a cursor moves only when records are handed out, in code without an await; so a poll may be
//! dropped at any await and nothing is skipped.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::catalog::Topic;
use super::chunk::{Chunk, Corrupt};
use super::command::Command;
use super::commit::{Shared, group_offset};
use super::database::{ReadPool, reading};
use super::groups::MemberId;
use super::pending::CHUNK_BYTES;
use crate::event::{Offset, TopicPartition};
use crate::log::{ConsumedRecord, LogConsumer, LogError, LogReader, PollLimit, Polled, StartAt};

/// How often a reader in another process than the writer asks for news (2 us each): while there are some …
const BUSY_POLL: Duration = Duration::from_millis(1);
/// … and when there have been none for [`BUSY_FOR`].
const IDLE_POLL: Duration = Duration::from_millis(5);
const BUSY_FOR: Duration = Duration::from_secs(1);

/// Where one partition is being read.
pub(super) struct Cursor {
    topic: Arc<Topic>,
    partition: i32,
    /// Offset of the next record to hand out.
    next: i64,
    /// Nothing from this offset on is handed out.
    until: Option<i64>,
    /// Read from disk and not yet handed out, in order.
    chunks: VecDeque<Chunk>,
}

impl Cursor {
    pub fn new(topic: Arc<Topic>, partition: i32, next: i64, until: Option<i64>) -> Self {
        Cursor { topic, partition, next, until, chunks: VecDeque::new() }
    }

    fn is_done(&self) -> bool {
        self.until.is_some_and(|until| self.next >= until)
    }

    fn place(&self) -> TopicPartition {
        TopicPartition::new(self.topic.name.clone(), self.partition)
    }

    /// Hands out records from what has been read, within the limits left.
    fn hand_out(
        &mut self,
        limit: &PollLimit,
        bytes: &mut usize,
        out: &mut Vec<ConsumedRecord>,
    ) -> Result<(), LogError> {
        while let Some(chunk) = self.chunks.front_mut() {
            if out.len() >= limit.records || *bytes >= limit.bytes {
                return Ok(());
            }
            match chunk.next(&self.topic.name, self.partition) {
                Err(corrupt) => return Err(corrupt_chunk(&self.topic.name, self.partition, self.next, &corrupt)),
                Ok(None) => drop(self.chunks.pop_front()),
                Ok(Some(record)) if record.offset.0 < self.next => {}
                Ok(Some(record)) if self.until.is_some_and(|until| record.offset.0 >= until) => {
                    self.next = record.offset.0;
                    self.chunks.clear();
                }
                Ok(Some(record)) => {
                    self.next = record.offset.0 + 1;
                    *bytes += record.key.as_ref().map_or(0, Bytes::len) + record.value.as_ref().map_or(0, Bytes::len);
                    out.push(record);
                }
            }
        }
        Ok(())
    }
}

fn corrupt_chunk(topic: &str, partition: i32, offset: i64, corrupt: &Corrupt) -> LogError {
    LogError::Fatal(format!("{topic}-{partition}: the embedded log is damaged at offset {offset}: {}", corrupt.0))
}

/// What is wanted of the database, and what it gave; travels to the reading thread and back.
struct Fetch {
    cursor: usize,
    topic: Arc<Topic>,
    partition: i32,
    next: i64,
    chunks: VecDeque<Chunk>,
}

/// Reads chunks from `fetch.next` on, at least one, and about `bytes` of them.
fn fetch_chunks(conn: &Connection, fetch: &mut Fetch, bytes: usize) -> Result<(), LogError> {
    let mut statement = conn
        .prepare_cached(
            "SELECT c.base, c.last, c.min_ts, c.crc, b.data FROM chunks c JOIN blobs b ON b.id = c.blob
             WHERE c.topic = ?1 AND c.partition = ?2 AND c.base >= coalesce(
                 (SELECT max(base) FROM chunks WHERE topic = ?1 AND partition = ?2 AND base <= ?3), ?3)
             AND c.last >= ?3 ORDER BY c.base",
        )
        .map_err(reading)?;
    let mut rows = statement.query(params![fetch.topic.id, fetch.partition, fetch.next]).map_err(reading)?;
    let mut read = 0;
    let mut first_base = None;
    while read < bytes {
        let Some(row) = rows.next().map_err(reading)? else { break };
        let get = || -> rusqlite::Result<(i64, i64, u32, Vec<u8>)> {
            Ok((row.get(0)?, row.get(2)?, row.get(3)?, row.get(4)?))
        };
        let (base, first_ms, crc, data) = get().map_err(reading)?;
        first_base.get_or_insert(base);
        read += data.len();
        let chunk = Chunk::open(data.into(), base, first_ms, crc)
            .map_err(|corrupt| corrupt_chunk(&fetch.topic.name, fetch.partition, base, &corrupt))?;
        fetch.chunks.push_back(chunk);
    }
    drop(rows);
    if first_base.is_none_or(|base| base > fetch.next) {
        check_range(conn, &fetch.topic, fetch.partition, fetch.next)?;
    }
    Ok(())
}

/// First and next offset of a partition.
pub(super) fn range(conn: &Connection, topic: &Topic, partition: i32) -> Result<(i64, i64), LogError> {
    conn.prepare_cached("SELECT first, next FROM partitions WHERE topic = ?1 AND partition = ?2")
        .and_then(|mut statement| {
            statement.query_row(params![topic.id, partition], |row| Ok((row.get(0)?, row.get(1)?)))
        })
        .map_err(reading)
}

fn check_range(conn: &Connection, topic: &Topic, partition: i32, wanted: i64) -> Result<(), LogError> {
    let (first, next) = range(conn, topic, partition)?;
    if (first..=next).contains(&wanted) {
        return Ok(());
    }
    Err(LogError::OutOfRange {
        topic_partition: TopicPartition::new(topic.name.clone(), partition),
        wanted: Offset(wanted),
        first: Offset(first),
        next: Offset(next),
    })
}

/// The offset `start` means in a partition.
pub(super) fn resolve(conn: &Connection, topic: &Topic, partition: i32, start: StartAt) -> Result<i64, LogError> {
    let (first, next) = range(conn, topic, partition)?;
    match start {
        StartAt::Beginning => Ok(first),
        StartAt::End => Ok(next),
        StartAt::Offset(offset) => Ok(offset.0),
        StartAt::TimeMs(time) => {
            let found = conn
                .prepare_cached(
                    "SELECT c.base, c.min_ts, c.crc, b.data FROM chunks c JOIN blobs b ON b.id = c.blob
                     WHERE c.topic = ?1 AND c.partition = ?2 AND c.max_ts >= ?3 ORDER BY c.base LIMIT 1",
                )
                .and_then(|mut statement| {
                    statement
                        .query_row(params![topic.id, partition, time], |row| {
                            Ok((row.get::<_, i64>(0)?, row.get(1)?, row.get(2)?, row.get::<_, Vec<u8>>(3)?))
                        })
                        .optional()
                })
                .map_err(reading)?;
            let Some((base, first_ms, crc, data)) = found else { return Ok(next) };
            let damaged = |corrupt: Corrupt| corrupt_chunk(&topic.name, partition, base, &corrupt);
            let mut chunk = Chunk::open(data.into(), base, first_ms, crc).map_err(damaged)?;
            while let Some(record) = chunk.next(&topic.name, partition).map_err(damaged)? {
                if record.timestamp_ms >= time {
                    return Ok(record.offset.0);
                }
            }
            Ok(next)
        }
    }
}

/// Cursors of several partitions, read in turn.
struct Cursors {
    list: Vec<Cursor>,
    turn: usize,
    /// Where the next fetch begins: behind the last one that was fetched for.
    fetch_turn: usize,
}

impl Cursors {
    fn new(list: Vec<Cursor>) -> Self {
        Cursors { list, turn: 0, fetch_turn: 0 }
    }

    fn hand_out(&mut self, limit: &PollLimit) -> Result<Vec<ConsumedRecord>, LogError> {
        let mut out = Vec::new();
        let mut bytes = 0;
        let count = self.list.len();
        for step in 0..count {
            self.list[(self.turn + step) % count].hand_out(limit, &mut bytes, &mut out)?;
        }
        self.turn = self.turn.wrapping_add(1);
        Ok(out)
    }

    /// Reads from disk for those that have nothing left to hand out and more on disk. Each gives at least a chunk, so
    /// that only as many are read as keep to the limit, in turn.
    async fn fetch(&mut self, pool: &ReadPool, limit: &PollLimit) -> Result<(), LogError> {
        let count = self.list.len();
        let mut fetches: Vec<Fetch> = (0..count)
            .map(|step| (self.fetch_turn % count + step) % count)
            .map(|at| (at, &self.list[at]))
            .filter(|(_, cursor)| cursor.chunks.is_empty() && !cursor.is_done())
            .filter(|(_, cursor)| cursor.next != cursor.topic.tail(cursor.partition))
            .take((limit.bytes / CHUNK_BYTES).max(1))
            .map(|(at, cursor)| Fetch {
                cursor: at,
                topic: cursor.topic.clone(),
                partition: cursor.partition,
                next: cursor.next,
                chunks: VecDeque::new(),
            })
            .collect();
        if fetches.is_empty() {
            return Ok(());
        }
        self.fetch_turn = fetches.last().map_or(0, |fetch| fetch.cursor + 1);
        let bytes = (limit.bytes / fetches.len()).max(1);
        let fetches = pool
            .run(move |conn| {
                for fetch in &mut fetches {
                    fetch_chunks(conn, fetch, bytes)?;
                }
                Ok(fetches)
            })
            .await?;
        for fetch in fetches {
            self.list[fetch.cursor].chunks = fetch.chunks;
        }
        Ok(())
    }
}

/// A member of a consumer group.
pub(super) struct Consumer {
    group: String,
    member: MemberId,
    shared: Arc<Shared>,
    commands: Sender<Command>,
    pool: ReadPool,
    news: watch::Receiver<u64>,
    cursors: Cursors,
    paused: bool,
}

impl Consumer {
    pub fn join(
        group: &str,
        topics: &[String],
        shared: Arc<Shared>,
        commands: Sender<Command>,
        pool: ReadPool,
    ) -> Consumer {
        let member = shared.groups.join(group, topics, &shared.catalog);
        shared.tell();
        let news = shared.news.subscribe();
        let cursors = Cursors::new(Vec::new());
        Consumer { group: group.to_owned(), member, shared, commands, pool, news, cursors, paused: false }
    }

    /// Where the group stands in `places`.
    async fn stand(&self, places: Vec<TopicPartition>) -> Result<Vec<Cursor>, LogError> {
        let topics: Vec<_> =
            places.iter().filter_map(|place| Some((self.shared.catalog.get(&place.topic)?, place.partition))).collect();
        let group = self.group.clone();
        self.pool
            .run(move |conn| {
                let cursor = |(topic, partition): (Arc<Topic>, i32)| {
                    let next = match group_offset(conn, &group, topic.id, partition).map_err(reading)? {
                        Some((committed, start)) => committed.unwrap_or(start),
                        None => range(conn, &topic, partition)?.0,
                    };
                    Ok(Cursor::new(topic, partition, next, None))
                };
                topics.into_iter().map(cursor).collect()
            })
            .await
    }

    /// Revocations and assignments, if there are any.
    async fn rebalance(&mut self) -> Result<Option<Polled>, LogError> {
        let revoked = self.shared.groups.revoked(&self.group, self.member);
        if revoked.released {
            self.shared.tell();
        }
        if !revoked.partitions.is_empty() {
            self.cursors.list.retain(|cursor| !revoked.partitions.contains(&cursor.place()));
            return Ok(Some(Polled::Revoked(revoked.partitions)));
        }
        let claimable = self.shared.groups.claimable(&self.group, self.member);
        if claimable.is_empty() {
            return Ok(None);
        }
        let mut assigned = Vec::new();
        for cursor in self.stand(claimable).await? {
            let place = cursor.place();
            if self.shared.groups.claim(&self.group, self.member, &place) {
                self.cursors.list.push(cursor);
                assigned.push(place);
            }
        }
        Ok((!assigned.is_empty()).then_some(Polled::Assigned(assigned)))
    }
}

#[async_trait]
impl LogConsumer for Consumer {
    async fn poll(&mut self, limit: &PollLimit) -> Result<Polled, LogError> {
        let deadline = Instant::now() + limit.wait;
        loop {
            self.news.borrow_and_update();
            if let Some(change) = self.rebalance().await? {
                return Ok(change);
            }
            if !self.paused {
                let mut records = self.cursors.hand_out(limit)?;
                if records.is_empty() {
                    self.cursors.fetch(&self.pool, limit).await?;
                    records = self.cursors.hand_out(limit)?;
                }
                if !records.is_empty() {
                    return Ok(Polled::Records(records));
                }
            }
            if let Some(error) = self.shared.fatal.get() {
                return Err(error.clone());
            }
            if tokio::time::timeout_at(deadline, self.news.changed()).await.is_err() {
                return Ok(Polled::Records(Vec::new()));
            }
        }
    }

    async fn commit(&mut self, offsets: &BTreeMap<TopicPartition, Offset>) -> Result<(), LogError> {
        let mut mine = offsets.clone();
        mine.retain(|place, _| {
            let owned = self.shared.groups.owns(&self.group, self.member, place);
            if !owned {
                tracing::debug!(group = self.group, %place, "offset not committed: the partition was revoked");
            }
            owned
        });
        if mine.is_empty() {
            return Ok(());
        }
        let (reply, answer) = oneshot::channel();
        super::ask(
            &self.commands,
            &self.shared,
            Command::CommitOffsets { group: self.group.clone(), offsets: mine, reply },
            answer,
        )
        .await
    }

    async fn set_paused(&mut self, paused: bool) -> Result<(), LogError> {
        self.paused = paused;
        Ok(())
    }

    async fn rewind(&mut self) -> Result<(), LogError> {
        let places = self.cursors.list.iter().map(Cursor::place).collect();
        self.cursors.list = self.stand(places).await?;
        Ok(())
    }

    async fn close(self: Box<Self>) -> Result<(), LogError> {
        Ok(())
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.shared.groups.leave(&self.group, self.member, &self.shared.catalog);
        self.shared.tell();
    }
}

/// How a reader learns that there is more.
pub(super) enum News {
    /// The writer is in this process.
    Watched(watch::Receiver<u64>),
    /// The writer is another process, or none: what `PRAGMA data_version` of this connection gave last.
    Asked { conn: Connection, seen: Option<i64>, news_at: Instant },
}

pub(super) struct Reader {
    shared: Arc<Shared>,
    pool: ReadPool,
    news: News,
    cursors: Cursors,
}

impl Reader {
    pub fn new(shared: Arc<Shared>, pool: ReadPool, news: News, cursors: Vec<Cursor>) -> Self {
        Reader { shared, pool, news, cursors: Cursors::new(cursors) }
    }

    /// Brings the tails up to date where another process writes.
    async fn look(&mut self) -> Result<(), LogError> {
        match &mut self.news {
            News::Watched(news) => drop(news.borrow_and_update()),
            News::Asked { conn, seen, news_at } => {
                let version = data_version(conn)?;
                if *seen != Some(version) {
                    self.shared.catalog.refresh(conn)?;
                    *seen = Some(version);
                    *news_at = Instant::now();
                }
            }
        }
        Ok(())
    }

    async fn wait(&mut self, deadline: Instant) -> bool {
        match &mut self.news {
            News::Watched(news) => tokio::time::timeout_at(deadline, news.changed()).await.is_ok(),
            News::Asked { news_at, .. } => {
                let now = Instant::now();
                let pause = if now - *news_at < BUSY_FOR { BUSY_POLL } else { IDLE_POLL };
                tokio::time::sleep_until(deadline.min(now + pause)).await;
                now < deadline
            }
        }
    }
}

fn data_version(conn: &Connection) -> Result<i64, LogError> {
    conn.query_row("PRAGMA data_version", [], |row| row.get(0)).map_err(reading)
}

#[async_trait]
impl LogReader for Reader {
    async fn poll(&mut self, limit: &PollLimit) -> Result<Vec<ConsumedRecord>, LogError> {
        let deadline = Instant::now() + limit.wait;
        loop {
            self.look().await?;
            let mut records = self.cursors.hand_out(limit)?;
            if records.is_empty() {
                self.cursors.fetch(&self.pool, limit).await?;
                records = self.cursors.hand_out(limit)?;
            }
            if !records.is_empty() || self.at_end() {
                return Ok(records);
            }
            if let Some(error) = self.shared.fatal.get() {
                return Err(error.clone());
            }
            if !self.wait(deadline).await {
                return Ok(records);
            }
        }
    }

    fn at_end(&self) -> bool {
        self.cursors.list.iter().all(Cursor::is_done)
    }
}
