//! A worker of one's own: its folder of settings and connectors, its process, and questions to it.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use serde_json::Value;

use super::process::{Folder, Process, free_port, tidegate, tidegate_launch};
use super::{eventually, http};

const START: Duration = Duration::from_secs(30);

/// Where the worker's events go.
pub enum WorkerLog<'a> {
    Embedded,
    /// `bootstrap.servers`
    Kafka(&'a str),
}

/// Settings and connectors in a folder, and a port to listen at.
pub struct Workshop {
    folder: Folder,
    port: u16,
}

impl Workshop {
    /// `datastore` is its URL; `more` is added to `tidegate.yaml` as it stands.
    pub fn new(datastore: &str, log: WorkerLog<'_>, more: &str) -> Self {
        let workshop = Workshop { folder: Folder::new("worker"), port: free_port() };
        for folder in ["config", "connectors"] {
            std::fs::create_dir_all(workshop.path().join(folder)).expect("a folder");
        }
        let log = match log {
            WorkerLog::Embedded => "log: { type: embedded, path: ../data }".to_owned(),
            WorkerLog::Kafka(servers) => {
                format!("log: {{ type: kafka, bootstrap.servers: \"{servers}\" }}\nstate: ../data")
            }
        };
        let settings = format!(
            "datastore: {{ url: \"{datastore}\" }}\n{log}\nrest: {{ listen: \"127.0.0.1:{}\" }}\n{more}\n",
            workshop.port
        );
        std::fs::write(workshop.config(), settings).expect("tidegate.yaml");
        workshop
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn config(&self) -> PathBuf {
        self.path().join("config/tidegate.yaml")
    }

    /// Writes (or rewrites) a connector file.
    pub fn connector(&self, file: &str, yaml: &str) {
        std::fs::write(self.path().join("connectors").join(file), yaml).expect("a connector file");
    }

    pub fn remove(&self, file: &str) {
        std::fs::remove_file(self.path().join("connectors").join(file)).expect("a connector file");
    }

    /// A capture of these tables (`public.a, public.b`) under its name as topic prefix.
    pub fn capture(&self, name: &str, tables: &str) {
        self.connector(
            &format!("{name}.yaml"),
            &format!("name: {name}\ntype: postgres-source\ntopic.prefix: {name}\ntable.include.list: {tables}\n"),
        );
    }

    /// Starts a worker and waits until it answers.
    pub async fn start(&self) -> Process {
        let process = self.launch();
        eventually(START, "the worker answers", async || {
            if let Some(code) = process.exited() {
                panic!("the worker ended with {code}:\n{}", process.log_end(30));
            }
            http().get(self.url("/health/live")).send().await.is_ok()
        })
        .await;
        process
    }

    /// Starts a worker and does not wait.
    pub fn launch(&self) -> Process {
        let config = self.config();
        tidegate_launch(["run", "--config", config.to_str().expect("text")]).log(self.path().join("worker.log")).start()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// Status code and body.
    pub async fn get(&self, path: &str) -> (u16, Value) {
        let response = http().get(self.url(path)).send().await.expect("the worker answers");
        let status = response.status().as_u16();
        (status, response.json().await.unwrap_or_default())
    }

    /// One connector as `/connectors` tells of it; null when there is none.
    pub async fn connector_status(&self, name: &str) -> Value {
        self.get(&format!("/connectors/{name}")).await.1
    }

    /// What its connectors and the log say, for a wait that ends in vain.
    pub async fn told(&self) -> String {
        let state = match http().get(self.url("/connectors")).send().await {
            Ok(response) => response.text().await.unwrap_or_else(|error| error.to_string()),
            Err(error) => error.to_string(),
        };
        let log = std::fs::read_to_string(self.path().join("worker.log")).unwrap_or_else(|error| error.to_string());
        let lines: Vec<&str> = log.lines().collect();
        format!("{state}\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
    }

    pub async fn until_state(&self, name: &str, state: &str) {
        eventually(START, &format!("{name} is {state}"), async || {
            let seen = self.connector_status(name).await;
            if seen["state"] == state { Ok(()) } else { Err(seen.to_string()) }
        })
        .await;
    }

    /// The command line against this workshop.
    pub async fn cli<const N: usize>(&self, args: [&str; N]) -> Output {
        let config = self.config();
        let config = config.to_str().expect("text");
        let run = tidegate(args.iter().copied().chain(["--config", config])).output();
        tokio::time::timeout(Duration::from_secs(60), run).await.expect("it ends").expect("it runs")
    }

    /// Its standard output, when it ends well.
    pub async fn ask<const N: usize>(&self, args: [&str; N]) -> String {
        let output = self.cli(args).await;
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// A topic's records from the beginning, as `consume --output json` prints them.
    pub async fn consume(&self, topic: &str) -> Vec<Value> {
        let output = self.cli(["consume", topic, "--output", "json"]).await;
        String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}
