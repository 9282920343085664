//! The loop: batches from a source to a destination, acknowledged in order, faults dealt with by their kind.
//!
//! Invariant: a mark is acknowledged only after its batch and every batch before it is durable; after a fault
//! nothing later than the failed batch is acknowledged before both sides have been restarted.
//!
//! Futures dropped by this loop, and when: `Source::next` at any time; `Destination::write` (before the batch is
//! accepted) after a fault; either side's `restart` when told to stop; everything on abort.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout, timeout_at};

use super::meters::Meters;
use super::{Batch, ConnectorContext, ConnectorState, Control, Counts, Destination, Fault, FaultKind, Signal, Source};
use super::{Status, backoff};

/// Bytes of batches in flight at which no further batch is asked for.
const MAX_BYTES_IN_FLIGHT: usize = 64 << 20;
const TICK: Duration = Duration::from_secs(1);
/// A batch that is not durable after this long means that the destination is stuck: shown, and told to the source.
const STALLED: Duration = Duration::from_secs(10);
/// How long batches in flight may take to land after a fault, before they are given up.
const SETTLE: Duration = Duration::from_secs(30);
/// Deadlines on calls that have their own, shorter ones: these catch a side that hangs.
const CALL: Duration = Duration::from_secs(120);
const RESTART: Duration = Duration::from_secs(600);
const CLOSE: Duration = Duration::from_secs(15);
/// Restarts without progress after which a connector is shown as waiting.
const QUIET_FAULTS: u32 = 3;

/// Moves batches from `source` to `destination` until told to stop (`Ok`: all in flight has landed and the source
/// is closed) or until a fault needs a person (`Err`: of kind [`FaultKind::Stop`]).
///
/// Passing faults are dealt with here: both sides are restarted, after a pause that grows while there is no
/// progress. On abort everything is dropped where it stands, and the result is `Ok`.
pub async fn run<S, D>(source: S, destination: D, context: &ConnectorContext) -> Result<(), Fault>
where
    S: Source,
    D: Destination<Batch = S::Batch>,
{
    drive(source, destination, context.name.clone(), context.control.clone(), context.status.clone()).await
}

async fn drive<S, D>(
    source: S,
    destination: D,
    name: Arc<str>,
    control: Control,
    status: Arc<Status>,
) -> Result<(), Fault>
where
    S: Source,
    D: Destination<Batch = S::Batch>,
{
    let abort = control.abort.clone();
    let mut tick = interval_at(Instant::now() + TICK, TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let meters = Meters::new(&name);
    let intake = Intake {
        source,
        flight: FuturesOrdered::new(),
        bytes: 0,
        landed_at: Instant::now(),
        tick,
        status,
        shown: None,
        faults: 0,
        told: None,
        meters,
    };
    let pipeline = Pipeline { name: name.clone(), intake, destination, control };
    tokio::select! {
        biased;
        () = abort.cancelled() => {
            tracing::warn!(connector = %name, "stopped at once; what was in flight is sent again at the next start");
            Ok(())
        }
        result = pipeline.run() => result,
    }
}

/// A fault, and which side it came from.
struct Broken {
    side: Side,
    fault: Fault,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    /// The source, over an acknowledgement: nothing after that one may be acknowledged.
    Acknowledging,
    Destination,
}

fn source_fault(fault: Fault) -> Broken {
    Broken { side: Side::Source, fault }
}

fn destination_fault(fault: Fault) -> Broken {
    Broken { side: Side::Destination, fault }
}

struct Pipeline<S: Source, D> {
    name: Arc<str>,
    intake: Intake<S>,
    destination: D,
    control: Control,
}

/// A batch that has landed, or failed to.
struct Landed<M> {
    mark: M,
    events: usize,
    bytes: usize,
    result: Result<Counts, Fault>,
}

/// The source, and the batches that are between it and the destination.
struct Intake<S: Source> {
    source: S,
    flight: FuturesOrdered<BoxFuture<'static, Landed<S::Mark>>>,
    bytes: usize,
    /// When the flight last moved: a batch landed, or the first one left.
    landed_at: Instant,
    tick: Interval,
    status: Arc<Status>,
    /// The state to go back to when a rest (pause, wait) is over.
    shown: Option<ConnectorState>,
    /// Faults since a batch was last acknowledged.
    faults: u32,
    /// The passing fault that the status shows.
    told: Option<String>,
    meters: Meters,
}

impl<S, D> Pipeline<S, D>
where
    S: Source,
    D: Destination<Batch = S::Batch>,
{
    async fn run(mut self) -> Result<(), Fault> {
        loop {
            let Err(broken) = self.steady().await else { return self.close().await };
            let mut broken = self.settle(broken).await;
            loop {
                if broken.fault.kind == FaultKind::Stop {
                    return self.fail(broken.fault).await;
                }
                if !self.rest(&broken).await {
                    return self.close().await;
                }
                match self.restart().await {
                    Ok(true) => break,
                    Ok(false) => return self.close().await,
                    Err(again) => broken = again,
                }
            }
        }
    }

    /// Moves batches until told to stop and nothing is in flight (`Ok`), or until a fault.
    async fn steady(&mut self) -> Result<(), Broken> {
        loop {
            let signal = self.control.signal();
            let empty = self.intake.flight.is_empty();
            match signal {
                Signal::Stop if empty => return Ok(()),
                Signal::Pause if empty => self.intake.show_rest(ConnectorState::Paused),
                Signal::Run if self.intake.status.state() == ConnectorState::Paused => self.intake.show_work(),
                _ => {}
            }
            let room = signal == Signal::Run
                && self.intake.flight.len() < self.destination.window().max(1)
                && (empty || self.intake.bytes < MAX_BYTES_IN_FLIGHT);
            let intake = &mut self.intake;
            let batch = tokio::select! {
                biased;
                _ = self.control.changed_from(signal) => continue,
                Some(landed) = intake.flight.next(), if !empty => {
                    intake.land(landed).await?;
                    continue;
                }
                _ = intake.tick.tick() => {
                    intake.ticked(signal != Signal::Run).await?;
                    continue;
                }
                batch = intake.source.next(), if room => batch.map_err(source_fault)?,
            };
            self.send(batch).await?;
        }
    }

    /// Hands a batch over; while the destination takes its time, others land and the source ticks.
    async fn send(&mut self, batch: Batch<S::Batch, S::Mark>) -> Result<(), Broken> {
        let Batch { body, mark, events, bytes } = batch;
        let intake = &mut self.intake;
        let mut write = pin!(self.destination.write(body));
        if intake.flight.is_empty() {
            intake.landed_at = Instant::now();
        }
        let written = loop {
            let empty = intake.flight.is_empty();
            tokio::select! {
                biased;
                written = &mut write => break written.map_err(destination_fault)?,
                Some(landed) = intake.flight.next(), if !empty => intake.land(landed).await?,
                _ = intake.tick.tick() => intake.ticked(false).await?,
            }
        };
        intake.bytes += bytes;
        intake.meters.in_flight(intake.bytes);
        intake.flight.push_back(Box::pin(async move { Landed { mark, events, bytes, result: written.await } }));
        Ok(())
    }

    /// After a fault, lets what is in flight land, so that no write is cut in the middle. What landed before the
    /// first failed batch is acknowledged. Gives back the fault that decides: one that needs a person wins.
    async fn settle(&mut self, mut broken: Broken) -> Broken {
        let intake = &mut self.intake;
        let mut acknowledging = broken.side == Side::Source;
        let deadline = Instant::now() + SETTLE;
        while let Ok(Some(landed)) = timeout_at(deadline, intake.flight.next()).await {
            if !acknowledging {
                continue;
            }
            if let Err(also) = intake.land(landed).await {
                acknowledging = false;
                if also.fault.kind == FaultKind::Stop {
                    broken = also;
                }
            }
        }
        intake.flight = FuturesOrdered::new();
        intake.bytes = 0;
        intake.meters.in_flight(0);
        broken
    }

    /// Waits as the fault's kind asks. False: told to stop meanwhile.
    async fn rest(&mut self, broken: &Broken) -> bool {
        self.intake.faults = self.intake.faults.saturating_add(1);
        let faults = self.intake.faults;
        let pause = backoff::pause(broken.fault.kind, faults);
        self.intake.status.set_error(broken.fault.message.clone());
        self.intake.told = Some(broken.fault.message.clone());
        self.intake.meters.fault();
        let unavailable = matches!(broken.fault.kind, FaultKind::Unavailable { .. });
        if unavailable || faults > QUIET_FAULTS {
            self.intake.show_rest(ConnectorState::Waiting);
        }
        tracing::warn!(connector = %self.name, attempt = faults, retry_in = ?pause, "{}", broken.fault);
        let until = Instant::now() + pause;
        // A source that is well itself keeps its connection while the destination is away.
        let mut alive = broken.side == Side::Destination;
        loop {
            let signal = self.control.signal();
            if signal == Signal::Stop {
                return false;
            }
            tokio::select! {
                biased;
                _ = self.control.changed_from(signal) => {}
                () = tokio::time::sleep_until(until) => return true,
                _ = self.intake.tick.tick(), if alive => {
                    if let Ok(Err(fault)) = timeout(CALL, self.intake.source.tick(true)).await {
                        tracing::warn!(connector = %self.name, "{fault}");
                        alive = false;
                    }
                }
            }
        }
    }

    /// Restarts both sides; the destination first, since the source may ask it where to go on. False: told to stop.
    async fn restart(&mut self) -> Result<bool, Broken> {
        let stop = async {
            let mut control = self.control.clone();
            let mut seen = control.signal();
            while seen != Signal::Stop {
                seen = control.changed_from(seen).await;
            }
        };
        let both = async {
            let late = |side: &str| Fault::retry(format!("the {side} took longer than {RESTART:?} to restart"));
            timeout(RESTART, self.destination.restart())
                .await
                .unwrap_or_else(|_| Err(late("destination")))
                .map_err(destination_fault)?;
            timeout(RESTART, self.intake.source.restart())
                .await
                .unwrap_or_else(|_| Err(late("source")))
                .map_err(source_fault)
        };
        tokio::select! {
            biased;
            () = stop => Ok(false),
            done = both => done.map(|()| true),
        }
    }

    async fn close(mut self) -> Result<(), Fault> {
        match timeout(CLOSE, self.intake.source.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => tracing::warn!(connector = %self.name, "while closing: {fault}"),
            Err(_) => tracing::warn!(connector = %self.name, "the source took longer than {CLOSE:?} to close"),
        }
        self.intake.status.set_state(ConnectorState::Stopped);
        Ok(())
    }

    async fn fail(mut self, fault: Fault) -> Result<(), Fault> {
        tracing::error!(connector = %self.name, "{fault}");
        self.intake.meters.fault();
        let _ = timeout(CLOSE, self.intake.source.close()).await;
        self.intake.status.set_error(fault.message.clone());
        self.intake.status.set_state(ConnectorState::Failed);
        Err(fault)
    }
}

impl<S: Source> Intake<S> {
    /// A batch at the head of the flight has landed: count it and acknowledge it.
    async fn land(&mut self, landed: Landed<S::Mark>) -> Result<(), Broken> {
        self.bytes -= landed.bytes.min(self.bytes);
        self.meters.in_flight(self.bytes);
        let counts = landed.result.map_err(destination_fault)?;
        timeout(CALL, self.source.acknowledge(landed.mark))
            .await
            .unwrap_or_else(|_| Err(Fault::retry(format!("the source took longer than {CALL:?} to acknowledge"))))
            .map_err(|fault| Broken { side: Side::Acknowledging, fault })?;
        self.landed_at = Instant::now();
        self.faults = 0;
        // The fault is over. What others have told since (records that were parked) stays.
        if let Some(fault) = self.told.take()
            && self.status.last_error().is_some_and(|(_, shown)| shown == fault)
        {
            self.status.clear_error();
        }
        self.status.add(counts);
        self.meters.landed(landed.events, &counts);
        self.show_work();
        Ok(())
    }

    async fn ticked(&mut self, paused: bool) -> Result<(), Broken> {
        let stalled = self.stalled();
        if stalled && !paused {
            self.status.set_error(format!(
                "a batch is not durable after {} s: the destination does not answer",
                self.landed_at.elapsed().as_secs()
            ));
            self.show_rest(ConnectorState::Waiting);
        }
        timeout(CALL, self.source.tick(paused || stalled))
            .await
            .unwrap_or_else(|_| Err(Fault::retry(format!("the source took longer than {CALL:?} to tick"))))
            .map_err(source_fault)?;
        if !paused && self.flight.is_empty() {
            self.show_work();
        }
        Ok(())
    }

    /// Nothing in flight has moved for long: no batch has landed, nor anything within one.
    fn stalled(&self) -> bool {
        let within = self.status.moved().is_some_and(|moved| moved.elapsed() <= STALLED);
        !self.flight.is_empty() && !within && self.landed_at.elapsed() > STALLED
    }

    /// Shows a state of rest, remembering the working state that it interrupts.
    fn show_rest(&mut self, rest: ConnectorState) {
        let now = self.status.state();
        if now == rest {
            return;
        }
        if matches!(now, ConnectorState::Starting | ConnectorState::Snapshot | ConnectorState::Running) {
            self.shown = Some(now);
        }
        self.status.set_state(rest);
    }

    /// Things move: back to the state that a rest interrupted. A source may have set a newer one itself, which stays.
    /// A wait is over only here, with something landed or both sides well, so that it does not flicker; and a source
    /// that has not begun to read is at work on nothing yet.
    fn show_work(&mut self) {
        let now = self.status.state();
        if !matches!(now, ConnectorState::Starting | ConnectorState::Paused | ConnectorState::Waiting) {
            return;
        }
        if self.source.is_reading() {
            let shown = self.shown.take().filter(|shown| *shown != ConnectorState::Starting);
            self.status.set_state(shown.unwrap_or(ConnectorState::Running));
        } else if now == ConnectorState::Paused {
            self.status.set_state(ConnectorState::Starting);
        }
    }
}

#[cfg(test)]
#[path = "drive_tests.rs"]
mod tests;
