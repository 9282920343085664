//! Looks at the connectors every second, so that rates, times and lags are known when somebody asks, and puts
//! them into the metrics. What needs the log or the datastore is asked for beside the look ([`Question`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::gauge;

use super::kinds::{self, Identity};
use super::questions::Question;
use super::report::{LossReport, SystemReport, Trouble, in_quarantine, state_name};
use super::resources::Resources;
use super::settings::WorkerSettings;
use crate::event::TopicPartition;
use crate::log::{LogError, PartitionLag};
use crate::pipeline::progress::{progress, seconds};
use crate::pipeline::{ConnectorState, Fault, Status};
use crate::postgres::slot::Slot;
use crate::sources::postgres::measure_slot;
use crate::systems::{BreakerState, System};

/// Rates are taken over this many seconds.
const WINDOW: usize = 10;
const LAGS: Duration = Duration::from_secs(5);
const PARKED: Duration = Duration::from_secs(5);
/// Slots that no capture watches itself: of connectors that are gone, or have failed.
const SLOTS: Duration = Duration::from_secs(30);
/// Whether the worker's file is still as it was read.
const SETTINGS: Duration = Duration::from_secs(3);
/// How often long work tells how far it is.
const PROGRESS: Duration = Duration::from_secs(5);
/// So many records behind, a sink tells how far it is, until it has (nearly) caught up.
const BEHIND: u64 = 1000;
const CAUGHT_UP: u64 = 50;
/// A sink that has records to read and moves none for this long is stuck, whatever its state says.
const STUCK: Duration = Duration::from_secs(60);

const STATES: [ConnectorState; 7] = [
    ConnectorState::Starting,
    ConnectorState::Snapshot,
    ConnectorState::Running,
    ConnectorState::Paused,
    ConnectorState::Waiting,
    ConnectorState::Failed,
    ConnectorState::Stopped,
];
const BREAKER: [(BreakerState, &str); 3] =
    [(BreakerState::Closed, "closed"), (BreakerState::HalfOpen, "half-open"), (BreakerState::Open, "open")];

/// A connector to be looked at.
pub struct Watched {
    pub name: String,
    pub status: Arc<Status>,
    pub groups: Vec<String>,
    /// Its records may be parked.
    pub parks: bool,
}

/// Connector, group, and how far each partition is behind.
type GroupLag = (String, String, Vec<PartitionLag>);

/// A slot that nobody reads.
pub struct LeftSlot {
    pub connector: String,
    pub kind: String,
    pub identity: Identity,
}

pub struct Observer {
    started: Instant,
    lags: Question,
    parked: Question,
    slots: Question,
    settings: Question,
    inside: Arc<Mutex<Inside>>,
}

#[derive(Default)]
struct Inside {
    connectors: BTreeMap<String, Track>,
    systems: Vec<SystemReport>,
    dead_letters: BTreeMap<String, u64>,
    /// Connectors whose parked records the metrics show.
    counted: BTreeSet<String>,
    losses: Vec<LossReport>,
    /// Connector, group and partition whose lag the metrics show.
    measured: BTreeSet<(String, String, TopicPartition)>,
    /// Connector and table that the metrics show in quarantine.
    quarantined: BTreeSet<(String, String)>,
    /// By connector, with the slot's name.
    slots: BTreeMap<String, (String, Slot)>,
    progress_told: Option<Instant>,
    settings_changed: Option<Trouble>,
}

struct Track {
    state: ConnectorState,
    since: Instant,
    /// When, and the sum of its counts then.
    samples: VecDeque<(Instant, u64)>,
    /// When its counts last changed, or there was nothing to do.
    moved: Instant,
    lag_events: Option<u64>,
    /// The sum of the offsets where its groups go on.
    read_to: Option<i64>,
    /// Records done when it was found to be far behind.
    catching_up_from: Option<u64>,
    progress: Option<String>,
}

/// What only looking over time tells.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub state_seconds: f64,
    pub rate: f64,
    pub lag_events: Option<u64>,
    pub progress: Option<String>,
    /// It has something to do, says that it works, and has moved nothing for so long.
    pub stuck: Option<Duration>,
}

impl Default for Observer {
    fn default() -> Self {
        Observer {
            started: Instant::now(),
            lags: Question::new(LAGS),
            parked: Question::new(PARKED),
            slots: Question::new(SLOTS),
            settings: Question::new(SETTINGS),
            inside: Arc::default(),
        }
    }
}

impl Track {
    fn new(state: ConnectorState, now: Instant) -> Self {
        Track {
            state,
            since: now,
            samples: VecDeque::with_capacity(WINDOW + 1),
            moved: now,
            lag_events: None,
            read_to: None,
            catching_up_from: None,
            progress: None,
        }
    }

    /// How many records its groups have still to read, and the sum of the offsets where they go on: what moves that may
    /// be a member in another worker, while this one has no partition.
    fn told_of_lag(&mut self, behind: u64, read_to: i64, now: Instant) {
        self.lag_events = Some(behind);
        if self.read_to.replace(read_to) != Some(read_to) {
            self.moved = now;
        }
    }

    fn rate(&self) -> f64 {
        match (self.samples.front(), self.samples.back()) {
            (Some((first, before)), Some((last, now))) if last > first => {
                now.saturating_sub(*before) as f64 / (*last - *first).as_secs_f64()
            }
            _ => 0.0,
        }
    }

    fn look(&mut self, name: &str, status: &Status, now: Instant) {
        let state = status.state();
        if self.state != state {
            tracing::debug!(connector = name, from = state_name(self.state), to = state_name(state), "state");
            (self.state, self.since) = (state, now);
        }
        let counts = status.counts();
        let total = counts.applied + counts.skipped + counts.rejected + counts.waiting;
        let idle = self.lag_events.unwrap_or(0) == 0 || state != ConnectorState::Running;
        if idle || self.samples.back().is_none_or(|(_, before)| *before != total) {
            self.moved = now;
        }
        if let Some(moved) = status.moved() {
            self.moved = self.moved.max(moved);
        }
        self.samples.push_back((now, total));
        if self.samples.len() > WINDOW {
            self.samples.pop_front();
        }
        self.progress = status.progress().or_else(|| self.catching_up(total));
    }

    /// A sink that is far behind: after a reset, or an outage.
    fn catching_up(&mut self, total: u64) -> Option<String> {
        let behind = self.lag_events?;
        let from = match self.catching_up_from {
            None if behind >= BEHIND => *self.catching_up_from.insert(total),
            Some(from) if behind > CAUGHT_UP => from,
            _ => {
                self.catching_up_from = None;
                return None;
            }
        };
        let done = total.saturating_sub(from);
        Some(progress("catching up", done, done + behind, "records", self.rate()))
    }
}

impl Observer {
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn seen(&self, name: &str) -> Seen {
        let inside = self.lock();
        let Some(track) = inside.connectors.get(name) else { return Seen::default() };
        Seen {
            state_seconds: track.since.elapsed().as_secs_f64(),
            rate: track.rate(),
            lag_events: track.lag_events,
            progress: track.progress.clone(),
            stuck: Some(track.moved.elapsed()).filter(|time| *time > STUCK),
        }
    }

    pub fn systems(&self) -> Vec<SystemReport> {
        self.lock().systems.clone()
    }

    pub fn dead_letters(&self) -> BTreeMap<String, u64> {
        self.lock().dead_letters.clone()
    }

    pub fn losses(&self) -> Vec<LossReport> {
        self.lock().losses.clone()
    }

    /// What is known of the slot that a connector has left, or does not read.
    pub fn slot(&self, connector: &str) -> Option<Slot> {
        self.lock().slots.get(connector).map(|(_, slot)| slot.clone())
    }

    /// Servers that do not answer.
    pub fn silent(&self) -> Vec<Trouble> {
        let trouble = |what: &str, (silent, reason): (Duration, String)| Trouble {
            what: what.to_owned(),
            message: format!("no answer for {}: {reason}", seconds(silent.as_secs_f64())),
        };
        [("log", &self.lags), ("datastore", &self.parked)]
            .into_iter()
            .filter_map(|(what, question)| Some(trouble(what, question.silent()?)))
            .collect()
    }

    /// The worker's file is another than it runs with.
    pub fn settings_changed(&self) -> Option<Trouble> {
        self.lock().settings_changed.clone()
    }

    pub fn look(&self, connectors: &[Watched], left: Vec<LeftSlot>, resources: &Resources, settings: &WorkerSettings) {
        let now = Instant::now();
        let mut inside = self.lock();
        let is_gone = |known: &String| !connectors.iter().any(|watched| watched.name == *known);
        let gone: Vec<String> = inside.connectors.keys().filter(|known| is_gone(known)).cloned().collect();
        for name in gone {
            inside.connectors.remove(&name);
            forget_gauges(&name);
        }
        for Watched { name, status, .. } in connectors {
            let track = inside.connectors.entry(name.clone()).or_insert_with(|| Track::new(status.state(), now));
            track.look(name, status, now);
            for known in STATES {
                gauge!("tidegate_connector_state", "connector" => name.clone(), "state" => state_name(known))
                    .set(f64::from(u8::from(known == track.state)));
            }
            let lag = status.lag();
            match (lag.bytes, lag.seconds) {
                (Some(bytes), Some(seconds)) => {
                    gauge!("tidegate_replication_lag_bytes", "connector" => name.clone()).set(bytes as f64);
                    gauge!("tidegate_replication_lag_seconds", "connector" => name.clone()).set(seconds);
                }
                (None, Some(seconds)) => {
                    gauge!("tidegate_delivery_lag_seconds", "connector" => name.clone()).set(seconds);
                }
                (_, None) => {}
            }
        }
        if inside.progress_told.is_none_or(|told| now - told >= PROGRESS) {
            inside.progress_told = Some(now);
            for (name, track) in &inside.connectors {
                if let Some(progress) = &track.progress {
                    tracing::info!(connector = name, "{progress}");
                }
            }
        }
        let all = connectors.iter().flat_map(|watched| in_quarantine(&watched.name, &watched.status)).collect();
        let before = std::mem::replace(&mut inside.quarantined, all);
        for (connector, table) in before.union(&inside.quarantined) {
            let is_there = inside.quarantined.contains(&(connector.clone(), table.clone()));
            gauge!("tidegate_capture_quarantined", "connector" => connector.clone(), "table" => table.clone())
                .set(f64::from(u8::from(is_there)));
        }
        inside.systems = settings.systems.iter().map(|(name, system)| look_at_system(name, system)).collect();
        drop(inside);
        self.ask_lags(connectors, resources);
        self.ask_parked(connectors, resources);
        self.ask_slots(left, resources);
        self.ask_settings(settings);
    }

    fn ask_settings(&self, settings: &WorkerSettings) {
        let (settings, shared) = (settings.clone(), self.inside.clone());
        let what = settings.file.display().to_string();
        let ask = || async move { tokio::task::spawn_blocking(move || settings.has_changed()).await };
        self.settings.ask(ask, move |changed| {
            let mut inside = shared.lock().unwrap_or_else(PoisonError::into_inner);
            if !changed {
                inside.settings_changed = None;
            } else if inside.settings_changed.is_none() {
                let message = "has changed since the worker read it; hint: it is read at the start, \
                     so restart the worker to take it up ('tidegate validate' checks it before)";
                tracing::warn!("{what} {message}");
                inside.settings_changed = Some(Trouble { what, message: message.to_owned() });
            }
        });
    }

    fn ask_lags(&self, connectors: &[Watched], resources: &Resources) {
        let groups: Vec<(String, String)> = connectors
            .iter()
            .flat_map(|watched| watched.groups.iter().map(|group| (watched.name.clone(), group.clone())))
            .collect();
        let (log, shared) = (resources.log.clone(), self.inside.clone());
        let ask = || async move {
            let mut all = Vec::new();
            for (name, group) in groups {
                match log.group_lag(&group).await {
                    Ok(lags) => all.push((name, group, lags)),
                    // Its table has had no event yet.
                    Err(LogError::UnknownTopic(_)) => {}
                    Err(error) => return Err(error),
                }
            }
            // Of all groups: the one of a connector without a file is the likeliest to lose records.
            let losses: Vec<LossReport> = log.losses().await?.iter().map(LossReport::from).collect();
            Ok((all, losses))
        };
        self.lags.ask(ask, move |(all, losses): (Vec<GroupLag>, Vec<LossReport>)| {
            let mut behind_of: BTreeMap<String, (u64, i64)> = BTreeMap::new();
            let mut measured = BTreeSet::new();
            for (name, group, lags) in all {
                let sum = behind_of.entry(name.clone()).or_default();
                for lag in lags {
                    let behind = lag.behind();
                    sum.0 += behind;
                    sum.1 = sum.1.wrapping_add(lag.from.0);
                    let place = (name.clone(), group.clone(), lag.topic_partition);
                    consumer_lag(&place).set(behind as f64);
                    measured.insert(place);
                }
            }
            let mut inside = shared.lock().unwrap_or_else(PoisonError::into_inner);
            // Of a connector that is gone, or a topic that it no longer reads.
            inside.measured.difference(&measured).for_each(|gone| consumer_lag(gone).set(0.0));
            inside.measured = measured;
            let lost = |of: &LossReport| gauge!("tidegate_log_lost_records", "group" => of.group.clone(), "topic" => of.topic.clone());
            inside.losses.iter().for_each(|gone| lost(gone).set(0.0));
            losses.iter().for_each(|loss| lost(loss).set(loss.records as f64));
            inside.losses = losses;
            for (name, (behind, read_to)) in behind_of {
                if let Some(track) = inside.connectors.get_mut(&name) {
                    track.told_of_lag(behind, read_to, Instant::now());
                }
            }
        });
    }

    fn ask_parked(&self, connectors: &[Watched], resources: &Resources) {
        let mut names: BTreeSet<String> =
            connectors.iter().filter(|watched| watched.parks).map(|watched| watched.name.clone()).collect();
        let (resources, shared) = (resources.clone(), self.inside.clone());
        let ask = || async move { resources.parked().await };
        self.parked.ask(ask, move |counted: BTreeMap<String, [u64; 2]>| {
            names.extend(counted.keys().cloned());
            let mut inside = shared.lock().unwrap_or_else(PoisonError::into_inner);
            // And of those that had some: a connector that is gone has none.
            let before = std::mem::replace(&mut inside.counted, names.clone());
            for name in names.into_iter().chain(before) {
                let [rejected, waiting] = counted.get(&name).copied().unwrap_or_default();
                gauge!("tidegate_dead_letters", "connector" => name.clone()).set(rejected as f64);
                gauge!("tidegate_waiting_records", "connector" => name).set(waiting as f64);
            }
            let dead = counted.into_iter().filter(|(_, [rejected, _])| *rejected > 0);
            inside.dead_letters = dead.map(|(name, [rejected, _])| (name, rejected)).collect();
        });
    }

    fn ask_slots(&self, left: Vec<LeftSlot>, resources: &Resources) {
        if left.is_empty() && self.lock().slots.is_empty() {
            return;
        }
        let (resources, shared) = (resources.clone(), self.inside.clone());
        let ask = || async move {
            let mut found = BTreeMap::new();
            for LeftSlot { connector, kind, identity } in left {
                let context = resources.still(&connector);
                match kinds::left_slot(&kind, &identity, &context).await {
                    Ok(Some(slot)) => drop(found.insert(connector, slot)),
                    Ok(None) => {}
                    // Its database is gone, say: the others' slots are measured all the same.
                    Err(fault) => tracing::debug!(connector, "its slot can't be looked at: {fault}"),
                }
            }
            Ok::<_, Fault>(found)
        };
        self.slots.ask(ask, move |found: BTreeMap<String, (String, Slot)>| {
            for (connector, (name, slot)) in &found {
                measure_slot(connector, name, slot);
            }
            let mut inside = shared.lock().unwrap_or_else(PoisonError::into_inner);
            let before = std::mem::replace(&mut inside.slots, found);
            for (connector, (name, _)) in before {
                if !inside.slots.contains_key(&connector) && !inside.connectors.contains_key(&connector) {
                    measure_slot(&connector, &name, &Slot::default());
                }
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn consumer_lag((connector, group, place): &(String, String, TopicPartition)) -> metrics::Gauge {
    gauge!(
        "tidegate_consumer_lag_records",
        "connector" => connector.clone(),
        "group" => group.clone(),
        "topic" => place.topic.to_string(),
        "partition" => place.partition.to_string()
    )
}

/// A connector that is gone is in no state and behind nothing.
fn forget_gauges(name: &str) {
    for state in STATES {
        gauge!("tidegate_connector_state", "connector" => name.to_owned(), "state" => state_name(state)).set(0.0);
    }
    let lags = ["tidegate_replication_lag_bytes", "tidegate_replication_lag_seconds", "tidegate_delivery_lag_seconds"];
    for of_one in lags.into_iter().chain(["tidegate_queue_bytes"]) {
        gauge!(of_one, "connector" => name.to_owned()).set(0.0);
    }
}

fn look_at_system(name: &str, system: &System) -> SystemReport {
    let state = system.breaker();
    let mut breaker = "";
    for (known, text) in BREAKER {
        if known == state {
            breaker = text;
        }
        gauge!("tidegate_system_breaker_state", "system" => name.to_owned(), "state" => text)
            .set(f64::from(u8::from(known == state)));
    }
    SystemReport { name: name.to_owned(), breaker: breaker.to_owned(), requests: system.requests_sent() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_is_not_stuck_while_another_member_of_its_group_moves() {
        let status = Status::default();
        status.set_state(ConnectorState::Running);
        let began = Instant::now();
        let at = |seconds: u64| began + Duration::from_secs(seconds);
        let mut track = Track::new(ConnectorState::Running, began);
        track.told_of_lag(100, 0, at(0));
        for second in 0..120 {
            track.look("sink", &status, at(second));
            if second % 5 == 0 {
                track.told_of_lag(100, i64::try_from(second).unwrap(), at(second));
            }
        }
        assert!(at(120) - track.moved <= Duration::from_secs(5), "its group moved");
        for second in 120..200 {
            track.told_of_lag(150, 115, at(second));
            track.look("sink", &status, at(second));
        }
        assert!(at(200) - track.moved > STUCK, "nobody moved, and more came");
    }
}
