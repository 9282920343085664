//! What an event says besides the row: the `source` block, the operation, the clocks.
//!
//! Everything that a transaction's events share is encoded once, so that a row costs copies of a few dozen bytes.

use std::io::Write;

use super::EncodingSettings;
use super::wire::{put_bytes, put_long};
use crate::event::{Lsn, Operation};

/// `source.version`: ours, so that a consumer can tell who wrote an event.
const VERSION: &str = concat!("tidegate-", env!("CARGO_PKG_VERSION"));

/// `source.snapshot`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SnapshotMarker {
    /// Streamed.
    #[default]
    False,
    /// The very first row of a snapshot.
    First,
    FirstInDataCollection,
    True,
    LastInDataCollection,
    /// The very last row of a snapshot.
    Last,
    /// Read by chunks while streaming.
    Incremental,
}

impl SnapshotMarker {
    pub fn name(self) -> &'static str {
        match self {
            SnapshotMarker::False => "false",
            SnapshotMarker::First => "first",
            SnapshotMarker::FirstInDataCollection => "first_in_data_collection",
            SnapshotMarker::True => "true",
            SnapshotMarker::LastInDataCollection => "last_in_data_collection",
            SnapshotMarker::Last => "last",
            SnapshotMarker::Incremental => "incremental",
        }
    }
}

/// The parts of `source` that all events of a transaction, or of a snapshot, have in common; encoded.
/// Made anew for every transaction by [`TransactionMeta::reset`], which allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct TransactionMeta {
    bytes: Vec<u8>,
    /// Ends of the parts within `bytes`: up to ts_ms, db, sequence's beginning, ts_us and ts_ns, txId, the rest.
    ends: [usize; 6],
}

impl TransactionMeta {
    /// See [`TransactionMeta::reset`].
    pub fn new(
        settings: &EncodingSettings,
        commit_time_us: i64,
        xid: Option<u32>,
        last_commit: Option<Lsn>,
        origin: Option<&str>,
    ) -> Self {
        let mut meta = TransactionMeta::default();
        meta.reset(settings, commit_time_us, xid, last_commit, origin);
        meta
    }

    /// * `commit_time_us`: commit time, for a snapshot its time, microseconds since 1970 UTC.
    /// * `last_commit`: end of the last commit before this transaction; for the first one the consistent point
    ///   that its stream starts at; `None` for a snapshot. It rises from transaction to transaction, which is what
    ///   makes it a version: LSNs of rows do not (CORRECTNESS 2).
    /// * `origin`: name of the system that the transaction was tagged with.
    pub fn reset(
        &mut self,
        settings: &EncodingSettings,
        commit_time_us: i64,
        xid: Option<u32>,
        last_commit: Option<Lsn>,
        origin: Option<&str>,
    ) {
        let out = &mut self.bytes;
        out.clear();
        put_bytes(out, VERSION.as_bytes());
        put_bytes(out, b"postgresql");
        put_bytes(out, settings.prefix.as_bytes());
        put_long(out, commit_time_us.div_euclid(1000));
        self.ends[0] = out.len();
        put_bytes(out, settings.database.as_bytes());
        self.ends[1] = out.len();
        // Writing to a Vec does not fail.
        let _ = match last_commit {
            Some(lsn) => write!(out, "[\"{}\",\"", lsn.0),
            None => write!(out, "[null,\""),
        };
        self.ends[2] = out.len();
        put_some_long(out, commit_time_us);
        put_some_long(out, commit_time_us.saturating_mul(1000));
        self.ends[3] = out.len();
        match xid {
            Some(xid) => put_some_long(out, xid.into()),
            None => out.push(0),
        }
        self.ends[4] = out.len();
        // xmin
        out.push(0);
        match origin {
            Some(origin) => {
                put_long(out, 1);
                put_bytes(out, origin.as_bytes());
            }
            None => out.push(0),
        }
        // origin_lsn
        out.push(0);
        self.ends[5] = out.len();
    }

    fn part(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start..self.ends[index]]
    }
}

/// The `transaction` block of `provide.transaction.metadata`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransactionBlock<'a> {
    /// `<xid>:<lsn>`
    pub id: &'a str,
    /// Place of the event among all of its transaction, from 1.
    pub total_order: i64,
    /// Place among those of its table, from 1.
    pub data_collection_order: i64,
}

/// All that an event says besides the row.
#[derive(Clone, Copy, Debug)]
pub struct EventMeta<'a> {
    pub transaction: &'a TransactionMeta,
    pub operation: Operation,
    /// LSN of the row's own record; for a snapshot row its consistent point.
    pub lsn: Lsn,
    pub snapshot: SnapshotMarker,
    pub block: Option<TransactionBlock<'a>>,
    /// When the event is made, nanoseconds since 1970 UTC; one reading of the clock may serve a whole batch.
    pub processed_ns: i64,
}

impl EventMeta<'_> {
    /// Appends the `source` record. `names`: schema and table, encoded.
    pub(super) fn put_source(&self, names: &[u8], out: &mut Vec<u8>) {
        let transaction = self.transaction;
        out.extend_from_slice(transaction.part(0));
        // The string's branch comes first in this union, since its default is one.
        put_long(out, 0);
        put_bytes(out, self.snapshot.name().as_bytes());
        out.extend_from_slice(transaction.part(1));
        let mut digits = [0u8; 20];
        let lsn = decimal(self.lsn.0, &mut digits);
        let sequence_head = transaction.part(2);
        put_long(out, 1);
        put_long(out, (sequence_head.len() + lsn.len() + 2) as i64);
        out.extend_from_slice(sequence_head);
        out.extend_from_slice(lsn);
        out.extend_from_slice(b"\"]");
        out.extend_from_slice(transaction.part(3));
        out.extend_from_slice(names);
        out.extend_from_slice(transaction.part(4));
        put_some_long(out, self.lsn.0 as i64);
        out.extend_from_slice(transaction.part(5));
    }

    /// Appends the nullable `transaction` record.
    pub(super) fn put_block(&self, out: &mut Vec<u8>) {
        match self.block {
            Some(block) => {
                put_long(out, 1);
                put_bytes(out, block.id.as_bytes());
                put_long(out, block.total_order);
                put_long(out, block.data_collection_order);
            }
            None => out.push(0),
        }
    }

    /// Appends `op` and the three clocks.
    pub(super) fn put_operation_and_clocks(&self, out: &mut Vec<u8>) {
        put_bytes(out, self.operation.letter().as_bytes());
        put_some_long(out, self.processed_ns.div_euclid(1_000_000));
        put_some_long(out, self.processed_ns.div_euclid(1000));
        put_some_long(out, self.processed_ns);
    }
}

/// A `["null","long"]` that is not null.
pub(super) fn put_some_long(out: &mut Vec<u8>, value: i64) {
    put_long(out, 1);
    put_long(out, value);
}

fn decimal(mut value: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            return &digits[start..];
        }
    }
}
