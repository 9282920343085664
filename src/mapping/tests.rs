//! Expressions give what they should, are refused where they should be, and end.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::config::{ConfigError, Place, Section, Spanned, parse_text};

fn text(text: &str) -> Spanned<String> {
    let place = Place::start(Path::new("t.yaml"), text);
    Spanned::new(text.to_owned(), place)
}

fn program(expression: &str) -> Program {
    Compiler::default().jq(&text(expression)).unwrap()
}

fn first(expression: &str, input: Value) -> Value {
    program(expression).first(&input, &Scope::default()).unwrap()
}

fn parsed(json: &str) -> Value {
    serde_json::from_str(json).unwrap()
}

fn failed(expression: &str, input: Value) -> String {
    match program(expression).run(&input, &Scope::default()) {
        Err(MapError::Failed(text)) => text,
        other => panic!("{expression}: {other:?}"),
    }
}

/// The error for the setting `map` of a file.
fn refused(yaml: &str) -> ConfigError {
    let mut section = Section::new(parse_text(yaml, "t.yaml").unwrap(), "connector").unwrap();
    let text = section.require::<Spanned<String>>("map").unwrap();
    Compiler::default().jq(&text).unwrap_err()
}

#[test]
fn numbers_and_names_go_through_as_they_are() {
    let input =
        r#"{"z":12345678901234567890.123456789012345678,"a":1.10,"m":[100000000000000000000,-0.5,1e3],"é":"ü"}"#;
    assert_eq!(first(".", parsed(input)).to_string(), input.replace("1e3", "1e+3"));
    assert_eq!(
        first("{z: .a, a: .z}", parsed(input)).to_string(),
        r#"{"z":1.10,"a":12345678901234567890.123456789012345678}"#
    );
}

#[test]
fn arithmetic_of_decimals_is_exact() {
    let cases = [
        ("0.1 + 0.2", "0.3"),
        ("19.99 * 3", "59.97"),
        ("1.5 - 1.50", "0.00"),
        ("10 / 4", "2.5"),
        ("10 / 5", "2"),
        ("1 / 3", "0.3333333333333333"),
        ("[0.1, 0.2, 0.3] | add", "0.6"),
        ("12345678901234567890.10 + 1", "12345678901234567891.10"),
        ("9007199254740993 + 0.0", "9007199254740993.0"),
        ("0.10 == 0.1", "true"),
        ("12345678901234567890.1 < 12345678901234567890.2", "true"),
        ("[12345678901234567890.1 == 12345678901234567890.2, 1 == 1.0, 2 > 1.5]", "[false,true,true]"),
        ("{a: 1.05} | .a += 0.10 | .a", "1.15"),
        ("-1.50", "-1.50"),
        ("7 % 3", "1"),
        ("0 / 0 | isnan", "true"),
        ("9223372036854775807 + 1", "9223372036854775808"),
        ("\"\\(19.90 * 2)\"", "\"39.80\""),
        ("\"12.50\" | tonumber", "12.50"),
        ("12.50 | tostring", "\"12.50\""),
        ("1e999999999 + 1 | . > 5", "true"),
    ];
    for (expression, expected) in cases {
        assert_eq!(first(expression, Value::Null).to_string(), expected, "{expression}");
    }
}

#[test]
fn numbers_are_equal_by_value() {
    assert!(equal(&parsed("[1.0, {\"a\": 1e1}]"), &parsed("[1, {\"a\": 10.00}]")));
    assert!(!equal(&parsed("12345678901234567890.1"), &parsed("12345678901234567890.2")));
    assert!(!equal(&json!({"a": 1}), &json!({"a": 1, "b": null})));
    assert!(!equal(&json!("1"), &json!(1)));
}

#[test]
fn missing_is_told_from_null() {
    assert_eq!(first("[.x, has(\"x\"), has(\"y\")]", json!({"y": null})), json!([null, false, true]));
    assert_eq!(first("{a} + (if has(\"b\") then {b} else {} end)", json!({"a": 1})), json!({"a": 1}));
}

#[test]
fn standard_functions_are_there() {
    let input =
        json!({"name": "Ann", "tags": ["b", "a", "b"], "at": "2024-02-29T12:30:00Z", "lines": [{"q": 2}, {"q": 3}]});
    let cases = [
        (".tags | unique | join(\",\")", json!("a,b")),
        ("[.lines[].q] | add", json!(5)),
        (".at | fromdate | todate", json!("2024-02-29T12:30:00Z")),
        (".at | fromdate | strftime(\"%d.%m.%Y\")", json!("29.02.2024")),
        (".name | test(\"^a\"; \"i\")", json!(true)),
        (".name | ascii_downcase | @base64", json!("YW5u")),
        ("\"a b&c\" | @uri", json!("a%20b%26c")),
        ("to_entries | map(.key)", json!(["name", "tags", "at", "lines"])),
        ("[.lines[] | select(.q > 2)] | length", json!(1)),
        ("try error(\"x\") catch .", json!("x")),
        ("[limit(3; repeat(1))]", json!([1, 1, 1])),
        ("[range(0; 10; 3)]", json!([0, 3, 6, 9])),
        ("reduce range(5) as $i (0; . + $i)", json!(10)),
        ("[recurse(if . < 3 then . + 1 else empty end)]", Value::Null),
        (".name[0:2]", json!("An")),
        ("\"{\\\"a\\\": 1.50}\" | fromjson | tojson", json!("{\"a\":1.50}")),
        ("[.[] | type] | unique", json!(["array", "string"])),
        ("walk(if type == \"string\" then ascii_upcase else . end) | .name", json!("ANN")),
        ("[paths] | length", json!(11)),
        ("[splits(\", *\"; null)]?", Value::Null),
        (". as {name: $n, tags: [$t]} | [$n, $t]", json!(["Ann", "b"])),
        ("def f(x): x * 2; f(.lines[0].q)", json!(4)),
        ("del(.tags, .lines, .at)", json!({"name": "Ann"})),
        (".lines |= map(.q)  | .lines", json!([2, 3])),
        ("label $out | foreach (1, 2, 3) as $x (0; . + $x; if . > 2 then ., break $out else empty end)", json!(3)),
    ];
    for (expression, expected) in cases {
        if !expected.is_null() {
            assert_eq!(first(expression, input.clone()), expected, "{expression}");
        }
    }
}

#[test]
fn whatever_is_written_ends() {
    let started = std::time::Instant::now();
    for endless in [
        "def f: f; f",
        "def f: 1 + f; f",
        "[range(0; infinite)]",
        "last(range(0; infinite))",
        "[repeat(1)]",
        "last(repeat(1))",
        "reduce range(0; infinite) as $x (0; . + $x)",
        "until(false; . + 1)",
        "[recurse(.)]",
        "def f: try f catch f; f",
        "def f: f // f; f",
        "def f: [f]; f",
        "reduce range(100) as $i (\"x\"; . + .)",
        "\"x\" * 100000000000",
        "reduce range(100) as $i ([1]; . + .)",
        "reduce range(1000000) as $i (null; [.])",
        "reduce range(1000000) as $i (null; {a: .})",
        "def f($n): if $n == 0 then null else [f($n - 1)] end; f(1000000)",
        "def f: [.] | f; f",
        "reduce range(1000) as $i (3; . * .)",
        "[limit(100000000; repeat(1))]",
        "def f: (., .) | f; f",
        "first(range(0; infinite) | select(. < 0))",
        "while(true; .)",
        "[combinations(30)]",
        "isempty(repeat(empty))",
        "path(repeat(.))",
        "try (def f: f; f) catch 1",
        "\"x\" | [splits(\"\")] | repeat(.) | empty",
        "input_line_number? // (def f: 1, f; [f])",
        "[range(1e12)]",
        "reduce range(40) as $i ([1]; [.[], .[]])",
        "[.] | DOUBLED",
        "[.] | DOUBLED | length",
        "\"x\" * 200000000 | explode",
        "\"x\" * 200000000 | split(\"\")",
        "\"x\" * 200000000 | [scan(\"x\")]",
        "\"x\" * 5000000 | gsub(\"x\"; \"yy\")",
        "\"[\" + \"0,\" * 100000000 + \"0]\" | fromjson",
        "\"%\" * 200000000 | @uri | @uri | @uri",
        "\"<\" * 200000000 | @html",
    ] {
        let endless = endless.replace("DOUBLED", &["[.[], .[]]"; 60].join(" | "));
        let endless = endless.as_str();
        let Ok(program) = Compiler::default().jq(&text(endless)) else { continue };
        let began = std::time::Instant::now();
        let result = program.run(&json!([0, 1]), &Scope::default());
        let message = format!("{endless}: {:?} {result:?}", began.elapsed());
        assert!(matches!(result, Err(MapError::Failed(_))), "{}", &message[..message.len().min(300)]);
        assert!(began.elapsed().as_secs() < 15, "{message}");
    }
    // What is made of a usual text is far from any bound.
    let text = "a few words and <b>tags</b>, ".repeat(10_000);
    let made = first("[scan(\"[a-z]+\")] | length", json!(text));
    assert_eq!(made, json!(70_000));
    assert_eq!(first("split(\" \") | length", json!(text)), json!(50_001));
    assert_eq!(first("gsub(\"<[^>]*>\"; \"\") | length", json!(&text[..29_000])), json!(22_000));
    eprintln!("all ended in {:?}", started.elapsed());
}

#[test]
fn a_stopped_expression_says_so() {
    let told = failed("def f: f; f", json!({"a": 1}));
    assert_eq!(told, "t.yaml:1:1: stopped: it takes too many steps; does it loop forever?; the input was {\"a\":1}");
}

#[test]
fn a_failing_expression_says_where_and_on_what() {
    let told = failed("  .a.b", json!({"a": "x"}));
    assert_eq!(told, "t.yaml:1:1: cannot index \"x\" with \"b\"; the input was {\"a\":\"x\"}");
    let scope = Scope { secret: Some("hun\"ter"), ..Scope::default() };
    let error = program("$secret | error").first(&json!("hun\"ter"), &scope).unwrap_err().to_string();
    assert!(!error.contains("hun"), "{error}");
}

#[test]
fn links_are_asked_for_all_at_once_then_answered() {
    let expression = program(
        r#"link("party"; .customer) as $p | {party: $p.id, at: $p.address, lines: [.lines[] | link("product"; .p).id], up: local("sale"; .s)}"#,
    );
    let input = json!({"customer": 7, "lines": [{"p": "a"}, {"p": "b"}, {"p": "a"}], "s": {"x": 1}});
    let Err(MapError::Needs(wanted)) = expression.first(&input, &Scope::default()) else { panic!() };
    assert_eq!(wanted.len(), 4);
    let mut links = Links::default();
    links.put_link("party", &json!(7), Some(json!({"id": 70, "address": 5})));
    links.put_link("product", &json!("a"), Some(json!({"id": 1})));
    links.put_link("product", &json!("b"), Some(json!({"id": 2})));
    links.put_local("sale", &json!({"x": 1}), None);
    let run = |links: &Links| expression.first(&input, &Scope { links: Some(links), ..Scope::default() });
    assert_eq!(run(&links).unwrap(), json!({"party": 70, "at": 5, "lines": [1, 2, 1], "up": null}));
    links.put_link("product", &json!("b"), None);
    assert_eq!(run(&links), Err(MapError::Waits(Wanted::Link { object: "product".into(), key: json!("b") })));
}

#[test]
fn waiting_cannot_be_caught() {
    let mut links = Links::default();
    links.put_link("party", &json!(7), None);
    let scope = Scope { links: Some(&links), ..Scope::default() };
    for expression in [
        r#"link("party"; 7) // {id: 1}"#,
        r#"try link("party"; 7) catch 1"#,
        r#"link("party"; 7)?"#,
        r#"first(link("party"; 7), 1)"#,
        r#"[.[]? | link("party"; 7)] | length"#,
    ] {
        let waits = program(expression).first(&json!([1]), &scope);
        assert!(matches!(waits, Err(MapError::Waits(_))), "{expression}: {waits:?}");
    }
    assert_eq!(program(r#"link("party"; null).id"#).first(&Value::Null, &scope), Ok(Value::Null));
}

#[test]
fn variables_are_null_until_set() {
    let all = program("[$link, $cursor, $secret, $idempotency_key, $probe, $status, $headers, $page]");
    assert_eq!(
        all.first(&Value::Null, &Scope::default()).unwrap(),
        json!([null, null, null, null, null, null, null, null])
    );
    let (link, page) = (json!({"id": 1}), json!({"number": 2}));
    let scope = Scope {
        link: Some(&link),
        cursor: Some(&page),
        secret: Some("s"),
        idempotency_key: Some("k"),
        probe: Some(&link),
        status: Some(500),
        headers: Some(&link),
        page: Some(&page),
        links: None,
    };
    let expected = json!([link, page, "s", "k", link, 500, link, page]);
    assert_eq!(all.first(&Value::Null, &scope).unwrap(), expected);
}

#[test]
fn a_wrong_expression_is_placed_in_the_file() {
    let error = refused("name: x\nmap: |\n  { a: .b,\n    c: lenght }\n");
    assert!(
        error
            .to_string()
            .starts_with("t.yaml:4:8: jq has no function `lenght` here\n  4 |     c: lenght }\n    |        ^"),
        "{error}"
    );
    assert!(error.hint_text().unwrap().contains("did you mean `length`?"), "{error}");

    let error = refused("map: >\n  .a\n  | foo(1; 2)\n");
    assert!(error.to_string().starts_with("t.yaml:3:5: jq has no function `foo(…; …)` here"), "{error}");

    let error = refused("map: '{ a: .b, c: ''x'' }'");
    assert!(error.to_string().starts_with("t.yaml:1:19: this is not jq"), "{error}");
    assert!(error.hint_text().unwrap().contains("double quotes"), "{error}");

    let error = refused("map: \"\\\"x\\\" | .a | nope\"");
    assert!(error.to_string().starts_with("t.yaml:1:20: jq has no function `nope`"), "{error}");

    let error = refused("map: if .a then 1");
    assert!(
        error.to_string().starts_with("t.yaml:1:18: this is not jq: expected else or end, found the end"),
        "{error}"
    );

    let error = refused("map: .a && .b");
    assert!(error.hint_text() == Some("write `and`"), "{error}");

    let error = refused("map: .a | now");
    assert!(error.hint_text().unwrap().contains("there is no clock"), "{error}");

    let error = refused("map: $linc.id");
    assert!(error.to_string().starts_with("t.yaml:1:6: there is no variable `$linc`"), "{error}");
    assert_eq!(error.hint_text(), Some("did you mean `$link`?"));

    let error = refused("map: map(.a; .b)");
    assert!(error.hint_text().unwrap().contains("another number of arguments"), "{error}");

    let error = refused("map: .a + # the b");
    assert!(error.hint_text().unwrap().contains("as a comment"), "{error}");

    let error = refused("map: '{{ .a }}'");
    assert!(error.hint_text().unwrap().contains("is jq as it stands"), "{error}");
}

#[test]
fn definitions_of_a_system_are_known_and_placed() {
    let yaml = "define: |\n  def dec: {decimal: tostring};\n  def twice: dec | [., .];\nmap: .price | twice";
    let mut section = Section::new(parse_text(yaml, "t.yaml").unwrap(), "system").unwrap();
    let define = section.require::<Spanned<String>>("define").unwrap();
    let compiler = Compiler::new(Some(&define)).unwrap();
    let map = compiler.jq(&section.require("map").unwrap()).unwrap();
    let out = map.first(&json!({"price": parsed("1.50")}), &Scope::default()).unwrap();
    assert_eq!(out, json!([{"decimal": "1.50"}, {"decimal": "1.50"}]));

    let yaml = "define: |\n  def dec: tostrin;\n";
    let mut section = Section::new(parse_text(yaml, "t.yaml").unwrap(), "system").unwrap();
    let error = Compiler::new(Some(&section.require("define").unwrap())).unwrap_err();
    assert!(error.to_string().starts_with("t.yaml:2:12: jq has no function `tostrin`"), "{error}");
}

#[test]
fn an_expression_that_is_nested_without_end_is_refused_not_crashed_on() {
    let deep = [
        format!("{}1{}", "(".repeat(20_000), ")".repeat(20_000)),
        format!("{}1{}", "(".repeat(250), ")".repeat(250)),
        "1|".repeat(8_000) + "1",
        "1,".repeat(8_000) + "1",
        "-".repeat(16_000) + "1",
        "try ".repeat(4_000) + "1",
        "1 as $x|".repeat(2_000) + "1",
        "1+".repeat(8_000) + "1",
        "[".repeat(60_000),
        // Just within the bounds.
        "1|".repeat(380) + "1",
        "1,".repeat(380) + "1",
        "-".repeat(380) + "1",
        "try ".repeat(380) + "1",
        "1 as $x|".repeat(380) + "1",
        "1+".repeat(380) + "1",
        "first(".repeat(250) + "1" + &")".repeat(250),
        "[".repeat(250) + "1" + &"]".repeat(250),
    ];
    for deep in deep {
        match Compiler::default().jq(&text(&deep)) {
            Ok(program) => drop(program.run(&Value::Null, &Scope::default())),
            Err(error) => assert!(error.to_string().len() < 1000, "{error}"),
        }
    }
}

#[test]
fn templates_write_values_into_text() {
    let render = |template: &str, escape, input: Value| {
        Compiler::default().template(&text(template), escape).unwrap().render(&input, &Scope::default())
    };
    let input = json!({"id": "a/b c", "n": 5, "o": {"x": {"y": 1}}, "null": null, "dots": ".."});
    assert_eq!(render("/c/{{ .id }}/{{.n}}", Escape::Path, input.clone()).unwrap(), "/c/a%2Fb%20c/5");
    assert_eq!(render("/c?q={{ .id }}&n={{ .null }}", Escape::Path, input.clone()).unwrap(), "/c?q=a%2Fb%20c&n=");
    assert_eq!(render("{{ .id }}", Escape::None, input.clone()).unwrap(), "a/b c");
    assert_eq!(
        render("{{ {a: {b: .o}} | tojson }}!", Escape::None, input.clone()).unwrap(),
        r#"{"a":{"b":{"x":{"y":1}}}}!"#
    );
    assert_eq!(render(r#"{{ "}}\({a: "}}"} | .a)" }}"#, Escape::None, input.clone()).unwrap(), "}}}}");
    assert_eq!(render("no jq", Escape::Path, input.clone()).unwrap(), "no jq");
    for wrong in ["/c/{{ .null }}", "/c/{{ .dots }}", "/c/{{ .nothing }}/x"] {
        assert!(matches!(render(wrong, Escape::Path, input.clone()), Err(MapError::Failed(_))), "{wrong}");
    }
    let error = Compiler::default().template(&text("a {{ .b"), Escape::None).unwrap_err();
    assert!(error.to_string().starts_with("t.yaml:1:3: `{{` without its `}}`"), "{error}");
    let error = Compiler::default().template(&text("a {{ lenght }}"), Escape::None).unwrap_err();
    assert!(error.to_string().starts_with("t.yaml:1:6: jq has no function"), "{error}");
}

#[test]
fn maps_of_templates_repeat_lists_and_leave_out_null() {
    let node =
        parse_text("f: [code, name]\nd: '{{ .a }}'\nl: '{{ [1, 2] }}'\nx: '{{ .none }}'\nn: 5", "t.yaml").unwrap();
    let tree = Compiler::default().tree(&node).unwrap();
    let rendered = tree.render(&json!({"a": "v w"}), &Scope::default()).unwrap();
    let pairs: Vec<String> = rendered.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(pairs, ["f=code", "f=name", "d=v w", "l=1", "l=2", "n=5"]);
}

#[test]
fn programs_may_run_in_several_threads() {
    fn shared<T: Send + Sync + 'static>(_: &T) {}
    shared(&program("."));
    shared(&Compiler::default());
}

/// Records a second through a usual mapping: `cargo test --release --lib mapping::tests::measure -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement: prints figures and judges none, so it is run by hand"]
fn measure() {
    let map = program(
        r#"{ name: .after.name, code: "C\(.after.id)", total: (.after.price * .after.quantity) }
           + if $link then {} else { addresses: [["create", [{ street: .after.street, city: .after.city }]]] } end"#,
    );
    let input = parsed(
        r#"{"key": {"id": 7}, "after": {"id": 7, "name": "Ann", "price": 19.90, "quantity": 3, "street": "Weg 1", "city": "Ulm", "email": "a@b.c", "created": "2024-01-01T00:00:00Z"}}"#,
    );
    let compile = std::time::Instant::now();
    for _ in 0..20 {
        program(".after.name");
    }
    eprintln!("compile: {:?}", compile.elapsed() / 20);
    for (name, program) in [("mapping", map), ("filter", program(".after.email != null")), ("identity", program("."))] {
        let started = std::time::Instant::now();
        for _ in 0..50_000 {
            program.first(&input, &Scope::default()).unwrap();
        }
        eprintln!("{name}: {:.0} records/s", 50_000.0 / started.elapsed().as_secs_f64());
    }
}

#[test]
fn a_regular_expression_of_an_evil_kind_ends() {
    let started = std::time::Instant::now();
    let evil = json!("a".repeat(30) + "!");
    let _ = program(r#"test("(a+)+$")"#).run(&evil, &Scope::default());
    let _ = program(r#"test("(a|aa)+$")"#).run(&evil, &Scope::default());
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
}

proptest::proptest! {
    #[test]
    fn every_value_comes_back_as_it_went(value in any_value()) {
        let text = value.to_string();
        let back = super::convert::from_val(&super::convert::to_val(&value)).unwrap();
        proptest::prop_assert_eq!(text, back.to_string());
    }

    #[test]
    fn compiling_never_panics(expression in "[ -~é\n]{0,60}") {
        if let Ok(program) = Compiler::default().jq(&text(&expression)) {
            let _ = program.run(&json!({"a": [1, "x"]}), &Scope::default());
        }
        let _ = Compiler::default().template(&text(&expression), Escape::Path);
    }
}

fn any_value() -> impl proptest::strategy::Strategy<Value = Value> {
    use proptest::prelude::*;
    let number = prop_oneof![
        any::<i64>().prop_map(|whole| whole.to_string()),
        any::<u64>().prop_map(|whole| whole.to_string()),
        "-?[1-9][0-9]{0,40}",
        "-?(0|[1-9][0-9]{0,20})\\.[0-9]{1,30}",
        "-?[1-9]\\.[0-9]{1,5}e[+-][1-9][0-9]{0,2}",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        number.prop_map(|text| parsed(&text)),
        any::<String>().prop_map(Value::String),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::Array),
            prop::collection::vec((any::<String>(), inner), 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}
