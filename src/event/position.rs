//! Places: in the WAL, in a topic.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A WAL position: byte offset, shown as PostgreSQL shows it (`16/B374D848`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    pub const ZERO: Lsn = Lsn(0);

    /// Bytes from `earlier` to `self`; 0 when `earlier` is not earlier.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 as u32)
    }
}

/// Text that is not an LSN.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is not an LSN; an LSN is two hexadecimal numbers of up to 8 digits, as in 16/B374D848")]
pub struct LsnParseError(String);

impl FromStr for Lsn {
    type Err = LsnParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || LsnParseError(text.to_owned());
        let (high, low) = text.split_once('/').ok_or_else(wrong)?;
        let half = |part: &str| match part.len() {
            1..=8 if part.bytes().all(|b| b.is_ascii_hexdigit()) => u32::from_str_radix(part, 16).map_err(|_| wrong()),
            _ => Err(wrong()),
        };
        Ok(Lsn((u64::from(half(high)?) << 32) | u64::from(half(low)?)))
    }
}

impl Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A PostgreSQL object identifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Oid(pub u32);

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Place of a record in a partition. The first record has offset 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Offset(pub i64);

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One partition of one topic.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicPartition {
    pub topic: Arc<str>,
    pub partition: i32,
}

impl TopicPartition {
    pub fn new(topic: impl Into<Arc<str>>, partition: i32) -> Self {
        TopicPartition { topic: topic.into(), partition }
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.topic, self.partition)
    }
}

/// Where a capture stands: everything up to and with the commit that ends at `commit_end` is in the log.
/// Stored in the log with the records it covers; only then is the slot told (CORRECTNESS 4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturePosition {
    /// Rises when the slot, timeline or system identifier changes, since LSNs may then fall.
    pub epoch: u64,
    pub system_identifier: String,
    pub timeline: u32,
    pub slot: String,
    /// End LSN of the last commit that is wholly in the log.
    pub commit_end: Lsn,
    /// End LSN of the last commit met; for the first one the consistent point that the stream began at. What
    /// `source.sequence` shows. Behind `commit_end` where that was moved on by others' WAL.
    pub last_commit: Lsn,
    /// Inside a transaction too large for one batch: how many of its changes, in stream order and after
    /// `commit_end`, are in the log already. 0 at a transaction boundary.
    pub ordinal: u64,
    /// Xid of the transaction `ordinal` counts in; 0 at a boundary.
    pub ordinal_xid: u32,
    /// Fingerprint of publication and filters that `ordinal` was counted under.
    pub fingerprint: u64,
    /// `None` once the snapshot is whole.
    pub snapshot: Option<SnapshotProgress>,
    /// Tables (`schema.table`) whose rows a snapshot read later than where the stream begins: what was committed before
    /// this LSN is in those rows.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub read_at: BTreeMap<String, Lsn>,
    /// Tables (`schema.table`) that can't be written: their changes are passed over until they are read anew.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub quarantined: BTreeMap<String, Quarantine>,
}

/// Why and since when nothing of a table is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    /// The first change that is not in the log; of a snapshot, the point that its rows are dated with.
    pub since: Lsn,
    /// What could not be written, and what to do about it.
    pub reason: String,
    /// Fingerprint of the settings and the version that it could not be written with.
    #[serde(default)]
    pub tried_with: u32,
}

/// How far an initial snapshot is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotProgress {
    /// The slot's consistent point, which every snapshot row is dated with.
    pub consistent_point: Lsn,
    /// Tables (`schema.table`) that are wholly in the log.
    pub done: Vec<String>,
    /// Tables that some rows of are in the log.
    #[serde(default)]
    pub begun: Vec<String>,
    /// Of tables that came while the capture ran: all others have long been streamed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adopting: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_reads_back_as_postgresql_writes_it() {
        for text in ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(text.parse::<Lsn>().unwrap().to_string(), text);
        }
        for text in ["", "16", "16/", "/1", "1/2/3", "g/1", "123456789/0", "+1/2"] {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
    }
}
