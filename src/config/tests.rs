//! What a file means, and what is told when it means nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use secrecy::ExposeSecret;

use super::*;

fn section(text: &str) -> Section {
    Section::new(parse_text(text, "shop.yaml").unwrap(), "connector `shop`").unwrap()
}

fn refused(text: &str) -> String {
    parse_text(text, "shop.yaml").unwrap_err().to_string()
}

#[test]
fn dotted_and_nested_spellings_are_one_setting() {
    for text in
        ["topic.prefix: shop", "topic: { prefix: shop }", "topic:\n  prefix: shop", r#"{"topic.prefix": "shop"}"#]
    {
        let mut read = section(text);
        assert_eq!(read.take::<String>("topic.prefix").unwrap().as_deref(), Some("shop"), "{text}");
        read.finish().unwrap();
    }
    let mut read = section("errors.retry: { max: 3 }\nerrors:\n  retry.delay: 2s\nerrors.retry.jitter: true");
    let mut retry = read.section("errors.retry").unwrap().unwrap();
    assert_eq!(retry.take::<u32>("max").unwrap(), Some(3));
    assert_eq!(retry.take::<Duration>("delay").unwrap(), Some(Duration::from_secs(2)));
    assert_eq!(retry.take::<bool>("jitter").unwrap(), Some(true));
    retry.finish().unwrap();
    read.finish().unwrap();
}

#[test]
fn a_setting_in_both_spellings_names_both_places() {
    let mut read = section("topic.prefix: shop\ntopic:\n  prefix: other");
    let error = read.take::<String>("topic.prefix").unwrap_err().to_string();
    assert!(error.starts_with("shop.yaml:3:3: `topic.prefix` is set twice: here and at shop.yaml:1:15"), "{error}");
}

#[test]
fn a_text_may_stand_beside_names_below_it() {
    let mut read = section("snapshot.mode: initial\nsnapshot.mode.threads: 4");
    assert_eq!(read.take::<String>("snapshot.mode").unwrap().as_deref(), Some("initial"));
    assert_eq!(read.take::<u16>("snapshot.mode.threads").unwrap(), Some(4));
    read.finish().unwrap();
}

#[test]
fn free_maps_are_taken_as_they_stand() {
    let mut read = section("headers: { X.Y-Z: a, Accept: b }\nheaders.If-Match: c");
    let headers = read.take::<BTreeMap<String, String>>("headers").unwrap().unwrap();
    assert_eq!(headers.keys().collect::<Vec<_>>(), ["Accept", "If-Match", "X.Y-Z"]);
    read.finish().unwrap();
}

#[test]
fn a_list_is_a_yaml_list_or_a_text_with_commas() {
    for text in ["t: [a, 'b,c']", "t: a, b\\,c", "t:\n  - a\n  - 'b,c'"] {
        assert_eq!(section(text).take::<Vec<String>>("t").unwrap().unwrap(), ["a", "b,c"], "{text}");
    }
}

#[test]
fn an_unknown_name_is_refused_with_the_nearest_known_one() {
    let mut read = section("topic:\n  prefx: shop\nbatching.size: 3");
    read.take::<String>("topic.prefix").unwrap();
    read.take::<String>("name").unwrap();
    let error = read.finish().unwrap_err().to_string();
    assert_eq!(
        error,
        "shop.yaml:2:3: unknown setting `topic.prefx` in connector `shop`\n  2 |   prefx: shop\n    |   ^\n  \
         hint: did you mean `topic.prefix`?\n\
         shop.yaml:3:1: unknown setting `batching.size` in connector `shop`\n  3 | batching.size: 3\n    | ^\n  \
         hint: known here: name, topic.prefix"
    );
}

#[test]
fn a_missing_setting_finds_the_slip_of_the_pen() {
    let error = section("topic_prefix: shop").require::<String>("topic.prefix").unwrap_err();
    assert_eq!(error.message(), "`topic.prefix` is missing in connector `shop`");
    assert_eq!(error.hint_text(), Some("did you mean it by `topic_prefix`?"));
}

#[test]
fn durations_and_sizes_have_units() {
    for (text, milliseconds) in [
        ("500ms", 500),
        ("2s", 2000),
        ("5m", 300_000),
        ("1h30m", 5_400_000),
        ("7d", 604_800_000),
        ("250", 250),
        ("1.5s", 1500),
    ] {
        let read = section(&format!("t: {text}")).take::<Duration>("t").unwrap();
        assert_eq!(read, Some(Duration::from_millis(milliseconds)), "{text}");
    }
    for (text, bytes) in [("64kb", 65_536), ("16MB", 16 << 20), ("1gib", 1 << 30), ("12", 12), ("0.5k", 512)] {
        assert_eq!(section(&format!("t: {text}")).take::<ByteSize>("t").unwrap(), Some(ByteSize(bytes)), "{text}");
    }
    for wrong in ["5 parsecs", "s", "1.2.3s", "-1s", "999999999999999999999d"] {
        let error = section(&format!("t: {wrong}")).take::<Duration>("t").unwrap_err();
        assert!(error.message().starts_with("`t` must be a duration such as `500ms`"), "{error}");
    }
}

#[test]
fn a_number_out_of_range_says_the_range() {
    let error = section("port: 70000").take::<u16>("port").unwrap_err();
    assert_eq!(error.message(), "`port` must be a whole number from 0 to 65535, but is `70000`");
    assert_eq!(section("port: '8080'").take::<u16>("port").unwrap(), Some(8080));
}

#[test]
fn references_are_replaced_and_never_shown() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("pg"), "hunter2\n").unwrap();
    std::fs::write(folder.path().join("keys"), "# comment\nerp = hunter3\n").unwrap();
    std::fs::write(folder.path().join("keys.yaml"), "erp: { key: hunter4 }").unwrap();
    let text = "a: \"${file:pg}\"\nb: x${file:keys:erp}y\nc: ${file:keys.yaml:erp.key}\nd: ${env:TIDEGATE_UNSET:-9}\ne: $${env:X} ${topic} $x\n";
    let node = parse_text(text, folder.path().join("shop.yaml")).unwrap();
    let mut read = Section::new(node, "connector").unwrap();
    assert_eq!(read.take::<Secret>("a").unwrap().unwrap().expose_secret(), "hunter2");
    let b = read.take::<Spanned<String>>("b").unwrap().unwrap();
    assert_eq!(b.value, "xhunter3y");
    assert!(!format!("{b:?}").contains("hunter"));
    let error = read.take::<u16>("c").unwrap_err().to_string();
    assert!(!error.contains("hunter") && error.contains("${file:keys.yaml:erp.key}"), "{error}");
    assert_eq!(read.take::<u16>("d").unwrap(), Some(9));
    assert_eq!(read.take::<String>("e").unwrap().unwrap(), "${env:X} ${topic} $x");
}

#[test]
fn a_reference_that_cannot_be_read_says_why() {
    let read = |text: &str| section(text).take::<String>("a").unwrap_err().to_string();
    assert!(read("a: ${env:TIDEGATE_UNSET}").contains("1:4: the environment variable `TIDEGATE_UNSET` is not set"));
    assert!(read("a: ${file:/nowhere/at/all}").contains("cannot read /nowhere/at/all: No such file"));
    assert!(read("a: ${evn:X}").contains("`${evn:…}` is not a reference"));
    assert!(read("a: ${env:X").contains("without its `}`"));
}

#[test]
fn a_secret_in_the_file_itself_is_not_shown_either() {
    let mut read = section("pasword: hunter2\nurl: postgres://u:hunter3@h/db\nitoken: ${env:X}");
    read.take::<String>("password").unwrap();
    let error = read.finish().unwrap_err().to_string();
    assert!(
        !error.contains("hunter3") && error.contains("postgres://u:***@h/db") && error.contains("${env:X}"),
        "{error}"
    );
    let mut read = section("db_password: 'hunter2'\napi.token: hunter3");
    read.take::<String>("name").unwrap();
    let error = read.finish().unwrap_err().to_string();
    assert!(!error.contains("hunter"), "{error}");
}

#[test]
fn what_is_no_yaml_is_refused_with_the_reason() {
    assert!(refused("a:\n\tb: 1").contains("a tab: YAML is indented with spaces only"));
    assert!(refused("name: x\nname: y").contains("2:1: `name` stands here a second time"));
    assert!(refused("name: x\n--- \nname: y").contains("a second document"));
    let text = "map: { a: .b | select(.c == \"d: e\"), f: [ }";
    assert!(refused(text).contains("needs quotes"), "{}", refused(text));
    assert!(refused("path: {{ .a }}/b").contains("put quotes around"), "{}", refused("path: {{ .a }}/b"));
    assert!(refused("map: .a | {x: 1}: 2").contains("needs quotes"), "{}", refused("map: .a | {x: 1}: 2"));
    assert!(refused("a: \"C\\(.id)\"").contains("single quotes"), "{}", refused("a: \"C\\(.id)\""));
    assert!(refused("a: 1\n b: 2").contains("indentation"), "{}", refused("a: 1\n b: 2"));
    assert!(refused("a: !secret x").contains("tag `!secret`"));
}

#[test]
fn jq_without_quotes_that_is_yaml_by_accident_is_told() {
    let error = section("map: { email: .after.email }").take::<String>("map").unwrap_err().to_string();
    assert!(error.contains("`map` must be a text, but is a map") && error.contains("put quotes"), "{error}");
}

#[test]
fn anchors_and_merges_are_understood_and_bounded() {
    let mut read = section("base: &base { a: 1, b: 2 }\nmore: { <<: *base, b: 3 }");
    let more = read.take::<BTreeMap<String, u32>>("more").unwrap().unwrap();
    assert_eq!(more, BTreeMap::from([("a".to_owned(), 1), ("b".to_owned(), 3)]));
    let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let below = format!("*a{}, ", level - 1).repeat(10);
        laughs.push_str(&format!("a{level}: &a{level} [{}]\n", below.trim_end_matches(", ")));
    }
    assert!(refused(&laughs).contains("too much for one file"));
    assert!(refused("a: &a [*a]").contains("stands inside what it refers to"));
    assert!(refused(&"[".repeat(200)).contains("nested more than") || refused(&"[".repeat(200)).contains("not YAML"));
}

#[test]
fn settings_passed_on_to_a_library_come_flat() {
    let mut read = section(
        "type: kafka\nbootstrap: { servers: [a:1, b:2] }\nsasl.password: ${env:TIDEGATE_UNSET:-x}\nlinger.ms: 5",
    );
    read.take::<String>("type").unwrap();
    let entries = read.entries("").unwrap();
    let plain: Vec<(&str, &str)> = entries.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(plain, [("bootstrap.servers", "a:1,b:2"), ("sasl.password", "x"), ("linger.ms", "5")]);
    read.finish().unwrap();
}

#[test]
fn a_wrong_word_is_answered_with_the_near_one() {
    #[derive(Clone, Debug)]
    enum Conflict {
        Upstream,
        Merge,
    }
    crate::choices!(Conflict { "upstream" => Conflict::Upstream, "merge" => Conflict::Merge });
    let error = section("conflict: upstrem").take::<Conflict>("conflict").unwrap_err().to_string();
    assert!(error.contains("must be one of `upstream`, `merge`, but is `upstrem`"), "{error}");
    assert!(error.contains("did you mean `upstream`?"), "{error}");
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "[-a-c:{}\\[\\]'\"|>&*!#%,?\n\t\r \u{85}é~<.0$]{0,80}") {
        if let Err(error) = parse_text(&text, "t.yaml") {
            proptest::prop_assert!(error.to_string().starts_with("t.yaml:"));
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let _ = parse_text(&String::from_utf8_lossy(&bytes), "t.yaml");
    }

    #[test]
    fn flat_and_nested_spellings_read_the_same(names in names(), split in proptest::num::u64::ANY) {
        // One file flat, one nested at some of the dots.
        let mut nested = Vec::new();
        for (at, name) in names.iter().enumerate() {
            let mut line = name.clone();
            for (dot, _) in name.match_indices('.').rev() {
                if split >> ((at + dot) % 60) & 1 == 1 {
                    line = format!("{}: {{ {} }}", &line[..dot], &line[dot + 1..]);
                }
            }
            nested.push(line);
        }
        let values = |flat: bool| -> Vec<Option<String>> {
            names.iter().enumerate().map(|(at, name)| {
                let text = match flat {
                    true => format!("{name}: v{at}"),
                    false if nested[at].contains('{') => nest(&nested[at], at),
                    false => format!("{}: v{at}", nested[at]),
                };
                section(&text).take::<String>(name).unwrap()
            }).collect()
        };
        proptest::prop_assert_eq!(values(true), values(false));
    }
}

/// Names of which none begins another.
fn names() -> impl proptest::strategy::Strategy<Value = Vec<String>> {
    proptest::collection::vec("[a-c]{1,2}(\\.[a-c]{1,2}){0,3}", 1..5)
}

/// Puts the value at the innermost name of `a: { b.c }`.
fn nest(line: &str, at: usize) -> String {
    match line.find(" }") {
        Some(end) => format!("{}: v{at}{}", &line[..end], &line[end..]),
        None => format!("{line}: v{at}"),
    }
}
