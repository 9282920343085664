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

const SYSTEM: &str =
    "systems:\n  erp:\n    base_url: http://127.0.0.1:1/api\n    define: |\n      def q: tojson | @base64;\n";

#[tokio::test]
async fn wrong_systems_are_refused_with_place_line_and_hint() {
    let files = Files::new(&[]);
    let wrong: [(&str, &[&str]); 7] = [
        ("    bsae_url: x", &[":7:5: unknown setting `bsae_url` in", "did you mean `base_url`?"]),
        ("    auth: { type: bearer, tokn: x }", &["`token` is missing in auth", ":7:27", "did you mean it by `tokn`?"]),
        ("    auth: { type: bearrer, token: x }", &[":7:19: `bearrer` is no type of auth", "one of: bearer"]),
        ("    probe: FETCH /x", &[":7:12: `FETCH` is no HTTP method", "a method and a path"]),
        ("    headers: { A: '{{ {company: 1} | qq }}' }", &[":7:38: jq has no function `qq`", "did you mean `q`?"]),
        ("    errors: [ { status: 500, then: rejct } ]", &[":7:36: `then` must be one of", "did you mean `reject`?"]),
        ("    budget: { requests: 0, per: 1s }", &[":7:25: `requests` must be at least 1"]),
    ];
    for (line, expected) in wrong {
        files.settings(&format!("{SETTINGS}{SYSTEM}{line}\n"));
        files.refused(expected).await;
    }
    files.settings(&format!(
        "{SETTINGS}systems:\n  erp:\n    base_url: http://x/\n    define: |\n      def q: .a |\n        tojsn;\n"
    ));
    files.refused(&[":7:9: jq has no function `tojsn` here", "  7 |         tojsn;", "did you mean `tojson`?"]).await;
}

const PULL: &str = "name: x\ntype: http-pull\nsystem: erp\nobject: party\nrequest: GET /party\ninto: public.customers\nmap: '{name}'\n";

#[tokio::test]
async fn wrong_connectors_are_refused_with_place_line_and_hint() {
    let files = Files::new(&[]);
    files.settings(&format!("{SETTINGS}{SYSTEM}"));
    let pull = |old: &str, new: &str| {
        assert!(PULL.contains(old));
        PULL.replace(old, new)
    };
    let capture = "name: x\ntype: postgres-source\n";
    let wrong: Vec<(String, &[&str])> = vec![
        (
            pull("map: '{name}'", "map: |\n  { name,\n    email: .emial | lenght }"),
            &["x.yaml:9:21: jq has no function `lenght`", "did you mean `length`?"],
        ),
        (
            pull("map: '{name}'", "map: { name: .name }"),
            &["x.yaml:7:6: `map` must be a text, but is a map", "put quotes around"],
        ),
        (pull("map: '{name}'", "map: .name && .x"), &["x.yaml:7:12: this is not jq", "write `and`"]),
        (pull("system: erp", "system: epr"), &["x.yaml:3:9: there is no system `epr`", "known: erp"]),
        (
            pull("GET /party", "GET /party/{{ $cursr }}"),
            &["x.yaml:5:24: there is no variable `$cursr`", "did you mean `$cursor`?"],
        ),
        (pull("GET /party", "/party/{{ .a"), &["x.yaml:5:17: `{{` without its `}}`"]),
        (
            pull("into: public.customers", "intoo: public.customers"),
            &["x.yaml:6:1: `into` is missing in", "did you mean it by `intoo`?"],
        ),
        (pull("into:", "every: 1s\ncron: '0 3 * * *'\ninto:"), &["x.yaml:7:7: `every` and `cron` exclude each other"]),
        (pull("into:", "cron: 61 * * * *\ninto:"), &["x.yaml:6:7: `cron` is no schedule"]),
        (
            pull("into:", "paginator: { type: ofset }\ninto:"),
            &["x.yaml:6:20: `ofset` is no type of paginator", "offset"],
        ),
        (
            pull("into:", "conflict: upstrem\ninto:"),
            &["x.yaml:6:11: `conflict` must be one of", "did you mean `upstream`?"],
        ),
        (
            pull("into:", "pagniator: { type: offset }\ninto:"),
            &["x.yaml:6:1: unknown setting `pagniator`", "did you mean `paginator`?"],
        ),
        (
            format!("{capture}topic.prefx: shop\n"),
            &["x.yaml:3:1: `topic.prefix` is missing", "did you mean it by `topic.prefx`?"],
        ),
        (
            format!("{capture}topic.prefix: shop\nsnapshot.mode: intial\n"),
            &["x.yaml:4:16: `snapshot.mode` must be one of", "did you mean `initial`?"],
        ),
        (
            format!("{capture}topic.prefix: shop\nslot: {{ nme: a }}\n"),
            &["x.yaml:4:9: unknown setting `slot.nme`", "did you mean `slot.name`?"],
        ),
        (
            format!("{capture}topic.prefix: shop\ntable.include.list: 'public.(('\n"),
            &["x.yaml:4:21: ", "regular expression"],
        ),
        (
            "name: a b\ntype: postgres-source\n".to_owned(),
            &["x.yaml:1:7: `a b` can't be a connector's name", "letters"],
        ),
    ];
    for (text, expected) in wrong {
        std::fs::write(files.path("connectors/x.yaml"), &text).unwrap();
        files.refused(expected).await;
    }
    // A flat Kafka Connect JSON means the same as nested YAML.
    std::fs::remove_file(files.path("connectors/x.yaml")).unwrap();
    let flat = r#"{"name": "x", "type": "postgres-source", "topic.prefix": "shop", "table.include.list": "public.a,public.b",
        "tombstones.on.delete": "false", "topic.creation.default.partitions": "3"}"#;
    std::fs::write(files.path("connectors/x.json"), flat).unwrap();
    let (output, said) = files.validate(&[]).await;
    assert!(output.status.success() && said.contains("2 files, nothing wrong"), "{said}");
}

#[test]
fn every_setting_that_is_read_is_documented_and_none_that_is_not() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let documented = std::fs::read_to_string(root.join("docs/configuration.md")).unwrap();
    let mut sources = String::new();
    let mut folders = vec![root.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("src/config") {
                folders.push(path);
            } else if path.to_str().is_some_and(|path| path.ends_with(".rs") && !path.ends_with("tests.rs")) {
                let text = std::fs::read_to_string(path).unwrap();
                sources.push_str(text.split("#[cfg(test)]\nmod tests").next().unwrap());
            }
        }
    }
    let read = regex::Regex::new(
        r#"(?:\.(?:take|or|require|section|sections|node|entries)(?:::<[^(]*>)?\(|(?:mode|patterns|program|request)\(section, )\s*"([a-z_.]+)""#,
    )
    .unwrap();
    let mut names: Vec<&str> = read.captures_iter(&sources).map(|found| found.get(1).unwrap().as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert!(names.len() > 80, "{names:?}");
    let not_documented: Vec<&&str> = names
        .iter()
        .filter(|name| {
            // Stands as `name`, `prefix.name`, `.name` after its first, or inside an example `{ name: … }`.
            let last = name.rsplit('.').next().unwrap_or(name);
            let patterns =
                [format!("`{name}`"), format!(".{last}`"), format!("{name}:"), format!(" {name},"), format!("{name}.")];
            !patterns.iter().any(|pattern| documented.contains(pattern))
        })
        .collect();
    assert!(not_documented.is_empty(), "not in docs/configuration.md: {not_documented:?}");
    let mut unknown = Vec::new();
    for row in documented.lines().filter(|line| line.starts_with("| `") && !line.contains("| becomes |")) {
        let first = row.split(" | ").next().unwrap();
        for name in first.split('`').skip(1).step_by(2).filter(|name| !name.contains(['$', '*'])) {
            // A row may tell of one value: `send: change`.
            let name = name.split(':').next().unwrap_or(name);
            let last = name.rsplit_once('.').map_or(name, |(_, last)| last);
            if !sources.contains(&format!("{last}\"")) && !["NAME"].contains(&last) {
                unknown.push(name);
            }
        }
    }
    assert!(unknown.is_empty(), "documented, but read nowhere: {unknown:?}");
}
