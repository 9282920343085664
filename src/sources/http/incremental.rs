//! The incremental cursor: how far a pull has read, as the system's own values say.

use std::time::Duration;

use chrono::{DateTime, NaiveDate, SecondsFormat, TimeDelta, Utc};
use serde_json::{Number, Value};

use crate::config::{ConfigError, FromNode, Node, Section, Spanned};
use crate::mapping::{Compiler, Program, Scope};
use crate::twoway::{moment, naive};

/// `incremental: { cursor: …, tie_breaker: …, initial: …, lookback: … }`
pub struct Incremental {
    /// Of a record: the value that the listing is asked from.
    cursor: Program,
    /// Of a record: tells records of one cursor value apart, in their order.
    tie_breaker: Option<Program>,
    /// `$cursor` of the first run.
    pub initial: Value,
    lookback: Lookback,
}

/// How far before the cursor a run begins: at least the system's longest transaction (CORRECTNESS 23).
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lookback {
    /// Nothing is said: [`USUAL`] where the cursor is a time.
    Usual,
    Time(Duration),
    /// For cursors that are numbers.
    Number(i64),
}

/// Records are saved some time after the time that they are given, and clocks differ.
const USUAL: Duration = Duration::from_secs(60);

impl Incremental {
    pub fn read(mut section: Section, compiler: &Compiler) -> Result<Self, ConfigError> {
        let cursor: Spanned<String> = section.require("cursor")?;
        let tie_breaker: Option<Spanned<String>> = section.take("tie_breaker")?;
        let initial = section.node("initial")?.map(|node| node.to_json()).transpose()?;
        let lookback = match section.node("lookback")? {
            None => Lookback::Usual,
            Some(node) => read_lookback(node)?,
        };
        section.finish()?;
        Ok(Incremental {
            cursor: compiler.jq(&cursor)?,
            tie_breaker: tie_breaker.map(|text| compiler.jq(&text)).transpose()?,
            initial: initial.unwrap_or_default(),
            lookback,
        })
    }

    /// The cursor and tie breaker of a record; null for one that has none, which is then read by every run. A value
    /// that no run could go on from is an error, and so is one that is no time where the cursor `reached` is one: it
    /// would stand above all times.
    pub fn of(&self, record: &Value, reached: &Value) -> Result<(Value, Value), String> {
        let cursor = self.cursor.first(record, &Scope::default());
        let cursor = cursor.map_err(|error| format!("`incremental.cursor`: {error}"))?;
        if !matches!(cursor, Value::Null | Value::String(_) | Value::Number(_)) {
            return Err(format!("`incremental.cursor` must give a text or a number, but gives {cursor}"));
        }
        self.back(&cursor)?;
        let is_time = |cursor: &Value| {
            moment(cursor).is_some() || cursor.as_str().is_some_and(|text| text.parse::<NaiveDate>().is_ok())
        };
        if !cursor.is_null() && moment(reached).is_some() && !is_time(&cursor) {
            return Err(format!("`incremental.cursor` gives {cursor}, which is no time, as {reached} is"));
        }
        let tie = match &self.tie_breaker {
            Some(tie) => tie.first(record, &Scope::default()).map_err(|error| format!("`tie_breaker`: {error}"))?,
            None => Value::Null,
        };
        Ok((cursor, tie))
    }

    /// Where a run begins that is to see everything from `cursor` on.
    pub fn back(&self, cursor: &Value) -> Result<Value, String> {
        match (self.lookback, cursor) {
            (_, Value::Null) => Ok(cursor.clone()),
            (Lookback::Usual, Value::String(text)) if moment(cursor).is_some() => {
                Ok(earlier(text, USUAL).map_or_else(|| cursor.clone(), Value::String))
            }
            (Lookback::Usual | Lookback::Number(0), _) => Ok(cursor.clone()),
            (Lookback::Time(time), Value::String(text)) => earlier(text, time).map(Value::String).ok_or_else(|| {
                format!(
                    "`lookback` is a time, but the cursor '{text}' is none; hint: give ISO times, such as by `todate`"
                )
            }),
            // Seconds since 1970.
            (Lookback::Time(time), Value::Number(number)) => {
                subtract(number, i64::try_from(time.as_secs()).unwrap_or(i64::MAX))
            }
            (Lookback::Number(steps), Value::Number(number)) => subtract(number, steps),
            (_, other) => Err(format!("`lookback` can't be taken from the cursor {other}")),
        }
    }
}

fn read_lookback(node: Node) -> Result<Lookback, ConfigError> {
    let text = node.text("lookback")?;
    match text.parse::<i64>() {
        Ok(steps) if steps >= 0 => Ok(Lookback::Number(steps)),
        _ => Ok(Lookback::Time(Duration::from_node(node, "lookback")?)),
    }
}

fn subtract(number: &Number, steps: i64) -> Result<Value, String> {
    let text = number.to_string();
    if let Ok(whole) = text.parse::<i64>() {
        return Ok(Value::from(whole.saturating_sub(steps)));
    }
    let float: f64 = text.parse().map_err(|_| format!("the cursor {text} is out of range"))?;
    Ok(Number::from_f64(float - steps as f64).map_or(Value::Null, Value::Number))
}

/// An ISO time so much earlier, in the same spelling.
fn earlier(text: &str, time: Duration) -> Option<String> {
    let delta = TimeDelta::from_std(time).ok()?;
    if let Ok(date) = text.parse::<NaiveDate>() {
        // Dates are whole days: never less than what was asked for.
        let days = delta.num_days() + i64::from(delta > TimeDelta::days(delta.num_days()));
        return Some((date - TimeDelta::days(days)).to_string());
    }
    let fraction = text.contains('.');
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        let format = if fraction { SecondsFormat::Micros } else { SecondsFormat::Secs };
        return Some((time - delta).to_rfc3339_opts(format, text.ends_with('Z')));
    }
    let naive = naive(text)? - delta;
    let separator = if text.contains('T') { 'T' } else { ' ' };
    let format =
        if fraction { format!("%Y-%m-%d{separator}%H:%M:%S%.6f") } else { format!("%Y-%m-%d{separator}%H:%M:%S") };
    Some(naive.format(&format).to_string())
}

/// A time that says itself which moment it means.
pub fn is_zoned(cursor: &Value) -> bool {
    cursor.as_str().is_some_and(|text| DateTime::parse_from_rfc3339(text).is_ok())
}

/// The end of a run that read an unordered listing: what was changed while it was being read may have been missed on
/// a page read before, so that the cursor goes no further than the time the listing began, by the system's clock.
pub fn no_later(high: Value, began: DateTime<Utc>) -> Value {
    let limit = began - TimeDelta::seconds(1);
    match moment(&high) {
        Some(time) if time > limit => {
            let fraction = high.as_str().is_some_and(|text| text.contains('.'));
            let zoned = high.as_str().is_some_and(|text| DateTime::parse_from_rfc3339(text).is_ok());
            let text = match (zoned, high.as_str().is_some_and(|text| text.contains('T'))) {
                (true, _) => {
                    limit.to_rfc3339_opts(if fraction { SecondsFormat::Micros } else { SecondsFormat::Secs }, true)
                }
                (false, true) => limit.format("%Y-%m-%dT%H:%M:%S").to_string(),
                (false, false) => limit.format("%Y-%m-%d %H:%M:%S").to_string(),
            };
            Value::String(text)
        }
        _ => high,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_cursor_is_put_back_in_its_own_spelling() {
        let back = |text: &str, seconds| earlier(text, Duration::from_secs(seconds)).unwrap();
        assert_eq!(back("2026-01-01T00:00:30Z", 60), "2025-12-31T23:59:30Z");
        assert_eq!(back("2026-01-01T00:00:30.250000+02:00", 1), "2026-01-01T00:00:29.250000+02:00");
        assert_eq!(back("2026-01-01 00:00:30", 30), "2026-01-01 00:00:00");
        assert_eq!(back("2026-01-02", 90_000), "2025-12-31");
        assert_eq!(earlier("yesterday", Duration::from_secs(1)), None);
    }

    #[test]
    fn an_unordered_listing_never_moves_the_cursor_past_its_own_beginning() {
        let began = DateTime::parse_from_rfc3339("2026-01-01T12:00:00Z").unwrap().to_utc();
        assert_eq!(no_later(json!("2026-01-01T11:00:00Z"), began), json!("2026-01-01T11:00:00Z"));
        assert_eq!(no_later(json!("2026-01-01T12:00:05Z"), began), json!("2026-01-01T11:59:59Z"));
        assert_eq!(no_later(json!(77), began), json!(77));
    }
}
