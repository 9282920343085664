//! Looks at the connectors every second, so that rates, times and lags are known when somebody asks, and puts
//! them into the metrics.
//!
//! What needs the log or the datastore is asked for beside the look, one question at a time: a log that does not
//! answer makes figures old, never the worker slow.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::{counter, gauge};

use super::report::{LossReport, SystemReport, state_name};
use super::resources::Resources;
use crate::pipeline::{ConnectorState, Status};
use crate::systems::{BreakerState, System};

/// Rates are taken over this many seconds.
const WINDOW: usize = 10;
const LAGS: Duration = Duration::from_secs(5);
const DEAD_LETTERS: Duration = Duration::from_secs(15);
/// How often long work tells how far it is.
const PROGRESS: Duration = Duration::from_secs(5);
const QUESTION: Duration = Duration::from_secs(10);

const STATES: [ConnectorState; 7] = [
    ConnectorState::Starting,
    ConnectorState::Snapshot,
    ConnectorState::Running,
    ConnectorState::Paused,
    ConnectorState::Waiting,
    ConnectorState::Failed,
    ConnectorState::Stopped,
];

pub struct Observer {
    started: Instant,
    inside: Arc<Mutex<Inside>>,
}

#[derive(Default)]
struct Inside {
    connectors: BTreeMap<String, Track>,
    systems: Vec<SystemReport>,
    dead_letters: BTreeMap<String, u64>,
    losses: Vec<LossReport>,
    lags_asked: Option<Instant>,
    dead_letters_asked: Option<Instant>,
    progress_told: Option<Instant>,
    asking_lags: bool,
    asking_dead_letters: bool,
}

struct Track {
    state: ConnectorState,
    since: Instant,
    samples: VecDeque<(Instant, u64)>,
    lag_events: Option<u64>,
}

/// What only looking over time tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub state_seconds: f64,
    pub rate: f64,
    pub lag_events: Option<u64>,
}

impl Default for Observer {
    fn default() -> Self {
        Observer { started: Instant::now(), inside: Arc::default() }
    }
}

impl Observer {
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn seen(&self, name: &str) -> Seen {
        let inside = self.lock();
        let Some(track) = inside.connectors.get(name) else { return Seen::default() };
        let rate = match (track.samples.front(), track.samples.back()) {
            (Some((first, before)), Some((last, now))) if last > first => {
                now.saturating_sub(*before) as f64 / (*last - *first).as_secs_f64()
            }
            _ => 0.0,
        };
        Seen { state_seconds: track.since.elapsed().as_secs_f64(), rate, lag_events: track.lag_events }
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

    /// Connectors as (name, status, consumer groups).
    pub async fn look(
        &self,
        connectors: &[(String, Arc<Status>, Vec<String>)],
        resources: &Resources,
        systems: &BTreeMap<String, Arc<System>>,
    ) {
        let now = Instant::now();
        let mut inside = self.lock();
        let gone: Vec<String> = inside
            .connectors
            .keys()
            .filter(|known| !connectors.iter().any(|(name, ..)| name == *known))
            .cloned()
            .collect();
        for name in gone {
            inside.connectors.remove(&name);
            for state in STATES {
                gauge!("tidegate_connector_state", "connector" => name.clone(), "state" => state_name(state)).set(0.0);
            }
        }
        for (name, status, _) in connectors {
            let state = status.state();
            let counts = status.counts();
            let total = counts.applied + counts.skipped + counts.rejected + counts.waiting;
            let track = inside.connectors.entry(name.clone()).or_insert_with(|| Track {
                state,
                since: now,
                samples: VecDeque::with_capacity(WINDOW + 1),
                lag_events: None,
            });
            if track.state != state {
                tracing::debug!(connector = name, from = state_name(track.state), to = state_name(state), "state");
                track.state = state;
                track.since = now;
            }
            track.samples.push_back((now, total));
            if track.samples.len() > WINDOW {
                track.samples.pop_front();
            }
            for known in STATES {
                gauge!("tidegate_connector_state", "connector" => name.clone(), "state" => state_name(known))
                    .set(f64::from(u8::from(known == state)));
            }
            let lag = status.lag();
            if let Some(bytes) = lag.bytes {
                gauge!("tidegate_lag_bytes", "connector" => name.clone()).set(bytes as f64);
            }
            if let Some(seconds) = lag.seconds {
                gauge!("tidegate_lag_seconds", "connector" => name.clone()).set(seconds);
            }
            if let Some(events) = lag.events.or(track.lag_events) {
                gauge!("tidegate_lag_events", "connector" => name.clone()).set(events as f64);
            }
        }
        if inside.progress_told.is_none_or(|told| now - told >= PROGRESS) {
            inside.progress_told = Some(now);
            for (name, status, _) in connectors {
                if let Some(progress) = status.progress() {
                    tracing::info!(connector = name, "{progress}");
                }
            }
        }
        inside.systems = systems.iter().map(|(name, system)| look_at_system(name, system)).collect();
        self.ask_lags(&mut inside, connectors, resources, now);
        self.ask_dead_letters(&mut inside, resources, now);
    }

    fn ask_lags(
        &self,
        inside: &mut Inside,
        connectors: &[(String, Arc<Status>, Vec<String>)],
        resources: &Resources,
        now: Instant,
    ) {
        if inside.asking_lags || inside.lags_asked.is_some_and(|asked| now - asked < LAGS) {
            return;
        }
        let groups: Vec<(String, Vec<String>)> = connectors
            .iter()
            .filter(|(_, _, groups)| !groups.is_empty())
            .map(|(name, _, groups)| (name.clone(), groups.clone()))
            .collect();
        inside.asking_lags = true;
        let (log, shared) = (resources.log.clone(), self.inside.clone());
        // Bounded by its deadline, and never more than one: `asking_lags` is its owner's mark.
        tokio::spawn(async move {
            for (name, groups) in groups {
                let mut events = None;
                for group in groups {
                    let Ok(Ok(lags)) = tokio::time::timeout(QUESTION, log.group_lag(&group)).await else { continue };
                    for lag in lags {
                        let behind = (lag.end.0 - lag.committed.map_or(0, |offset| offset.0)).max(0);
                        *events.get_or_insert(0) += behind as u64;
                        gauge!(
                            "tidegate_consumer_lag",
                            "group" => group.clone(),
                            "topic" => lag.topic_partition.topic.to_string(),
                            "partition" => lag.topic_partition.partition.to_string()
                        )
                        .set(behind as f64);
                    }
                }
                let mut inside = shared.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(track) = inside.connectors.get_mut(&name) {
                    track.lag_events = events;
                }
            }
            // Of all groups: the one of a connector without a file is the likeliest to lose records.
            let losses = tokio::time::timeout(QUESTION, log.losses()).await;
            let mut inside = shared.lock().unwrap_or_else(PoisonError::into_inner);
            if let Ok(Ok(losses)) = losses {
                let gauge = |of: &LossReport| gauge!("tidegate_log_lost_records", "group" => of.group.clone(), "topic" => of.topic.clone());
                inside.losses.iter().for_each(|gone| gauge(gone).set(0.0));
                inside.losses = losses.iter().map(LossReport::from).collect();
                inside.losses.iter().for_each(|loss| gauge(loss).set(loss.records as f64));
            }
            inside.asking_lags = false;
            inside.lags_asked = Some(Instant::now());
        });
    }

    fn ask_dead_letters(&self, inside: &mut Inside, resources: &Resources, now: Instant) {
        if inside.asking_dead_letters || inside.dead_letters_asked.is_some_and(|asked| now - asked < DEAD_LETTERS) {
            return;
        }
        inside.asking_dead_letters = true;
        let (resources, shared) = (resources.clone(), self.inside.clone());
        tokio::spawn(async move {
            let counted = tokio::time::timeout(QUESTION, resources.dead_letters()).await;
            let mut inside = shared.lock().unwrap_or_else(PoisonError::into_inner);
            inside.asking_dead_letters = false;
            inside.dead_letters_asked = Some(Instant::now());
            let Ok(Ok(counted)) = counted else { return };
            for name in inside.dead_letters.keys().filter(|name| !counted.contains_key(*name)) {
                gauge!("tidegate_dead_letters", "connector" => name.clone()).set(0.0);
            }
            for (name, count) in &counted {
                gauge!("tidegate_dead_letters", "connector" => name.clone()).set(*count as f64);
            }
            inside.dead_letters = counted;
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn look_at_system(name: &str, system: &System) -> SystemReport {
    let (breaker, figure) = match system.breaker() {
        BreakerState::Closed => ("closed", 0.0),
        BreakerState::HalfOpen => ("half-open", 1.0),
        BreakerState::Open => ("open", 2.0),
    };
    let requests = system.requests_sent();
    gauge!("tidegate_breaker_state", "system" => name.to_owned()).set(figure);
    counter!("tidegate_requests_total", "system" => name.to_owned()).absolute(requests);
    SystemReport { name: name.to_owned(), breaker: breaker.to_owned(), requests }
}
