//! The worker over HTTP: health, metrics, status and commands, the registry.
//!
//! Listens on 127.0.0.1 unless told otherwise. Every request has a deadline and a limit on its body; with a token
//! set, everything but health asks for it; a page of another origin in a browser can't command the worker.

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

pub use connectors::reset_body;
pub use metrics::Metrics;

use crate::worker::Worker;

const BODY: usize = 1 << 20;
const REQUEST: Duration = Duration::from_secs(150);
const CLOSE: Duration = Duration::from_secs(1);

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
        let router = router(worker, metrics);
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let serving = axum::serve(listener, router).with_graceful_shutdown(stopped.cancelled_owned());
            if let Err(error) = serving.await {
                tracing::error!("the worker's HTTP ended: {error}");
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

fn router(worker: Worker, metrics: Metrics) -> Router {
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
        .layer(DefaultBodyLimit::max(BODY))
        .layer(middleware::from_fn(deadline))
}

async fn deadline(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST, next.run(request)).await {
        Ok(response) => response,
        Err(_) => error(StatusCode::GATEWAY_TIMEOUT, format!("no answer within {} s", REQUEST.as_secs())),
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

/// Errors all look alike: `{"error": "…"}`.
fn error(status: StatusCode, message: impl Into<String>) -> Response {
    (status, Json(json!({ "error": message.into() }))).into_response()
}
