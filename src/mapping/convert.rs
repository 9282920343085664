//! JSON values to jq's and back: numbers keep their text, objects their order.

use std::str::FromStr;

use jaq_core::ValT;
use jaq_json::{Map, Num, Val};
use serde_json::{Number, Value};

use super::number::Decimal;

/// How deep a value that an expression makes may be nested.
pub(super) const DEEPEST: usize = 256;

pub(super) fn to_val(value: &Value) -> Val {
    match value {
        Value::Null => Val::Null,
        Value::Bool(value) => Val::Bool(*value),
        Value::Number(number) => number_to_val(number),
        Value::String(text) => Val::from(text.clone()),
        Value::Array(items) => items.iter().map(to_val).collect(),
        Value::Object(fields) => {
            let field = |(name, value): (&String, &Value)| (Val::from(name.clone()), to_val(value));
            Val::obj(fields.iter().map(field).collect::<Map>())
        }
    }
}

fn number_to_val(number: &Number) -> Val {
    match number.as_i64() {
        Some(whole) => Val::Num(Num::from_integral(whole)),
        None => Val::from_num(number.as_str()).unwrap_or_default(),
    }
}

/// A jq value as JSON. What JSON cannot say: NaN and infinity become null, bytes a text with replacement characters,
/// names that are no texts their JSON.
pub(super) fn from_val(value: &Val) -> Result<Value, String> {
    within(value, DEEPEST * 4)
}

fn within(value: &Val, depth: usize) -> Result<Value, String> {
    let Some(depth) = depth.checked_sub(1) else { return Err("the value is nested too deep".to_owned()) };
    Ok(match value {
        Val::Null => Value::Null,
        Val::Bool(value) => Value::Bool(*value),
        Val::Num(Num::Int(whole)) => Value::from(*whole),
        Val::Num(number) => number_from_val(number),
        Val::BStr(bytes) | Val::TStr(bytes) => Value::String(String::from_utf8_lossy(bytes).into_owned()),
        Val::Arr(items) => Value::Array(items.iter().map(|item| within(item, depth)).collect::<Result<_, _>>()?),
        Val::Obj(fields) => {
            let field = |(name, value): (&Val, &Val)| {
                let name = match name {
                    Val::BStr(bytes) | Val::TStr(bytes) => String::from_utf8_lossy(bytes).into_owned(),
                    other => other.to_string(),
                };
                Ok((name, within(value, depth)?))
            };
            Value::Object(fields.iter().map(field).collect::<Result<_, String>>()?)
        }
    })
}

fn number_from_val(number: &Num) -> Value {
    match number {
        Num::Float(float) if !float.is_finite() => Value::Null,
        // Whole doubles are written without a fraction, as jq does.
        Num::Float(float) if float.fract() == 0.0 && float.abs() < 1e17 => Value::from(*float as i64),
        other => Number::from_str(&other.to_string()).map_or(Value::Null, Value::Number),
    }
}

/// Whether two JSON values mean the same: numbers by value (`1.0` is `1`), objects whatever their order.
pub fn equal(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            one == other
                || match (Decimal::parse(one.as_str()), Decimal::parse(other.as_str())) {
                    (Some(one), Some(other)) => one.compare(&other).is_eq(),
                    _ => false,
                }
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| equal(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(name, value)| other.get(name).is_some_and(|other| equal(value, other)))
        }
        (one, other) => one == other,
    }
}
