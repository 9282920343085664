//! A system at work: sends requests within its budget and under its breaker, and classes what comes back.
//!
//! The invariant: what is told as [`Answer::Uncertain`] may have been applied, and nothing else that failed on the
//! way is called anything but surely not sent.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::{Client, Method, Url};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::auth::{AuthSettings, Credentials, LoginError};
use super::breaker::{Breaker, BreakerState};
use super::budget::Budget;
use super::classes::{Class, Meaning, meaning};
use super::{Answer, HttpRequest, HttpResponse, SystemSettings, headers};
use crate::config::{ConfigError, Place};
use crate::mapping::{Compiler, Scope};

/// Hops of a redirect that are followed.
const REDIRECTS: usize = 5;
/// Pauses between probes grow up to so many times `breaker.open`.
const SLOWEST_PROBE: u32 = 6;

/// One system; every connector of it shares the one.
pub struct System {
    settings: SystemSettings,
    client: Client,
    budget: Budget,
    breaker: Breaker,
    /// Sees the breaker closed again; ends with the system.
    watcher: Mutex<Option<JoinHandle<()>>>,
    probed: tokio::sync::Mutex<Option<Probed>>,
    sent: AtomicU64,
    by_purpose: Mutex<BTreeMap<&'static str, u64>>,
    myself: Weak<System>,
}

/// What a probe found.
#[derive(Clone)]
struct Probed {
    asked: Instant,
    ok: bool,
    status: Option<u16>,
    reason: String,
}

/// Why no answer came.
#[derive(Debug)]
enum Lost {
    /// The request can't be made: a bad URL or header.
    Unfit(String),
    /// Surely not applied.
    NotSent(String),
    /// Sent, in part at the least.
    AfterSending(String),
    /// Answered with this status, at more than `response.limit`.
    TooLong(u16),
    /// The budget has no turn in time.
    NoTurn(Duration),
    /// No credentials: what a login came to.
    Credentials(String),
}

impl System {
    /// Must be called before its first use inside a runtime; starts nothing yet.
    pub fn new(settings: SystemSettings) -> Result<Arc<Self>, ConfigError> {
        install_crypto();
        let client = Client::builder()
            .connect_timeout(settings.timeouts.connect)
            .redirect(reqwest::redirect::Policy::none())
            .pool_idle_timeout(Duration::from_secs(30))
            .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| {
                ConfigError::new(&Place::outside(&settings.name), format!("no HTTP client: {}", chain(&error)))
            })?;
        let budget = Budget::new(&settings.limits, settings.concurrency);
        let breaker = Breaker::new(settings.breaker);
        Ok(Arc::new_cyclic(|myself| System {
            client,
            budget,
            breaker,
            watcher: Mutex::new(None),
            probed: tokio::sync::Mutex::new(None),
            sent: AtomicU64::new(0),
            by_purpose: Mutex::new(BTreeMap::new()),
            myself: myself.clone(),
            settings,
        }))
    }

    /// How long a request takes at the most: its turn and its answer.
    pub fn longest_request(&self) -> Duration {
        self.settings.timeouts.turn + self.settings.timeouts.request
    }

    pub fn name(&self) -> &str {
        &self.settings.name
    }

    /// The compiler of the expressions of this system's connectors: it knows the system's `define`.
    pub fn compiler(&self) -> &Compiler {
        &self.settings.compiler
    }

    pub fn breaker(&self) -> BreakerState {
        self.breaker.state()
    }

    pub fn breaker_changes(&self) -> watch::Receiver<BreakerState> {
        self.breaker.changes()
    }

    /// Why the breaker opened last.
    pub fn breaker_reason(&self) -> String {
        self.breaker.reason()
    }

    /// Waits until requests may be sent again. The probe's task works at it; without a probe one request at a time
    /// is let through to see. Give it a deadline of your own.
    pub async fn wait_available(&self) {
        let mut changes = self.breaker.changes();
        while self.breaker() == BreakerState::Open {
            // Looked after again and again: one that just let a request through on trial is still there for a moment
            // when that request fails, and then gone.
            self.watch_breaker();
            let again = self.breaker.open_time().max(Duration::from_millis(50));
            // The sender lives as long as `self`.
            let _ = tokio::time::timeout(again, changes.wait_for(|state| *state != BreakerState::Open)).await;
        }
    }

    /// Requests that connectors sent, since the start; logins and probes are not counted.
    pub fn requests_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Every request since the start, by what it was for; with logins (`login`) and probes (`probe`).
    pub fn requests_by_purpose(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.by_purpose).clone()
    }

    /// Sends within budget, breaker and time-outs, and says what became of it. Never tries again by itself, a
    /// refreshed login apart. Dropped before its turn has come, nothing is sent; dropped later, the request may
    /// have been applied.
    pub async fn send(&self, request: &HttpRequest) -> Answer {
        let Some(pass) = self.breaker.pass() else {
            self.watch_breaker();
            let reason = format!("'{}' is unavailable: {}", self.name(), self.breaker.reason());
            return Answer::Unavailable { after: Some(self.breaker.open_time()), reason, maybe_applied: false };
        };
        let began = Instant::now();
        let (answer, certain) = match self.exchange(request).await {
            Ok(response) => {
                let (answer, certain) = self.class(request, response).await;
                (answer, Some(certain))
            }
            Err(lost) => {
                // Too long an answer is an answer: it tells of no outage.
                let certain = if matches!(lost, Lost::TooLong(_)) { None } else { Some(false) };
                (self.no_answer(request, lost), certain)
            }
        };
        match certain {
            Some(certain) => self.tell_breaker(request, &answer, certain),
            None => self.breaker.succeeded(),
        }
        drop(pass);
        let labels = [
            ("system", self.name().to_owned()),
            ("purpose", request.purpose.to_owned()),
            ("class", answer.class().to_owned()),
        ];
        metrics::counter!("tidegate_system_requests_total", &labels).increment(1);
        metrics::histogram!("tidegate_system_request_seconds", "system" => self.name().to_owned())
            .record(began.elapsed().as_secs_f64());
        answer
    }

    /// The path, as [`HttpRequest::path`] takes it, of `next`: a URL that an answer to `request` gave, absolute or
    /// relative to the request's own.
    pub fn resolve(&self, request: &HttpRequest, next: &str) -> Result<String, String> {
        let base = self.url(request)?;
        let url = base.join(next).map_err(|error| format!("'{next}' is no URL: {error}"))?;
        if url.origin() != self.settings.base_url.origin() {
            return Err(format!("'{url}' leads away from {}", self.settings.base_url.origin().ascii_serialization()));
        }
        Ok(url.into())
    }

    // -- breaker and probe

    fn tell_breaker(&self, request: &HttpRequest, answer: &Answer, certain: bool) {
        let opened = match answer {
            Answer::Applied(_) | Answer::Rejected { .. } => {
                self.breaker.succeeded();
                false
            }
            Answer::Unavailable { reason, .. } | Answer::Uncertain { reason } => self.breaker.failed(reason, certain),
            // The system answers: with a probe that is known, without one many in a row tell of an outage.
            Answer::Retry { response: Some(response), reason, .. } if response.status >= 500 => {
                if self.settings.probe.is_some() {
                    self.breaker.succeeded();
                    false
                } else {
                    self.breaker.failed(reason, false)
                }
            }
            Answer::Retry { response: Some(_), .. } => {
                self.breaker.succeeded();
                false
            }
            Answer::Retry { response: None, reason, .. } if request.is_safe() && reason.contains(NO_ANSWER) => {
                self.breaker.failed(reason, false)
            }
            Answer::Retry { response: None, .. } => false,
        };
        if opened {
            tracing::warn!(system = self.name(), reason = %self.breaker.reason(), "the system is unavailable");
        }
        metrics::gauge!("tidegate_system_breaker_open", "system" => self.name().to_owned())
            .set(if self.breaker() == BreakerState::Closed { 0.0 } else { 1.0 });
        if opened {
            self.watch_breaker();
        }
    }

    /// Makes sure that a task works at closing the breaker.
    fn watch_breaker(&self) {
        let mut watcher = lock(&self.watcher);
        if watcher.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let myself = self.myself.clone();
        let mut pause = self.breaker.open_time();
        let slowest = pause * SLOWEST_PROBE;
        *watcher = Some(tokio::spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                let Some(system) = myself.upgrade() else { return };
                if system.settings.probe.is_none() {
                    system.breaker.half_open();
                    return;
                }
                let probed = system.probe(Instant::now()).await;
                if probed.ok {
                    system.breaker.close();
                    metrics::gauge!("tidegate_system_breaker_open", "system" => system.name().to_owned()).set(0.0);
                    tracing::info!(system = system.name(), "the system is back");
                    return;
                }
                tracing::debug!(system = system.name(), reason = probed.reason, "the probe failed");
                pause = (pause * 2).min(slowest);
            }
        }));
    }

    /// What the probe finds, asked at `since` or later: those who ask at the same time share one request.
    async fn probe(&self, since: Instant) -> Probed {
        let mut probed = self.probed.lock().await;
        if let Some(known) = probed.as_ref().filter(|known| known.asked >= since) {
            return known.clone();
        }
        let asked = Instant::now();
        let found = match self.ask_probe().await {
            Ok(response) => Probed {
                asked,
                ok: (200..300).contains(&response.status),
                status: Some(response.status),
                reason: format!("the probe answered {}: {}", response.status, response.excerpt()),
            },
            Err(reason) => Probed { asked, ok: false, status: None, reason },
        };
        *probed = Some(found.clone());
        found
    }

    async fn ask_probe(&self) -> Result<HttpResponse, String> {
        let Some(probe) = &self.settings.probe else { return Err("the system has no probe".to_owned()) };
        let mut request = probe
            .render(&Value::Null, &Scope::default())
            .map_err(|error| format!("the probe's request: {error}"))?
            .purpose("probe");
        request.timeout = Some(request.timeout.unwrap_or(self.settings.timeouts.probe));
        // Bounded as a whole: login, turn and request.
        let longest = self.settings.timeouts.probe * 2 + self.settings.timeouts.connect;
        match tokio::time::timeout(longest, self.exchange(&request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(lost)) => Err(format!("the probe failed: {}", lost.reason())),
            Err(_) => Err(format!("the probe had no answer in {longest:?}")),
        }
    }

    // -- classing

    /// What an answer means, and whether an outage is certain.
    async fn class(&self, request: &HttpRequest, response: HttpResponse) -> (Answer, bool) {
        let answered = Instant::now();
        let status = response.status;
        for rule in self.settings.rules.iter().filter(|rule| rule.matches_status(status)) {
            let mut certain = false;
            let probe = if rule.asks_probe() {
                let probed = self.probe(answered).await;
                certain = !probed.ok;
                json!({ "ok": probed.ok, "status": probed.status, "reason": probed.reason })
            } else {
                Value::Null
            };
            match rule.class(status, &response.body, &probe) {
                Ok(Some(class)) => {
                    let outage = certain && class == Class::Unavailable;
                    return (self.answer(class, request, response), outage);
                }
                Ok(None) => {}
                // Not the record's fault, and no reason to lose it.
                Err(error) => {
                    let reason = format!("a rule of `errors` of '{}' failed: {error}", self.name());
                    return (Answer::Retry { after: None, response: Some(response), reason }, false);
                }
            }
        }
        let after = headers::retry_after(&response);
        match meaning(status, request.method == Method::DELETE) {
            Meaning::Class(class) => (self.answer(class, request, response), false),
            Meaning::Busy => {
                let reason = self.reason(request, &response);
                (Answer::Retry { after, response: None, reason }, false)
            }
            Meaning::GatewayLost => {
                let reason = self.reason(request, &response);
                (Answer::Unavailable { after, reason, maybe_applied: true }, false)
            }
            Meaning::Credentials => {
                let reason = format!("{}; check `auth` of system '{}'", self.reason(request, &response), self.name());
                (Answer::Unavailable { after, reason, maybe_applied: false }, false)
            }
            Meaning::AskProbe if self.settings.probe.is_none() => (self.answer(Class::Retry, request, response), false),
            Meaning::AskProbe => {
                let probed = self.probe(answered).await;
                if probed.ok {
                    return (self.answer(Class::Retry, request, response), false);
                }
                let reason = format!("{}, and {}", self.reason(request, &response), probed.reason);
                (Answer::Unavailable { after, reason, maybe_applied: true }, true)
            }
        }
    }

    fn answer(&self, class: Class, request: &HttpRequest, response: HttpResponse) -> Answer {
        let after = headers::retry_after(&response);
        let reason = self.reason(request, &response);
        match class {
            Class::Applied => Answer::Applied(response),
            Class::Reject => Answer::Rejected { response, reason },
            Class::Retry => Answer::Retry { after, response: Some(response), reason },
            Class::Unavailable => Answer::Unavailable { after, reason, maybe_applied: response.status >= 500 },
        }
    }

    fn reason(&self, request: &HttpRequest, response: &HttpResponse) -> String {
        format!("{} {} answered {}: {}", request.method, request.shown_path(), response.status, response.excerpt())
    }

    fn too_long(&self) -> String {
        format!(
            "the answer is longer than {}; hint: ask for fewer records at a time (the paginator's `limit`) or fewer \
             fields, or raise `response.limit` of system '{}'",
            self.settings.response_limit,
            self.name()
        )
    }

    fn no_answer(&self, request: &HttpRequest, lost: Lost) -> Answer {
        let line = format!("{} {}", request.method, request.shown_path());
        match lost {
            Lost::Unfit(reason) => {
                let response = HttpResponse { status: 0, headers: Vec::new(), body: Value::Null };
                Answer::Rejected { response, reason: format!("{line} can't be sent: {reason}") }
            }
            Lost::NotSent(reason) => {
                Answer::Unavailable { after: None, reason: format!("{line}: {reason}"), maybe_applied: false }
            }
            Lost::TooLong(status) => {
                let reason = format!("{line} answered {status}: {}", self.too_long());
                if request.is_safe() {
                    let response = HttpResponse { status, headers: Vec::new(), body: Value::Null };
                    return Answer::Rejected { response, reason };
                }
                Answer::Uncertain { reason }
            }
            Lost::AfterSending(reason) if request.is_safe() => {
                Answer::Retry { after: None, response: None, reason: format!("{line}: {NO_ANSWER}: {reason}") }
            }
            Lost::AfterSending(reason) => Answer::Uncertain { reason: format!("{line}: {NO_ANSWER}: {reason}") },
            Lost::NoTurn(wait) => Answer::Retry {
                after: Some(wait),
                response: None,
                reason: format!("the budget of '{}' is used up for {} s", self.name(), wait.as_secs()),
            },
            Lost::Credentials(reason) => Answer::Unavailable { after: None, reason, maybe_applied: false },
        }
    }

    // -- sending

    /// One request with its credentials, those refreshed once where they are no longer taken.
    async fn exchange(&self, request: &HttpRequest) -> Result<HttpResponse, Lost> {
        let credentials = self.credentials(None).await?;
        let response = self.one(request, &credentials).await?;
        let (AuthSettings::Login(login), Credentials::Header { generation: Some(stale), .. }) =
            (&self.settings.auth, &credentials)
        else {
            return Ok(response);
        };
        if !login.asks_again(response.status) {
            return Ok(response);
        }
        let credentials = self.credentials(Some(*stale)).await?;
        self.one(request, &credentials).await
    }

    async fn credentials(&self, stale: Option<u64>) -> Result<Credentials, Lost> {
        match &self.settings.auth {
            AuthSettings::None => Ok(Credentials::None),
            AuthSettings::Header { name, value } => {
                Ok(Credentials::Header { name: name.clone(), value: value.clone(), generation: None })
            }
            AuthSettings::Query { name, value } => Ok(Credentials::Query { name: name.clone(), value: value.clone() }),
            AuthSettings::Login(login) => {
                let log_in = async |request: HttpRequest| self.one(&request, &Credentials::None).await;
                login.credentials(stale, log_in).await.map_err(|error| match error {
                    // A login changes nothing that counts: whatever became of it, the request was not sent.
                    LoginError::Sending(Lost::NoTurn(wait)) => Lost::NoTurn(wait),
                    LoginError::Sending(lost) => Lost::NotSent(format!("login: {}", lost.reason())),
                    LoginError::Refused(status) => {
                        Lost::Credentials(format!("the login to '{}' was answered with {status}", self.name()))
                    }
                    LoginError::Settings(reason) => Lost::Credentials(format!("'{}': {reason}", self.name())),
                })
            }
        }
    }

    async fn one(&self, request: &HttpRequest, credentials: &Credentials) -> Result<HttpResponse, Lost> {
        let url = self.url(request).map_err(Lost::Unfit)?;
        let headers = self.headers(request, credentials).map_err(Lost::Unfit)?;
        let limit = request.timeout.unwrap_or(self.settings.timeouts.request);
        let turn = self.budget.turn(self.settings.timeouts.turn).await.map_err(Lost::NoTurn)?;
        if !matches!(request.purpose, "probe" | "login") {
            self.sent.fetch_add(1, Ordering::Relaxed);
        }
        *lock(&self.by_purpose).entry(request.purpose).or_default() += 1;
        let response = match tokio::time::timeout(limit, self.hops(request, url, headers, credentials)).await {
            Ok(response) => response?,
            Err(_) => return Err(Lost::AfterSending(format!("nothing within {limit:?}"))),
        };
        drop(turn);
        if let Some(pause) = headers::pause(&response) {
            self.budget.pause(pause);
        }
        Ok(response)
    }

    /// The request, and where it is redirected to within the same origin. What changes something is sent again
    /// only where the answer says to send the same again (307, 308).
    async fn hops(
        &self,
        request: &HttpRequest,
        mut url: Url,
        headers: HeaderMap,
        credentials: &Credentials,
    ) -> Result<HttpResponse, Lost> {
        for _ in 0..=REDIRECTS {
            let mut sending = self.client.request(request.method.clone(), url.clone()).headers(headers.clone());
            if let Credentials::Query { name, value } = credentials {
                sending = sending.query(&[(name.as_str(), value.expose_secret())]);
            }
            if let Some(body) = &request.body {
                sending = sending.json(body);
            }
            let response = sending.send().await.map_err(lost)?;
            let status = response.status().as_u16();
            let follow = matches!(status, 307 | 308) || request.is_safe() && matches!(status, 301..=303);
            let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            match location.and_then(|location| url.join(location).ok()) {
                Some(next) if follow && next.origin() == self.settings.base_url.origin() => url = next,
                _ => return self.read(response).await,
            }
        }
        Err(Lost::Unfit(format!("redirected more than {REDIRECTS} times")))
    }

    async fn read(&self, mut response: reqwest::Response) -> Result<HttpResponse, Lost> {
        let limit = self.settings.response_limit.bytes();
        let status = response.status().as_u16();
        let headers = response
            .headers()
            .iter()
            .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(lost)? {
            if (body.len() + chunk.len()) as u64 > limit {
                return Err(Lost::TooLong(status));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(HttpResponse { status, headers, body: parse(&body) })
    }

    fn url(&self, request: &HttpRequest) -> Result<Url, String> {
        let base = &self.settings.base_url;
        let text = if request.path.starts_with('/') {
            format!("{}{}", base.as_str().trim_end_matches('/'), request.path)
        } else {
            request.path.clone()
        };
        let mut url = Url::parse(&text).map_err(|error| format!("'{text}' is no URL: {error}"))?;
        if url.origin() != base.origin() {
            return Err(format!("'{url}' is not at {}", base.origin().ascii_serialization()));
        }
        if !request.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&request.query);
        }
        Ok(url)
    }

    fn headers(&self, request: &HttpRequest, credentials: &Credentials) -> Result<HeaderMap, String> {
        let mut headers = HeaderMap::new();
        let own = match &self.settings.headers {
            Some(tree) => tree.render(&Value::Null, &Scope::default()).map_err(|error| error.to_string())?,
            None => Vec::new(),
        };
        for (name, value) in own.iter().chain(&request.headers) {
            let header = HeaderName::try_from(name.as_str()).map_err(|_| format!("'{name}' is no header's name"))?;
            let value = HeaderValue::try_from(value.as_str())
                .map_err(|_| format!("the value of header '{name}' holds characters that no header may hold"))?;
            headers.insert(header, value);
        }
        if let Credentials::Header { name, value, .. } = credentials {
            headers.insert(name, value.clone());
        }
        Ok(headers)
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if let Some(task) = lock(&self.watcher).take() {
            task.abort();
        }
    }
}

impl Lost {
    fn reason(&self) -> String {
        match self {
            Lost::Unfit(reason) | Lost::NotSent(reason) | Lost::Credentials(reason) => reason.clone(),
            Lost::AfterSending(reason) => format!("{NO_ANSWER}: {reason}"),
            Lost::TooLong(status) => format!("answered {status}, at more than `response.limit`"),
            Lost::NoTurn(wait) => format!("no turn in the budget for {} s", wait.as_secs()),
        }
    }
}

const NO_ANSWER: &str = "no answer";

fn lost(error: reqwest::Error) -> Lost {
    // The URL may carry an API key.
    let error = error.without_url();
    let reason = chain(&error);
    if error.is_builder() {
        Lost::Unfit(reason)
    } else if error.is_connect() {
        Lost::NotSent(reason)
    } else {
        Lost::AfterSending(reason)
    }
}

/// An error with all its causes.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

fn parse(body: &[u8]) -> Value {
    if body.is_empty() {
        return Value::Null;
    }
    serde_json::from_slice(body).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(body).into_owned()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// reqwest is built without a crypto provider of its own; another part may have installed the same one before.
fn install_crypto() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
