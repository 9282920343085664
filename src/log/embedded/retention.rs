//! What the embedded log removes, and when. Age and size of a topic remove only what every registered group has
//! read. The size limit of the whole log removes the oldest records, read ones first; where it has to take what a
//! group has not read, it says what was lost to whom: in the log output and in the table `losses`, which `tidegate topics`,
//! `tidegate status` and a metric show.
//!
//! Works in slices, so that commits are never held up for long.

use std::time::{Duration, Instant};

use rusqlite::{Connection, OptionalExtension, params};

use super::EmbeddedSettings;
use super::catalog::{Catalog, Topic};
use super::database::reading;
use crate::log::{LogError, Loss};

/// How long one slice may take.
const SLICE: Duration = Duration::from_millis(20);
/// Free pages that are kept to be used again (16 KB each).
const FREE_PAGES_KEPT: i64 = 1024;
const VACUUM_PAGES: i64 = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Swept {
    All,
    /// There is more to do.
    Part,
}

struct Oldest {
    base: i64,
    last: i64,
    size: i64,
    max_ts: i64,
    blob: i64,
}

pub(super) fn sweep(
    conn: &Connection,
    settings: &EmbeddedSettings,
    catalog: &Catalog,
    now_ms: i64,
) -> Result<Swept, LogError> {
    let until = Instant::now() + SLICE;
    let remove_old = || -> rusqlite::Result<Swept> {
        for topic in catalog.all() {
            for partition in 0..topic.partitions() {
                if sweep_partition(conn, settings, &topic, partition, now_ms, until)? == Swept::Part {
                    return Ok(Swept::Part);
                }
            }
        }
        enforce_limit(conn, settings, catalog, now_ms, until)
    };
    let run = || -> rusqlite::Result<Swept> {
        conn.execute_batch("BEGIN IMMEDIATE")?;
        let removed = remove_old()?;
        conn.execute_batch("COMMIT")?;
        if removed == Swept::Part { Ok(Swept::Part) } else { vacuum(conn) }
    };
    let swept = run();
    if swept.is_err() && !conn.is_autocommit() {
        let _ = conn.execute_batch("ROLLBACK");
    }
    swept.map_err(reading)
}

fn sweep_partition(
    conn: &Connection,
    settings: &EmbeddedSettings,
    topic: &Topic,
    partition: i32,
    now_ms: i64,
    until: Instant,
) -> rusqlite::Result<Swept> {
    let number = |name: &str| topic.settings.get(name).and_then(|text| text.parse::<i64>().ok());
    let max_age_ms = number("retention.ms").unwrap_or(settings.retention.as_millis() as i64);
    let max_bytes = number("retention.bytes").unwrap_or(settings.retention_bytes.map_or(-1, |bytes| bytes as i64));
    loop {
        let Some(oldest) = oldest_chunk(conn, topic.id, partition)? else { return Ok(Swept::All) };
        let too_old = max_age_ms >= 0 && oldest.max_ts < now_ms.saturating_sub(max_age_ms);
        let too_much = max_bytes >= 0 && partition_bytes(conn, topic.id, partition)? > max_bytes;
        if !(too_old || too_much) || oldest.last >= unread_from(conn, topic, partition)? {
            return Ok(Swept::All);
        }
        remove(conn, topic.id, partition, &oldest)?;
        if Instant::now() >= until {
            return Ok(Swept::Part);
        }
    }
}

/// Keeps the whole log within its size limit.
fn enforce_limit(
    conn: &Connection,
    settings: &EmbeddedSettings,
    catalog: &Catalog,
    now_ms: i64,
    until: Instant,
) -> rusqlite::Result<Swept> {
    loop {
        let total: i64 =
            conn.prepare_cached("SELECT coalesce(sum(bytes), 0) FROM partitions")?.query_row([], |row| row.get(0))?;
        metrics::gauge!("tidegate_log_bytes").set(total as f64);
        if total as u64 <= settings.size_limit {
            return Ok(Swept::All);
        }
        // The oldest chunk that everyone has read, else the oldest of all.
        let mut choice: Option<(bool, i64, std::sync::Arc<Topic>, i32, Oldest)> = None;
        for topic in catalog.all() {
            for partition in 0..topic.partitions() {
                let Some(oldest) = oldest_chunk(conn, topic.id, partition)? else { continue };
                let unread = oldest.last >= unread_from(conn, &topic, partition)?;
                if choice.as_ref().is_none_or(|c| (unread, oldest.max_ts) < (c.0, c.1)) {
                    choice = Some((unread, oldest.max_ts, topic.clone(), partition, oldest));
                }
            }
        }
        let Some((unread, _, topic, partition, oldest)) = choice else { return Ok(Swept::All) };
        if unread {
            say_lost(conn, settings, &topic, partition, &oldest, now_ms)?;
        }
        remove(conn, topic.id, partition, &oldest)?;
        if Instant::now() >= until {
            return Ok(Swept::Part);
        }
    }
}

fn say_lost(
    conn: &Connection,
    settings: &EmbeddedSettings,
    topic: &Topic,
    partition: i32,
    chunk: &Oldest,
    now_ms: i64,
) -> rusqlite::Result<()> {
    let mut statement = conn.prepare_cached(
        "SELECT o.group_name, coalesce(o.committed, o.start) FROM group_offsets o
         JOIN group_topics g ON g.group_name = o.group_name AND g.topic = ?4
         WHERE o.topic = ?1 AND o.partition = ?2 AND coalesce(o.committed, o.start) <= ?3",
    )?;
    let losers: Vec<(String, i64)> = statement
        .query_map(params![topic.id, partition, chunk.last, &*topic.name], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    for (group, stood_at) in losers {
        let first = stood_at.max(chunk.base);
        let records = chunk.last - first + 1;
        tracing::warn!(
            group,
            topic = &*topic.name,
            partition,
            first,
            last = chunk.last,
            records,
            "the embedded log is at its size limit of {} bytes and removed records that '{group}' had not read; \
             raise 'size.limit', or let '{group}' run",
            settings.size_limit
        );
        conn.prepare_cached(
            "INSERT INTO losses (at_ms, group_name, topic, partition, first, last, records)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![now_ms, group, &*topic.name, partition, first, chunk.last, records])?;
    }
    Ok(())
}

/// What was lost to whom, and not forgotten since.
pub(super) fn losses(conn: &Connection) -> Result<Vec<Loss>, LogError> {
    let read = || -> rusqlite::Result<Vec<Loss>> {
        conn.prepare_cached(
            "SELECT group_name, topic, sum(records), max(at_ms) FROM losses GROUP BY group_name, topic ORDER BY 1, 2",
        )?
        .query_map([], |row| {
            let records = row.get::<_, i64>(2)?.max(0) as u64;
            Ok(Loss { group: row.get(0)?, topic: row.get(1)?, records, at_ms: row.get(3)? })
        })?
        .collect()
    };
    read().map_err(reading)
}

pub(super) fn forget_losses(conn: &Connection, group: &str) -> rusqlite::Result<()> {
    conn.execute("DELETE FROM losses WHERE group_name = ?1", [group]).map(drop)
}

fn oldest_chunk(conn: &Connection, topic: i64, partition: i32) -> rusqlite::Result<Option<Oldest>> {
    conn.prepare_cached(
        "SELECT base, last, size, max_ts, blob FROM chunks WHERE topic = ?1 AND partition = ?2 ORDER BY base LIMIT 1",
    )?
    .query_row(params![topic, partition], |row| {
        Ok(Oldest { base: row.get(0)?, last: row.get(1)?, size: row.get(2)?, max_ts: row.get(3)?, blob: row.get(4)? })
    })
    .optional()
}

fn partition_bytes(conn: &Connection, topic: i64, partition: i32) -> rusqlite::Result<i64> {
    conn.prepare_cached("SELECT bytes FROM partitions WHERE topic = ?1 AND partition = ?2")?
        .query_row(params![topic, partition], |row| row.get(0))
}

/// First offset that some registered group has still to read.
fn unread_from(conn: &Connection, topic: &Topic, partition: i32) -> rusqlite::Result<i64> {
    conn.prepare_cached(
        "SELECT coalesce(min(coalesce(o.committed, o.start)), 9223372036854775807) FROM group_offsets o
         JOIN group_topics g ON g.group_name = o.group_name AND g.topic = ?3
         WHERE o.topic = ?1 AND o.partition = ?2",
    )?
    .query_row(params![topic.id, partition, &*topic.name], |row| row.get(0))
}

fn remove(conn: &Connection, topic: i64, partition: i32, chunk: &Oldest) -> rusqlite::Result<()> {
    conn.prepare_cached("DELETE FROM chunks WHERE topic = ?1 AND partition = ?2 AND base = ?3")?
        .execute(params![topic, partition, chunk.base])?;
    conn.prepare_cached("DELETE FROM blobs WHERE id = ?1")?.execute([chunk.blob])?;
    conn.prepare_cached("UPDATE partitions SET first = ?3, bytes = bytes - ?4 WHERE topic = ?1 AND partition = ?2")?
        .execute(params![topic, partition, chunk.last + 1, chunk.size])?;
    Ok(())
}

/// Gives pages back to the file system, but keeps some for the records to come.
fn vacuum(conn: &Connection) -> rusqlite::Result<Swept> {
    let free: i64 = conn.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
    let all: i64 = conn.query_row("PRAGMA page_count", [], |row| row.get(0))?;
    if free <= FREE_PAGES_KEPT || free < all / 10 {
        return Ok(Swept::All);
    }
    // Stepped to its end: each step frees one page.
    let mut statement = conn.prepare(&format!("PRAGMA incremental_vacuum({VACUUM_PAGES})"))?;
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    Ok(Swept::Part)
}
