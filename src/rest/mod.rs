//! The worker over HTTP: health, metrics, status and commands, the registry.
//!
//! Listens on 127.0.0.1 unless told otherwise. Every request has a deadline and a limit on its body, every connection
//! an end; with a token set, everything but health asks for it; a page of another origin in a browser can neither
//! command the worker nor read from it.

mod connections;
mod connectors;
mod dead_letters;
mod guard;
mod metrics;
pub mod registry;

use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use connections::Limits;
pub use connectors::reset_body;
pub use metrics::{METRICS, Metrics};

use crate::worker::{Worker, longest};

const BODY: usize = 1 << 20;
const CLOSE: Duration = Duration::from_secs(1);
const CONNECTIONS: usize = 256;
const HEAD: Duration = Duration::from_secs(30);
const AGE: Duration = Duration::from_secs(600);
/// How often the samples of histograms are folded into their buckets, whether anybody asks for them or not.
const FOLD: Duration = Duration::from_secs(10);

#[derive(Clone)]
struct Shared {
    worker: Worker,
    metrics: Metrics,
}

/// The listening server; stops when told to, or when dropped.
pub struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Server {
    /// Binds before it returns, so that a taken port is an error at the start.
    pub async fn start(worker: Worker, metrics: Metrics) -> std::io::Result<Self> {
        let settings = worker.settings().rest.clone();
        let listener = TcpListener::bind(settings.listen).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let request = longest(worker.settings().drain);
        let limits = Limits { connections: CONNECTIONS, head: HEAD, age: AGE, last: request + HEAD };
        let router = router(worker, metrics.clone(), request);
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut fold = tokio::time::interval(FOLD);
            let folded = async {
                loop {
                    fold.tick().await;
                    metrics.fold();
                }
            };
            tokio::select! {
                () = connections::serve(listener, router, limits, stopped) => {}
                () = folded => {}
            }
        });
        Ok(Server { address, stop, task })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub async fn stop(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(CLOSE, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A request has `within` to be answered.
fn router(worker: Worker, metrics: Metrics, within: Duration) -> Router {
    let settings = worker.settings().rest.clone();
    let builtin = worker.resources().builtin.clone();
    let shared = Shared { worker, metrics };
    let guarded = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/status", get(status))
        .merge(connectors::routes())
        .merge(dead_letters::routes())
        .with_state(shared.clone());
    let guarded = match builtin {
        Some(builtin) => guarded.merge(registry::routes(builtin)),
        None => guarded,
    };
    let guarded = guarded.layer(middleware::from_fn_with_state(guard::Guard::new(&settings), guard::check));
    Router::new()
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .with_state(shared)
        .merge(guarded)
        .fallback(nothing_here)
        .method_not_allowed_fallback(not_so)
        .layer(DefaultBodyLimit::max(BODY))
        .layer(middleware::from_fn_with_state(within, deadline))
}

async fn deadline(State(within): State<Duration>, request: Request, next: Next) -> Response {
    match tokio::time::timeout(within, next.run(request)).await {
        Ok(response) => response,
        Err(_) => error(StatusCode::GATEWAY_TIMEOUT, format!("no answer within {} s", within.as_secs())),
    }
}

async fn live() -> Response {
    Json(json!({ "live": true })).into_response()
}

async fn ready(State(shared): State<Shared>) -> Response {
    let health = shared.worker.health().await;
    let status = if health.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(health)).into_response()
}

async fn status(State(shared): State<Shared>) -> Response {
    Json(shared.worker.status().await).into_response()
}

async fn show_metrics(State(shared): State<Shared>) -> Response {
    ([("content-type", "text/plain; version=0.0.4")], shared.metrics.render()).into_response()
}

async fn nothing_here(request: Request) -> Response {
    let places = "/health/live, /health/ready, /metrics, /status, /connectors, /dead-letters, /subjects, /schemas";
    error(StatusCode::NOT_FOUND, format!("nothing at {}; there is: {places}", request.uri().path()))
}

async fn not_so(request: Request) -> Response {
    let (method, path) = (request.method(), request.uri().path());
    error(StatusCode::METHOD_NOT_ALLOWED, format!("{path} is not to be asked by {method}"))
}

/// Errors all look alike: `{"error": "…"}`.
fn error(status: StatusCode, message: impl Into<String>) -> Response {
    (status, Json(json!({ "error": message.into() }))).into_response()
}
