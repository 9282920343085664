//! The built-in schema registry over HTTP, as Confluent's clients expect it: paths, bodies, error codes.

use std::collections::BTreeMap;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use crate::registry::{BuiltinError, BuiltinRegistry, CompatibilityLevel, Registered, SchemaId, Version};

const MEDIA: &str = "application/vnd.schemaregistry.v1+json";

type Shown = Result<Value, Refusal>;
type Asked = Query<BTreeMap<String, String>>;
type Registry = State<BuiltinRegistry>;

/// The routes; to be mounted at the root.
pub fn routes(registry: BuiltinRegistry) -> Router {
    Router::new()
        .route("/subjects", get(subjects))
        .route("/subjects/{subject}", post(find).delete(delete_subject))
        .route("/subjects/{subject}/versions", get(versions).post(register))
        .route("/subjects/{subject}/versions/{version}", get(version).delete(delete_version))
        .route("/subjects/{subject}/versions/{version}/schema", get(version_text))
        .route("/subjects/{subject}/versions/{version}/referencedby", get(async || show(Ok(json!([])))))
        .route("/schemas/types", get(async || show(Ok(json!(["AVRO"])))))
        .route("/schemas/ids/{id}", get(schema))
        .route("/schemas/ids/{id}/schema", get(schema_text))
        .route("/schemas/ids/{id}/subjects", get(schema_subjects))
        .route("/schemas/ids/{id}/versions", get(schema_versions))
        .route("/config", get(config).put(set_config).delete(unset_config))
        .route("/config/{subject}", get(subject_config).put(set_subject_config).delete(unset_subject_config))
        .route("/compatibility/subjects/{subject}/versions", post(check_all))
        .route("/compatibility/subjects/{subject}/versions/{version}", post(check))
        .route("/mode", get(mode).put(set_mode))
        .route("/mode/{subject}", get(mode).put(set_mode))
        .with_state(registry)
}

/// An error with Confluent's code; its first three digits are the HTTP status.
struct Refusal {
    code: u32,
    message: String,
}

impl Refusal {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Refusal { code, message: message.into() }
    }
}

impl From<BuiltinError> for Refusal {
    fn from(error: BuiltinError) -> Self {
        let code = match &error {
            BuiltinError::NoSubject(_) => 40401,
            BuiltinError::NoVersion(..) => 40402,
            BuiltinError::NoSchema => 40403,
            BuiltinError::NotDeletedFirst(_) => 40405,
            BuiltinError::NoOwnLevel(_) => 40408,
            BuiltinError::InvalidSchema(_) => 42201,
            BuiltinError::Incompatible { .. } => 409,
            BuiltinError::Busy(_) | BuiltinError::Storage(_) => 50001,
        };
        Refusal::new(code, error.to_string())
    }
}

fn show(answer: Shown) -> Response {
    let (status, body) = match answer {
        Ok(body) => (StatusCode::OK, body),
        Err(Refusal { code, message }) => {
            let digits = if code > 999 { code / 100 } else { code };
            let status = u16::try_from(digits).ok().and_then(|status| StatusCode::from_u16(status).ok());
            (status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), json!({ "error_code": code, "message": message }))
        }
    };
    (status, [(header::CONTENT_TYPE, MEDIA)], body.to_string()).into_response()
}

fn flag(asked: &Asked, name: &str) -> bool {
    asked.get(name).is_some_and(|value| value == "true")
}

fn parse_version(text: &str) -> Result<Version, Refusal> {
    match text {
        "latest" | "-1" => Ok(Version::Latest),
        number => match number.parse::<i32>() {
            Ok(number) if number > 0 => Ok(Version::Number(number)),
            _ => Err(Refusal::new(
                42202,
                format!("the specified version '{text}' is not a valid version id: a number from 1, or 'latest'"),
            )),
        },
    }
}

fn parse_id(text: &str) -> Result<SchemaId, Refusal> {
    text.parse().map(SchemaId).map_err(|_| Refusal::new(40403, format!("schema {text} not found")))
}

fn body(bytes: &Bytes) -> Result<Value, Refusal> {
    serde_json::from_slice(bytes).map_err(|e| Refusal::new(400, format!("the body is not JSON: {e}")))
}

/// The schema of a body `{"schema": "…", "schemaType": "AVRO"}`.
fn schema_of(bytes: &Bytes) -> Result<String, Refusal> {
    let body = body(bytes)?;
    if let Some(kind) = body.get("schemaType").and_then(Value::as_str)
        && kind != "AVRO"
    {
        return Err(Refusal::new(42201, format!("schemas of type {kind} are not known here; AVRO is")));
    }
    if body.get("references").and_then(Value::as_array).is_some_and(|references| !references.is_empty()) {
        return Err(Refusal::new(42201, "references to other schemas are not known here"));
    }
    match body.get("schema").and_then(Value::as_str) {
        Some(schema) => Ok(schema.to_owned()),
        None => Err(Refusal::new(42201, "the body has no 'schema'")),
    }
}

fn shown(found: &Registered) -> Value {
    json!({ "subject": found.subject, "version": found.version, "id": found.id.0, "schema": &*found.text })
}

/// Runs `work` off the async threads and shows what it gives.
async fn answer(
    registry: BuiltinRegistry,
    work: impl FnOnce(&BuiltinRegistry) -> Result<Value, BuiltinError> + Send + 'static,
) -> Response {
    show(registry.run(work).await.map_err(Refusal::from))
}

async fn subjects(State(registry): Registry, asked: Asked) -> Response {
    let prefix = asked.get("subjectPrefix").cloned().unwrap_or_default();
    let deleted = flag(&asked, "deleted");
    answer(registry, move |registry| Ok(json!(registry.subjects(&prefix, deleted)?))).await
}

async fn versions(State(registry): Registry, Path(subject): Path<String>, asked: Asked) -> Response {
    let deleted = flag(&asked, "deleted");
    answer(registry, move |registry| Ok(json!(registry.versions(&subject, deleted)?))).await
}

async fn register(State(registry): Registry, Path(subject): Path<String>, bytes: Bytes) -> Response {
    let schema = match schema_of(&bytes) {
        Ok(schema) => schema,
        Err(refusal) => return show(Err(refusal)),
    };
    answer(registry, move |registry| {
        let id = BuiltinRegistry::register(registry, &subject, &schema)?;
        Ok(json!({ "id": id.0 }))
    })
    .await
}

async fn find(State(registry): Registry, Path(subject): Path<String>, asked: Asked, bytes: Bytes) -> Response {
    let deleted = flag(&asked, "deleted");
    match schema_of(&bytes) {
        Ok(schema) => answer(registry, move |r| Ok(shown(&r.find(&subject, &schema, deleted)?))).await,
        Err(refusal) => show(Err(refusal)),
    }
}

async fn version(State(registry): Registry, Path((subject, number)): Path<(String, String)>, asked: Asked) -> Response {
    let deleted = flag(&asked, "deleted");
    match parse_version(&number) {
        Ok(number) => answer(registry, move |r| Ok(shown(&r.version(&subject, number, deleted)?))).await,
        Err(refusal) => show(Err(refusal)),
    }
}

async fn version_text(State(registry): Registry, Path((subject, number)): Path<(String, String)>) -> Response {
    match parse_version(&number) {
        Ok(number) => answer(registry, move |r| json_of(&r.version(&subject, number, false)?.text)).await,
        Err(refusal) => show(Err(refusal)),
    }
}

/// A schema as JSON itself, not as text.
fn json_of(text: &str) -> Result<Value, BuiltinError> {
    serde_json::from_str(text).map_err(|e| BuiltinError::InvalidSchema(e.to_string()))
}

async fn delete_subject(State(registry): Registry, Path(subject): Path<String>, asked: Asked) -> Response {
    let permanent = flag(&asked, "permanent");
    answer(registry, move |registry| Ok(json!(registry.delete_subject(&subject, permanent)?))).await
}

async fn delete_version(
    State(registry): Registry,
    Path((subject, number)): Path<(String, String)>,
    asked: Asked,
) -> Response {
    let permanent = flag(&asked, "permanent");
    match parse_version(&number) {
        Ok(number) => answer(registry, move |r| Ok(json!(r.delete_version(&subject, number, permanent)?))).await,
        Err(refusal) => show(Err(refusal)),
    }
}

async fn schema(State(registry): Registry, Path(id): Path<String>) -> Response {
    match parse_id(&id) {
        Ok(id) => answer(registry, move |registry| Ok(json!({ "schema": &*registry.text(id)? }))).await,
        Err(refusal) => show(Err(refusal)),
    }
}

async fn schema_text(State(registry): Registry, Path(id): Path<String>) -> Response {
    match parse_id(&id) {
        Ok(id) => answer(registry, move |registry| json_of(&registry.text(id)?)).await,
        Err(refusal) => show(Err(refusal)),
    }
}

async fn schema_subjects(State(registry): Registry, Path(id): Path<String>, asked: Asked) -> Response {
    let deleted = flag(&asked, "deleted");
    match parse_id(&id) {
        Ok(id) => {
            answer(registry, move |registry| {
                let mut subjects: Vec<String> =
                    registry.used_by(id, deleted)?.into_iter().map(|(subject, _)| subject).collect();
                subjects.dedup();
                Ok(json!(subjects))
            })
            .await
        }
        Err(refusal) => show(Err(refusal)),
    }
}

async fn schema_versions(State(registry): Registry, Path(id): Path<String>, asked: Asked) -> Response {
    let deleted = flag(&asked, "deleted");
    match parse_id(&id) {
        Ok(id) => {
            answer(registry, move |registry| {
                let used = registry.used_by(id, deleted)?;
                let one = |(subject, version)| json!({ "subject": subject, "version": version });
                Ok(used.into_iter().map(one).collect())
            })
            .await
        }
        Err(refusal) => show(Err(refusal)),
    }
}

fn level_shown(level: CompatibilityLevel) -> Value {
    json!({ "compatibilityLevel": level.to_string() })
}

async fn config(State(registry): Registry) -> Response {
    answer(registry, |registry| Ok(level_shown(registry.level(None, true)?))).await
}

async fn subject_config(State(registry): Registry, Path(subject): Path<String>, asked: Asked) -> Response {
    let or_global = flag(&asked, "defaultToGlobal");
    answer(registry, move |registry| Ok(level_shown(registry.level(Some(&subject), or_global)?))).await
}

async fn change_level(registry: BuiltinRegistry, subject: Option<String>, bytes: Bytes) -> Response {
    let level = body(&bytes).and_then(|body| {
        let text = body.get("compatibility").and_then(Value::as_str).unwrap_or_default().to_owned();
        text.parse::<CompatibilityLevel>().map_err(|()| {
            Refusal::new(
                42203,
                format!("'{text}' is no compatibility level: NONE, BACKWARD, FORWARD or FULL, or with _TRANSITIVE"),
            )
        })
    });
    match level {
        Ok(level) => {
            answer(registry, move |registry| {
                registry.set_level(subject.as_deref(), level)?;
                Ok(json!({ "compatibility": level.to_string() }))
            })
            .await
        }
        Err(refusal) => show(Err(refusal)),
    }
}

async fn set_config(State(registry): Registry, bytes: Bytes) -> Response {
    change_level(registry, None, bytes).await
}

async fn set_subject_config(State(registry): Registry, Path(subject): Path<String>, bytes: Bytes) -> Response {
    change_level(registry, Some(subject), bytes).await
}

async fn unset_config(State(registry): Registry) -> Response {
    answer(registry, |registry| Ok(level_shown(registry.unset_level(None)?))).await
}

async fn unset_subject_config(State(registry): Registry, Path(subject): Path<String>) -> Response {
    answer(registry, move |registry| Ok(level_shown(registry.unset_level(Some(&subject))?))).await
}

async fn compatible(
    registry: BuiltinRegistry,
    subject: String,
    version: Option<Version>,
    asked: Asked,
    bytes: Bytes,
) -> Response {
    let verbose = flag(&asked, "verbose");
    match schema_of(&bytes) {
        Ok(schema) => {
            answer(registry, move |registry| {
                let reasons = registry.check(&subject, version, &schema)?;
                let mut shown = json!({ "is_compatible": reasons.is_empty() });
                if verbose {
                    shown["messages"] = json!(reasons);
                }
                Ok(shown)
            })
            .await
        }
        Err(refusal) => show(Err(refusal)),
    }
}

async fn check_all(State(registry): Registry, Path(subject): Path<String>, asked: Asked, bytes: Bytes) -> Response {
    compatible(registry, subject, None, asked, bytes).await
}

async fn check(
    State(registry): Registry,
    Path((subject, number)): Path<(String, String)>,
    asked: Asked,
    bytes: Bytes,
) -> Response {
    match parse_version(&number) {
        Ok(number) => compatible(registry, subject, Some(number), asked, bytes).await,
        Err(refusal) => show(Err(refusal)),
    }
}

async fn mode() -> Response {
    show(Ok(json!({ "mode": "READWRITE" })))
}

/// There is one mode: a client that asks for it gets it.
async fn set_mode(bytes: Bytes) -> Response {
    let asked = body(&bytes).map(|body| body.get("mode").and_then(Value::as_str).unwrap_or_default().to_owned());
    show(asked.and_then(|mode| match mode.as_str() {
        "READWRITE" => Ok(json!({ "mode": "READWRITE" })),
        other => Err(Refusal::new(42204, format!("mode '{other}' is not known here; READWRITE is"))),
    }))
}
