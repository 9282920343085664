//! Whether a system is there: its breaker told of every answer, and the probe that sees the breaker closed again.

use serde_json::Value;
use tokio::time::Instant;

use super::exchange::{Lost, NO_ANSWER};
use super::system::{System, lock};
use super::{Answer, HttpRequest, HttpResponse};
use crate::mapping::Scope;

/// Pauses between probes grow up to so many times `breaker.open`.
const SLOWEST_PROBE: u32 = 6;

/// What a probe found.
#[derive(Clone)]
pub(super) struct Probed {
    pub(super) asked: Instant,
    pub(super) ok: bool,
    pub(super) status: Option<u16>,
    /// It was answered with a page for people.
    pub(super) page: bool,
    /// False where the budget had no turn for it: nothing is known.
    pub(super) sent: bool,
    pub(super) reason: String,
}

impl System {
    pub(super) fn tell_breaker(&self, request: &HttpRequest, answer: &Answer, certain: bool) {
        let opened = match answer {
            Answer::Applied(_) | Answer::Rejected { .. } => {
                self.breaker.succeeded();
                false
            }
            Answer::Unavailable { reason, .. } | Answer::Uncertain { reason } => self.breaker.failed(reason, certain),
            // The system answers: with a probe that is known, without one many in a row tell of an outage.
            Answer::Retry { response: Some(response), reason, .. } if response.is_doubtful() => {
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
        if opened {
            self.watch_breaker();
        }
    }

    /// Makes sure that a task works at closing the breaker.
    pub(super) fn watch_breaker(&self) {
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
                    tracing::info!(system = system.name(), "the system is back");
                    return;
                }
                tracing::debug!(system = system.name(), reason = probed.reason, "the probe failed");
                system.breaker.probed(&probed.reason);
                pause = (pause * 2).min(slowest);
            }
        }));
    }

    /// What the probe finds, asked at `since` or later: those who ask at the same time share one request.
    pub(super) async fn probe(&self, since: Instant) -> Probed {
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
                page: response.is_page(),
                sent: true,
                reason: {
                    let answer = self.without_secrets(response.excerpt());
                    // It answers: what is wrong may be what it is asked.
                    let hint =
                        if matches!(response.status, 400 | 404 | 405 | 410) { "; hint: is `probe` right?" } else { "" };
                    format!("the probe answered {}: {answer}{hint}", response.status)
                },
            },
            Err(Lost::NoTurn(wait)) => {
                let reason = format!("the probe had no turn in the budget for {} s", wait.as_secs());
                Probed { asked, ok: false, status: None, page: false, sent: false, reason }
            }
            Err(lost) => Probed {
                asked,
                ok: false,
                status: None,
                page: false,
                sent: true,
                reason: format!("the probe failed: {}", lost.reason()),
            },
        };
        *probed = Some(found.clone());
        found
    }

    async fn ask_probe(&self) -> Result<HttpResponse, Lost> {
        let Some(probe) = &self.settings.probe else { return Err(Lost::Unfit("the system has no probe".to_owned())) };
        let mut request = probe
            .render(&Value::Null, &Scope::default())
            .map_err(|error| Lost::Unfit(format!("its request: {error}")))?
            .purpose("probe");
        let timeouts = &self.settings.timeouts;
        request.timeout = Some(request.timeout.unwrap_or(timeouts.probe));
        // Bounded as a whole: login, turn and request.
        let longest = timeouts.turn + self.time_limit(&request) * 2 + timeouts.connect;
        match tokio::time::timeout(longest, self.exchange(&request, &|| Ok(()))).await {
            Ok(answered) => answered,
            Err(_) => Err(Lost::AfterSending(format!("nothing within {longest:?}"))),
        }
    }
}
