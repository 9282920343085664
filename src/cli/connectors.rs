//! `tidegate connectors`: commands on single connectors of the running worker.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

use super::ask::Ask;
use super::output::{self, Table};
use super::start::start_at;
use super::{CliError, FAILED, Global, USAGE};
use crate::log::StartAt;
use crate::pipeline::ResetTo;
use crate::rest::reset_body;
use crate::worker::ConnectorReport;

/// List, pause, resume, restart or reset connectors
#[derive(Args)]
#[command(after_help = "\
Examples:
  tidegate connectors list
  tidegate connectors pause erp-orders          stays paused when the worker is started again
  tidegate connectors resume erp-orders
  tidegate connectors restart erp-orders        reads its file, and the secrets it names, anew
  tidegate connectors reset erp-orders --to beginning
  tidegate connectors reset erp-orders --to 2026-11-21T08:00:00Z
  tidegate connectors reset erp-products --cursor '\"2026-01-01T00:00:00Z\"'
  tidegate connectors forget old-shop           file gone: drops its slot, group or cursor, too")]
pub struct Connectors {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Names, kinds, states and files
    List,
    /// Land what is in flight, then stand still; also after a restart of the worker
    Pause { connector: String },
    /// Go on
    Resume { connector: String },
    /// Drain and start again, with the file and its secrets read anew
    Restart { connector: String },
    /// Move the position: a sink's consumer group, a pull's cursor, a capture's snapshot
    Reset {
        connector: String,
        /// beginning, end, an OFFSET (in every partition), or a TIME: 2026-11-21T08:00:00Z, -10m
        #[arg(long, allow_hyphen_values = true, value_parser = start_at, required_unless_present = "cursor")]
        to: Option<StartAt>,
        /// A pull's cursor, as JSON
        #[arg(long, conflicts_with = "to", value_name = "JSON")]
        cursor: Option<String>,
    },
    /// Start anew under the identity (database, slot, topic prefix …) that the file has now
    Migrate { connector: String },
    /// Remove what a connector without a file has left: its slot and publication, its consumer group, its cursor, its
    /// dead letters
    Forget {
        connector: String,
        /// Leave slot and publication as they are: their server is gone, or was seen to by hand
        #[arg(long)]
        keep_slot: bool,
    },
}

impl Connectors {
    pub async fn run(self, global: &Global) -> Result<ExitCode, CliError> {
        let ask = Ask::new(&global.settings()?)?;
        let (connector, command, body) = match self.command {
            Command::List => {
                list(global, &ask).await?;
                return Ok(ExitCode::SUCCESS);
            }
            Command::Pause { connector } => (connector, "pause", None),
            Command::Resume { connector } => (connector, "resume", None),
            Command::Restart { connector } => (connector, "restart", None),
            Command::Migrate { connector } => (connector, "migrate", None),
            Command::Forget { connector, keep_slot } => (connector, "forget", Some(json!({ "keep_slot": keep_slot }))),
            Command::Reset { connector, to, cursor } => {
                let to = reset_to(to, cursor)?;
                (connector, "reset", Some(reset_body(&to)))
            }
        };
        // Dots alone would lead to another path, however they are written.
        if connector.chars().all(|character| character == '.') {
            return Err(CliError::new(FAILED, format!("there is no connector '{connector}'"))
                .hint("'tidegate connectors list' shows what there is"));
        }
        let segment = utf8_percent_encode(&connector, NON_ALPHANUMERIC);
        let answer: Value = ask.post(&format!("/connectors/{segment}/{command}"), body.as_ref()).await?;
        if global.json() {
            output::print_json(&answer)?;
        } else {
            output::print(&format!("{}\n", answer["done"].as_str().unwrap_or("done")))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

async fn list(global: &Global, ask: &Ask) -> Result<(), CliError> {
    let connectors: Vec<ConnectorReport> = ask.get("/connectors").await?;
    if global.json() {
        return output::print_json(&connectors);
    }
    let mut table = Table::new(&["CONNECTOR", "TYPE", "STATE", "FILE"]);
    for connector in connectors {
        table.row([connector.name, connector.kind, connector.state, connector.file.display().to_string()]);
    }
    output::print(&table.text())
}

fn reset_to(to: Option<StartAt>, cursor: Option<String>) -> Result<ResetTo, CliError> {
    if let Some(cursor) = cursor {
        let cursor = serde_json::from_str(&cursor).map_err(|error| {
            CliError::new(USAGE, format!("the cursor is no JSON: {error}"))
                .hint("a text wants quotes: --cursor '\"2026-01-01\"'")
        })?;
        return Ok(ResetTo::Cursor(cursor));
    }
    Ok(match to {
        Some(StartAt::End) => ResetTo::End,
        Some(StartAt::Offset(offset)) => ResetTo::Offset(offset.0),
        Some(StartAt::TimeMs(ms)) => ResetTo::TimeMs(ms),
        Some(StartAt::Beginning) | None => ResetTo::Beginning,
    })
}
