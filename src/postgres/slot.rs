//! The replication slot: what the server keeps for us, and whether it still fits what the log has.

use std::time::Duration;

use crate::event::{CapturePosition, Lsn};

use super::replication::SystemIdentity;
use super::{PostgresError, Session, literal};

const DEADLINE: Duration = Duration::from_secs(20);

/// A row of `pg_replication_slots`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
        "the server is on timeline {timeline}, which left timeline {read_on} at {left_at}; the log has changes from that \
         one up to {stored}: a standby was promoted, or a backup restored, without the last of them. The log has \
         changes that the server has not, and changes of the new timeline in their place would be passed over"
    )]
    Diverged { timeline: u32, read_on: u32, left_at: Lsn, stored: Lsn },
    #[error(
        "the server is on timeline {timeline}, which does not come from timeline {read_on} that the log was written \
         from: it was promoted or restored from a point before that one began"
    )]
    OtherHistory { timeline: u32, read_on: u32 },
    #[error(
        "this is another PostgreSQL cluster (system identifier {found}, the log was written from {stored}): it was \
         restored, upgraded, or the address changed"
    )]
    OtherCluster { found: String, stored: String },
}

/// What the server is, as far as it matters for going on.
#[derive(Clone, Debug)]
pub struct Server {
    pub system: SystemIdentity,
    /// The timelines that its own came from, each with where it was left; empty on the timeline of the position.
    pub history: Vec<(u32, Lsn)>,
    pub slot: Option<Slot>,
}

/// Looks at the server with what is stored in mind. `session` speaks replication.
pub async fn look(
    session: &mut Session,
    slot: &str,
    stored: Option<&CapturePosition>,
) -> Result<Server, PostgresError> {
    let system = super::replication::identify_system(session).await?;
    let elsewhere = stored.is_some_and(|stored| {
        stored.timeline != system.timeline && stored.system_identifier == system.system_identifier
    });
    let history = match elsewhere && system.timeline > 1 {
        true => super::replication::timeline_history(session, system.timeline).await?,
        false => Vec::new(),
    };
    Ok(Server { system, history, slot: find(session, slot).await? })
}

/// Compares the server and its slot with what is stored (CORRECTNESS 2, 4). The server itself would go on silently from
/// wherever the slot stands. `read`: up to where its WAL was read, which may be further than what is stored.
pub fn check(slot_name: &str, server: &Server, stored: &CapturePosition, read: Lsn) -> Result<(), Loss> {
    let system = &server.system;
    if system.system_identifier != stored.system_identifier {
        return Err(Loss::OtherCluster {
            found: system.system_identifier.clone(),
            stored: stored.system_identifier.clone(),
        });
    }
    let read = read.max(stored.commit_end);
    // Before the slot: one that is gone or old is a consequence.
    if system.timeline != stored.timeline {
        let (timeline, read_on) = (system.timeline, stored.timeline);
        let left_at = server.history.iter().find(|(of, _)| *of == read_on).map(|(_, left_at)| *left_at);
        let left_at = left_at.ok_or(Loss::OtherHistory { timeline, read_on })?;
        if read > left_at {
            return Err(Loss::Diverged { timeline, read_on, left_at, stored: read });
        }
    }
    if system.wal_end < read {
        return Err(Loss::Behind { end: system.wal_end, stored: read });
    }
    let slot_name = slot_name.to_owned();
    let Some(slot) = &server.slot else { return Err(Loss::Missing { slot: slot_name, stored: stored.commit_end }) };
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

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(timeline: u32, end: u64) -> CapturePosition {
        CapturePosition {
            epoch: 1,
            system_identifier: "1".into(),
            timeline,
            slot: "s".into(),
            commit_end: Lsn(end),
            last_commit: Lsn(end),
            ordinal: 0,
            ordinal_xid: 0,
            fingerprint: 0,
            snapshot: None,
            read_at: Default::default(),
            quarantined: Default::default(),
        }
    }

    #[test]
    fn a_position_beyond_where_its_timeline_was_left_is_a_loss() {
        let slot = Slot {
            plugin: "pgoutput".into(),
            database: "d".into(),
            active_pid: None,
            restart_lsn: Some(Lsn(1)),
            confirmed_flush: Some(Lsn(90)),
            wal_status: "reserved".into(),
            safe_wal_size: None,
            kept_bytes: 0,
            lag_bytes: 0,
        };
        let system = SystemIdentity { system_identifier: "1".into(), timeline: 3, wal_end: Lsn(1000) };
        let server = Server { system, history: vec![(1, Lsn(100)), (2, Lsn(200))], slot: Some(slot) };
        let loss = |timeline, end| check("s", &server, &stored(timeline, end), Lsn(end)).err();
        assert_eq!((loss(1, 100), loss(2, 200), loss(3, 900)), (None, None, None));
        assert!(matches!(loss(1, 101), Some(Loss::Diverged { left_at: Lsn(100), .. })));
        assert!(matches!(loss(2, 201), Some(Loss::Diverged { left_at: Lsn(200), .. })));
        assert!(matches!(loss(4, 100), Some(Loss::OtherHistory { .. })));
        assert!(matches!(check("s", &server, &stored(1, 95), Lsn(101)), Err(Loss::Diverged { .. })), "what was read");
        assert!(matches!(loss(3, 1001), Some(Loss::Behind { .. })));
        assert!(matches!(loss(3, 80), Some(Loss::Ahead { .. })));
    }
}
