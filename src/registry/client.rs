//! Client of a schema registry with Confluent's REST API (Confluent's own, Apicurio, Karapace, Redpanda, another
//! Tidegate).
//!
//! What may pass (no connection, a time-out, 429, 5xx, what no registry says but a proxy in its place) is tried again a
//! few times and then [`RegistryError::Unavailable`], as is a refusal of who we are, which is mended where we do not see
//! it. Everything else is the registry's word on the schema. Ids are cached: they never change their meaning.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use reqwest::{Client, Method, StatusCode, Url};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};

use super::{Registry, RegistryError, SchemaId};

const MEDIA: &str = "application/vnd.schemaregistry.v1+json";
const ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const CONNECT: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(15);
/// Schemas and ids kept.
const CACHED: usize = 10_000;

/// How the registry knows us.
#[derive(Clone, Default)]
pub enum RegistryAuth {
    #[default]
    None,
    Basic {
        username: String,
        password: SecretString,
    },
    Bearer(SecretString),
}

pub struct RegistryClient {
    /// Tried in turn; all lead to the same registry.
    urls: Vec<Url>,
    auth: RegistryAuth,
    http: Client,
    texts: Mutex<HashMap<u32, Arc<str>>>,
    ids: Mutex<HashMap<(String, String), SchemaId>>,
}

impl RegistryClient {
    /// `urls`: one, or several of the same registry, with commas between. Credentials in a URL
    /// (`https://user:password@host`) are basic auth where `auth` says nothing.
    pub fn new(urls: &str, mut auth: RegistryAuth) -> Result<Self, RegistryError> {
        let mut parsed = Vec::new();
        for text in urls.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            // The text may hold a password: it is not shown.
            let invalid = || RegistryError::Rejected("the schema registry's URL must be http:// or https://".into());
            let mut url = Url::parse(text).map_err(|_| invalid())?;
            if !matches!(url.scheme(), "http" | "https") || url.cannot_be_a_base() {
                return Err(invalid());
            }
            if matches!(auth, RegistryAuth::None) && !url.username().is_empty() {
                let plain = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
                auth = RegistryAuth::Basic {
                    username: plain(url.username()),
                    password: plain(url.password().unwrap_or_default()).into(),
                };
            }
            // Both always succeed on a URL that can be a base.
            let _ = url.set_username("");
            let _ = url.set_password(None);
            parsed.push(url);
        }
        if parsed.is_empty() {
            return Err(RegistryError::Rejected("the schema registry has no URL".into()));
        }
        // Whoever comes first installs it; every part of Tidegate installs the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = Client::builder()
            .connect_timeout(CONNECT)
            .timeout(ANSWER)
            .build()
            .map_err(|e| RegistryError::Rejected(format!("the schema registry's client can't be made: {e}")))?;
        Ok(RegistryClient { urls: parsed, auth, http, texts: Mutex::default(), ids: Mutex::default() })
    }

    /// Sends until there is an answer that is one.
    async fn ask(&self, method: Method, path: &[&str], body: Option<&Value>) -> Result<Answer, RegistryError> {
        let mut pause = FIRST_PAUSE;
        let mut last = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(pause).await;
                pause *= 3;
            }
            for url in &self.urls {
                match self.send(method.clone(), url, path, body).await {
                    Ok(answer) if !answer.passes() => return Ok(answer),
                    Ok(answer) => last = answer.passing(),
                    Err(error) => last = format!("{}: {}", place(url), chain(&error.without_url())),
                }
            }
        }
        Err(RegistryError::Unavailable(last))
    }

    async fn send(
        &self,
        method: Method,
        base: &Url,
        path: &[&str],
        body: Option<&Value>,
    ) -> Result<Answer, reqwest::Error> {
        let mut url = base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            // Each segment is percent-encoded: subjects may hold anything.
            segments.pop_if_empty().extend(path);
        }
        let mut request = self.http.request(method, url).header("accept", format!("{MEDIA}, application/json"));
        request = match &self.auth {
            RegistryAuth::None => request,
            RegistryAuth::Basic { username, password } => request.basic_auth(username, Some(password.expose_secret())),
            RegistryAuth::Bearer(token) => request.bearer_auth(token.expose_secret()),
        };
        if let Some(body) = body {
            request = request.header("content-type", MEDIA).body(body.to_string());
        }
        let response = request.send().await?;
        // Where the answer comes from, after redirects.
        let (status, from) = (response.status(), place(response.url()));
        let bytes = response.bytes().await?;
        let body = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).chars().take(200).collect()));
        Ok(Answer { status, from, body })
    }
}

/// Confluent's code for a subject that takes no schema for a while (its mode is READONLY or IMPORT).
const NOT_NOW: u64 = 42205;

struct Answer {
    status: StatusCode,
    from: String,
    body: Value,
}

impl Answer {
    /// Will it pass by itself?
    fn passes(&self) -> bool {
        self.status.is_server_error()
            || matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
            || !self.is_a_registrys()
    }

    /// Is it what a registry says, and not a proxy, a page to log in, or another server at its address?
    fn is_a_registrys(&self) -> bool {
        match self.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::CONFLICT => true,
            status if status.is_success() => self.id().is_some() || self.body.get("schema").is_some(),
            _ => self.code().is_some(),
        }
    }

    fn code(&self) -> Option<u64> {
        self.body.get("error_code").and_then(Value::as_u64)
    }

    /// Why it is to be tried again.
    fn passing(&self) -> String {
        let said = format!("{} answers {}", self.from, self.said());
        if self.is_a_registrys() || self.status.is_server_error() {
            return said;
        }
        format!("{said}, which no registry says. hint: 'schema.registry' is the URL that a registry's API begins at")
    }

    fn said(&self) -> String {
        let message = self.body.get("message").and_then(Value::as_str).or(self.body.as_str()).unwrap_or_default();
        format!("{}: {message}", self.status)
    }

    fn id(&self) -> Option<SchemaId> {
        self.body.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok()).map(SchemaId)
    }

    /// What an answer that is neither wanted nor passing means.
    fn refusal(&self, subject: &str) -> RegistryError {
        match self.status {
            StatusCode::CONFLICT => RegistryError::Incompatible { subject: subject.to_owned(), reason: self.said() },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => RegistryError::Unavailable(format!(
                "{} refuses us ({}). hint: set username and password, or token, of 'schema.registry', or grant it there",
                self.from,
                self.said()
            )),
            _ if self.code() == Some(NOT_NOW) => {
                RegistryError::Unavailable(format!("{} answers {}", self.from, self.said()))
            }
            _ => RegistryError::Rejected(format!("the schema registry answers {} to '{subject}'", self.said())),
        }
    }
}

/// The URL without what may be secret.
fn place(url: &Url) -> String {
    url.origin().ascii_serialization()
}

/// An error with what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn remember<K: std::hash::Hash + Eq, V>(cache: &Mutex<HashMap<K, V>>, key: K, value: V) {
    let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
    if cache.len() >= CACHED {
        cache.clear();
    }
    cache.insert(key, value);
}

#[async_trait]
impl Registry for RegistryClient {
    async fn register(&self, subject: &str, schema: &str) -> Result<SchemaId, RegistryError> {
        let key = (subject.to_owned(), schema.to_owned());
        if let Some(id) = self.ids.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(*id);
        }
        let body = json!({ "schema": schema });
        let answer = self.ask(Method::POST, &["subjects", subject, "versions"], Some(&body)).await?;
        match answer.id() {
            Some(id) if answer.status.is_success() => {
                remember(&self.ids, key, id);
                Ok(id)
            }
            _ => Err(answer.refusal(subject)),
        }
    }

    async fn schema(&self, id: SchemaId) -> Result<Arc<str>, RegistryError> {
        if let Some(text) = self.texts.lock().unwrap_or_else(PoisonError::into_inner).get(&id.0) {
            return Ok(text.clone());
        }
        let answer = self.ask(Method::GET, &["schemas", "ids", &id.0.to_string()], None).await?;
        match answer.body.get("schema").and_then(Value::as_str) {
            Some(text) if answer.status.is_success() => {
                let text: Arc<str> = text.into();
                remember(&self.texts, id.0, text.clone());
                Ok(text)
            }
            _ if answer.status == StatusCode::NOT_FOUND => Err(RegistryError::UnknownId(id.0)),
            _ => Err(answer.refusal(&format!("schema id {}", id.0))),
        }
    }

    async fn lookup(&self, subject: &str, schema: &str) -> Result<Option<SchemaId>, RegistryError> {
        let body = json!({ "schema": schema });
        let answer = self.ask(Method::POST, &["subjects", subject], Some(&body)).await?;
        match answer.id() {
            Some(id) if answer.status.is_success() => Ok(Some(id)),
            _ if answer.status == StatusCode::NOT_FOUND => Ok(None),
            _ => Err(answer.refusal(subject)),
        }
    }
}
