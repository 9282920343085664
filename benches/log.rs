//! What appending to a log costs: batches of events as capture writes them, several in flight, each durable; then
//! reading them back. Prints one line of key=value a run.
//!
//! `cargo bench --bench log`; with a number, that many records a run (a million without). The embedded log alone, or
//! with `BENCH_KAFKA=HOST:PORT` the log in that Kafka, too; there, CPU is this process's, without the broker's.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate::event::RecordBatch;
use tidegate::log::{EmbeddedLog, EmbeddedSettings, Log, LogError, PollLimit, StartAt, StopAt, TopicSpec};

/// Batches on their way at a time.
const WINDOW: usize = 8;
const VALUE_BYTES: usize = 350;
const HEADERS: [(&str, &[u8]); 4] = [
    ("__debezium.context.connectorLogicalName", b"shop"),
    ("__debezium.context.taskId", b"0"),
    ("__debezium.context.connectorName", b"postgresql"),
    ("__debezium.context.runId", b"0190a8c0-0000-7000-8000-000000000000"),
];

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let records = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(1_000_000);
    let kafka = std::env::var("BENCH_KAFKA").ok();
    for batch in [1, 1_000, 10_000] {
        // Single records are slower by far: fewer of them say the same.
        let records = if batch == 1 { records / 100 } else { records };
        let folder = tempfile::tempdir()?;
        run(&EmbeddedLog::open(EmbeddedSettings::new(folder.path()))?, records, batch).await?;
        #[cfg(feature = "kafka")]
        if let Some(servers) = &kafka {
            let settings = tidegate::log::KafkaSettings::new(servers);
            run(&tidegate::log::KafkaLog::open(settings).await?, records, batch).await?;
        }
    }
    Ok(())
}

async fn run(log: &dyn Log, records: usize, batch: usize) -> Result<(), Box<dyn std::error::Error>> {
    let name: Arc<str> = format!("shop.public.orders-{batch}").into();
    let spec = TopicSpec { name: name.to_string(), partitions: 3, replication_factor: None, settings: BTreeMap::new() };
    log.ensure_topic(&spec).await?;
    let (start, cpu) = (Instant::now(), cpu_seconds());
    append(log, &name, records, batch).await?;
    let (wall, used) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let mut reader = log.reader(&name, StartAt::Beginning, StopAt::End).await?;
    let limit = PollLimit { bytes: 1 << 20, records: 100_000, wait: Duration::from_secs(1) };
    let mut read = 0;
    while read < records {
        read += reader.poll(&limit).await?.len();
    }
    let (read_wall, read_used) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let million = records as f64 / 1e6;
    println!(
        "log={} batch={batch} records={records} append_per_s={:.0} append_cpu_s_per_million={:.2} \
         read_per_s={:.0} read_cpu_s_per_million={:.2}",
        log.kind(),
        records as f64 / wall,
        used / million,
        records as f64 / read_wall,
        read_used / million
    );
    log.close().await?;
    Ok(())
}

async fn append(log: &dyn Log, name: &Arc<str>, records: usize, batch: usize) -> Result<(), LogError> {
    let mut writer = log.writer("bench").await?;
    let value = [b'v'; VALUE_BYTES];
    let mut tickets = VecDeque::new();
    let mut buffers: Vec<RecordBatch> = Vec::new();
    let mut written = 0;
    while written < records || !tickets.is_empty() {
        if written < records && tickets.len() < WINDOW {
            let mut buffer = buffers.pop().unwrap_or_default();
            let headers = buffer.header_set(HEADERS);
            let slot = buffer.topic_slot(name);
            for number in written..(written + batch).min(records) {
                let mut record = buffer.record(slot, &headers);
                record.key(|out| out.extend_from_slice(&(number as u64).to_le_bytes()));
                record.value(|out| out.extend_from_slice(&value));
                record.finish();
            }
            written += buffer.len();
            tickets.push_back(writer.append(buffer, Some(written.to_le_bytes().to_vec())).await?);
        } else if let Some(ticket) = tickets.pop_front() {
            buffers.push(ticket.await?.buffer);
        }
    }
    Ok(())
}

/// CPU time of this process so far, user and system: fields 14 and 15 of its `stat`, in hundredths of a second.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(") ").next().unwrap_or_default();
    let ticks: f64 = after_name.split(' ').skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / 100.0
}
