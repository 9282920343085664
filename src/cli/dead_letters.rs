//! `tidegate dead-letters`: what was rejected, and what is to be done with it.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;

use super::output::{self, Table};
use super::{CliError, FAILED, Global};
use crate::datastore::Datastore;
use crate::worker::dead_letters::{self, DeadLetterId, Verdict};
use crate::worker::{self, Access, Resources, WorkerSettings, World, load_file};

/// List, show, replay or drop records that a system rejected
///
/// They are kept in the datastore, with the request and the answer; later records of the same key wait behind them. When
/// the row changes, it is tried again by itself.
/// A replay or a drop is carried out by the running connector.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tidegate dead-letters list
  tidegate dead-letters show erp-customers shop.public.customers:0:42
  tidegate dead-letters replay erp-customers shop.public.customers:0:42
  tidegate dead-letters replay erp-customers --all
  tidegate dead-letters drop erp-customers shop.public.customers:0:42")]
pub struct DeadLetters {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// What is parked, oldest first
    List {
        /// Only this connector's
        connector: Option<String>,
        /// How many, at the most
        #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
        limit: i64,
    },
    /// One of them, with its record, request and answer
    Show { connector: String, id: DeadLetterId },
    /// Deliver again, then what waits behind
    Replay(Which),
    /// Give up; what waits behind is delivered
    Drop(Which),
}

#[derive(Args)]
struct Which {
    connector: String,
    /// TOPIC:PARTITION:OFFSET, as the list prints it
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    id: Option<DeadLetterId>,
    /// All of the connector's
    #[arg(long)]
    all: bool,
}

impl DeadLetters {
    pub async fn run(self, global: &Global) -> Result<ExitCode, CliError> {
        let settings = global.settings()?;
        match self.command {
            Command::List { connector, limit } => {
                let datastore = Datastore::open(&settings.datastore)?;
                let letters = dead_letters::list(&datastore, connector.as_deref(), limit).await?;
                if let Some(connector) = connector.filter(|_| letters.is_empty()) {
                    must_have_a_file(&settings, &connector)?;
                }
                if global.json() {
                    output::print_json(&dead_letters::as_json(&letters))?;
                    return Ok(ExitCode::SUCCESS);
                }
                let mut table = Table::new(&["CONNECTOR", "ID", "KIND", "KEY", "SINCE", "TRIES", "REASON"]);
                for letter in &letters {
                    let kind = serde_json::to_value(letter.kind).unwrap_or_default();
                    table.row([
                        letter.connector.clone(),
                        DeadLetterId::of(letter).to_string(),
                        kind.as_str().unwrap_or_default().to_owned(),
                        letter.key.to_string(),
                        letter.parked_at.clone(),
                        letter.attempts.to_string(),
                        letter.reason.lines().next().unwrap_or_default().to_owned(),
                    ]);
                }
                output::print(&if letters.is_empty() { "no dead letters\n".to_owned() } else { table.text() })?;
            }
            Command::Show { connector, id } => {
                let resources = Resources::open_for(&settings, Access::Read).await?;
                let shown = dead_letters::show(&resources, &connector, &id).await?;
                output::print_json(&shown.ok_or_else(|| none(&connector, Some(&id)))?)?;
            }
            Command::Replay(which) => judge(global, &settings.datastore, which, Verdict::Replay, "replay").await?,
            Command::Drop(which) => judge(global, &settings.datastore, which, Verdict::Drop, "drop").await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// That nothing is parked under a name says little where there is no such connector.
fn must_have_a_file(settings: &WorkerSettings, connector: &str) -> Result<(), CliError> {
    let world = World { systems: &settings.systems, state: &settings.state };
    let files = worker::read_folder(&settings.connectors)?;
    let loaded: Vec<_> = files.iter().map(|(path, text)| load_file(path, text, &world)).collect();
    // One that can't be read may be the one that is meant.
    if loaded.iter().any(|loaded| loaded.as_ref().is_ok_and(|loaded| loaded.name == connector) || loaded.is_err()) {
        return Ok(());
    }
    let names: Vec<&str> = loaded.iter().flatten().map(|loaded| loaded.name.as_str()).collect();
    Err(CliError::new(FAILED, format!("there is no connector '{connector}', and nothing is parked under this name"))
        .hint(format!("there are: {}", names.join(", "))))
}

async fn judge(
    global: &Global,
    settings: &crate::datastore::DatastoreSettings,
    which: Which,
    verdict: Verdict,
    word: &str,
) -> Result<(), CliError> {
    let datastore = Datastore::open(settings)?;
    let asked = dead_letters::judge(&datastore, &which.connector, which.id.as_ref(), verdict).await?;
    if asked == 0 {
        return Err(none(&which.connector, which.id.as_ref()));
    }
    if global.json() {
        return output::print_json(&json!({ "asked": asked }));
    }
    output::print(&format!(
        "asked for the {word} of {asked}; '{}' does it within seconds, if it runs\n",
        which.connector
    ))
}

fn none(connector: &str, id: Option<&DeadLetterId>) -> CliError {
    let what = id.map_or("no dead letters".to_owned(), |id| format!("no dead letter {id}"));
    CliError::new(FAILED, format!("'{connector}' has {what}")).hint("'tidegate dead-letters list' shows what there is")
}
