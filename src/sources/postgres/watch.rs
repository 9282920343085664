//! What the server keeps for the slot, how far its WAL goes, and whether all tables that are asked for are published:
//! polled on the side, told in status and metrics.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::event::Lsn;
use crate::pipeline::Status;
use crate::postgres::slot::{self, Slot};

use super::relations::Catalog;
use super::settings::CaptureSettings;
use super::wanted;

const EVERY: Duration = Duration::from_secs(5);
const DEADLINE: Duration = Duration::from_secs(20);

/// Looks at the slot every few seconds, one look at a time.
pub(super) struct Watch {
    catalog: Catalog,
    settings: Arc<CaptureSettings>,
    name: Arc<str>,
    status: Arc<Status>,
    /// There is a slot that must not be gone: none is being made.
    expected: bool,
    due: Instant,
    look: Option<JoinHandle<()>>,
    before: Arc<std::sync::Mutex<Before>>,
}

/// What earlier looks found.
#[derive(Default)]
struct Before {
    /// The last look: when, and how much WAL was kept.
    kept: Option<(Instant, u64)>,
    /// End of the WAL at the last look, and at the one before.
    ends: [Lsn; 2],
    /// Tables were found that are asked for and not published (made, or made again), and where the WAL ended then.
    unpublished_at: Option<Lsn>,
    /// What is wrong with the publication itself.
    wrong: Option<String>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(look) = &self.look {
            look.abort();
        }
    }
}

impl Watch {
    pub(super) fn new(catalog: Catalog, settings: Arc<CaptureSettings>, name: Arc<str>, status: Arc<Status>) -> Self {
        Watch {
            catalog,
            settings,
            name,
            status,
            expected: false,
            due: Instant::now(),
            look: None,
            before: Arc::default(),
        }
    }

    /// Where the server's WAL ended some seconds ago: long enough for the stream to have told of it.
    pub(super) fn wal_end(&self) -> Lsn {
        self.before().ends[1]
    }

    /// There are tables to be taken, and all that was committed before they were found ends before `handed`.
    pub(super) fn finds_tables(&self, handed: Lsn) -> bool {
        self.before().unpublished_at.is_some_and(|end| handed >= end)
    }

    /// They are being taken.
    pub(super) fn forget_tables(&self) {
        self.before().unpublished_at = None;
    }

    /// What is wrong with the publication since it was last asked.
    pub(super) fn take_wrong(&self) -> Option<String> {
        self.before().wrong.take()
    }

    fn before(&self) -> std::sync::MutexGuard<'_, Before> {
        self.before.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Begins a look when one is due. `expected`: see there.
    pub(super) fn tick(&mut self, expected: bool) {
        // Seen missing by a look that began before it was made is no loss.
        let expected = std::mem::replace(&mut self.expected, expected) && expected;
        if Instant::now() < self.due || self.look.as_ref().is_some_and(|look| !look.is_finished()) {
            return;
        }
        self.due = Instant::now() + EVERY;
        let (catalog, settings) = (self.catalog.clone(), self.settings.clone());
        let (name, status, before) = (self.name.clone(), self.status.clone(), self.before.clone());
        self.look = Some(tokio::spawn(async move {
            // Tables first: all that came before them ends before the WAL's end that is seen then.
            let mut unpublished = false;
            let look = async {
                let mut session = catalog.session().await?;
                if expected {
                    match wanted::unpublished(&mut session, &settings).await {
                        Ok(found) => {
                            unpublished = !found.ours.is_empty();
                            status.set_fact(wanted::NOT_CAPTURED, found.others);
                            before.lock().unwrap_or_else(std::sync::PoisonError::into_inner).wrong = found.wrong;
                        }
                        // The slot is looked at anyway.
                        Err(error) => tracing::debug!(connector = %name, %error, "the tables can't be looked at"),
                    }
                }
                slot::find(&mut session, &settings.slot).await
            };
            match tokio::time::timeout(DEADLINE, look).await {
                Ok(Ok(Some(slot))) => {
                    if slot.wal_status == "lost" {
                        status.set_error(format!(
                            "replication slot '{}' has lost WAL that is still needed (wal_status 'lost', \
                             max_slot_wal_keep_size): changes are missing when the capture goes on. hint: \
                             'snapshot.mode: when_needed' reads all tables anew",
                            settings.slot
                        ));
                    }
                    tell(&slot, &settings.slot, &name, &status, &before, unpublished);
                }
                Ok(Ok(None)) => {
                    if expected {
                        let message = format!(
                            "replication slot '{}' is gone: changes are missing when the capture goes on. hint: \
                             'snapshot.mode: when_needed' reads all tables anew",
                            settings.slot
                        );
                        tracing::error!(connector = %name, "{message}");
                        status.set_error(message);
                    }
                    status.set_fact("slot", json!({ "name": settings.slot, "missing": true }));
                }
                Ok(Err(error)) => tracing::debug!(connector = %name, %error, "the slot can't be looked at"),
                Err(_) => tracing::debug!(connector = %name, "the slot can't be looked at: no answer"),
            }
        }));
    }
}

fn tell(
    slot: &Slot,
    slot_name: &str,
    name: &str,
    status: &Status,
    before: &std::sync::Mutex<Before>,
    unpublished: bool,
) {
    let now = Instant::now();
    let mut before = before.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // At the present rate, how long the WAL that may still be kept will last.
    let growth = before.kept.and_then(|(at, kept)| {
        let grown = slot.kept_bytes.checked_sub(kept).filter(|grown| *grown > 0)?;
        Some(grown as f64 / now.duration_since(at).as_secs_f64().max(0.001))
    });
    before.kept = Some((now, slot.kept_bytes));
    let confirmed = slot.confirmed_flush.unwrap_or_default();
    let end = Lsn(confirmed.0.saturating_add(slot.lag_bytes));
    before.ends = [end, before.ends[0]];
    before.unpublished_at = unpublished.then(|| before.unpublished_at.unwrap_or(end));
    drop(before);
    let seconds_left = match (slot.safe_wal_size, growth) {
        (Some(safe), Some(rate)) => Some((safe.max(0) as f64 / rate).round()),
        _ => None,
    };
    status.set_fact(
        "slot",
        json!({
            "name": slot_name,
            "wal_status": slot.wal_status,
            "wal_kept_bytes": slot.kept_bytes,
            "lag_bytes": slot.lag_bytes,
            "confirmed_flush_lsn": slot.confirmed_flush.map(|lsn| lsn.to_string()),
            "restart_lsn": slot.restart_lsn.map(|lsn| lsn.to_string()),
            "safe_wal_bytes": slot.safe_wal_size,
            "seconds_until_lost": seconds_left,
        }),
    );
    measure_slot(name, slot_name, slot);
    if matches!(slot.wal_status.as_str(), "unreserved" | "lost") {
        tracing::error!(connector = name, slot = slot_name, wal_status = %slot.wal_status,
            "the server is giving up the slot's WAL (max_slot_wal_keep_size)");
    }
}

/// Puts what is known of a slot into the metrics.
pub fn measure_slot(connector: &str, slot_name: &str, slot: &Slot) {
    let labels = [("connector", connector.to_owned()), ("slot", slot_name.to_owned())];
    metrics::gauge!("tidegate_slot_wal_kept_bytes", &labels).set(slot.kept_bytes as f64);
    metrics::gauge!("tidegate_slot_lag_bytes", &labels).set(slot.lag_bytes as f64);
    if let Some(safe) = slot.safe_wal_size {
        metrics::gauge!("tidegate_slot_safe_wal_bytes", &labels).set(safe as f64);
    }
    for known in ["reserved", "extended", "unreserved", "lost"] {
        let mut labels = labels.to_vec();
        labels.push(("wal_status", known.to_owned()));
        metrics::gauge!("tidegate_slot_wal_status", &labels).set(f64::from(u8::from(slot.wal_status == known)));
    }
}
