//! The one thread that writes the embedded log. It commits whatever has queued in one transaction (group
//! commit): records, the positions of their sources, group offsets, topics.
//!
//! The invariant: a caller is answered, and a tail is moved, only after the commit that holds its work has been
//! synced to disk; answers go out in the order the work came in.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::watch;

use super::EmbeddedSettings;
use super::catalog::{Catalog, Topic};
use super::command::{Append, Command, Reply, refuse};
use super::database::{Fault, fault_of};
use super::groups::Groups;
use super::pending::Pending;
use super::retention;
use crate::event::{Offset, RecordBatch, TopicPartition};
use crate::log::{Appended, LogError, TopicSpec};

/// Work that is committed together, at the most.
const GROUP_BYTES: usize = 16 << 20;
/// Groups smaller than this may wait a moment for company.
const SMALL_GROUP_BYTES: usize = 64 << 10;
/// The WAL file is cut back when it has grown past this (readers kept it from starting over).
const WAL_BYTES: u64 = 256 << 20;

/// What the commit thread shares with the tasks of the process.
pub(super) struct Shared {
    pub catalog: Catalog,
    pub groups: Groups,
    /// Counts commits and changes of assignment: whoever waits for news watches it.
    pub news: watch::Sender<u64>,
    /// Why nothing can be written any more.
    pub fatal: OnceLock<LogError>,
}

impl Shared {
    pub fn tell(&self) {
        self.news.send_modify(|count| *count = count.wrapping_add(1));
    }
}

pub(super) struct Committer {
    conn: Connection,
    settings: EmbeddedSettings,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    /// Held for as long as this thread writes.
    _lock: File,
    pending: Pending,
    writers: HashMap<Arc<str>, Writer>,
    last_generation: u64,
    last_commit: Instant,
    wal: std::path::PathBuf,
}

struct Writer {
    generation: u64,
    /// Something of it was not written: the same is said of everything after.
    failed: Option<LogError>,
}

/// An answer that waits for the commit.
type Answer = Box<dyn FnOnce(Result<(), LogError>) + Send>;

impl Committer {
    pub fn new(
        conn: Connection,
        settings: EmbeddedSettings,
        shared: Arc<Shared>,
        commands: Receiver<Command>,
        lock: File,
    ) -> Self {
        let wal = super::database::database_file(&settings.path).with_extension("db-wal");
        Committer {
            conn,
            settings,
            shared,
            commands,
            _lock: lock,
            pending: Pending::default(),
            writers: HashMap::new(),
            last_generation: 0,
            last_commit: Instant::now(),
            wal,
        }
    }

    /// Runs until it is told to close, all its callers are gone, or something fatal happens.
    pub fn run(mut self) {
        let mut sweep_at = Instant::now() + self.settings.retention_interval;
        loop {
            let first = match self.commands.recv_timeout(sweep_at.saturating_duration_since(Instant::now())) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if let Some(first) = first {
                let (group, close) = self.gather(first);
                self.commit_group(group);
                if let Some(reply) = close {
                    let _ = reply.send(self.finish());
                    return;
                }
            }
            if Instant::now() >= sweep_at && self.shared.fatal.get().is_none() {
                let pause = match retention::sweep(&self.conn, &self.settings, &self.shared.catalog, now_ms()) {
                    Ok(retention::Swept::All) => self.settings.retention_interval,
                    // The rest in slices, between the commits.
                    Ok(retention::Swept::Part) => Duration::ZERO,
                    Err(error) => {
                        tracing::warn!("retention of the embedded log: {error}");
                        self.settings.retention_interval
                    }
                };
                sweep_at = Instant::now() + pause;
            }
        }
        let _ = self.finish();
    }

    /// `first` and what else has queued. Small groups in quick succession wait until `linger` after the commit
    /// before them, so that a stream of single records costs some hundred commits a second, not thousands; a
    /// record that comes after a silence does not wait.
    fn gather(&mut self, first: Command) -> (Vec<Command>, Option<Reply<()>>) {
        let mut bytes = 0;
        let mut group = Vec::new();
        let mut next = Some(first);
        let wait_until = self.last_commit + self.settings.linger;
        loop {
            match next {
                Some(Command::Close { reply }) => return (group, Some(reply)),
                Some(command) => {
                    if let Command::Append(append) = &command {
                        bytes += append.batch.byte_size();
                    }
                    group.push(command);
                }
                None => return (group, None),
            }
            if bytes >= GROUP_BYTES {
                return (group, None);
            }
            next = self.commands.try_recv().ok();
            if next.is_none() && bytes < SMALL_GROUP_BYTES {
                let wait = wait_until.saturating_duration_since(Instant::now());
                if !wait.is_zero() {
                    next = self.commands.recv_timeout(wait).ok();
                }
            }
        }
    }

    fn commit_group(&mut self, group: Vec<Command>) {
        if let Some(fatal) = self.shared.fatal.get() {
            let fatal = fatal.clone();
            for command in group {
                refuse(command, &fatal);
            }
            return;
        }
        self.last_commit = Instant::now();
        let mut answers: Vec<Answer> = Vec::with_capacity(group.len());
        let mut sources: Vec<Arc<str>> = Vec::new();
        let written = self.write_group(group, &mut answers, &mut sources);
        let result = match written {
            Ok(made_topics) => {
                self.pending.show_tails();
                for topic in &made_topics {
                    self.shared.catalog.put(topic.clone());
                }
                if !made_topics.is_empty() {
                    self.shared.groups.topics_changed(&self.shared.catalog);
                }
                Ok(())
            }
            Err(error) => {
                let error = self.give_up(&error);
                for source in sources {
                    if let Some(writer) = self.writers.get_mut(&source) {
                        writer.failed.get_or_insert_with(|| error.clone());
                    }
                }
                Err(error)
            }
        };
        for answer in answers {
            answer(result.clone());
        }
        self.shared.tell();
        self.cut_wal();
    }

    /// One transaction. Topics made in it are returned, to be shown when it is durable.
    fn write_group(
        &mut self,
        group: Vec<Command>,
        answers: &mut Vec<Answer>,
        sources: &mut Vec<Arc<str>>,
    ) -> rusqlite::Result<Vec<Arc<Topic>>> {
        // From here on every command has its answer in `answers`, or is answered by `refuse`.
        let mut positions: BTreeMap<Arc<str>, Vec<u8>> = BTreeMap::new();
        let mut made_topics = Vec::new();
        let mut result = self.conn.execute_batch("BEGIN IMMEDIATE");
        for command in group {
            if let Err(error) = &result {
                // Batches of this source that are still queued must not be written behind a gap.
                if let Command::Append(append) = &command {
                    sources.push(append.source.clone());
                }
                refuse(command, &not_durable(error));
                continue;
            }
            let outcome = match command {
                Command::Append(append) => {
                    sources.push(append.source.clone());
                    self.append(append, &mut positions, answers)
                }
                Command::OpenWriter { source, reply } => {
                    self.last_generation += 1;
                    let generation = self.last_generation;
                    self.writers.insert(source, Writer { generation, failed: None });
                    answers.push(Box::new(move |result| drop(reply.send(result.map(|()| generation)))));
                    Ok(())
                }
                Command::EnsureTopic { spec, reply } => {
                    answers.push(Box::new(move |result| drop(reply.send(result))));
                    self.ensure_topic(&spec, &mut made_topics)
                }
                Command::RegisterGroup { group, topics, reply } => {
                    answers.push(Box::new(move |result| drop(reply.send(result))));
                    register_group(&self.conn, &group, &topics)
                }
                Command::RemoveGroup { group, reply } => {
                    answers.push(Box::new(move |result| drop(reply.send(result))));
                    remove_group(&self.conn, &group)
                }
                Command::ForgetLosses { group, reply } => {
                    answers.push(Box::new(move |result| drop(reply.send(result))));
                    retention::forget_losses(&self.conn, &group)
                }
                Command::CommitOffsets { group, offsets, reply } => {
                    answers.push(Box::new(move |result| drop(reply.send(result))));
                    self.commit_offsets(&group, &offsets)
                }
                // `gather` keeps it back.
                Command::Close { reply } => {
                    let _ = reply.send(Ok(()));
                    Ok(())
                }
            };
            result = result.and(outcome);
        }
        result?;
        self.pending.write(&self.conn)?;
        for (source, position) in &positions {
            self.conn
                .prepare_cached(
                    "INSERT INTO positions (source, position) VALUES (?1, ?2)
                     ON CONFLICT (source) DO UPDATE SET position = excluded.position",
                )?
                .execute(params![&**source, position])?;
        }
        self.conn.execute_batch("COMMIT")?;
        Ok(made_topics)
    }

    fn append(
        &mut self,
        append: Append,
        positions: &mut BTreeMap<Arc<str>, Vec<u8>>,
        answers: &mut Vec<Answer>,
    ) -> rusqlite::Result<()> {
        let Append { source, generation, mut batch, position, in_flight, reply } = append;
        if let Some(error) = self.refusal(&source, generation, &batch) {
            answers.push(Box::new(move |_| drop(reply.send(Err(error)))));
            return Ok(());
        }
        let result = self.pending.add(&self.conn, &batch);
        if let Some(position) = position {
            positions.insert(source, position);
        }
        let (records, bytes) = (batch.len(), batch.byte_size());
        answers.push(Box::new(move |result| {
            batch.clear();
            drop(in_flight);
            let _ = reply.send(result.map(|()| Appended { buffer: batch, records, bytes }));
        }));
        metrics::counter!("tidegate_log_appended_records_total").increment(records as u64);
        metrics::counter!("tidegate_log_appended_bytes_total").increment(bytes as u64);
        result
    }

    /// Why the batch may not be written, if so; opens its topics otherwise.
    fn refusal(&mut self, source: &Arc<str>, generation: u64, batch: &RecordBatch) -> Option<LogError> {
        let writer = self.writers.get_mut(source)?;
        if writer.generation != generation {
            return Some(LogError::Fenced(format!("another writer has taken the place of this one of '{source}'")));
        }
        if let Some(error) = &writer.failed {
            return Some(error.clone());
        }
        match self.pending.open(batch, &self.shared.catalog) {
            Ok(()) => None,
            Err(error) => {
                writer.failed = Some(error.clone());
                Some(error)
            }
        }
    }

    fn ensure_topic(&self, spec: &TopicSpec, made: &mut Vec<Arc<Topic>>) -> rusqlite::Result<()> {
        if self.shared.catalog.get(&spec.name).is_some() || made.iter().any(|topic| *topic.name == *spec.name) {
            return Ok(());
        }
        let settings = serde_json::to_string(&spec.settings).unwrap_or_else(|_| "{}".into());
        self.conn
            .prepare_cached("INSERT INTO topics (name, settings) VALUES (?1, ?2)")?
            .execute(params![spec.name, settings])?;
        let id = self.conn.last_insert_rowid();
        for partition in 0..spec.partitions {
            self.conn
                .prepare_cached(
                    "INSERT INTO partitions (topic, partition, first, next, bytes) VALUES (?1, ?2, 0, 0, 0)",
                )?
                .execute(params![id, partition])?;
        }
        self.conn
            .prepare_cached(
                "INSERT INTO group_offsets (group_name, topic, partition, start)
                 SELECT g.group_name, p.topic, p.partition, 0 FROM group_topics g, partitions p
                 WHERE g.topic = ?1 AND p.topic = ?2",
            )?
            .execute(params![spec.name, id])?;
        let tails = vec![0; spec.partitions as usize];
        made.push(Arc::new(Topic::new(id, spec.name.as_str().into(), spec.settings.clone(), tails)));
        Ok(())
    }

    fn commit_offsets(&self, group: &str, offsets: &BTreeMap<TopicPartition, Offset>) -> rusqlite::Result<()> {
        for (place, offset) in offsets {
            let Some(topic) = self.shared.catalog.get(&place.topic) else { continue };
            self.conn
                .prepare_cached(
                    "INSERT INTO group_offsets (group_name, topic, partition, start, committed)
                     VALUES (?1, ?2, ?3, ?4, ?4)
                     ON CONFLICT (group_name, topic, partition) DO UPDATE SET committed = excluded.committed",
                )?
                .execute(params![group, topic.id, place.partition, offset.0])?;
        }
        Ok(())
    }

    /// Nothing of the transaction is there: forgets what was prepared for it.
    fn give_up(&mut self, error: &rusqlite::Error) -> LogError {
        let _ = self.conn.execute_batch("ROLLBACK");
        // Opened again from the catalog, which only knows what is durable.
        self.pending.forget();
        let error = not_durable(error);
        if let LogError::Fatal(text) = &error {
            tracing::error!("the embedded log stops: {text}");
            let _ = self.shared.fatal.set(error.clone());
        } else {
            tracing::warn!("the embedded log could not commit: {error}");
        }
        error
    }

    fn cut_wal(&self) {
        let size = std::fs::metadata(&self.wal).map_or(0, |file| file.len());
        if size > WAL_BYTES {
            let _ = self.conn.busy_timeout(Duration::from_millis(200));
            let cut = self.conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
            if cut != Ok(0) {
                tracing::warn!("the embedded log's WAL file has {size} bytes and a reader keeps it from being cut");
            }
            let _ = self.conn.busy_timeout(Duration::from_secs(5));
        }
    }

    fn finish(&mut self) -> Result<(), LogError> {
        if let Some(fatal) = self.shared.fatal.get() {
            return Err(fatal.clone());
        }
        // Only saves the next start some work: everything is in the WAL already.
        let _ = self.conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
        let _ = self.shared.fatal.set(LogError::Unavailable("it was closed".into()));
        self.shared.tell();
        Ok(())
    }
}

impl Drop for Committer {
    /// Also when the thread panics: nobody may wait for it any more.
    fn drop(&mut self) {
        let _ = self.shared.fatal.set(LogError::Fatal("the embedded log's commit thread has ended".into()));
        self.shared.tell();
    }
}

/// The group reads `topics`, and no others any more.
fn register_group(conn: &Connection, group: &str, topics: &[String]) -> rusqlite::Result<()> {
    let known: Vec<String> = conn
        .prepare_cached("SELECT topic FROM group_topics WHERE group_name = ?1")?
        .query_map([group], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    for topic in known.iter().filter(|topic| !topics.contains(topic)) {
        conn.execute("DELETE FROM group_topics WHERE group_name = ?1 AND topic = ?2", params![group, topic])?;
    }
    for topic in topics {
        conn.prepare_cached("INSERT OR IGNORE INTO group_topics (group_name, topic) VALUES (?1, ?2)")?
            .execute(params![group, topic])?;
        conn.prepare_cached(
            "INSERT OR IGNORE INTO group_offsets (group_name, topic, partition, start)
             SELECT ?1, p.topic, p.partition, p.first FROM partitions p JOIN topics t ON t.id = p.topic
             WHERE t.name = ?2",
        )?
        .execute(params![group, topic])?;
    }
    Ok(())
}

fn remove_group(conn: &Connection, group: &str) -> rusqlite::Result<()> {
    conn.execute("DELETE FROM group_offsets WHERE group_name = ?1", [group])?;
    conn.execute("DELETE FROM group_topics WHERE group_name = ?1", [group])?;
    retention::forget_losses(conn, group)
}

/// Where a group stands in each partition it knows: its committed offset, or where it was registered.
pub(super) fn group_offset(
    conn: &Connection,
    group: &str,
    topic: i64,
    partition: i32,
) -> rusqlite::Result<Option<(Option<i64>, i64)>> {
    conn.prepare_cached(
        "SELECT committed, start FROM group_offsets WHERE group_name = ?1 AND topic = ?2 AND partition = ?3",
    )?
    .query_row(params![group, topic, partition], |row| Ok((row.get(0)?, row.get(1)?)))
    .optional()
}

fn not_durable(error: &rusqlite::Error) -> LogError {
    match fault_of(error) {
        Fault::Full => LogError::NotDurable("the disk of the embedded log is full".into()),
        Fault::Passing => LogError::NotDurable(error.to_string()),
        Fault::Fatal => LogError::Fatal(format!("the embedded log could not be written: {error}")),
    }
}

pub(super) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}
