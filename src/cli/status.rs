//! `tidegate status`: how every connector is doing.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::ask::Ask;
use super::output::{self, Table};
use super::{CliError, Global, NOT_WELL, UNREACHABLE};
use crate::pipeline::progress::seconds;
use crate::worker::StatusReport;

/// Show state, lag, rate and last error of every connector
///
/// Asks the running worker. Exit code 5 when a connector has failed or is stuck.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tidegate status
  tidegate status --watch
  tidegate status --output json | jq '.connectors[] | select(.state != \"RUNNING\")'")]
pub struct Status {
    /// Show it again every second
    #[arg(long, short)]
    watch: bool,
}

impl Status {
    pub async fn run(self, global: &Global) -> Result<ExitCode, CliError> {
        let ask = Ask::new(&global.settings()?)?;
        if !self.watch {
            let report: StatusReport = ask.get("/status").await?;
            show(global, &report, "")?;
            let well = report.health.ready;
            return Ok(if well { ExitCode::SUCCESS } else { ExitCode::from(NOT_WELL) });
        }
        let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        loop {
            match ask.get::<StatusReport>("/status").await {
                Ok(report) => show(global, &report, clear)?,
                // It may be on its way back: whoever watches wants to see that.
                Err(error) if error.code == UNREACHABLE => match global.json() {
                    true => output::print(&format!("{}\n", json!({ "error": error.message })))?,
                    false => output::print(&format!("{clear}{}\n", error.message))?,
                },
                Err(error) => return Err(error),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

fn show(global: &Global, report: &StatusReport, clear: &str) -> Result<(), CliError> {
    if global.json() {
        return output::print_json(report);
    }
    output::print(&format!("{clear}{}", text(report)))
}

fn text(report: &StatusReport) -> String {
    let mut table = Table::new(&[
        "CONNECTOR",
        "TYPE",
        "STATE",
        "SINCE",
        "LAG",
        "RATE",
        "APPLIED",
        "SKIPPED",
        "REJECTED",
        "WAITING",
    ]);
    for connector in &report.connectors {
        let lag: Vec<String> = [
            connector.lag_bytes.map(output::bytes),
            connector.lag_events.map(|events| format!("{events} records")),
            connector.lag_seconds.map(seconds),
        ]
        .into_iter()
        .flatten()
        .collect();
        table.row([
            connector.name.clone(),
            connector.kind.clone(),
            connector.state.clone(),
            seconds(connector.state_seconds),
            if lag.is_empty() { "-".to_owned() } else { lag.join(", ") },
            format!("{:.0}/s", connector.rate),
            connector.applied.to_string(),
            connector.skipped.to_string(),
            connector.rejected.to_string(),
            connector.waiting.to_string(),
        ]);
    }
    let mut text = table.text();
    for connector in &report.connectors {
        if let Some(seconds_stuck) = connector.stuck_seconds {
            let time = seconds(seconds_stuck);
            text.push_str(&format!("\n{}: stuck, it has records to read and moved none for {time}\n", connector.name));
        }
        if let Some(progress) = &connector.progress {
            text.push_str(&format!("\n{}: {progress}\n", connector.name));
        }
        for told in connector.quarantined() {
            text.push_str(&format!("\n{}: {told}\n", connector.name));
        }
        if let Some(error) = &connector.last_error {
            text.push_str(&format!(
                "\n{}, at {}:\n  {}\n",
                connector.name,
                error.at,
                error.message.replace('\n', "\n  ")
            ));
        }
    }
    for trouble in &report.problems {
        text.push_str(&format!("\n{}:\n  {}\n", trouble.what, trouble.message.replace('\n', "\n  ")));
    }
    for orphan in &report.orphans {
        let slot = match (orphan.identity.get("slot.name"), orphan.wal_kept_bytes, &orphan.server) {
            (Some(slot), Some(kept), _) => format!(", its slot '{slot}' keeps {} of WAL", output::bytes(kept)),
            (Some(slot), None, Some(server)) => format!(", its slot '{slot}' on {server} keeps WAL"),
            (Some(slot), None, None) => format!(", its slot '{slot}' keeps WAL"),
            (None, ..) => String::new(),
        };
        text.push_str(&format!(
            "\n{}: its file is gone since {}{slot}; 'tidegate connectors forget {}' removes what it left\n",
            orphan.name, orphan.since, orphan.name
        ));
    }
    for loss in &report.losses {
        text.push_str(&format!("\n{loss}; 'tidegate connectors reset NAME --to beginning' reads what is left\n"));
    }
    let told =
        |what: &str| report.orphans.iter().any(|orphan| orphan.name == what) || report.dead_letters.contains_key(what);
    for warning in report.health.warnings.iter().filter(|warning| !told(&warning.what)) {
        text.push_str(&format!("\n{} {}\n", warning.what, warning.message));
    }
    for system in report.systems.iter().filter(|system| system.breaker != "closed") {
        text.push_str(&format!("\nsystem {}: its breaker is {}\n", system.name, system.breaker));
    }
    for (connector, count) in report.dead_letters.iter().filter(|(_, count)| **count > 0) {
        let letters = if *count == 1 { "1 dead letter" } else { &format!("{count} dead letters") };
        text.push_str(&format!("\n{connector}: {letters}; 'tidegate dead-letters list {connector}' shows them\n"));
    }
    text
}
