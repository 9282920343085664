//! Records of the present transaction: the topics that it writes to, the offset that each partition's next record gets,
//! and the chunk that is being built for it.
//!
//! The invariant: an offset is given once. What is here counts only once the transaction is committed, and after a
//! rollback all of it is forgotten and begins anew from the catalog, which knows only what is durable.

use std::collections::HashMap;
use std::sync::Arc;

use rusqlite::{Connection, params};

use super::catalog::{Catalog, Topic};
use super::chunk::ChunkBuilder;
use super::commit::now_ms;
use crate::event::RecordBatch;
use crate::log::{LogError, partitioner};

/// A blob is closed when it passes this; what a reader holds at a time.
pub(super) const CHUNK_BYTES: usize = 1 << 20;

#[derive(Default)]
pub(super) struct Pending {
    open: Vec<OpenTopic>,
    /// Places of the topics in `open`.
    numbers: HashMap<Arc<str>, usize>,
    /// Batches so far: tells them apart.
    batches: u64,
    blob: Vec<u8>,
}

struct OpenTopic {
    topic: Arc<Topic>,
    partitions: Vec<OpenPartition>,
    /// Where the next batch's records without a key go.
    keyless: i32,
}

#[derive(Default)]
struct OpenPartition {
    /// Offset the next record gets, this transaction's included.
    next: i64,
    /// First offset in the builder.
    base: i64,
    builder: ChunkBuilder,
    /// Bytes this transaction adds.
    added: i64,
    touched: bool,
}

impl Pending {
    /// Opens every topic of the batch. Errors: [`LogError::UnknownTopic`].
    pub fn open(&mut self, batch: &RecordBatch, catalog: &Catalog) -> Result<(), LogError> {
        for name in batch.topics() {
            if self.numbers.contains_key(name) {
                continue;
            }
            let topic = catalog.get(name).ok_or_else(|| LogError::UnknownTopic(name.to_string()))?;
            let partition = |p| OpenPartition { next: topic.tail(p), ..OpenPartition::default() };
            let partitions = (0..topic.partitions()).map(partition).collect();
            self.numbers.insert(topic.name.clone(), self.open.len());
            self.open.push(OpenTopic { topic, partitions, keyless: 0 });
        }
        Ok(())
    }

    /// Adds the batch, whose topics are open, and writes chunks that are full.
    pub fn add(&mut self, conn: &Connection, batch: &RecordBatch) -> rusqlite::Result<()> {
        self.batches += 1;
        let now = now_ms();
        let mut result = Ok(());
        // The batch's topic slots, resolved once.
        let slots: Vec<usize> = batch.topics().iter().filter_map(|name| self.numbers.get(name).copied()).collect();
        for slot in &slots {
            let topic = &mut self.open[*slot];
            topic.keyless = (topic.keyless + 1) % topic.topic.partitions().max(1);
        }
        for record in batch.iter() {
            let topic = &mut self.open[slots[record.topic_slot.index()]];
            let partition = match record.key {
                Some(key) => partitioner::partition_of(key, topic.topic.partitions()),
                None => topic.keyless,
            };
            let open = &mut topic.partitions[partition as usize];
            if open.builder.count() == 0 {
                open.base = open.next;
            }
            open.builder.push(&record, self.batches, 0);
            open.next += 1;
            open.touched = true;
            if open.builder.byte_size() >= CHUNK_BYTES && result.is_ok() {
                result = write_chunk(conn, &mut self.blob, topic.topic.id, partition, open, now);
            }
        }
        result
    }

    /// Writes what is left in the builders, and how far each partition has come.
    pub fn write(&mut self, conn: &Connection) -> rusqlite::Result<()> {
        let now = now_ms();
        for open in &mut self.open {
            for (partition, part) in open.partitions.iter_mut().enumerate().filter(|(_, part)| part.touched) {
                let partition = partition as i32;
                if part.builder.count() > 0 {
                    write_chunk(conn, &mut self.blob, open.topic.id, partition, part, now)?;
                }
                conn.prepare_cached(
                    "UPDATE partitions SET next = ?3, bytes = bytes + ?4 WHERE topic = ?1 AND partition = ?2",
                )?
                .execute(params![open.topic.id, partition, part.next, part.added])?;
            }
        }
        Ok(())
    }

    /// After the commit: readers may have it.
    pub fn show_tails(&mut self) {
        for open in &mut self.open {
            for (partition, part) in open.partitions.iter_mut().enumerate().filter(|(_, part)| part.touched) {
                open.topic.set_tail(partition as i32, part.next);
                part.touched = false;
                part.added = 0;
            }
        }
    }

    /// After a rollback.
    pub fn forget(&mut self) {
        self.open.clear();
        self.numbers.clear();
    }
}

fn write_chunk(
    conn: &Connection,
    blob: &mut Vec<u8>,
    topic: i64,
    partition: i32,
    open: &mut OpenPartition,
    now: i64,
) -> rusqlite::Result<()> {
    let records = open.builder.count();
    let crc = open.builder.finish(blob);
    conn.prepare_cached("INSERT INTO blobs (data) VALUES (?1)")?.execute([&*blob])?;
    let id = conn.last_insert_rowid();
    conn.prepare_cached(
        "INSERT INTO chunks (topic, partition, base, last, records, min_ts, max_ts, size, crc, blob)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6, ?7, ?8, ?9)",
    )?
    .execute(params![topic, partition, open.base, open.next - 1, records, now, blob.len() as i64, crc, id])?;
    open.added += blob.len() as i64;
    open.base = open.next;
    if blob.capacity() > 2 * CHUNK_BYTES {
        *blob = Vec::new();
    }
    Ok(())
}
