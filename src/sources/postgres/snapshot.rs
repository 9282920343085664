//! The stage that reads the snapshot: rows to records, table by table, and how far that is.
//!
//! Invariant: a table is told as done in no position before the one that comes with its last row, so that after a crash
//! the tables left, and only those, are read again.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::Instant;

use crate::avro::SnapshotMarker;
use crate::event::{CapturePosition, Oid, Quarantine, SnapshotProgress, Table};
use crate::pipeline::progress::progress;
use crate::pipeline::{Fault, Status};
use crate::postgres::frames::next_frame;

use super::envelope::snapshot_marker;
use super::reading::{SnapshotFeed, SnapshotItem};
use super::relations::{Captured, Origin, Resolver};
use super::schemas::Schemas;
use super::writer::{RowWritten, Writer};
use super::{Resolving, joined, now_ns};

pub(super) struct Snapshot {
    feed: SnapshotFeed,
    position: CapturePosition,
    captured: Option<Captured>,
    /// Chunks that are being written: the last row of one waits, since whether it is the table's last row is known
    /// only with what follows.
    rows: BytesMut,
    more: Option<SnapshotItem>,
    /// The last row of an earlier table: whether it is the snapshot's last is known only with a later row.
    held: Option<Held>,
    resolving: Option<Resolving>,
    rows_of_table: u64,
    rows_read: u64,
    tables_done: usize,
    began: Instant,
    told: Instant,
}

struct Held {
    captured: Captured,
    row: BytesMut,
    row_starts: usize,
    very_first: bool,
    first: bool,
}

/// What the snapshot has come to.
pub(super) enum Read {
    /// The batch is to be handed on with this position.
    Part(CapturePosition),
    /// All is read; the stream follows.
    Whole(CapturePosition),
}

/// Columns that a snapshot found nulls in, against the catalog.
pub(super) type Nullable = Vec<(Oid, String)>;

impl Drop for Snapshot {
    fn drop(&mut self) {
        if let Some(task) = &self.resolving {
            task.abort();
        }
    }
}

impl Snapshot {
    pub(super) fn new(feed: SnapshotFeed, position: CapturePosition) -> Self {
        let now = Instant::now();
        Snapshot {
            feed,
            position,
            captured: None,
            rows: BytesMut::new(),
            more: None,
            held: None,
            resolving: None,
            rows_of_table: 0,
            rows_read: 0,
            tables_done: 0,
            began: now,
            told: now,
        }
    }

    /// Reads on until there is something to hand on. Safe to drop at its await.
    pub(super) async fn next(
        &mut self,
        writer: &mut Writer,
        schemas: &mut Schemas,
        resolver: &Resolver,
        nullable: &mut Nullable,
    ) -> Result<Read, Fault> {
        loop {
            if let Some(task) = &mut self.resolving {
                let captured = joined(task.await)?;
                self.resolving = None;
                if let Some(reason) = &captured.refused {
                    quarantine(&mut self.position, writer, &captured.table, reason.clone());
                } else {
                    schemas.note(&captured.table, self.position.epoch, self.feed.shapes_from, &mut writer.batch);
                }
                self.captured = Some(captured);
            }
            if self.write_rows(writer, nullable)? {
                self.tell_progress(&resolver.name, &resolver.status);
                return Ok(Read::Part(self.position.clone()));
            }
            match self.more.take() {
                None => {}
                Some(SnapshotItem::Rows(rows, share)) => {
                    if self.rows.is_empty() {
                        self.rows = rows;
                    } else {
                        // One row was held back: it is put before the next ones.
                        self.rows.unsplit(rows);
                    }
                    drop(share);
                    continue;
                }
                Some(SnapshotItem::Table(mut table)) => {
                    self.rows_of_table = 0;
                    let oid = table.oid;
                    for (_, name) in nullable.iter().filter(|(of, _)| *of == oid) {
                        let columns = &mut Arc::make_mut(&mut table).columns;
                        columns.iter_mut().filter(|column| column.name == *name).for_each(|c| c.nullable = true);
                    }
                    let work = resolver.clone().resolve(Origin::Snapshot(table));
                    self.resolving = Some(tokio::spawn(work));
                    continue;
                }
                Some(SnapshotItem::TableDone(table)) => {
                    self.table_done(table, &resolver.name)?;
                    continue;
                }
                Some(SnapshotItem::Done) => {
                    self.write_held(writer, true, nullable)?;
                    let position = CapturePosition { snapshot: None, ..self.position.clone() };
                    tracing::info!(connector = %resolver.name, rows = self.rows_read, tables = self.tables_done,
                        at = %position.commit_end, seconds = self.began.elapsed().as_secs(), "snapshot is whole");
                    resolver.status.set_progress(None);
                    return Ok(Read::Whole(position));
                }
            }
            match self.feed.items.recv().await {
                Some(Ok(item)) => self.more = Some(item),
                Some(Err(fault)) => return Err(fault),
                None => return Err(Fault::retry("the reading of the snapshot ended without a word")),
            }
        }
    }

    /// Writes all rows that are here but the last. True: the batch is full.
    fn write_rows(&mut self, writer: &mut Writer, nullable: &mut Nullable) -> Result<bool, Fault> {
        if self.captured.is_none() || self.rows.is_empty() {
            return Ok(false);
        }
        self.write_held(writer, false, nullable)?;
        let Some(captured) = &mut self.captured else { return Ok(false) };
        let progress = self.position.snapshot.get_or_insert_with(SnapshotProgress::default);
        if self.rows_of_table == 0 && !progress.begun.contains(&captured.table.full_name()) {
            progress.begun.push(captured.table.full_name());
        }
        let now = now_ns();
        while let Some((frame, length)) = next_frame(&self.rows)? {
            if length == self.rows.len() {
                break;
            }
            let row_starts = length - frame.body.len();
            let marker = snapshot_marker(self.rows_read == 0, self.rows_of_table == 0, false, false);
            let mut row = self.rows.split_to(length);
            write(writer, &mut self.position, captured, &mut row[row_starts..], marker, now, nullable)?;
            self.rows_read += 1;
            self.rows_of_table += 1;
            if writer.is_full() {
                if let Some(output) = &mut captured.output {
                    output.counters.flush();
                }
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What is left of the table is its last row, or nothing where it has none.
    fn table_done(&mut self, table: String, connector: &str) -> Result<(), Fault> {
        let captured = self.captured.take();
        let last = next_frame(&self.rows)?.map(|(frame, length)| length - frame.body.len());
        match (captured, last) {
            (Some(captured), Some(row_starts)) => {
                self.held = Some(Held {
                    captured,
                    row: std::mem::take(&mut self.rows),
                    row_starts,
                    very_first: self.rows_read == 0,
                    first: self.rows_of_table == 0,
                });
                self.rows_read += 1;
                self.rows_of_table += 1;
            }
            (Some(captured), None) => self.done(&table, &captured),
            (None, _) => self.position.snapshot.get_or_insert_with(SnapshotProgress::default).done.push(table.clone()),
        }
        self.tables_done += 1;
        tracing::info!(connector, %table, rows = self.rows_of_table, "read");
        Ok(())
    }

    fn write_held(&mut self, writer: &mut Writer, very_last: bool, nullable: &mut Nullable) -> Result<(), Fault> {
        let Some(mut held) = self.held.take() else { return Ok(()) };
        let marker = snapshot_marker(held.very_first, held.first, true, very_last);
        let row = &mut held.row[held.row_starts..];
        write(writer, &mut self.position, &mut held.captured, row, marker, now_ns(), nullable)?;
        self.done(&held.captured.table.full_name(), &held.captured);
        Ok(())
    }

    /// All its rows are written, or it is in quarantine by now: it is not read again for its own sake.
    fn done(&mut self, table: &str, captured: &Captured) {
        self.position.snapshot.get_or_insert_with(SnapshotProgress::default).done.push(table.to_owned());
        if captured.output.is_some() {
            self.position.quarantined.remove(table);
        }
    }

    fn tell_progress(&mut self, connector: &str, status: &Status) {
        if self.told.elapsed() < Duration::from_millis(500) {
            return;
        }
        self.told = Instant::now();
        let estimated: u64 = self.feed.tables.iter().map(|(_, rows)| rows).sum();
        let seconds = self.began.elapsed().as_secs_f64().max(0.001);
        let rate = self.rows_read as f64 / seconds;
        let what = format!("snapshot of {} tables, {} done", self.feed.tables.len(), self.tables_done);
        status.set_progress(Some(progress(&what, self.rows_read, estimated, "rows", rate)));
        metrics::gauge!("tidegate_snapshot_rows", "connector" => connector.to_owned()).set(self.rows_read as f64);
    }
}

/// The table's rows from here on are passed over.
fn quarantine(position: &mut CapturePosition, writer: &Writer, table: &Table, reason: String) {
    let quarantine = Quarantine { since: position.commit_end, reason, tried_with: writer.attempt() };
    position.quarantined.insert(table.full_name(), quarantine);
}

fn write(
    writer: &mut Writer,
    position: &mut CapturePosition,
    captured: &mut Captured,
    row: &mut [u8],
    marker: SnapshotMarker,
    now_ns: i64,
    nullable: &mut Nullable,
) -> Result<(), Fault> {
    let column = match writer.snapshot_row(captured, row, marker, now_ns)? {
        RowWritten::Yes => return Ok(()),
        RowWritten::Nullable(column) => column,
        RowWritten::Refused(reason) => {
            captured.output = None;
            quarantine(position, writer, &captured.table, reason);
            return Ok(());
        }
    };
    // A constraint that was never validated (NOT NULL NOT VALID): the rows decide.
    let table = &captured.table;
    let name = table.columns.get(column).map(|column| column.name.clone()).unwrap_or_default();
    let fault = Fault::retry(format!(
        "{}.{name} has a null although the catalog says it has none; reading again with a nullable column",
        table.full_name()
    ));
    nullable.push((table.oid, name));
    Err(fault)
}
