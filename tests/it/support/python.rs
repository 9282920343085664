//! The stock Confluent client for Python, a reader of Tidegate's topics that this project did not write.

use std::process::Stdio;

use super::process::{cache_dir, install};

/// Runs a Python program (its text) where `confluent_kafka[avro]` can be imported, and gives what it printed; panics when
/// it fails.
pub async fn python(program: &str, args: &[&str]) -> String {
    tokio::task::spawn_blocking(|| install("install-python-clients.sh", &[])).await.expect("installed");
    let mut command = tokio::process::Command::new(cache_dir().join("python-clients/bin/python"));
    command.arg("-c").arg(program).args(args).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.expect("python starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}: {}\n{}", output.status, text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

#[tokio::test]
async fn the_stock_client_can_be_imported() {
    let program = "from confluent_kafka.schema_registry.avro import AvroDeserializer\nprint(AvroDeserializer.__name__)";
    assert_eq!(python(program, &[]).await.trim(), "AvroDeserializer");
}
