//! One request and its answer on the wire: credentials, turn in the budget, redirects, time-outs, bounds.

use std::error::Error as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue, LOCATION};
use secrecy::ExposeSecret;
use serde_json::Value;

use super::auth::{AuthSettings, Credentials};
use super::budget::Turn;
use super::system::{System, lock};
use super::{HttpRequest, HttpResponse, headers};
use crate::mapping::Scope;

/// Hops of a redirect that are followed.
const REDIRECTS: usize = 5;
pub(super) const NO_ANSWER: &str = "no answer";

/// Why no answer came.
#[derive(Debug)]
pub(super) enum Lost {
    /// The request can't be made: a bad URL or header.
    Unfit(String),
    /// Surely not applied.
    NotSent(String),
    /// Sent, in part at the least.
    AfterSending(String),
    /// Answered with this status, at more than `response.limit`.
    TooLong(u16),
    /// The budget has no turn in time.
    NoTurn(Duration),
    /// No credentials: what a login came to.
    Credentials(String),
    /// Its sender kept it back when its turn had come.
    KeptBack(String),
}

/// Asked when a request's turn has come, right before it leaves; the reason keeps it back.
pub type Ready<'a> = &'a (dyn Fn() -> Result<(), String> + Send + Sync);

impl System {
    /// One request with its credentials, those refreshed once where they are no longer taken.
    pub(super) async fn exchange(&self, request: &HttpRequest, ready: Ready<'_>) -> Result<HttpResponse, Lost> {
        let credentials = self.credentials(None).await?;
        let response = self.one(request, &credentials, ready).await?;
        let (AuthSettings::Login(login), Credentials::Header { generation: Some(stale), .. }) =
            (&self.settings.auth, &credentials)
        else {
            return Ok(response);
        };
        if !login.asks_again(response.status) {
            return Ok(response);
        }
        let credentials = self.credentials(Some(*stale)).await?;
        self.one(request, &credentials, ready).await
    }

    async fn credentials(&self, stale: Option<u64>) -> Result<Credentials, Lost> {
        match &self.settings.auth {
            AuthSettings::None => Ok(Credentials::None),
            AuthSettings::Header { name, value } => {
                Ok(Credentials::Header { name: name.clone(), value: value.clone(), generation: None })
            }
            AuthSettings::Query { name, value } => Ok(Credentials::Query { name: name.clone(), value: value.clone() }),
            AuthSettings::Login(login) => {
                let log_in = async |request: HttpRequest| self.one(&request, &Credentials::None, &|| Ok(())).await;
                login.credentials(stale, self.name(), log_in).await
            }
        }
    }

    async fn one(
        &self,
        request: &HttpRequest,
        credentials: &Credentials,
        ready: Ready<'_>,
    ) -> Result<HttpResponse, Lost> {
        let url = self.url(request).map_err(Lost::Unfit)?;
        let headers = self.headers(request, credentials).map_err(Lost::Unfit)?;
        let limit = self.time_limit(request);
        let turn = self.budget.turn(self.settings.timeouts.turn).await.map_err(Lost::NoTurn)?;
        // Waiting for the turn takes its time: what was true before it may not be any more.
        ready().map_err(Lost::KeptBack)?;
        if !matches!(request.purpose, "probe" | "login") {
            self.sent.fetch_add(1, Ordering::Relaxed);
        }
        *lock(&self.by_purpose).entry(request.purpose).or_default() += 1;
        let response = match tokio::time::timeout(limit, self.hops(request, url, headers, credentials, turn)).await {
            Ok(response) => response?,
            Err(_) => return Err(Lost::AfterSending(format!("nothing within {limit:?}"))),
        };
        if let Some(pause) = headers::pause(&response) {
            self.budget.pause(pause);
        }
        Ok(response)
    }

    /// The request, and where it is redirected to within the same origin. What changes something is sent again
    /// only where the answer says to send the same again (307, 308). Every hop has a turn in the budget of its own.
    async fn hops(
        &self,
        request: &HttpRequest,
        mut url: Url,
        headers: HeaderMap,
        credentials: &Credentials,
        mut turn: Turn<'_>,
    ) -> Result<HttpResponse, Lost> {
        for _ in 0..=REDIRECTS {
            let mut sending = self.client.request(request.method.clone(), url.clone()).headers(headers.clone());
            if let Credentials::Query { name, value } = credentials {
                sending = sending.query(&[(name.as_str(), value.expose_secret())]);
            }
            if let Some(body) = &request.body {
                sending = sending.json(body);
            }
            let response = sending.send().await.map_err(lost)?;
            let status = response.status().as_u16();
            let follow = matches!(status, 307 | 308) || request.is_safe() && matches!(status, 301..=303);
            let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            match location.and_then(|location| url.join(location).ok()) {
                Some(next) if follow && next.origin() == self.settings.base_url.origin() => {
                    url = next;
                    drop((response, turn));
                    turn = self.budget.turn(self.settings.timeouts.turn).await.map_err(Lost::NoTurn)?;
                }
                _ => return self.read(response).await,
            }
        }
        Err(Lost::Unfit(format!("redirected more than {REDIRECTS} times")))
    }

    async fn read(&self, mut response: reqwest::Response) -> Result<HttpResponse, Lost> {
        let limit = self.settings.response_limit.bytes();
        let status = response.status().as_u16();
        let headers = response
            .headers()
            .iter()
            .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(lost)? {
            if (body.len() + chunk.len()) as u64 > limit {
                return Err(Lost::TooLong(status));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(HttpResponse { status, headers, body: parse(&body) })
    }

    pub(super) fn url(&self, request: &HttpRequest) -> Result<Url, String> {
        let base = &self.settings.base_url;
        let text = if request.path.starts_with('/') {
            format!("{}{}", base.as_str().trim_end_matches('/'), request.path)
        } else {
            request.path.clone()
        };
        let mut url = Url::parse(&text).map_err(|error| format!("its address is no URL: {error}"))?;
        if url.origin() != base.origin() {
            let (there, here) = (url.origin().ascii_serialization(), base.origin().ascii_serialization());
            return Err(format!("its address is at {there}, and not at {here} as the system is"));
        }
        if !request.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&request.query);
        }
        Ok(url)
    }

    fn headers(&self, request: &HttpRequest, credentials: &Credentials) -> Result<HeaderMap, String> {
        let mut headers = HeaderMap::new();
        let own = match &self.settings.headers {
            Some(tree) => tree.render(&Value::Null, &Scope::default()).map_err(|error| error.to_string())?,
            None => Vec::new(),
        };
        for given in [&own, &request.headers] {
            // The request's own go before the system's; a list of values repeats its name.
            let mut these = HeaderMap::new();
            for (name, value) in given {
                let header =
                    HeaderName::try_from(name.as_str()).map_err(|_| format!("'{name}' is no header's name"))?;
                let value = HeaderValue::try_from(value.as_str())
                    .map_err(|_| format!("the value of header '{name}' holds characters that no header may hold"))?;
                these.append(header, value);
            }
            these.keys().for_each(|name| drop(headers.remove(name)));
            headers.extend(these);
        }
        if let Credentials::Header { name, value, .. } = credentials {
            headers.insert(name, value.clone());
        }
        Ok(headers)
    }
}

impl Lost {
    pub(super) fn reason(&self) -> String {
        match self {
            Lost::Unfit(reason) | Lost::NotSent(reason) | Lost::Credentials(reason) | Lost::KeptBack(reason) => {
                reason.clone()
            }
            Lost::AfterSending(reason) => format!("{NO_ANSWER}: {reason}"),
            Lost::TooLong(status) => format!("answered {status}, at more than `response.limit`"),
            Lost::NoTurn(wait) => format!("no turn in the budget for {} s", wait.as_secs()),
        }
    }
}

fn lost(error: reqwest::Error) -> Lost {
    // The URL may carry an API key.
    let error = error.without_url();
    let reason = chain(&error);
    if error.is_builder() {
        Lost::Unfit(reason)
    } else if error.is_connect() {
        Lost::NotSent(reason)
    } else {
        Lost::AfterSending(reason)
    }
}

/// An error with all its causes.
pub(super) fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

fn parse(body: &[u8]) -> Value {
    // Some systems put a byte order mark before their JSON.
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    if body.is_empty() {
        return Value::Null;
    }
    serde_json::from_slice(body).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(body).into_owned()))
}
