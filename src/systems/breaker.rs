//! The circuit breaker of a system: after some failures in a row nothing is sent until the system is seen to be
//! back, so that an outage costs nobody's records their tries.
//!
//! The invariant: while open, no request but the probe leaves; half-open, one at a time.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BreakerState {
    /// Requests go through.
    Closed,
    /// Nothing is sent; the probe asks from time to time.
    Open,
    /// Without a probe: one request at a time shows whether the system is back.
    HalfOpen,
}

/// `breaker: { failures: 5, open: 10s }`
#[derive(Clone, Copy, Debug)]
pub struct BreakerSettings {
    /// Failures in a row that open it.
    pub failures: u32,
    /// Time between probes, and before the first.
    pub open: Duration,
}

impl Default for BreakerSettings {
    fn default() -> Self {
        BreakerSettings { failures: 5, open: Duration::from_secs(5) }
    }
}

pub struct Breaker {
    settings: BreakerSettings,
    state: watch::Sender<BreakerState>,
    failures: AtomicU32,
    on_trial: AtomicBool,
    reason: Mutex<Reason>,
}

#[derive(Default)]
struct Reason {
    /// Why it opened.
    opened: String,
    /// What the probe found last.
    probed: String,
}

/// Leave to send one request through the breaker.
pub struct Pass<'a> {
    trial: Option<&'a AtomicBool>,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if let Some(on_trial) = self.trial {
            on_trial.store(false, Ordering::Release);
        }
    }
}

impl Breaker {
    pub fn new(settings: BreakerSettings) -> Self {
        Breaker {
            settings,
            state: watch::Sender::new(BreakerState::Closed),
            failures: AtomicU32::new(0),
            on_trial: AtomicBool::new(false),
            reason: Mutex::default(),
        }
    }

    pub fn state(&self) -> BreakerState {
        *self.state.borrow()
    }

    pub fn changes(&self) -> watch::Receiver<BreakerState> {
        self.state.subscribe()
    }

    pub fn open_time(&self) -> Duration {
        self.settings.open
    }

    /// Why it opened last, and what keeps it open.
    pub fn reason(&self) -> String {
        let Reason { opened, probed } = &*self.noted();
        if probed.is_empty() || opened.contains(probed) { opened.clone() } else { format!("{opened}; {probed}") }
    }

    /// The probe has failed again.
    pub fn probed(&self, reason: &str) {
        reason.clone_into(&mut self.noted().probed);
    }

    fn noted(&self) -> MutexGuard<'_, Reason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pass, or `None` where nothing may be sent now.
    pub fn pass(&self) -> Option<Pass<'_>> {
        match self.state() {
            BreakerState::Closed => Some(Pass { trial: None }),
            BreakerState::Open => None,
            BreakerState::HalfOpen => {
                let taken = self.on_trial.swap(true, Ordering::AcqRel);
                (!taken).then_some(Pass { trial: Some(&self.on_trial) })
            }
        }
    }

    /// The system answered for itself.
    pub fn succeeded(&self) {
        self.failures.store(0, Ordering::Release);
        if self.state() == BreakerState::HalfOpen {
            self.state.send_replace(BreakerState::Closed);
        }
    }

    /// The system did not answer, or only to say that it can't. True where this opened the breaker: then the caller
    /// starts the task that sees it closed again. `certain`: the probe has failed too, there is nothing to count.
    pub fn failed(&self, reason: &str, certain: bool) -> bool {
        let failures = self.failures.fetch_add(1, Ordering::AcqRel) + 1;
        let mut opened = false;
        self.state.send_if_modified(|state| {
            let open = match state {
                BreakerState::Open => false,
                BreakerState::HalfOpen => true,
                BreakerState::Closed => certain || failures >= self.settings.failures,
            };
            if open {
                *self.noted() = Reason { opened: reason.to_owned(), probed: String::new() };
                *state = BreakerState::Open;
                opened = true;
            }
            open
        });
        opened
    }

    pub fn close(&self) {
        self.failures.store(0, Ordering::Release);
        self.state.send_replace(BreakerState::Closed);
    }

    pub fn half_open(&self) {
        self.state.send_if_modified(|state| {
            let open = *state == BreakerState::Open;
            if open {
                *state = BreakerState::HalfOpen;
            }
            open
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_only() {
        let breaker = Breaker::new(BreakerSettings { failures: 3, open: Duration::from_secs(1) });
        assert!(!breaker.failed("down", false));
        assert!(!breaker.failed("down", false));
        breaker.succeeded();
        assert!(!breaker.failed("down", false));
        assert!(!breaker.failed("down", false));
        assert!(breaker.failed("refused", false));
        assert_eq!(breaker.state(), BreakerState::Open);
        assert_eq!(breaker.reason(), "refused");
        assert!(breaker.pass().is_none());
        assert!(!breaker.failed("late answer", false), "opened twice");
    }

    #[test]
    fn half_open_lets_one_request_through_at_a_time() {
        let breaker = Breaker::new(BreakerSettings { failures: 1, open: Duration::from_secs(1) });
        assert!(breaker.failed("down", true));
        breaker.half_open();
        let pass = breaker.pass();
        assert!(pass.is_some());
        assert!(breaker.pass().is_none());
        drop(pass);
        let pass = breaker.pass();
        assert!(pass.is_some());
        breaker.succeeded();
        assert_eq!(breaker.state(), BreakerState::Closed);
    }
}
