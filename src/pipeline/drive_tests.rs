//! The loop against scripted sources and destinations: a source of numbered batches that checks, at every
//! acknowledgement, that the number is the next one and that it and all before it are durable.

use std::collections::BTreeSet;
use std::sync::Mutex;

use async_trait::async_trait;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::pipeline::Written;

#[derive(Default)]
struct Seen {
    next: u64,
    acknowledged: u64,
    durable: BTreeSet<u64>,
    flying: usize,
    most_flying: usize,
    ticks_paused: usize,
    restarts: usize,
    closed: usize,
}

/// What goes wrong, and where. `chance` of a fault at every call, of which a third takes effect before it fails.
struct Script {
    seen: Mutex<Seen>,
    random: Mutex<StdRng>,
    chance: f64,
    /// The only batch that fails, and how, once.
    fails: Mutex<Option<(u64, Fault)>>,
    /// Batches that may become durable; closed to let all through.
    gate: Semaphore,
    last: u64,
}

impl Script {
    fn new(last: u64) -> Self {
        Script {
            seen: Mutex::default(),
            random: Mutex::new(StdRng::seed_from_u64(7)),
            chance: 0.0,
            fails: Mutex::default(),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            last,
        }
    }

    fn trip(&self, place: &str) -> Result<(), Fault> {
        let mut random = self.random.lock().unwrap();
        if !random.random_bool(self.chance) {
            return Ok(());
        }
        let after = Some(Duration::from_micros(random.random_range(0..500)));
        let kind = if random.random_bool(0.5) { FaultKind::Retry { after } } else { FaultKind::Unavailable { after } };
        Err(Fault { kind, message: place.to_owned() })
    }

    fn seen<T>(&self, read: impl FnOnce(&mut Seen) -> T) -> T {
        read(&mut self.seen.lock().unwrap())
    }
}

struct Numbers(Arc<Script>);

#[async_trait]
impl Source for Numbers {
    type Batch = u64;
    type Mark = u64;

    async fn next(&mut self) -> Result<Batch<u64, u64>, Fault> {
        tokio::task::yield_now().await;
        self.0.trip("next")?;
        let next = self.0.seen(|seen| seen.next);
        if next >= self.0.last {
            std::future::pending::<()>().await;
        }
        self.0.seen(|seen| seen.next = next + 1);
        Ok(Batch { body: next, mark: next, events: 1, bytes: 10 })
    }

    async fn acknowledge(&mut self, mark: u64) -> Result<(), Fault> {
        let trip = self.0.trip("acknowledge");
        if trip.is_err() && self.0.random.lock().unwrap().random_bool(0.7) {
            return trip;
        }
        self.0.seen(|seen| {
            assert_eq!(mark, seen.acknowledged, "acknowledged out of order");
            assert!((0..=mark).all(|batch| seen.durable.contains(&batch)), "{mark} acknowledged before durable");
            seen.acknowledged = mark + 1;
        });
        trip
    }

    async fn restart(&mut self) -> Result<(), Fault> {
        self.0.trip("restart of the source")?;
        self.0.seen(|seen| {
            seen.next = seen.acknowledged;
            seen.restarts += 1;
        });
        Ok(())
    }

    async fn tick(&mut self, paused: bool) -> Result<(), Fault> {
        self.0.seen(|seen| seen.ticks_paused += usize::from(paused));
        self.0.trip("tick")
    }

    async fn close(&mut self) -> Result<(), Fault> {
        self.0.seen(|seen| seen.closed += 1);
        Ok(())
    }
}

struct Shelf {
    script: Arc<Script>,
    window: usize,
    /// A write is accepted only while a permit is there.
    accepts: Option<Arc<Semaphore>>,
}

#[async_trait]
impl Destination for Shelf {
    type Batch = u64;

    async fn write(&mut self, batch: u64) -> Result<Written, Fault> {
        if let Some(accepts) = &self.accepts {
            accepts.acquire().await.unwrap().forget();
        }
        self.script.trip("write")?;
        self.script.seen(|seen| {
            seen.flying += 1;
            seen.most_flying = seen.most_flying.max(seen.flying);
        });
        let script = self.script.clone();
        let yields = script.random.lock().unwrap().random_range(0..8);
        Ok(Box::pin(async move {
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
            let _permit = script.gate.acquire().await;
            script.seen(|seen| seen.flying = seen.flying.saturating_sub(1));
            let mut fails = script.fails.lock().unwrap();
            if fails.as_ref().is_some_and(|(at, _)| *at == batch)
                && let Some((_, fault)) = fails.take()
            {
                return Err(fault);
            }
            let trip = script.trip("durable");
            if trip.is_ok() || script.random.lock().unwrap().random_bool(0.3) {
                script.seen(|seen| seen.durable.insert(batch));
            }
            trip.map(|()| Counts { applied: 1, ..Counts::default() })
        }))
    }

    fn window(&self) -> usize {
        self.window
    }

    async fn restart(&mut self) -> Result<(), Fault> {
        self.script.seen(|seen| seen.flying = 0);
        self.script.trip("restart of the destination")
    }
}

struct Running {
    script: Arc<Script>,
    signal: watch::Sender<Signal>,
    abort: CancellationToken,
    status: Arc<Status>,
    task: tokio::task::JoinHandle<Result<(), Fault>>,
}

impl Running {
    fn start(script: Script, window: usize, accepts: Option<Arc<Semaphore>>) -> Self {
        let script = Arc::new(script);
        let (signal, control) = watch::channel(Signal::Run);
        let abort = CancellationToken::new();
        let status = Arc::new(Status::default());
        let shelf = Shelf { script: script.clone(), window, accepts };
        let task = tokio::spawn(drive(
            Numbers(script.clone()),
            shelf,
            "test".into(),
            Control::new(control, abort.clone()),
            status.clone(),
        ));
        Running { script, signal, abort, status, task }
    }

    async fn until(&self, what: &str, done: impl Fn(&Seen, &Status) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(&self.script.seen.lock().unwrap(), &self.status) {
            assert!(Instant::now() < deadline, "never: {what}; the task ended: {}", self.task.is_finished());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn ended(self) -> Result<(), Fault> {
        timeout(Duration::from_secs(20), self.task).await.expect("the pipeline ends in time").expect("no panic")
    }
}

#[tokio::test]
async fn whatever_fails_everything_is_acknowledged_in_order_and_only_once_durable() {
    for seed in 0..40 {
        let mut script = Script::new(60);
        script.chance = 0.08;
        script.random = Mutex::new(StdRng::seed_from_u64(seed));
        let window = 1 + (seed as usize % 4);
        let running = Running::start(script, window, None);
        running.until("all acknowledged", |seen, _| seen.acknowledged == 60).await;
        running.signal.send_replace(Signal::Stop);
        let (script, status) = (running.script.clone(), running.status.clone());
        running.ended().await.unwrap();
        assert_eq!(status.state(), ConnectorState::Stopped);
        script.seen(|seen| {
            assert_eq!(seen.closed, 1);
            assert!(seen.most_flying <= window, "{} in flight, window {window}", seen.most_flying);
        });
    }
}

#[tokio::test]
async fn a_fault_that_needs_a_person_stops_after_what_came_before_is_acknowledged() {
    let script = Script::new(100);
    *script.fails.lock().unwrap() = Some((20, Fault::stop("disk is full")));
    let running = Running::start(script, 4, None);
    let (script, status) = (running.script.clone(), running.status.clone());
    assert_eq!(running.ended().await.unwrap_err().message, "disk is full");
    assert_eq!(status.state(), ConnectorState::Failed);
    assert_eq!(status.last_error().unwrap().1, "disk is full");
    script.seen(|seen| assert_eq!((seen.acknowledged, seen.closed), (20, 1)));
}

#[tokio::test]
async fn a_pause_lands_what_is_in_flight_and_keeps_the_source_alive() {
    let script = Script::new(u64::MAX);
    let running = Running::start(script, 4, None);
    running.until("some acknowledged", |seen, _| seen.acknowledged > 50).await;
    running.signal.send_replace(Signal::Pause);
    running.until("paused", |_, status| status.state() == ConnectorState::Paused).await;
    let at = running.script.seen(|seen| {
        assert_eq!(seen.next, seen.acknowledged, "something is in flight while paused");
        seen.acknowledged
    });
    running.until("a tick while paused", |seen, _| seen.ticks_paused > 0).await;
    assert_eq!(running.script.seen(|seen| seen.acknowledged), at);
    running.signal.send_replace(Signal::Run);
    running.until("going on", |seen, status| seen.acknowledged > at && status.state() == ConnectorState::Running).await;
    running.signal.send_replace(Signal::Stop);
    running.ended().await.unwrap();
}

#[tokio::test]
async fn a_stop_waits_for_what_is_in_flight_and_an_abort_does_not() {
    for abort in [false, true] {
        let mut script = Script::new(100);
        script.gate = Semaphore::new(0);
        let running = Running::start(script, 3, None);
        running.until("a full window", |seen, _| seen.flying == 3).await;
        running.signal.send_replace(Signal::Stop);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!running.task.is_finished(), "stopped with batches in flight");
        if abort {
            running.abort.cancel();
        } else {
            running.script.gate.close();
        }
        let script = running.script.clone();
        running.ended().await.unwrap();
        script.seen(|seen| assert_eq!(seen.acknowledged, if abort { 0 } else { 3 }));
    }
}

#[tokio::test]
async fn an_unavailable_destination_is_waited_for_as_long_as_it_asked() {
    let script = Script::new(30);
    let away = Duration::from_millis(300);
    *script.fails.lock().unwrap() = Some((10, Fault::unavailable("down for maintenance", Some(away))));
    let start = Instant::now();
    let running = Running::start(script, 2, None);
    running.until("waiting", |_, status| status.state() == ConnectorState::Waiting).await;
    assert_eq!(running.status.last_error().unwrap().1, "down for maintenance");
    running.until("all acknowledged", |seen, _| seen.acknowledged == 30).await;
    assert!(start.elapsed() >= away);
    assert_eq!(running.status.state(), ConnectorState::Running);
    assert_eq!(running.status.last_error(), None, "what is over is not shown any more");
    running.script.seen(|seen| assert_eq!(seen.restarts, 1));
    running.signal.send_replace(Signal::Stop);
    running.ended().await.unwrap();
}

#[tokio::test]
async fn batches_land_while_the_destination_is_slow_to_take_the_next() {
    let accepts = Arc::new(Semaphore::new(2));
    let running = Running::start(Script::new(100), 8, Some(accepts.clone()));
    running.until("the two that were taken", |seen, _| seen.acknowledged == 2).await;
    accepts.add_permits(1000);
    running.until("the rest", |seen, _| seen.acknowledged == 100).await;
    running.signal.send_replace(Signal::Stop);
    running.ended().await.unwrap();
}

#[tokio::test]
async fn a_wait_ends_when_told_to_stop() {
    let script = Script::new(30);
    *script.fails.lock().unwrap() = Some((5, Fault::unavailable("away", Some(Duration::from_secs(3600)))));
    let running = Running::start(script, 1, None);
    running.until("waiting", |_, status| status.state() == ConnectorState::Waiting).await;
    running.signal.send_replace(Signal::Stop);
    running.ended().await.unwrap();
}
