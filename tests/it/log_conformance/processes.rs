//! The embedded log among several processes: one that reads beside the writer, one that is killed while it writes.

use super::embedded::settings;
use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_reads_while_the_first_writes_and_after_it_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(settings(&folder)).unwrap();
    log.ensure_topic(&topic("t", 2)).await.unwrap();
    write_numbers(&log, "t", 0, 10, 10).await;
    let mut reading = other("read", folder.path());
    reading.expect_line("read 10").await;
    write_numbers(&log, "t", 10, 10, 10).await;
    reading.expect_line("read 20").await;
    // Topics made meanwhile are seen, and the reader may not write.
    let other = EmbeddedLog::open_reader(folder.path()).unwrap();
    log.ensure_topic(&topic("new", 1)).await.unwrap();
    assert_eq!(other.topics().await.unwrap().len(), 2);
    assert!(matches!(other.writer("s").await, Err(LogError::Invalid(_))));
    assert!(matches!(other.consumer("g", &["t".into()]).await, Err(LogError::Invalid(_))));
    drop(other);
    drop(reading);
    log.close().await.unwrap();
    drop(log);
    let alone = EmbeddedLog::open_reader(folder.path()).unwrap();
    assert_eq!(read_all(&alone, "t").await.len(), 20);
    let nothing = tempfile::tempdir().unwrap();
    let missing = EmbeddedLog::open_reader(nothing.path()).err().unwrap();
    assert!(matches!(&missing, LogError::Invalid(text) if text.contains("no embedded log")), "{missing}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_killed_process_was_told_is_durable_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let mut next = 0;
    for round in 0..4u64 {
        let mut writing = other("write", folder.path());
        // Each line is said after its ticket; run long enough to have many commits behind it.
        let mut told = 0;
        let end = Instant::now() + Duration::from_millis(150 + 70 * round);
        while Instant::now() < end {
            if let Some(line) = writing.line().await {
                told = line.strip_prefix("durable ").and_then(|n| n.parse().ok()).unwrap_or(told);
            }
        }
        writing.kill9();
        assert!(told > next, "round {round}: {told} after {next}");

        let log = EmbeddedLog::open(settings(&folder)).unwrap();
        let records = read_all(&log, "t").await;
        let mut numbers: Vec<u64> = records.iter().map(|r| text(&r.value).parse().unwrap()).collect();
        numbers.sort_unstable();
        let count = numbers.len() as u64;
        assert_eq!(numbers, (0..count).collect::<Vec<_>>(), "each once, no hole");
        assert!(count >= told, "{told} told, {count} there");
        // The position and the records it covers are one.
        let position = log.writer("s").await.unwrap().position().await.unwrap().unwrap();
        assert_eq!(String::from_utf8(position).unwrap(), count.to_string());
        next = count;
        log.close().await.unwrap();
    }
}

/// This test binary again, as another process that does one thing to an embedded log.
struct Other {
    child: std::process::Child,
    lines: tokio::sync::mpsc::UnboundedReceiver<String>,
}

fn other(what: &str, folder: &std::path::Path) -> Other {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "log_conformance::processes::other_process", "--nocapture", "--test-threads=1"])
        .env("TIDEGATE_TEST_OTHER", what)
        .env("TIDEGATE_TEST_FOLDER", folder)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let out = child.stdout.take().unwrap();
    let (send, lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::BufRead::lines(std::io::BufReader::new(out)).map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    Other { child, lines }
}

impl Other {
    async fn line(&mut self) -> Option<String> {
        tokio::time::timeout(Duration::from_millis(50), self.lines.recv()).await.ok().flatten()
    }

    async fn expect_line(&mut self, expected: &str) {
        eventually(DEADLINE, expected, async || self.line().await.filter(|line| line == expected)).await;
    }

    fn kill9(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the other process does; nothing when it is run as a test among others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_process() {
    let (Ok(what), Ok(folder)) = (std::env::var("TIDEGATE_TEST_OTHER"), std::env::var("TIDEGATE_TEST_FOLDER")) else {
        return;
    };
    match what.as_str() {
        "read" => {
            let log = EmbeddedLog::open_reader(&folder).unwrap();
            let mut reader = log.reader("t", StartAt::Beginning, StopAt::Never).await.unwrap();
            let mut count = 0;
            println!();
            while count < 20 {
                let records = reader.poll(&LIMIT).await.unwrap();
                if !records.is_empty() {
                    count += records.len();
                    if count.is_multiple_of(10) {
                        println!("read {count}");
                    }
                }
            }
        }
        _ => {
            let log = EmbeddedLog::open(EmbeddedSettings::new(&folder)).unwrap();
            log.ensure_topic(&topic("t", 3)).await.unwrap();
            let mut writer = log.writer("s").await.unwrap();
            let mut next: u64 = writer
                .position()
                .await
                .unwrap()
                .map_or(0, |position| String::from_utf8(position).unwrap().parse().unwrap());
            println!();
            let mut tickets = std::collections::VecDeque::new();
            loop {
                let mut records = RecordBatch::new();
                for _ in 0..1 + next % 20 {
                    let number = next.to_string();
                    records.push(&"t".into(), Some(number.as_bytes()), Some(number.as_bytes()), &HeaderSet::default());
                    next += 1;
                }
                let position = Some(next.to_string().into_bytes());
                tickets.push_back((next, writer.append(records, position).await.unwrap()));
                if tickets.len() > 4
                    && let Some((upto, ticket)) = tickets.pop_front()
                {
                    ticket.await.unwrap();
                    println!("durable {upto}");
                }
            }
        }
    }
}
