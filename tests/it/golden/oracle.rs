//! What a real Debezium wrote (tests/golden), and the comparison with it.
//!
//! Both sides are decoded by apache-avro with their own schemas and compared field by field. Clocks, LSNs,
//! transaction ids and the version may differ. Whatever else differs must stand in [`KNOWN`] with its reason, and an
//! entry that no longer differs fails the test as well.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use apache_avro::Schema;
use apache_avro::reader::datum::GenericDatumReader;
use apache_avro::types::Value as Avro;
use serde_json::Value;

/// A difference that is meant.
pub struct Known {
    table: &'static str,
    /// Operations it is seen in; empty: only in the schema.
    operations: &'static [&'static str],
    column: &'static str,
    why: &'static str,
}

const NULL_IS_NULL: &str = "a NULL in a column with a default is null, not the default";
const TEXT_NOT_LEFT_OUT: &str = "a type that Debezium leaves out is PostgreSQL's text";
const STREAM_IS_RIGHT: &str = "the snapshot shows what the stream shows: proleptic dates";
const SNAPSHOT_IS_RIGHT: &str = "the stream shows what the snapshot shows: type name";
const VALID_SCALE: &str = "a negative scale is not valid Avro";
const ALL_ELEMENTS: &str = "a multidimensional array keeps its elements";
const NOT_GENERATED: &str = "generated columns are in no event, as the stream does not carry them";

const fn known(
    table: &'static str,
    operations: &'static [&'static str],
    column: &'static str,
    why: &'static str,
) -> Known {
    Known { table, operations, column, why }
}

/// Every difference that is meant.
pub const KNOWN: &[Known] = &[
    known("t_serial", &["r", "c"], "w", NULL_IS_NULL),
    known("t_serial", &["r", "c"], "n", NULL_IS_NULL),
    known("t_serial", &["r", "c"], "ts", NULL_IS_NULL),
    known("t_time", &["r"], "d", STREAM_IS_RIGHT),
    known("t_text", &["c", "u"], "n", SNAPSHOT_IS_RIGHT),
    known("t_num", &["r", "c", "u"], "nneg", VALID_SCALE),
    known("t_arr", &["r", "c", "u"], "ai2", ALL_ELEMENTS),
    known("t_gen", &["r"], "b", NOT_GENERATED),
    known("t_json", &["r", "c", "u"], "jp", TEXT_NOT_LEFT_OUT),
    known("t_range", &["r", "c"], "mr", TEXT_NOT_LEFT_OUT),
    known("t_misc", &["r", "c"], "tq", TEXT_NOT_LEFT_OUT),
    known("t_misc", &["r", "c"], "lsn", TEXT_NOT_LEFT_OUT),
    known("t_misc", &["r", "c"], "xi", TEXT_NOT_LEFT_OUT),
    known("t_misc", &["r", "c"], "snap", TEXT_NOT_LEFT_OUT),
    known("t_misc", &["r", "c"], "co", TEXT_NOT_LEFT_OUT),
    known("t_misc", &["r", "c"], "rc", TEXT_NOT_LEFT_OUT),
];

const TEXT_NOT_BYTES: &str = "a type that Debezium shows as its text's bytes is PostgreSQL's text";

/// The same for the other handling modes of tests/golden/options.
pub const KNOWN_OF_OPTIONS: &[Known] = &[
    known("t_serial", &["r", "c"], "w", NULL_IS_NULL),
    known("t_serial", &["r", "c"], "n", NULL_IS_NULL),
    known("t_serial", &["r", "c"], "ts", NULL_IS_NULL),
    known("t_time", &["r"], "d", STREAM_IS_RIGHT),
    known("t_num", &["r", "c", "u"], "nneg", VALID_SCALE),
    known("t_arr", &["r", "c", "u"], "ai2", ALL_ELEMENTS),
    known("t_gen", &["r"], "b", NOT_GENERATED),
    known("t_json", &["r", "c", "u"], "jp", TEXT_NOT_BYTES),
    known("t_range", &["r", "c"], "mr", TEXT_NOT_BYTES),
    known("t_misc", &["r", "c"], "tq", TEXT_NOT_BYTES),
    known("t_misc", &["r", "c"], "lsn", TEXT_NOT_BYTES),
    known("t_misc", &["r", "c"], "xi", TEXT_NOT_BYTES),
    known("t_misc", &["r", "c"], "snap", TEXT_NOT_BYTES),
    known("t_misc", &["r", "c"], "co", TEXT_NOT_BYTES),
    known("t_misc", &["r", "c"], "rc", TEXT_NOT_BYTES),
];

/// One event, whoever wrote it.
#[derive(Clone, Debug)]
pub struct Event {
    /// Without the prefix: `g.t_int`, `message`.
    pub topic: String,
    pub key: Option<Datum>,
    /// `None`: a tombstone.
    pub value: Option<Datum>,
    pub headers: Vec<(String, Vec<u8>)>,
}

/// Avro bytes with the schema they were written by.
#[derive(Clone, Debug)]
pub struct Datum {
    pub schema: String,
    pub body: Vec<u8>,
}

impl Datum {
    pub fn decode(&self) -> Avro {
        let schema = Schema::parse_str(&self.schema).unwrap_or_else(|error| panic!("{error}: {}", self.schema));
        let reader = GenericDatumReader::builder(&schema).build();
        let value = reader.and_then(|reader| reader.read_value(&mut &self.body[..]));
        value.unwrap_or_else(|error| panic!("{error}: {}", self.schema))
    }

    /// Paths of the leaves and what is there.
    pub fn flat(&self) -> BTreeMap<String, String> {
        let mut out = BTreeMap::new();
        flatten(&self.decode(), "", &mut out);
        out
    }
}

fn flatten(value: &Avro, path: &str, out: &mut BTreeMap<String, String>) {
    let join = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Avro::Union(_, inner) => flatten(inner, path, out),
        Avro::Record(fields) => fields.iter().for_each(|(name, value)| flatten(value, &join(name), out)),
        Avro::Map(map) => map.iter().for_each(|(name, value)| flatten(value, &join(name), out)),
        Avro::Array(items) => {
            out.insert(join("length"), items.len().to_string());
            items.iter().enumerate().for_each(|(at, item)| flatten(item, &join(&at.to_string()), out));
        }
        leaf => {
            out.insert(path.to_owned(), format!("{leaf:?}"));
        }
    }
}

/// The golden events in the order that each topic has them, and the schemas by subject and version.
pub struct Oracle {
    pub events: Vec<Event>,
    /// `g.t_int-value/v1` to its text.
    pub schemas: BTreeMap<String, String>,
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

impl Oracle {
    /// Of Debezium's defaults.
    pub fn read() -> Oracle {
        Oracle::of("defaults", "golden.")
    }

    /// Of a folder of tests/golden, whose topics begin with `prefix`.
    pub fn of(folder: &str, prefix: &str) -> Oracle {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder);
        let schemas: Value =
            serde_json::from_str(&std::fs::read_to_string(folder.join("schemas.json")).unwrap()).unwrap();
        let schemas = schemas.as_object().unwrap();
        let text_of = |schema: &Value| schema["schema_text"].as_str().unwrap().to_owned();
        let by_id: BTreeMap<u64, String> =
            schemas.values().map(|schema| (schema["id"].as_u64().unwrap(), text_of(schema))).collect();
        let datum = |event: &Value, part: &str| {
            let wire = unhex(event[format!("{part}_hex")].as_str()?);
            let id = event[format!("{part}_schema_id")].as_u64()?;
            Some(Datum { schema: by_id[&id].clone(), body: wire[5..].to_vec() })
        };
        let events = std::fs::read_to_string(folder.join("events.jsonl")).unwrap();
        let events = events.lines().map(|line| {
            let event: Value = serde_json::from_str(line).unwrap();
            let headers = event["headers"].as_array().unwrap().iter();
            Event {
                topic: event["topic"].as_str().unwrap().strip_prefix(prefix).unwrap().to_owned(),
                key: datum(&event, "key"),
                value: datum(&event, "value"),
                headers: headers
                    .map(|pair| (pair[0].as_str().unwrap().to_owned(), unhex(pair[1].as_str().unwrap())))
                    .collect(),
            }
        });
        Oracle {
            events: events.collect(),
            schemas: schemas
                .iter()
                .map(|(name, schema)| (name.strip_prefix(prefix).unwrap_or(name).to_owned(), text_of(schema)))
                .collect(),
        }
    }

    pub fn topic(&self, topic: &str) -> Vec<&Event> {
        self.events.iter().filter(|event| event.topic == topic).collect()
    }
}

/// Collects differences, told from those that are known.
pub struct Comparison {
    known: &'static [Known],
    unknown: Vec<String>,
    /// Indices into `known` that were seen.
    seen: BTreeSet<usize>,
    pub compared: usize,
}

impl Comparison {
    pub fn new(known: &'static [Known]) -> Self {
        Comparison { known, unknown: Vec::new(), seen: BTreeSet::new(), compared: 0 }
    }

    /// Notes a difference in `column` of `table`.
    fn differs(&mut self, table: &str, operation: Option<&str>, column: &str, what: String) {
        let at = self.known.iter().position(|known| {
            known.table == table
                && known.column == column
                && operation.is_none_or(|operation| known.operations.contains(&operation))
        });
        match at {
            Some(at) => {
                self.seen.insert(at);
            }
            None => self.unknown.push(what),
        }
    }

    pub fn keys(&mut self, place: &str, golden: Option<&Datum>, ours: Option<&Datum>) {
        self.compared += 1;
        match (golden, ours) {
            (None, None) => {}
            (Some(golden), Some(ours)) => {
                if golden.schema != ours.schema {
                    self.unknown.push(format!("{place}: key schema\n  {}\n  {}", golden.schema, ours.schema));
                }
                if golden.flat() != ours.flat() {
                    self.unknown.push(format!("{place}: key\n  {:?}\n  {:?}", golden.flat(), ours.flat()));
                }
            }
            _ => self.unknown.push(format!("{place}: one has a key, the other none: {golden:?} {ours:?}")),
        }
    }

    pub fn values(&mut self, place: &str, table: &str, golden: Option<&Datum>, ours: Option<&Datum>) {
        self.compared += 1;
        let (golden, ours) = match (golden, ours) {
            (None, None) => return,
            (Some(golden), Some(ours)) => (golden, ours),
            _ => return self.unknown.push(format!("{place}: one is a tombstone, the other not")),
        };
        self.schemas(place, table, &golden.schema, &ours.schema);
        let (golden, ours) = (golden.flat(), ours.flat());
        let operation = ours.get("op").map(|op| op.trim_start_matches("String(\"").trim_end_matches("\")").to_owned());
        let paths: BTreeSet<&String> = golden.keys().chain(ours.keys()).collect();
        for path in paths {
            if golden.get(path) == ours.get(path) || may_differ(path) {
                continue;
            }
            let column = path.split('.').nth(1).unwrap_or(path);
            let what = format!("{place} {path}: Debezium {:?}, Tidegate {:?}", golden.get(path), ours.get(path));
            self.differs(table, operation.as_deref(), column, what);
        }
    }

    /// The text is to be the same but for known columns.
    pub fn schemas(&mut self, place: &str, table: &str, golden: &str, ours: &str) {
        if golden == ours {
            return;
        }
        let (mut golden_json, mut ours_json): (Value, Value) =
            (serde_json::from_str(golden).unwrap(), serde_json::from_str(ours).unwrap());
        let (golden_columns, ours_columns) = (take_columns(&mut golden_json), take_columns(&mut ours_json));
        // As text: JSON values are equal in any order.
        let (golden_rest, ours_rest) = (golden_json.to_string(), ours_json.to_string());
        if golden_rest != ours_rest {
            self.unknown.push(format!("{place}: schema\n  {golden_rest}\n  {ours_rest}"));
        }
        let names: BTreeSet<&String> = golden_columns.iter().chain(&ours_columns).map(|(name, _)| name).collect();
        let find = |columns: &[(String, String)], name: &str| {
            columns.iter().find(|(column, _)| column == name).map(|(_, schema)| schema.clone())
        };
        for name in names {
            let (golden, ours) = (find(&golden_columns, name), find(&ours_columns, name));
            if golden != ours {
                self.differs(table, None, name, format!("{place}: schema of {name}\n  {golden:?}\n  {ours:?}"));
            }
        }
        let order = |columns: &[(String, String)], others: &[(String, String)]| -> Vec<String> {
            let common = columns.iter().filter(|(name, _)| others.iter().any(|(other, _)| other == name));
            common.map(|(name, _)| name.clone()).collect()
        };
        if order(&golden_columns, &ours_columns) != order(&ours_columns, &golden_columns) {
            self.unknown.push(format!("{place}: the order of the columns"));
        }
    }

    pub fn equal<T: PartialEq + std::fmt::Debug>(&mut self, place: &str, golden: &T, ours: &T) {
        if golden != ours {
            self.unknown.push(format!("{place}\n  {golden:?}\n  {ours:?}"));
        }
    }

    /// Panics with all that is not as it should be.
    pub fn finish(self) {
        let gone: Vec<String> = self
            .known
            .iter()
            .enumerate()
            .filter(|(at, _)| !self.seen.contains(at))
            .map(|(_, known)| format!("{}.{} no longer differs: {}", known.table, known.column, known.why))
            .collect();
        for at in &self.seen {
            let known = &self.known[*at];
            println!("differs as it should: {}.{} ({})", known.table, known.column, known.why);
        }
        let count = self.unknown.len();
        assert!(count == 0, "{count} differences:\n{}", self.unknown[..count.min(40)].join("\n"));
        assert!(gone.is_empty(), "{}", gone.join("\n"));
    }
}

/// The columns of the row in an envelope, taken out of it.
fn take_columns(envelope: &mut Value) -> Vec<(String, String)> {
    let Some(fields) = envelope.pointer_mut("/fields/0/type/1/fields").and_then(Value::as_array_mut) else {
        return Vec::new();
    };
    std::mem::take(fields)
        .into_iter()
        .map(|field| (field["name"].as_str().unwrap().to_owned(), field.to_string()))
        .collect()
}

/// Clocks, LSNs, transaction ids, the version; the database's name is the test's own.
fn may_differ(path: &str) -> bool {
    const FREE: [&str; 11] = [
        "source.version",
        "source.ts_ms",
        "source.ts_us",
        "source.ts_ns",
        "source.lsn",
        "source.txId",
        "source.sequence",
        "source.db",
        "ts_ms",
        "ts_us",
        "ts_ns",
    ];
    // Not written: see docs/debezium-differences.md.
    FREE.contains(&path) || path == "transaction" || path.starts_with("transaction.")
}
