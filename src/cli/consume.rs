//! `tidegate consume`: a topic's records as JSON, also beside a running worker.

use std::process::ExitCode;
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use clap::Args;
use serde_json::{Map, Value, json};

use super::output;
use super::start::start_at;
use super::{CliError, Global};
use crate::log::{ConsumedRecord, LogError, PollLimit, StartAt, StopAt};
use crate::registry::{DecodeError, EventDecoder};
use crate::worker::{Access, open_log, open_registry};

/// Read a topic's change events, decoded to JSON
///
/// Reads without a consumer group: nothing is committed and nobody is disturbed. Without --follow it ends where the
/// topic ended when it began, also beside a writer that goes on. Times come as ISO text and decimals exactly; --raw shows the numbers that Avro holds. With --output json, one JSON object a line.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tidegate consume shop.public.orders                       what is there, from the beginning
  tidegate consume shop.public.orders --from end --follow   what comes from now on
  tidegate consume shop.public.orders --from -10m           the last ten minutes
  tidegate consume shop.public.orders --from 2026-11-21T08:00:00Z --max 5
  tidegate consume shop.public.orders --output json | jq .value.after")]
pub struct Consume {
    topic: String,
    /// beginning, end, an OFFSET (in every partition), or a TIME: 2026-11-21T08:00:00Z, 2026-11-21, -10m
    #[arg(long, default_value = "beginning", allow_hyphen_values = true, value_parser = start_at)]
    from: StartAt,
    /// Wait for more at the end
    #[arg(long, short)]
    follow: bool,
    /// Stop after this many records
    #[arg(long, value_name = "N")]
    max: Option<u64>,
    /// Show numbers as Avro holds them
    #[arg(long)]
    raw: bool,
}

impl Consume {
    pub async fn run(self, global: &Global) -> Result<ExitCode, CliError> {
        let settings = global.settings()?;
        let log = open_log(&settings.log, Access::Read).await?;
        let decoder = EventDecoder::new(open_registry(&settings, Access::Read)?.registry);
        let stop = if self.follow { StopAt::Never } else { StopAt::End };
        let mut reader = log.reader(&self.topic, self.from, stop).await.map_err(|error| match error {
            LogError::UnknownTopic(_) => CliError::from(error).hint("'tidegate topics' lists the topics there are"),
            error => error.into(),
        })?;
        let limit = PollLimit { bytes: 1 << 20, records: 500, wait: Duration::from_millis(500) };
        let mut left = self.max.unwrap_or(u64::MAX);
        while left > 0 && !reader.at_end() {
            let records = reader.poll(&limit).await?;
            if records.is_empty() && output::reader_is_gone() {
                break;
            }
            let mut text = String::new();
            for record in records.iter().take(usize::try_from(left).unwrap_or(usize::MAX)) {
                left -= 1;
                let shown = self.decoded(&decoder, record).await;
                text.push_str(&if global.json() { format!("{shown}\n") } else { for_people(record, &shown) });
            }
            output::print(&text)?;
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn decoded(&self, decoder: &EventDecoder, record: &ConsumedRecord) -> Value {
        let mut headers = Map::new();
        for (name, value) in &record.headers {
            let shown = match self.part(decoder, Some(value)).await {
                Ok(value) if value.is_null() => Value::Null,
                Ok(value) => value,
                Err(_) => json!(String::from_utf8_lossy(value)),
            };
            headers.insert(name.to_string(), shown);
        }
        let undecodable = |error: DecodeError| json!({ "undecodable": error.to_string() });
        json!({
            "topic": record.topic.as_ref(),
            "partition": record.partition,
            "offset": record.offset.0,
            "timestamp": time(record.timestamp_ms),
            "headers": headers,
            "key": self.part(decoder, record.key.as_deref()).await.unwrap_or_else(undecodable),
            "value": self.part(decoder, record.value.as_deref()).await.unwrap_or_else(undecodable),
        })
    }

    async fn part(&self, decoder: &EventDecoder, wire: Option<&[u8]>) -> Result<Value, DecodeError> {
        match wire {
            None => Ok(Value::Null),
            Some(wire) if self.raw => decoder.raw(wire).await,
            Some(wire) => decoder.value(wire).await,
        }
    }
}

fn for_people(record: &ConsumedRecord, shown: &Value) -> String {
    let value = &shown["value"];
    let what = match value["op"].as_str() {
        Some("c") => "insert",
        Some("u") => "update",
        Some("d") => "delete",
        Some("r") => "read",
        Some("t") => "truncate",
        Some(other) => other,
        None if value.is_null() => "tombstone",
        None => "record",
    };
    let mut text = format!(
        "{} partition {} offset {} {what} {}\n",
        time(record.timestamp_ms),
        record.partition,
        record.offset.0,
        shown["key"]
    );
    let is_change = value.get("op").is_some();
    for side in ["before", "after"].into_iter().filter(|side| is_change && !value[*side].is_null()) {
        text.push_str(&format!("  {side:<6} {}\n", value[side]));
    }
    if !is_change && !value.is_null() {
        text.push_str(&format!("  {value}\n"));
    }
    text
}

fn time(ms: i64) -> String {
    match DateTime::<Utc>::from_timestamp_millis(ms) {
        Some(time) => time.to_rfc3339_opts(SecondsFormat::Millis, true),
        None => ms.to_string(),
    }
}
