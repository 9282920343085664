//! Nanoseconds to encode a row of 10 columns as a whole change event: the compiled plan beside apache-avro's generic
//! values, in one run. `cargo bench --bench encode`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use apache_avro::Schema;
use apache_avro::types::Value;
use apache_avro::writer::datum::GenericDatumWriter;
use tidegate::avro::{EncodingSettings, EventMeta, SnapshotMarker, TablePlan, TransactionMeta, schemas};
use tidegate::event::{Cell, Column, ColumnType, Lsn, Oid, Operation, ReplicaIdentity, Table, TypeKind};

/// Name, type, modifier and text of each column.
const COLUMNS: [(&str, &str, i32, &str); 10] = [
    ("id", "int8", -1, "1234567"),
    ("customer_id", "int4", -1, "4711"),
    ("number", "text", -1, "SO-2026-0001234"),
    ("state", "varchar", 24, "confirmed"),
    ("total", "numeric", 4 + (12 << 16 | 2), "12345.67"),
    ("weight", "float8", -1, "17.25"),
    ("paid", "bool", -1, "t"),
    ("ordered_at", "timestamp", -1, "2026-07-04 12:34:56.789012"),
    ("updated_at", "timestamptz", -1, "2026-07-04 12:34:56.789012+00"),
    ("note", "text", -1, "please leave at the door; ring twice"),
];

fn table() -> Table {
    let column = |(name, type_name, type_modifier, _): &(&str, &str, i32, &str)| Column {
        name: (*name).into(),
        column_type: ColumnType {
            oid: Oid(0),
            schema: "pg_catalog".into(),
            name: (*type_name).into(),
            kind: TypeKind::Base,
        },
        type_modifier: *type_modifier,
        nullable: *name != "id",
        default_expression: None,
        generated: false,
    };
    Table {
        oid: Oid(1),
        schema: "public".into(),
        name: "orders".into(),
        replica_identity: ReplicaIdentity::Default,
        columns: COLUMNS.iter().map(column).collect(),
        key: vec![0],
    }
}

/// Best of five runs of about 300 ms, in nanoseconds a round.
fn measure(mut round: impl FnMut()) -> f64 {
    let run = |round: &mut dyn FnMut(), target: Duration| {
        let (start, mut rounds) = (Instant::now(), 0u64);
        while start.elapsed() < target {
            (0..1000).for_each(|_| round());
            rounds += 1000;
        }
        start.elapsed().as_nanos() as f64 / rounds as f64
    };
    run(&mut round, Duration::from_millis(100));
    (0..5).map(|_| run(&mut round, Duration::from_millis(300))).fold(f64::INFINITY, f64::min)
}

/// The event as apache-avro wants it, out of the same texts.
fn generic_event(settings: &EncodingSettings, out_ns: i64) -> Value {
    let some = |value| Value::Union(1, Box::new(value));
    let null = || Value::Union(0, Box::new(Value::Null));
    let text = |text: &str| Value::String(text.to_owned());
    let chrono_us = |text: &str| {
        let at = chrono::NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f").expect("a timestamp");
        at.and_utc().timestamp_micros()
    };
    let row = COLUMNS
        .iter()
        .map(|(name, type_name, _, cell)| {
            let value = match *type_name {
                "int8" => Value::Long(cell.parse().expect("a number")),
                "int4" => Value::Int(cell.parse().expect("a number")),
                "float8" => Value::Double(cell.parse().expect("a number")),
                "bool" => Value::Boolean(*cell == "t"),
                "numeric" => {
                    let unscaled: i64 = cell.replace('.', "").parse().expect("a number");
                    Value::Decimal(unscaled.to_be_bytes().into())
                }
                "timestamp" => Value::Long(chrono_us(cell)),
                "timestamptz" => {
                    let at = chrono::DateTime::parse_from_str(cell, "%Y-%m-%d %H:%M:%S%.f%#z").expect("a timestamp");
                    Value::String(at.to_utc().format("%Y-%m-%dT%H:%M:%S%.6fZ").to_string())
                }
                _ => text(cell),
            };
            ((*name).to_owned(), if *name == "id" { value } else { some(value) })
        })
        .collect();
    let source = vec![
        ("version", text("tidegate")),
        ("connector", text("postgresql")),
        ("name", text(&settings.prefix)),
        ("ts_ms", Value::Long(1)),
        ("snapshot", Value::Union(0, Box::new(text("false")))),
        ("db", text(&settings.database)),
        ("sequence", some(text("[\"123456789\",\"123456789\"]"))),
        ("ts_us", some(Value::Long(1))),
        ("ts_ns", some(Value::Long(1))),
        ("schema", text("public")),
        ("table", text("orders")),
        ("txId", some(Value::Long(7))),
        ("lsn", some(Value::Long(123_456_789))),
        ("xmin", null()),
        ("origin", null()),
        ("origin_lsn", null()),
    ];
    let named = |fields: Vec<(&str, Value)>| {
        Value::Record(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    };
    named(vec![
        ("before", null()),
        ("after", some(Value::Record(row))),
        ("source", named(source)),
        ("transaction", null()),
        ("op", text("c")),
        ("ts_ms", some(Value::Long(out_ns / 1_000_000))),
        ("ts_us", some(Value::Long(out_ns / 1000))),
        ("ts_ns", some(Value::Long(out_ns))),
    ])
}

fn main() {
    let (table, settings) = (table(), EncodingSettings::new("shop", "shop"));
    let texts = schemas(&table, &settings).expect("schemas");
    let plan = TablePlan::compile(&table, &settings, Some(1), 2).expect("a plan");
    let cells: Vec<Cell<'_>> = COLUMNS.iter().map(|(.., text)| Cell::Text(text.as_bytes())).collect();
    let transaction = TransactionMeta::new(&settings, 1, Some(7), Some(Lsn(123_456_789)), None);
    let meta = EventMeta {
        transaction: &transaction,
        operation: Operation::Create,
        lsn: Lsn(123_456_789),
        snapshot: SnapshotMarker::False,
        block: None,
        processed_ns: 1_783_168_496_789_012_000,
    };

    let mut out = Vec::with_capacity(1 << 16);
    let planned = measure(|| {
        out.clear();
        plan.write_key(black_box(&cells), &mut out).expect("a key");
        plan.write_value(None, Some(black_box(&cells)), &meta, &mut out).expect("a value");
        black_box(&out);
    });
    let size = out.len();

    let schema = Schema::parse_str(&texts.value).expect("a schema");
    let writer = GenericDatumWriter::builder(&schema).build().expect("a writer");
    let generic = measure(|| {
        out.clear();
        let event = generic_event(black_box(&settings), meta.processed_ns);
        writer.write_value_ref(&mut out, &event).expect("a value");
        black_box(&out);
    });

    println!("encode a row of 10 columns, key and envelope of {size} bytes");
    println!("  compiled plan       {planned:>8.0} ns");
    println!("  apache-avro values  {generic:>8.0} ns   ({:.1} times the plan; no key)", generic / planned);
}
