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

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use folder::{Files, Folder};
use state::State;

pub use keeper::{Keeper, longest};
pub use kinds::World;
pub use report::{ConnectorReport, Health, LossReport, Orphan, StatusReport, Trouble};
pub use resources::{Access, OpenError, Resources, open_log, open_registry};
pub use roster::{FileProblem, Loaded, load};
pub use settings::{LogSettings, RegistrySettings, RestSettings, WorkerSettings, is_log_level};

use crate::pipeline::{Fault, ResetTo};
use observe::Observer;
use roster::Roster;

/// How long after the drain's deadline the worker waits for connectors that were cut off.
const CUT_OFF: Duration = keeper::ABORT.saturating_add(Duration::from_secs(1));
const CLOSE: Duration = Duration::from_secs(3);
const ORPHANS: Duration = Duration::from_secs(600);

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
    tasks: std::sync::Mutex<Vec<JoinHandle<()>>>,
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
            }),
        };
        let again = worker.inside.roster.lock().await.apply(&files);
        let tasks =
            [tokio::spawn(worker.clone().follow_folder(folder, files, again)), tokio::spawn(worker.clone().observe())];
        worker.inside.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner).extend(tasks);
        Ok(worker)
    }

    pub fn settings(&self) -> &WorkerSettings {
        &self.inside.settings
    }

    pub fn resources(&self) -> &Resources {
        &self.inside.resources
    }

    async fn follow_folder(self, mut folder: Folder, mut files: Files, mut again: bool) {
        let mut orphans = tokio::time::interval(ORPHANS);
        loop {
            let soon = async {
                if again {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                } else {
                    std::future::pending().await
                }
            };
            tokio::select! {
                () = self.inside.ending.cancelled() => return,
                () = folder.changed() => {
                    let read = folder.read();
                    let error = read.as_ref().err().map(ToString::to_string);
                    self.inside.roster.lock().await.set_folder_problem(&self.inside.settings.connectors, error);
                    let Ok(read) = read else { continue };
                    files = read;
                }
                () = self.inside.look.notified() => {}
                () = soon => {}
                _ = orphans.tick() => {
                    let kept = |name: &str| self.inside.observer.slot(name).map(|slot| slot.kept_bytes);
                    self.inside.roster.lock().await.warn_of_orphans(kept);
                    continue;
                }
            }
            again = self.inside.roster.lock().await.apply(&files);
        }
    }

    async fn observe(self) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
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
        report::status(&roster, &self.inside.observer, &self.inside.resources)
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
                connector.reset(&context, &ResetTo::Beginning).await.map_err(failed)?
            }
        };
        let left = self.inside.roster.lock().await.migrated(name, connector).map_err(CommandError::Failed)?;
        self.inside.look.notify_one();
        Ok(format!("'{name}' starts anew as its file says: {said}{left}"))
    }

    /// Removes what a connector without a file has left (its slot, its consumer group), then forgets it.
    pub async fn forget(&self, name: &str, keep_slot: bool) -> Result<String, CommandError> {
        let known = {
            let roster = self.inside.roster.lock().await;
            if roster.get(name).is_some() {
                return Err(CommandError::Failed(format!("'{name}' runs. hint: remove its file first")));
            }
            roster.state().get(name).cloned().ok_or_else(|| unknown(&roster, name))?
        };
        let said = self
            .inside
            .resources
            .forget(name, &known, keep_slot)
            .await
            .map_err(|fault: Fault| CommandError::Failed(fault.to_string()))?;
        self.inside.roster.lock().await.forget(name).map_err(CommandError::Failed)?;
        Ok(said)
    }

    /// Drains every connector within the deadline of the settings, then closes the log.
    pub async fn stop(&self) -> Result<(), Fault> {
        let drain = self.inside.settings.drain;
        self.inside.ending.cancel();
        let leaving = self.inside.roster.lock().await.stop_all(drain);
        let tasks = std::mem::take(&mut *self.inside.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        let all = async {
            for (name, mut keeper) in leaving {
                keeper.wait().await;
                tracing::debug!(connector = name, "stopped");
            }
            for task in tasks {
                let _ = task.await;
            }
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

/// A connector in the middle of a long command gathers no endless row of further ones.
fn takes_commands(roster: &Roster, name: &str) -> Result<(), CommandError> {
    match roster.get(name) {
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
pub fn read_folder(folder: &Path) -> std::io::Result<BTreeMap<std::path::PathBuf, String>> {
    folder::read_files(folder)
}
