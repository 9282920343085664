//! The embedded log: durable, in this process, in one SQLite database in a folder of its own.
//!
//! | file | what |
//! |---|---|
//! | `log.db` (with `-wal`, `-shm`) | topics, chunks of records, positions of sources, group offsets |
//! | `log.lock` | held by the one process that writes; its content is that process's id |
//!
//! * [`commit`] is the one thread that writes, by group commit; [`writer`] hands it a source's batches; [`read`] has
//!   consumers and readers; [`groups`] shares partitions among the members of a group; [`retention`] removes what is
//!   old.
//! * A second process may read ([`EmbeddedLog::open_reader`]), while the first writes or when there is none.
//! * The invariant: what a caller was told is durable has been synced to disk, and a source's position is in the
//!   same transaction as the records it covers.

mod catalog;
mod chunk;
mod command;
mod commit;
mod database;
mod groups;
mod pending;
mod read;
mod retention;
mod writer;

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::OptionalExtension;
use tokio::sync::{Semaphore, oneshot, watch};

use self::catalog::{Catalog, Topic};
use self::command::{Command, Reply};
use self::commit::{Committer, Shared, group_offset};
use self::database::{ReadPool, reading};
use self::groups::Groups;
use self::read::{Consumer, Cursor, News, Reader};
use self::writer::Writer;
use crate::event::{Offset, TopicPartition};
use crate::log::{
    Log, LogConsumer, LogError, LogReader, LogWriter, Loss, PartitionInfo, PartitionLag, StartAt, StopAt, TopicInfo,
    TopicSpec,
};

#[derive(Clone, Debug)]
pub struct EmbeddedSettings {
    /// Folder of the log; made where it is missing.
    pub path: PathBuf,
    /// How long records are kept once every registered group has read them; a topic's `retention.ms` goes before.
    pub retention: Duration,
    /// Bytes kept of a partition once read; a topic's `retention.bytes` goes before. `None`: by age alone.
    pub retention_bytes: Option<u64>,
    /// Bytes of records the whole log may hold; past this the oldest are removed, read or not.
    pub size_limit: u64,
    /// How often retention looks.
    pub retention_interval: Duration,
    /// Bytes accepted and not yet durable, at the most; `append` waits at this bound.
    pub in_flight_bytes: usize,
    /// Small commits in quick succession wait this long for company.
    pub linger: Duration,
}

impl EmbeddedSettings {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        EmbeddedSettings {
            path: path.into(),
            retention: Duration::from_secs(7 * 24 * 3600),
            retention_bytes: None,
            size_limit: 100 << 30,
            retention_interval: Duration::from_secs(30),
            in_flight_bytes: 64 << 20,
            linger: Duration::from_millis(2),
        }
    }
}

/// In-flight bytes are counted in these units, since a semaphore counts to 2^32.
const UNIT: usize = 1024;
/// How long opening waits for a lock that another process is about to give up.
const LOCK_WAIT: Duration = Duration::from_millis(500);
/// Every wait on the commit thread ends by then: a disk that hangs longer is as good as gone.
const ANSWER_WAIT: Duration = Duration::from_secs(120);

pub struct EmbeddedLog {
    shared: Arc<Shared>,
    pool: ReadPool,
    path: PathBuf,
    /// `None` when opened for reading.
    writing: Option<Writing>,
}

struct Writing {
    commands: Sender<Command>,
    in_flight: Arc<Semaphore>,
    units: usize,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl EmbeddedLog {
    /// Opens the log for writing and reading. Blocks for a moment; to be called before the worker gets busy.
    /// Errors: [`LogError::Fenced`] when another process writes it.
    pub fn open(settings: EmbeddedSettings) -> Result<Self, LogError> {
        let folder = settings.path.clone();
        std::fs::create_dir_all(&folder).map_err(|e| {
            LogError::Invalid(format!("cannot make the folder of the embedded log, {}: {e}", folder.display()))
        })?;
        let lock = take_lock(&folder)?;
        let conn = database::open_for_writing(&folder)?;
        let shared = new_shared();
        shared.catalog.refresh(&conn)?;
        let (commands, received) = mpsc::channel();
        let units = (settings.in_flight_bytes / UNIT).clamp(1, u32::MAX as usize >> 4);
        let committer = Committer::new(conn, settings, shared.clone(), received, lock);
        let thread = std::thread::Builder::new()
            .name("log-commit".into())
            .spawn(move || committer.run())
            .map_err(|e| LogError::Fatal(format!("cannot start the embedded log's commit thread: {e}")))?;
        let writing =
            Writing { commands, in_flight: Arc::new(Semaphore::new(units)), units, thread: Mutex::new(Some(thread)) };
        Ok(EmbeddedLog { shared, pool: ReadPool::new(&folder), path: folder, writing: Some(writing) })
    }

    /// Opens the log for reading only, from a second process: topics, lag and readers work; writing does not.
    pub fn open_reader(path: impl AsRef<Path>) -> Result<Self, LogError> {
        let path = path.as_ref();
        database::check_for_reading(path)?;
        let pool = ReadPool::new(path);
        let shared = new_shared();
        pool.run_blocking(|conn| shared.catalog.refresh(conn))?;
        Ok(EmbeddedLog { shared, pool, path: path.to_owned(), writing: None })
    }

    fn writing(&self) -> Result<&Writing, LogError> {
        self.writing.as_ref().ok_or_else(|| {
            LogError::Invalid(format!("the embedded log in {} was opened for reading only", self.path.display()))
        })
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, LogError> {
        let (reply, answer) = oneshot::channel();
        ask(&self.writing()?.commands, &self.shared, command(reply), answer).await
    }

    /// Topics as they are on disk now, also where another process writes.
    async fn look(&self) -> Result<(), LogError> {
        if self.writing.is_none() {
            let shared = self.shared.clone();
            self.pool.run(move |conn| shared.catalog.refresh(conn)).await?;
        }
        Ok(())
    }

    fn topic(&self, name: &str) -> Result<Arc<Topic>, LogError> {
        self.shared.catalog.get(name).ok_or_else(|| LogError::UnknownTopic(name.to_owned()))
    }

    fn group_is_idle(&self, group: &str, what: &str) -> Result<(), LogError> {
        if self.shared.groups.has_members(group) {
            return Err(LogError::Invalid(format!(
                "group '{group}' has a running consumer and can't be {what}. hint: pause its connector first"
            )));
        }
        Ok(())
    }

    async fn group_topics(&self, group: &str) -> Result<Vec<String>, LogError> {
        let group = group.to_owned();
        self.pool
            .run(move |conn| {
                let read = || -> rusqlite::Result<Vec<String>> {
                    conn.prepare_cached("SELECT topic FROM group_topics WHERE group_name = ?1 ORDER BY topic")?
                        .query_map([&group], |row| row.get(0))?
                        .collect()
                };
                read().map_err(reading)
            })
            .await
    }
}

fn new_shared() -> Arc<Shared> {
    Arc::new(Shared {
        catalog: Catalog::default(),
        groups: Groups::default(),
        news: watch::Sender::new(0),
        fatal: OnceLock::new(),
    })
}

async fn ask<T>(
    commands: &Sender<Command>,
    shared: &Shared,
    command: Command,
    answer: oneshot::Receiver<Result<T, LogError>>,
) -> Result<T, LogError> {
    commands.send(command).map_err(|_| gone(shared))?;
    answered(answer, shared, ANSWER_WAIT).await
}

async fn answered<T>(
    answer: oneshot::Receiver<Result<T, LogError>>,
    shared: &Shared,
    deadline: Duration,
) -> Result<T, LogError> {
    match tokio::time::timeout(deadline, answer).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(gone(shared)),
        Err(_) => Err(not_answered(deadline)),
    }
}

fn not_answered(deadline: Duration) -> LogError {
    LogError::Unavailable(format!("its disk has not answered for {} s", deadline.as_secs()))
}

/// Why there is no commit thread any more.
fn gone(shared: &Shared) -> LogError {
    shared.fatal.get().cloned().unwrap_or_else(|| LogError::Unavailable("it was closed".into()))
}

/// Rule: one writing process. The lock goes with the process, however it ends.
fn take_lock(folder: &Path) -> Result<File, LogError> {
    let path = folder.join("log.lock");
    let failed = |e: std::io::Error| LogError::Fatal(format!("cannot lock {}: {e}", path.display()));
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    let give_up = std::time::Instant::now() + LOCK_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::Error(e)) => return Err(failed(e)),
            Err(TryLockError::WouldBlock) if std::time::Instant::now() < give_up => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                let _ = file.read_to_string(&mut owner);
                return Err(LogError::Fenced(format!(
                    "the embedded log in {} is written by process {}; only one may. \
                     hint: stop that one, or give this one another 'log.path'",
                    folder.display(),
                    owner.trim()
                )));
            }
        }
    }
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    // Only tells others whose it is: on a full disk the lock holds without.
    if let Err(error) = write(&mut file) {
        tracing::warn!("{}: {error}", path.display());
    }
    Ok(file)
}

/// Topic settings the embedded log knows; another, or a wrong value, is refused by name.
fn check_topic(spec: &TopicSpec) -> Result<(), LogError> {
    let refuse = |what: String| Err(LogError::Invalid(format!("topic '{}': {what}", spec.name)));
    if spec.name.is_empty() || spec.name.len() > 249 {
        return refuse("a topic's name has 1 to 249 characters".into());
    }
    if !(1..=10_000).contains(&spec.partitions) {
        return refuse(format!("{} partitions; it must be 1 to 10000", spec.partitions));
    }
    for (name, value) in &spec.settings {
        match name.as_str() {
            "retention.ms" | "retention.bytes" if value.parse::<i64>().is_ok_and(|n| n >= -1) => {}
            "retention.ms" | "retention.bytes" => return refuse(format!("'{name}' must be a number, not '{value}'")),
            "cleanup.policy" if value == "delete" => {}
            "cleanup.policy" => {
                return refuse(format!("the embedded log does not compact: 'cleanup.policy' can't be '{value}'"));
            }
            _ => {
                return refuse(format!(
                    "the embedded log has no setting '{name}'; it knows retention.ms, retention.bytes and cleanup.policy"
                ));
            }
        }
    }
    Ok(())
}

#[async_trait]
impl Log for EmbeddedLog {
    fn kind(&self) -> &'static str {
        "embedded"
    }

    async fn ensure_topic(&self, topic: &TopicSpec) -> Result<(), LogError> {
        self.look().await?;
        if self.shared.catalog.get(&topic.name).is_some() {
            return Ok(());
        }
        check_topic(topic)?;
        self.ask(|reply| Command::EnsureTopic { spec: topic.clone(), reply }).await
    }

    async fn topics(&self) -> Result<Vec<TopicInfo>, LogError> {
        self.look().await?;
        let topics = self.shared.catalog.all();
        self.pool
            .run(move |conn| {
                let mut infos = Vec::with_capacity(topics.len());
                let mut statement = conn
                    .prepare_cached(
                        "SELECT partition, first, next, bytes FROM partitions WHERE topic = ?1 ORDER BY partition",
                    )
                    .map_err(reading)?;
                for topic in topics {
                    let partitions = statement
                        .query_map([topic.id], |row| {
                            Ok(PartitionInfo {
                                partition: row.get(0)?,
                                first: Offset(row.get(1)?),
                                next: Offset(row.get(2)?),
                                bytes: Some(row.get::<_, i64>(3)?.max(0) as u64),
                            })
                        })
                        .and_then(|rows| rows.collect())
                        .map_err(reading)?;
                    infos.push(TopicInfo {
                        name: topic.name.to_string(),
                        partitions,
                        settings: topic.settings.clone(),
                    });
                }
                Ok(infos)
            })
            .await
    }

    async fn writer(&self, source: &str) -> Result<Box<dyn LogWriter>, LogError> {
        let source: Arc<str> = source.into();
        let generation = self.ask(|reply| Command::OpenWriter { source: source.clone(), reply }).await?;
        let writing = self.writing()?;
        Ok(Box::new(Writer {
            source,
            generation,
            shared: self.shared.clone(),
            commands: writing.commands.clone(),
            in_flight: writing.in_flight.clone(),
            units: writing.units,
            pool: self.pool.clone(),
            broken: Arc::default(),
        }))
    }

    async fn position(&self, source: &str) -> Result<Option<Vec<u8>>, LogError> {
        position_of(&self.pool, source.into()).await
    }

    async fn consumer(&self, group: &str, topics: &[String]) -> Result<Box<dyn LogConsumer>, LogError> {
        let commands = self.writing()?.commands.clone();
        let mut all = self.shared.groups.topics(group);
        all.extend_from_slice(topics);
        self.register_group(group, &all).await?;
        Ok(Box::new(Consumer::join(group, topics, self.shared.clone(), commands, self.pool.clone())))
    }

    async fn reader(&self, topic: &str, start: StartAt, stop: StopAt) -> Result<Box<dyn LogReader>, LogError> {
        self.look().await?;
        let topic = self.topic(topic)?;
        let news = match &self.writing {
            Some(_) => News::Watched(self.shared.news.subscribe()),
            None => News::Asked { conn: self.pool.connect()?, seen: None, news_at: tokio::time::Instant::now() },
        };
        let cursors = self
            .pool
            .run(move |conn| {
                let cursor = |p| {
                    let from = read::resolve(conn, &topic, p, start)?;
                    let until = match stop {
                        StopAt::Never => None,
                        StopAt::End => Some(read::range(conn, &topic, p)?.1),
                    };
                    Ok(Cursor::new(topic.clone(), p, from, until))
                };
                (0..topic.partitions()).map(cursor).collect()
            })
            .await?;
        Ok(Box::new(Reader::new(self.shared.clone(), self.pool.clone(), news, cursors)))
    }

    async fn group_lag(&self, group: &str) -> Result<Vec<PartitionLag>, LogError> {
        self.look().await?;
        let names = self.group_topics(group).await?;
        let topics: Vec<Arc<Topic>> = names.iter().filter_map(|name| self.shared.catalog.get(name)).collect();
        let group = group.to_owned();
        self.pool
            .run(move |conn| {
                let mut lags = Vec::new();
                for topic in topics {
                    for partition in 0..topic.partitions() {
                        let stand = group_offset(conn, &group, topic.id, partition).map_err(reading)?;
                        let committed = stand.and_then(|(committed, _)| committed);
                        let from = match stand {
                            Some((committed, start)) => committed.unwrap_or(start),
                            None => read::range(conn, &topic, partition)?.0,
                        };
                        lags.push(PartitionLag {
                            topic_partition: TopicPartition::new(topic.name.clone(), partition),
                            committed: committed.map(Offset),
                            from: Offset(from),
                            end: Offset(topic.tail(partition)),
                        });
                    }
                }
                Ok(lags)
            })
            .await
    }

    async fn reset_group(&self, group: &str, topics: &[String], start: StartAt) -> Result<(), LogError> {
        self.writing()?;
        self.group_is_idle(group, "reset")?;
        let mut all = self.group_topics(group).await?;
        let chosen: Vec<String> = if topics.is_empty() { all.clone() } else { topics.to_vec() };
        let found = chosen.iter().map(|name| self.topic(name)).collect::<Result<Vec<_>, _>>()?;
        let offsets = self
            .pool
            .run(move |conn| {
                let mut offsets = BTreeMap::new();
                for topic in found {
                    for partition in 0..topic.partitions() {
                        let place = TopicPartition::new(topic.name.clone(), partition);
                        let offset = read::resolve(conn, &topic, partition, start)?;
                        let (first, next) = read::range(conn, &topic, partition)?;
                        if !(first..=next).contains(&offset) {
                            return Err(LogError::OutOfRange {
                                topic_partition: place,
                                wanted: Offset(offset),
                                first: Offset(first),
                                next: Offset(next),
                            });
                        }
                        offsets.insert(place, Offset(offset));
                    }
                }
                Ok(offsets)
            })
            .await?;
        all.extend(chosen);
        self.register_group(group, &all).await?;
        self.ask(|reply| Command::CommitOffsets { group: group.to_owned(), offsets, reply }).await?;
        self.ask(|reply| Command::ForgetLosses { group: group.to_owned(), reply }).await
    }

    async fn register_group(&self, group: &str, topics: &[String]) -> Result<(), LogError> {
        self.ask(|reply| Command::RegisterGroup { group: group.to_owned(), topics: topics.to_vec(), reply }).await
    }

    async fn losses(&self) -> Result<Vec<Loss>, LogError> {
        self.pool.run(retention::losses).await
    }

    async fn remove_group(&self, group: &str) -> Result<(), LogError> {
        self.writing()?;
        self.group_is_idle(group, "removed")?;
        self.ask(|reply| Command::RemoveGroup { group: group.to_owned(), reply }).await
    }

    async fn close(&self) -> Result<(), LogError> {
        let Some(writing) = &self.writing else { return Ok(()) };
        let thread = writing.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return Ok(()) };
        let closed = self.ask(|reply| Command::Close { reply }).await;
        let joined = tokio::task::spawn_blocking(move || thread.join());
        match tokio::time::timeout(ANSWER_WAIT, joined).await {
            Ok(Ok(Ok(()))) => closed,
            _ => Err(LogError::Fatal("the embedded log's commit thread did not end well".into())),
        }
    }
}

async fn position_of(pool: &ReadPool, source: Arc<str>) -> Result<Option<Vec<u8>>, LogError> {
    pool.run(move |conn| {
        conn.prepare_cached("SELECT position FROM positions WHERE source = ?1")
            .and_then(|mut statement| statement.query_row([&*source], |row| row.get(0)).optional())
            .map_err(reading)
    })
    .await
}
