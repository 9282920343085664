//! One error for all that is asked of the datastore, with a kind that decides what is done about it.
//!
//! The invariant: [`DatastoreErrorKind::Rejected`] is said only of what the data itself is to blame for, so that the
//! same again fails again. Whatever a server, its catalog or its administrator may put right is another kind, and tried
//! again.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tokio_postgres::error::SqlState;

use super::DatastoreSettings;

#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct DatastoreError {
    pub kind: DatastoreErrorKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatastoreErrorKind {
    /// The server is away, starting, stopping, full or standing by, or stumbled: wait for it.
    Unavailable,
    /// Another transaction was in the way (deadlock, lock time-out, a unique key taken meanwhile): do it again.
    Conflict,
    /// A cursor, lease or intent is no longer the caller's.
    Lost,
    /// A right, a table, a column or a setting is missing: a person must act, or is at it just now (a table is renamed,
    /// a password changed, a database made anew); where it is known, the message has the SQL.
    Setup,
    /// The data is wrong; the same again will fail again.
    Rejected,
}

impl DatastoreError {
    pub fn setup(message: impl Into<String>) -> Self {
        DatastoreError { kind: DatastoreErrorKind::Setup, message: message.into() }
    }

    pub fn lost(message: impl Into<String>) -> Self {
        DatastoreError { kind: DatastoreErrorKind::Lost, message: message.into() }
    }

    pub fn rejected(message: impl Into<String>) -> Self {
        DatastoreError { kind: DatastoreErrorKind::Rejected, message: message.into() }
    }

    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        DatastoreError { kind: DatastoreErrorKind::Unavailable, message: message.into() }
    }

    /// A unique key that another row has.
    pub fn is_taken(&self) -> bool {
        self.kind == DatastoreErrorKind::Conflict && self.message.contains("23505")
    }

    /// Says what was being done: `context: message`.
    pub fn context(mut self, context: impl std::fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    pub(super) fn from_pool(error: deadpool_postgres::PoolError, settings: &DatastoreSettings) -> Self {
        use deadpool_postgres::PoolError;
        let place = settings.place();
        match error {
            PoolError::Backend(error) => Self::from(error).context(format!("datastore {place}")),
            PoolError::PostCreateHook(deadpool_postgres::HookError::Backend(error)) => {
                Self::from(error).context(format!("datastore {place}"))
            }
            PoolError::Timeout(_) => Self::unavailable(format!(
                "datastore {place}: no connection within {} s; hint: raise 'datastore.pool_size' (now {}) when the \
                 server is well",
                super::POOL_WAIT.as_secs(),
                settings.pool_size
            )),
            other => Self::unavailable(format!("datastore {place}: {other}")),
        }
    }
}

impl From<tokio_postgres::Error> for DatastoreError {
    fn from(error: tokio_postgres::Error) -> Self {
        let kind = match error.code() {
            None if error.is_closed() => DatastoreErrorKind::Unavailable,
            None => match std::error::Error::source(&error) {
                Some(source) if source.is::<std::io::Error>() => DatastoreErrorKind::Unavailable,
                // A value that does not fit its type has another source, and says something else.
                _ if is_of_connection(&error.to_string()) => DatastoreErrorKind::Unavailable,
                _ => DatastoreErrorKind::Rejected,
            },
            Some(code) => {
                if is_of_session(code.code()) {
                    distrust_sessions();
                }
                kind_of(code)
            }
        };
        DatastoreError { kind, message: message_of(&error) }
    }
}

/// The client's words for a connection that could not be made, or that is of no more use.
fn is_of_connection(text: &str) -> bool {
    let begins = ["error connecting", "error performing TLS", "unexpected message", "error parsing response"];
    begins.iter().any(|begin| text.starts_with(begin)) || text.contains("timed out")
}

/// When a session was last found to be the reason of an error.
static DISTRUSTED: Mutex<Option<Instant>> = Mutex::new(None);

/// Errors that a session may keep having that a new one has not: it is with a server that stands by, a statement that it
/// has prepared is gone or of another shape by now, or what it knows of the catalog is wrong.
fn is_of_session(code: &str) -> bool {
    matches!(code, "25006" | "0A000" | "26000" | "42P05") || code.starts_with("XX")
}

fn distrust_sessions() {
    *DISTRUSTED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
}

/// Whether a session that was begun then may be used on.
pub(super) fn is_trusted(begun: Instant) -> bool {
    DISTRUSTED.lock().unwrap_or_else(PoisonError::into_inner).is_none_or(|since| begun > since)
}

fn kind_of(code: &SqlState) -> DatastoreErrorKind {
    let conflicts = [SqlState::LOCK_NOT_AVAILABLE, SqlState::UNIQUE_VIOLATION];
    if conflicts.contains(code) {
        return DatastoreErrorKind::Conflict;
    }
    match (code.code(), code.code().get(..2)) {
        // A generated column is given a value.
        ("428C9", _) => DatastoreErrorKind::Rejected,
        // A prepared statement that is gone, is there already, or gives other columns since its tables were altered; or
        // something that a server does not do, which a newer one may.
        ("26000" | "42P05" | "0A000", _) => DatastoreErrorKind::Unavailable,
        // Deadlock, serialization, and a snapshot that became too old.
        (_, Some("40" | "72")) => DatastoreErrorKind::Conflict,
        // Connection exceptions, a transaction that is read-only or broken, insufficient resources, an object in use,
        // operator intervention (shutdown, starting up, a time-out), I/O, a broken configuration file, internal errors
        // (the catalog changed at that moment).
        (_, Some("08" | "25" | "53" | "55" | "57" | "58" | "F0" | "XX")) => DatastoreErrorKind::Unavailable,
        // Authorization, no such database, no such schema, other objects depend on it, rights and names.
        (_, Some("28" | "3D" | "3F" | "2B" | "42")) => DatastoreErrorKind::Setup,
        // Data, constraints, limits, and what functions and triggers raise, by whatever code.
        _ => DatastoreErrorKind::Rejected,
    }
}

fn message_of(error: &tokio_postgres::Error) -> String {
    let Some(db) = error.as_db_error() else {
        return match std::error::Error::source(error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
    };
    let mut text = format!("{} (SQLSTATE {})", db.message(), db.code().code());
    if let Some(detail) = db.detail() {
        text += &format!("; {detail}");
    }
    if let Some(hint) = db.hint() {
        text += &format!("; hint: {hint}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_data_is_to_blame_for_is_rejected() {
        use DatastoreErrorKind::{Conflict, Rejected, Setup, Unavailable};
        for (kind, codes) in [
            // A standby, a broken transaction; too many connections, a full disk; a time-out, a shutdown, a start; a lost
            // file; an error of the catalog; statements that are not what they were; an object in use.
            (
                Unavailable,
                &[
                    "08006", "25006", "25P02", "53300", "53100", "57014", "57P01", "57P02", "57P03", "58P01", "58030",
                    "XX000", "XX001", "0A000", "26000", "42P05", "55006", "F0000",
                ][..],
            ),
            (Conflict, &["40001", "40P01", "40003", "55P03", "23505", "72000"]),
            (Setup, &["28P01", "28000", "3D000", "3F000", "42501", "42P01", "42703", "42704", "42883", "2BP01"]),
            (Rejected, &["22001", "22P02", "23514", "23503", "44000", "P0001", "54000", "428C9", "21000", "SHOP1"]),
        ] {
            for code in codes {
                assert_eq!(kind_of(&SqlState::from_code(code)), kind, "{code}");
            }
        }
    }

    #[test]
    fn a_session_is_left_after_an_error_that_a_new_one_may_not_have() {
        let before = Instant::now();
        std::thread::sleep(std::time::Duration::from_millis(2));
        distrust_sessions();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(!is_trusted(before) && is_trusted(Instant::now()));
        assert!(is_of_session("XX000") && is_of_session("25006") && !is_of_session("40001"));
    }
}
