//! The task that reads a snapshot's tables, one after the other, into a queue.
//!
//! Invariant: the queue is bounded in bytes, and every wait for the server has a deadline.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

use crate::event::{Lsn, Table};
use crate::pipeline::Fault;
use crate::postgres::PostgresError;
use crate::postgres::snapshot::SnapshotReader;

use super::wanted::Wanted;

/// Rows of a snapshot, table by table.
pub(super) struct SnapshotFeed {
    pub items: mpsc::Receiver<Result<SnapshotItem, Fault>>,
    pub task: tokio::task::JoinHandle<()>,
    pub time_us: i64,
    pub xid: u32,
    /// Where in the WAL tables have the shape that they are read in.
    pub shapes_from: Lsn,
    /// Tables, with the planner's guess at their rows.
    pub tables: Vec<(String, u64)>,
}

pub(super) enum SnapshotItem {
    /// The rows of this table follow.
    Table(Arc<Table>),
    /// Whole CopyData messages.
    Rows(BytesMut, OwnedSemaphorePermit),
    TableDone(String),
    Done,
}

impl Drop for SnapshotFeed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A table that was dropped, renamed or lost a column between the slot and its lock is found anew by the next reading.
pub(super) fn reading_fault(error: PostgresError) -> Fault {
    match error.code() {
        Some("42P01" | "42703" | "3F000") => {
            Fault::retry(format!("a table was altered while the snapshot began, which is taken anew: {error}"))
        }
        Some("42501") if error.to_string().contains("row-level security") => {
            Fault::stop(format!("{error}. hint: ALTER ROLE … BYPASSRLS: a snapshot without the hidden rows is none"))
        }
        _ => error.into(),
    }
}

/// The tables' rows, in order, into the queue.
pub(super) async fn read_all(
    reader: &mut SnapshotReader,
    all: &Wanted,
    generated: bool,
    queue: &mpsc::Sender<Result<SnapshotItem, Fault>>,
) -> Result<(), PostgresError> {
    const QUEUE_BYTES: usize = 8 << 20;
    const SILENCE: Duration = Duration::from_secs(300);
    let room = Arc::new(Semaphore::new(QUEUE_BYTES >> 10));
    let gone = |_| PostgresError::Protocol("nobody reads the snapshot".into());
    for wanted in &all.tables {
        let published = all.published.iter().find(|of| of.schema == wanted.schema && of.name == wanted.name);
        let Some(table) = reader.table(wanted.oid, generated, published).await? else { continue };
        if table.columns.is_empty() {
            continue;
        }
        let table = Arc::new(table);
        queue.send(Ok(SnapshotItem::Table(table.clone()))).await.map_err(gone)?;
        let late =
            |_| PostgresError::Timeout { what: format!("the next rows of {}", table.full_name()), after: SILENCE };
        let sql = timeout(SILENCE, reader.begin(&table, wanted.partitioned, published)).await.map_err(late)??;
        loop {
            let rows = timeout(SILENCE, reader.rows(&sql)).await.map_err(late)??;
            let Some(rows) = rows else { break };
            let share = (rows.len() >> 10).clamp(1, QUEUE_BYTES >> 10) as u32;
            let Ok(share) = room.clone().acquire_many_owned(share).await else { break };
            queue.send(Ok(SnapshotItem::Rows(rows, share))).await.map_err(gone)?;
        }
        queue.send(Ok(SnapshotItem::TableDone(table.full_name()))).await.map_err(gone)?;
    }
    Ok(())
}
