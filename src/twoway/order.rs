//! Which of two values that a system gave is the later: cursors of its listings, versions of its records.

use std::cmp::Ordering;

use chrono::{DateTime, NaiveDateTime, Utc};
use serde_json::{Number, Value};

/// The moment that a text names, where it names one. Times without a zone are UTC.
pub fn moment(value: &Value) -> Option<DateTime<Utc>> {
    let text = value.as_str()?;
    DateTime::parse_from_rfc3339(text).map(|time| time.to_utc()).ok().or_else(|| naive(text).map(|time| time.and_utc()))
}

pub fn naive(text: &str) -> Option<NaiveDateTime> {
    ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f"]
        .iter()
        .find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())
}

/// Times by time, numbers by value, texts by their bytes; null is before all.
pub fn order(one: &Value, other: &Value) -> Ordering {
    if let (Some(one), Some(other)) = (moment(one), moment(other)) {
        return one.cmp(&other);
    }
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => numbers(one, other),
        (Value::String(one), Value::String(other)) => one.cmp(other),
        _ => rank(one).cmp(&rank(other)),
    }
}

fn numbers(one: &Number, other: &Number) -> Ordering {
    let (one, other) = (one.to_string(), other.to_string());
    match (one.parse::<i128>(), other.parse::<i128>()) {
        (Ok(one), Ok(other)) => one.cmp(&other),
        _ => match (one.parse::<f64>(), other.parse::<f64>()) {
            (Ok(one), Ok(other)) => one.total_cmp(&other),
            _ => one.cmp(&other),
        },
    }
}

fn rank(value: &Value) -> u8 {
    match value {
        Value::Null => 0,
        Value::Number(_) => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_ordered_by_what_they_mean() {
        let sorted = |a: Value, b: Value| order(&a, &b);
        assert_eq!(sorted(json!("2026-01-01T01:00:00+02:00"), json!("2026-01-01T00:00:00Z")), Ordering::Less);
        assert_eq!(sorted(json!(10), json!(9)), Ordering::Greater);
        assert_eq!(sorted(json!("10"), json!("9")), Ordering::Less);
        assert_eq!(sorted(Value::Null, json!(0)), Ordering::Less);
        assert_eq!(sorted(json!(1.5), json!(1)), Ordering::Greater);
    }
}
