//! Encoder, decoder and schemas together: properties against apache-avro's generic decoding, and the cases that a
//! property would not find.

use apache_avro::Schema;
use apache_avro::reader::datum::GenericDatumReader;
use apache_avro::types::Value as Avro;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::event::{Cell, Column, ColumnType, Lsn, Oid, Operation, ReplicaIdentity, Table, TypeKind};

fn base(name: &str) -> ColumnType {
    ColumnType { oid: Oid(0), schema: "pg_catalog".into(), name: name.into(), kind: TypeKind::Base }
}

fn array_of(element: ColumnType) -> ColumnType {
    let kind = TypeKind::Array { element: Box::new(element.clone()) };
    ColumnType { name: format!("_{}", element.name), kind, ..element }
}

fn column(name: &str, column_type: ColumnType) -> Column {
    Column {
        name: name.into(),
        column_type,
        type_modifier: -1,
        nullable: true,
        default_expression: None,
        generated: false,
    }
}

/// A table whose first column is its key.
fn table(columns: Vec<Column>) -> Table {
    Table {
        oid: Oid(1),
        schema: "public".into(),
        name: "things".into(),
        replica_identity: ReplicaIdentity::Default,
        columns,
        key: vec![0],
    }
}

fn id() -> Column {
    Column { nullable: false, ..column("id", base("int4")) }
}

fn settings() -> EncodingSettings {
    EncodingSettings::new("shop", "shopdb")
}

/// A table made ready for events.
struct Bench {
    schemas: TableSchemas,
    plan: TablePlan,
    settings: EncodingSettings,
}

impl Bench {
    fn new(table: &Table, settings: EncodingSettings) -> Bench {
        let schemas = schemas(table, &settings).unwrap();
        let plan = TablePlan::compile(table, &settings, schemas.key.as_ref().map(|_| 1), 2).unwrap();
        Bench { schemas, plan, settings }
    }

    /// Bodies of an event's value.
    fn value(&self, before: Option<&[Cell<'_>]>, after: Option<&[Cell<'_>]>) -> Result<Vec<u8>, AvroError> {
        let transaction =
            TransactionMeta::new(&self.settings, 1_700_000_000_123_456, Some(42), Some(Lsn(7)), Some("erp"));
        let meta = EventMeta {
            transaction: &transaction,
            operation: Operation::Update,
            lsn: Lsn(u64::from(u32::MAX) + 5),
            snapshot: SnapshotMarker::False,
            block: Some(TransactionBlock { id: "42:9", total_order: 3, data_collection_order: 2 }),
            processed_ns: 1_700_000_001_000_000_001,
        };
        let mut out = b"before".to_vec();
        let result = self.plan.write_value(before, after, &meta, &mut out);
        assert!(result.is_ok() || out == b"before", "a row that fails leaves nothing behind");
        result?;
        let (schema_id, body) = split_wire(&out[6..]).unwrap();
        assert_eq!(schema_id, 2);
        Ok(body.to_vec())
    }

    fn generic(&self, body: &[u8]) -> Avro {
        let schema = Schema::parse_str(&self.schemas.value).unwrap();
        let mut rest = body;
        let value = GenericDatumReader::builder(&schema).build().unwrap().read_value(&mut rest).unwrap();
        assert!(rest.is_empty(), "{} bytes left over", rest.len());
        value
    }

    fn friendly(&self, body: &[u8]) -> Value {
        Decoder::compile(&self.schemas.value).unwrap().decode(body).unwrap()
    }
}

fn field<'a>(value: &'a Avro, name: &str) -> &'a Avro {
    match value {
        Avro::Record(fields) => &fields.iter().find(|(field, _)| field == name).unwrap().1,
        Avro::Union(_, inner) => field(inner, name),
        other => panic!("{other:?} has no {name}"),
    }
}

fn without_union(value: &Avro) -> &Avro {
    match value {
        Avro::Union(_, inner) => without_union(inner),
        value => value,
    }
}

/// A column, a text of its type, and what apache-avro is to read.
#[derive(Clone, Debug)]
struct Sample {
    column: Column,
    text: String,
    expected: Avro,
}

fn sample(column_type: ColumnType, type_modifier: i32, text: String, expected: Avro) -> Sample {
    Sample { column: Column { type_modifier, ..column("", column_type) }, text, expected }
}

/// The shortest two's complement, by another way than the encoder's.
fn unscaled(value: i128) -> Vec<u8> {
    let mut bytes = value.to_be_bytes().to_vec();
    while bytes.len() > 1 && (bytes[0] == 0 && bytes[1] < 0x80 || bytes[0] == 0xff && bytes[1] >= 0x80) {
        bytes.remove(0);
    }
    bytes
}

fn decimal_text(value: i128, scale: u32) -> String {
    let digits = format!("{:0>width$}", value.unsigned_abs(), width = scale as usize + 1);
    let (integral, fraction) = digits.split_at(digits.len() - scale as usize);
    let sign = if value < 0 { "-" } else { "" };
    if scale == 0 { format!("{sign}{integral}") } else { format!("{sign}{integral}.{fraction}") }
}

/// PostgreSQL quotes every element that needs it; quoting all of them is as good.
fn array_text(items: &[Option<String>]) -> String {
    let quoted = |item: &Option<String>| match item {
        Some(text) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
        None => "NULL".into(),
    };
    format!("{{{}}}", items.iter().map(quoted).collect::<Vec<_>>().join(","))
}

fn text_strategy() -> impl Strategy<Value = String> {
    // PostgreSQL's text has no NUL.
    proptest::string::string_regex("[^\\x00]{0,40}").unwrap()
}

fn timestamp_strategy() -> impl Strategy<Value = (String, i64)> {
    // As chrono has them, from 4713 BC to its own end.
    (-210_000_000_000i64..8_000_000_000_000, 0u32..1_000_000).prop_map(|(seconds, micros)| {
        let at = chrono::DateTime::from_timestamp(seconds, micros * 1000).unwrap().naive_utc();
        use chrono::Datelike;
        let (year, era) = if at.year() > 0 { (at.year(), "") } else { (1 - at.year(), " BC") };
        let fraction = if micros == 0 { String::new() } else { format!(".{micros:06}") };
        let fraction = fraction.trim_end_matches('0');
        (format!("{year:04}{}{fraction}{era}", at.format("-%m-%d %H:%M:%S")), seconds * 1_000_000 + i64::from(micros))
    })
}

fn sample_strategy() -> impl Strategy<Value = Sample> {
    let decimal_limit = 10i128.pow(37);
    prop_oneof![
        any::<bool>().prop_map(|v| sample(base("bool"), -1, if v { "t" } else { "f" }.into(), Avro::Boolean(v))),
        any::<i16>().prop_map(|v| sample(base("int2"), -1, v.to_string(), Avro::Int(v.into()))),
        any::<i32>().prop_map(|v| sample(base("int4"), -1, v.to_string(), Avro::Int(v))),
        any::<i64>().prop_map(|v| sample(base("int8"), -1, v.to_string(), Avro::Long(v))),
        any::<f32>().prop_map(|v| sample(base("float4"), -1, format!("{v:?}"), Avro::Float(v))),
        any::<f64>().prop_map(|v| sample(base("float8"), -1, format!("{v:?}"), Avro::Double(v))),
        text_strategy().prop_map(|v| sample(base("text"), -1, v.clone(), Avro::String(v))),
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(|v| {
            let hex: String = v.iter().map(|byte| format!("{byte:02x}")).collect();
            sample(base("bytea"), -1, format!("\\x{hex}"), Avro::Bytes(v))
        }),
        (-decimal_limit..decimal_limit, 0u32..38).prop_map(|(v, scale)| {
            let type_modifier = 4 + (38 << 16 | scale as i32);
            sample(base("numeric"), type_modifier, decimal_text(v, scale), Avro::Decimal(unscaled(v).into()))
        }),
        timestamp_strategy().prop_map(|(text, micros)| sample(base("timestamp"), -1, text, Avro::Long(micros))),
        timestamp_strategy()
            .prop_map(|(text, micros)| { sample(base("timestamp"), 3, text, Avro::Long(micros.div_euclid(1000))) }),
        proptest::collection::vec(proptest::option::of(text_strategy()), 0..6).prop_map(|items| {
            let expected = |item: &Option<String>| match item {
                Some(text) => Avro::Union(1, Box::new(Avro::String(text.clone()))),
                None => Avro::Union(0, Box::new(Avro::Null)),
            };
            let expected = Avro::Array(items.iter().map(expected).collect());
            sample(array_of(base("text")), -1, array_text(&items), expected)
        }),
    ]
}

/// Texts compare where numbers would not: NaN, and the sign of zero.
fn shown(value: &Avro) -> String {
    match value {
        Avro::Float(v) => format!("float {:x}", v.to_bits()),
        Avro::Double(v) => format!("double {:x}", v.to_bits()),
        other => format!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn what_the_plan_writes_apache_avro_reads(
        samples in proptest::collection::vec((sample_strategy(), any::<bool>(), any::<bool>()), 1..12)
    ) {
        let mut columns = vec![id()];
        for (at, (sample, _, required)) in samples.iter().enumerate() {
            columns.push(Column { name: format!("c{at}"), nullable: !required, ..sample.column.clone() });
        }
        let bench = Bench::new(&table(columns), settings());
        let mut row = vec![Cell::Text(b"17")];
        for (sample, null, required) in &samples {
            row.push(if *null && !required { Cell::Null } else { Cell::Text(sample.text.as_bytes()) });
        }
        let body = bench.value(Some(&row), Some(&row)).unwrap();
        let generic = bench.generic(&body);
        for side in ["before", "after"] {
            for (at, (sample, null, required)) in samples.iter().enumerate() {
                let expected = if *null && !required { &Avro::Null } else { &sample.expected };
                let got = without_union(field(field(&generic, side), &format!("c{at}")));
                prop_assert_eq!(shown(got), shown(expected), "{}", sample.text);
            }
        }
        // Our own decoder agrees with apache-avro that these bytes are whole, and finds the same columns.
        let friendly = bench.friendly(&body);
        prop_assert_eq!(friendly["after"].as_object().unwrap().len(), samples.len() + 1);
    }

    #[test]
    fn decimals_of_any_length_come_back_digit_by_digit(digits in "-?[1-9][0-9]{0,120}", scale in 0usize..60) {
        let (sign, magnitude) = digits.strip_prefix('-').map_or(("", &digits[..]), |rest| ("-", rest));
        let padded = format!("{magnitude:0>width$}", width = scale + 1);
        let (integral, fraction) = padded.split_at(padded.len() - scale);
        let stripped = fraction.trim_end_matches('0');
        let point = if stripped.is_empty() { "" } else { "." };
        let text = format!("{sign}{integral}.{fraction}0");
        let bench = Bench::new(&table(vec![id(), column("n", base("numeric"))]), settings());
        let body = bench.value(None, Some(&[Cell::Text(b"1"), Cell::Text(text.as_bytes())])).unwrap();
        prop_assert_eq!(bench.friendly(&body)["after"]["n"].to_string(), format!("{sign}{integral}{point}{stripped}"));
    }

    #[test]
    fn hostile_bytes_are_refused_and_no_more(
        body in proptest::collection::vec(any::<u8>(), 0..300), flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4)
    ) {
        let columns = vec![
            id(), column("t", base("text")), column("n", base("numeric")), column("a", array_of(base("int4"))),
            column("p", base("point")), column("d", base("date")), column("at", base("timestamp")),
            column("l", base("polygon")), column("j", base("jsonb")),
        ];
        let bench = Bench::new(&table(columns), EncodingSettings { hstore: HstoreMode::Map, ..settings() });
        let decoder = Decoder::compile(&bench.schemas.value).unwrap();
        let _ = (decoder.decode(&body), decoder.decode_raw(&body));
        let texts = ["1", "text", "1.5", "{1,2}", "(1,2)", "2026-07-04", "2026-07-04 00:00:00", "((0,0),(1,1))", "{}"];
        let row: Vec<Cell<'_>> = texts.iter().map(|text| Cell::Text(text.as_bytes())).collect();
        let mut valid = bench.value(None, Some(&row)).unwrap();
        for (at, byte) in flips {
            let at = at % valid.len();
            valid[at] ^= byte;
        }
        let _ = (decoder.decode(&valid), decoder.decode_raw(&valid));
    }
}

#[test]
fn every_type_of_a_row_is_shown_in_friendly_form() {
    let columns = vec![
        id(),
        Column { type_modifier: 4 + (12 << 16 | 2), ..column("price", base("numeric")) },
        column("at", base("timestamptz")),
        column("day", base("date")),
        column("clock", base("time")),
        column("doc", base("jsonb")),
        column("raw", base("bytea")),
        column("tags", array_of(base("text"))),
        column("weight", base("float4")),
        column("kept", base("text")),
    ];
    let bench = Bench::new(&table(columns), settings());
    let mut row: Vec<Cell<'_>> = [
        "7",
        "1234.50",
        "2026-07-04 12:34:56+02",
        "2026-07-04",
        "24:00:00",
        r#"{"a": 1.10}"#,
        "\\xff00",
        "{a,NULL}",
        "0.1",
    ]
    .map(|text| Cell::Text(text.as_bytes()))
    .into();
    row.push(Cell::Unchanged);
    let event = bench.friendly(&bench.value(None, Some(&row)).unwrap());
    assert_eq!(
        event["after"].to_string(),
        r#"{"id":7,"price":1234.50,"at":"2026-07-04T10:34:56Z","day":"2026-07-04","clock":"24:00:00","doc":{"a":1.10},"raw":"/wA=","tags":["a",null],"weight":0.1}"#
    );
    assert_eq!(event["before"], Value::Null);
    assert_eq!(event["source"]["sequence"], r#"["7","4294967300"]"#);
    assert_eq!(event["source"]["origin"], "erp");
    assert_eq!(event["source"]["ts_us"], 1_700_000_000_123_456i64);
    assert_eq!(event["transaction"], json!({"id": "42:9", "total_order": 3, "data_collection_order": 2}));
    assert_eq!((&event["op"], &event["ts_ms"]), (&json!("u"), &json!(1_700_000_001_000i64)));
}

#[test]
fn an_unchanged_value_of_any_form_is_left_out_of_the_friendly_one() {
    let types = [
        base("text"),
        base("jsonb"),
        base("bytea"),
        base("numeric"),
        base("hstore"),
        base("polygon"),
        array_of(base("text")),
        array_of(base("int8")),
        array_of(base("float4")),
        array_of(base("bytea")),
        array_of(base("timestamptz")),
        array_of(base("date")),
    ];
    for hstore in [HstoreMode::Json, HstoreMode::Map] {
        for binary in [BinaryMode::Bytes, BinaryMode::Base64, BinaryMode::Hex] {
            for column_type in &types {
                let settings = EncodingSettings { hstore, binary, ..settings() };
                let bench = Bench::new(&table(vec![id(), column("big", column_type.clone())]), settings);
                let body = bench.value(None, Some(&[Cell::Text(b"1"), Cell::Unchanged])).unwrap();
                assert_eq!(bench.friendly(&body)["after"], json!({"id": 1}), "{}", column_type.name);
            }
        }
    }
}

#[test]
fn a_value_that_cannot_be_encoded_is_named_with_its_place() {
    let bench = Bench::new(&table(vec![id(), column("n", base("numeric"))]), settings());
    let refused = |text: &str| bench.value(None, Some(&[Cell::Text(b"1"), Cell::Text(text.as_bytes())])).unwrap_err();
    let message = refused("twelve").to_string();
    assert!(
        message.starts_with("public.things.n: cannot encode 'twelve' as io.debezium.data.VariableScaleDecimal"),
        "{message}"
    );
    assert!(refused("NaN").to_string().contains("hint: set decimal.handling.mode to string"));
    assert!(refused(&"x".repeat(5000)).to_string().len() < 600);
    let narrow = bench.value(None, Some(&[Cell::Text(b"1")])).unwrap_err();
    assert_eq!(narrow.to_string(), "public.things: the row has 1 columns, the table as known has 2");
}

#[test]
fn null_is_refused_after_and_filled_before_where_the_schema_has_none() {
    let required = |name: &str, type_name: &str| Column { nullable: false, ..column(name, base(type_name)) };
    let with_default = Column { default_expression: Some("'new'::text".into()), ..required("state", "text") };
    let bench =
        Bench::new(&table(vec![id(), required("n", "int4"), with_default, required("at", "timestamptz")]), settings());
    let row = [Cell::Text(b"1"), Cell::Null, Cell::Null, Cell::Null];
    match bench.value(None, Some(&row)).unwrap_err() {
        AvroError::NullInRequired { column, index, .. } => assert_eq!((column.as_str(), index), ("n", 1)),
        other => panic!("{other}"),
    }
    let event = bench.friendly(&bench.value(Some(&row), None).unwrap());
    assert_eq!(event["before"], json!({"id": 1, "n": 0, "state": "new", "at": "1970-01-01T00:00:00Z"}));
}

#[test]
fn null_in_a_nullable_column_with_a_default_is_null() {
    let with_default = Column { default_expression: Some("7".into()), ..column("n", base("int4")) };
    let bench = Bench::new(&table(vec![id(), with_default]), settings());
    let event =
        |cell| bench.friendly(&bench.value(None, Some(&[Cell::Text(b"1"), cell])).unwrap())["after"]["n"].clone();
    assert_eq!((event(Cell::Null), event(Cell::Text(b"3"))), (Value::Null, json!(3)));
}

#[test]
fn a_key_is_written_in_the_index_order_and_as_json_for_headers() {
    let columns = vec![id(), Column { nullable: false, ..column("day", base("date")) }, column("v", base("text"))];
    let bench = Bench::new(&Table { key: vec![1, 0], ..table(columns) }, settings());
    let row = [Cell::Text(b"5"), Cell::Text(b"2026-07-04"), Cell::Null];
    let (mut key, mut json) = (Vec::new(), Vec::new());
    bench.plan.write_key(&row, &mut key).unwrap();
    bench.plan.write_key_json(&row, &mut json).unwrap();
    let decoder = Decoder::compile(bench.schemas.key.as_ref().unwrap()).unwrap();
    assert_eq!(decoder.decode(split_wire(&key).unwrap().1).unwrap().to_string(), r#"{"day":"2026-07-04","id":5}"#);
    assert_eq!(String::from_utf8(json.clone()).unwrap(), r#"{"day":20638,"id":5}"#);
    let friendly = decoder.friendly_from_raw(serde_json::from_slice(&json).unwrap());
    assert_eq!(friendly, json!({"day": "2026-07-04", "id": 5}));
    let moved = [Cell::Text(b"5"), Cell::Text(b"2026-07-05"), Cell::Null];
    let touched = [Cell::Text(b"5"), Cell::Text(b"2026-07-04"), Cell::Text(b"x")];
    assert!(!bench.plan.same_key(&row, &moved) && bench.plan.same_key(&row, &touched));
}

#[test]
fn a_truncate_has_neither_row() {
    let bench = Bench::new(&table(vec![id()]), settings());
    let event = bench.friendly(&bench.value(None, None).unwrap());
    assert_eq!((&event["before"], &event["after"]), (&Value::Null, &Value::Null));
}

#[test]
fn names_that_avro_forbids_are_adjusted_and_told() {
    let columns = vec![id(), column("col with space", base("text")), column("1digit", base("int4"))];
    let weird = Table { name: "T Weird-Näme".into(), ..table(columns) };
    let bench = Bench::new(&weird, settings());
    let event =
        bench.friendly(&bench.value(None, Some(&[Cell::Text(b"1"), Cell::Text(b"x"), Cell::Text(b"2")])).unwrap());
    assert_eq!(event["after"], json!({"id": 1, "col_with_space": "x", "_1digit": 2}));
    assert_eq!(event["source"]["table"], "T Weird-Näme");
    assert_eq!(bench.schemas.notes.len(), 3, "{:?}", bench.schemas.notes);
    assert!(Schema::parse_str(&bench.schemas.value).is_ok());
}

#[test]
fn every_mode_gives_a_valid_schema_and_readable_values() {
    let texts = [
        ("numeric", "1.50"),
        ("money", "-$1,234.56"),
        ("date", "0044-03-15 BC"),
        ("time", "12:34:56.5"),
        ("timestamp", "infinity"),
        ("timestamptz", "2026-07-04 12:00:00+00"),
        ("interval", "1 mon -00:00:01"),
        ("hstore", "\"a\"=>\"1\", \"b\"=>NULL"),
        ("bytea", "\\xfbff"),
        ("circle", "<(1,2),3>"),
        ("box", "(1,1),(0,0)"),
        ("path", "[(0,0),(1,1)]"),
        ("geometry", "0101000020E6100000000000000000F03F000000000000F03F"),
        ("vector", "[1,2.5]"),
        ("bit", "1"),
        ("varbit", "0101"),
        ("tsquery", "'fat' & 'cat'"),
    ];
    let mut columns = vec![id()];
    columns.extend(texts.iter().map(|(name, _)| column(name, base(name))));
    let mut row = vec![Cell::Text(b"1")];
    row.extend(texts.iter().map(|(_, text)| Cell::Text(text.as_bytes())));
    let decimal =
        DecimalMode::NAMES.iter().map(|name| EncodingSettings { decimal: name.parse().unwrap(), ..settings() });
    let time = TimeMode::NAMES.iter().map(|name| EncodingSettings { time: name.parse().unwrap(), ..settings() });
    let binary = BinaryMode::NAMES.iter().map(|name| EncodingSettings { binary: name.parse().unwrap(), ..settings() });
    let others = [
        EncodingSettings { hstore: HstoreMode::Map, ..settings() },
        EncodingSettings { interval: IntervalMode::String, ..settings() },
        EncodingSettings { money_fraction_digits: 0, ..settings() },
    ];
    let mut shown = Vec::new();
    for settings in decimal.chain(time).chain(binary).chain(others) {
        let bench = Bench::new(&table(columns.clone()), settings);
        let body = bench.value(Some(&row), Some(&row)).unwrap();
        bench.generic(&body);
        shown.push(bench.friendly(&body)["after"].clone());
    }
    let column = |name: &str| shown.iter().map(|row| row[name].to_string()).collect::<std::collections::BTreeSet<_>>();
    let set = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(column("numeric"), set(&["1.5", "\"1.50\""]));
    assert_eq!(column("money"), set(&["-1234.56", "\"-1234.56\"", "-1235"]));
    assert_eq!(column("date"), set(&["\"-0043-03-15\"", "\"-0043-03-15Z\""]));
    assert_eq!(column("time"), set(&["\"12:34:56.5\"", "\"12:34:56.5Z\""]));
    assert_eq!(column("timestamp"), set(&["\"infinity\""]));
    assert_eq!(column("interval"), set(&["\"PT730H29M59S\"", "\"P0Y1M0DT0H0M-1S\""]));
    assert_eq!(column("hstore"), set(&["{\"a\":\"1\",\"b\":null}"]));
    assert_eq!(column("bytea"), set(&["\"+/8=\"", "\"-_8=\"", "\"fbff\""]));
    assert_eq!(column("tsquery"), set(&["\"'fat' & 'cat'\""]));
    assert_eq!(shown[0]["geometry"]["srid"], 4326);
}

#[test]
fn schemas_that_are_not_avro_are_refused() {
    for text in
        ["", "{}", "\"nosuch\"", "{\"type\":\"array\"}", "{\"type\":\"record\",\"name\":\"a\"}", "7", "[[[[1]]]]"]
    {
        assert!(matches!(Decoder::compile(text), Err(AvroError::Schema(_))), "{text}");
    }
    let deep = format!("{}\"int\"{}", "{\"type\":\"array\",\"items\":".repeat(100), "}".repeat(100));
    assert!(Decoder::compile(&deep).is_err());
    // A record that holds itself is Avro; bytes cannot make it nest without end.
    let list = r#"{"type":"record","name":"List","fields":[{"name":"next","type":["null","List"]}]}"#;
    let decoder = Decoder::compile(list).unwrap();
    assert_eq!(decoder.decode(&[2, 2, 0]).unwrap(), json!({"next": {"next": {"next": null}}}));
    assert!(decoder.decode(&[2; 10_000]).is_err());
    // Items without bytes cannot ask for more than the body is worth.
    let nulls = Decoder::compile(r#"{"type":"array","items":"null"}"#).unwrap();
    let mut huge = Vec::new();
    wire::put_long(&mut huge, i64::MAX);
    huge.push(0);
    assert!(nulls.decode(&huge).is_err());
}
