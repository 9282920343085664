//! `tidegate status`: how every connector is doing.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::ask::Ask;
use super::output::{self, Table};
use super::{CliError, Global, NOT_WELL};
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
        let ask = Ask::new(&global.settings()?.rest)?;
        loop {
            let report: StatusReport = ask.get("/status").await?;
            if global.json() {
                output::print_json(&report)?;
            } else {
                let clear = if self.watch && std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
                output::print(&format!("{clear}{}", text(&report)))?;
            }
            if !self.watch {
                let well = report.health().ready;
                return Ok(if well { ExitCode::SUCCESS } else { ExitCode::from(NOT_WELL) });
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
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
            connector.lag_events.map(|events| format!("{events} ev")),
            connector.lag_seconds.map(output::seconds),
        ]
        .into_iter()
        .flatten()
        .collect();
        table.row([
            connector.name.clone(),
            connector.kind.clone(),
            connector.state.clone(),
            output::seconds(connector.state_seconds),
            if lag.is_empty() { "-".to_owned() } else { lag.join(" ") },
            format!("{:.0}/s", connector.rate),
            connector.applied.to_string(),
            connector.skipped.to_string(),
            connector.rejected.to_string(),
            connector.waiting.to_string(),
        ]);
    }
    let mut text = table.text();
    for connector in &report.connectors {
        if let Some(progress) = &connector.progress {
            text.push_str(&format!("\n{}: {progress}\n", connector.name));
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
        let slot =
            orphan.identity.get("slot.name").map(|slot| format!(", slot '{slot}' keeps WAL")).unwrap_or_default();
        text.push_str(&format!(
            "\n{}: its file is gone since {}{slot}; 'tidegate connectors forget {}' removes what it left\n",
            orphan.name, orphan.since, orphan.name
        ));
    }
    for loss in &report.losses {
        text.push_str(&format!("\n{loss}; 'tidegate connectors reset' starts it anew\n"));
    }
    for system in report.systems.iter().filter(|system| system.breaker != "closed") {
        text.push_str(&format!("\nsystem {}: its breaker is {}\n", system.name, system.breaker));
    }
    for (connector, count) in report.dead_letters.iter().filter(|(_, count)| **count > 0) {
        text.push_str(&format!(
            "\n{connector}: {count} dead letters; 'tidegate dead-letters list {connector}' shows them\n"
        ));
    }
    text
}
