//! What a running connector is given, and how it tells of itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking::Mutex;
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::datastore::Datastore;
use crate::log::Log;
use crate::registry::Registry;

/// A lag is told every second or so; one older than this grows by its age.
const LAG_TOLD: Duration = Duration::from_secs(8);

/// Everything a connector may use. Cheap to clone.
#[derive(Clone)]
pub struct ConnectorContext {
    pub name: Arc<str>,
    pub log: Arc<dyn Log>,
    pub registry: Arc<dyn Registry>,
    pub datastore: Datastore,
    pub control: Control,
    pub status: Arc<Status>,
}

/// What the worker wants of a connector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Run,
    Pause,
    /// Drain what is in flight, then return.
    Stop,
}

/// The connector's end of its leash.
#[derive(Clone)]
pub struct Control {
    signal: watch::Receiver<Signal>,
    /// Cancelled when draining has taken too long: drop everything at once.
    pub abort: CancellationToken,
    restarted: Arc<AtomicBool>,
}

impl Control {
    pub fn new(signal: watch::Receiver<Signal>, abort: CancellationToken) -> Self {
        Control { signal, abort, restarted: Arc::default() }
    }

    /// `restarted`: set when a person restarts the connector, or its settings change.
    pub fn with_restarts(self, restarted: Arc<AtomicBool>) -> Self {
        Control { restarted, ..self }
    }

    /// Whether this start was asked for by a person, or by other settings; true once.
    pub fn take_restarted(&self) -> bool {
        self.restarted.swap(false, Ordering::Relaxed)
    }

    pub fn signal(&self) -> Signal {
        *self.signal.borrow()
    }

    /// Waits until the signal is another than `seen`; a worker that is gone counts as `Stop`.
    pub async fn changed_from(&mut self, seen: Signal) -> Signal {
        match self.signal.wait_for(|signal| *signal != seen).await {
            Ok(signal) => *signal,
            Err(_) => Signal::Stop,
        }
    }

    /// Sleeps, but not past a signal other than `Run`.
    pub async fn sleep(&mut self, time: Duration) {
        let _ = tokio::time::timeout(time, self.changed_from(Signal::Run)).await;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum ConnectorState {
    Starting,
    /// Reading the initial snapshot.
    Snapshot,
    Running,
    Paused,
    /// The other side is away; waiting behind the breaker.
    Waiting,
    /// Needs a person.
    Failed,
    Stopped,
}

/// What became of a batch's records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub applied: u64,
    pub skipped: u64,
    pub rejected: u64,
    pub waiting: u64,
    pub bytes: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        self.applied += more.applied;
        self.skipped += more.skipped;
        self.rejected += more.rejected;
        self.waiting += more.waiting;
        self.bytes += more.bytes;
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Lag {
    pub bytes: Option<u64>,
    pub seconds: Option<f64>,
    pub events: Option<u64>,
}

/// What a connector tells of itself; read by `status`, `/metrics` and health.
#[derive(Default)]
pub struct Status {
    applied: AtomicU64,
    skipped: AtomicU64,
    rejected: AtomicU64,
    waiting: AtomicU64,
    bytes: AtomicU64,
    inside: Mutex<Inside>,
}

#[derive(Default)]
struct Inside {
    state: Option<ConnectorState>,
    last_error: Option<(SystemTime, String)>,
    lag: Lag,
    lag_told: Option<Instant>,
    moved: Option<Instant>,
    progress: Option<String>,
    facts: BTreeMap<String, serde_json::Value>,
}

impl Status {
    pub fn add(&self, counts: Counts) {
        self.applied.fetch_add(counts.applied, Ordering::Relaxed);
        self.skipped.fetch_add(counts.skipped, Ordering::Relaxed);
        self.rejected.fetch_add(counts.rejected, Ordering::Relaxed);
        self.waiting.fetch_add(counts.waiting, Ordering::Relaxed);
        self.bytes.fetch_add(counts.bytes, Ordering::Relaxed);
    }

    pub fn counts(&self) -> Counts {
        Counts {
            applied: self.applied.load(Ordering::Relaxed),
            skipped: self.skipped.load(Ordering::Relaxed),
            rejected: self.rejected.load(Ordering::Relaxed),
            waiting: self.waiting.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }

    pub fn set_state(&self, state: ConnectorState) {
        self.inside.lock().state = Some(state);
    }

    pub fn state(&self) -> ConnectorState {
        self.inside.lock().state.unwrap_or(ConnectorState::Starting)
    }

    pub fn set_error(&self, message: impl Into<String>) {
        self.inside.lock().last_error = Some((SystemTime::now(), message.into()));
    }

    pub fn clear_error(&self) {
        self.inside.lock().last_error = None;
    }

    pub fn last_error(&self) -> Option<(SystemTime, String)> {
        self.inside.lock().last_error.clone()
    }

    pub fn set_lag(&self, lag: Lag) {
        let mut inside = self.inside.lock();
        (inside.lag, inside.lag_told) = (lag, Some(Instant::now()));
    }

    /// As it was told last; its seconds go on while nothing tells (the other side is away, or the connector failed).
    pub fn lag(&self) -> Lag {
        let inside = self.inside.lock();
        let silent = inside.lag_told.map_or(Duration::ZERO, |told| told.elapsed());
        let more = if silent > LAG_TOLD { silent.as_secs_f64() } else { 0.0 };
        Lag { seconds: inside.lag.seconds.map(|seconds| seconds + more), ..inside.lag }
    }

    /// Something of the batch in work is done: a destination that takes long is told from one that is stuck.
    pub fn set_moved(&self) {
        self.inside.lock().moved = Some(Instant::now());
    }

    pub fn moved(&self) -> Option<Instant> {
        self.inside.lock().moved
    }

    /// One line on long work (rows, rate, time left); `None` when it is over.
    pub fn set_progress(&self, progress: Option<String>) {
        self.inside.lock().progress = progress;
    }

    pub fn progress(&self) -> Option<String> {
        self.inside.lock().progress.clone()
    }

    /// A fact of this kind of connector, shown in `status` as it stands (slot, cursor, breaker …).
    pub fn set_fact(&self, name: &str, value: impl Into<serde_json::Value>) {
        self.inside.lock().facts.insert(name.to_owned(), value.into());
    }

    pub fn facts(&self) -> BTreeMap<String, serde_json::Value> {
        self.inside.lock().facts.clone()
    }
}

/// Where a connector is to go on from, when a person moves it.
#[derive(Clone, Debug, PartialEq)]
pub enum ResetTo {
    /// Everything again: the log's first record, a new snapshot, an empty cursor.
    Beginning,
    /// Only what comes from now on.
    End,
    /// The same offset in every partition.
    Offset(i64),
    /// The first record appended at or after this, ms since 1970.
    TimeMs(i64),
    /// A pull's cursor, as it stands.
    Cursor(serde_json::Value),
}

/// What starting a connector would create or change.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Plan {
    pub steps: Vec<PlanStep>,
    /// Statements only a DBA may run, in order.
    pub dba_sql: Vec<String>,
    /// What keeps the connector from working, until the DBA has run them.
    pub problems: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct PlanStep {
    /// `create`, `change`, `keep`, `drop`; `await`: another connector makes it.
    pub action: &'static str,
    /// `slot`, `publication`, `topic`, `subject`, `table`, `group`.
    pub what: &'static str,
    pub name: String,
    pub detail: Option<String>,
}

mod parking {
    //! A mutex that a panic elsewhere does not poison: what it guards is only told, never decided on.
    pub struct Mutex<T>(std::sync::Mutex<T>);

    impl<T: Default> Default for Mutex<T> {
        fn default() -> Self {
            Mutex(std::sync::Mutex::new(T::default()))
        }
    }

    impl<T> Mutex<T> {
        pub fn lock(&self) -> std::sync::MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }
}
