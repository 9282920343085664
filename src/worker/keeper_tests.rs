//! Lifecycle with scripted connectors: what one of them does ends with it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use serde_json::Value;

use super::*;
use crate::pipeline::{ConnectorContext, Plan};
use crate::worker::kinds::Identity;

/// Ends as the script says, one entry a start; after the last it works until told to stop.
struct Scripted {
    script: Mutex<Vec<Ending>>,
    starts: AtomicUsize,
    running: AtomicUsize,
    resets: Mutex<Vec<ResetTo>>,
}

enum Ending {
    Panic,
    Fault(Fault),
    Deaf,
}

impl Scripted {
    fn new(script: Vec<Ending>) -> Arc<Self> {
        Arc::new(Scripted {
            script: Mutex::new(script),
            starts: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            resets: Mutex::default(),
        })
    }
}

struct Count<'a>(&'a AtomicUsize);

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Connector for Scripted {
    fn identity(&self) -> Identity {
        BTreeMap::new()
    }

    fn groups(&self, _: &str) -> Vec<String> {
        Vec::new()
    }

    async fn run(&self, mut context: ConnectorContext) -> Result<(), Fault> {
        assert_eq!(self.running.fetch_add(1, Ordering::SeqCst), 0, "two tasks of one connector");
        let _count = Count(&self.running);
        self.starts.fetch_add(1, Ordering::SeqCst);
        let ending = {
            let mut script = self.script.lock().unwrap();
            if script.is_empty() { None } else { Some(script.remove(0)) }
        };
        match ending {
            Some(Ending::Panic) => panic!("boom at row 7"),
            Some(Ending::Fault(fault)) => return Err(fault),
            Some(Ending::Deaf) => {
                context.control.abort.cancelled().await;
                return Ok(());
            }
            None => {}
        }
        let mut seen = context.control.signal();
        while seen != Signal::Stop {
            context.status.set_state(match seen {
                Signal::Pause => ConnectorState::Paused,
                _ => ConnectorState::Running,
            });
            seen = context.control.changed_from(seen).await;
        }
        Ok(())
    }

    async fn plan(&self, _: &ConnectorContext) -> Result<Plan, Fault> {
        Ok(Plan::default())
    }

    async fn preview(&self, _: &ConnectorContext, _: usize) -> Result<Vec<Value>, Fault> {
        Ok(Vec::new())
    }

    async fn reset(&self, _: &ConnectorContext, to: &ResetTo) -> Result<String, Fault> {
        assert_eq!(self.running.load(Ordering::SeqCst), 0, "reset while running");
        self.resets.lock().unwrap().push(to.clone());
        Ok("moved".into())
    }
}

fn start(connector: &Arc<Scripted>, paused: bool, folder: &std::path::Path) -> Keeper {
    let resources = Resources::for_tests(folder);
    Keeper::start("test".into(), connector.clone(), resources, paused, Duration::from_secs(5))
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_panic_fails_its_connector_with_the_text_and_a_restart_brings_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let connector = Scripted::new(vec![Ending::Panic]);
    let mut keeper = start(&connector, false, folder.path());
    until("failed", || keeper.status.state() == ConnectorState::Failed).await;
    assert!(keeper.status.last_error().unwrap().1.contains("boom at row 7"));
    keeper.restart(None);
    until("running", || keeper.status.state() == ConnectorState::Running).await;
    keeper.stop(Duration::from_secs(5));
    timeout(Duration::from_secs(10), keeper.wait()).await.unwrap();
    assert_eq!(keeper.status.state(), ConnectorState::Stopped);
}

#[tokio::test]
async fn a_passing_fault_is_tried_again_and_one_that_needs_a_person_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let passing =
        || Ending::Fault(Fault { kind: FaultKind::Retry { after: Some(Duration::ZERO) }, message: "x".into() });
    let connector = Scripted::new(vec![passing(), passing(), Ending::Fault(Fault::stop("no such table"))]);
    let keeper = start(&connector, false, folder.path());
    until("failed", || keeper.status.state() == ConnectorState::Failed).await;
    assert_eq!(connector.starts.load(Ordering::SeqCst), 3);
    assert_eq!(keeper.status.last_error().unwrap().1, "no such table");
}

#[tokio::test]
async fn a_pause_is_kept_over_restarts_and_a_reset_moves_a_connector_that_stands_still() {
    let folder = tempfile::tempdir().unwrap();
    let connector = Scripted::new(vec![]);
    let keeper = start(&connector, true, folder.path());
    until("paused", || keeper.status.state() == ConnectorState::Paused).await;
    keeper.restart(None);
    until("started again", || connector.starts.load(Ordering::SeqCst) == 2).await;
    until("paused again", || keeper.status.state() == ConnectorState::Paused).await;
    assert_eq!(keeper.reset(ResetTo::End, None).await.unwrap(), "moved");
    assert_eq!(*connector.resets.lock().unwrap(), [ResetTo::End]);
    keeper.resume();
    until("running", || keeper.status.state() == ConnectorState::Running).await;
}

#[tokio::test]
async fn a_connector_that_does_not_drain_is_cut_off_after_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let connector = Scripted::new(vec![Ending::Deaf]);
    let mut keeper = start(&connector, false, folder.path());
    until("started", || connector.starts.load(Ordering::SeqCst) == 1).await;
    keeper.stop(Duration::from_millis(50));
    timeout(Duration::from_secs(10), keeper.wait()).await.unwrap();
    assert_eq!(connector.running.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_connector_that_failed_goes_on_when_it_is_told_to() {
    let folder = tempfile::tempdir().unwrap();
    let connector = Scripted::new(vec![Ending::Fault(Fault::stop("no such table"))]);
    let keeper = start(&connector, false, folder.path());
    until("failed", || keeper.status.state() == ConnectorState::Failed).await;
    keeper.pause();
    keeper.resume();
    until("running", || keeper.status.state() == ConnectorState::Running).await;
}

#[tokio::test]
async fn commands_that_wait_for_a_long_one_are_not_gathered_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let connector = Scripted::new(vec![Ending::Deaf]);
    let keeper = start(&connector, false, folder.path());
    until("started", || connector.starts.load(Ordering::SeqCst) == 1).await;
    // It does not drain, and so keeps the restart, and what comes after it, waiting.
    keeper.restart(None);
    until("the restart is under way", || keeper.waiting.load(Ordering::SeqCst) == 0).await;
    for _ in 0..MOST_WAITING {
        assert!(!keeper.is_busy());
        keeper.pause();
    }
    assert!(keeper.is_busy());
    until("they have had their turn", || !keeper.is_busy()).await;
    until("paused", || keeper.status.state() == ConnectorState::Paused).await;
}
