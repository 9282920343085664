//! `/connectors`: status as JSON, and the commands on them.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::{Shared, error};
use crate::pipeline::ResetTo;
use crate::worker::CommandError;

pub fn routes() -> Router<Shared> {
    Router::new()
        .route("/connectors", get(list))
        .route("/connectors/{name}", get(one))
        .route("/connectors/{name}/{command}", post(command))
}

async fn list(State(shared): State<Shared>) -> Response {
    Json(shared.worker.status().await.connectors).into_response()
}

async fn one(State(shared): State<Shared>, Path(name): Path<String>) -> Response {
    let connectors = shared.worker.status().await.connectors;
    match connectors.into_iter().find(|connector| connector.name == name) {
        Some(connector) => Json(connector).into_response(),
        None => error(StatusCode::NOT_FOUND, format!("there is no connector '{name}'")),
    }
}

async fn command(
    State(shared): State<Shared>,
    Path((name, command)): Path<(String, String)>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(fault) => return error(fault.status(), fault.body_text()),
    };
    let body: Value = match serde_json::from_slice(if body.is_empty() { b"null" } else { &body }) {
        Ok(body) => body,
        Err(fault) => return error(StatusCode::BAD_REQUEST, format!("the body is not JSON: {fault}")),
    };
    // A name that is misspelt must not be taken for one that was left out.
    let known: &[&str] = match command.as_str() {
        "forget" => &["keep_slot"],
        "reset" => &["to"],
        _ => &[],
    };
    let names = body.as_object().into_iter().flatten().map(|(name, _)| name);
    if let Some(unknown) = names.into_iter().find(|name| !known.contains(&name.as_str())) {
        let known = if known.is_empty() { "nothing is".to_owned() } else { format!("`{}` is", known.join("`, `")) };
        return error(StatusCode::BAD_REQUEST, format!("`{unknown}` is not known in the body of a {command}; {known}"));
    }
    let worker = &shared.worker;
    let done = match command.as_str() {
        "pause" => worker.set_paused(&name, true).await.map(|()| format!("'{name}' is paused, also after a restart")),
        "resume" => worker.set_paused(&name, false).await.map(|()| format!("'{name}' goes on")),
        "restart" => worker.restart(&name).await.map(|()| format!("'{name}' restarts")),
        "migrate" => worker.migrate(&name).await,
        "forget" => match body.get("keep_slot").unwrap_or(&Value::Bool(false)) {
            Value::Bool(keep_slot) => worker.forget(&name, *keep_slot).await,
            _ => return error(StatusCode::BAD_REQUEST, "`keep_slot` is true or false"),
        },
        "reset" => match reset_to(&body) {
            Some(to) => worker.reset(&name, to).await,
            None => {
                let wanted = "{\"to\": \"beginning\"}, \"end\", {\"offset\": 5}, {\"time_ms\": 1700000000000} or {\"cursor\": …}";
                return error(StatusCode::BAD_REQUEST, format!("a reset says where to: {wanted}"));
            }
        },
        other => {
            let known = "pause, resume, restart, reset, migrate, forget";
            return error(StatusCode::NOT_FOUND, format!("no command '{other}'; there are: {known}"));
        }
    };
    match done {
        Ok(done) => Json(json!({ "done": done })).into_response(),
        Err(fault @ CommandError::Unknown { .. }) => error(StatusCode::NOT_FOUND, fault.to_string()),
        Err(fault @ CommandError::Failed(_)) => error(StatusCode::CONFLICT, fault.to_string()),
    }
}

fn reset_to(body: &Value) -> Option<ResetTo> {
    let to = body.get("to")?;
    match to.as_str() {
        Some("beginning") => return Some(ResetTo::Beginning),
        Some("end") => return Some(ResetTo::End),
        Some(_) => return None,
        None => {}
    }
    let offset = to.get("offset").and_then(Value::as_i64).map(ResetTo::Offset);
    let time = to.get("time_ms").and_then(Value::as_i64).map(ResetTo::TimeMs);
    let cursor = to.get("cursor").cloned().map(ResetTo::Cursor);
    offset.or(time).or(cursor)
}

/// The body that [`reset_to`] reads.
pub fn reset_body(to: &ResetTo) -> Value {
    let to = match to {
        ResetTo::Beginning => json!("beginning"),
        ResetTo::End => json!("end"),
        ResetTo::Offset(offset) => json!({ "offset": offset }),
        ResetTo::TimeMs(time) => json!({ "time_ms": time }),
        ResetTo::Cursor(cursor) => json!({ "cursor": cursor }),
    };
    json!({ "to": to })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_to_reset_to_reads_back_from_its_body() {
        let places = [
            ResetTo::Beginning,
            ResetTo::End,
            ResetTo::Offset(42),
            ResetTo::TimeMs(1_700_000_000_000),
            ResetTo::Cursor(json!({ "at": "2026-01-01T00:00:00Z", "id": 7 })),
        ];
        for place in places {
            assert_eq!(reset_to(&reset_body(&place)), Some(place));
        }
        assert_eq!(reset_to(&json!({ "to": "tomorrow" })), None);
        assert_eq!(reset_to(&json!({})), None);
    }
}
