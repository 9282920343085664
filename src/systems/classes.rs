//! Classes of answers: what a status and a body mean for the record that was sent.
//!
//! The rules of a system (`errors:`) come first, in order; what none of them matches is classed by HTTP's own
//! meaning. A rule may look at `$probe`, so that a 500 for one bad record is told from an outage.

use serde_json::Value;

use crate::config::{ConfigError, Node, Section, Spanned};
use crate::mapping::{Compiler, MapError, Program, Scope};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Applied,
    Retry,
    Reject,
    Unavailable,
}

crate::choices!(Class {
    "applied" => Class::Applied,
    "retry" => Class::Retry,
    "reject" => Class::Reject,
    "unavailable" => Class::Unavailable,
});

/// `{ status: 500, when: "$probe.ok", then: reject }`
#[derive(Clone)]
pub struct Rule {
    /// Inclusive; empty matches every status.
    statuses: Vec<(u16, u16)>,
    when: Option<Program>,
    asks_probe: bool,
    then: Class,
}

impl Rule {
    pub fn read(mut section: Section, compiler: &Compiler) -> Result<Self, ConfigError> {
        let statuses = match section.node("status")? {
            None => Vec::new(),
            Some(node) => statuses(&node, "status")?,
        };
        let when: Option<Spanned<String>> = section.take("when")?;
        if statuses.is_empty() && when.is_none() {
            return Err(section.missing("status").hint("a rule has a `status`, a `when`, or both"));
        }
        let then = section.require("then")?;
        let rule = Rule {
            statuses,
            asks_probe: when.as_ref().is_some_and(|when| when.contains("$probe")),
            when: when.map(|when| compiler.jq(&when)).transpose()?,
            then,
        };
        section.finish()?;
        Ok(rule)
    }

    pub fn matches_status(&self, status: u16) -> bool {
        self.statuses.is_empty() || self.statuses.iter().any(|(low, high)| (*low..=*high).contains(&status))
    }

    /// True where `when` cannot be asked before the probe has been.
    pub fn asks_probe(&self) -> bool {
        self.asks_probe
    }

    /// The rule's class where it matches. `probe` is null where the rule does not ask for it.
    pub fn class(&self, status: u16, body: &Value, probe: &Value) -> Result<Option<Class>, MapError> {
        if !self.matches_status(status) {
            return Ok(None);
        }
        let Some(when) = &self.when else { return Ok(Some(self.then)) };
        let scope = Scope { status: Some(i64::from(status)), probe: Some(probe), ..Scope::default() };
        let truth = when.first(body, &scope)?;
        Ok((!matches!(truth, Value::Null | Value::Bool(false))).then_some(self.then))
    }
}

/// One status, a class (`5xx`), a range (`500-503`), or a list of them.
pub fn statuses(node: &Node, name: &str) -> Result<Vec<(u16, u16)>, ConfigError> {
    let texts: Vec<Spanned<String>> = crate::config::FromNode::from_node(node.clone(), name)?;
    texts.iter().map(|text| one_status(text, name)).collect()
}

fn one_status(text: &Spanned<String>, name: &str) -> Result<(u16, u16), ConfigError> {
    let value = text.value.trim();
    let number = |text: &str| text.trim().parse::<u16>().ok().filter(|status| (100..=599).contains(status));
    let range = if let Some(class) = value.strip_suffix("xx").or_else(|| value.strip_suffix("XX")) {
        number(&format!("{class}00")).map(|low| (low, low + 99))
    } else if let Some((low, high)) = value.split_once('-') {
        number(low).zip(number(high))
    } else {
        number(value).map(|status| (status, status))
    };
    range.filter(|(low, high)| low <= high).ok_or_else(|| {
        ConfigError::new(&text.place, format!("`{name}` must be HTTP statuses, but is `{value}`"))
            .hint("for example `409`, `5xx`, `500-503`, or a list of such")
    })
}

/// What a status means where no rule says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    Class(Class),
    /// The request came too early or too often; the record is not the cause.
    Busy,
    /// A gateway gave up on the system: the request may have gone through.
    GatewayLost,
    /// The system refuses our credentials.
    Credentials,
    /// This record is bad, or the system is: the probe knows.
    AskProbe,
    /// What was asked for is not there; or the system is not, and something before it says so.
    NotThere(Class),
}

pub fn meaning(status: u16, is_delete: bool) -> Meaning {
    match status {
        200..=299 => Meaning::Class(Class::Applied),
        // What is to be gone is gone.
        404 | 410 if is_delete => Meaning::NotThere(Class::Applied),
        404 | 410 => Meaning::NotThere(Class::Reject),
        401 | 407 => Meaning::Credentials,
        408 | 425 | 429 => Meaning::Busy,
        423 => Meaning::Class(Class::Retry),
        503 => Meaning::Class(Class::Unavailable),
        502 | 504 | 520..=529 => Meaning::GatewayLost,
        501 | 505 => Meaning::Class(Class::Reject),
        500..=599 => Meaning::AskProbe,
        _ => Meaning::Class(Class::Reject),
    }
}
