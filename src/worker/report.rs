//! What the worker tells of itself: status for people and scripts, health for whoever restarts or routes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::observe::Observer;
use super::resources::Resources;
use super::roster::Roster;
use crate::log::Loss;
use crate::pipeline::progress::seconds;
use crate::pipeline::{ConnectorState, Status};

/// A connector may take this long to start before health calls it stuck.
const STARTING: f64 = 60.0;
/// The fact that a capture tells of tables it leaves out.
const QUARANTINED: &str = "quarantined";

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatusReport {
    pub version: String,
    /// `embedded` or `kafka`.
    pub log: String,
    pub uptime_seconds: f64,
    pub connectors: Vec<ConnectorReport>,
    /// Files that could not be made true, with the reason.
    pub problems: Vec<Trouble>,
    /// Connectors without a file, which still hold a slot or a group.
    pub orphans: Vec<Orphan>,
    pub systems: Vec<SystemReport>,
    /// Dead letters by connector, where the datastore could be asked.
    pub dead_letters: BTreeMap<String, u64>,
    /// What the log's retention took before a group had read it, until the group is reset or removed.
    pub losses: Vec<LossReport>,
    pub health: Health,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LossReport {
    pub group: String,
    pub topic: String,
    pub records: u64,
    /// When the last of them went.
    pub at: String,
}

impl From<&Loss> for LossReport {
    fn from(loss: &Loss) -> Self {
        let at = DateTime::<Utc>::from_timestamp_millis(loss.at_ms).unwrap_or_default();
        let at = at.to_rfc3339_opts(SecondsFormat::Millis, true);
        LossReport { group: loss.group.clone(), topic: loss.topic.clone(), records: loss.records, at }
    }
}

impl std::fmt::Display for LossReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "group '{}' lost {} records of {}, the last at {}: the log was at its size limit before they were read",
            self.group, self.records, self.topic, self.at
        )
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectorReport {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub file: PathBuf,
    pub state: String,
    /// How long it has been in this state.
    pub state_seconds: f64,
    pub applied: u64,
    pub skipped: u64,
    pub rejected: u64,
    pub waiting: u64,
    pub bytes: u64,
    /// Records a second, over the last ten seconds.
    pub rate: f64,
    pub lag_bytes: Option<u64>,
    pub lag_seconds: Option<f64>,
    pub lag_events: Option<u64>,
    /// Long work under way: rows, rate, time left.
    pub progress: Option<String>,
    /// It has records to read, says that it works, and has moved none for so long.
    pub stuck_seconds: Option<f64>,
    pub last_error: Option<LastError>,
    /// What this kind of connector has to say: slot, cursor, breaker …
    pub facts: BTreeMap<String, Value>,
}

impl ConnectorReport {
    /// Tables that a capture leaves out, a sentence each: it runs, and all is not well.
    pub fn quarantined(&self) -> impl Iterator<Item = String> {
        self.facts.get(QUARANTINED).and_then(Value::as_array).into_iter().flatten().map(|of| {
            let text = |field: &str| of.get(field).and_then(Value::as_str).unwrap_or_default();
            format!(
                "{} is in quarantine since {}, the other tables go on: {}. hint: when it is put right, 'tidegate \
                 connectors restart {}' reads it anew",
                text("table"),
                text("since"),
                text("reason"),
                self.name
            )
        })
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LastError {
    pub at: String,
    pub message: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Trouble {
    pub what: String,
    pub message: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Orphan {
    pub name: String,
    pub since: String,
    pub identity: BTreeMap<String, String>,
    /// WAL that the server keeps for its slot; where that could be asked.
    pub wal_kept_bytes: Option<u64>,
    /// Where the slot is, if not in the datastore's server.
    pub server: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SystemReport {
    pub name: String,
    pub breaker: String,
    pub requests: u64,
}

/// Ready only when capture and every connector can do its work, or was paused by a person.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Health {
    pub ready: bool,
    /// What is stuck, and why.
    pub troubles: Vec<Trouble>,
    /// What works, and wants a person all the same: dead letters, slots that nobody reads.
    pub warnings: Vec<Trouble>,
}

/// `broken`: troubles of the worker itself.
pub(super) fn status(
    roster: &Roster,
    observer: &Observer,
    resources: &Resources,
    broken: Vec<Trouble>,
) -> StatusReport {
    let connectors: Vec<ConnectorReport> = roster
        .entries()
        .map(|(name, entry)| {
            let status = &entry.keeper.status;
            let counts = status.counts();
            let lag = status.lag();
            let seen = observer.seen(name);
            let mut facts = status.facts();
            if let Some(slot) = observer.slot(name)
                && let Some(Value::Object(shown)) = facts.get_mut("slot")
            {
                shown.insert("wal_status".into(), slot.wal_status.into());
                shown.insert("wal_kept_bytes".into(), slot.kept_bytes.into());
                shown.insert("lag_bytes".into(), slot.lag_bytes.into());
            }
            ConnectorReport {
                name: name.to_owned(),
                kind: entry.kind.clone(),
                file: entry.file.clone(),
                state: state_name(status.state()).to_owned(),
                state_seconds: seen.state_seconds,
                applied: counts.applied,
                skipped: counts.skipped,
                rejected: counts.rejected,
                waiting: counts.waiting,
                bytes: counts.bytes,
                rate: seen.rate,
                lag_bytes: lag.bytes,
                lag_seconds: lag.seconds,
                lag_events: lag.events.or(seen.lag_events),
                progress: status.progress().or(seen.progress),
                stuck_seconds: seen.stuck.map(|stuck| stuck.as_secs_f64()),
                last_error: status.last_error().map(|(at, message)| LastError { at: rfc3339(at), message }),
                facts,
            }
        })
        .collect();
    let mut problems: Vec<Trouble> = roster
        .problems()
        .map(|problem| Trouble {
            what: match &problem.connector {
                Some(name) => {
                    format!("{} (connector '{name}' runs on with its last good settings)", problem.file.display())
                }
                None => problem.file.display().to_string(),
            },
            message: problem.message.clone(),
        })
        .collect();
    problems.extend(observer.silent());
    problems.extend(broken);
    let orphans: Vec<Orphan> = roster
        .state()
        .all()
        .filter_map(|(name, known)| {
            let since = known.orphaned_at.clone()?;
            let wal_kept_bytes = observer.slot(name).map(|slot| slot.kept_bytes);
            let (identity, server) = (known.identity.clone(), known.server.clone());
            Some(Orphan { name: name.to_owned(), since, identity, wal_kept_bytes, server })
        })
        .collect();
    let mut report = StatusReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        log: resources.log.kind().to_owned(),
        uptime_seconds: observer.uptime().as_secs_f64(),
        connectors,
        problems,
        orphans,
        systems: observer.systems(),
        dead_letters: observer.dead_letters(),
        losses: observer.losses(),
        health: Health { ready: true, troubles: Vec::new(), warnings: Vec::new() },
    };
    report.health = health(&report);
    report.health.warnings.extend(observer.settings_changed());
    report
}

fn health(report: &StatusReport) -> Health {
    let mut troubles = Vec::new();
    for connector in &report.connectors {
        troubles.extend(stuck(connector).map(|message| Trouble { what: connector.name.clone(), message }));
        troubles.extend(connector.quarantined().map(|message| Trouble { what: connector.name.clone(), message }));
    }
    troubles.extend(report.problems.iter().cloned());
    let mut warnings = Vec::new();
    for (name, count) in &report.dead_letters {
        let letters = if *count == 1 { "1 dead letter" } else { &format!("{count} dead letters") };
        let message = format!("{letters}; hint: 'tidegate dead-letters list {name}' shows them");
        warnings.push(Trouble { what: name.clone(), message });
    }
    for connector in &report.connectors {
        let names = connector.facts.get("not_captured").and_then(Value::as_array);
        let names: Vec<&str> = names.into_iter().flatten().filter_map(Value::as_str).collect();
        if !names.is_empty() {
            let message = format!(
                "{} asked for and not captured: another role's, or the publication is; hint: 'tidegate plan --sql' has what \
                 the owner must run",
                names.join(", ")
            );
            warnings.push(Trouble { what: connector.name.clone(), message });
        }
    }
    for orphan in &report.orphans {
        let hint = format!("hint: put its file back, or run 'tidegate connectors forget {}'", orphan.name);
        let held = match (orphan.identity.get("slot.name"), orphan.wal_kept_bytes) {
            (Some(slot), Some(bytes)) => format!("; its slot '{slot}' makes the server keep {bytes} bytes of WAL"),
            (Some(slot), None) => format!("; its slot '{slot}' makes the server keep WAL"),
            (None, _) => String::new(),
        };
        let message = format!("its file is gone since {}{held}; {hint}", orphan.since);
        warnings.push(Trouble { what: orphan.name.clone(), message });
    }
    for loss in &report.losses {
        let message = format!("{loss}; hint: 'tidegate connectors reset NAME --to beginning' reads what is left");
        warnings.push(Trouble { what: loss.group.clone(), message });
    }
    Health { ready: troubles.is_empty(), troubles, warnings }
}

/// Why the connector does not do its work; `None` when it does, or was told to rest.
fn stuck(connector: &ConnectorReport) -> Option<String> {
    let error = connector.last_error.as_ref().map_or("no reason given", |error| error.message.as_str());
    let time = seconds(connector.state_seconds);
    let slot = |field: &str| connector.facts.get("slot").and_then(|slot| slot.get(field));
    match connector.state.as_str() {
        "FAILED" => return Some(format!("failed: {error}")),
        "WAITING" => return Some(format!("waiting for {time}: {error}")),
        "STARTING" if connector.state_seconds > STARTING => {
            return Some(format!("not started after {time}: {error}"));
        }
        "STOPPED" => return Some("stopped by itself".to_owned()),
        _ => {}
    }
    if slot("missing") == Some(&Value::Bool(true)) {
        return Some(error.to_owned());
    }
    if let Some(status @ ("unreserved" | "lost")) = slot("wal_status").and_then(Value::as_str) {
        let name = slot("name").and_then(Value::as_str).unwrap_or_default();
        return Some(format!(
            "the server is giving up the WAL of slot '{name}' (wal_status '{status}'); hint: raise max_slot_wal_keep_size"
        ));
    }
    let stuck = connector.stuck_seconds?;
    let events = connector.lag_events.unwrap_or_default();
    Some(format!("stuck: {events} records are to be read, and none has moved for {}", seconds(stuck)))
}

/// Connector and table of every table in quarantine.
pub(super) fn in_quarantine(connector: &str, status: &Status) -> Vec<(String, String)> {
    let facts = status.facts();
    let all = facts.get(QUARANTINED).and_then(Value::as_array).into_iter().flatten();
    all.filter_map(|of| Some((connector.to_owned(), of.get("table")?.as_str()?.to_owned()))).collect()
}

pub(super) fn state_name(state: ConnectorState) -> &'static str {
    match state {
        ConnectorState::Starting => "STARTING",
        ConnectorState::Snapshot => "SNAPSHOT",
        ConnectorState::Running => "RUNNING",
        ConnectorState::Paused => "PAUSED",
        ConnectorState::Waiting => "WAITING",
        ConnectorState::Failed => "FAILED",
        ConnectorState::Stopped => "STOPPED",
    }
}

fn rfc3339(time: SystemTime) -> String {
    DateTime::<Utc>::from(time).to_rfc3339_opts(SecondsFormat::Millis, true)
}
