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
use crate::pipeline::ConnectorState;

/// A connector may take this long to start before health calls it stuck.
const STARTING: f64 = 60.0;

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
    pub last_error: Option<LastError>,
    /// What this kind of connector has to say: slot, cursor, breaker …
    pub facts: BTreeMap<String, Value>,
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
    pub troubles: Vec<Trouble>,
}

pub(super) fn status(roster: &Roster, observer: &Observer, resources: &Resources) -> StatusReport {
    let connectors = roster
        .entries()
        .map(|(name, entry)| {
            let status = &entry.keeper.status;
            let counts = status.counts();
            let lag = status.lag();
            let seen = observer.seen(name);
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
                progress: status.progress(),
                last_error: status.last_error().map(|(at, message)| LastError { at: rfc3339(at), message }),
                facts: status.facts(),
            }
        })
        .collect();
    let problems = roster
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
    let orphans = roster
        .state()
        .all()
        .filter_map(|(name, known)| {
            let since = known.orphaned_at.clone()?;
            Some(Orphan { name: name.to_owned(), since, identity: known.identity.clone() })
        })
        .collect();
    StatusReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        log: resources.log.kind().to_owned(),
        uptime_seconds: observer.uptime().as_secs_f64(),
        connectors,
        problems,
        orphans,
        systems: observer.systems(),
        dead_letters: observer.dead_letters(),
        losses: observer.losses(),
    }
}

impl StatusReport {
    pub fn health(&self) -> Health {
        let mut troubles = Vec::new();
        for connector in &self.connectors {
            let error = connector.last_error.as_ref().map_or("no reason given", |error| error.message.as_str());
            let stuck = match connector.state.as_str() {
                "FAILED" => Some(format!("failed: {error}")),
                "WAITING" => Some(format!("waiting for {:.0} s: {error}", connector.state_seconds)),
                "STARTING" if connector.state_seconds > STARTING => {
                    Some(format!("not started after {:.0} s: {error}", connector.state_seconds))
                }
                "STOPPED" => Some("stopped by itself".to_owned()),
                _ => None,
            };
            troubles.extend(stuck.map(|message| Trouble { what: connector.name.clone(), message }));
        }
        troubles.extend(self.problems.iter().cloned());
        Health { ready: troubles.is_empty(), troubles }
    }
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
