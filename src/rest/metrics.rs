//! The recorder behind the `metrics` macros, rendered for Prometheus.

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Seconds, from below a millisecond to a minute.
const LATENCIES: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0];

/// What a metric counts as, for Prometheus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

use Kind::{Counter, Gauge, Histogram};

/// Every metric there is, and what it says. Tests hold `docs/operating.md` and the code to it.
pub const METRICS: &[(Kind, &str, &str)] = &[
    (Gauge, "tidegate_ready", "1 when /health/ready says so"),
    (Gauge, "tidegate_connector_state", "1 for the state the connector is in"),
    (Counter, "tidegate_records_total", "Records by what became of them: applied, skipped, rejected, waiting"),
    (Counter, "tidegate_events_total", "Events that went through a connector"),
    (Counter, "tidegate_bytes_total", "Bytes of records that went through a connector"),
    (Counter, "tidegate_batches_total", "Batches that are durable on the other side"),
    (Counter, "tidegate_faults_total", "Faults that interrupted a connector"),
    (Gauge, "tidegate_queue_bytes", "Bytes of batches in flight"),
    (Counter, "tidegate_capture_events_total", "Events captured, by table and operation (c, u, d, r, t, m)"),
    (
        Gauge,
        "tidegate_capture_last_commit_seconds",
        "When the last commit that is durable in the log was made, since 1970",
    ),
    (Gauge, "tidegate_capture_quarantined", "1 for a table that can't be written and is left out"),
    (Gauge, "tidegate_replication_lag_bytes", "WAL between what is durable in the log and the server's end"),
    (Gauge, "tidegate_replication_lag_seconds", "Age of the oldest commit that is not durable in the log"),
    (Gauge, "tidegate_slot_wal_kept_bytes", "WAL that the server keeps for the slot"),
    (Gauge, "tidegate_slot_lag_bytes", "WAL since what the slot has confirmed"),
    (Gauge, "tidegate_slot_safe_wal_bytes", "WAL that may still be written before the slot is lost"),
    (Gauge, "tidegate_slot_wal_status", "1 for the slot's wal_status"),
    (Gauge, "tidegate_snapshot_rows", "Rows read by the snapshot that runs, or ran last"),
    (Gauge, "tidegate_consumer_lag_records", "Records between the group's offset and the partition's end"),
    (
        Gauge,
        "tidegate_delivery_lag_seconds",
        "Age of the newest record delivered, while there are more; 0 when there are none",
    ),
    (Counter, "tidegate_sink_skipped_total", "Records a sink sent nothing for, by reason"),
    (Gauge, "tidegate_dead_letters", "Rejected records parked until a person acts"),
    (Gauge, "tidegate_waiting_records", "Records parked until another row's link is there, or behind one of their key"),
    (Gauge, "tidegate_system_breaker_state", "1 for the state of the system's breaker: closed, half-open, open"),
    (Counter, "tidegate_system_requests_total", "Requests to a system, by purpose and class of the answer"),
    (Histogram, "tidegate_system_request_duration_seconds", "Time from sending a request to its answer"),
    (Counter, "tidegate_pull_runs_total", "Runs of a pull that came to their end"),
    (Counter, "tidegate_pull_pages_total", "Pages a pull has read"),
    (Counter, "tidegate_pull_conflicts_total", "Pages written again because another transaction was in the way"),
    (Counter, "tidegate_log_appended_records_total", "Records appended to the log"),
    (Counter, "tidegate_log_appended_bytes_total", "Bytes appended to the log"),
    (Gauge, "tidegate_log_bytes", "Size of the embedded log"),
    (
        Gauge,
        "tidegate_log_lost_records",
        "Records that the embedded log removed before the group had read them, until it is reset",
    ),
];

/// Cheap to clone.
#[derive(Clone)]
pub struct Metrics(PrometheusHandle);

impl Metrics {
    /// Installs the recorder for the whole process; to be called before anything that counts is made.
    pub fn install() -> Result<Self, String> {
        let builder =
            PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &LATENCIES);
        let recorder = builder.map_err(|error| error.to_string())?.build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).map_err(|error| error.to_string())?;
        for (kind, name, help) in METRICS {
            match kind {
                Counter => metrics::describe_counter!(*name, *help),
                Gauge => metrics::describe_gauge!(*name, *help),
                Histogram => metrics::describe_histogram!(*name, *help),
            }
        }
        Ok(Metrics(handle))
    }

    pub fn render(&self) -> String {
        self.fold();
        self.0.render()
    }

    /// Folds samples of histograms into their buckets: until then every one of them is kept.
    pub fn fold(&self) {
        self.0.run_upkeep();
    }
}
