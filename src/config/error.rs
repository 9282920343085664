//! What is wrong in a file: where, what, and what would be right. Values that may be secret are never shown.

use std::fmt;

use super::Place;

/// One or several things wrong in a file.
///
/// `Display` gives, for each, `file:line:column: message`, the line of the file with a caret, and the hint.
#[derive(Clone)]
pub struct ConfigError(Box<Inside>);

#[derive(Clone)]
struct Inside {
    place: Place,
    message: String,
    hint: Option<String>,
    more: Vec<ConfigError>,
}

impl ConfigError {
    pub fn new(place: &Place, message: impl Into<String>) -> Self {
        ConfigError(Box::new(Inside { place: place.clone(), message: message.into(), hint: None, more: Vec::new() }))
    }

    /// What would be right.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Adds what else is wrong; shown after this.
    pub fn and(mut self, mut other: ConfigError) -> Self {
        let more = std::mem::take(&mut other.0.more);
        self.0.more.push(other);
        self.0.more.extend(more);
        self
    }

    /// All of `errors` as one, in the order they stand in the file; `Ok` when there is none.
    pub fn all(errors: Vec<ConfigError>) -> Result<(), ConfigError> {
        let mut flat: Vec<ConfigError> = errors.into_iter().flat_map(ConfigError::split).collect();
        flat.sort_by_key(|error| (error.0.place.line, error.0.place.column));
        match flat.into_iter().reduce(ConfigError::and) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Each thing that is wrong by itself.
    pub fn split(mut self) -> Vec<ConfigError> {
        let more = std::mem::take(&mut self.0.more);
        std::iter::once(self).chain(more).collect()
    }

    pub fn place(&self) -> &Place {
        &self.0.place
    }

    pub fn message(&self) -> &str {
        &self.0.message
    }

    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The line of the file, shortened around the place and without secrets, and the caret's offset in it in
    /// characters.
    pub fn snippet(&self) -> Option<(String, usize)> {
        let line = self.0.place.line_text()?;
        Some(shorten(&without_secrets(line), (self.0.place.column as usize).saturating_sub(1)))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inside { place, message, hint, more } = &*self.0;
        write!(out, "{place}: {message}")?;
        if let Some((line, caret)) = self.snippet() {
            let number = place.line.to_string();
            let width = number.len();
            write!(out, "\n  {number} | {line}\n  {0:width$} | {0:caret$}^", "")?;
        }
        if let Some(hint) = hint {
            write!(out, "\n  hint: {hint}")?;
        }
        for error in more {
            write!(out, "\n{error}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ConfigError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl std::error::Error for ConfigError {}

/// Replaces what stands after a name that tells of a secret, and passwords inside URLs. References (`${…}`) and jq
/// paths stay, since they are no secrets themselves.
fn without_secrets(line: &str) -> String {
    const TELLING: [&str; 8] = ["password", "passwd", "passphrase", "secret", "token", "api_key", "jaas", "credential"];
    let mut shown = line.replace('\t', " ");
    let lower = shown.to_ascii_lowercase();
    for name in TELLING {
        let Some(found) = lower.find(name) else { continue };
        let Some(colon) = lower[found..].find([':', '=']) else { continue };
        let value_at = found + colon + 1;
        // Only a colon that ends the name's own word.
        if lower[found..found + colon].contains(|other: char| !(other.is_alphanumeric() || "._-\"' ".contains(other))) {
            continue;
        }
        let value = shown[value_at..].trim_start_matches([' ', '"', '\'']);
        if !value.is_empty() && !value.starts_with(['$', '.', '|', '>', '[', '{', '#', '(']) {
            shown.truncate(value_at);
            shown.push_str(" ***");
            break;
        }
    }
    without_url_password(&shown)
}

/// `scheme://user:password@host` with the password replaced.
fn without_url_password(text: &str) -> String {
    let Some(scheme) = text.find("://") else { return text.to_owned() };
    let (head, rest) = text.split_at(scheme + 3);
    let authority = rest.find(['/', ' ', '"', '\'', '?']).unwrap_or(rest.len());
    let masked = match rest[..authority].rfind('@') {
        Some(at) => match rest[..at].find(':') {
            Some(colon) if !rest[colon + 1..at].starts_with("${") => {
                format!("{}:***{}", &rest[..colon], &rest[at..authority])
            }
            _ => rest[..authority].to_owned(),
        },
        None => rest[..authority].to_owned(),
    };
    format!("{head}{masked}{}", without_url_password(&rest[authority..]))
}

/// At most 120 characters of a line, with the caret among them.
fn shorten(line: &str, caret: usize) -> (String, usize) {
    const SHOWN: usize = 120;
    let length = line.chars().count();
    let caret = caret.min(length);
    if length <= SHOWN {
        return (line.to_owned(), caret);
    }
    let from = caret.saturating_sub(SHOWN / 2).min(length - SHOWN);
    let mut shown: String = line.chars().skip(from).take(SHOWN).collect();
    let mut caret = caret - from;
    if from > 0 {
        shown.insert_str(0, "… ");
        caret += 2;
    }
    if from + SHOWN < length {
        shown.push_str(" …");
    }
    (shown, caret)
}
