//! Pulls: a system's records, listed page by page on a schedule, from where the last run came to.
//!
//! A run reads the listing from `$cursor` (the stored cursor, put back by `lookback`) to its end. Every page is a
//! batch, and is saved with the run's place in the transaction that writes its rows, so that a killed run goes on at
//! the page it had come to. The cursor itself moves at the end of the run, and never past what the run may not have
//! seen (`run`). Runs never overlap.
//!
//! Before each request the datastore's push sequence is noted (CORRECTNESS 20): a link pushed since then is newer
//! than the page.

mod fetch;
mod incremental;
mod page;
mod paginator;
mod run;
mod schedule;
mod settings;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use self::fetch::{Answered, Fetched, fetch};
pub use self::page::{Page, PageRecord, SaveCursor};
use self::run::{PullState, Run, Then, further};
use self::schedule::Schedule;
pub use self::settings::PullSettings;
use crate::datastore::{self, Datastore, listing_begins, load_cursor};
use crate::pipeline::{Batch, Fault, Lag, Source, Status};
use crate::systems::BreakerState;
use crate::twoway::order;

/// Records of one batch that were held.
const HELD_BATCH: i64 = 200;
/// Records that were parked, of which as many are tried again at once.
const LETTERS: datastore::Room = datastore::Room { records: 200, bytes: 8 << 20 };
/// How often a waiting pull looks for records whose time to be tried again has come.
const LOOK: Duration = Duration::from_secs(2);
/// A run that a crash broke off is taken up where it was for so long; an older one begins anew.
const RESUME_WITHIN: Duration = Duration::from_secs(24 * 3600);
/// How long to wait for a breaker to close before the pipeline is told.
const BREAKER_WAIT: Duration = Duration::from_secs(20);
/// A run for the sake of records that a delivery has overtaken comes no sooner than this after the last.
const RELIST: Duration = Duration::from_secs(5);
/// How often in a row a listing is begun anew when a page in the middle of it is refused.
const BEGINNINGS: u32 = 3;

pub struct HttpSource {
    settings: Arc<PullSettings>,
    connector: Arc<str>,
    datastore: Datastore,
    status: Arc<Status>,
    state: Option<PullState>,
    /// As the datastore has it, or will when what is under way has landed.
    stored: Option<PullState>,
    generation: i64,
    /// The loop drops `next` to tick; a request goes on in its own task, which ends with the source.
    fetching: Option<JoinHandle<Result<Fetched, Fault>>>,
    looked_at: Option<tokio::time::Instant>,
    /// At the last look, a delivery had overtaken what is held.
    stale: bool,
    /// This process has not begun a run yet.
    fresh: bool,
    /// When the last run of this process ended.
    ended: Option<tokio::time::Instant>,
    /// Runs of this process that are at their end; the last one's last page may still be on its way.
    runs: u64,
    /// How often in a row the run was broken off since a page in its middle was refused.
    refused: u32,
    /// The stored run leads to a refused page: the next one begins anew.
    anew: bool,
}

impl HttpSource {
    pub fn new(settings: Arc<PullSettings>, connector: Arc<str>, datastore: Datastore, status: Arc<Status>) -> Self {
        HttpSource {
            settings,
            connector,
            datastore,
            status,
            state: None,
            stored: None,
            generation: 0,
            fetching: None,
            looked_at: None,
            stale: false,
            fresh: true,
            ended: None,
            runs: 0,
            refused: 0,
            anew: false,
        }
    }

    /// The first page that a run would read now, with nothing changed by it.
    pub async fn preview(&mut self) -> Result<Page, Fault> {
        self.load().await?;
        let state = self.state.clone().unwrap_or_default();
        let run = self.begin(&state).await?;
        let fetched = fetch(Arc::clone(&self.settings), self.datastore.clone(), &run).await?;
        match &fetched.answered {
            Answered::Refused(reason) => Err(Fault::stop(reason.clone())),
            Answered::NoPage => Ok(Page::new(Vec::new(), None)),
            Answered::Page(response) => {
                Ok(Page::new(self.settings.records_of(response, fetched.push_seq, &run.high)?, None))
            }
        }
    }

    async fn load(&mut self) -> Result<(), Fault> {
        let client = self.datastore.client().await?;
        let stored = load_cursor(&client, &self.connector).await?;
        let mut state: PullState = match stored.cursor {
            Value::Null => PullState::default(),
            stored => serde_json::from_value(stored).map_err(|error| {
                Fault::stop(format!(
                    "the cursor of '{}' can't be read: {error}; hint: 'tidegate connectors reset {} --to beginning' begins anew",
                    self.connector, self.connector
                ))
            })?,
        };
        self.stored = (stored.generation > 0).then(|| state.clone());
        if let Some(run) = &state.run
            && (self.anew || (Utc::now() - run.began).to_std().is_ok_and(|age| age > RESUME_WITHIN))
        {
            state.run = None;
        }
        self.state = Some(state);
        self.generation = stored.generation;
        self.show();
        Ok(())
    }

    async fn begin(&self, state: &PullState) -> Result<Run, Fault> {
        let client = self.datastore.client().await?;
        let (listed, stale) = listing_begins(&client, &self.connector).await?;
        let (mut since, mut high) = (Value::Null, Value::Null);
        if let Some(incremental) = &self.settings.incremental {
            high = if state.cursor.is_null() { incremental.initial.clone() } else { state.cursor.clone() };
            since = if state.cursor.is_null() { high.clone() } else { incremental.back(&high).map_err(Fault::stop)? };
            // What a delivery has overtaken is listed again from where it was.
            match stale {
                Some(stale) => {
                    for stale in stale {
                        if !stale.is_null() && order(&stale, &since).is_lt() {
                            since = stale;
                        }
                    }
                }
                None => since = incremental.initial.clone(),
            }
        }
        Ok(Run::new(since, high, &state.seen, listed))
    }

    /// The batch of a page, with the state that follows it.
    fn page(&mut self, fetched: Fetched) -> Result<Batch<Page, ()>, Fault> {
        let mut state = self.state.clone().unwrap_or_default();
        let Some(mut run) = state.run.take() else {
            return Err(Fault::retry("a page without a run"));
        };
        let records = match &fetched.answered {
            Answered::Page(response) => self.settings.records_of(response, fetched.push_seq, &run.high)?,
            Answered::NoPage => Vec::new(),
            Answered::Refused(reason) => return Err(self.begin_anew(&run, reason)),
        };
        let then = run.take(&self.settings, &fetched, &records)?;
        self.anew = false;
        let reached = match self.settings.incremental.is_some() && !run.unsteady {
            true => run.reached(&self.settings),
            false => Value::Null,
        };
        let mut listed_since = None;
        match then {
            Then::Goes => {
                if self.settings.paginator.needs_cursor() {
                    state.cursor = further(state.cursor, &reached);
                }
                state.run = Some(run);
            }
            Then::Ends => {
                state.cursor = further(state.cursor, &reached);
                state.seen = further(state.seen, &run.high);
                state.last_run = Some(run.began);
                listed_since = Some(run.listed);
                self.refused = 0;
                self.ended = Some(tokio::time::Instant::now());
                self.runs += 1;
                self.tell_unsteady(&run);
                tracing::debug!(connector = %self.connector, pages = run.pages, records = run.records, "a run has ended");
                metrics::counter!("tidegate_pull_runs_total", "connector" => self.connector.to_string()).increment(1);
            }
        }
        // A run that moved nothing need not be remembered, where the next one does not go by when it was.
        let idle = state.run.is_none()
            && matches!(self.settings.schedule, Schedule::Every(_))
            && self.stored.as_ref().is_some_and(|stored| {
                stored.run.is_none() && stored.cursor == state.cursor && stored.seen == state.seen
            });
        let stored = serde_json::to_value(&state).map_err(|error| Fault::stop(error.to_string()))?;
        let save = SaveCursor { state: stored, seen: self.generation, listed_since, idle };
        if !idle {
            self.generation += 1;
            self.stored = Some(state.clone());
        }
        self.state = Some(state);
        metrics::counter!("tidegate_pull_pages_total", "connector" => self.connector.to_string()).increment(1);
        Ok(batch(Page::new(records, Some(save))))
    }

    /// A page in the middle that is refused: its address may have lapsed, as tokens do. The listing begins anew, with
    /// the pause that a passing fault has.
    fn begin_anew(&mut self, run: &Run, reason: &str) -> Fault {
        self.refused += 1;
        if run.pages == 0 || self.refused > BEGINNINGS {
            return Fault::stop(reason);
        }
        self.anew = true;
        Fault::retry(format!("{reason}; after {} pages the listing begins anew", run.pages))
    }

    fn tell_unsteady(&self, run: &Run) {
        self.status.set_fact("unsteady", run.unsteady);
        if run.unsteady {
            let told = "the listing has no order that lasts from page to page: records may be passed over, and the \
                cursor stays where it is; hint: ask the system to sort by a key that does not change";
            tracing::warn!(connector = %self.connector, pages = run.pages, "{told}");
            self.status.set_error(told.to_owned());
        }
    }

    /// Records whose time to be tried again has come, and dead letters of which that is so or that are to be replayed.
    async fn again(&mut self) -> Result<Option<Batch<Page, ()>>, Fault> {
        if self.looked_at.is_some_and(|at| at.elapsed() < LOOK) {
            return Ok(None);
        }
        let client = self.datastore.client().await?;
        let aside = datastore::put_aside(&client, &self.connector).await?;
        let due = match aside.held_due {
            true => datastore::held(&client, &self.connector, true, HELD_BATCH).await?,
            false => Vec::new(),
        };
        let mut records: Vec<PageRecord> = due
            .into_iter()
            .map(|held| PageRecord {
                record: held.record,
                push_seq: held.push_seq,
                cursor: held.cursor,
                bad: None,
                letter: None,
            })
            .collect();
        let letters = match aside.letters_due {
            true => datastore::parked_ready(&client, &self.connector, &datastore::Owned::all(), LETTERS).await?,
            false => Vec::new(),
        };
        for parked in letters {
            let key = parked.summary.key.clone();
            let record = parked.record.value.as_deref().and_then(|value| serde_json::from_slice::<Value>(value).ok());
            match (parked.summary.command, record) {
                (Some(datastore::Command::Replay) | None, Some(record))
                    if parked.summary.kind == datastore::ParkedKind::Rejected =>
                {
                    let of = self.settings.incremental.as_ref().map(|known| known.of(&record, &Value::Null));
                    let (cursor, bad) = match of {
                        Some(Ok((cursor, _))) => (cursor, None),
                        Some(Err(reason)) => (Value::Null, Some(reason)),
                        None => (Value::Null, None),
                    };
                    // When it was fetched is not known: older than every push, so that a row pushed at any time is
                    // listed again rather than overwritten (CORRECTNESS 20).
                    let letter = Some(Box::new((key, parked.record)));
                    records.push(PageRecord { record, push_seq: 0, cursor, bad, letter });
                }
                _ => datastore::unpark(&client, &self.connector, &key, &parked.record).await?,
            }
        }
        self.stale = aside.stale;
        self.status.set_fact("held", aside.held);
        let creating = match aside.held {
            0 => None,
            _ => datastore::open_create(&client, self.settings.system.name(), &self.settings.object).await?,
        };
        let held_by = creating.map(|key| format!("held by an open create of row {key}"));
        self.status.set_fact("held_by", json!(held_by));
        self.looked_at = Some(tokio::time::Instant::now());
        if records.is_empty() {
            return Ok(None);
        }
        Ok(Some(batch(Page::new(records, None))))
    }

    /// When the next run is due, and whether that is now.
    fn is_due(&self, state: &PullState) -> bool {
        if self.anew || self.fresh && matches!(self.settings.schedule, Schedule::Every(_)) {
            return true;
        }
        if self.settings.schedule.due(state.last_run).is_some_and(|due| due <= Utc::now()) {
            return true;
        }
        self.stale && self.ended.is_none_or(|ended| ended.elapsed() >= RELIST)
    }

    fn show(&self) {
        let Some(state) = &self.state else { return };
        if self.settings.incremental.is_some() {
            self.status.set_fact("cursor", state.cursor.clone());
        }
        let time = |time: Option<DateTime<Utc>>| {
            time.map_or(Value::Null, |time| json!(time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)))
        };
        self.status.set_fact("last_run", time(state.last_run));
        let due = self.settings.schedule.due(state.last_run);
        self.status.set_fact("next_run", time(due.map(|due| due.max(Utc::now()))));
        self.status.set_fact("breaker", json!(self.settings.system.breaker()));
        match &state.run {
            Some(run) => {
                self.status.set_fact("pages", run.pages);
                self.status.set_progress(Some(format!("run: {} pages, {} records", run.pages, run.records)));
            }
            None => self.status.set_progress(None),
        }
        // Behind by what is overdue: a run that is under way counts from when it was due.
        let late = due.map(|due| (Utc::now() - due).as_seconds_f64()).filter(|late| *late < 1e9);
        let seconds = match (state.last_run, late) {
            (Some(_), Some(late)) => Some(late.max(0.0)),
            _ => None,
        };
        self.status.set_lag(Lag { seconds, ..Lag::default() });
    }
}

#[async_trait]
impl Source for HttpSource {
    type Batch = Page;
    type Mark = ();

    async fn next(&mut self) -> Result<Batch<Page, ()>, Fault> {
        loop {
            if self.state.is_none() {
                self.load().await?;
            }
            if let Some(task) = &mut self.fetching {
                let fetched = task.await;
                self.fetching = None;
                match fetched {
                    Ok(Ok(fetched)) => return self.page(fetched),
                    Ok(Err(fault)) => return Err(fault),
                    Err(error) => return Err(Fault::retry(format!("the request's task ended: {error}"))),
                }
            }
            if let Some(batch) = self.again().await? {
                return Ok(batch);
            }
            let state = self.state.clone().unwrap_or_default();
            if let Some(run) = &state.run {
                self.wait_breaker().await?;
                let (settings, datastore) = (Arc::clone(&self.settings), self.datastore.clone());
                let run = run.clone();
                self.fetching = Some(tokio::spawn(async move { fetch(settings, datastore, &run).await }));
                self.fresh = false;
                continue;
            }
            if self.is_due(&state) {
                let run = self.begin(&state).await?;
                self.state = Some(PullState { run: Some(run), ..state });
                continue;
            }
            let due = self.settings.schedule.due(state.last_run);
            let wait = due.and_then(|due| (due - Utc::now()).to_std().ok()).unwrap_or(LOOK);
            tokio::time::sleep(wait.clamp(Duration::from_millis(5), LOOK)).await;
        }
    }

    async fn acknowledge(&mut self, (): ()) -> Result<(), Fault> {
        self.status.set_fact("runs", self.runs);
        self.show();
        Ok(())
    }

    async fn restart(&mut self) -> Result<(), Fault> {
        self.abort();
        self.state = None;
        self.looked_at = None;
        self.load().await
    }

    async fn tick(&mut self, _paused: bool) -> Result<(), Fault> {
        self.show();
        Ok(())
    }

    async fn close(&mut self) -> Result<(), Fault> {
        self.abort();
        Ok(())
    }
}

impl HttpSource {
    async fn wait_breaker(&self) -> Result<(), Fault> {
        let system = &self.settings.system;
        if system.breaker() != BreakerState::Open {
            return Ok(());
        }
        match tokio::time::timeout(BREAKER_WAIT, system.wait_available()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Fault::unavailable(
                format!("system '{}' is unavailable: {}", system.name(), system.breaker_reason()),
                None,
            )),
        }
    }

    fn abort(&mut self) {
        if let Some(task) = self.fetching.take() {
            task.abort();
        }
    }
}

impl Drop for HttpSource {
    fn drop(&mut self) {
        self.abort();
    }
}

fn batch(page: Page) -> Batch<Page, ()> {
    let (events, bytes) = (page.records.len(), page.bytes);
    Batch { body: page, mark: (), events, bytes }
}
