//! The replication slot: what the server keeps for us, and whether it still fits what the log has.

use std::time::Duration;

use crate::event::{CapturePosition, Lsn};

use super::replication::SystemIdentity;
use super::{PostgresError, Session, literal};

const DEADLINE: Duration = Duration::from_secs(20);

/// A row of `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    pub plugin: String,
    pub database: String,
    /// Process that uses it.
    pub active_pid: Option<u32>,
    pub restart_lsn: Option<Lsn>,
    pub confirmed_flush: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved`, `lost`.
    pub wal_status: String,
    /// Bytes of WAL that may still be written before the slot is at risk; `None` without a limit.
    pub safe_wal_size: Option<i64>,
    /// WAL the server keeps for the slot.
    pub kept_bytes: u64,
    /// WAL written since what was confirmed.
    pub lag_bytes: u64,
}

pub async fn find(session: &mut Session, name: &str) -> Result<Option<Slot>, PostgresError> {
    let rows = session
        .query(
            &format!(
                "SELECT plugin, database, active_pid, restart_lsn, confirmed_flush_lsn, wal_status, safe_wal_size, \
                 coalesce(greatest(pg_wal_lsn_diff(now.lsn, restart_lsn), 0), 0)::bigint, \
                 coalesce(greatest(pg_wal_lsn_diff(now.lsn, confirmed_flush_lsn), 0), 0)::bigint \
                 FROM pg_replication_slots, LATERAL (SELECT CASE WHEN pg_is_in_recovery() THEN \
                 pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn) now WHERE slot_name = {}",
                literal(name)
            ),
            DEADLINE,
        )
        .await?;
    let Some(row) = rows.into_iter().next() else { return Ok(None) };
    let text = |at: usize| row.get(at).cloned().flatten();
    Ok(Some(Slot {
        plugin: text(0).unwrap_or_default(),
        database: text(1).unwrap_or_default(),
        active_pid: text(2).and_then(|pid| pid.parse().ok()),
        restart_lsn: text(3).and_then(|lsn| lsn.parse().ok()),
        confirmed_flush: text(4).and_then(|lsn| lsn.parse().ok()),
        wal_status: text(5).unwrap_or_default(),
        safe_wal_size: text(6).and_then(|bytes| bytes.parse().ok()),
        kept_bytes: text(7).and_then(|bytes| bytes.parse().ok()).unwrap_or_default(),
        lag_bytes: text(8).and_then(|bytes| bytes.parse().ok()).unwrap_or_default(),
    }))
}

/// Takes the slot for this connection, for as long as it lasts: by an advisory lock, since the server itself
/// keeps others away only while the slot is streamed from, not while it is made and its snapshot is read.
/// `Some`: another connection has it; who that is.
pub async fn hold(session: &mut Session, name: &str) -> Result<Option<String>, PostgresError> {
    let key = format!("hashtextextended({}, 0)", literal(&format!("tidegate slot {name}")));
    let held = session.query(&format!("SELECT pg_try_advisory_lock({key})::text"), DEADLINE).await?;
    if held.first().and_then(|row| row.first()?.as_deref()) == Some("true") {
        return Ok(None);
    }
    // A key of 64 bits is shown in two halves.
    let sql = format!(
        "SELECT {WHO} FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory' AND l.granted \
         AND l.objsubid = 1 AND (l.classid::bigint << 32 | l.objid::bigint) = {key}"
    );
    Ok(Some(who(session, &sql).await?))
}

/// Lets go of what [`hold`] took.
pub async fn release(session: &mut Session, name: &str) -> Result<(), PostgresError> {
    let key = format!("hashtextextended({}, 0)", literal(&format!("tidegate slot {name}")));
    session.query(&format!("SELECT pg_advisory_unlock({key})"), DEADLINE).await.map(drop)
}

/// Who streams from the slot.
pub async fn user(session: &mut Session, name: &str) -> Result<String, PostgresError> {
    let sql = format!(
        "SELECT {WHO} FROM pg_replication_slots s JOIN pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = {}",
        literal(name)
    );
    who(session, &sql).await
}

const WHO: &str = "format('process %s, \"%s\" from %s, since %s', a.pid, a.application_name, \
                   coalesce(host(a.client_addr), 'the same machine'), date_trunc('second', a.backend_start))";

async fn who(session: &mut Session, sql: &str) -> Result<String, PostgresError> {
    let rows = session.query(sql, DEADLINE).await?;
    let found = rows.into_iter().next().and_then(|row| row.into_iter().next().flatten());
    Ok(found.unwrap_or_else(|| "a session that has just ended".to_owned()))
}

/// Drops the slot where it is there, waiting shortly for a walsender of ours that has not ended yet.
pub async fn drop_slot(session: &mut Session, name: &str) -> Result<(), PostgresError> {
    let name = literal(name);
    let sql = format!("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = {name}");
    for attempt in 1.. {
        match session.query(&sql, DEADLINE).await {
            Err(error) if error.code() == Some("55006") && attempt < 20 => {
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
            other => return other.map(drop),
        }
    }
    Ok(())
}

/// Why changes are or may be missing between the log and what the server can still give.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    #[error("replication slot '{slot}' is gone; the log ends at {stored}, what was committed since may be missing")]
    Missing { slot: String, stored: Lsn },
    #[error(
        "replication slot '{slot}' has lost WAL that was still needed (wal_status 'lost', max_slot_wal_keep_size); \
         the log ends at {stored}"
    )]
    Invalidated { slot: String, stored: Lsn },
    #[error(
        "replication slot '{slot}' stands at {confirmed}, ahead of the log at {stored}: what was committed in between \
         is not in the log. Somebody else read the slot, made it anew, or the log was set back"
    )]
    Ahead { slot: String, confirmed: Lsn, stored: Lsn },
    #[error(
        "the server's WAL ends at {end}, before what the log has from it ({stored}): the server was set back (an older \
         snapshot of its volume or a backup was restored). The log has changes that the server has not, and what is \
         committed up to {stored} from now on would be passed over"
    )]
    Behind { end: Lsn, stored: Lsn },
    #[error(
        "this is another PostgreSQL cluster (system identifier {found}, the log was written from {stored}): it was \
         restored, upgraded, or the address changed"
    )]
    OtherCluster { found: String, stored: String },
}

/// Compares the slot with what is stored (CORRECTNESS 4). The server itself would go on silently from wherever the
/// slot stands.
pub fn check(
    slot_name: &str,
    slot: Option<&Slot>,
    system: &SystemIdentity,
    stored: &CapturePosition,
) -> Result<(), Loss> {
    if system.system_identifier != stored.system_identifier {
        return Err(Loss::OtherCluster {
            found: system.system_identifier.clone(),
            stored: stored.system_identifier.clone(),
        });
    }
    // Before the slot: one that is gone or old is a consequence.
    reaches(system, stored.commit_end)?;
    let slot_name = slot_name.to_owned();
    let Some(slot) = slot else { return Err(Loss::Missing { slot: slot_name, stored: stored.commit_end }) };
    if slot.wal_status == "lost" || slot.restart_lsn.is_none() {
        return Err(Loss::Invalidated { slot: slot_name, stored: stored.commit_end });
    }
    match slot.confirmed_flush {
        Some(confirmed) if confirmed > stored.commit_end => {
            Err(Loss::Ahead { slot: slot_name, confirmed, stored: stored.commit_end })
        }
        _ => Ok(()),
    }
}

/// Whether the server's WAL reaches as far as what was read from it.
pub fn reaches(system: &SystemIdentity, read: Lsn) -> Result<(), Loss> {
    if system.wal_end < read { Err(Loss::Behind { end: system.wal_end, stored: read }) } else { Ok(()) }
}
