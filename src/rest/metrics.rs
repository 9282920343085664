//! The recorder behind the `metrics` macros, rendered for Prometheus.

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Seconds, from below a millisecond to a minute.
const LATENCIES: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0];

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
        describe();
        Ok(Metrics(handle))
    }

    pub fn render(&self) -> String {
        self.0.run_upkeep();
        self.0.render()
    }
}

fn describe() {
    use metrics::{describe_counter as counter, describe_gauge as gauge, describe_histogram};
    gauge!("tidegate_ready", "1 when /health/ready says so");
    gauge!("tidegate_connector_state", "1 for the state the connector is in");
    counter!("tidegate_records_total", "Records by what became of them: applied, skipped, rejected, waiting");
    counter!("tidegate_events_total", "Events that went through a connector");
    counter!("tidegate_bytes_total", "Bytes of records that went through a connector");
    counter!("tidegate_batches_total", "Batches that are durable on the other side");
    counter!("tidegate_faults_total", "Faults that interrupted a connector");
    gauge!("tidegate_queue_bytes", "Bytes of batches in flight");
    counter!("tidegate_capture_events_total", "Events captured, by table and operation (c, u, d, r, t, m)");
    gauge!(
        "tidegate_capture_last_commit_seconds",
        "When the last commit that is durable in the log was made, since 1970"
    );
    gauge!("tidegate_replication_lag_bytes", "WAL between what is durable in the log and the server's end");
    gauge!("tidegate_replication_lag_seconds", "Age of the oldest commit that is not durable in the log");
    gauge!("tidegate_slot_wal_kept_bytes", "WAL that the server keeps for the slot");
    gauge!("tidegate_slot_lag_bytes", "WAL since what the slot has confirmed");
    gauge!("tidegate_slot_safe_wal_bytes", "WAL that may still be written before the slot is lost");
    gauge!("tidegate_slot_wal_status", "1 for the slot's wal_status");
    gauge!("tidegate_snapshot_rows", "Rows read by the snapshot that runs, or ran last");
    gauge!("tidegate_consumer_lag_records", "Records between the group's offset and the partition's end");
    gauge!(
        "tidegate_delivery_lag_seconds",
        "Age of the newest record delivered, while there are more; 0 when there are none"
    );
    counter!("tidegate_sink_skipped_total", "Records a sink sent nothing for, by reason");
    gauge!("tidegate_dead_letters", "Rejected records parked until a person acts");
    gauge!("tidegate_waiting_records", "Records parked until another row's link is there, or behind one of their key");
    gauge!("tidegate_system_breaker_state", "1 for the state of the system's breaker: closed, half-open, open");
    counter!("tidegate_system_requests_total", "Requests to a system, by purpose and class of the answer");
    describe_histogram!("tidegate_system_request_duration_seconds", "Time from sending a request to its answer");
    counter!("tidegate_pull_runs_total", "Runs of a pull that came to their end");
    counter!("tidegate_pull_pages_total", "Pages a pull has read");
    counter!("tidegate_pull_conflicts_total", "Pages written again because another transaction was in the way");
    counter!("tidegate_log_appended_records_total", "Records appended to the log");
    counter!("tidegate_log_appended_bytes_total", "Bytes appended to the log");
    gauge!("tidegate_log_bytes", "Size of the embedded log");
    gauge!(
        "tidegate_log_lost_records",
        "Records that the embedded log removed before the group had read them, until it is reset"
    );
}
