//! What can go wrong between Tidegate and a PostgreSQL server, with the facts in it.

use std::fmt;
use std::time::Duration;

#[derive(Clone, Debug, thiserror::Error)]
pub enum PostgresError {
    /// The server can't be reached, or the connection broke.
    #[error("PostgreSQL at {address}: {reason}")]
    Connection { address: String, reason: String },
    /// TLS could not be agreed on or the certificate is not trusted.
    #[error("PostgreSQL at {address}: TLS: {reason}")]
    Tls { address: String, reason: String },
    /// The server wants a way of proving who we are that is not spoken here, or did not prove who it is.
    #[error("PostgreSQL at {address}: authentication: {reason}")]
    Authentication { address: String, reason: String },
    #[error("{0}")]
    Server(Box<ServerError>),
    /// An exported snapshot is not there any more: it goes with the session that exported it.
    #[error("the exported snapshot went with its session: {0}")]
    SnapshotGone(Box<ServerError>),
    /// Bytes that are no message of the protocol.
    #[error("the server sent what the protocol does not allow: {0}")]
    Protocol(String),
    #[error("{what} took longer than {} s", .after.as_secs())]
    Timeout { what: String, after: Duration },
    /// What the server holds does not allow what was asked, and trying again would not help.
    #[error("{0}")]
    Refused(String),
}

/// An ErrorResponse.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    pub severity: String,
    /// SQLSTATE.
    pub code: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    /// The command that met it; shown cut to its beginning.
    pub during: String,
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PostgreSQL says {}: {} (SQLSTATE {})", self.severity, self.message, self.code)?;
        if let Some(detail) = &self.detail {
            write!(f, "; {detail}")?;
        }
        if !self.during.is_empty() {
            write!(f, "; during: {}", self.during)?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "; hint: {hint}")?;
        }
        Ok(())
    }
}

impl PostgresError {
    /// SQLSTATE, where the server gave one.
    pub fn code(&self) -> Option<&str> {
        match self {
            PostgresError::Server(error) => Some(&error.code),
            _ => None,
        }
    }

    /// Whether the same may go well later without anybody doing something.
    pub fn is_passing(&self) -> bool {
        match self {
            PostgresError::Connection { .. }
            | PostgresError::Timeout { .. }
            | PostgresError::Protocol(_)
            | PostgresError::SnapshotGone(_) => true,
            PostgresError::Tls { .. } | PostgresError::Authentication { .. } | PostgresError::Refused(_) => false,
            // 55006: the slot is still in use by our last connection; 55P03: lock not available; 40: rolled back;
            // 08, 53, 57: connections, resources, shutdown. 42 and others want a person.
            PostgresError::Server(error) => {
                matches!(error.code.as_str(), "55006" | "55P03")
                    || ["08", "40", "53", "57", "58"].iter().any(|class| error.code.starts_with(class))
            }
        }
    }
}
