//! A change as a consumer sees it, decoded from a record.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Lsn;

/// What happened to the row. The letters are Debezium's `op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    Create,
    Update,
    Delete,
    /// Read by a snapshot.
    Read,
    Truncate,
    Message,
}

impl Operation {
    pub fn letter(self) -> &'static str {
        match self {
            Operation::Create => "c",
            Operation::Update => "u",
            Operation::Delete => "d",
            Operation::Read => "r",
            Operation::Truncate => "t",
            Operation::Message => "m",
        }
    }

    pub fn from_letter(letter: &str) -> Option<Self> {
        Some(match letter {
            "c" => Operation::Create,
            "u" => Operation::Update,
            "d" => Operation::Delete,
            "r" => Operation::Read,
            "t" => Operation::Truncate,
            "m" => Operation::Message,
            _ => return None,
        })
    }
}

/// The system whose data a transaction carries: content of the tagging logical message, and `source.origin`
/// (there only the system's name).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub system: String,
    pub connector: String,
}

/// A decoded change event. Values are as expressions see them: objects by column name, times as ISO text,
/// decimals as exact numbers, no key at all for an unchanged TOAST value.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub operation: Operation,
    /// Schema and table the row belongs to.
    pub schema: String,
    pub table: String,
    pub key: Value,
    pub before: Value,
    pub after: Value,
    /// The version of the row's transaction: where the commit before it ended (`source.sequence`), which rises from
    /// transaction to transaction as commits do; for a snapshot row its consistent point. The same for every row of
    /// a transaction: those are told apart by their order in the log.
    pub commit_lsn: Lsn,
    /// LSN of the row's own record.
    pub lsn: Lsn,
    /// Commit time, microseconds since 1970-01-01 UTC.
    pub commit_time_us: i64,
    /// The transaction (`source.txId`), its low 32 bits; of a snapshot row the first one that the snapshot does not see.
    pub xid: Option<u32>,
    /// Name of the system the transaction was tagged with.
    pub origin: Option<String>,
    /// From the headers of a changed primary key: the other key.
    pub new_key: Option<Value>,
    pub old_key: Option<Value>,
}
