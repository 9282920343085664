//! A system at work: sends requests within its budget and under its breaker, and says what became of each.
//!
//! The invariant: what is told as [`Answer::Uncertain`] may have been applied, and nothing else that failed on the
//! way is called anything but surely not sent. `exchange` sends, `judge` classes what comes back, `availability`
//! keeps breaker and probe.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::time::Duration;

use reqwest::Client;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::availability::Probed;
use super::breaker::{Breaker, BreakerState};
use super::budget::Budget;
use super::exchange::{Lost, Ready, chain};
use super::{Answer, HttpRequest, HttpResponse, SystemSettings};
use crate::config::{ConfigError, Place};
use crate::mapping::Compiler;

/// How old an answer may be that tells how the system is now.
pub(super) const JUST_NOW: Duration = Duration::from_secs(1);

/// One system; every connector of it shares the one.
pub struct System {
    pub(super) settings: SystemSettings,
    pub(super) client: Client,
    pub(super) budget: Budget,
    pub(super) breaker: Breaker,
    /// Sees the breaker closed again; ends with the system.
    pub(super) watcher: Mutex<Option<JoinHandle<()>>>,
    pub(super) probed: tokio::sync::Mutex<Option<Probed>>,
    /// When a request was last applied.
    well: Mutex<Option<Instant>>,
    pub(super) sent: AtomicU64,
    pub(super) by_purpose: Mutex<BTreeMap<&'static str, u64>>,
    pub(super) myself: Weak<System>,
}

impl System {
    /// Must be called before its first use inside a runtime; starts nothing yet.
    pub fn new(settings: SystemSettings) -> Result<Arc<Self>, ConfigError> {
        install_crypto();
        let wrong = |what: String| ConfigError::new(&Place::outside(&settings.name), what);
        let mut builder = Client::builder();
        if let Some(path) = &settings.root_certificate {
            let unread = |error: &dyn std::fmt::Display| {
                ConfigError::new(&path.place, format!("`sslrootcert` {}: {error}", path.display()))
                    .hint("a PEM file with the certificates of the authorities to trust")
            };
            let pem = std::fs::read(path.as_path()).map_err(|error| unread(&error))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| unread(&chain(&error)))?;
            if certificates.is_empty() {
                return Err(unread(&"there is no certificate in it"));
            }
            builder = builder.tls_certs_merge(certificates);
        }
        let client = builder
            .connect_timeout(settings.timeouts.connect)
            .redirect(reqwest::redirect::Policy::none())
            .pool_idle_timeout(Duration::from_secs(30))
            .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| wrong(format!("no HTTP client: {}", chain(&error))))?;
        let budget = Budget::new(&settings.limits, settings.concurrency);
        let breaker = Breaker::new(settings.breaker);
        Ok(Arc::new_cyclic(|myself| System {
            client,
            budget,
            breaker,
            watcher: Mutex::new(None),
            probed: tokio::sync::Mutex::new(None),
            well: Mutex::new(None),
            sent: AtomicU64::new(0),
            by_purpose: Mutex::new(BTreeMap::new()),
            myself: myself.clone(),
            settings,
        }))
    }

    /// How long a request waits for its turn in the budget, at the most.
    pub fn longest_turn(&self) -> Duration {
        self.settings.timeouts.turn
    }

    /// How long the request takes from its first byte to the last one of its answer, at the most.
    pub fn time_limit(&self, request: &HttpRequest) -> Duration {
        request.timeout.unwrap_or(self.settings.timeouts.request)
    }

    /// Whether an address has the origin of `base_url`.
    pub fn is_at(&self, address: &str) -> bool {
        reqwest::Url::parse(address).is_ok_and(|url| url.origin() == self.settings.base_url.origin())
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

    /// Whether it has done what it was asked for within the last second.
    pub fn was_just_well(&self) -> bool {
        lock(&self.well).is_some_and(|well| well.elapsed() <= JUST_NOW)
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
        self.send_if(request, &|| Ok(())).await
    }

    /// As [`System::send`], if `ready` still says so when the request's turn has come, right before it leaves. What
    /// is kept back is told as [`Answer::Retry`] without a response, with the reason that `ready` gave.
    pub async fn send_if(&self, request: &HttpRequest, ready: Ready<'_>) -> Answer {
        let Some(pass) = self.breaker.pass() else {
            self.watch_breaker();
            let reason = format!("'{}' is unavailable: {}", self.name(), self.breaker.reason());
            return Answer::Unavailable { after: Some(self.breaker.open_time()), reason, maybe_applied: false };
        };
        let began = Instant::now();
        let (answer, certain) = match self.exchange(request, ready).await {
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
        if matches!(&answer, Answer::Applied(response) if (200..300).contains(&response.status)) {
            *lock(&self.well) = Some(Instant::now());
        }
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
        metrics::histogram!("tidegate_system_request_duration_seconds", "system" => self.name().to_owned())
            .record(began.elapsed().as_secs_f64());
        answer
    }

    /// The answer as a dead letter shows it: without the credentials that the request was sent with, should the system
    /// have said them back.
    pub fn shown(&self, response: &HttpResponse) -> Value {
        let shown = response.to_json();
        let secrets = self.settings.auth.secrets();
        if secrets.is_empty() {
            return shown;
        }
        let hidden = hide(shown.to_string(), &secrets);
        serde_json::from_str(&hidden).unwrap_or_else(|_| json!({ "status": response.status }))
    }

    /// A text for people, without those credentials.
    pub(super) fn without_secrets(&self, text: String) -> String {
        hide(text, &self.settings.auth.secrets())
    }

    /// The path, as [`HttpRequest::path`] takes it, of `next`: a URL that an answer to `request` gave, absolute or
    /// relative to the request's own. Parameters that are secrets (the key of `auth`, what references went into) are
    /// left out of it, though the system says them back: they are put into each request anew.
    pub fn resolve(&self, request: &HttpRequest, next: &str) -> Result<String, String> {
        let base = self.url(request)?;
        let mut url = base.join(next).map_err(|error| format!("the URL of the next page is none: {error}"))?;
        let (here, there) = (self.settings.base_url.origin(), url.origin());
        if there != here {
            let (here, there) = (here.ascii_serialization(), there.ascii_serialization());
            return Err(format!(
                "its next page is at {there}, which is not where the system is ({here}): credentials are sent nowhere else; \
                 hint: `base_url` must be the address that the system gives for itself"
            ));
        }
        let secret = |name: &str| {
            self.settings.auth.parameter() == Some(name) || request.masked.params.iter().any(|masked| masked == name)
        };
        if url.query_pairs().any(|(name, _)| secret(&name)) {
            let kept: Vec<_> = url
                .query_pairs()
                .filter(|(name, _)| !secret(name))
                .map(|(n, v)| (n.into_owned(), v.into_owned()))
                .collect();
            url.set_query(None);
            if !kept.is_empty() {
                url.query_pairs_mut().extend_pairs(kept);
            }
        }
        Ok(url.into())
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if let Some(task) = lock(&self.watcher).take() {
            task.abort();
        }
    }
}

fn hide(text: String, secrets: &[String]) -> String {
    // As the text has them, and as JSON quotes them.
    secrets.iter().fold(text, |text, secret| {
        let quoted = Value::from(secret.as_str()).to_string();
        text.replace(quoted.trim_matches('"'), "***").replace(secret.as_str(), "***")
    })
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// reqwest is built without a crypto provider of its own; another part may have installed the same one before.
fn install_crypto() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
