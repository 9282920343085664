//! One connector's lifecycle: started, restarted, paused, stopped; its task is owned here and its end is seen here.
//!
//! Invariant: at most one task of a connector runs at any time. A panic in it, or a fault that needs a person,
//! leaves the connector failed and shown so, and touches nothing else.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::kinds::Connector;
use super::resources::Resources;
use crate::pipeline::{ConnectorState, Control, Fault, FaultKind, ResetTo, Signal, Status, backoff};

/// After the drain's deadline everything is dropped; a task that still does not end after this is cut off.
pub const ABORT: Duration = Duration::from_secs(2);
const RESET: Duration = Duration::from_secs(120);
/// Commands of people that may wait for their turn; a connector that is being reset takes none meanwhile.
const MOST_WAITING: usize = 16;
/// A connector that has run this long starts its next backoff from the beginning.
const SETTLED: Duration = Duration::from_secs(60);

/// How long a command may take when connectors may drain for `drain`.
pub const fn longest(drain: Duration) -> Duration {
    drain.saturating_add(ABORT).saturating_add(RESET).saturating_add(Duration::from_secs(8))
}

enum Command {
    Pause,
    Resume,
    Restart(Option<Arc<dyn Connector>>),
    Reset(ResetTo, Option<Arc<dyn Connector>>, oneshot::Sender<Result<String, Fault>>),
    Stop(Duration),
}

/// The worker's hold on a connector. Dropping it stops the connector.
pub struct Keeper {
    /// Bounded by [`Keeper::is_busy`], which whoever passes on the commands of people asks first.
    commands: mpsc::UnboundedSender<Command>,
    waiting: Arc<AtomicUsize>,
    pub status: Arc<Status>,
    task: JoinHandle<()>,
}

impl Keeper {
    pub fn start(
        name: Arc<str>,
        connector: Arc<dyn Connector>,
        resources: Resources,
        paused: bool,
        drain: Duration,
    ) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        let status = Arc::new(Status::default());
        let waiting = Arc::new(AtomicUsize::new(0));
        let inbox = Inbox { commands: inbox, waiting: waiting.clone() };
        let keep = Keep {
            name,
            connector,
            resources,
            status: status.clone(),
            inbox,
            paused,
            drain,
            attempts: 0,
            restarted: Arc::default(),
        };
        Keeper { commands, waiting, status, task: tokio::spawn(keep.run()) }
    }

    /// So many commands wait already that no further one is to be given.
    pub fn is_busy(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) >= MOST_WAITING
    }

    fn send(&self, command: Command) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _ = self.commands.send(command);
    }

    pub fn pause(&self) {
        self.send(Command::Pause);
    }

    pub fn resume(&self) {
        self.send(Command::Resume);
    }

    /// Drains and starts again, with other settings where some are given.
    pub fn restart(&self, connector: Option<Arc<dyn Connector>>) {
        self.send(Command::Restart(connector));
    }

    /// Drains, moves the position, starts again, with other settings where some are given and the move went well.
    pub fn reset(
        &self,
        to: ResetTo,
        connector: Option<Arc<dyn Connector>>,
    ) -> impl Future<Output = Result<String, Fault>> + Send + use<> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Reset(to, connector, reply));
        async {
            answer.await.unwrap_or_else(|_| Err(Fault::stop("the connector was stopped before it could be reset")))
        }
    }

    /// Asks to drain within `deadline`; [`Keeper::ended`] or `wait` tell when it is over.
    pub fn stop(&self, deadline: Duration) {
        self.send(Command::Stop(deadline));
    }

    pub fn ended(&self) -> bool {
        self.task.is_finished()
    }

    pub async fn wait(&mut self) {
        let _ = (&mut self.task).await;
    }
}

struct Inbox {
    commands: mpsc::UnboundedReceiver<Command>,
    waiting: Arc<AtomicUsize>,
}

impl Inbox {
    async fn recv(&mut self) -> Option<Command> {
        let command = self.commands.recv().await?;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        Some(command)
    }
}

struct Keep {
    name: Arc<str>,
    connector: Arc<dyn Connector>,
    resources: Resources,
    status: Arc<Status>,
    inbox: Inbox,
    paused: bool,
    drain: Duration,
    /// Starts that ended in a passing fault, since the connector last ran for a while.
    attempts: u32,
    /// The next start is one that a person, or other settings, asked for.
    restarted: Arc<AtomicBool>,
}

/// What follows after a run, or after a command.
enum Next {
    Start,
    /// Until a command, or at the latest until then.
    Rest(Option<Instant>),
    End,
}

/// A running connector, and the leash on it.
struct Running {
    task: JoinHandle<Result<(), Fault>>,
    signal: watch::Sender<Signal>,
    abort: CancellationToken,
    since: Instant,
}

impl Keep {
    async fn run(mut self) {
        let mut next = Next::Start;
        loop {
            next = match next {
                Next::Start => self.work().await,
                Next::Rest(until) => self.rest(until).await,
                Next::End => break,
            };
        }
        if self.status.state() != ConnectorState::Failed {
            self.status.set_state(ConnectorState::Stopped);
        }
    }

    fn launch(&self) -> Running {
        let (signal, seen) = watch::channel(if self.paused { Signal::Pause } else { Signal::Run });
        let abort = CancellationToken::new();
        let control = Control::new(seen, abort.clone()).with_restarts(self.restarted.clone());
        let context = self.resources.context(self.name.clone(), control, self.status.clone());
        let connector = self.connector.clone();
        let task = tokio::spawn(async move { connector.run(context).await });
        Running { task, signal, abort, since: Instant::now() }
    }

    async fn work(&mut self) -> Next {
        self.status.set_state(ConnectorState::Starting);
        let mut running = self.launch();
        loop {
            let command = tokio::select! {
                biased;
                ended = &mut running.task => return self.ended(ended, running.since),
                command = self.inbox.recv() => command,
            };
            match command {
                Some(Command::Pause) => {
                    self.paused = true;
                    running.signal.send_replace(Signal::Pause);
                }
                Some(Command::Resume) => {
                    self.paused = false;
                    running.signal.send_replace(Signal::Run);
                }
                Some(command) => {
                    let deadline = if let Command::Stop(deadline) = command { deadline } else { self.drain };
                    self.halt(running, deadline).await;
                    return self.obey(command).await;
                }
                None => {
                    self.halt(running, self.drain).await;
                    return Next::End;
                }
            }
        }
    }

    /// Nothing runs: waits for a command, or for the time to try again.
    async fn rest(&mut self, until: Option<Instant>) -> Next {
        let tried = async {
            match until {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let command = tokio::select! {
            () = tried => return Next::Start,
            command = self.inbox.recv() => command,
        };
        match command {
            Some(Command::Pause) => {
                self.paused = true;
                Next::Rest(until)
            }
            Some(Command::Resume) => {
                self.paused = false;
                // Whoever says so has seen to what it failed over.
                if self.status.state() == ConnectorState::Failed { Next::Start } else { Next::Rest(until) }
            }
            Some(command) => self.obey(command).await,
            None => Next::End,
        }
    }

    /// Carries out what needs the connector to stand still.
    async fn obey(&mut self, command: Command) -> Next {
        self.attempts = 0;
        match command {
            Command::Restart(connector) => {
                if let Some(connector) = connector {
                    self.connector = connector;
                }
                self.restarted.store(true, Ordering::Relaxed);
                Next::Start
            }
            Command::Reset(to, connector, reply) => {
                let connector = connector.unwrap_or_else(|| self.connector.clone());
                let (_signal, seen) = watch::channel(Signal::Run);
                let control = Control::new(seen, CancellationToken::new());
                let context = self.resources.context(self.name.clone(), control, self.status.clone());
                let done = timeout(RESET, connector.reset(&context, &to)).await;
                let done = done.unwrap_or_else(|_| Err(Fault::retry(format!("no end after {RESET:?}"))));
                if done.is_ok() {
                    self.connector = connector;
                }
                let _ = reply.send(done);
                Next::Start
            }
            Command::Stop(_) => Next::End,
            Command::Pause | Command::Resume => Next::Start,
        }
    }

    /// Drains within the deadline; then drops what is in flight; then cuts off.
    async fn halt(&self, mut running: Running, deadline: Duration) {
        running.signal.send_replace(Signal::Stop);
        let ended = match timeout(deadline, &mut running.task).await {
            Ok(ended) => ended,
            Err(_) => {
                tracing::warn!(connector = %self.name, "not drained after {deadline:?}: dropping what is in flight");
                running.abort.cancel();
                match timeout(ABORT, &mut running.task).await {
                    Ok(ended) => ended,
                    Err(_) => {
                        running.task.abort();
                        return;
                    }
                }
            }
        };
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => tracing::warn!(connector = %self.name, "while stopping: {fault}"),
            Err(error) => tracing::error!(connector = %self.name, "while stopping: {}", panic_text(error)),
        }
    }

    fn ended(&mut self, ended: Result<Result<(), Fault>, JoinError>, since: Instant) -> Next {
        let fault = match ended {
            Ok(Ok(())) => {
                self.status.set_state(ConnectorState::Stopped);
                return Next::Rest(None);
            }
            Ok(Err(fault)) => fault,
            Err(error) => Fault::stop(format!("the connector panicked: {}", panic_text(error))),
        };
        self.status.set_error(fault.message.clone());
        if fault.kind == FaultKind::Stop {
            tracing::error!(connector = %self.name, "failed: {fault}");
            self.status.set_state(ConnectorState::Failed);
            return Next::Rest(None);
        }
        if since.elapsed() > SETTLED {
            self.attempts = 0;
        }
        self.attempts += 1;
        let pause = backoff::pause(fault.kind, self.attempts);
        tracing::warn!(connector = %self.name, attempt = self.attempts, retry_in = ?pause, "{fault}");
        self.status.set_state(ConnectorState::Waiting);
        Next::Rest(Some(Instant::now() + pause))
    }
}

fn panic_text(error: JoinError) -> String {
    if !error.is_panic() {
        return error.to_string();
    }
    let panic: Box<dyn Any + Send> = error.into_panic();
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().map_or("(no text)".to_owned(), |text| (*text).to_owned()),
    }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
