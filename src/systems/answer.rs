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
    pub masked: Masked,
}

/// Parts of a request that a reference (`${env:…}`, `${file:…}`) went into: sent as they are, and shown as `***`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Masked {
    pub path: bool,
    pub body: bool,
    /// Names of parameters.
    pub params: Vec<String>,
    /// Names of headers.
    pub headers: Vec<String>,
}

const HIDDEN: &str = "***";

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
            masked: Masked::default(),
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
        let path = self.shown_path();
        let mut separator = if path.contains('?') { '&' } else { '?' };
        let mut line = format!("{} {path}", self.method);
        for (name, value) in &self.query {
            line.push(separator);
            line.push_str(name);
            line.push('=');
            line.push_str(if self.hides_param(name) { HIDDEN } else { value });
            separator = '&';
        }
        line
    }

    /// The path for people: of a query in it, values that are hidden are not shown.
    pub fn shown_path(&self) -> String {
        if self.masked.path {
            return format!("/{HIDDEN}");
        }
        let Some((path, query)) = self.path.split_once('?') else { return self.path.clone() };
        let pair = |pair: &str| match pair.split_once('=') {
            Some((name, _)) if self.hides_param(name) => format!("{name}={HIDDEN}"),
            _ => pair.to_owned(),
        };
        let pairs: Vec<_> = query.split('&').map(pair).collect();
        format!("{path}?{}", pairs.join("&"))
    }

    /// As a dead letter and `preview` show it: what the system's `auth` adds is no part of it, and what references
    /// went into, or what by its name is a secret, is hidden.
    pub fn to_json(&self) -> Value {
        let header = |(name, value): &(String, String)| {
            let hidden = self.masked.headers.contains(name) || is_secret(name);
            (name.clone(), Value::from(if hidden { HIDDEN } else { value.as_str() }))
        };
        let headers = Value::Object(self.headers.iter().map(header).collect());
        let body = if self.masked.body { Some(Value::from(HIDDEN)) } else { self.body.clone() };
        json!({ "request": self.line(), "headers": headers, "body": body })
    }

    fn hides_param(&self, name: &str) -> bool {
        self.masked.params.iter().any(|masked| masked == name) || is_secret(name)
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
        self.headers_of(name).next()
    }

    /// Every value of a header, which may stand there several times.
    pub fn headers_of(&self, name: &str) -> impl Iterator<Item = &str> {
        let named = |(have, _): &&(String, String)| have.eq_ignore_ascii_case(name);
        self.headers.iter().filter(named).map(|(_, value)| value.as_str())
    }

    pub fn to_json(&self) -> Value {
        json!({ "status": self.status, "body": self.body })
    }

    /// It says that all is well, with a page for people: what stands before a system shows such a one when the system is
    /// away, or wants somebody to log in. An HTML content type alone is none: empty answers and JSON often have it.
    pub fn is_page(&self) -> bool {
        let Value::String(text) = &self.body else { return false };
        let text = text.trim_start();
        let begins = |with: &str| text.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with));
        let kind = || self.header("content-type").and_then(|kind| kind.split(';').next()).unwrap_or_default().trim();
        let html = || ["text/html", "application/xhtml+xml"].iter().any(|html| html.eq_ignore_ascii_case(kind()));
        (200..300).contains(&self.status)
            && (begins("<!doctype html") || begins("<html") || text.starts_with('<') && html())
    }

    /// Whoever gave it may have failed after it has done what it was asked for.
    pub fn is_doubtful(&self) -> bool {
        self.status >= 500 || self.is_page()
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

/// Whether a header or parameter of this name holds credentials, wherever its value comes from.
fn is_secret(name: &str) -> bool {
    let plain: String = name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    plain == "cookie"
        || ["authorization", "apikey", "accesstoken", "authtoken", "secret", "password"]
            .iter()
            .any(|part| plain.contains(part))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_told_from_an_answer() {
        let page = |status: u16, kind: &str, body: Value| {
            let headers = vec![("content-type".to_owned(), kind.to_owned())];
            HttpResponse { status, headers, body }.is_page()
        };
        for body in ["<!DOCTYPE html><html>", "\n <HTML lang=\"en\">", "<!doctype HTML PUBLIC>"] {
            assert!(page(200, "text/plain", json!(body)), "{body}");
        }
        for body in ["<?xml version=\"1.0\"?><!DOCTYPE html>", "<!-- back soon --><head>", "<script>"] {
            assert!(page(200, "text/html; charset=utf-8", json!(body)), "{body}");
            assert!(!page(200, "application/xml", json!(body)), "{body}");
        }
        for body in [Value::Null, json!("OK"), json!({"id": 1}), json!([]), json!("<")] {
            assert_eq!(page(200, "Text/HTML", body.clone()), body == "<", "{body}");
        }
        assert!(!page(404, "text/html", json!("<html>")), "its status tells");
        assert!(!page(200, "application/json", json!("é<html>")));
    }

    #[test]
    fn what_is_masked_or_secret_by_its_name_is_never_shown() {
        let mut request = HttpRequest::new(Method::GET, "/orders?api_key=k1&since=3");
        request.query = vec![("page".to_owned(), "2".to_owned()), ("tenant".to_owned(), "k2".to_owned())];
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        request.headers = vec![header("Authorization", "Bearer k3"), header("X-Shop", "k4"), header("Accept", "json")];
        request.masked.params = vec!["tenant".to_owned()];
        request.masked.headers = vec!["X-Shop".to_owned()];
        assert_eq!(request.line(), "GET /orders?api_key=***&since=3&page=2&tenant=***");
        let shown = request.to_json();
        assert_eq!(shown["headers"], json!({"Authorization": "***", "X-Shop": "***", "Accept": "json"}));
        request.masked.path = true;
        request.masked.body = true;
        request.body = Some(json!({"key": "k5"}));
        let shown = request.to_json().to_string();
        assert!(!["k1", "k2", "k3", "k4", "k5"].iter().any(|secret| shown.contains(secret)), "{shown}");
    }
}
