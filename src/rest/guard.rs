//! Who may ask: who has the token, and no page of another origin. Without a token, only who calls this machine by an
//! address or as localhost: a page whose name was made to lead here (DNS rebinding) calls it by its own.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use secrecy::ExposeSecret;

use super::error;
use crate::config::Secret;
use crate::worker::RestSettings;

#[derive(Clone)]
pub struct Guard {
    token: Option<Secret>,
    /// Nobody but this machine can connect.
    local: bool,
}

impl Guard {
    pub fn new(settings: &RestSettings) -> Self {
        Guard { token: settings.token.clone(), local: settings.listen.ip().is_loopback() }
    }

    /// Called by a name that may lead anywhere tomorrow.
    fn is_called_by_another_name(&self, headers: &HeaderMap) -> bool {
        let Some(host) = headers.get(header::HOST) else { return false };
        let own = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok()).is_some_and(|authority| {
            let host = authority.host();
            let address = host.trim_start_matches('[').trim_end_matches(']');
            address.parse::<IpAddr>().is_ok() || host == "localhost" || host.ends_with(".localhost")
        });
        self.local && self.token.is_none() && !own
    }

    fn admits(&self, headers: &HeaderMap) -> bool {
        let Some(token) = &self.token else { return true };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or("");
        let expected = token.expose_secret().as_bytes();
        if let Some(bearer) = given.strip_prefix("Bearer ") {
            return same(bearer.trim().as_bytes(), expected);
        }
        // Registry clients know basic auth: any user, the token as its password.
        let basic = given.strip_prefix("Basic ").and_then(|encoded| STANDARD.decode(encoded.trim()).ok());
        let password = basic.as_deref().and_then(|pair| Some(&pair[pair.iter().position(|byte| *byte == b':')? + 1..]));
        password.is_some_and(|password| same(password, expected))
    }
}

/// Takes as long whatever differs.
fn same(given: &[u8], expected: &[u8]) -> bool {
    given.len() == expected.len() && given.iter().zip(expected).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

pub async fn check(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if !guard.admits(headers) {
        return error(StatusCode::UNAUTHORIZED, "the worker asks for its token (rest.token)");
    }
    if guard.is_called_by_another_name(headers) {
        return error(
            StatusCode::FORBIDDEN,
            "without a token the worker answers to localhost and to addresses only. hint: call it 127.0.0.1, or set rest.token",
        );
    }
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if !reads && foreign(headers) {
        return error(StatusCode::FORBIDDEN, "commands are not taken from pages of another origin");
    }
    next.run(request).await
}

/// True when a browser sends it from a page that the worker did not serve.
fn foreign(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok());
    match text(header::ORIGIN) {
        None => false,
        Some(origin) => origin.split_once("://").map(|(_, host)| host) != text(header::HOST),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn only_who_has_the_token_is_admitted() {
        let guard = Guard { token: Some(Secret::from("s3cret".to_owned())), local: true };
        let basic = format!("Basic {}", STANDARD.encode("anyone:s3cret"));
        for (given, admitted) in [
            ("Bearer s3cret", true),
            (basic.as_str(), true),
            ("Bearer s3cre", false),
            ("Bearer s3cretx", false),
            ("Basic s3cret", false),
            ("s3cret", false),
        ] {
            assert_eq!(guard.admits(&headers(&[(header::AUTHORIZATION, given)])), admitted, "{given}");
        }
        assert!(!guard.admits(&HeaderMap::new()));
        assert!(Guard { token: None, local: true }.admits(&HeaderMap::new()));
    }

    #[test]
    fn without_a_token_only_an_address_and_localhost_are_answered() {
        let called = |guard: &Guard, host: &str| guard.is_called_by_another_name(&headers(&[(header::HOST, host)]));
        let guard = Guard { token: None, local: true };
        for own in ["127.0.0.1:8080", "[::1]:8080", "localhost", "localhost:8080", "worker.localhost:1", "127.0.0.1"] {
            assert!(!called(&guard, own), "{own}");
        }
        for other in ["evil.example:8080", "evil.example", "127.0.0.1.evil.example:8080", "localhost.evil.example", ""]
        {
            assert!(called(&guard, other), "{other}");
        }
        assert!(!guard.is_called_by_another_name(&HeaderMap::new()));
        // Who opened it to others, or asks for the token, may be called anything.
        assert!(!called(&Guard { token: None, local: false }, "tidegate:8080"));
        assert!(!called(&Guard { token: Some(Secret::from("s".to_owned())), local: true }, "tidegate:8080"));
    }

    #[test]
    fn a_page_of_another_origin_is_told_from_the_workers_own() {
        assert!(!foreign(&headers(&[(header::HOST, "127.0.0.1:8080")])));
        let own = [(header::HOST, "127.0.0.1:8080"), (header::ORIGIN, "http://127.0.0.1:8080")];
        assert!(!foreign(&headers(&own)));
        let other = [(header::HOST, "127.0.0.1:8080"), (header::ORIGIN, "https://shop.example")];
        assert!(foreign(&headers(&other)));
    }
}
