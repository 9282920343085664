//! Apicurio Registry: a Confluent-compatible schema registry, kept in memory.

use std::time::Duration;

use tokio::sync::OnceCell;

use super::http::http;
use super::kafka::JVM;
use super::process::{Launch, Process, cache_dir, free_port, install};
use super::wait::eventually;

pub struct Apicurio {
    port: u16,
    process: Process,
}

static SHARED: OnceCell<Apicurio> = OnceCell::const_new();

impl Apicurio {
    /// The registry that all tests of this process share: use subjects of your own. Takes some 5 s at first.
    pub async fn shared() -> &'static Apicurio {
        SHARED.get_or_init(Apicurio::start).await
    }

    /// A registry of one's own. Starts with compatibility NONE.
    pub async fn start() -> Apicurio {
        tokio::task::spawn_blocking(|| install("install-apicurio.sh", &[])).await.expect("installed");
        let port = free_port();
        let process = Launch::new("apicurio", "java")
            .args(JVM)
            .args([
                "-Dquarkus.http.host=127.0.0.1".to_owned(),
                format!("-Dquarkus.http.port={port}"),
                "-jar".to_owned(),
            ])
            .arg(cache_dir().join("apicurio-2.6.13.Final/apicurio-registry-app-2.6.13.Final-runner.jar"))
            .start();
        let apicurio = Apicurio { port, process };
        let http = http();
        eventually(Duration::from_secs(90), "Apicurio is ready", async || {
            if let Some(code) = apicurio.process.exited() {
                panic!("Apicurio ended with {code}:\n{}", apicurio.process.log_end(30));
            }
            let ready = format!("http://127.0.0.1:{port}/health/ready");
            http.get(ready).send().await.is_ok_and(|answer| answer.status().is_success())
        })
        .await;
        apicurio
    }

    /// The base URL of the Confluent-compatible API, for `schema.registry.url`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/apis/ccompat/v7", self.port)
    }

    /// Stops it where it stands: connections stay and nothing answers.
    pub fn freeze(&self) {
        self.process.signal("STOP");
    }

    pub fn thaw(&self) {
        self.process.signal("CONT");
    }
}

#[tokio::test]
async fn apicurio_speaks_the_confluent_api() {
    let subjects = format!("{}/subjects", Apicurio::shared().await.url());
    let answer = http().get(subjects).send().await.unwrap().error_for_status().unwrap().text().await.unwrap();
    assert!(answer.starts_with('['), "{answer}");
}
