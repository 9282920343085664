//! Answers for `link("object"; key)` and `local("object"; id)`.

use std::collections::HashMap;
use std::fmt;

use serde_json::Value;

/// What an expression asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    /// The link of the local row with this key: a scalar for a single-column key, or an object.
    Link { object: String, key: Value },
    /// The same, of a row that need not have a counterpart yet.
    Later { object: String, key: Value },
    /// The local row whose counterpart in the system has this id.
    Local { object: String, id: Value },
}

impl fmt::Display for Wanted {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wanted::Link { object, key } | Wanted::Later { object, key } => write!(out, "the link of {object} {key}"),
            Wanted::Local { object, id } => write!(out, "the local row of {object} {id}"),
        }
    }
}

/// What was fetched for one record's expressions. An answer of `None` means: looked for, and not there.
#[derive(Clone, Debug, Default)]
pub struct Links {
    answers: HashMap<(Kind, String, String), Option<Value>>,
    owed: Vec<Owed>,
}

/// A link that `link_later(object; key)` was asked for and that is not there: object and key.
pub type Owed = (String, Value);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Link,
    Later,
    Local,
}

impl Links {
    /// The answer to `link(object; key)`: `{id, …kept facts}`.
    pub fn put_link(&mut self, object: &str, key: &Value, answer: Option<Value>) {
        self.answers.insert(entry(Kind::Link, object, key), answer);
    }

    /// The answer to `link_later(object; key)`; `None` is owed.
    pub fn put_later(&mut self, object: &str, key: &Value, answer: Option<Value>) {
        self.owed.retain(|(owed, of)| owed != object || of != key);
        if answer.is_none() {
            self.owed.push((object.to_owned(), key.clone()));
        }
        self.answers.insert(entry(Kind::Later, object, key), answer);
    }

    /// What `link_later(…)` was asked for and is not there.
    pub fn owed(&self) -> &[Owed] {
        &self.owed
    }

    /// The answer to `local(object; id)`: the local row's key.
    pub fn put_local(&mut self, object: &str, id: &Value, answer: Option<Value>) {
        self.answers.insert(entry(Kind::Local, object, id), answer);
    }

    pub(super) fn link(&self, object: &str, key: &Value) -> Option<&Option<Value>> {
        self.answers.get(&entry(Kind::Link, object, key))
    }

    pub(super) fn later(&self, object: &str, key: &Value) -> Option<&Option<Value>> {
        self.answers.get(&entry(Kind::Later, object, key))
    }

    pub(super) fn local(&self, object: &str, id: &Value) -> Option<&Option<Value>> {
        self.answers.get(&entry(Kind::Local, object, id))
    }
}

/// Keys are compared as text, names of an object sorted: `7` and `"7"` are one, whatever the mapping made of it.
fn entry(kind: Kind, object: &str, key: &Value) -> (Kind, String, String) {
    let text = match key {
        Value::String(text) => text.clone(),
        Value::Object(fields) => {
            let mut fields: Vec<String> = fields.iter().map(|(name, value)| format!("{name:?}:{value}")).collect();
            fields.sort_unstable();
            fields.join(",")
        }
        other => other.to_string(),
    };
    (kind, object.to_owned(), text)
}
