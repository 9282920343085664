//! Tryton 8.2, a real ERP: one server over two databases, `erp` (company 1, 60 products with stock, sales) and `crm`
//! (parties only), each set up once and kept as a dump in the cache folder (scripts/tryton/template.sh).
//!
//! What it is like to talk to: an unknown field answers 500, a failed validation 400 with `{"message": …}`, an unknown id
//! 404, a wrong key 401; party codes are unique (400); an action (`POST sale.sale/1/quote`) needs a JSON body, even `{}`,
//! else 400; `write_date` is null until the first change; a party's `write_date` does not move when its address is changed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use base64::Engine;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::http::http;
use super::postgres::{Postgres, Version};
use super::process::{Folder, Launch, Process, cache_dir, free_port, run};
use super::wait::eventually;

pub struct Tryton {
    pub erp: TrytonDatabase,
    pub crm: TrytonDatabase,
    port: u16,
    process: Mutex<Option<Process>>,
    folder: Folder,
}

/// One database of a server, with a key for its REST interface.
#[derive(Clone)]
pub struct TrytonDatabase {
    pub name: String,
    pub key: String,
    port: u16,
    http: reqwest::Client,
}

static TEMPLATE: OnceCell<PathBuf> = OnceCell::const_new();
static COUNT: AtomicU32 = AtomicU32::new(1);

impl Tryton {
    /// A server with fresh databases: about 3 s (and 10 s more for the first in a process, a minute for the first on a
    /// machine).
    pub async fn start() -> Tryton {
        let postgres = Postgres::shared(Version::Distribution).await;
        let template = TEMPLATE.get_or_init(|| restore(postgres)).await;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let port = free_port();
        let admin = postgres.connect_as("postgres", "postgres").await;
        let mut databases = Vec::new();
        for name in ["erp", "crm"] {
            let key =
                std::fs::read_to_string(template.join(name).with_extension("key")).expect("a key in the template");
            let database = format!("{name}_{number}");
            let sql = format!("CREATE DATABASE {database} TEMPLATE tryton_{name}");
            admin.batch_execute(&sql).await.expect("a copy of the template");
            databases.push(TrytonDatabase { name: database, key: key.trim().to_owned(), port, http: http() });
        }
        let crm = databases.pop().expect("two");
        let erp = databases.pop().expect("two");
        let folder = Folder::new("tryton");
        std::fs::create_dir(folder.path().join("files")).expect("a folder for attachments");
        let config = format!(
            "[database]\nuri = postgresql://postgres@127.0.0.1:{}/\npath = {}/files\n[web]\nlisten = 127.0.0.1:{port}\n",
            postgres.port(),
            folder.path().display()
        );
        std::fs::write(folder.path().join("trytond.conf"), config).expect("trytond.conf");
        let tryton = Tryton { erp, crm, port, process: Mutex::new(None), folder };
        tryton.up().await;
        tryton
    }

    /// Starts it again after [`Tryton::stop`] or [`Tryton::kill9`], on the same port and databases.
    pub async fn up(&self) {
        let launch = Launch::new("trytond", cache_dir().join("tryton-8.2/bin/trytond"))
            .arg("-c")
            .arg(self.folder.path().join("trytond.conf"))
            .args(["-d", &self.erp.name, &self.crm.name])
            .log(self.folder.path().join("log"));
        let process = launch.start();
        eventually(Duration::from_secs(60), "Tryton answers", async || {
            if let Some(code) = process.exited() {
                panic!("trytond ended with {code}:\n{}", process.log_end(30));
            }
            self.erp.request(Method::GET, "party.party?s=1", None).await.map(drop)
        })
        .await;
        *self.process.lock().expect("not poisoned") = Some(process);
    }

    /// Ends it: connections to its port are refused from now on.
    pub async fn stop(&self) {
        let process = self.process.lock().expect("not poisoned").take().expect("running");
        process.kill9().await;
    }

    /// Stops it where it stands: connections stay and nothing answers; [`Tryton::thaw`] lets it go on.
    pub fn freeze(&self) {
        self.process.lock().expect("not poisoned").as_ref().expect("running").signal("STOP");
    }

    pub fn thaw(&self) {
        self.process.lock().expect("not poisoned").as_ref().expect("running").signal("CONT");
    }

    /// `127.0.0.1:PORT`, for a fault proxy in front of it.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// What it logged, a line per request among it.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.folder.path().join("log")).unwrap_or_default()).into_owned()
    }
}

impl TrytonDatabase {
    /// `http://127.0.0.1:PORT/NAME/rest/model`, for `base_url`; the key is for `auth: {type: bearer}`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/{}/rest/model", self.port, self.name)
    }

    /// One REST request as company 1: `get("party.party?f=name")`. Anything but 2xx panics.
    pub async fn get(&self, path: &str) -> Value {
        self.expect(Method::GET, path, None).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Value {
        self.expect(Method::POST, path, Some(body)).await
    }

    pub async fn put(&self, path: &str, body: Value) -> Value {
        self.expect(Method::PUT, path, Some(body)).await
    }

    /// The records of a model that match a domain, with these fields.
    pub async fn search(&self, model: &str, domain: Value, fields: &[&str]) -> Vec<Value> {
        let mut path =
            format!("{model}?d={}", encode(&domain).replace('=', "%3D").replace('+', "%2B").replace('/', "%2F"));
        for field in fields {
            path += &format!("&f={field}");
        }
        match self.get(&path).await {
            Value::Array(records) => records,
            other => panic!("{path}: not a list: {other}"),
        }
    }

    async fn expect(&self, method: Method, path: &str, body: Option<Value>) -> Value {
        let (status, answer) = self.request(method.clone(), path, body).await.expect("Tryton answers");
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// One REST request; gives status and JSON (or text) whatever the status.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<(u16, Value), reqwest::Error> {
        let mut request = self.http.request(method, format!("{}/{path}", self.url())).bearer_auth(&self.key);
        if self.name.starts_with("erp") {
            request = request.header("X-Tryton-Context", encode(&json!({"company": 1})));
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let text = answer.text().await?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
    }
}

/// Tryton's parameters and headers hold JSON in base64.
pub fn encode(value: &Value) -> String {
    base64::engine::general_purpose::STANDARD.encode(value.to_string())
}

/// Restores the dumps into databases that `CREATE DATABASE … TEMPLATE` copies.
async fn restore(postgres: &'static Postgres) -> PathBuf {
    let restore = move || {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/tryton/template.sh");
        let template = PathBuf::from(run(&mut Command::new(script)).trim_end());
        let port = postgres.port().to_string();
        let tool = |name: &str| {
            let mut command = Command::new(postgres.bin().join(name));
            command.args(["-h", "127.0.0.1", "-p", &port, "-U", "postgres"]);
            command
        };
        for name in ["erp", "crm"] {
            let database = format!("tryton_{name}");
            run(tool("createdb").arg(&database));
            run(tool("pg_restore")
                .args(["-d", &database, "--no-owner", "-j", "2"])
                .arg(template.join(name).with_extension("dump"))
                .env("PGOPTIONS", "-c synchronous_commit=off"));
        }
        template
    };
    tokio::task::spawn_blocking(restore).await.expect("restored")
}

#[tokio::test]
async fn tryton_has_products_takes_a_sale_and_comes_back_after_a_stop() {
    let tryton = Tryton::start().await;
    let product =
        &tryton.erp.search("product.product", json!([["code", "=", "MUG-01"]]), &["list_price_used"]).await[0];
    assert_eq!(product["list_price_used"]["decimal"], "18.00");
    let address = json!([["create", [{"street": "Kai 3", "city": "Kiel"}]]]);
    let party =
        tryton.erp.post("party.party?f=addresses", json!({"name": "Ann", "code": "C1", "addresses": address})).await;
    let line = json!({"product": product["id"], "unit": 1, "quantity": 2,
        "unit_price": {"__class__": "Decimal", "decimal": "18.00"}});
    let sale = json!({"reference": "W-1", "party": party["id"], "company": 1, "currency": 1, "invoice_method": "manual",
        "invoice_address": party["addresses"][0], "shipment_address": party["addresses"][0], "lines": [["create", [line]]]});
    let sale = tryton.erp.post("sale.sale", sale).await;
    tryton.stop().await;
    assert!(tryton.erp.request(Method::GET, "party.party", None).await.is_err());
    tryton.up().await;
    let quoted = tryton.erp.post(&format!("sale.sale/{}/quote?f=state", sale["id"]), json!({})).await;
    assert_eq!(quoted["state"], "quotation");
    assert_eq!(tryton.crm.get("party.party").await, json!([]));
}
