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
    use metrics::{describe_counter as counter, describe_gauge as gauge};
    counter!("tidegate_records_total", "Records by what became of them: applied, skipped, rejected, waiting");
    counter!("tidegate_events_total", "Events that went through a connector");
    counter!("tidegate_bytes_total", "Bytes of records that went through a connector");
    counter!("tidegate_batches_total", "Batches that are durable on the other side");
    counter!("tidegate_faults_total", "Faults that interrupted a connector");
    gauge!("tidegate_queue_bytes", "Bytes of batches in flight");
    gauge!("tidegate_connector_state", "1 for the state the connector is in");
    gauge!("tidegate_lag_bytes", "WAL between what is durable and the server's end");
    gauge!("tidegate_lag_seconds", "Age of what is read next");
    gauge!("tidegate_lag_events", "Records between the consumer group and the log's end");
    gauge!("tidegate_consumer_lag", "Records between the group's offset and the partition's end");
    gauge!("tidegate_dead_letters", "Rejected records parked until a person acts");
    gauge!("tidegate_breaker_state", "0 closed, 1 half open, 2 open");
    counter!("tidegate_requests_total", "Requests sent to a system");
}
