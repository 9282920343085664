//! What an expression may see besides its input, and how it fails.

use std::fmt;

use jaq_json::Val;
use serde_json::Value;

use super::convert::to_val;
use super::links::{Links, Wanted};

/// The values behind `$link`, `$cursor` and the other variables; null where not set.
#[derive(Clone, Copy, Default)]
pub struct Scope<'a> {
    /// `$link`: `{id, …kept facts}` of this row's link; null while there is none.
    pub link: Option<&'a Value>,
    /// `$cursor`: where the pull is.
    pub cursor: Option<&'a Value>,
    /// `$secret`: only where a system logs in.
    pub secret: Option<&'a str>,
    /// `$idempotency_key`: the same for every try of one create.
    pub idempotency_key: Option<&'a str>,
    /// `$probe`: `{ok, status}` of the system's probe, where answers are told apart.
    pub probe: Option<&'a Value>,
    /// `$status`: of the response.
    pub status: Option<i64>,
    /// `$headers`: of the response, names in lower case.
    pub headers: Option<&'a Value>,
    /// `$page`: where a paginator is.
    pub page: Option<&'a Value>,
    /// What `link(…)`, `link_later(…)` and `local(…)` answer from.
    pub links: Option<&'a Links>,
}

/// The variables there are, in the order of [`Scope::values`].
pub(super) const VARIABLES: [&str; 8] =
    ["$link", "$cursor", "$secret", "$idempotency_key", "$probe", "$status", "$headers", "$page"];

impl Scope<'_> {
    pub(super) fn values(&self) -> [Val; VARIABLES.len()] {
        let value = |value: Option<&Value>| value.map_or(Val::Null, to_val);
        let text = |text: Option<&str>| text.map_or(Val::Null, |text| Val::from(text.to_owned()));
        [
            value(self.link),
            value(self.cursor),
            text(self.secret),
            text(self.idempotency_key),
            value(self.probe),
            self.status.map_or(Val::Null, |status| Val::from(status as isize)),
            value(self.headers),
            value(self.page),
        ]
    }
}

/// Why an expression gave no value.
#[derive(Clone, Debug, PartialEq)]
pub enum MapError {
    /// Not answered yet: fetch these, put them into [`Links`], run again.
    Needs(Vec<Wanted>),
    /// The row behind this link is not in the system yet: the record waits for it.
    Waits(Wanted),
    /// The expression failed on this input; the text says which one, where, and on what.
    Failed(String),
}

impl fmt::Display for MapError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MapError::Needs(wanted) => {
                out.write_str("needs ")?;
                wanted
                    .iter()
                    .enumerate()
                    .try_for_each(|(at, one)| write!(out, "{}{one}", if at > 0 { ", " } else { "" }))
            }
            MapError::Waits(wanted) => write!(out, "waits for {wanted}"),
            MapError::Failed(text) => out.write_str(text),
        }
    }
}

impl std::error::Error for MapError {}
