//! When two JSON values mean the same: numbers by value (`9.90` is `9.9`), objects whatever their order.

use serde_json::{Number, Value};

pub fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            a == b || matches!((decimal(a), decimal(b)), (Some(a), Some(b)) if a == b)
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(name, value)| b.get(name).is_some_and(|other| same(value, other)))
        }
        _ => a == b,
    }
}

/// A number's text, the same for numbers that are [`same`].
pub(super) fn plain(number: &Number) -> String {
    match decimal(number) {
        Some((negative, digits, power)) => format!("{}{digits}e{power}", if negative { "-" } else { "" }),
        None => number.to_string(),
    }
}

/// Sign, digits without zeros at either end, power of ten of the last digit.
fn decimal(number: &Number) -> Option<(bool, String, i64)> {
    let text = number.to_string();
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.as_str()),
    };
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.trim_start_matches('+').parse::<i64>().ok()?),
        None => (text, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let kept = digits.trim_end_matches('0');
    let power = exponent.checked_sub(fraction.len() as i64)?.checked_add((digits.len() - kept.len()) as i64)?;
    let kept = kept.trim_start_matches('0');
    Some(if kept.is_empty() { (false, String::new(), 0) } else { (negative, kept.to_owned(), power) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_same_by_value_and_never_by_rounding() {
        let same = |a: &str, b: &str| same(&serde_json::from_str(a).unwrap(), &serde_json::from_str(b).unwrap());
        for (a, b) in [
            ("9.90", "9.9"),
            ("1e2", "100"),
            ("0", "-0.00"),
            ("[1.0]", "[1]"),
            (r#"{"a":1,"b":2}"#, r#"{"b":2.0,"a":1}"#),
        ] {
            assert!(same(a, b), "{a} {b}");
        }
        for (a, b) in [
            ("9007199254740993", "9007199254740992"),
            ("1", "\"1\""),
            ("-1", "1"),
            ("0.1", "0.10000000000000001"),
            ("10", "1"),
        ] {
            assert!(!same(a, b), "{a} {b}");
        }
    }
}
