//! `/dead-letters`: records that were rejected, and what is to be done with them.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;

use super::{Shared, error};
use crate::worker::dead_letters::{self, DeadLetterId, Verdict};

pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/dead-letters", get(list))
        .route("/dead-letters/{connector}/{id}", get(show))
        .route("/dead-letters/{connector}/{id}/{verdict}", post(judge_one))
        .route("/dead-letters/{connector}/all/{verdict}", post(judge_all))
}

#[derive(Deserialize)]
struct Wanted {
    connector: Option<String>,
    limit: Option<i64>,
}

async fn list(State(shared): State<Shared>, wanted: Result<Query<Wanted>, QueryRejection>) -> Response {
    let wanted = match wanted {
        Ok(Query(wanted)) => wanted,
        Err(wrong) => return error(StatusCode::BAD_REQUEST, wrong.body_text()),
    };
    let limit = wanted.limit.unwrap_or(100).clamp(1, 10_000);
    match dead_letters::list(&shared.worker.resources().datastore, wanted.connector.as_deref(), limit).await {
        Ok(letters) => Json(dead_letters::as_json(&letters)).into_response(),
        Err(fault) => error(StatusCode::BAD_GATEWAY, fault.to_string()),
    }
}

async fn show(State(shared): State<Shared>, Path((connector, id)): Path<(String, String)>) -> Response {
    let Ok(id) = id.parse::<DeadLetterId>() else { return bad_id(&id) };
    match dead_letters::show(shared.worker.resources(), &connector, &id).await {
        Ok(Some(letter)) => Json(letter).into_response(),
        Ok(None) => error(StatusCode::NOT_FOUND, format!("'{connector}' has no dead letter {id}")),
        Err(fault) => error(StatusCode::BAD_GATEWAY, fault.to_string()),
    }
}

async fn judge_one(
    State(shared): State<Shared>,
    Path((connector, id, verdict)): Path<(String, String, String)>,
) -> Response {
    match id.parse() {
        Ok(id) => judge(&shared, &connector, Some(&id), &verdict).await,
        Err(_) => bad_id(&id),
    }
}

async fn judge_all(State(shared): State<Shared>, Path((connector, verdict)): Path<(String, String)>) -> Response {
    judge(&shared, &connector, None, &verdict).await
}

async fn judge(shared: &Shared, connector: &str, id: Option<&DeadLetterId>, verdict: &str) -> Response {
    let verdict = match verdict {
        "replay" => Verdict::Replay,
        "drop" => Verdict::Drop,
        other => return error(StatusCode::NOT_FOUND, format!("no command '{other}'; there are: replay, drop")),
    };
    match dead_letters::judge(&shared.worker.resources().datastore, connector, id, verdict).await {
        Ok(0) => error(StatusCode::NOT_FOUND, format!("'{connector}' has no such dead letter")),
        Ok(asked) => Json(json!({ "asked": asked })).into_response(),
        Err(fault) => error(StatusCode::BAD_GATEWAY, fault.to_string()),
    }
}

fn bad_id(id: &str) -> Response {
    error(StatusCode::BAD_REQUEST, format!("'{id}' names no dead letter: TOPIC:PARTITION:OFFSET"))
}
