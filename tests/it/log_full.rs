//! The embedded log's disk when it is full, and its files when they can't be opened for a while: nothing is lost, nothing
//! is doubled, and everything goes on by itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tidegate::log::{EmbeddedLog, EmbeddedSettings, Log as _, LogError, StartAt, StopAt};

use crate::log_conformance::{read_all, topic, write_numbers};
use crate::support::{Office, WorkerLog, eventually};

/// A small disk of one's own, which goes when it is dropped. Needs root.
struct Disk(PathBuf);

impl Disk {
    /// `None`, and said, where it can't be had.
    fn mount(place: &Path, megabytes: usize) -> Option<Disk> {
        std::fs::create_dir_all(place).unwrap();
        let size = format!("size={megabytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(place).output().unwrap();
        if !mounted.status.success() {
            println!("SKIPPED: no disk of its own, which root alone can mount: {mounted:?}");
            return None;
        }
        Some(Disk(place.to_owned()))
    }

    /// Takes all the room there is but `spare` bytes.
    fn fill(&self, spare: usize) {
        let sizes = Command::new("df").args(["-B1", "--output=avail"]).arg(&self.0).output().unwrap();
        let free: usize = String::from_utf8(sizes.stdout).unwrap().lines().nth(1).unwrap().trim().parse().unwrap();
        std::fs::write(self.0.join("filler"), vec![0; free.saturating_sub(spare)]).unwrap();
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_full_stops_nothing_for_good_and_loses_and_doubles_nothing() {
    let office = Office::open("full", WorkerLog::Embedded, "").await;
    office.deliver_events();
    let Some(disk) = Disk::mount(&office.workshop.path().join("data"), 64) else { return };
    let worker = office.workshop.start().await;
    office.until_captured(2).await;
    office.until_ready().await;
    disk.fill(1 << 20);
    let rows = |from: usize| {
        format!(
            "INSERT INTO customers SELECT n, 'n' || n, repeat('x', 10000) FROM generate_series({from}, {from} + 299) n"
        )
    };
    office.database.execute(&rows(1000)).await;
    let reason = "the disk of the embedded log is full";
    office.until_not_ready(&[&format!("\"{}\"", office.capture), reason]).await;
    // It is killed, and started where nothing can be written.
    worker.kill9().await;
    let worker = office.workshop.start().await;
    office.until_not_ready(&[&format!("\"{}\"", office.capture), reason]).await;
    // What comes meanwhile: more rows, a connector, questions.
    office.database.execute(&rows(2000)).await;
    office
        .database
        .execute("CREATE TABLE public.orders (id int PRIMARY KEY); INSERT INTO public.orders VALUES (1)")
        .await;
    let second = format!("{}_second", office.capture);
    office.workshop.capture(&second, "public.orders");
    for _ in 0..20 {
        let (status, health) = office.workshop.get("/health/ready").await;
        let capture = office.workshop.connector_status(&office.capture).await;
        assert_ne!(capture["state"], "FAILED", "{status} {health}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    office.until_not_ready(&[&format!("\"{}\"", office.capture), reason]).await;
    disk.free();
    office.until_captured(602).await;
    office.until_ready().await;
    eventually(Duration::from_secs(60), "the second capture has its row", async || {
        let seen = office.workshop.connector_status(&second).await;
        let records = office.workshop.consume(&format!("{second}.public.orders")).await;
        if records.len() == 1 { Ok(()) } else { Err(format!("{} records; {seen}", records.len())) }
    })
    .await;
    let records = office.workshop.consume(&office.topic).await;
    let ids: Vec<i64> = records.iter().map(|record| record["value"]["after"]["id"].as_i64().unwrap()).collect();
    let expected: Vec<i64> = (1..=2).chain(1000..1300).chain(2000..2300).collect();
    assert_eq!(ids, expected, "each once, in order");
    // The sink's offsets could not be kept either: it may have sent some twice, and has missed none.
    eventually(Duration::from_secs(60), "all are delivered", async || {
        let events = office.crm.events();
        let seen: std::collections::BTreeSet<i64> =
            events.iter().filter_map(|event: &Value| event["id"].as_i64()).collect();
        if seen.len() == 602 { Ok(()) } else { Err(format!("{} of 602", seen.len())) }
    })
    .await;
    drop(worker);
}

/// As when a process has too many files open: the file is there, and opening it fails.
#[tokio::test]
async fn a_log_whose_file_can_not_be_opened_is_away_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(EmbeddedSettings::new(folder.path())).unwrap();
    log.ensure_topic(&topic("t", 1)).await.unwrap();
    write_numbers(&log, "t", 0, 10, 1).await;
    log.close().await.unwrap();
    let log = EmbeddedLog::open_reader(folder.path()).unwrap();
    // The reader that is there keeps its file: a second one beside it has to open it.
    let away = folder.path().join("away.db");
    std::fs::rename(folder.path().join("log.db"), &away).unwrap();
    let refused = log.reader("t", StartAt::Beginning, StopAt::End).await.err().expect("refused");
    assert!(matches!(refused, LogError::Unavailable(_)), "{refused}");
    std::fs::rename(&away, folder.path().join("log.db")).unwrap();
    assert_eq!(read_all(&log, "t").await.len(), 10);
}
