//! What is asked of a system and what came back, told apart by what the caller must do next.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

/// One request, ready to be sent.
#[derive(Clone, Debug)]
pub struct HttpRequest {
    pub method: Method,
    /// Percent-encoded, appended to the system's `base_url`; may carry a query. An absolute URL is sent only where
    /// its origin is that of `base_url`.
    pub path: String,
    /// Not encoded yet.
    pub query: Vec<(String, String)>,
    /// Win over the system's own headers of the same name.
    pub headers: Vec<(String, String)>,
    pub body: Option<Value>,
    /// `None`: the system's `timeouts.request`.
    pub timeout: Option<Duration>,
    /// What it is for, a label of metrics and counts: `match`, `create`, `update`, `delete`, `pull`, `probe` …
    pub purpose: &'static str,
}

impl HttpRequest {
    pub fn new(method: Method, path: impl Into<String>) -> Self {
        HttpRequest {
            method,
            path: path.into(),
            query: Vec::new(),
            headers: Vec::new(),
            body: None,
            timeout: None,
            purpose: "request",
        }
    }

    pub fn purpose(mut self, purpose: &'static str) -> Self {
        self.purpose = purpose;
        self
    }

    /// True where sending it twice is as sending it never: a lost answer is then no uncertainty.
    pub fn is_safe(&self) -> bool {
        self.method.is_safe()
    }

    /// For people and dead letters: `POST /party.party?f=addresses`.
    pub fn line(&self) -> String {
        let mut line = format!("{} {}", self.method, self.path);
        let mut separator = if self.path.contains('?') { '&' } else { '?' };
        for (name, value) in &self.query {
            line.push(separator);
            line.push_str(name);
            line.push('=');
            line.push_str(value);
            separator = '&';
        }
        line
    }

    /// As a dead letter and `preview` show it. Credentials are not part of a request, so none can show.
    pub fn to_json(&self) -> Value {
        json!({ "request": self.line(), "headers": pairs(&self.headers), "body": self.body })
    }
}

/// A system's answer, read to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpResponse {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// Parsed where it is JSON, else its text; null where it is empty.
    pub body: Value,
}

impl HttpResponse {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn to_json(&self) -> Value {
        json!({ "status": self.status, "body": self.body })
    }

    /// The body in at most some 300 characters, for a reason.
    pub fn excerpt(&self) -> String {
        let text = match &self.body {
            Value::Null => return "(empty body)".to_owned(),
            Value::String(text) => text.trim().to_owned(),
            other => other.to_string(),
        };
        match text.char_indices().nth(300) {
            Some((end, _)) => format!("{}…", &text[..end]),
            None => text,
        }
    }
}

fn pairs(pairs: &[(String, String)]) -> Value {
    Value::Object(pairs.iter().map(|(name, value)| (name.clone(), Value::from(value.clone()))).collect())
}

/// What came of a request, by what is to be done about it.
#[derive(Clone, Debug)]
pub enum Answer {
    Applied(HttpResponse),
    /// This record is bad: the same request would be refused again.
    Rejected {
        response: HttpResponse,
        reason: String,
    },
    /// Not applied, passing: try again. Where `response` is there, the record itself may be the cause, and after
    /// the tries allowed it is to be rejected with it; without one the system is busy (429, its budget used up)
    /// and tries are not counted.
    Retry {
        after: Option<Duration>,
        response: Option<HttpResponse>,
        reason: String,
    },
    /// The system is down: wait for [`System::wait_available`](super::System::wait_available). `maybe_applied` is
    /// true where a gateway answered for the system (502, 504), so that the request may have gone through.
    Unavailable {
        after: Option<Duration>,
        reason: String,
        maybe_applied: bool,
    },
    /// The request was sent and no answer came: it may or may not have been applied. Never given for a safe method.
    Uncertain {
        reason: String,
    },
}

impl Answer {
    /// Label of metrics.
    pub fn class(&self) -> &'static str {
        match self {
            Answer::Applied(_) => "applied",
            Answer::Rejected { .. } => "rejected",
            Answer::Retry { .. } => "retry",
            Answer::Unavailable { .. } => "unavailable",
            Answer::Uncertain { .. } => "uncertain",
        }
    }
}
