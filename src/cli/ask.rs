//! Asking the running worker, over its HTTP.

use std::time::Duration;

use secrecy::ExposeSecret;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{CliError, FAILED, UNREACHABLE};
use crate::worker::{RestSettings, WorkerSettings, longest};

const CONNECT: Duration = Duration::from_secs(5);
/// What is only looked up is there at once.
const LOOK: Duration = Duration::from_secs(15);
/// The worker answers late rather than not at all: a reset drains the connector first.
const LATE: Duration = Duration::from_secs(10);

pub struct Ask {
    client: reqwest::Client,
    base: String,
    settings: RestSettings,
}

impl Ask {
    pub fn new(settings: &WorkerSettings) -> Result<Self, CliError> {
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .timeout(longest(settings.drain) + LATE)
            .no_proxy()
            .build()
            .map_err(|error| CliError::new(FAILED, error.to_string()))?;
        let settings = &settings.rest;
        let mut address = settings.listen;
        if address.ip().is_unspecified() {
            address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
        }
        Ok(Ask { client, base: format!("http://{address}"), settings: settings.clone() })
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.send(self.client.get(format!("{}{path}", self.base)).timeout(LOOK)).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: Option<&Value>) -> Result<T, CliError> {
        let request = self.client.post(format!("{}{path}", self.base));
        self.send(match body {
            Some(body) => request.json(body),
            None => request,
        })
        .await
    }

    async fn send<T: DeserializeOwned>(&self, mut request: reqwest::RequestBuilder) -> Result<T, CliError> {
        if let Some(token) = &self.settings.token {
            request = request.bearer_auth(token.expose_secret());
        }
        let response = request.send().await.map_err(|error| {
            let fault = CliError::new(UNREACHABLE, format!("no worker answers at {}: {}", self.base, cause(&error)));
            fault.hint("'tidegate run' starts one; rest.listen in the settings says where it listens")
        })?;
        let status = response.status();
        let text = response.text().await.map_err(|error| CliError::new(UNREACHABLE, error.to_string()))?;
        if !status.is_success() {
            let said = serde_json::from_str::<Value>(&text).ok();
            let said = said.as_ref().and_then(|body| body.get("error")).and_then(Value::as_str).unwrap_or(&text);
            let (message, hint) = match said.split_once(" hint: ") {
                Some((message, hint)) => (message.trim_end_matches(['.', ';']), Some(hint)),
                None => (said, None),
            };
            let fault = CliError::new(FAILED, message);
            return Err(match hint {
                Some(hint) => fault.hint(hint),
                None => fault,
            });
        }
        serde_json::from_str(&text)
            .map_err(|error| CliError::new(FAILED, format!("the worker's answer can't be read: {error}")))
    }
}

fn cause(error: &reqwest::Error) -> String {
    let mut last: &dyn std::error::Error = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}
