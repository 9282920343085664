//! The built-in schema registry: durable in one SQLite file, with ids that are global per schema text, as
//! Confluent's has it. `rest/registry.rs` gives it Confluent's REST API.
//!
//! Capture registers in its own process; a second process reads the file. The invariant: an id that was given out is
//! on disk, and never means another schema.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use apache_avro::Schema;
use async_trait::async_trait;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};

use super::compatibility::{CompatibilityLevel, breaks};
use super::{Registry, RegistryError, SchemaId};

const LAYOUT: i64 = 1;
const TABLES: &str = "
CREATE TABLE schemas (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    text     TEXT NOT NULL UNIQUE
);
CREATE TABLE versions (
    subject  TEXT NOT NULL,
    version  INTEGER NOT NULL,
    schema   INTEGER NOT NULL REFERENCES schemas(id),
    deleted  INTEGER NOT NULL DEFAULT 0,      -- softly: hidden, and still known
    PRIMARY KEY (subject, version)
) WITHOUT ROWID;
CREATE INDEX versions_of_schema ON versions (schema);
CREATE TABLE compatibility (
    subject  TEXT PRIMARY KEY,                -- empty: for all that have none of their own
    level    TEXT NOT NULL
) WITHOUT ROWID;
";

/// A schema registered under a subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registered {
    pub subject: String,
    pub version: i32,
    pub id: SchemaId,
    pub text: Arc<str>,
}

/// Which version of a subject is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Latest,
    Number(i32),
}

/// What the registry refuses, with what Confluent's error codes tell apart.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BuiltinError {
    #[error("subject '{0}' not found")]
    NoSubject(String),
    #[error("version {1} of subject '{0}' not found")]
    NoVersion(String, String),
    #[error("schema not found")]
    NoSchema,
    #[error("subject '{0}' was not deleted first before being permanently deleted")]
    NotDeletedFirst(String),
    #[error("subject '{0}' has no compatibility level of its own")]
    NoOwnLevel(String),
    #[error("invalid Avro schema: {0}")]
    InvalidSchema(String),
    #[error("the schema is incompatible with an earlier one of subject '{subject}': {}", reasons.join("; "))]
    Incompatible { subject: String, reasons: Vec<String> },
    #[error("the schema registry is busy: {0}")]
    Busy(String),
    #[error("the schema registry's file: {0}")]
    Storage(String),
}

impl From<rusqlite::Error> for BuiltinError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::DiskFull) => {
                BuiltinError::Busy(error.to_string())
            }
            _ => BuiltinError::Storage(error.to_string()),
        }
    }
}

impl From<BuiltinError> for RegistryError {
    fn from(error: BuiltinError) -> Self {
        match error {
            // A file that can't be read now says nothing of a schema.
            BuiltinError::Busy(text) => RegistryError::Unavailable(text),
            error @ BuiltinError::Storage(_) => RegistryError::Unavailable(error.to_string()),
            BuiltinError::Incompatible { subject, reasons } => {
                RegistryError::Incompatible { subject, reason: reasons.join("; ") }
            }
            other => RegistryError::Rejected(other.to_string()),
        }
    }
}

type Answer<T> = Result<T, BuiltinError>;

/// Cheap to clone. Its methods block for a moment; [`BuiltinRegistry::run`] takes them off the async threads.
#[derive(Clone)]
pub struct BuiltinRegistry {
    conn: Arc<Mutex<Connection>>,
    /// Texts by id: they never change.
    texts: Arc<Mutex<HashMap<u32, Arc<str>>>>,
}

/// Texts kept.
const CACHED: usize = 10_000;

fn registry_file(folder: &Path) -> PathBuf {
    folder.join("registry.db")
}

impl BuiltinRegistry {
    /// Opens the registry in `folder`; both are made where they are missing.
    pub fn open(folder: &Path) -> Result<Self, RegistryError> {
        let file = registry_file(folder);
        std::fs::create_dir_all(folder).map_err(|e| opening(&file, &e))?;
        let conn = Connection::open(&file).map_err(|e| opening(&file, &e))?;
        let prepare = || -> rusqlite::Result<i64> {
            conn.busy_timeout(Duration::from_secs(5))?;
            conn.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0))?;
            conn.pragma_update(None, "synchronous", "FULL")?;
            let layout: i64 = conn.query_row("PRAGMA user_version", [], |row| row.get(0))?;
            if layout == 0 {
                conn.execute_batch(&format!("BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {LAYOUT}; COMMIT;"))?;
                return Ok(LAYOUT);
            }
            Ok(layout)
        };
        Self::over(prepare().map_err(|e| opening(&file, &e))?, conn, &file)
    }

    /// Opens it for reading, also while another process writes.
    pub fn open_reader(folder: &Path) -> Result<Self, RegistryError> {
        let file = registry_file(folder);
        if !file.exists() {
            return Err(RegistryError::Rejected(format!(
                "there is no schema registry in {}. hint: it is made when 'tidegate run' starts",
                folder.display()
            )));
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = Connection::open_with_flags(&file, flags).map_err(|e| opening(&file, &e))?;
        conn.busy_timeout(Duration::from_secs(5)).map_err(|e| opening(&file, &e))?;
        let layout = conn.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(|e| opening(&file, &e))?;
        Self::over(layout, conn, &file)
    }

    fn over(layout: i64, conn: Connection, file: &Path) -> Result<Self, RegistryError> {
        if layout != LAYOUT {
            let text = format!("it has layout {layout}, this version of tidegate reads layout {LAYOUT}");
            return Err(opening(file, &text));
        }
        Ok(BuiltinRegistry { conn: Arc::new(Mutex::new(conn)), texts: Arc::default() })
    }

    /// Runs `work` on a thread for blocking work.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Self) -> Answer<T> + Send + 'static) -> Answer<T> {
        let registry = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&registry)).await;
        done.unwrap_or_else(|e| Err(BuiltinError::Storage(e.to_string())))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.conn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, work: impl FnOnce(&Transaction<'_>) -> Answer<T>) -> Answer<T> {
        let mut conn = self.lock();
        let transaction = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let done = work(&transaction)?;
        transaction.commit()?;
        Ok(done)
    }

    /// Subjects in order; with `deleted`, also those that are softly deleted.
    pub fn subjects(&self, prefix: &str, deleted: bool) -> Answer<Vec<String>> {
        let conn = self.lock();
        let mut statement =
            conn.prepare_cached("SELECT DISTINCT subject FROM versions WHERE deleted = 0 OR ?1 ORDER BY subject")?;
        let all: Vec<String> = statement.query_map([deleted], |row| row.get(0))?.collect::<Result<_, _>>()?;
        Ok(all.into_iter().filter(|subject| subject.starts_with(prefix)).collect())
    }

    pub fn versions(&self, subject: &str, deleted: bool) -> Answer<Vec<i32>> {
        let versions: Vec<i32> =
            registered(&self.lock(), subject, deleted)?.into_iter().map(|found| found.version).collect();
        if versions.is_empty() { Err(BuiltinError::NoSubject(subject.to_owned())) } else { Ok(versions) }
    }

    pub fn version(&self, subject: &str, version: Version, deleted: bool) -> Answer<Registered> {
        let all = registered(&self.lock(), subject, true)?;
        if all.is_empty() || (!deleted && all.iter().all(|found| found.deleted)) {
            return Err(BuiltinError::NoSubject(subject.to_owned()));
        }
        let mut visible = all.into_iter().filter(|found| deleted || !found.deleted);
        let found = match version {
            Version::Latest => visible.last(),
            Version::Number(number) => visible.find(|found| found.version == number),
        };
        found.map(|found| found.show(subject)).ok_or_else(|| {
            let asked = match version {
                Version::Latest => "latest".to_owned(),
                Version::Number(number) => number.to_string(),
            };
            BuiltinError::NoVersion(subject.to_owned(), asked)
        })
    }

    /// The id of the schema under `subject`, registered where it is new and compatible.
    pub fn register(&self, subject: &str, schema: &str) -> Answer<SchemaId> {
        if subject.is_empty() {
            return Err(BuiltinError::NoSubject(String::new()));
        }
        let (text, parsed) = normalise(schema)?;
        self.change(|conn| {
            let all = registered(conn, subject, true)?;
            if let Some(found) = all.iter().find(|found| !found.deleted && *found.text == *text) {
                return Ok(found.id);
            }
            let reasons = incompatible(conn, subject, &parsed, None)?;
            if !reasons.is_empty() {
                return Err(BuiltinError::Incompatible { subject: subject.to_owned(), reasons });
            }
            // Looked for first: an insert that is ignored would use up an id.
            let known: Option<u32> =
                conn.query_row("SELECT id FROM schemas WHERE text = ?1", [&*text], |row| row.get(0)).optional()?;
            let id = match known {
                Some(id) => id,
                None => {
                    conn.query_row("INSERT INTO schemas (text) VALUES (?1) RETURNING id", [&*text], |r| r.get(0))?
                }
            };
            let version = all.iter().map(|found| found.version).max().unwrap_or(0) + 1;
            conn.execute(
                "INSERT INTO versions (subject, version, schema) VALUES (?1, ?2, ?3)",
                params![subject, version, id],
            )?;
            Ok(SchemaId(id))
        })
    }

    /// The schema as it is registered under `subject`.
    pub fn find(&self, subject: &str, schema: &str, deleted: bool) -> Answer<Registered> {
        let (text, _) = normalise(schema)?;
        let all = registered(&self.lock(), subject, deleted)?;
        if all.is_empty() {
            return Err(BuiltinError::NoSubject(subject.to_owned()));
        }
        let found = all.into_iter().rev().find(|found| *found.text == *text);
        found.map(|found| found.show(subject)).ok_or(BuiltinError::NoSchema)
    }

    pub fn text(&self, id: SchemaId) -> Answer<Arc<str>> {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = texts.get(&id.0) {
            return Ok(text.clone());
        }
        let read = self
            .lock()
            .prepare_cached("SELECT text FROM schemas WHERE id = ?1")?
            .query_row([id.0], |row| row.get::<_, String>(0))
            .optional()?;
        let text: Arc<str> = read.ok_or(BuiltinError::NoSchema)?.into();
        if texts.len() >= CACHED {
            texts.clear();
        }
        texts.insert(id.0, text.clone());
        Ok(text)
    }

    /// Where a schema is registered: (subject, version).
    pub fn used_by(&self, id: SchemaId, deleted: bool) -> Answer<Vec<(String, i32)>> {
        self.text(id)?;
        let conn = self.lock();
        let mut statement = conn.prepare_cached(
            "SELECT subject, version FROM versions WHERE schema = ?1 AND (deleted = 0 OR ?2) ORDER BY subject, version",
        )?;
        let used = statement.query_map(params![id.0, deleted], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(used.collect::<Result<_, _>>()?)
    }

    /// Hides the subject's versions; permanently, which needs hiding first, forgets them. The ids stay known.
    pub fn delete_subject(&self, subject: &str, permanent: bool) -> Answer<Vec<i32>> {
        self.change(|conn| {
            let all = registered(conn, subject, true)?;
            let live: Vec<i32> = all.iter().filter(|found| !found.deleted).map(|found| found.version).collect();
            if all.is_empty() || (live.is_empty() && !permanent) {
                return Err(BuiltinError::NoSubject(subject.to_owned()));
            }
            if !permanent {
                conn.execute("UPDATE versions SET deleted = 1 WHERE subject = ?1", [subject])?;
                return Ok(live);
            }
            if !live.is_empty() {
                return Err(BuiltinError::NotDeletedFirst(subject.to_owned()));
            }
            conn.execute("DELETE FROM versions WHERE subject = ?1", [subject])?;
            conn.execute("DELETE FROM compatibility WHERE subject = ?1", [subject])?;
            Ok(all.iter().map(|found| found.version).collect())
        })
    }

    pub fn delete_version(&self, subject: &str, version: Version, permanent: bool) -> Answer<i32> {
        let number = self.version(subject, version, permanent)?.version;
        self.change(|conn| {
            let found = registered(conn, subject, true)?.into_iter().find(|found| found.version == number);
            let missing = || BuiltinError::NoVersion(subject.to_owned(), number.to_string());
            let found = found.ok_or_else(missing)?;
            if permanent && !found.deleted {
                return Err(BuiltinError::NotDeletedFirst(subject.to_owned()));
            }
            let statement = match permanent {
                true => "DELETE FROM versions WHERE subject = ?1 AND version = ?2",
                false => "UPDATE versions SET deleted = 1 WHERE subject = ?1 AND version = ?2",
            };
            conn.execute(statement, params![subject, number])?;
            Ok(number)
        })
    }

    /// The level of `subject` (`None`: of all); `or_global` answers with the global one where it has none.
    pub fn level(&self, subject: Option<&str>, or_global: bool) -> Answer<CompatibilityLevel> {
        let conn = self.lock();
        if let Some(subject) = subject {
            match own_level(&conn, subject)? {
                Some(level) => return Ok(level),
                None if !or_global => return Err(BuiltinError::NoOwnLevel(subject.to_owned())),
                None => {}
            }
        }
        Ok(own_level(&conn, "")?.unwrap_or_default())
    }

    pub fn set_level(&self, subject: Option<&str>, level: CompatibilityLevel) -> Answer<()> {
        self.change(|conn| {
            conn.execute(
                "INSERT INTO compatibility (subject, level) VALUES (?1, ?2)
                 ON CONFLICT (subject) DO UPDATE SET level = excluded.level",
                params![subject.unwrap_or_default(), level.to_string()],
            )?;
            Ok(())
        })
    }

    /// Back to the global level, or of that to the default; answers with what it was.
    pub fn unset_level(&self, subject: Option<&str>) -> Answer<CompatibilityLevel> {
        let before = self.level(subject, false)?;
        self.change(|conn| {
            conn.execute("DELETE FROM compatibility WHERE subject = ?1", [subject.unwrap_or_default()])?;
            Ok(before)
        })
    }

    /// Why the schema may not follow in `subject`; looks at `version` alone where it is given.
    pub fn check(&self, subject: &str, version: Option<Version>, schema: &str) -> Answer<Vec<String>> {
        let (_, parsed) = normalise(schema)?;
        let against = version.map(|version| self.version(subject, version, false)).transpose()?;
        incompatible(&self.lock(), subject, &parsed, against.as_ref())
    }
}

fn opening(file: &Path, error: &dyn std::fmt::Display) -> RegistryError {
    RegistryError::Rejected(format!("cannot open the schema registry {}: {error}", file.display()))
}

struct Row {
    version: i32,
    id: SchemaId,
    text: Arc<str>,
    deleted: bool,
}

impl Row {
    fn show(self, subject: &str) -> Registered {
        Registered { subject: subject.to_owned(), version: self.version, id: self.id, text: self.text }
    }
}

fn registered(conn: &Connection, subject: &str, deleted: bool) -> rusqlite::Result<Vec<Row>> {
    conn.prepare_cached(
        "SELECT v.version, s.id, s.text, v.deleted FROM versions v JOIN schemas s ON s.id = v.schema
         WHERE v.subject = ?1 AND (v.deleted = 0 OR ?2) ORDER BY v.version",
    )?
    .query_map(params![subject, deleted], |row| {
        Ok(Row {
            version: row.get(0)?,
            id: SchemaId(row.get(1)?),
            text: row.get::<_, String>(2)?.into(),
            deleted: row.get(3)?,
        })
    })?
    .collect()
}

fn own_level(conn: &Connection, subject: &str) -> rusqlite::Result<Option<CompatibilityLevel>> {
    let level: Option<String> = conn
        .prepare_cached("SELECT level FROM compatibility WHERE subject = ?1")?
        .query_row([subject], |row| row.get(0))
        .optional()?;
    Ok(level.and_then(|level| level.parse().ok()))
}

fn incompatible(conn: &Connection, subject: &str, new: &Schema, against: Option<&Registered>) -> Answer<Vec<String>> {
    let level = match own_level(conn, subject)? {
        Some(level) => level,
        None => own_level(conn, "")?.unwrap_or_default(),
    };
    let mut reasons = Vec::new();
    let mut look = |text: &str, version: i32| -> Answer<()> {
        let old = Schema::parse_str(text).map_err(|e| BuiltinError::InvalidSchema(e.to_string()))?;
        reasons.extend(breaks(level, new, &old, version));
        Ok(())
    };
    if let Some(one) = against {
        look(&one.text, one.version)?;
        return Ok(reasons);
    }
    let all = registered(conn, subject, false)?;
    let looked_at = if level.is_transitive() { 0 } else { all.len().saturating_sub(1) };
    for found in &all[looked_at..] {
        look(&found.text, found.version)?;
    }
    Ok(reasons)
}

/// Compact JSON, which is what schemas are told apart by; and the schema that it is.
fn normalise(schema: &str) -> Answer<(String, Schema)> {
    let invalid = |e: &dyn std::fmt::Display| BuiltinError::InvalidSchema(e.to_string());
    // A bare name of a type is a schema too: `string`, as old clients send it.
    let json: serde_json::Value = match serde_json::from_str(schema) {
        Ok(json) => json,
        Err(_) if schema.bytes().all(|b| b.is_ascii_lowercase()) && !schema.is_empty() => {
            serde_json::Value::String(schema.to_owned())
        }
        Err(error) => return Err(invalid(&error)),
    };
    let parsed = Schema::parse(&json).map_err(|e| invalid(&e))?;
    Ok((json.to_string(), parsed))
}

#[async_trait]
impl Registry for BuiltinRegistry {
    async fn register(&self, subject: &str, schema: &str) -> Result<SchemaId, RegistryError> {
        let (subject, schema) = (subject.to_owned(), schema.to_owned());
        Ok(self.run(move |registry| BuiltinRegistry::register(registry, &subject, &schema)).await?)
    }

    async fn schema(&self, id: SchemaId) -> Result<Arc<str>, RegistryError> {
        match self.run(move |registry| registry.text(id)).await {
            Err(BuiltinError::NoSchema) => Err(RegistryError::UnknownId(id.0)),
            answer => Ok(answer?),
        }
    }

    async fn lookup(&self, subject: &str, schema: &str) -> Result<Option<SchemaId>, RegistryError> {
        let (subject, schema) = (subject.to_owned(), schema.to_owned());
        match self.run(move |registry| registry.find(&subject, &schema, false)).await {
            Ok(found) => Ok(Some(found.id)),
            Err(BuiltinError::NoSubject(_) | BuiltinError::NoSchema) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
