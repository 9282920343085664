//! What a link remembers of its pushes until the record is seen again.
//!
//! A record that says what it said when it was last seen looks untouched, unless a push has come in between: then
//! somebody has put it back, or the system did not take what was sent. Where the system's answer has the record, that
//! tells which; where it has not, the record is taken at its word, so that row and record never stay apart. Once: where
//! the row is sent again for that, and the record says the same again, it is the system's way, and nobody is asked more.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::same;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sent {
    /// Since the record was last seen, oldest first; every column is in the last push that sent it.
    #[serde(default)]
    pushes: Vec<Push>,
    /// Columns that are sent again since the record had not taken them: `[what the row has, what the record had]`.
    #[serde(default)]
    tried: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Push {
    /// Columns of the row, each with its agreed value from before the first push that sent it.
    pub columns: Map<String, Value>,
    /// The record as the system answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Value>,
}

/// A column that was sent since the record was last seen.
#[derive(Clone, Debug, PartialEq)]
pub struct SentColumn {
    /// Its agreed value from before.
    pub was: Value,
    /// What the record that the system answered with means for it.
    pub answered: Option<Value>,
    /// It was sent for the second time: `[what the row had, what the record had]` before.
    pub tried: Option<Value>,
}

pub type SentColumns = BTreeMap<String, SentColumn>;

impl Sent {
    /// One push more: of `columns`, each with the value agreed on before it; with null where that was not `known`, and
    /// everything was sent.
    pub fn push(&mut self, columns: &Map<String, Value>, known: bool, answer: Option<Value>) {
        let mut columns = columns.clone();
        for earlier in &mut self.pushes {
            for (name, was) in &mut columns {
                if let Some(first) = earlier.columns.remove(name)
                    && known
                {
                    *was = first;
                }
            }
        }
        self.pushes.retain(|push| !push.columns.is_empty());
        if !columns.is_empty() {
            self.pushes.push(Push { columns, answer });
        }
    }

    /// A push whose outcome nobody knows, and whose changes are sent again: whatever was agreed on may have been sent.
    pub fn lost(&mut self, agreed: &Map<String, Value>) {
        self.push(agreed, true, None);
    }

    pub fn is_empty(&self) -> bool {
        self.pushes.is_empty() && self.tried.is_empty()
    }

    pub fn pushes(&self) -> &[Push] {
        &self.pushes
    }

    pub fn tried(&self, column: &str) -> Option<&Value> {
        self.tried.get(column)
    }

    /// What is left to know when the record has been seen. `agreed`: columns that are alike by now, or are to be;
    /// `again`: those that only moved for having been sent, of `incoming` and of the row as it is now.
    pub fn seen(
        &self,
        agreed: &Map<String, Value>,
        again: &[String],
        incoming: &Map<String, Value>,
        row: &Map<String, Value>,
    ) -> Sent {
        let mut tried = self.tried.clone();
        let sent = |name: &String| self.pushes.iter().any(|push| push.columns.contains_key(name));
        tried.retain(|name, _| !agreed.contains_key(name) && !sent(name));
        for name in again {
            if let (Some(incoming), Some(row)) = (incoming.get(name), row.get(name))
                && !same(incoming, row)
            {
                tried.insert(name.clone(), json!([row, incoming]));
            }
        }
        Sent { pushes: Vec::new(), tried }
    }
}

/// The columns of `now` that are not as agreed on, each with its agreed value; all of them, with null, where nothing is
/// known to be agreed on.
pub fn changed_columns(agreed: Option<&Map<String, Value>>, now: &Map<String, Value>) -> Map<String, Value> {
    let was = |name: &String| agreed.map_or(Value::Null, |agreed| agreed.get(name).cloned().unwrap_or_default());
    let changed = now.iter().map(|(name, value)| (name, value, was(name)));
    let changed = changed.filter(|(_, value, was)| agreed.is_none() || !same(value, was));
    changed.map(|(name, _, was)| (name.clone(), was)).collect()
}

/// A value that no map takes for `value`: tells whether a column is seen in what is sent, where nothing is known to be
/// agreed on.
pub fn other_than(value: &Value) -> Value {
    match value {
        Value::Bool(value) => json!(!value),
        // Far enough away that rounding does not hide it.
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(number), _) => json!(number.checked_add(1_000_003).unwrap_or(0)),
            (None, Some(number)) => json!(number * 2.0 + 1_000_003.0),
            (None, None) => Value::Null,
        },
        Value::String(text) => json!(format!("~{text}")),
        _ => json!("~"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_column_is_in_its_last_push_with_its_first_value() {
        let map = |value: Value| value.as_object().unwrap().clone();
        let mut sent = Sent::default();
        sent.push(&map(json!({"a": 1, "b": 1})), true, Some(json!("first")));
        sent.push(&map(json!({"a": 2})), true, None);
        sent.push(&map(json!({})), true, Some(json!("nothing")));
        assert_eq!(
            serde_json::to_value(&sent).unwrap(),
            json!({"pushes": [{"columns": {"b": 1}, "answer": "first"}, {"columns": {"a": 1}}], "tried": {}})
        );
        sent.push(&map(json!({"b": 7})), true, None);
        assert_eq!(sent.pushes().len(), 2);
        assert_eq!(sent.pushes()[1].columns["b"], 1);
        sent.push(&map(json!({"b": null})), false, None);
        assert_eq!(sent.pushes()[1].columns["b"], Value::Null);
    }
}
