//! A small HTTP server that answers as the test's own function says, for what no real system can be made to do.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub query: BTreeMap<String, String>,
    pub headers: HeaderMap,
    pub body: Value,
    pub at: Instant,
}

impl Asked {
    pub fn number(&self, name: &str, default: usize) -> usize {
        self.query.get(name).and_then(|value| value.parse().ok()).unwrap_or(default)
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Told {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub after: Duration,
}

impl Told {
    pub fn status(status: u16) -> Self {
        Told { status, headers: Vec::new(), body: b"{}".to_vec(), after: Duration::ZERO }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub fn after(mut self, time: Duration) -> Self {
        self.after = time;
        self
    }
}

impl From<Value> for Told {
    fn from(body: Value) -> Self {
        Told::status(200).header("content-type", "application/json").body(body.to_string())
    }
}

pub struct Scripted {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    task: JoinHandle<()>,
}

impl Scripted {
    /// `answer` is asked for every request, one at a time, in the order they come.
    pub async fn start(answer: impl FnMut(&Asked) -> Told + Send + 'static) -> Self {
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (known, answer) = (Arc::clone(&asked), Arc::new(Mutex::new(answer)));
        let serve = move |Query(query): Query<BTreeMap<String, String>>, request: Request| {
            let (known, answer) = (Arc::clone(&known), Arc::clone(&answer));
            async move {
                let (parts, body) = request.into_parts();
                let body = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_else(|_| Bytes::new());
                let one = Asked {
                    method: parts.method.to_string(),
                    path: parts.uri.path().to_owned(),
                    query,
                    headers: parts.headers,
                    body: serde_json::from_slice(&body).unwrap_or_default(),
                    at: Instant::now(),
                };
                let told = (*answer.lock().unwrap())(&one);
                known.lock().unwrap().push(one);
                tokio::time::sleep(told.after).await;
                let mut headers = HeaderMap::new();
                for (name, value) in &told.headers {
                    headers.append(HeaderName::try_from(name).unwrap(), HeaderValue::from_str(value).unwrap());
                }
                (StatusCode::from_u16(told.status).unwrap(), headers, told.body)
            }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let router = Router::new().fallback(serve);
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("serves") });
        Scripted { address, asked, task }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The requests so far, oldest first.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    pub fn count(&self, path: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| asked.path == path).count()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}
