//! The tree of a YAML file.

use std::fmt;

use serde_json::Value;

use super::reference;
use super::{ConfigError, Place, Spanned};

/// One value of a file, and where it stands.
#[derive(Clone, Debug)]
pub struct Node {
    pub place: Place,
    pub kind: NodeKind,
}

#[derive(Clone, Debug)]
pub enum NodeKind {
    /// Nothing, `~` or `null`: the same as not set.
    Null,
    Scalar(Scalar),
    List(Vec<Node>),
    /// In the order of the file; no name twice.
    Map(Vec<(Spanned<String>, Node)>),
}

/// A scalar as it stands in the file. What its text means (number, time, …) is decided by who reads it, so that
/// `"5"` and `5` are the same to a setting that wants a number.
#[derive(Clone)]
pub struct Scalar {
    text: String,
    /// Without quotes and not a block: may be a number or a boolean in JSON.
    plain: bool,
    /// References are already replaced.
    resolved: bool,
    masked: bool,
}

impl Scalar {
    pub(super) fn new(text: String, plain: bool) -> Self {
        Scalar { text, plain, resolved: false, masked: false }
    }

    pub(super) fn resolved(text: String, masked: bool) -> Self {
        Scalar { text, plain: false, resolved: true, masked }
    }

    /// The text as it stands in the file, references not replaced.
    pub fn raw(&self) -> &str {
        &self.text
    }

    fn text(&self, place: &Place) -> Result<(String, bool), ConfigError> {
        if self.resolved { Ok((self.text.clone(), self.masked)) } else { reference::replace(&self.text, place) }
    }
}

impl fmt::Debug for Scalar {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.masked { out.write_str("***") } else { write!(out, "{:?}", self.text) }
    }
}

impl Node {
    pub fn scalar(text: impl Into<String>, place: Place) -> Self {
        Node { place, kind: NodeKind::Scalar(Scalar::resolved(text.into(), false)) }
    }

    pub fn is_null(&self) -> bool {
        matches!(self.kind, NodeKind::Null)
    }

    pub fn is_map(&self) -> bool {
        matches!(self.kind, NodeKind::Map(_))
    }

    pub fn is_list(&self) -> bool {
        matches!(self.kind, NodeKind::List(_))
    }

    pub fn is_scalar(&self) -> bool {
        matches!(self.kind, NodeKind::Scalar(_))
    }

    /// The text of a scalar, references replaced; `name` is the setting, for the error when it is no scalar.
    pub fn text(&self, name: &str) -> Result<Spanned<String>, ConfigError> {
        match &self.kind {
            NodeKind::Scalar(scalar) => {
                let (text, masked) = scalar.text(&self.place)?;
                Ok(Spanned::new(text, self.place.clone()).mask(masked))
            }
            _ => Err(self.wrong(name, "a text")),
        }
    }

    /// The entries of a map.
    pub fn map(&self, name: &str) -> Result<&[(Spanned<String>, Node)], ConfigError> {
        match &self.kind {
            NodeKind::Map(entries) => Ok(entries),
            _ => Err(self.wrong(name, "a map")),
        }
    }

    /// Whether a reference (`${env:…}`, `${file:…}`) went, or will go, into it.
    pub fn has_reference(&self) -> bool {
        match &self.kind {
            NodeKind::Null => false,
            NodeKind::Scalar(scalar) => scalar.masked || !scalar.resolved && scalar.text.contains("${"),
            NodeKind::List(items) => items.iter().any(Node::has_reference),
            NodeKind::Map(entries) => entries.iter().any(|(_, node)| node.has_reference()),
        }
    }

    /// As JSON: plain scalars that look like numbers or booleans are such, all other scalars are strings.
    pub fn to_json(&self) -> Result<Value, ConfigError> {
        Ok(match &self.kind {
            NodeKind::Null => Value::Null,
            NodeKind::Scalar(scalar) => match (scalar.plain, scalar.text.as_str()) {
                (true, "true" | "True" | "TRUE") => Value::Bool(true),
                (true, "false" | "False" | "FALSE") => Value::Bool(false),
                (true, text) => match serde_json::from_str::<serde_json::Number>(text) {
                    Ok(number) => Value::Number(number),
                    Err(_) => Value::String(scalar.text(&self.place)?.0),
                },
                (false, _) => Value::String(scalar.text(&self.place)?.0),
            },
            NodeKind::List(items) => Value::Array(items.iter().map(Node::to_json).collect::<Result<_, _>>()?),
            NodeKind::Map(entries) => {
                let entry = |(name, node): &(Spanned<String>, Node)| Ok((name.value.clone(), node.to_json()?));
                Value::Object(entries.iter().map(entry).collect::<Result<_, ConfigError>>()?)
            }
        })
    }

    /// The error for a setting that is of another kind than `wanted` ("a duration such as `30s`").
    pub fn wrong(&self, name: &str, wanted: &str) -> ConfigError {
        let found = match &self.kind {
            NodeKind::Null => "is empty".to_owned(),
            NodeKind::List(_) => "is a list".to_owned(),
            NodeKind::Map(_) => "is a map".to_owned(),
            NodeKind::Scalar(scalar) if scalar.masked || scalar.text.contains("${") => "is not one".to_owned(),
            NodeKind::Scalar(scalar) => format!("is `{}`", shorten(&scalar.text)),
        };
        let error = ConfigError::new(&self.place, format!("`{name}` must be {wanted}, but {found}"));
        match (&self.kind, self.flow_start()) {
            (NodeKind::Map(_) | NodeKind::List(_), Some(open)) if wanted.contains("text") || wanted.contains("jq") => {
                error.hint(format!(
                    "YAML reads `{open}` as its own; put quotes around a jq expression: {name}: '{open} … '"
                ))
            }
            _ => error,
        }
    }

    /// `{` or `[`, where a map or list is written in flow style.
    fn flow_start(&self) -> Option<char> {
        let first = self.place.line_text()?.chars().nth(self.place.column.checked_sub(1)? as usize)?;
        matches!(first, '{' | '[').then_some(first)
    }
}

fn shorten(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    if line.len() == text.trim_end().len() && line.chars().count() <= 60 {
        line.to_owned()
    } else {
        line.chars().take(57).chain("…".chars()).collect()
    }
}
