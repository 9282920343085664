//! A small real HTTP API whose listings page in every way there is, for what Tryton does not do.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

type Parameters = Query<Vec<(String, String)>>;

#[derive(Default)]
pub struct Records {
    pub records: Vec<Value>,
    /// No page has more, whatever is asked for.
    pub most: Option<usize>,
    /// `Authorization` that is taken, where one is needed; and how many logins there were.
    pub token: Option<String>,
    pub logins: usize,
    /// Paths and queries asked for.
    pub asked: Vec<String>,
    /// What was made by `POST /v1/items`, by id from 1.
    pub items: BTreeMap<u64, Value>,
    pub made: u64,
    /// Idempotency keys that made something, with its id.
    pub known: BTreeMap<String, u64>,
}

pub struct Api {
    pub address: SocketAddr,
    pub inside: Arc<Mutex<Records>>,
    task: JoinHandle<()>,
}

impl Api {
    /// * `/offset?limit&offset`, `/page?page&size` (404 beyond the end), `/cursor?after` (`{data, paging: {next}}`, two a
    ///   page), `/link?page` (header `Link`, two a page), `/since?since&limit` (in the order of `at`, from `since` on)
    /// * `/broken?…` gives the same page whatever is asked; `/all` gives everything
    /// * `/items`: `POST` makes one and gives it back with its `id` (again with the same `Idempotency-Key`: the same
    ///   one), `GET ?name=value` finds by a member, `PUT` and `DELETE /items/1` change and remove (404 where it is
    ///   gone), `POST /items/1/DO` adds DO to its `done`, and refuses (409) what is there already
    /// * `POST /login {"secret"}` gives `{"token"}`, which `/all` and the others want once `token` is set
    pub async fn start(records: Vec<Value>) -> Api {
        let inside = Arc::new(Mutex::new(Records { records, ..Records::default() }));
        let router = Router::new()
            .route("/v1/{kind}", get(list))
            .route("/v1/login", post(login))
            .route("/v1/items", get(find).post(make))
            .route("/v1/items/{id}", get(one).put(change).delete(remove))
            .route("/v1/items/{id}/{action}", post(act))
            .with_state(Arc::clone(&inside));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("serves") });
        Api { address, inside, task }
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    pub fn set(&self, records: Vec<Value>) {
        self.inside.lock().unwrap().records = records;
    }

    pub fn items(&self) -> Vec<Value> {
        self.inside.lock().unwrap().items.values().cloned().collect()
    }

    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.inside.lock().unwrap().asked)
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn login(State(inside): State<Arc<Mutex<Records>>>, Json(body): Json<Value>) -> (StatusCode, Json<Value>) {
    if body["secret"] != "sesame" {
        return (StatusCode::UNAUTHORIZED, Json(json!({"error": "no"})));
    }
    let mut inside = inside.lock().unwrap();
    inside.logins += 1;
    let token = format!("t{}", inside.logins);
    inside.token = Some(format!("Session {token}"));
    (StatusCode::OK, Json(json!({ "token": token })))
}

type Inside = State<Arc<Mutex<Records>>>;
type Answer = (StatusCode, Json<Value>);

async fn make(State(inside): Inside, headers: HeaderMap, Json(mut item): Json<Value>) -> Answer {
    let mut inside = inside.lock().unwrap();
    let key = headers.get("idempotency-key").and_then(|key| key.to_str().ok()).map(str::to_owned);
    if let Some(id) = key.as_ref().and_then(|key| inside.known.get(key)) {
        return (StatusCode::OK, Json(inside.items[id].clone()));
    }
    inside.made += 1;
    let id = inside.made;
    item["id"] = json!(id);
    inside.known.extend(key.map(|key| (key, id)));
    inside.items.insert(id, item.clone());
    (StatusCode::CREATED, Json(item))
}

async fn find(State(inside): Inside, Query(parameters): Parameters) -> Answer {
    let inside = inside.lock().unwrap();
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let fits = |item: &&Value| parameters.iter().all(|(name, value)| plain(&item[name.as_str()]) == *value);
    (StatusCode::OK, Json(inside.items.values().filter(fits).cloned().collect()))
}

async fn one(State(inside): Inside, Path(id): Path<u64>) -> Answer {
    match inside.lock().unwrap().items.get(&id) {
        Some(item) => (StatusCode::OK, Json(item.clone())),
        None => (StatusCode::NOT_FOUND, Json(Value::Null)),
    }
}

async fn change(State(inside): Inside, Path(id): Path<u64>, Json(change): Json<Value>) -> Answer {
    let mut inside = inside.lock().unwrap();
    let Some(item) = inside.items.get_mut(&id) else { return (StatusCode::NOT_FOUND, Json(Value::Null)) };
    for (name, value) in change.as_object().into_iter().flatten() {
        item[name.as_str()] = value.clone();
    }
    (StatusCode::OK, Json(item.clone()))
}

async fn remove(State(inside): Inside, Path(id): Path<u64>) -> Answer {
    match inside.lock().unwrap().items.remove(&id) {
        Some(_) => (StatusCode::NO_CONTENT, Json(Value::Null)),
        None => (StatusCode::NOT_FOUND, Json(Value::Null)),
    }
}

async fn act(State(inside): Inside, Path((id, action)): Path<(u64, String)>) -> Answer {
    let mut inside = inside.lock().unwrap();
    let Some(item) = inside.items.get_mut(&id) else { return (StatusCode::NOT_FOUND, Json(Value::Null)) };
    let mut done = item["done"].as_array().cloned().unwrap_or_default();
    if done.contains(&json!(action)) {
        return (StatusCode::CONFLICT, Json(json!({ "error": format!("{action} is done") })));
    }
    done.push(json!(action));
    item["done"] = done.into();
    (StatusCode::OK, Json(item.clone()))
}

async fn list(
    State(inside): State<Arc<Mutex<Records>>>,
    Path(kind): Path<String>,
    Query(parameters): Parameters,
    headers: HeaderMap,
) -> (StatusCode, HeaderMap, Json<Value>) {
    let mut inside = inside.lock().unwrap();
    let query: Vec<String> = parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
    inside.asked.push(format!("/{kind}?{}", query.join("&")));
    let mut answer = HeaderMap::new();
    if let Some(token) = &inside.token
        && headers.get("authorization").and_then(|value| value.to_str().ok()) != Some(token)
    {
        return (StatusCode::UNAUTHORIZED, answer, Json(json!({"error": "who are you"})));
    }
    let text = |name: &str| parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    let number = |name: &str, default: usize| text(name).and_then(|value| value.parse().ok()).unwrap_or(default);
    let all = &inside.records;
    let most = inside.most.unwrap_or(usize::MAX);
    let slice = |offset: usize, limit: usize| -> Vec<Value> {
        all.iter().skip(offset).take(limit.min(most)).cloned().collect()
    };
    let body = match kind.as_str() {
        "all" => json!(all),
        "offset" => json!(slice(number("offset", 0), number("limit", 10))),
        "broken" => json!(slice(0, number("limit", 10))),
        "page" => {
            let (page, size) = (number("page", 1), number("size", 10).min(most));
            if page > 1 && (page - 1) * size >= all.len() {
                return (StatusCode::NOT_FOUND, answer, Json(json!({"detail": "Invalid page."})));
            }
            json!({ "results": slice((page - 1) * size, size) })
        }
        "cursor" => {
            let offset = number("after", 0);
            let next = (offset + 2 < all.len()).then(|| (offset + 2).to_string());
            json!({ "data": slice(offset, 2), "paging": { "next": next } })
        }
        "link" => {
            let page = number("page", 0);
            if (page + 1) * 2 < all.len() {
                let link = format!("</v1/link?page={}>; rel=\"next\"", page + 1);
                answer.insert("link", HeaderValue::from_str(&link).expect("a header"));
            }
            json!(slice(page * 2, 2))
        }
        "since" => {
            let since = text("since").unwrap_or_default();
            let mut newer: Vec<Value> = all
                .iter()
                .filter(|record| record["at"].as_str().unwrap_or_default() >= since.as_str())
                .cloned()
                .collect();
            newer.sort_by_key(|record| (record["at"].to_string(), record["id"].as_i64()));
            newer.truncate(number("limit", usize::MAX));
            json!(newer)
        }
        _ => return (StatusCode::NOT_FOUND, answer, Json(Value::Null)),
    };
    (StatusCode::OK, answer, Json(body))
}
