//! Where a setting stands: file, line and column, and the text of the file to show it in an error.

use std::fmt;
use std::ops::Deref;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// A file as it was read. Every place in it holds it, so that an error can show its line.
struct Source {
    path: Box<Path>,
    text: Box<str>,
}

/// A place in a file. Lines and columns count from 1, columns in characters. Cheap to clone.
#[derive(Clone)]
pub struct Place {
    source: Arc<Source>,
    pub line: u32,
    pub column: u32,
}

impl Place {
    /// The beginning of a file whose text is `text`.
    pub fn start(path: &Path, text: &str) -> Self {
        Place { source: Arc::new(Source { path: path.into(), text: text.into() }), line: 1, column: 1 }
    }

    /// A place outside of files: what a setting given on the command line, or made by a test, stands at.
    pub fn outside(name: &str) -> Self {
        Place::start(Path::new(name), "")
    }

    /// Another place in the same file.
    pub fn at(&self, line: u32, column: u32) -> Self {
        Place { source: Arc::clone(&self.source), line, column }
    }

    pub fn file(&self) -> &Path {
        &self.source.path
    }

    /// A path that this file names: a relative one starts at the file's folder.
    pub fn beside(&self, path: &Path) -> PathBuf {
        beside(self.file().parent().unwrap_or(Path::new("")), path)
    }

    /// The line of the file this place is in, without its end. `None` outside of files.
    pub fn line_text(&self) -> Option<&str> {
        self.source.text.lines().nth((self.line as usize).checked_sub(1)?)
    }

    /// The whole text of the file.
    pub(crate) fn file_text(&self) -> &str {
        &self.source.text
    }
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}:{}", self.file().display(), self.line, self.column)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        self.line == other.line && self.column == other.column && self.file() == other.file()
    }
}

impl Eq for Place {}

/// A value and the place it was read from.
///
/// A value that a reference (`${env:…}`, `${file:…}`) went into is masked: `Debug` does not show it, and whoever
/// makes an error of it must ask [`Spanned::masked`] first.
#[derive(Clone, PartialEq, Eq)]
pub struct Spanned<T> {
    pub value: T,
    pub place: Place,
    masked: bool,
}

impl<T> Spanned<T> {
    pub fn new(value: T, place: Place) -> Self {
        Spanned { value, place, masked: false }
    }

    pub(super) fn mask(mut self, masked: bool) -> Self {
        self.masked = masked;
        self
    }

    /// Whether the value may hold a secret, and must not be shown.
    pub fn masked(&self) -> bool {
        self.masked
    }

    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Spanned<U> {
        Spanned { value: change(self.value), place: self.place, masked: self.masked }
    }
}

impl Spanned<String> {
    /// The place of the character at byte `offset` of the value, inside a block or quotes too. Where the text in the
    /// file cannot be followed (references were replaced, an alias), the beginning of the value.
    pub fn place_in(&self, offset: usize) -> Place {
        let found = super::locate::locate(&self.place, &self.value, offset);
        found.map_or_else(|| self.place.clone(), |(line, column)| self.place.at(line, column))
    }

    /// A part of the value, standing at its own place.
    pub fn part(&self, range: std::ops::Range<usize>) -> Spanned<String> {
        let value = self.value.get(range.clone()).unwrap_or_default().to_owned();
        Spanned { value, place: self.place_in(range.start), masked: self.masked }
    }
}

impl<T> Deref for Spanned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: fmt::Debug> fmt::Debug for Spanned<T> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.masked {
            write!(out, "*** at {}", self.place)
        } else {
            write!(out, "{:?} at {}", self.value, self.place)
        }
    }
}

/// `path` as seen from `folder`, with `config/../connectors` shortened to `connectors`.
fn beside(folder: &Path, path: &Path) -> PathBuf {
    let mut whole = PathBuf::new();
    for part in folder.join(path).components() {
        let inside = matches!(whole.components().next_back(), Some(Component::Normal(_)));
        match part {
            Component::ParentDir if inside => {
                whole.pop();
            }
            Component::CurDir => {}
            part => whole.push(part),
        }
    }
    if whole.as_os_str().is_empty() { PathBuf::from(".") } else { whole }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_count_from_the_files_folder() {
        for (folder, path, whole) in [
            ("config", "../connectors/", "connectors"),
            ("config", "..", "."),
            ("", "../up", "../up"),
            ("/etc/tidegate", "./connectors", "/etc/tidegate/connectors"),
            ("config", "/var/lib/tidegate", "/var/lib/tidegate"),
            ("../../a", "../b", "../../b"),
        ] {
            assert_eq!(beside(Path::new(folder), Path::new(path)), Path::new(whole), "{folder} {path}");
        }
    }
}
