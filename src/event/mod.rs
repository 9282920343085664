//! The words of the design as types: what moves through Tidegate, and where it is.
//!
//! Nothing here does I/O and nothing here knows a connector. Everything else may import this module;
//! it imports nothing of the crate.

mod batch;
mod captured;
mod change;
mod position;
mod table;

pub use batch::{HeaderSet, RecordBatch, RecordBuilder, RecordRef, TopicSlot};
pub use captured::{CapturedBatch, Spares, StoredPosition};
pub use change::{Change, Operation, Origin};
pub use position::{CapturePosition, Lsn, LsnParseError, Offset, Oid, Quarantine, SnapshotProgress, TopicPartition};
pub use table::{Cell, Column, ColumnType, ReplicaIdentity, SharedTable, Table, TypeKind};

/// Prefix of the transactional logical message that tags a transaction with its origin. Its content is
/// [`Origin`] as JSON. Messages whose prefix starts with `tidegate.` are never published.
pub const ORIGIN_MESSAGE_PREFIX: &str = "tidegate.origin";

/// The schema in the datastore that Tidegate keeps its own tables in; it is never captured.
pub const OWN_SCHEMA: &str = "tidegate";
