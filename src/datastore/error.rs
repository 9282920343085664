//! One error for all that is asked of the datastore, with a kind that decides what is done about it.

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
    /// The server is away, starting or stopping: wait for it.
    Unavailable,
    /// Another transaction was in the way (deadlock, lock time-out, a unique key taken meanwhile): do it again.
    Conflict,
    /// A cursor, lease or intent is no longer the caller's.
    Lost,
    /// Rights or settings are missing: a person must act; the message has the SQL.
    Setup,
    /// The statement or its data is wrong; the same again will fail again.
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
                // A connection that could not be made; a value that does not fit its type has another source.
                _ if error.to_string().starts_with("error connecting") => DatastoreErrorKind::Unavailable,
                _ if error.to_string().contains("timed out") => DatastoreErrorKind::Unavailable,
                _ => DatastoreErrorKind::Rejected,
            },
            Some(code) => kind_of(code),
        };
        DatastoreError { kind, message: message_of(&error) }
    }
}

fn kind_of(code: &SqlState) -> DatastoreErrorKind {
    let conflicts = [
        SqlState::T_R_DEADLOCK_DETECTED,
        SqlState::T_R_SERIALIZATION_FAILURE,
        SqlState::LOCK_NOT_AVAILABLE,
        SqlState::UNIQUE_VIOLATION,
    ];
    if conflicts.contains(code) {
        return DatastoreErrorKind::Conflict;
    }
    match code.code().get(..2) {
        // Connection exceptions, insufficient resources, operator intervention (shutdown, starting up).
        Some("08" | "53" | "57" | "25") => DatastoreErrorKind::Unavailable,
        Some("28" | "3D") => DatastoreErrorKind::Setup,
        _ if *code == SqlState::INSUFFICIENT_PRIVILEGE => DatastoreErrorKind::Setup,
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
