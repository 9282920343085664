//! `tidegate validate`: every class of wrong file is refused with its place, its line, and what would be right.

use std::path::PathBuf;
use std::process::Output;

use serde_json::Value;

use crate::support::tidegate;

/// A folder with settings and connectors.
struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    /// Settings that are right, and these connector files.
    fn new(connectors: &[(&str, &str)]) -> Self {
        let files = Files { folder: tempfile::tempdir().unwrap() };
        std::fs::create_dir_all(files.path("connectors")).unwrap();
        std::fs::create_dir_all(files.path("config")).unwrap();
        files.settings(
            "datastore: { url: \"postgres://shop@127.0.0.1:1/shop\" }\nlog: { type: embedded, path: data }\n",
        );
        for (name, text) in connectors {
            std::fs::write(files.path(&format!("connectors/{name}")), text).unwrap();
        }
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn settings(&self, text: &str) {
        std::fs::write(self.path("config/tidegate.yaml"), text).unwrap();
    }

    async fn validate(&self, more: &[&str]) -> (Output, String) {
        let settings = self.path("config/tidegate.yaml");
        let mut command = tidegate(["validate", "--config", settings.to_str().unwrap()]);
        let output = command.args(more).env("TIDEGATE_TEST_SECRET", "hunter2").output().await.unwrap();
        let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        (output, said)
    }

    /// Refused, with all of these in what is said.
    async fn refused(&self, expected: &[&str]) {
        let (output, said) = self.validate(&[]).await;
        assert_eq!(output.status.code(), Some(3), "{said}");
        for part in expected {
            assert!(said.contains(part), "no `{part}` in:\n{said}");
        }
        assert!(!said.contains("hunter2"), "{said}");
    }
}

const SETTINGS: &str = "datastore: { url: \"postgres://shop@127.0.0.1:1/shop\" }\n";

#[tokio::test]
async fn wrong_settings_are_refused_with_place_line_and_hint() {
    let files = Files::new(&[]);
    // What is wrong in the third line, and what is said about it.
    let wrong: [(&str, &[&str]); 14] = [
        (
            "lgo: { type: embedded }",
            &[":3:1: unknown setting `lgo`", "  3 | lgo: { type: embedded }", "did you mean `log`?"],
        ),
        ("log: { type: kafak }", &[":3:14: ", "kafka"]),
        ("log.retention: 5 parsecs", &[":3:16: `retention` must be a duration such as `500ms`", "but is `5 parsecs`"]),
        ("log: { size.limit: lots }", &[":3:20: `size.limit` must be a number of bytes such as", "`64kb`"]),
        ("rest: { listen: nowhere }", &[":3:17: ", "127.0.0.1:8080"]),
        (
            "rest.listen: 127.0.0.1:1\nrest: { listen: 127.0.0.1:2 }",
            &[":4:9: `rest.listen` is set twice", "3:14", "keep one"],
        ),
        ("log: { type: embedded }\nlog: { path: x }", &[":4:1: `log` stands here a second time", "line 3"]),
        ("log:\n\ttype: embedded", &[":4:", "a tab: YAML is indented with spaces only"]),
        ("log: { type: embedded", &[":3:22: this is not YAML", "is not closed"]),
        (
            "rest.token: ${env:TIDEGATE_NOT_SET}",
            &[":3:13: the environment variable `TIDEGATE_NOT_SET` is not set", ":-"],
        ),
        ("rest.token: ${file:/nowhere/token}", &[":3:13: cannot read /nowhere/token"]),
        ("rest.token: ${vault:x}", &[":3:13: `${vault:…}` is not a reference", "${env:NAME}"]),
        (
            "shutdown.deadline: ${env:TIDEGATE_TEST_SECRET}",
            &[":3:20: `shutdown.deadline` must be a duration", "but is not one"],
        ),
        ("schema.registry: ftp://x", &[":3:18: ", "http://localhost:8081"]),
    ];
    for (line, expected) in wrong {
        files.settings(&format!("# the worker\n{SETTINGS}{line}\n"));
        files.refused(expected).await;
    }
    files.settings("# nothing\n");
    files.refused(&["`datastore` is missing", "datastore: { url:"]).await;
}

#[tokio::test]
async fn every_error_of_every_file_is_shown_at_once() {
    let files = Files::new(&[
        ("a.yaml", "name: a\ntype: postgres-sauce\n"),
        ("b.yaml", "name: b\nname: c\n"),
        ("c.yaml", "type: http-sink\n"),
    ]);
    files.settings(&format!("{SETTINGS}colour: red\nlog: {{ typ: embedded, pth: data }}\n"));
    files.refused(&["typ", "pth"]).await;
    files.settings(&format!("{SETTINGS}log.path: data\n"));
    files
        .refused(&[
            "a.yaml:2:7: ",
            "`postgres-sauce`",
            "postgres-source",
            "b.yaml:2:1: `name` stands here a second time",
            "c.yaml:1:1: `name` is missing",
            "3 errors in 3 of them",
        ])
        .await;
    // One file alone.
    let (output, said) = files.validate(&[files.path("connectors/b.yaml").to_str().unwrap()]).await;
    assert_eq!(output.status.code(), Some(3));
    assert!(said.contains("b.yaml:2:1") && !said.contains("a.yaml"), "{said}");
}

#[tokio::test]
async fn scripts_get_the_errors_as_json() {
    let files = Files::new(&[("a.yaml", "name: a\ntype: no-such-kind\n")]);
    let (output, _) = files.validate(&["--output", "json"]).await;
    assert_eq!(output.status.code(), Some(3));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["valid"], false);
    let file = &told["files"][1];
    assert!(file["file"].as_str().unwrap().ends_with("connectors/a.yaml"));
    assert_eq!((&file["connector"], &file["type"]), (&"a".into(), &"no-such-kind".into()));
    let error = &file["errors"][0];
    assert_eq!((&error["line"], &error["column"]), (&2.into(), &7.into()));
    assert_eq!(error["text"], "type: no-such-kind");
    assert!(error["hint"].as_str().unwrap().contains("postgres-source"), "{error}");
    assert_eq!(told["files"][0]["errors"], Value::Array(Vec::new()));
}

#[tokio::test]
async fn two_files_with_one_name_are_told() {
    let files = Files::new(&[("a.yaml", "name: x\ntype: t\n"), ("b.yaml", "type: t\nname: x\n")]);
    files.refused(&["b.yaml:2:7: a connector `x` is in", "a.yaml too"]).await;
}
