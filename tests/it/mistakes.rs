//! What a newcomer gets wrong in a connector's file, and what `tidegate validate` says: the place, and what to do.
//!
//! One file with one mistake each. The command is run once over all of them; a case is right where what is said of its
//! file begins at its line and column and holds all that it is to say.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::support::tidegate;

const SETTINGS: &str = "datastore: { url: \"postgres://shop@127.0.0.1:1/shop\" }\nlog: { type: embedded, path: data }\n\
    systems:\n  erp:\n    base_url: http://127.0.0.1:1/api\n";

/// Seven lines; `NAME` is the case's number.
const PULL: &str = "name: NAME\ntype: http-pull\nsystem: erp\nobject: party\nrequest: GET /party\n\
    into: public.customers\nmap: '{name}'\n";

/// What is replaced (nothing: the text is put at the end), by what; line and column; what is to be said.
type Case = (&'static str, &'static str, (u64, u64), &'static [&'static str]);

const CASES: &[Case] = &[
    // Indentation and white space.
    ("object: party", "  object: party", (4, 9), &["this is not YAML", "indentation"]),
    ("", "paginator:\n    type: offset\n  limit: 3\n", (10, 3), &["this is not YAML", "begin in the same column"]),
    ("", "match:\n  columns:\n  - a\n - b\n", (11, 2), &["this is not YAML", "indentation"]),
    ("", "paginator:\n\ttype: offset\n", (9, 2), &["tab", "spaces only"]),
    ("", "every:\t5m\n", (8, 8), &["a tab: put spaces in its place"]),
    ("", "every:\u{a0}5m\n", (8, 10), &["no-break space"]),
    ("", "paginator:\n\u{a0}\u{a0}type: offset\n", (9, 1), &["unknown setting", "no-break space"]),
    ("", "every:5m\n", (8, 9), &["a name is followed by a colon and a space"]),
    // Names.
    ("", "evry: 5m\n", (8, 1), &["unknown setting `evry`", "did you mean `every`?"]),
    ("", "incremental: { curser: .at }\n", (8, 16), &["`cursor` is missing", "did you mean it by `curser`?"]),
    ("", "paginator: { type: offset, limt: 5 }\n", (8, 28), &["unknown setting `limt`", "did you mean `limit`?"]),
    ("", "into: public.other\n", (8, 1), &["`into` stands here a second time", "line 6"]),
    (
        "",
        "paginator.limit: 3\npaginator: { limit: 4, type: offset }\n",
        (8, 1),
        &["`limit` is set twice", ":9:21", "keep one"],
    ),
    ("type: http-pull\n", "", (1, 1), &["`type` is missing"]),
    ("type: http-pull", "type: http_pull", (2, 7), &["no connector type `http_pull`", "http-pull"]),
    ("system: erp", "system: epr", (3, 9), &["no system `epr`", "known: erp"]),
    ("into: public.customers", "into: a.b.c", (6, 7), &["not a table's name", "public.orders"]),
    // Types and values.
    ("", "every: [5m]\n", (8, 8), &["`every` must be a duration", "is a list"]),
    ("", "every: 5 minutes\n", (8, 8), &["must be a duration such as `500ms`", "`5 minutes`"]),
    ("", "every: 99999999999d\n", (8, 8), &["must be a duration"]),
    ("", "every: 1ms\n", (8, 8), &["at least 100ms"]),
    (
        "",
        "paginator: { type: offset, limit: many }\n",
        (8, 35),
        &["`limit` must be a whole number, 0 or more", "`many`"],
    ),
    ("", "paginator: { type: offset, limit: -5 }\n", (8, 35), &["0 or more, but is `-5`"]),
    ("", "paginator: { type: offset, limit: 5, overlap: 5 }\n", (8, 47), &["`overlap` must be less than `limit`"]),
    ("", "insert: yes\n", (8, 9), &["`true` or `false`", "write `true`"]),
    ("", "insert: { a: b }\n", (8, 9), &["`true` or `false`, but is a map"]),
    ("", "conflict: newest\n", (8, 11), &["needs `newest`", "newest: { record:"]),
    ("", "conflict: upstrem\n", (8, 11), &["one of", "did you mean `upstream`?"]),
    ("", "cron: every day at 3\n", (8, 7), &["`cron` is no schedule", "0 3 * * *"]),
    ("", "cron: '0 25 * * *'\n", (8, 7), &["`cron` is no schedule", "minute, hour, day"]),
    ("", "cron: '0 0 30 2 *'\n", (8, 7), &["never comes"]),
    ("", "cron: */5 * * * *\n", (8, 7), &["put quotes around a text that begins with `*`"]),
    ("", "cron: '0 3 * * *'\ntimezone: Berlin\n", (9, 11), &["no time zone `Berlin`", "Europe/Berlin"]),
    ("GET /party", "FETCH /party", (5, 10), &["`FETCH` is no HTTP method"]),
    ("GET /party", "GET party", (5, 10), &["must begin with `/`"]),
    ("GET /party", "GET https://other.example/party", (5, 10), &["not where system `erp` is", "base_url"]),
    ("", "headers: { 'X Y': a }\n", (8, 12), &["`X Y` is no name of a header"]),
    // References.
    ("", "headers: { X: '${env:TIDEGATE_NOT_SET}' }\n", (8, 15), &["`TIDEGATE_NOT_SET` is not set", ":-"]),
    ("", "headers: { X: '${TIDEGATE_NOT_SET}' }\n", (8, 15), &["is not a reference", "${env:TIDEGATE_NOT_SET}"]),
    ("", "headers: { X: '${env.NOT_SET}' }\n", (8, 15), &["is not a reference", "${env:NOT_SET}"]),
    ("", "headers: { X: '${env:NOT_SET' }\n", (8, 15), &["`${` without its `}`"]),
    // jq.
    (
        "map: '{name}'",
        "map: |\n  {\n    name: .name,\n    mail: .email | ascii_upcase(),\n    x: 1\n  }",
        (10, 33),
        &["this is not jq", "without `()`"],
    ),
    (
        "map: '{name}'",
        "map: |\n  {\n    name: .name,\n    mail: (.email\n  }",
        (11, 3),
        &["expected closing parenthesis"],
    ),
    (
        "map: '{name}'",
        "map: >\n  { name: .name,\n    mail: .emial | lenght }",
        (9, 20),
        &["no function `lenght`", "`length`"],
    ),
    ("map: '{name}'", "map: \"{ name: 'x' }\"", (7, 15), &["jq texts are in double quotes"]),
    ("map: '{name}'", "map: { name: .name, code: .code | tostring }", (7, 6), &["is a map", "put quotes around"]),
    ("map: '{name}'", "map: [.name]", (7, 6), &["is a list", "put quotes around"]),
    ("map: '{name}'", "map: '{name: (.a ? .b : .c)}'", (7, 23), &["if … then … else … end"]),
    ("map: '{name}'", "map: '{name: `x`}'", (7, 14), &["double quotes"]),
    ("map: '{name}'", "map: “{name}”", (7, 6), &["typographic quotes"]),
    ("map: '{name}'", "map: .a && .b", (7, 9), &["write `and`"]),
    ("map: '{name}'", "map: '{name}", (7, 6), &["the quote that begins here is not closed"]),
    ("map: '{name}'", "map: \"\\(.a)\"", (7, 6), &["use single quotes, or a block"]),
    ("", "when: .x == # y\n", (8, 12), &["` #`", "as a comment"]),
    ("", "when: .a: b\n", (8, 9), &["needs quotes"]),
    ("", "when: !ruby .x\n", (8, 7), &["the YAML tag `!ruby`", "put quotes"]),
    ("", "params: { since: {{ $cursor }} }\n", (8, 19), &["put quotes around the text"]),
    ("", "params: { since: '{{ $cursor | foo }}' }\n", (8, 32), &["no function `foo`"]),
    // The file.
    ("", "paginator: *paging\n", (8, 12), &["an earlier `&name`"]),
    ("", "---\nname: other\n", (8, 1), &["a second document begins here", "two files"]),
];

/// Bytes; line and column; what is to be said.
type File = (&'static [u8], (u64, u64), &'static [&'static str]);

/// Files that are not as [`PULL`] is: their bytes, line and column, and what is to be said.
const FILES: &[File] = &[
    (b"", (1, 1), &["`name` is missing", "there is nothing here"]),
    (b"# to be written\n", (1, 1), &["`name` is missing", "there is nothing here"]),
    (b"- name: x\n", (1, 1), &["must be a map of settings", "is a list"]),
    (b"hello\n", (1, 1), &["must be a map of settings", "`hello`"]),
    (b"name: x\n# caf\xe9\ntype: http-pull\n", (2, 6), &["not UTF-8", "save the file as UTF-8"]),
    (b"n\0a\0m\0e\0:\0 \0x\0", (1, 1), &["NUL", "save the file as UTF-8"]),
    (b"\xef\xbb\xbfname: x\r\ntype: http-pull\r\nevry: 5m\r\nsystem: erp\r\nobject: a\r\nrequest: /a\r\ninto: a.b\r\nmap: |\r\n  { a: .b,\r\n    c: lenght }\r\n", (10, 8), &["no function `lenght`"]),
    (b"name: x\r\ntype: http-pull\r\nevry: 5m\r\nsystem: erp\r\nobject: a\r\nrequest: /a\r\ninto: a.b\r\nmap: .a\r\n", (3, 1), &["unknown setting `evry`", "`every`"]),
    (b"name: a b\ntype: postgres-source\n", (1, 7), &["can't be a connector's name", "letters"]),
];

#[tokio::test]
async fn every_usual_mistake_is_told_at_its_place_with_what_would_be_right() {
    let folder = tempfile::tempdir().unwrap();
    let (config, connectors) = (folder.path().join("config"), folder.path().join("connectors"));
    std::fs::create_dir_all(&config).unwrap();
    std::fs::create_dir_all(&connectors).unwrap();
    std::fs::write(config.join("tidegate.yaml"), SETTINGS).unwrap();
    let mut cases: BTreeMap<String, (Vec<u8>, _, &[&str])> = BTreeMap::new();
    for (old, new, place, said) in CASES {
        assert!(PULL.contains(old), "{old}");
        let text = if old.is_empty() { format!("{PULL}{new}") } else { PULL.replacen(old, new, 1) };
        let name = format!("c{:03}", cases.len());
        cases.insert(format!("{name}.yaml"), (text.replace("NAME", &name).into_bytes(), *place, said));
    }
    for (bytes, place, said) in FILES {
        let name = format!("f{:03}.yaml", cases.len());
        // Names must differ, or that is one mistake more.
        let text: Vec<u8> = bytes.to_vec();
        cases.insert(name, (text, *place, said));
    }
    for (name, (bytes, ..)) in &cases {
        std::fs::write(connectors.join(name), bytes).unwrap();
    }
    let settings = config.join("tidegate.yaml");
    let output =
        tidegate(["validate", "--output", "json", "--config", settings.to_str().unwrap()]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut wrong = Vec::new();
    for file in told["files"].as_array().unwrap() {
        let name = std::path::Path::new(file["file"].as_str().unwrap()).file_name().unwrap().to_str().unwrap();
        let Some((bytes, (line, column), said)) = cases.remove(name) else { continue };
        let error = &file["errors"][0];
        let text = format!("{} {}", error["message"], error["hint"]);
        let all = said.iter().all(|part| text.contains(&part.replace('"', "\\\"")));
        let line_shown = error["text"].as_str().unwrap_or_default().trim_end_matches('\r').to_owned();
        let line_there = String::from_utf8_lossy(&bytes)
            .trim_start_matches('\u{feff}')
            .lines()
            .nth(line as usize - 1)
            .unwrap_or_default()
            .to_owned();
        if !all
            || (&error["line"], &error["column"]) != (&line.into(), &column.into())
            || line_shown.trim() != line_there.replace('\t', " ").trim()
        {
            wrong.push(format!(
                "{}\n  wanted {line}:{column} {said:?} at {line_there:?}\n  told {error:#}",
                String::from_utf8_lossy(&bytes)
            ));
        }
    }
    assert!(cases.is_empty(), "nothing is said of {:?}", cases.keys());
    assert!(wrong.is_empty(), "{} are told in another way:\n\n{}", wrong.len(), wrong.join("\n\n"));
}
