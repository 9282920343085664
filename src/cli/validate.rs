//! `tidegate validate`: are the files right? Every error of every file, with its place and what would be right.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::output;
use super::{CliError, FAILED, Global, SETTINGS};
use crate::config::{self, ConfigError, Place, Section, Spanned};
use crate::worker::{self, WorkerSettings, World, load_file};

/// Check the settings and every connector file, and say what is wrong, where, and what would be right
///
/// Looks at files only: no server is asked ('tidegate plan' does that). Secrets that the files refer to
/// (${env:…}, ${file:…}) are read, never shown. Exit code 3 when something is wrong.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tidegate validate
  tidegate validate connectors/erp-orders.yaml        the settings and this file only
  tidegate validate --output json | jq '.files[] | select(.errors != [])'")]
pub struct Validate {
    /// Only these connector files [default: all of the connectors folder]
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// One file, and what is wrong with it.
struct Checked {
    file: PathBuf,
    /// Name and type of the connector that it holds.
    connector: Option<(String, String)>,
    errors: Vec<ConfigError>,
    /// What could not be looked at, and why.
    unchecked: Option<&'static str>,
}

impl Validate {
    pub fn run(self, global: &Global) -> Result<ExitCode, CliError> {
        let path = global.config_path()?;
        let (settings, errors) = match WorkerSettings::read_file(&path) {
            Ok(settings) => (Some(settings), Vec::new()),
            Err(error) => (None, error.split()),
        };
        let folder = match &settings {
            Some(settings) => settings.connectors.clone(),
            None => expected_folder(&path),
        };
        let mut checked = vec![Checked { file: path, connector: None, errors, unchecked: None }];
        for (file, text) in self.texts(&folder)? {
            checked.push(check(file, &text, settings.as_ref()));
        }
        same_names(&mut checked);
        let well = checked.iter().all(|checked| checked.errors.is_empty());
        if global.json() {
            output::print_json(&json!({ "valid": well, "files": checked.iter().map(as_json).collect::<Vec<_>>() }))?;
        } else {
            output::print(&as_text(&checked))?;
        }
        Ok(if well { ExitCode::SUCCESS } else { ExitCode::from(SETTINGS) })
    }

    fn texts(&self, folder: &Path) -> Result<worker::Files, CliError> {
        if self.files.is_empty() {
            return worker::read_folder(folder).map_err(|cause| {
                CliError::new(FAILED, format!("the connectors folder {}: {cause}", folder.display()))
                    .hint("`connectors:` in the worker's settings names it")
            });
        }
        let read = |file: &PathBuf| match worker::read_text(file) {
            Err(cause) => Err(CliError::new(FAILED, format!("{}: {cause}", file.display()))),
            text => Ok((file.clone(), text)),
        };
        self.files.iter().map(read).collect()
    }
}

/// Where the connector files are, as far as settings that are wrong elsewhere say so.
fn expected_folder(settings: &Path) -> PathBuf {
    let named = config::parse_file(settings)
        .and_then(|node| Section::new(node, "the worker's settings"))
        .and_then(|mut section| section.take::<PathBuf>("connectors"));
    named.ok().flatten().unwrap_or_else(|| Place::start(settings, "").beside(Path::new("../connectors")))
}

fn check(file: PathBuf, text: &worker::Text, settings: Option<&WorkerSettings>) -> Checked {
    let named = worker::readable(&file, text).and_then(|text| name_and_type(&file, text));
    let (errors, unchecked) = match (settings, &named) {
        (Some(settings), _) => {
            let world = World { systems: &settings.systems, state: &settings.state };
            (load_file(&file, text, &world).err().map(ConfigError::split).unwrap_or_default(), None)
        }
        (None, Ok(_)) => (Vec::new(), Some("looked at only in part, until the worker's settings are right")),
        (None, Err(error)) => (error.clone().split(), None),
    };
    Checked { file, connector: named.ok(), errors, unchecked }
}

fn name_and_type(file: &Path, text: &str) -> Result<(String, String), ConfigError> {
    let mut section = Section::new(config::parse_text(text, file)?, "connector")?;
    Ok((section.require("name")?, section.require("type")?))
}

/// A name belongs to one file.
fn same_names(checked: &mut [Checked]) {
    let mut first: BTreeMap<String, PathBuf> = BTreeMap::new();
    for one in checked {
        let Some((name, _)) = &one.connector else { continue };
        match first.get(name) {
            None => drop(first.insert(name.clone(), one.file.clone())),
            Some(other) => one.errors.push(
                ConfigError::new(&name_place(&one.file), format!("a connector `{name}` is in {} too", other.display()))
                    .hint("names tell connectors apart: consumer groups and positions go by them"),
            ),
        }
    }
}

fn name_place(file: &Path) -> Place {
    let named = config::parse_file(file)
        .and_then(|node| Section::new(node, "connector"))
        .and_then(|mut section| section.require::<Spanned<String>>("name"));
    named.map_or_else(|error| error.place().clone(), |name| name.place)
}

fn as_text(checked: &[Checked]) -> String {
    let mut text = String::new();
    for Checked { file, connector, errors, unchecked } in checked {
        let what = connector.as_ref().map_or(String::new(), |(name, kind)| format!("  {kind} {name}"));
        match (errors.as_slice(), unchecked) {
            ([], None) => text.push_str(&format!("ok     {}{what}\n", file.display())),
            ([], Some(why)) => text.push_str(&format!("?      {}{what}  ({why})\n", file.display())),
            (errors, _) => {
                text.push_str(&format!("wrong  {}{what}\n\n", file.display()));
                for error in errors {
                    text.push_str(&format!("{error}\n\n"));
                }
            }
        }
    }
    let errors: usize = checked.iter().map(|checked| checked.errors.len()).sum();
    let wrong = checked.iter().filter(|checked| !checked.errors.is_empty()).count();
    let files = if checked.len() == 1 { "1 file".to_owned() } else { format!("{} files", checked.len()) };
    text.push_str(&match errors {
        0 => format!("{files}, nothing wrong\n"),
        _ => format!("{files}, {errors} {} in {wrong} of them\n", if errors == 1 { "error" } else { "errors" }),
    });
    text
}

fn as_json(checked: &Checked) -> Value {
    let error = |error: &ConfigError| {
        let place = error.place();
        json!({
            "line": place.line,
            "column": place.column,
            "message": error.message(),
            "text": error.snippet().map(|(line, _)| line),
            "hint": error.hint_text(),
        })
    };
    json!({
        "file": checked.file,
        "connector": checked.connector.as_ref().map(|(name, _)| name),
        "type": checked.connector.as_ref().map(|(_, kind)| kind),
        "errors": checked.errors.iter().map(error).collect::<Vec<_>>(),
        "unchecked": checked.unchecked,
    })
}
