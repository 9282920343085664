//! The connectors folder, watched: says which files there are once they have stopped changing.
//!
//! A burst of events is one change; a file that is being written is looked at once it rests; a file that is gone
//! for a moment only (an editor replaces it) never seemed to be gone. The system's file events make it quick, and a
//! look every few seconds makes it sure where there are none (network mounts).

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// A file rests when it has not changed for this long.
const REST: Duration = Duration::from_millis(300);
/// A file is gone when it has been missing for this long.
const GONE: Duration = Duration::from_millis(1500);
const LOOK: Duration = Duration::from_secs(10);

/// Connector files by path, with their text.
pub type Files = BTreeMap<PathBuf, String>;

/// What tells that a file is another than before: its size, its time, and (for links that were turned to another
/// file, as Kubernetes does) which file it is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified: Option<SystemTime>,
    file: (u64, u64),
}

type Stamps = BTreeMap<PathBuf, Stamp>;

pub struct Folder {
    path: PathBuf,
    events: mpsc::Receiver<()>,
    /// `None` where the system has no file events to give.
    _watcher: Option<notify::RecommendedWatcher>,
    seen: Stamps,
    /// The folder could not be read when it was last looked at.
    unreadable: bool,
}

impl Folder {
    /// Starts watching. A folder that is missing is an error; one without file events is looked at regularly.
    pub fn watch(path: &Path) -> io::Result<Self> {
        std::fs::read_dir(path)?;
        let (sender, events) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // To look at the folder opens it, which is an event too: taking it for news would look for ever.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                let _ = sender.try_send(());
            }
        })
        .and_then(|mut watcher| watcher.watch(path, RecursiveMode::NonRecursive).map(|()| watcher));
        if let Err(error) = &watcher {
            tracing::warn!("no file events for {}: looking every {LOOK:?} instead ({error})", path.display());
        }
        Ok(Folder { path: path.to_owned(), events, _watcher: watcher.ok(), seen: Stamps::new(), unreadable: false })
    }

    /// The files as they are now.
    pub fn read(&mut self) -> io::Result<Files> {
        self.unreadable = true;
        let stamps = stamps(&self.path)?;
        let files = read_texts(stamps.keys())?;
        (self.seen, self.unreadable) = (stamps, false);
        Ok(files)
    }

    /// Waits until the folder differs from what was read last, and rests; or until it can't be read, which is for
    /// [`Folder::read`] to say. Safe to drop at its await.
    pub async fn changed(&mut self) {
        loop {
            match timeout(LOOK, self.events.recv()).await {
                Ok(Some(())) | Err(_) => {}
                Ok(None) => tokio::time::sleep(LOOK).await,
            }
            let Ok(mut last) = stamps(&self.path) else { return };
            if last == self.seen && !self.unreadable {
                continue;
            }
            loop {
                let missing = self.seen.keys().any(|path| !last.contains_key(path));
                tokio::time::sleep(if missing { GONE } else { REST }).await;
                let Ok(now) = stamps(&self.path) else { return };
                if now == last {
                    break;
                }
                last = now;
            }
            if last != self.seen || self.unreadable {
                return;
            }
        }
    }
}

/// The connector files of a folder, for whoever looks once.
pub fn read_files(folder: &Path) -> io::Result<Files> {
    read_texts(stamps(folder)?.keys())
}

fn read_texts<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> io::Result<Files> {
    let mut files = Files::new();
    for path in paths {
        match std::fs::read(path) {
            // What is no text, the parser says, with the place.
            Ok(bytes) => files.insert(path.clone(), String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        };
    }
    Ok(files)
}

/// Sizes and times of the connector files: `*.yaml`, `*.yml`, `*.json`, save hidden ones.
fn stamps(folder: &Path) -> io::Result<Stamps> {
    let mut stamps = Stamps::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or(".");
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
        if name.starts_with('.') || !matches!(extension, "yaml" | "yml" | "json") {
            continue;
        }
        match std::fs::metadata(&path) {
            Ok(about) if about.is_file() => {
                let file = (about.dev(), about.ino());
                stamps.insert(path, Stamp { size: about.len(), modified: about.modified().ok(), file });
            }
            _ => {}
        }
    }
    Ok(stamps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn looking_at_the_folder_is_no_news() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.yaml"), "one").unwrap();
        let mut watch = Folder::watch(folder.path()).unwrap();
        for _ in 0..3 {
            watch.read().unwrap();
            assert!(timeout(Duration::from_millis(200), watch.events.recv()).await.is_err());
        }
        std::fs::write(folder.path().join("b.yaml"), "two").unwrap();
        timeout(Duration::from_secs(20), watch.events.recv()).await.unwrap();
    }

    #[tokio::test]
    async fn a_burst_of_writes_is_one_change_and_a_replaced_file_is_never_gone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.yaml");
        std::fs::write(&file, "one").unwrap();
        let mut watch = Folder::watch(folder.path()).unwrap();
        assert_eq!(watch.read().unwrap().len(), 1);
        let path = file.clone();
        let writer = tokio::spawn(async move {
            std::fs::remove_file(&path).unwrap();
            for part in 0..5 {
                tokio::time::sleep(Duration::from_millis(100)).await;
                std::fs::write(&path, "x".repeat(part)).unwrap();
            }
            std::fs::write(&path, "whole").unwrap();
        });
        timeout(Duration::from_secs(20), watch.changed()).await.unwrap();
        writer.await.unwrap();
        assert_eq!(watch.read().unwrap()[&file], "whole");
        assert!(timeout(Duration::from_millis(700), watch.changed()).await.is_err(), "changed without a change");
        std::fs::write(folder.path().join(".hidden.yaml"), "x").unwrap();
        std::fs::write(folder.path().join("notes.txt"), "x").unwrap();
        assert!(timeout(Duration::from_millis(700), watch.changed()).await.is_err(), "changed by another's file");
        std::fs::remove_file(&file).unwrap();
        timeout(Duration::from_secs(20), watch.changed()).await.unwrap();
        assert!(watch.read().unwrap().is_empty());
    }
}
