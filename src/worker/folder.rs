//! The connectors folder, watched: says which files there are once they have stopped changing.
//!
//! A burst of events is one change; a file that is being written is looked at once it rests; a file that is gone
//! for a moment only (an editor replaces it) never seemed to be gone. The system's file events make it quick, and a
//! look every few seconds makes it sure where there are none (network mounts). A file that can't be read is there all
//! the same, with the reason instead of its text: that concerns no other file.

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
/// A longer file is no connector's.
const LARGEST: u64 = 4 << 20;

/// Connector files by path.
pub type Files = BTreeMap<PathBuf, Text>;
/// A file's text, or why it can't be read.
pub type Text = Result<String, String>;

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
    /// The folder, or a file of it, could not be read when it was last looked at.
    unreadable: bool,
    /// Something has happened in it that [`Folder::changed`] has not seen to the end.
    stirred: bool,
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
        Ok(Folder {
            path: path.to_owned(),
            events,
            _watcher: watcher.ok(),
            seen: Stamps::new(),
            unreadable: false,
            stirred: false,
        })
    }

    /// The files as they are now.
    pub fn read(&mut self) -> io::Result<Files> {
        self.unreadable = true;
        let stamps = stamps(&self.path)?;
        let files = read_texts(stamps.keys());
        (self.seen, self.unreadable) = (stamps, files.values().any(Result::is_err));
        Ok(files)
    }

    /// Waits until the folder differs from what was read last, and rests; or until something of it can't be read,
    /// which is for [`Folder::read`] to say. Safe to drop at its await; how long files have rested counts anew then.
    pub async fn changed(&mut self) {
        loop {
            if !self.stirred {
                match timeout(LOOK, self.events.recv()).await {
                    Ok(Some(())) | Err(_) => {}
                    Ok(None) => tokio::time::sleep(LOOK).await,
                }
                self.stirred = true;
            }
            let other = self.rested().await.is_none_or(|rested| rested != self.seen);
            self.stirred = false;
            if other || self.unreadable {
                return;
            }
        }
    }

    /// The folder as it is when it has not changed for a while; `None` when it can't be read.
    async fn rested(&self) -> Option<Stamps> {
        let mut last = stamps(&self.path).ok()?;
        if last == self.seen && !self.unreadable {
            return Some(last);
        }
        loop {
            let missing = self.seen.keys().any(|path| !last.contains_key(path));
            tokio::time::sleep(if missing { GONE } else { REST }).await;
            let now = stamps(&self.path).ok()?;
            if now == last {
                return Some(now);
            }
            last = now;
        }
    }
}

/// The connector files of a folder, for whoever looks once.
pub fn read_files(folder: &Path) -> io::Result<Files> {
    Ok(read_texts(stamps(folder)?.keys()))
}

/// One file's text.
pub fn read_text(path: &Path) -> Text {
    let read = || {
        let size = std::fs::metadata(path)?.len();
        if size > LARGEST {
            return Err(io::Error::other(format!("it has {size} bytes, more than {LARGEST}")));
        }
        std::fs::read(path)
    };
    // What is no text, the parser says, with the place.
    read().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).map_err(|error| error.to_string())
}

fn read_texts<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Files {
    // Gone since it was listed: the folder is looked at again.
    paths
        .map(|path| (path.clone(), read_text(path)))
        .filter(|(path, text)| text.is_ok() || path.try_exists().unwrap_or(true))
        .collect()
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
            // A link to nothing; or it went since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(_) => {}
            // It is there, and no connector is to end because a disk or a mount does not answer.
            Err(_) => drop(stamps.insert(path, Stamp { size: 0, modified: None, file: (0, 0) })),
        }
    }
    Ok(stamps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_that_is_not_there_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        std::fs::write(place("well.yaml"), "name: well").unwrap();
        std::fs::create_dir(place("folder.yaml")).unwrap();
        std::os::unix::fs::symlink("nothing", place("gone.yaml")).unwrap();
        // What a mount that does not answer does, too: the name is there, and asking for more is an error.
        std::os::unix::fs::symlink("round.yaml", place("round.yaml")).unwrap();
        std::os::unix::fs::symlink("well.yaml/none", place("through.yaml")).unwrap();
        let files = Folder::watch(folder.path()).unwrap().read().unwrap();
        let seen: Vec<_> = files.iter().map(|(path, text)| (path.clone(), text.is_ok())).collect();
        assert_eq!(seen, [(place("round.yaml"), false), (place("through.yaml"), false), (place("well.yaml"), true)]);
    }

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
        assert_eq!(watch.read().unwrap()[&file].as_deref(), Ok("whole"));
        assert!(timeout(Duration::from_millis(700), watch.changed()).await.is_err(), "changed without a change");
        std::fs::write(folder.path().join(".hidden.yaml"), "x").unwrap();
        std::fs::write(folder.path().join("notes.txt"), "x").unwrap();
        assert!(timeout(Duration::from_millis(700), watch.changed()).await.is_err(), "changed by another's file");
        std::fs::remove_file(&file).unwrap();
        timeout(Duration::from_secs(20), watch.changed()).await.unwrap();
        assert!(watch.read().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_wait_that_is_dropped_again_and_again_loses_no_news() {
        let folder = tempfile::tempdir().unwrap();
        let mut watch = Folder::watch(folder.path()).unwrap();
        watch.read().unwrap();
        let began = std::time::Instant::now();
        std::fs::write(folder.path().join("a.yaml"), "one").unwrap();
        // As long as the wait is dropped before the file has rested, nothing is said; the next whole wait says it, and
        // not only the look that comes every few seconds.
        while began.elapsed() < REST * 3 {
            assert!(timeout(REST / 3, watch.changed()).await.is_err());
        }
        timeout(LOOK / 2, watch.changed()).await.expect("the news was lost");
        assert_eq!(watch.read().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_keeps_no_other_from_being_read() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("good.yaml"), "one").unwrap();
        let bad = folder.path().join("bad.yaml");
        // To read it fails, whoever asks.
        std::os::unix::fs::symlink("/proc/self/mem", &bad).unwrap();
        let long = std::fs::File::create(folder.path().join("long.yaml")).unwrap();
        long.set_len(LARGEST + 1).unwrap();
        let mut watch = Folder::watch(folder.path()).unwrap();
        let files = watch.read().unwrap();
        assert_eq!(files.len(), 3);
        assert_eq!(files[&folder.path().join("good.yaml")].as_deref(), Ok("one"));
        assert!(files[&bad].is_err());
        assert!(files[&folder.path().join("long.yaml")].as_ref().unwrap_err().contains("more than"));
        // It is looked at again, though nothing of it seems to change.
        timeout(LOOK * 2, watch.changed()).await.unwrap();
    }
}
