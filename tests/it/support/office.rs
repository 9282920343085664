//! What tests of the worker as a whole stand on: a database with customers, a worker of their own that captures them,
//! and a small real CRM over HTTP that takes them, counts, refuses whom it is told to, and can hang or fail.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{Database, Postgres, Version, WorkerLog, Workshop, eventually};

const SOON: Duration = Duration::from_secs(100);

#[derive(Clone, Copy, PartialEq)]
pub enum Mood {
    Well,
    /// Requests are taken and never answered.
    Hangs,
    /// Everything is answered 503.
    Fails,
    /// Every answer takes so long.
    Slow(Duration),
}

pub struct Crm {
    address: SocketAddr,
    inside: Arc<Mutex<Inside>>,
    task: JoinHandle<()>,
}

struct Inside {
    customers: Vec<Value>,
    events: Vec<Value>,
    writes: usize,
    held: usize,
    mood: Mood,
    refused: Option<String>,
}

type Shared = State<Arc<Mutex<Inside>>>;
type Answer = (StatusCode, Json<Value>);

impl Crm {
    /// `GET /customers?ref=`, `POST /customers` (422 for whom it refuses), `PUT /customers/{id}`, `POST /events`, `GET /ping`.
    pub async fn start() -> Crm {
        let (customers, events) = (Vec::new(), Vec::new());
        let inside =
            Arc::new(Mutex::new(Inside { customers, events, writes: 0, held: 0, mood: Mood::Well, refused: None }));
        let router = Router::new()
            .route("/customers", get(find).post(create))
            .route("/customers/{id}", put(change))
            .route("/events", post(event))
            .route("/ping", get(ping))
            .with_state(inside.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("serves") });
        Crm { address, inside, task }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap()
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn set(&self, mood: Mood) {
        self.lock().mood = mood;
    }

    /// Customers of this name are answered 422.
    pub fn refuse(&self, name: Option<&str>) {
        self.lock().refused = name.map(str::to_owned);
    }

    /// Names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.lock().customers.iter().map(|customer| customer["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    }

    pub fn events(&self) -> Vec<Value> {
        self.lock().events.clone()
    }

    pub fn add(&self, customer: Value) {
        self.lock().customers.push(customer);
    }

    /// Requests that were taken and never answered.
    pub fn held(&self) -> usize {
        self.lock().held
    }

    /// Requests that would change something, answered or not.
    pub fn writes(&self) -> usize {
        self.lock().writes
    }
}

impl Drop for Crm {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn mood(inside: &Shared, writes: bool) -> Option<Answer> {
    let mood = {
        let mut inside = inside.lock().unwrap();
        inside.writes += usize::from(writes);
        inside.held += usize::from(inside.mood == Mood::Hangs);
        inside.mood
    };
    match mood {
        Mood::Well => None,
        Mood::Hangs => std::future::pending().await,
        Mood::Fails => Some((StatusCode::SERVICE_UNAVAILABLE, Json(json!({"message": "closed"})))),
        Mood::Slow(time) => {
            tokio::time::sleep(time).await;
            None
        }
    }
}

async fn ping(inside: Shared) -> Answer {
    mood(&inside, false).await.unwrap_or((StatusCode::OK, Json(json!({}))))
}

async fn find(inside: Shared, Query(asked): Query<Vec<(String, String)>>) -> Answer {
    if let Some(answer) = mood(&inside, false).await {
        return answer;
    }
    let wanted = asked.iter().find(|(name, _)| name == "ref").map(|(_, value)| value.clone());
    let inside = inside.lock().unwrap();
    let found: Vec<Value> = inside
        .customers
        .iter()
        .filter(|customer| wanted.as_ref().is_none_or(|wanted| customer["ref"].as_i64() == wanted.parse().ok()))
        .cloned()
        .collect();
    (StatusCode::OK, Json(json!(found)))
}

async fn create(inside: Shared, Json(mut body): Json<Value>) -> Answer {
    if let Some(answer) = mood(&inside, true).await {
        return answer;
    }
    let mut inside = inside.lock().unwrap();
    if let Some(refused) = &inside.refused
        && body["name"] == refused.as_str()
    {
        return (StatusCode::UNPROCESSABLE_ENTITY, Json(json!({"message": "we know nobody of this name"})));
    }
    let id = inside.customers.len() + 1;
    body["id"] = json!(id);
    inside.customers.push(body);
    (StatusCode::OK, Json(json!({ "id": id })))
}

async fn change(inside: Shared, Path(id): Path<usize>, Json(body): Json<Value>) -> Answer {
    if let Some(answer) = mood(&inside, true).await {
        return answer;
    }
    let mut inside = inside.lock().unwrap();
    let Some(customer) = inside.customers.get_mut(id.wrapping_sub(1)) else {
        return (StatusCode::NOT_FOUND, Json(json!({})));
    };
    for (name, value) in body.as_object().expect("an object") {
        customer[name] = value.clone();
    }
    (StatusCode::OK, Json(json!({})))
}

async fn event(inside: Shared, Json(body): Json<Value>) -> Answer {
    if let Some(answer) = mood(&inside, true).await {
        return answer;
    }
    inside.lock().unwrap().events.push(body);
    (StatusCode::OK, Json(json!({})))
}

pub struct Office {
    pub database: Database<'static>,
    pub workshop: Workshop,
    pub crm: Crm,
    /// The capture, its topic prefix, and its slot behind `tidegate_`.
    pub capture: String,
    pub sink: String,
    pub topic: String,
}

impl Office {
    /// Two customers, and the file of a capture; `more` goes into the worker's settings.
    pub async fn open(name: &str, log: WorkerLog<'_>, more: &str) -> Office {
        Office::on(Postgres::shared(Version::Distribution).await, name, log, more).await
    }

    pub async fn on(server: &'static Postgres, name: &str, log: WorkerLog<'_>, more: &str) -> Office {
        let database = server.database(name).await;
        database
            .execute(
                "CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL, note text);
                 INSERT INTO customers VALUES (1, 'Ada'), (2, 'Grace');",
            )
            .await;
        let crm = Crm::start().await;
        let system = format!(
            "systems:\n  crm:\n    base_url: http://{}\n    probe: GET /ping\n    breaker.open: 500ms\n    \
             timeouts: {{ request: 30s, probe: 2s }}\n{more}",
            crm.address
        );
        let workshop = Workshop::new(&database.url(), log, &system);
        let capture = database.name.clone();
        workshop.capture(&capture, "public.customers");
        let (sink, topic) = (format!("{capture}-crm"), format!("{capture}.public.customers"));
        Office { database, workshop, crm, capture, sink, topic }
    }

    /// The file of a sink that keeps the CRM's customers in step; `more` stands at its end.
    pub fn deliver(&self, more: &str) {
        self.workshop.connector(
            "sink.yaml",
            &format!(
                "name: {}\ntype: http-sink\nsystem: crm\nobject: customer\ntopics: {}\ninitial: create\nsettle: 500ms\n\
                 map: '{{ name: .after.name, ref: .key.id }}'\n\
                 match: {{ request: GET /customers, params: {{ ref: '{{{{ .key.id }}}}' }}, id: '.[].id' }}\n\
                 create: {{ request: POST /customers, id: .id }}\nupdate: 'PUT /customers/{{{{ $link.id }}}}'\n{more}\n",
                self.sink, self.topic
            ),
        );
    }

    /// The file of a sink that sends every event as it is.
    pub fn deliver_events(&self) {
        self.workshop.connector(
            "sink.yaml",
            &format!(
                "name: {}\ntype: http-sink\nsystem: crm\nsend: change\ntopics: {}\nrequest: POST /events\nmap: .after\n",
                self.sink, self.topic
            ),
        );
    }

    pub async fn until_delivered(&self, names: &[&str]) {
        eventually(SOON, &format!("the CRM has {names:?}"), async || {
            let seen = self.crm.names();
            if seen == names { Ok(()) } else { Err(format!("{seen:?}\n{}", self.workshop.told().await)) }
        })
        .await;
    }

    pub async fn until_captured(&self, count: usize) {
        eventually(SOON, &format!("{count} records in {}", self.topic), async || {
            let seen = self.workshop.consume(&self.topic).await.len();
            if seen == count { Ok(()) } else { Err(format!("{seen} records")) }
        })
        .await;
    }

    /// Waits until `/health/ready` is not, with all of `parts` in its reasons.
    pub async fn until_not_ready(&self, parts: &[&str]) -> Value {
        eventually(Duration::from_secs(90), &format!("not ready: {parts:?}"), async || {
            let (status, health) = self.workshop.get("/health/ready").await;
            let text = health["troubles"].to_string();
            let told = status == 503 && health["ready"] == false && parts.iter().all(|part| text.contains(part));
            if told { Ok(health) } else { Err(format!("{status} {health}")) }
        })
        .await
    }

    pub async fn until_ready(&self) -> Value {
        eventually(Duration::from_secs(90), "ready", async || {
            let (status, health) = self.workshop.get("/health/ready").await;
            if status == 200 { Ok(health) } else { Err(health.to_string()) }
        })
        .await
    }
}
