//! `tidegate preview`: what a connector would send or write now, with nothing sent.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::output;
use super::{CliError, FAILED, Global, UNREACHABLE};
use crate::worker::{self, Access, Resources, World, load_file};

/// Show what a connector would do now: the exact requests of a sink, the rows of a pull, events of a capture
///
/// Nothing is sent, written or committed. A sink reads the next records of its group, a pull asks for one page and
/// shows what it would change, a capture shows rows as its snapshot would.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tidegate preview erp-customers
  tidegate preview erp-products --limit 3 --output json")]
pub struct Preview {
    connector: String,
    /// How many records, rows or events, at the most
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = at_least_one)]
    limit: usize,
}

impl Preview {
    pub async fn run(self, global: &Global) -> Result<ExitCode, CliError> {
        let settings = global.settings()?;
        let world = World { systems: &settings.systems, state: &settings.state };
        let mut names = Vec::new();
        let mut wrong = None;
        let mut found = None;
        for (path, text) in worker::read_folder(&settings.connectors)? {
            match load_file(&path, &text, &world) {
                Ok(loaded) if loaded.name == self.connector => found = Some(loaded),
                Ok(loaded) => names.push(loaded.name),
                Err(error) => wrong = Some(wrong.unwrap_or(error)),
            }
        }
        let Some(loaded) = found else {
            // The one that was meant may be the one that can't be read.
            if let Some(error) = wrong {
                return Err(error.into());
            }
            let error = CliError::new(FAILED, format!("there is no connector '{}'", self.connector));
            return Err(error.hint(format!("there are: {}", names.join(", "))));
        };
        let mut resources = Resources::open_for(&settings, Access::Plan).await?;
        resources.datastore = resources.datastore.for_looking().await?;
        let shown = loaded
            .connector
            .preview(&resources.still(&loaded.name), self.limit)
            .await
            .map_err(|fault| CliError::new(UNREACHABLE, fault.to_string()))?;
        if global.json() {
            output::print_json(&shown)?;
        } else if shown.is_empty() {
            output::print("nothing to do now\n")?;
        } else {
            for one in &shown {
                output::print(&for_people(one))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "it is a number from 1".to_owned())
}

/// What is done with which record in one line, below it the requests with their bodies, and what else there is to say.
fn for_people(one: &Value) -> String {
    let Some(fields) = one.as_object() else { return format!("{one}\n") };
    let word =
        |name: &str| fields.get(name).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    // A capture's are events.
    let event = fields.get("value").map(|_| "event".to_owned());
    let mut text = format!(
        "{} {}\n",
        word("does").or(word("do")).or(event).unwrap_or_default(),
        word("key").or(word("record")).or(word("id")).unwrap_or_default()
    );
    for request in fields.get("requests").and_then(Value::as_array).into_iter().flatten() {
        let Some(request) = request.as_object() else {
            text.push_str(&format!("  {}\n", request.as_str().unwrap_or_default()));
            continue;
        };
        let line = request.get("request").and_then(Value::as_str).unwrap_or_default();
        text.push_str(&format!("  {line}\n"));
        for (name, value) in request.iter().filter(|(name, value)| *name != "request" && !is_empty(value)) {
            text.push_str(&format!("    {name} {value}\n"));
        }
    }
    let told = ["does", "do", "key", "record", "requests"];
    for (name, value) in fields.iter().filter(|(name, value)| !told.contains(&name.as_str()) && !value.is_null()) {
        text.push_str(&format!("  {name} {}\n", value.as_str().map_or_else(|| value.to_string(), str::to_owned)));
    }
    text
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
}
