//! `${env:NAME}`, `${env:NAME:-default}`, `${file:PATH}`, `${file:PATH:KEY}` in scalars.
//!
//! `$${` stands for a literal `${`; `${word}` without a colon is left alone, as Kafka Connect does, unless it looks like the
//! name of an environment variable. What a reference
//! gives is never put into an error.

use std::path::{Path, PathBuf};

use super::{ConfigError, NodeKind, Place, yaml};

/// The largest file that `${file:…}` reads.
const LARGEST: u64 = 1 << 20;

/// Replaces the references in `text`; whether there was one.
pub(super) fn replace(text: &str, place: &Place) -> Result<(String, bool), ConfigError> {
    let mut replaced = String::with_capacity(text.len());
    let mut masked = false;
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, reference) = rest.split_at(at);
        if let Some(before) = before.strip_suffix('$') {
            replaced.push_str(before);
            replaced.push_str("${");
            rest = &reference[2..];
            continue;
        }
        replaced.push_str(before);
        let word_ends = reference[2..].find(|c: char| !c.is_ascii_alphanumeric() && c != '_').map(|end| end + 2);
        let Some(colon) = word_ends.filter(|end| reference[*end..].starts_with(':') && *end > 2) else {
            refuse_slip(reference, place)?;
            replaced.push_str("${");
            rest = &reference[2..];
            continue;
        };
        let Some(end) = reference.find('}') else {
            return Err(ConfigError::new(place, "`${` without its `}`")
                .hint("write `$${` for a literal `${`, or end the reference: ${env:NAME}"));
        };
        let argument = &reference[colon + 1..end];
        match &reference[2..colon] {
            "env" => replaced.push_str(&from_env(argument, place)?),
            "file" => replaced.push_str(&from_file(argument, place)?),
            other => {
                return Err(ConfigError::new(
                    place,
                    format!("`${{{other}:…}}` is not a reference that Tidegate knows"),
                )
                .hint(
                    "${env:NAME}, ${env:NAME:-default}, ${file:PATH} and ${file:PATH:KEY} are; `$${` is a literal `${`",
                ));
            }
        }
        masked = true;
        rest = &reference[end + 1..];
    }
    replaced.push_str(rest);
    Ok((replaced, masked))
}

/// `${NAME}` and `${env.NAME}`, as other tools write it, would be sent as they stand.
fn refuse_slip(reference: &str, place: &Place) -> Result<(), ConfigError> {
    let Some(word) = reference[2..].split_once('}').map(|(word, _)| word) else { return Ok(()) };
    let name = word.strip_prefix("env.").unwrap_or(word);
    let is_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    if name.is_empty() || !name.chars().all(is_name) || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Ok(());
    }
    Err(ConfigError::new(place, format!("`${{{word}}}` is not a reference that Tidegate knows"))
        .hint(format!("${{env:{name}}} is the environment variable; `$${{{word}}}` is the text as it stands")))
}

fn from_env(argument: &str, place: &Place) -> Result<String, ConfigError> {
    let (name, default) = match argument.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (argument, None),
    };
    if name.is_empty() || name.contains(['=', '\0', ' ', ':']) {
        return Err(ConfigError::new(place, format!("`{name}` cannot be the name of an environment variable"))
            .hint("write ${env:NAME} or ${env:NAME:-default}"));
    }
    match (std::env::var(name), default) {
        (Ok(value), None) => Ok(value),
        (Ok(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (Err(std::env::VarError::NotPresent), None) => {
            Err(ConfigError::new(place, format!("the environment variable `{name}` is not set"))
                .hint(format!("set it where Tidegate is started, or give a default: ${{env:{name}:-…}}")))
        }
        (Err(std::env::VarError::NotUnicode(_)), None) => {
            Err(ConfigError::new(place, format!("the environment variable `{name}` is not UTF-8")))
        }
    }
}

/// A path that is not absolute starts at the folder of the file that names it.
fn from_file(argument: &str, place: &Place) -> Result<String, ConfigError> {
    let (path, key) = match argument.rsplit_once(':') {
        Some((path, key)) => (path, Some(key)),
        None => (argument, None),
    };
    if path.is_empty() || key == Some("") || path.contains('\0') {
        return Err(ConfigError::new(place, "`${file:…}` needs a path").hint("write ${file:PATH} or ${file:PATH:KEY}"));
    }
    let path: PathBuf = match place.file().parent() {
        Some(folder) if Path::new(path).is_relative() => folder.join(path),
        _ => path.into(),
    };
    let text = read(&path).map_err(|cause| {
        ConfigError::new(place, format!("cannot read {}: {cause}", path.display()))
            .hint("a relative path starts at the folder of the file that names it")
    })?;
    let Some(key) = key else {
        let line = text.strip_suffix('\n').unwrap_or(&text);
        return Ok(line.strip_suffix('\r').unwrap_or(line).to_owned());
    };
    key_of(&path, &text, key).ok_or_else(|| {
        ConfigError::new(place, format!("{} has no `{key}`", path.display()))
            .hint("KEY is a name in a `NAME=value` file, or in a file that ends in .json, .yaml or .yml")
    })
}

fn read(path: &Path) -> Result<String, String> {
    let about = std::fs::metadata(path).map_err(|cause| cause.to_string())?;
    if about.is_dir() {
        return Err("it is a folder".to_owned());
    }
    if about.len() > LARGEST {
        return Err(format!("it has {} bytes, more than {LARGEST}", about.len()));
    }
    let bytes = std::fs::read(path).map_err(|cause| cause.to_string())?;
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())
}

fn key_of(path: &Path, text: &str, key: &str) -> Option<String> {
    if path.extension().is_some_and(|ending| ["json", "yaml", "yml"].iter().any(|known| ending == *known)) {
        let mut node = yaml::parse_text(text, path).ok()?;
        for name in key.split('.') {
            let NodeKind::Map(entries) = node.kind else { return None };
            node = entries.into_iter().find(|(known, _)| known.value == name)?.1;
        }
        return match node.kind {
            NodeKind::Scalar(scalar) => Some(scalar.raw().to_owned()),
            _ => None,
        };
    }
    text.lines().find_map(|line| {
        let (name, value) = line.trim_start().split_once(['=', ':'])?;
        (name.trim_end() == key && !name.starts_with(['#', '!'])).then(|| value.trim().to_owned())
    })
}
