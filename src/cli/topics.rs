//! `tidegate topics`: what the log holds.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::output::{self, Table};
use super::{CliError, Global};
use crate::worker::{Access, LossReport, open_log};

/// List the topics of the log, with their partitions, offsets and size
///
/// Says below the list what retention took before a consumer group had read it, and from which group.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tidegate topics
  tidegate topics shop.public           those whose name has this in it
  tidegate topics --output json")]
pub struct Topics {
    /// Only topics whose name contains this
    filter: Option<String>,
}

impl Topics {
    pub async fn run(self, global: &Global) -> Result<ExitCode, CliError> {
        let log = open_log(&global.settings()?.log, Access::Read).await?;
        let filter = self.filter.unwrap_or_default();
        let mut topics = log.topics().await?;
        topics.retain(|topic| topic.name.contains(&filter));
        topics.sort_by(|a, b| a.name.cmp(&b.name));
        let mut losses: Vec<LossReport> = log.losses().await?.iter().map(LossReport::from).collect();
        losses.retain(|loss| loss.topic.contains(&filter));
        if global.json() {
            let topics: Vec<_> = topics
                .iter()
                .map(|topic| {
                    let partitions: Vec<_> = topic
                        .partitions
                        .iter()
                        .map(|it| json!({ "partition": it.partition, "first": it.first.0, "next": it.next.0, "bytes": it.bytes }))
                        .collect();
                    let lost: Vec<_> = losses.iter().filter(|loss| loss.topic == topic.name).collect();
                    json!({ "name": topic.name, "partitions": partitions, "settings": topic.settings, "lost": lost })
                })
                .collect();
            output::print_json(&topics)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut table = Table::new(&["TOPIC", "PARTITIONS", "RECORDS", "FIRST..NEXT", "SIZE"]);
        for topic in &topics {
            let records: i64 = topic.partitions.iter().map(|it| it.next.0 - it.first.0).sum();
            let ranges: Vec<String> =
                topic.partitions.iter().map(|it| format!("{}..{}", it.first.0, it.next.0)).collect();
            let size: Option<u64> = topic.partitions.iter().map(|it| it.bytes).sum();
            table.row([
                topic.name.clone(),
                topic.partitions.len().to_string(),
                records.to_string(),
                ranges.join(" "),
                size.map_or("-".to_owned(), output::bytes),
            ]);
        }
        let mut text = table.text();
        losses.iter().for_each(|loss| text.push_str(&format!("\n{loss}\n")));
        output::print(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}
