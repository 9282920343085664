//! What the worker remembers between runs, in its state folder: which connectors there were, under which identity,
//! and which are paused. One JSON file, replaced whole; a lock beside it keeps a second worker out.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::kinds::Identity;

const FILE: &str = "connectors.json";
const LOCK: &str = "worker.lock";

/// A connector that has run here at some time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    #[serde(rename = "type")]
    pub kind: String,
    pub file: PathBuf,
    pub identity: Identity,
    #[serde(default)]
    pub groups: Vec<String>,
    /// Where its slot is, if not in the datastore's server.
    #[serde(default)]
    pub server: Option<String>,
    #[serde(default)]
    pub paused: bool,
    /// Since when its file is gone, as an RFC 3339 time; its slot or consumer group is still there.
    #[serde(default)]
    pub orphaned_at: Option<String>,
}

/// The state folder, held by this process alone.
pub struct State {
    folder: PathBuf,
    connectors: BTreeMap<String, Remembered>,
    _lock: File,
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("another worker has the state folder {0}. hint: one worker a state folder; 'tidegate status' asks it")]
    Held(PathBuf),
    #[error("{path}: {source}. hint: the setting 'state' names a folder that this user can write")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is damaged ({source}). hint: move it away; pauses are then forgotten, positions are not in it")]
    Damaged { path: PathBuf, source: serde_json::Error },
}

impl State {
    /// Makes the folder where it is missing, and takes its lock.
    pub fn open(folder: &Path) -> Result<Self, StateError> {
        fs::create_dir_all(folder).map_err(|source| StateError::Io { path: folder.to_owned(), source })?;
        let path = folder.join(LOCK);
        let io = |source| StateError::Io { path: path.clone(), source };
        let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StateError::Held(folder.to_owned())),
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        let connectors = read(folder)?;
        Ok(State { folder: folder.to_owned(), connectors, _lock: lock })
    }

    pub fn get(&self, name: &str) -> Option<&Remembered> {
        self.connectors.get(name)
    }

    pub fn all(&self) -> impl Iterator<Item = (&str, &Remembered)> {
        self.connectors.iter().map(|(name, remembered)| (name.as_str(), remembered))
    }

    /// Changes what is remembered of `name` (made where it is new), durably; where that fails, not at all.
    pub fn update(&mut self, name: &str, change: impl FnOnce(&mut Remembered)) -> Result<(), StateError> {
        let before = self.connectors.get(name).cloned();
        let mut after = before.clone().unwrap_or_default();
        change(&mut after);
        if before.as_ref() == Some(&after) {
            return Ok(());
        }
        self.connectors.insert(name.to_owned(), after);
        self.save_or(name, before)
    }

    pub fn forget(&mut self, name: &str) -> Result<(), StateError> {
        match self.connectors.remove(name) {
            Some(before) => self.save_or(name, Some(before)),
            None => Ok(()),
        }
    }

    fn save_or(&mut self, name: &str, before: Option<Remembered>) -> Result<(), StateError> {
        let saved = self.save();
        if saved.is_err() {
            match before {
                Some(before) => drop(self.connectors.insert(name.to_owned(), before)),
                None => drop(self.connectors.remove(name)),
            }
        }
        saved
    }

    fn save(&self) -> Result<(), StateError> {
        let path = self.folder.join(FILE);
        let write = || -> io::Result<()> {
            let fresh = self.folder.join(format!("{FILE}.new"));
            let mut file = File::create(&fresh)?;
            file.write_all(&serde_json::to_vec_pretty(&self.connectors)?)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        write().map_err(|source| StateError::Io { path: path.clone(), source })
    }
}

/// What a worker remembers, read without its lock (by the command line, when no worker runs).
pub fn read(folder: &Path) -> Result<BTreeMap<String, Remembered>, StateError> {
    let path = folder.join(FILE);
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| StateError::Damaged { path, source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(source) => Err(StateError::Io { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_paused_is_paused_after_a_restart_and_a_second_worker_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = State::open(folder.path()).unwrap();
        state.update("shop", |shop| shop.paused = true).unwrap();
        assert!(matches!(State::open(folder.path()), Err(StateError::Held(_))));
        drop(state);
        assert!(State::open(folder.path()).unwrap().get("shop").unwrap().paused);
    }

    #[test]
    fn a_damaged_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), "{\"shop\":").unwrap();
        let error = State::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains("connectors.json is damaged"), "{error}");
    }

    #[test]
    fn what_could_not_be_saved_is_not_remembered_either() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = State::open(folder.path()).unwrap();
        state.update("shop", |shop| shop.kind = "a".into()).unwrap();
        // A folder in the new file's place: it can't be written, whoever asks.
        let taken = folder.path().join(format!("{FILE}.new"));
        fs::create_dir(&taken).unwrap();
        assert!(state.update("shop", |shop| shop.paused = true).is_err());
        assert!(state.update("more", |more| more.paused = true).is_err());
        assert!(state.forget("shop").is_err());
        fs::remove_dir(&taken).unwrap();
        state.update("other", |_| {}).unwrap();
        state.update("other", |other| other.kind = "b".into()).unwrap();
        assert!(!state.get("shop").unwrap().paused);
        assert_eq!(read(folder.path()).unwrap().keys().collect::<Vec<_>>(), ["other", "shop"]);
    }
}
