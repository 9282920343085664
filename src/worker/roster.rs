//! Which connectors run: the folder's files made true, one file at a time.
//!
//! Invariants (CORRECTNESS 24): a file that can't be read as settings changes nothing, the last good settings run
//! on; what identifies a connector (its name, and what its kind counts in) never changes under a running position;
//! whatever is wrong with one file concerns that file alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::folder::{self, Files, Text};
use super::keeper::Keeper;
use super::kinds::{self, Connector, Identity, World};
use super::observe::{LeftSlot, Watched};
use super::resources::Resources;
use super::state::{State, StateError};
use crate::config::{self, ConfigError, Place, Section, Spanned};
use crate::systems::System;

/// A connector file read well.
pub struct Loaded {
    pub name: String,
    pub kind: String,
    pub connector: Arc<dyn Connector>,
}

/// As [`load`], of a file that may not be readable.
pub fn load_file(path: &Path, text: &Text, world: &World<'_>) -> Result<Loaded, ConfigError> {
    load(path, readable(path, text)?, world)
}

/// A file's text; where it could not be read, the error that says why.
pub fn readable<'a>(path: &Path, text: &'a Text) -> Result<&'a str, ConfigError> {
    let unreadable = |why| ConfigError::new(&Place::start(path, ""), format!("cannot be read: {why}"));
    text.as_deref().map_err(unreadable)
}

/// Reads the text of one connector file; `path` is for errors.
pub fn load(path: &Path, text: &str, world: &World<'_>) -> Result<Loaded, ConfigError> {
    let node = config::parse_text(text, path.display().to_string())?;
    let mut section = Section::new(node, "connector")?;
    let name: Spanned<String> = section.require("name")?;
    if !is_name(&name) {
        return Err(ConfigError::new(&name.place, format!("`{}` can't be a connector's name", *name)).hint(
            "letters, digits, `-`, `_` and `.`, 100 at the most, not dots alone: it is part of topic and group names",
        ));
    }
    let kind: Spanned<String> = section.require("type")?;
    let connector = kinds::read(&kind, &mut section, world)?;
    section.finish()?;
    Ok(Loaded { name: name.value, kind: kind.value, connector })
}

/// Whether a connector may have this name. It is part of topics, groups and paths.
fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=100).contains(&name.len()) && name.chars().all(good) && !name.chars().all(|c| c == '.')
}

/// A running connector and where it came from.
pub struct Entry {
    pub file: PathBuf,
    pub kind: String,
    pub groups: Vec<String>,
    /// Its records may be parked.
    pub parks: bool,
    pub keeper: Keeper,
}

/// Something wrong with a file, told until it is put right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileProblem {
    pub file: PathBuf,
    /// The connector that runs on with its last good settings, if there is one.
    pub connector: Option<String>,
    pub message: String,
}

pub struct Roster {
    resources: Resources,
    systems: BTreeMap<String, Arc<System>>,
    folder: PathBuf,
    drain: Duration,
    state: State,
    entries: BTreeMap<String, Entry>,
    /// Texts last looked at, and which connector each file holds.
    applied: BTreeMap<PathBuf, Applied>,
    problems: BTreeMap<PathBuf, FileProblem>,
    /// Why the folder itself can't be read.
    folder_problem: Option<FileProblem>,
    /// Have a file, and start when those of the same name have left.
    later: BTreeSet<String>,
    /// Told to stop, not ended yet.
    leaving: Vec<(String, Keeper)>,
    /// What these have left is being removed: none of such a name starts meanwhile.
    forgetting: BTreeSet<String>,
    /// The worker stops: nothing starts any more.
    over: bool,
}

struct Applied {
    text: Text,
    name: Option<String>,
}

impl Roster {
    pub fn new(
        resources: Resources,
        systems: BTreeMap<String, Arc<System>>,
        folder: PathBuf,
        state: State,
        drain: Duration,
    ) -> Self {
        Roster {
            resources,
            systems,
            folder,
            drain,
            state,
            entries: BTreeMap::new(),
            applied: BTreeMap::new(),
            problems: BTreeMap::new(),
            folder_problem: None,
            later: BTreeSet::new(),
            leaving: Vec::new(),
            forgetting: BTreeSet::new(),
            over: false,
        }
    }

    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    pub fn problems(&self) -> impl Iterator<Item = &FileProblem> {
        self.folder_problem.iter().chain(self.problems.values())
    }

    /// What the observer looks at.
    pub fn watched(&self) -> Vec<Watched> {
        let watched = |(name, entry): (&String, &Entry)| Watched {
            name: name.clone(),
            status: entry.keeper.status.clone(),
            groups: entry.groups.clone(),
            parks: entry.parks,
        };
        self.entries.iter().map(watched).collect()
    }

    /// Slots in the datastore's server that nobody reads: of connectors without a file, and of those that are down.
    pub fn left_slots(&self) -> Vec<LeftSlot> {
        let down = |name: &str| match self.entries.get(name) {
            Some(entry) => {
                use crate::pipeline::ConnectorState::{Failed, Stopped, Waiting};
                matches!(entry.keeper.status.state(), Failed | Stopped | Waiting)
            }
            None => true,
        };
        let here = self.state.all().filter(|(name, known)| known.server.is_none() && down(name));
        here.filter(|(_, known)| kinds::has_slot(&known.identity))
            .map(|(name, known)| LeftSlot {
                connector: name.to_owned(),
                kind: known.kind.clone(),
                identity: known.identity.clone(),
            })
            .collect()
    }

    /// The folder can't be read (`Some`: why): what runs, runs on, and it is told.
    pub fn set_folder_problem(&mut self, folder: &Path, error: Option<String>) {
        self.folder_problem = error.map(|error| {
            let message = format!("the connectors folder can't be read: {error}");
            if self.folder_problem.is_none() {
                tracing::error!("{message}; what runs, runs on");
            }
            FileProblem { file: folder.to_owned(), connector: None, message }
        });
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// Makes what runs agree with the files. True: something waits for a connector to end; call again soon.
    pub fn apply(&mut self, files: &Files) -> bool {
        if self.over {
            return false;
        }
        self.leaving.retain(|(_, keeper)| !keeper.ended());
        let gone: Vec<PathBuf> = self.applied.keys().filter(|path| !files.contains_key(*path)).cloned().collect();
        for path in gone {
            if !self.renamed(&path, files) {
                self.removed(&path);
            }
        }
        self.later.clear();
        for (path, text) in files {
            let seen = self.applied.get(path);
            if seen.is_some_and(|seen| seen.text == *text) && !self.problems.contains_key(path) {
                continue;
            }
            match self.apply_file(path, text) {
                Ok(Outcome::Done) => {
                    self.problems.remove(path);
                }
                Ok(Outcome::Later(name)) => drop(self.later.insert(name)),
                Err(message) => self.problem(path, text, message),
            }
        }
        self.mark_orphans(files);
        !self.later.is_empty()
    }

    fn apply_file(&mut self, path: &Path, text: &Text) -> Result<Outcome, String> {
        let held = self.applied.get(path).and_then(|applied| applied.name.clone());
        let world = World { systems: &self.systems, state: &self.folder };
        let loaded = load_file(path, text, &world).map_err(|error| error.to_string())?;
        let name = loaded.name.as_str();
        if let Some(held) = held.filter(|held| held != name) {
            return Err(format!(
                "{}: the connector's name was '{held}' and is now '{name}'; its position belongs to the name.\n\
                 hint: put the old name back; or remove this file, run 'tidegate connectors forget {held}', and add \
                 it again under the new name, to start it anew",
                path.display()
            ));
        }
        if let Some(other) = self.entries.get(name).filter(|entry| entry.file != *path) {
            return Err(format!(
                "{}: a connector named '{name}' runs from {} already.\nhint: names are unique; change one",
                path.display(),
                other.file.display()
            ));
        }
        let identity = loaded.connector.identity();
        if let Some(known) = self.state.get(name) {
            same_identity(path, name, &loaded.kind, &identity, known)?;
        }
        if self.is_leaving(name) || self.forgetting.contains(name) {
            return Ok(Outcome::Later(loaded.name));
        }
        let groups = loaded.connector.groups(&loaded.name);
        let server = loaded.connector.server();
        self.remember(name, |known| {
            known.kind = loaded.kind.clone();
            known.file = path.to_owned();
            known.identity = identity;
            known.groups = groups.clone();
            known.server = server;
            known.orphaned_at = None;
        })
        .map_err(|error| error.to_string())?;
        match self.entries.get_mut(name) {
            Some(entry) => {
                tracing::info!(connector = name, "settings changed: restarting");
                (entry.groups, entry.kind) = (groups, loaded.kind);
                entry.keeper.restart(Some(loaded.connector));
            }
            None => {
                let paused = self.state.get(name).is_some_and(|known| known.paused);
                tracing::info!(connector = name, kind = loaded.kind, paused, "starting");
                let keeper = Keeper::start(name.into(), loaded.connector, self.resources.clone(), paused, self.drain);
                let parks = loaded.kind != "postgres-source";
                let entry = Entry { file: path.to_owned(), kind: loaded.kind, groups, parks, keeper };
                self.entries.insert(name.to_owned(), entry);
            }
        }
        self.applied.insert(path.to_owned(), Applied { text: text.clone(), name: Some(loaded.name) });
        Ok(Outcome::Done)
    }

    fn problem(&mut self, path: &Path, text: &Text, message: String) {
        let name = self.applied.get(path).and_then(|applied| applied.name.clone());
        let problem = FileProblem { file: path.to_owned(), connector: name.clone(), message };
        if self.problems.get(path) != Some(&problem) {
            match &name {
                Some(name) => tracing::error!(
                    connector = name,
                    "{}\nthe connector runs on with its last good settings",
                    problem.message
                ),
                None => tracing::error!("{}", problem.message),
            }
        }
        self.problems.insert(path.to_owned(), problem);
        self.applied.insert(path.to_owned(), Applied { text: text.clone(), name });
    }

    /// The file is there under another name: the connector runs on. Whether its text has changed is seen later.
    fn renamed(&mut self, path: &Path, files: &Files) -> bool {
        let Some(name) = self.applied.get(path).and_then(|applied| applied.name.clone()) else { return false };
        let world = World { systems: &self.systems, state: &self.folder };
        let new = files.iter().find(|(other, text)| {
            !self.applied.contains_key(*other) && load_file(other, text, &world).is_ok_and(|loaded| loaded.name == name)
        });
        let (Some((new, _)), Some(entry)) = (new, self.entries.get_mut(&name)) else { return false };
        tracing::info!(connector = name, "{} is now {}", path.display(), new.display());
        entry.file.clone_from(new);
        if let Some(applied) = self.applied.remove(path) {
            self.applied.insert(new.clone(), applied);
        }
        self.problems.remove(path);
        if let Err(error) = self.remember(&name, |known| known.file.clone_from(new)) {
            tracing::error!("{error}");
        }
        true
    }

    fn removed(&mut self, path: &Path) {
        self.problems.remove(path);
        let Some(Applied { name: Some(name), .. }) = self.applied.remove(path) else { return };
        let Some(entry) = self.entries.remove(&name) else { return };
        tracing::info!(connector = name, "{} is gone: stopping", path.display());
        entry.keeper.stop(self.drain);
        self.leaving.push((name, entry.keeper));
    }

    /// Connectors that are remembered and have no file any more.
    fn mark_orphans(&mut self, files: &Files) {
        let orphans: Vec<(String, Identity)> = self
            .state
            .all()
            .filter(|(name, known)| {
                let of_a_file = self.entries.contains_key(*name) || files.contains_key(&known.file);
                !of_a_file && known.orphaned_at.is_none() && !self.is_about_to_start(name)
            })
            .map(|(name, known)| (name.to_owned(), known.identity.clone()))
            .collect();
        for (name, identity) in orphans {
            warn_of_orphan(&name, &identity, None);
            let now = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
            if let Err(error) = self.remember(&name, |known| known.orphaned_at = Some(now)) {
                tracing::error!("{error}");
            }
        }
    }

    /// It has a file anew, under another path, and waits for its own end.
    fn is_about_to_start(&self, name: &str) -> bool {
        self.later.iter().any(|waiting| waiting == name)
    }

    /// Says again which removed connectors still hold something; `kept` knows the bytes of WAL by connector.
    pub fn warn_of_orphans(&self, kept: impl Fn(&str) -> Option<u64>) {
        for (name, known) in self.state.all() {
            if known.orphaned_at.is_some() {
                warn_of_orphan(name, &known.identity, kept(name));
            }
        }
    }

    /// Pauses or resumes, durably. `None`: no such connector.
    pub fn set_paused(&mut self, name: &str, paused: bool) -> Option<Result<(), StateError>> {
        self.entries.get(name)?;
        let saved = self.remember(name, |known| known.paused = paused);
        let entry = self.entries.get(name)?;
        if saved.is_ok() {
            if paused { entry.keeper.pause() } else { entry.keeper.resume() }
        }
        Some(saved)
    }

    /// Restarts with the file as it is now: what it refers to (secrets, say) is read anew.
    pub fn restart(&mut self, name: &str) -> Option<Result<(), String>> {
        let entry = self.entries.get(name)?;
        Some(self.load_again(&entry.file, name).and_then(|loaded| {
            if let Some(known) = self.state.get(name) {
                same_identity(&entry.file, name, &loaded.kind, &loaded.connector.identity(), known)?;
            }
            entry.keeper.restart(Some(loaded.connector));
            Ok(())
        }))
    }

    /// The connector as its file has it now, where that is of another identity than what is remembered.
    pub fn of_another_identity(&self, name: &str) -> Result<Option<Arc<dyn Connector>>, String> {
        let known = self.state.get(name).ok_or_else(|| format!("no connector '{name}'"))?;
        let loaded = self.load_again(&known.file, name)?;
        let same = loaded.connector.identity() == known.identity && loaded.kind == known.kind;
        Ok((!same).then_some(loaded.connector))
    }

    fn load_again(&self, file: &Path, name: &str) -> Result<Loaded, String> {
        let world = World { systems: &self.systems, state: &self.folder };
        let loaded = load_file(file, &folder::read_text(file), &world).map_err(|error| error.to_string())?;
        match loaded.name == name {
            true => Ok(loaded),
            false => Err(format!("{} holds '{}', not '{name}'", file.display(), loaded.name)),
        }
    }

    /// `connector`, reset already, is `name` from now on. What the old identity left (a slot) is remembered as an
    /// orphan of its own; says so.
    pub fn migrated(&mut self, name: &str, connector: Arc<dyn Connector>) -> Result<String, String> {
        let Some(before) = self.state.get(name).cloned() else { return Err(format!("no connector '{name}'")) };
        let identity = connector.identity();
        let mut left = String::new();
        if let Some(orphan) = kinds::orphan_of(name, &before.identity, &identity) {
            let now = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
            left = format!("; what it had before is left, 'tidegate connectors forget {orphan}' drops it");
            let remembered = super::state::Remembered { orphaned_at: Some(now), groups: Vec::new(), ..before.clone() };
            self.remember(&orphan, |known| *known = remembered).map_err(|error| error.to_string())?;
        }
        // The kind is taken from the file, which is looked at again.
        self.remember(name, |known| (known.identity, known.kind) = (identity, String::new()))
            .map_err(|error| error.to_string())?;
        if let Some(applied) = self.applied.get_mut(&before.file) {
            applied.text = Err("to be looked at again".to_owned());
        }
        Ok(left)
    }

    /// What a connector without a file is remembered by, `None` where nothing is; until [`Roster::end_forgetting`]
    /// none of its name starts.
    pub fn begin_forgetting(&mut self, name: &str) -> Result<Option<super::state::Remembered>, String> {
        if let Some(entry) = self.entries.get(name) {
            return Err(match entry.file.exists() {
                true => format!("'{name}' runs. hint: remove its file first"),
                false => format!("'{name}' runs still, its file is gone. hint: it is stopped in a moment: ask again"),
            });
        }
        if self.is_leaving(name) {
            return Err(format!("'{name}' is stopping still. hint: ask again in a moment"));
        }
        let Some(known) = self.state.get(name).cloned() else { return Ok(None) };
        if !self.forgetting.insert(name.to_owned()) {
            return Err(format!("'{name}' is being forgotten already"));
        }
        Ok(Some(known))
    }

    pub fn is_forgetting(&self, name: &str) -> bool {
        self.forgetting.contains(name)
    }

    /// What it had left is removed (`done`), or some of it could not be.
    pub fn end_forgetting(&mut self, name: &str, done: bool) -> Result<(), StateError> {
        self.forgetting.remove(name);
        if done { self.state.forget(name) } else { Ok(()) }
    }

    fn is_leaving(&self, name: &str) -> bool {
        self.leaving.iter().any(|(leaving, keeper)| leaving == name && !keeper.ended())
    }

    fn remember(&mut self, name: &str, change: impl FnOnce(&mut super::state::Remembered)) -> Result<(), StateError> {
        self.state.update(name, change)
    }

    /// Tells all to stop, and hands them over to be waited for.
    pub fn stop_all(&mut self, deadline: Duration) -> Vec<(String, Keeper)> {
        self.over = true;
        let mut all = std::mem::take(&mut self.leaving);
        for (name, entry) in std::mem::take(&mut self.entries) {
            entry.keeper.stop(deadline);
            all.push((name, entry.keeper));
        }
        all
    }
}

enum Outcome {
    Done,
    /// The connector that had this name before has not ended yet, or what it left is being removed.
    Later(String),
}

fn same_identity(
    path: &Path,
    name: &str,
    kind: &str,
    identity: &Identity,
    known: &super::state::Remembered,
) -> Result<(), String> {
    let mut changes = Vec::new();
    if known.kind != kind && !known.kind.is_empty() {
        changes.push(format!("type was '{}' and is now '{kind}'", known.kind));
    }
    for (setting, before) in &known.identity {
        match identity.get(setting) {
            Some(now) if now == before => {}
            Some(now) => changes.push(format!("{setting} was '{before}' and is now '{now}'")),
            None => changes.push(format!("{setting} was '{before}' and is no longer set")),
        }
    }
    if changes.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{}: {} of connector '{name}', which its position counts in.\n\
         hint: put it back; or 'tidegate connectors migrate {name}' starts it anew as the file says",
        path.display(),
        changes.join(", ")
    ))
}

fn warn_of_orphan(name: &str, identity: &Identity, kept: Option<u64>) {
    match identity.get("slot.name") {
        Some(slot) => tracing::warn!(
            connector = name,
            slot,
            wal_kept_bytes = kept,
            "the connector's file is gone and its replication slot '{slot}' is orphaned: the server keeps WAL for it, \
             until the disk is full. hint: put the file back, or drop the slot with 'tidegate connectors forget {name}'"
        ),
        None => tracing::warn!(
            connector = name,
            "the connector's file is gone; its position is kept. hint: 'tidegate connectors forget {name}' removes it"
        ),
    }
}
