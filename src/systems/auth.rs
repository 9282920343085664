//! How a system knows us. A token got by a login request is shared by every request of the system, fetched once
//! however many wait for it, and fetched anew where the system no longer takes it.
//!
//! No token and no secret ever reaches a log, an error or a dead letter: they are put into the request last.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine;
use reqwest::header::{AUTHORIZATION, HeaderName, HeaderValue};
use secrecy::ExposeSecret;
use serde_json::Value;
use tokio::time::Instant;

use super::classes::statuses;
use super::exchange::Lost;
use super::system::lock;
use super::{HttpRequest, HttpResponse, RequestTemplate};
use crate::config::{ConfigError, Secret, Section, Spanned};
use crate::mapping::{Compiler, Escape, Scope, Template};

pub enum AuthSettings {
    None,
    /// The header's value does not change.
    Header {
        name: HeaderName,
        value: HeaderValue,
    },
    /// An API key as a query parameter.
    Query {
        name: String,
        value: Secret,
    },
    Login(Box<Login>),
}

/// `type: login`: a request whose answer gives a token.
pub struct Login {
    request: RequestTemplate,
    secret: Option<Secret>,
    name: HeaderName,
    value: Template,
    /// Statuses that ask for a new login.
    again_on: Vec<(u16, u16)>,
    state: tokio::sync::Mutex<LoginState>,
    /// The tokens that may still be under way in requests, newest last; to be hidden, whoever is logging in.
    tokens: Mutex<VecDeque<String>>,
    /// Logins that came to nothing, since the start.
    failures: AtomicU64,
}

#[derive(Default)]
struct LoginState {
    token: Option<Token>,
    /// When a login was last sent.
    asked: Option<Instant>,
    /// Why the last login that came to nothing did.
    failure: String,
}

/// Logins follow each other no faster, however many requests are told that their token is none: a system that
/// refuses every token is not stormed, and no account is locked for it.
const PACE: Duration = Duration::from_secs(1);

/// A request may come back with a token of some logins ago.
const TOKENS: usize = 8;

/// A header's value, and how many logins led to it.
#[derive(Clone)]
pub struct Token {
    pub value: HeaderValue,
    pub generation: u64,
}

/// What goes into a request.
#[derive(Clone)]
pub enum Credentials {
    None,
    Header { name: HeaderName, value: HeaderValue, generation: Option<u64> },
    Query { name: String, value: Secret },
}

impl AuthSettings {
    pub fn read(mut section: Section, compiler: &Compiler) -> Result<Self, ConfigError> {
        let kind: Spanned<String> = section.require("type")?;
        let auth = match kind.as_str() {
            "none" => AuthSettings::None,
            "bearer" => {
                let token: Secret = section.require("token")?;
                Self::header(&section, "token", AUTHORIZATION, format!("Bearer {}", token.expose_secret()))?
            }
            "basic" => {
                let username: String = section.require("username")?;
                let password: Secret = section.require("password")?;
                let pair = format!("{username}:{}", password.expose_secret());
                let value = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair));
                Self::header(&section, "password", AUTHORIZATION, value)?
            }
            "api_key" => {
                let key: Secret = section.require("key")?;
                let header: Option<Spanned<String>> = section.take("header")?;
                match section.take::<String>("param")? {
                    Some(_) if header.is_some() => {
                        return Err(section.error("param", "an API key goes into a `header` or a `param`, not both"));
                    }
                    Some(name) => AuthSettings::Query { name, value: key },
                    None => {
                        let name = match &header {
                            Some(header) => header_name(header)?,
                            None => HeaderName::from_static("x-api-key"),
                        };
                        Self::header(&section, "key", name, key.expose_secret().to_owned())?
                    }
                }
            }
            "login" => AuthSettings::Login(Box::new(Login::read(&mut section, compiler)?)),
            other => {
                return Err(ConfigError::new(&kind.place, format!("`{other}` is no type of auth"))
                    .hint("one of: bearer, basic, api_key, login, none"));
            }
        };
        section.finish()?;
        Ok(auth)
    }

    /// The name of the query parameter that the API key goes into, where it does.
    pub fn parameter(&self) -> Option<&str> {
        match self {
            AuthSettings::Query { name, .. } => Some(name),
            AuthSettings::None | AuthSettings::Header { .. } | AuthSettings::Login(_) => None,
        }
    }

    /// Texts that must never be shown. Of a login, its last tokens are some.
    pub fn secrets(&self) -> Vec<String> {
        let mut secrets = Vec::new();
        let mut add = |text: &str| {
            // A shorter one would hide half of every text.
            let bare = text.rsplit(' ').next().unwrap_or_default();
            secrets.extend([text, bare].iter().filter(|text| text.len() >= 6).map(|text| (*text).to_owned()));
        };
        match self {
            AuthSettings::None => {}
            AuthSettings::Header { value, .. } => value.to_str().into_iter().for_each(&mut add),
            AuthSettings::Query { value, .. } => add(value.expose_secret()),
            AuthSettings::Login(login) => {
                login.secret.iter().for_each(|secret| add(secret.expose_secret()));
                lock(&login.tokens).iter().for_each(|token| add(token));
            }
        }
        secrets
    }

    fn header(section: &Section, setting: &str, name: HeaderName, value: String) -> Result<Self, ConfigError> {
        match secret_value(&value) {
            Some(value) => Ok(AuthSettings::Header { name, value }),
            None => Err(section
                .error(setting, format!("`{setting}` holds characters that no HTTP header may hold"))
                .hint("is there a line break at the end of the file it comes from?")),
        }
    }
}

fn header_name(name: &Spanned<String>) -> Result<HeaderName, ConfigError> {
    HeaderName::try_from(name.value.trim())
        .map_err(|_| ConfigError::new(&name.place, format!("`{}` is no name of a header", name.value)))
}

fn secret_value(value: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(value).ok()?;
    value.set_sensitive(true);
    Some(value)
}

impl Login {
    fn read(section: &mut Section, compiler: &Compiler) -> Result<Self, ConfigError> {
        let mut request = RequestTemplate::from_line(&section.require("request")?, compiler)?;
        request.take_params(section, compiler)?;
        request.take_body(section, compiler)?;
        let secret: Option<Secret> = section.take("secret")?;
        let header: Spanned<String> = section.require("header")?;
        let Some((name, value)) = header.value.split_once(':') else {
            return Err(ConfigError::new(&header.place, "`header` must be a header's name and value")
                .hint("for example `header: \"Authorization: Bearer {{ .access_token }}\"`"));
        };
        let end = header.value.trim_end().len();
        let (name, value) = (header.part(0..name.len()), header.part(end - value.trim().len()..end));
        let again_on = match section.node("again.on")? {
            Some(node) => statuses(&node, "again.on")?,
            None => vec![(401, 401)],
        };
        Ok(Login {
            request,
            secret,
            name: header_name(&name)?,
            value: compiler.template(&value, Escape::None)?,
            again_on,
            state: tokio::sync::Mutex::default(),
            tokens: Mutex::default(),
            failures: AtomicU64::new(0),
        })
    }

    fn scope(&self) -> Scope<'_> {
        Scope { secret: self.secret.as_ref().map(ExposeSecret::expose_secret), ..Scope::default() }
    }

    pub fn asks_again(&self, status: u16) -> bool {
        self.again_on.iter().any(|(low, high)| (*low..=*high).contains(&status))
    }

    pub fn request(&self) -> Result<HttpRequest, String> {
        let request = self.request.render(&Value::Null, &self.scope());
        request.map(|request| request.purpose("login")).map_err(|error| format!("the login request: {error}"))
    }

    /// The token that a login's answer gives. The answer itself is never shown: it holds the token.
    fn token(&self, response: &HttpResponse, generation: u64) -> Result<Token, String> {
        let wrong = |_| format!("the login's answer (status {}) does not fit `auth.header`", response.status);
        let text = self.value.render(&response.body, &self.scope()).map_err(wrong)?;
        match secret_value(&text) {
            Some(value) => Ok(Token { value, generation }),
            None => Err("the login's answer gives no value that a header may hold".to_owned()),
        }
    }

    /// The token at hand, or a new one where there is none or `stale` is the one at hand. `log_in` sends the login
    /// request; whoever comes while it is under way waits for its outcome, good or bad.
    pub(super) async fn credentials<F>(&self, stale: Option<u64>, system: &str, log_in: F) -> Result<Credentials, Lost>
    where
        F: AsyncFnOnce(HttpRequest) -> Result<HttpResponse, Lost>,
    {
        let failures = self.failures.load(Ordering::Acquire);
        let mut state = self.state.lock().await;
        let generation = state.token.as_ref().map_or(0, |token| token.generation);
        if state.token.is_none() || stale == Some(generation) {
            if self.failures.load(Ordering::Acquire) != failures {
                return Err(Lost::Credentials(state.failure.clone()));
            }
            if let Some(asked) = state.asked {
                tokio::time::sleep_until(asked + PACE).await;
            }
            match self.log_in(&mut state, generation + 1, system, log_in).await {
                Ok(token) => {
                    let mut tokens = lock(&self.tokens);
                    tokens.extend(token.value.to_str().map(str::to_owned));
                    if tokens.len() > TOKENS {
                        tokens.pop_front();
                    }
                    state.token = Some(token);
                }
                Err(lost) => {
                    if !matches!(lost, Lost::NoTurn(_)) {
                        state.failure = lost.reason();
                        self.failures.fetch_add(1, Ordering::AcqRel);
                    }
                    return Err(lost);
                }
            }
        }
        Ok(match &state.token {
            Some(Token { value, generation }) => {
                Credentials::Header { name: self.name.clone(), value: value.clone(), generation: Some(*generation) }
            }
            None => Credentials::None,
        })
    }

    async fn log_in<F>(&self, state: &mut LoginState, generation: u64, system: &str, log_in: F) -> Result<Token, Lost>
    where
        F: AsyncFnOnce(HttpRequest) -> Result<HttpResponse, Lost>,
    {
        let settings = |reason| Lost::Credentials(format!("'{system}': {reason}"));
        let request = self.request().map_err(settings)?;
        state.asked = Some(Instant::now());
        // A login changes nothing that counts: whatever became of it, the request was not sent.
        let response = log_in(request).await.map_err(|lost| match lost {
            Lost::NoTurn(wait) => Lost::NoTurn(wait),
            lost => Lost::NotSent(format!("login: {}", lost.reason())),
        })?;
        if !(200..300).contains(&response.status) {
            return Err(Lost::Credentials(format!("the login to '{system}' was answered with {}", response.status)));
        }
        self.token(&response, generation).map_err(settings)
    }
}
