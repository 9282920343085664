//! Metrics of a pipeline: added per batch, never per record.

use metrics::{Counter, Gauge, counter, gauge};

use super::Counts;

/// Handles on one connector's metrics; getting them once is what keeps adding cheap.
pub struct Meters {
    applied: Counter,
    skipped: Counter,
    rejected: Counter,
    waiting: Counter,
    events: Counter,
    bytes: Counter,
    batches: Counter,
    faults: Counter,
    in_flight: Gauge,
}

impl Meters {
    pub fn new(connector: &str) -> Self {
        let connector = connector.to_owned();
        let result = |result: &'static str| counter!("tidegate_records_total", "connector" => connector.clone(), "result" => result);
        Meters {
            applied: result("applied"),
            skipped: result("skipped"),
            rejected: result("rejected"),
            waiting: result("waiting"),
            events: counter!("tidegate_events_total", "connector" => connector.clone()),
            bytes: counter!("tidegate_bytes_total", "connector" => connector.clone()),
            batches: counter!("tidegate_batches_total", "connector" => connector.clone()),
            faults: counter!("tidegate_faults_total", "connector" => connector.clone()),
            in_flight: gauge!("tidegate_queue_bytes", "connector" => connector.clone()),
        }
    }

    pub fn landed(&self, events: usize, counts: &Counts) {
        self.applied.increment(counts.applied);
        self.skipped.increment(counts.skipped);
        self.rejected.increment(counts.rejected);
        self.waiting.increment(counts.waiting);
        self.events.increment(events as u64);
        self.bytes.increment(counts.bytes);
        self.batches.increment(1);
    }

    pub fn fault(&self) {
        self.faults.increment(1);
    }

    pub fn in_flight(&self, bytes: usize) {
        self.in_flight.set(bytes as f64);
    }
}
