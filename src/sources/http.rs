//! Pulls: a system's records, listed page by page on a schedule, from where the last run came to.
//!
//! A run reads the listing from `$cursor` (the stored cursor, put back by `lookback`) to its end. Every page is a
//! batch, and is saved with the run's place in the transaction that writes its rows, so that a killed run goes on at
//! the page it had come to. The cursor itself moves at the end of the run, since a listing need not be in the
//! cursor's order, and never past the time the listing began by the system's clock: what changes on a page read
//! before is seen by the next run. Runs never overlap.
//!
//! Before each request the datastore's push sequence is noted (CORRECTNESS 20): a link pushed since then is newer
//! than the page.

mod incremental;
mod paginator;
mod schedule;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use self::incremental::{Incremental, no_later};
use self::paginator::{Next, Paginator, Position};
use self::schedule::Schedule;
use crate::config::{ConfigError, Section, Spanned};
use crate::datastore::{self, Datastore, Listed, listing_begins, load_cursor, push_seq_now};
use crate::log::ConsumedRecord;
use crate::mapping::{Compiler, MapError, Program, Scope};
use crate::pipeline::{Batch, Fault, Lag, Source, Status};
use crate::systems::{Answer, BreakerState, HttpRequest, HttpResponse, RequestTemplate, System};
use crate::twoway::order;

/// Pages of one run, at the most: a listing that has more is taken for one that never ends.
const MAX_PAGES: u64 = 1_000_000;
/// Records of one batch that were held.
const HELD_BATCH: i64 = 200;
/// How often a waiting pull looks for records whose time to be tried again has come.
const LOOK: Duration = Duration::from_secs(2);
/// A run that a crash broke off is taken up where it was for so long; an older one begins anew.
const RESUME_WITHIN: Duration = Duration::from_secs(24 * 3600);
/// How long to wait for a breaker to close before the pipeline is told.
const BREAKER_WAIT: Duration = Duration::from_secs(20);
/// A run for the sake of records that a delivery has overtaken comes no sooner than this after the last.
const RELIST: Duration = Duration::from_secs(5);

/// What a pull reads.
pub struct PullSettings {
    pub system: Arc<System>,
    pub object: String,
    request: RequestTemplate,
    paginator: Paginator,
    records: Program,
    incremental: Option<Incremental>,
    schedule: Schedule,
}

impl PullSettings {
    /// Takes `request`, `params`, `headers`, `timeout`, `paginator`, `records`, `incremental`, `every`, `cron`,
    /// `timezone`.
    pub fn read(section: &mut Section, system: Arc<System>, object: String) -> Result<Self, ConfigError> {
        let compiler: &Compiler = system.compiler();
        let line: Spanned<String> = section.require("request")?;
        let mut request = RequestTemplate::from_line(&line, compiler)?;
        request.take_params(section, compiler)?;
        if let Some(body) = section.take::<Spanned<String>>("body")? {
            request.body = Some(compiler.jq(&body)?);
        }
        let paginator = Paginator::read(section.section("paginator")?, compiler)?;
        let records: Option<Spanned<String>> = section.take("records")?;
        let records = records.unwrap_or_else(|| Spanned::new(".".to_owned(), section.place().clone()));
        let records = compiler.jq(&records)?;
        let incremental =
            section.section("incremental")?.map(|inner| Incremental::read(inner, compiler)).transpose()?;
        if paginator.needs_cursor() && incremental.is_none() {
            return Err(section
                .missing("incremental")
                .hint("a `single` listing with a `limit` is asked again from its cursor"));
        }
        let schedule = Schedule::read(section)?;
        Ok(PullSettings { object, request, paginator, records, incremental, schedule, system })
    }

    /// Whether there is a cursor.
    pub fn is_incremental(&self) -> bool {
        self.incremental.is_some()
    }
}

/// A page on its way into the datastore.
#[derive(Debug)]
pub struct Page {
    pub records: Vec<PageRecord>,
    /// `None` for records that are only tried again.
    pub save: Option<SaveCursor>,
    pub bytes: usize,
}

#[derive(Clone, Debug)]
pub struct PageRecord {
    pub record: Value,
    /// The push sequence noted before the record was fetched.
    pub push_seq: i64,
    /// The record's own cursor; null without one.
    pub cursor: Value,
    /// Why it can't be applied: its cursor is none.
    pub bad: Option<String>,
    /// The dead letter that it is replayed from: its key, and how it is parked.
    pub letter: Option<Box<(Value, ConsumedRecord)>>,
}

/// The pull's state after a page.
#[derive(Clone, Debug)]
pub struct SaveCursor {
    pub state: Value,
    /// Generation of the state that the page began from.
    pub seen: i64,
    /// At the end of a complete run: when it began.
    pub listed_since: Option<Listed>,
    /// The state tells nothing that the stored one does not: it need not be written.
    pub idle: bool,
}

/// What is kept in `tidegate.cursors`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct PullState {
    #[serde(default)]
    cursor: Value,
    /// When the last complete run began.
    #[serde(default)]
    last_run: Option<DateTime<Utc>>,
    #[serde(default)]
    run: Option<Run>,
}

/// A run under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Run {
    /// `$cursor` of this run.
    since: Value,
    /// The furthest cursor and tie breaker seen.
    high: Value,
    #[serde(default)]
    tie: Value,
    began: DateTime<Utc>,
    /// The system's time when it answered first.
    remote_began: Option<DateTime<Utc>>,
    #[serde(default)]
    listed: Listed,
    next: Position,
    pages: u64,
    records: u64,
    largest: usize,
    /// Of the last page, to notice one that comes twice.
    page_hash: Option<u64>,
}

/// A page as it came.
struct Fetched {
    request: HttpRequest,
    /// `None`: there is no such page.
    response: Option<HttpResponse>,
    push_seq: i64,
}

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
        }
    }

    /// The first page that a run would read now, with nothing changed by it.
    pub async fn preview(&mut self) -> Result<Page, Fault> {
        self.load().await?;
        let state = self.state.clone().unwrap_or_default();
        let run = self.begin(&state).await?;
        let fetched = fetch(Arc::clone(&self.settings), self.datastore.clone(), &run).await?;
        let Some(response) = &fetched.response else {
            return Ok(Page { records: Vec::new(), save: None, bytes: 0 });
        };
        let records = self.records(response, fetched.push_seq, &run.high)?;
        Ok(Page { records, save: None, bytes: 0 })
    }

    async fn load(&mut self) -> Result<(), Fault> {
        let client = self.datastore.client().await?;
        let stored = load_cursor(&client, &self.connector).await?;
        let mut state: PullState = match stored.cursor {
            Value::Null => PullState::default(),
            stored => serde_json::from_value(stored).map_err(|error| {
                Fault::stop(format!(
                    "the cursor of '{}' can't be read: {error}; hint: 'tidegate connectors reset {}' begins anew",
                    self.connector, self.connector
                ))
            })?,
        };
        self.stored = (stored.generation > 0).then(|| state.clone());
        if let Some(run) = &state.run
            && (Utc::now() - run.began).to_std().is_ok_and(|age| age > RESUME_WITHIN)
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
            for stale in stale {
                if !stale.is_null() && order(&stale, &since).is_lt() {
                    since = stale;
                }
            }
        }
        Ok(Run {
            since,
            high,
            tie: Value::Null,
            began: Utc::now(),
            remote_began: None,
            listed,
            next: Position::Start,
            pages: 0,
            records: 0,
            largest: 0,
            page_hash: None,
        })
    }

    /// `reached`: the furthest cursor so far. A record whose cursor can't be taken for one is its own fault, but a page
    /// of nothing else is the settings'.
    fn records(&self, response: &HttpResponse, push_seq: i64, reached: &Value) -> Result<Vec<PageRecord>, Fault> {
        let wrong = |error: MapError| Fault::stop(format!("`records: {}`: {error}", self.settings.records.text()));
        let found = self.settings.records.run(&response.body, &Scope::default()).map_err(wrong)?;
        let found = match <[Value; 1]>::try_from(found) {
            Ok([Value::Array(records)]) => records,
            Ok([Value::Null]) => Vec::new(),
            Ok([other]) if !other.is_object() => {
                return Err(Fault::stop(format!(
                    "`records: {}` must give records, but gives: {}; hint: where in the answer is the list?",
                    self.settings.records.text(),
                    response.excerpt()
                )));
            }
            Ok([record]) => vec![record],
            Err(records) => records,
        };
        let page_record = |record: Value| {
            let cursor = match &self.settings.incremental {
                Some(incremental) => incremental.of(&record, reached).map(|(cursor, _)| cursor),
                None => Ok(Value::Null),
            };
            let (cursor, bad) = match cursor {
                Ok(cursor) => (cursor, None),
                Err(reason) => (Value::Null, Some(reason)),
            };
            PageRecord { record, push_seq, cursor, bad, letter: None }
        };
        let records: Vec<_> = found.into_iter().map(page_record).collect();
        match records.first().and_then(|record| record.bad.as_deref()) {
            Some(reason) if records.len() > 1 && records.iter().all(|record| record.bad.is_some()) => {
                Err(Fault::stop(format!("no record of the page has a cursor: {reason}; hint: look at `incremental`")))
            }
            _ => Ok(records),
        }
    }

    /// The batch of a page, with the state that follows it.
    fn page(&mut self, fetched: Fetched) -> Result<Batch<Page, ()>, Fault> {
        let mut state = self.state.clone().unwrap_or_default();
        let Some(mut run) = state.run.take() else {
            return Err(Fault::retry("a page without a run"));
        };
        let records = match &fetched.response {
            Some(response) => self.records(response, fetched.push_seq, &run.high)?,
            None => Vec::new(),
        };
        let what = format!("page {} of {}", run.pages + 1, fetched.request.line());
        let before = run.high.clone();
        let tie_before = run.tie.clone();
        if let Some(incremental) = &self.settings.incremental {
            for record in records.iter().filter(|record| record.bad.is_none()) {
                let (cursor, tie) = incremental.of(&record.record, &before).map_err(Fault::stop)?;
                let higher = order(&cursor, &run.high).then_with(|| order(&tie, &run.tie));
                if higher.is_gt() {
                    (run.high, run.tie) = (cursor, tie);
                }
            }
        }
        let hash = hash(&records);
        if !records.is_empty() && run.page_hash == Some(hash) {
            return Err(Fault::stop(format!(
                "{what} is the same as the page before: the system takes no notice of how pages are asked for; \
                 hint: look at `paginator` and the parameters it names"
            )));
        }
        run.page_hash = Some(hash);
        run.pages += 1;
        run.records += records.len() as u64;
        run.largest = run.largest.max(records.len());
        let next = match &fetched.response {
            None => Next::End,
            Some(response) => {
                run.remote_began = run.remote_began.or_else(|| date(response));
                self.settings
                    .paginator
                    .next(&self.settings.system, &fetched.request, &run.next, response, records.len(), run.largest)
                    .map_err(|reason| Fault::stop(format!("{what}: {reason}")))?
            }
        };
        let mut listed_since = None;
        match next {
            Next::Page(next) => {
                if next == run.next || run.pages >= MAX_PAGES {
                    return Err(Fault::stop(format!("{what} leads to itself: the listing would never end")));
                }
                run.next = next;
                state.run = Some(run);
            }
            Next::FromCursor => {
                // What comes before the last value of a full page in the cursor's order has been seen.
                if order(&run.high, &before).is_le() && order(&run.tie, &tie_before).is_le()
                    || order(&run.high, &run.since).is_le()
                {
                    return Err(Fault::stop(format!(
                        "{what} is full, and all its records share the cursor {}: the listing can't go on; \
                         hint: raise the paginator's `limit`, or list by pages",
                        run.high
                    )));
                }
                run.since = run.high.clone();
                state.cursor = run.high.clone();
                run.page_hash = None;
                state.run = Some(run);
            }
            Next::End => {
                if self.settings.incremental.is_some() {
                    let began = run.remote_began.unwrap_or(run.began);
                    let reached = no_later(run.high, began);
                    if order(&reached, &state.cursor).is_gt() {
                        state.cursor = reached;
                    }
                }
                state.last_run = Some(run.began);
                listed_since = Some(run.listed);
                self.ended = Some(tokio::time::Instant::now());
                self.runs += 1;
                tracing::debug!(connector = %self.connector, pages = run.pages, records = run.records, "a run has ended");
                metrics::counter!("tidegate_pull_runs_total", "connector" => self.connector.to_string()).increment(1);
            }
        }
        // A run that moved nothing need not be remembered, where the next one does not go by when it was.
        let idle = state.run.is_none()
            && matches!(self.settings.schedule, Schedule::Every(_))
            && self.stored.as_ref().is_some_and(|stored| stored.run.is_none() && stored.cursor == state.cursor);
        let stored = serde_json::to_value(&state).map_err(|error| Fault::stop(error.to_string()))?;
        let save = SaveCursor { state: stored, seen: self.generation, listed_since, idle };
        if !idle {
            self.generation += 1;
            self.stored = Some(state.clone());
        }
        self.state = Some(state);
        metrics::counter!("tidegate_pull_pages_total", "connector" => self.connector.to_string()).increment(1);
        let bytes = records.iter().map(|record| size(&record.record)).sum();
        let events = records.len();
        Ok(Batch { body: Page { records, save: Some(save), bytes }, mark: (), events, bytes })
    }

    /// Records whose time to be tried again has come, and dead letters that are to be replayed.
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
            true => datastore::parked_ready(&client, &self.connector, &datastore::Owned::all(), HELD_BATCH).await?,
            false => Vec::new(),
        };
        for parked in letters {
            let key = parked.summary.key.clone();
            let record = parked.record.value.as_deref().and_then(|value| serde_json::from_slice::<Value>(value).ok());
            match (parked.summary.command, record) {
                (Some(datastore::Command::Replay), Some(record)) => {
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
        let bytes = records.iter().map(|record| size(&record.record)).sum();
        let events = records.len();
        Ok(Some(Batch { body: Page { records, save: None, bytes }, mark: (), events, bytes }))
    }

    /// When the next run is due, and whether that is now.
    fn is_due(&self, state: &PullState) -> bool {
        if self.fresh && matches!(self.settings.schedule, Schedule::Every(_)) {
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

/// The page that the run has come to.
async fn fetch(settings: Arc<PullSettings>, datastore: Datastore, run: &Run) -> Result<Fetched, Fault> {
    let position = &run.next;
    let push_seq = match position {
        // Noted when the run began, which was before any request.
        Position::Start if run.pages == 0 => run.listed.push_seq,
        _ => push_seq_now(&datastore.client().await?).await?,
    };
    let page = serde_json::to_value(position).unwrap_or_default();
    let scope = Scope { cursor: Some(&run.since), page: Some(&page), ..Scope::default() };
    let request = settings.request.render(&Value::Null, &scope);
    let mut request = request.map_err(|error| Fault::stop(format!("`request`: {error}")))?.purpose("pull");
    settings.paginator.turn_to(&mut request, position);
    match settings.system.send(&request).await {
        Answer::Applied(response) => Ok(Fetched { request, response: Some(response), push_seq }),
        Answer::Rejected { response, .. } if response.status == 404 && settings.paginator.ends_by_404(position) => {
            Ok(Fetched { request, response: None, push_seq })
        }
        Answer::Rejected { reason, .. } => Err(Fault::stop(reason)),
        Answer::Retry { after, reason, .. } => {
            Err(Fault { kind: crate::pipeline::FaultKind::Retry { after }, message: reason })
        }
        Answer::Unavailable { after, reason, .. } => Err(Fault::unavailable(reason, after)),
        // A listing by POST changes nothing: it is asked again.
        Answer::Uncertain { reason } => Err(Fault::retry(reason)),
    }
}

/// The header `Date`: the system's own clock.
fn date(response: &HttpResponse) -> Option<DateTime<Utc>> {
    DateTime::parse_from_rfc2822(response.header("date")?).map(|date| date.to_utc()).ok()
}

fn hash(records: &[PageRecord]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for record in records {
        record.record.to_string().hash(&mut hasher);
    }
    hasher.finish()
}

/// About the bytes a value takes.
fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 24,
        Value::Array(items) => 24 + items.iter().map(size).sum::<usize>(),
        Value::Object(members) => members.iter().map(|(name, value)| name.len() + 48 + size(value)).sum(),
        _ => 24,
    }
}
