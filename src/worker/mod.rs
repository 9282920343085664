//! The running worker: kinds of connectors, the watched folder, lifecycle, health.
//!
//! [`Worker::start`] opens what the settings name, then runs every connector of the folder; [`Worker::stop`]
//! drains them. Every task has its owner here: the folder's watcher, the observer, one keeper a connector.

mod absent;
pub mod dead_letters;
mod folder;
mod keeper;
pub mod kinds;
mod observe;
mod questions;
mod report;
mod resources;
mod roster;
mod settings;
pub mod state;

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use folder::Folder;
use state::State;

pub use folder::{Files, Text, read_text};
pub use keeper::{Keeper, longest};
pub use kinds::World;
pub use report::{ConnectorReport, Health, LossReport, Orphan, StatusReport, Trouble};
pub use resources::{Access, OpenError, Resources, open_log, open_registry};
pub use roster::{FileProblem, Loaded, load, load_file, readable};
pub use settings::{LogSettings, RegistrySettings, RestSettings, WorkerSettings, is_log_level};

use crate::pipeline::{Fault, ResetTo};
use observe::Observer;
use roster::Roster;

/// How long after the drain's deadline the worker waits for connectors that were cut off.
const CUT_OFF: Duration = keeper::ABORT.saturating_add(Duration::from_secs(1));
const CLOSE: Duration = Duration::from_secs(3);
const ORPHANS: Duration = Duration::from_secs(600);
/// How soon a file that was refused is tried again: what it refers to (a secret) may be there by then.
const REFUSED: Duration = Duration::from_secs(5);
/// For a command that is the worker's own, not a connector's.
const COMMAND: Duration = Duration::from_secs(120);

/// Why a command on a connector could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("there is no connector '{name}'{}", if .known.is_empty() { String::new() } else { format!("; there are: {}", .known.join(", ")) })]
    Unknown { name: String, known: Vec<String> },
    #[error("{0}")]
    Failed(String),
}

/// The worker of one state folder. Cheap to clone.
#[derive(Clone)]
pub struct Worker {
    inside: Arc<Inside>,
}

struct Inside {
    settings: WorkerSettings,
    resources: Resources,
    roster: Mutex<Roster>,
    observer: Observer,
    /// A command asks for another look at the folder.
    look: Notify,
    ending: CancellationToken,
    /// What each does, and itself.
    tasks: std::sync::Mutex<Vec<(&'static str, JoinHandle<()>)>>,
    /// Commands that are carried out to their end, whether or not whoever gave them still waits.
    commands: TaskTracker,
}

impl Worker {
    /// Takes the state folder, opens log and registry, and starts every connector there is a file for.
    pub async fn start(settings: WorkerSettings) -> Result<Self, OpenError> {
        let state = State::open(&settings.state)?;
        let mut folder = Folder::watch(&settings.connectors).map_err(|error| {
            OpenError::Folder(format!(
                "the connectors folder {}: {error}. hint: the setting 'connectors' names it",
                settings.connectors.display()
            ))
        })?;
        let files = folder.read().map_err(|error| OpenError::Folder(error.to_string()))?;
        let resources = Resources::open(&settings).await?;
        let roster =
            Roster::new(resources.clone(), settings.systems.clone(), settings.state.clone(), state, settings.drain);
        let worker = Worker {
            inside: Arc::new(Inside {
                observer: Observer::default(),
                settings,
                resources,
                roster: Mutex::new(roster),
                look: Notify::new(),
                ending: CancellationToken::new(),
                tasks: std::sync::Mutex::default(),
                commands: TaskTracker::new(),
            }),
        };
        let again = worker.inside.roster.lock().await.apply(&files);
        let tasks = [
            ("follows the connectors folder", tokio::spawn(worker.clone().follow_folder(folder, files, again))),
            ("looks at the connectors", tokio::spawn(worker.clone().observe())),
        ];
        worker.tasks().extend(tasks);
        Ok(worker)
    }

    fn tasks(&self) -> std::sync::MutexGuard<'_, Vec<(&'static str, JoinHandle<()>)>> {
        self.inside.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn settings(&self) -> &WorkerSettings {
        &self.inside.settings
    }

    pub fn resources(&self) -> &Resources {
        &self.inside.resources
    }

    async fn follow_folder(self, mut folder: Folder, mut files: Files, mut again: bool) {
        let every = |period| {
            let mut ticks = tokio::time::interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        };
        let (mut soon, mut refused) = (every(Duration::from_millis(100)), every(REFUSED));
        let mut orphans = every(ORPHANS);
        loop {
            {
                // Kept while others are seen to: it measures how long the files have rested.
                let mut changed = pin!(folder.changed());
                loop {
                    tokio::select! {
                        () = self.inside.ending.cancelled() => return,
                        () = &mut changed => break,
                        () = self.inside.look.notified() => {}
                        _ = soon.tick(), if again => {}
                        _ = refused.tick() => {}
                        _ = orphans.tick() => {
                            let kept = |name: &str| self.inside.observer.slot(name).map(|slot| slot.kept_bytes);
                            self.inside.roster.lock().await.warn_of_orphans(kept);
                            continue;
                        }
                    }
                    again = self.inside.roster.lock().await.apply(&files);
                }
            }
            let read = folder.read();
            let mut roster = self.inside.roster.lock().await;
            roster.set_folder_problem(&self.inside.settings.connectors, read.as_ref().err().map(ToString::to_string));
            if let Ok(read) = read {
                files = read;
                again = roster.apply(&files);
            }
        }
    }

    async fn observe(self) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                () = self.inside.ending.cancelled() => return,
                _ = tick.tick() => {}
            }
            let (connectors, left) = {
                let roster = self.inside.roster.lock().await;
                (roster.watched(), roster.left_slots())
            };
            self.inside.observer.look(&connectors, left, &self.inside.resources, &self.inside.settings);
            let ready = self.health().await.ready;
            metrics::gauge!("tidegate_ready").set(f64::from(u8::from(ready)));
        }
    }

    pub async fn status(&self) -> StatusReport {
        let roster = self.inside.roster.lock().await;
        let broken = if self.inside.ending.is_cancelled() { Vec::new() } else { broken(&self.tasks()) };
        report::status(&roster, &self.inside.observer, &self.inside.resources, broken)
    }

    pub async fn health(&self) -> Health {
        self.status().await.health
    }

    pub async fn set_paused(&self, name: &str, paused: bool) -> Result<(), CommandError> {
        let mut roster = self.inside.roster.lock().await;
        takes_commands(&roster, name)?;
        match roster.set_paused(name, paused) {
            Some(saved) => saved.map_err(|error| CommandError::Failed(error.to_string())),
            None => Err(unknown(&roster, name)),
        }
    }

    pub async fn restart(&self, name: &str) -> Result<(), CommandError> {
        let mut roster = self.inside.roster.lock().await;
        takes_commands(&roster, name)?;
        match roster.restart(name) {
            Some(started) => started.map_err(CommandError::Failed),
            None => Err(unknown(&roster, name)),
        }
    }

    /// Stops the connector, moves it, starts it again; says in one line what was done.
    pub async fn reset(&self, name: &str, to: ResetTo) -> Result<String, CommandError> {
        let reset = {
            let roster = self.inside.roster.lock().await;
            takes_commands(&roster, name)?;
            match roster.get(name) {
                Some(entry) => entry.keeper.reset(to, None),
                None => return Err(unknown(&roster, name)),
            }
        };
        // Without the lock: a drain takes its time.
        reset.await.map_err(|fault| CommandError::Failed(fault.to_string()))
    }

    /// Starts the connector anew under the identity that its file has now; the old slot stays, as an orphan.
    pub async fn migrate(&self, name: &str) -> Result<String, CommandError> {
        let (worker, name) = (self.clone(), name.to_owned());
        self.to_the_end(async move { worker.migrate_now(&name).await }).await
    }

    async fn migrate_now(&self, name: &str) -> Result<String, CommandError> {
        let failed = |fault: Fault| CommandError::Failed(fault.to_string());
        let (connector, running) = {
            let roster = self.inside.roster.lock().await;
            takes_commands(&roster, name)?;
            let Some(connector) = roster.of_another_identity(name).map_err(CommandError::Failed)? else {
                return Ok(format!("'{name}' is as its file says; nothing to do"));
            };
            let reset = roster.get(name).map(|entry| entry.keeper.reset(ResetTo::Beginning, Some(connector.clone())));
            (connector, reset)
        };
        // Without the lock: a drain takes its time. A position of the old identity would be taken for a loss.
        let said = match running {
            Some(reset) => reset.await.map_err(failed)?,
            None => {
                let context = self.inside.resources.still(name);
                in_time(connector.reset(&context, &ResetTo::Beginning)).await.map_err(failed)?
            }
        };
        let left = self.inside.roster.lock().await.migrated(name, connector).map_err(CommandError::Failed)?;
        self.inside.look.notify_one();
        Ok(format!("'{name}' starts anew as its file says: {said}{left}"))
    }

    /// Removes what a connector without a file has left (its slot, its consumer group), then forgets it.
    pub async fn forget(&self, name: &str, keep_slot: bool) -> Result<String, CommandError> {
        let (worker, name) = (self.clone(), name.to_owned());
        self.to_the_end(async move { worker.forget_now(&name, keep_slot).await }).await
    }

    async fn forget_now(&self, name: &str, keep_slot: bool) -> Result<String, CommandError> {
        let known = {
            let mut roster = self.inside.roster.lock().await;
            let known = roster.begin_forgetting(name).map_err(CommandError::Failed)?;
            known.ok_or_else(|| unknown(&roster, name))?
        };
        // Without the lock: servers are asked. A file of its name that comes meanwhile waits.
        let said = in_time(self.inside.resources.forget(name, &known, keep_slot)).await;
        let ended = self.inside.roster.lock().await.end_forgetting(name, said.is_ok());
        self.inside.look.notify_one();
        let said = said.map_err(|fault| CommandError::Failed(fault.to_string()))?;
        ended.map_err(|error| CommandError::Failed(error.to_string()))?;
        Ok(said)
    }

    /// Carries out a command of several steps, all of them, also when whoever gave it has gone in between.
    async fn to_the_end(
        &self,
        command: impl Future<Output = Result<String, CommandError>> + Send + 'static,
    ) -> Result<String, CommandError> {
        let broken = |error: tokio::task::JoinError| CommandError::Failed(format!("the command broke off: {error}"));
        self.inside.commands.spawn(command).await.unwrap_or_else(|error| Err(broken(error)))
    }

    /// Drains every connector within the deadline of the settings, then closes the log.
    pub async fn stop(&self) -> Result<(), Fault> {
        let drain = self.inside.settings.drain;
        self.inside.ending.cancel();
        let leaving = self.inside.roster.lock().await.stop_all(drain);
        let tasks = std::mem::take(&mut *self.tasks());
        self.inside.commands.close();
        let all = async {
            for (name, mut keeper) in leaving {
                keeper.wait().await;
                tracing::debug!(connector = name, "stopped");
            }
            for (_, task) in tasks {
                let _ = task.await;
            }
            self.inside.commands.wait().await;
        };
        if timeout(drain + CUT_OFF, all).await.is_err() {
            tracing::warn!("some connectors did not stop in time; what they had in flight is done again at the start");
        }
        match timeout(CLOSE, self.inside.resources.close()).await {
            Ok(closed) => closed,
            Err(_) => Err(Fault::retry(format!("the log did not close within {CLOSE:?}"))),
        }
    }
}

/// Tasks of the worker's own that have ended while it runs.
fn broken(tasks: &[(&'static str, JoinHandle<()>)]) -> Vec<Trouble> {
    let ended = tasks.iter().filter(|(_, task)| task.is_finished());
    let trouble = |(does, _): &(&'static str, JoinHandle<()>)| Trouble {
        what: "worker".to_owned(),
        message: format!("what {does} has broken down; hint: restart the worker, its log says why"),
    };
    ended.map(trouble).collect()
}

async fn in_time<T>(work: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    let late = |_| Err(Fault::retry(format!("no end after {COMMAND:?}")));
    timeout(COMMAND, work).await.unwrap_or_else(late)
}

/// A connector in the middle of a long command gathers no endless row of further ones.
fn takes_commands(roster: &Roster, name: &str) -> Result<(), CommandError> {
    match roster.get(name) {
        _ if roster.is_forgetting(name) => {
            Err(CommandError::Failed(format!("'{name}' is being forgotten. hint: ask again in a moment")))
        }
        Some(entry) if entry.keeper.is_busy() => Err(CommandError::Failed(format!(
            "'{name}' has commands waiting already. hint: 'tidegate status' shows what it does; ask again later"
        ))),
        _ => Ok(()),
    }
}

fn unknown(roster: &Roster, name: &str) -> CommandError {
    CommandError::Unknown { name: name.to_owned(), known: roster.entries().map(|(name, _)| name.to_owned()).collect() }
}

/// Reads every connector file of a folder, for commands that look without running. In the order of the paths.
pub fn read_folder(folder: &Path) -> std::io::Result<Files> {
    folder::read_files(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_of_the_workers_own_that_breaks_down_is_told() {
        let well = tokio::spawn(std::future::pending());
        let mut panics = tokio::spawn(async { panic!("as it may be") });
        assert!((&mut panics).await.is_err());
        let told = broken(&[("rests", well), ("follows", panics)]);
        assert_eq!(told.len(), 1);
        assert!(told[0].message.contains("what follows has broken down"), "{}", told[0].message);
    }
}
