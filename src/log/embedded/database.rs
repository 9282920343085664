//! The embedded log's database: its tables, how connections to it are made, and what its errors mean.
//!
//! One connection writes (the commit thread's); all others only read, by short statements, since a read
//! transaction that stays open makes the WAL file grow without bound.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, ffi};

use super::{ANSWER_WAIT, not_answered};
use crate::log::LogError;

/// `user_version` of the tables below.
const LAYOUT: i64 = 1;

const TABLES: &str = "
CREATE TABLE topics (
    id        INTEGER PRIMARY KEY,
    name      TEXT NOT NULL UNIQUE,
    settings  TEXT NOT NULL             -- JSON object
);
CREATE TABLE partitions (
    topic     INTEGER NOT NULL REFERENCES topics(id),
    partition INTEGER NOT NULL,
    first     INTEGER NOT NULL,         -- offset of the oldest record kept
    next      INTEGER NOT NULL,         -- offset the next record gets: not max + 1, retention may have removed all
    bytes     INTEGER NOT NULL,
    PRIMARY KEY (topic, partition)
) WITHOUT ROWID;
CREATE TABLE chunks (
    topic     INTEGER NOT NULL,
    partition INTEGER NOT NULL,
    base      INTEGER NOT NULL,         -- first and last offset inside
    last      INTEGER NOT NULL,
    records   INTEGER NOT NULL,
    min_ts    INTEGER NOT NULL,         -- ms since 1970
    max_ts    INTEGER NOT NULL,
    size      INTEGER NOT NULL,
    crc       INTEGER NOT NULL,
    blob      INTEGER NOT NULL,         -- blobs.id
    PRIMARY KEY (topic, partition, base)
) WITHOUT ROWID;
CREATE TABLE blobs (
    id        INTEGER PRIMARY KEY,
    data      BLOB NOT NULL
);
CREATE TABLE positions (
    source    TEXT PRIMARY KEY,
    position  BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE group_topics (
    group_name TEXT NOT NULL,
    topic      TEXT NOT NULL,           -- by name: the topic may not be there yet
    PRIMARY KEY (group_name, topic)
) WITHOUT ROWID;
CREATE TABLE group_offsets (
    group_name TEXT NOT NULL,
    topic      INTEGER NOT NULL,
    partition  INTEGER NOT NULL,
    start      INTEGER NOT NULL,        -- where the group stood when it was registered
    committed  INTEGER,                 -- next offset to read; null until the first commit
    PRIMARY KEY (group_name, topic, partition)
) WITHOUT ROWID;
CREATE TABLE losses (                   -- what the size limit took from groups that had not read it
    at_ms      INTEGER NOT NULL,
    group_name TEXT NOT NULL,
    topic      TEXT NOT NULL,
    partition  INTEGER NOT NULL,
    first      INTEGER NOT NULL,
    last       INTEGER NOT NULL,
    records    INTEGER NOT NULL
);
";

pub(super) fn database_file(folder: &Path) -> PathBuf {
    folder.join("log.db")
}

/// The connection of the one writer. Makes the tables where they are missing.
pub(super) fn open_for_writing(folder: &Path) -> Result<Connection, LogError> {
    let file = database_file(folder);
    let conn = Connection::open(&file).map_err(|e| opening(&file, e))?;
    let prepare = || -> rusqlite::Result<i64> {
        conn.busy_timeout(Duration::from_secs(5))?;
        // Both only take effect before the first table is made.
        conn.pragma_update(None, "page_size", 16384)?;
        conn.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
        conn.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0))?;
        // NORMAL does not fsync a commit in WAL mode.
        conn.pragma_update(None, "synchronous", "FULL")?;
        conn.pragma_update(None, "journal_size_limit", 64 << 20)?;
        conn.pragma_update(None, "wal_autocheckpoint", 1000)?;
        conn.pragma_update(None, "cache_size", -4096)?;
        conn.pragma_update(None, "temp_store", "MEMORY")?;
        conn.set_prepared_statement_cache_capacity(64);
        let layout: i64 = conn.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if layout == 0 {
            conn.execute_batch(&format!("BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {LAYOUT}; COMMIT;"))?;
            return Ok(LAYOUT);
        }
        Ok(layout)
    };
    check_layout(&file, prepare().map_err(|e| opening(&file, e))?)?;
    Ok(conn)
}

fn open_for_reading(file: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let conn = Connection::open_with_flags(file, flags)?;
    conn.busy_timeout(Duration::from_secs(5))?;
    conn.pragma_update(None, "cache_size", -1024)?;
    conn.set_prepared_statement_cache_capacity(32);
    conn.query_row("SELECT count(*) FROM topics", [], |row| row.get::<_, i64>(0))?;
    Ok(conn)
}

/// Checks that a database is there that this program can read.
pub(super) fn check_for_reading(folder: &Path) -> Result<(), LogError> {
    let file = database_file(folder);
    if !file.exists() {
        return Err(LogError::Invalid(format!(
            "there is no embedded log in {}. hint: it is made when 'tidegate run' starts; check 'log.path'",
            folder.display()
        )));
    }
    let conn = open_for_reading(&file).map_err(|e| opening(&file, e))?;
    let layout = conn.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(|e| opening(&file, e))?;
    check_layout(&file, layout)
}

fn check_layout(file: &Path, layout: i64) -> Result<(), LogError> {
    if layout == LAYOUT {
        return Ok(());
    }
    Err(LogError::Invalid(format!(
        "{} has layout {layout}, this version of tidegate reads layout {LAYOUT}",
        file.display()
    )))
}

fn opening(file: &Path, error: rusqlite::Error) -> LogError {
    let text = format!("cannot open the embedded log {}: {error}", file.display());
    match fault_of(&error) {
        Fault::Passing => LogError::Unavailable(text),
        Fault::Full | Fault::Fatal => LogError::Fatal(text),
    }
}

/// What an error of SQLite means for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The disk is full: nothing of the transaction is there, and there may be room again later.
    Full,
    /// Another process holds the database for the moment, or the file could not be opened, read or written: nothing of
    /// the transaction is there, and it may be done again.
    Passing,
    /// A failed fsync, a corrupt file: what is on disk can't be known.
    Fatal,
}

pub(super) fn fault_of(error: &rusqlite::Error) -> Fault {
    let Some(error) = error.sqlite_error() else { return Fault::Fatal };
    match (error.code, error.extended_code) {
        // The file beside the WAL grows too.
        (ErrorCode::DiskFull, _) | (_, ffi::SQLITE_IOERR_SHMSIZE) => Fault::Full,
        // After a failed fsync the system has forgotten what it did not write.
        (
            _,
            ffi::SQLITE_IOERR_FSYNC
            | ffi::SQLITE_IOERR_DIR_FSYNC
            | ffi::SQLITE_IOERR_CORRUPTFS
            | ffi::SQLITE_IOERR_DATA
            | ffi::SQLITE_IOERR_SHORT_READ,
        ) => Fault::Fatal,
        (
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::CannotOpen
            | ErrorCode::PermissionDenied
            | ErrorCode::FileLockingProtocolFailed
            | ErrorCode::OutOfMemory
            | ErrorCode::SystemIoFailure,
            _,
        ) => Fault::Passing,
        _ => Fault::Fatal,
    }
}

/// What a reader says of an error.
pub(super) fn reading(error: rusqlite::Error) -> LogError {
    match fault_of(&error) {
        Fault::Full | Fault::Passing => LogError::Unavailable(error.to_string()),
        Fault::Fatal => LogError::Fatal(format!("cannot read the embedded log: {error}")),
    }
}

/// Connections for reading. A reader's future may be dropped while its statement runs: the statement ends on its
/// own thread, and the connection comes back here.
#[derive(Clone)]
pub(super) struct ReadPool {
    file: Arc<Path>,
    idle: Arc<Mutex<Vec<Connection>>>,
}

/// Idle connections kept; each holds about a megabyte of pages at the most.
const IDLE_CONNECTIONS: usize = 4;

impl ReadPool {
    pub fn new(folder: &Path) -> Self {
        ReadPool { file: database_file(folder).into(), idle: Arc::default() }
    }

    /// A connection for the caller alone.
    pub fn connect(&self) -> Result<Connection, LogError> {
        open_for_reading(&self.file).map_err(reading)
    }

    /// Runs `read` on a thread for blocking work, with a connection of its own.
    pub async fn run<T, F>(&self, read: F) -> Result<T, LogError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, LogError> + Send + 'static,
    {
        let pool = self.clone();
        let work = tokio::task::spawn_blocking(move || pool.run_blocking(read));
        match tokio::time::timeout(ANSWER_WAIT, work).await {
            Ok(Ok(result)) => result,
            Ok(Err(ended)) => Err(LogError::Fatal(format!("a reader of the embedded log ended: {ended}"))),
            Err(_) => Err(not_answered(ANSWER_WAIT)),
        }
    }

    pub fn run_blocking<T>(&self, read: impl FnOnce(&Connection) -> Result<T, LogError>) -> Result<T, LogError> {
        let idle = self.lock().pop();
        let conn = match idle {
            Some(conn) => conn,
            None => self.connect()?,
        };
        let result = read(&conn);
        let mut idle = self.lock();
        if result.is_ok() && idle.len() < IDLE_CONNECTIONS {
            idle.push(conn);
        }
        result
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_leaves_the_disk_in_doubt_is_fatal() {
        for (code, fault) in [
            (ffi::SQLITE_FULL, Fault::Full),
            (ffi::SQLITE_IOERR_SHMSIZE, Fault::Full),
            (ffi::SQLITE_BUSY, Fault::Passing),
            // Too many files open, a quota that is used up, a disk that was away.
            (ffi::SQLITE_CANTOPEN, Fault::Passing),
            (ffi::SQLITE_IOERR_WRITE, Fault::Passing),
            (ffi::SQLITE_IOERR_READ, Fault::Passing),
            (ffi::SQLITE_IOERR_SHMOPEN, Fault::Passing),
            (ffi::SQLITE_NOMEM, Fault::Passing),
            (ffi::SQLITE_IOERR_FSYNC, Fault::Fatal),
            (ffi::SQLITE_IOERR_DIR_FSYNC, Fault::Fatal),
            (ffi::SQLITE_CORRUPT, Fault::Fatal),
            (ffi::SQLITE_NOTADB, Fault::Fatal),
        ] {
            let error = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
            assert_eq!(fault_of(&error), fault, "{error}");
        }
        assert_eq!(fault_of(&rusqlite::Error::QueryReturnedNoRows), Fault::Fatal);
    }
}
