//! Schemas as Confluent's converter writes Debezium's: same attributes, same order, same text.
//!
//! A named type is written out where it first stands and named from then on; a namespace is written only where it
//! differs from the one around it, as Avro's Java library does.

use std::fmt::Write;

use serde_json::Value;

use super::encoding::Encoding;
use super::names::{avro_namespace, distinct_avro_names};
use super::{AvroError, EncodingSettings, defaults, resolve};
use crate::event::{Column, Table};

/// What to register for a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableSchemas {
    /// For `<topic>-key`; `None` for a table without a key.
    pub key: Option<String>,
    /// For `<topic>-value`.
    pub value: String,
    /// Names that Avro forbids and what they became, a sentence each; to be told to the user once.
    pub notes: Vec<String>,
}

/// The schemas of `table`'s events.
pub fn schemas(table: &Table, settings: &EncodingSettings) -> Result<TableSchemas, AvroError> {
    let columns = columns(table, settings);
    let namespace = table_namespace(table, settings);
    let key_fields: Vec<Field> = table.key.iter().filter_map(|&at| columns.get(at)).map(Resolved::field).collect();
    let key = (!key_fields.is_empty()).then(|| {
        let annotations = Annotations { version: None, ..Annotations::connect(&format!("{namespace}.Key")) };
        render(&Avro::Record(Record {
            namespace: namespace.clone(),
            name: "Key".into(),
            fields: key_fields,
            annotations,
        }))
    });
    let row = Record {
        namespace: namespace.clone(),
        name: "Value".into(),
        fields: columns.iter().filter(|column| !column.left_out).map(Resolved::field).collect(),
        annotations: Annotations { version: None, ..Annotations::connect(&format!("{namespace}.Value")) },
    };
    let value = render(&Avro::Record(envelope(&namespace, row)));
    Ok(TableSchemas { key, value, notes: notes(table, settings, &columns) })
}

/// `<prefix>.<schema>.<table>` as Avro allows it.
pub(super) fn table_namespace(table: &Table, settings: &EncodingSettings) -> String {
    avro_namespace(&format!("{}.{}.{}", settings.prefix, table.schema, table.name))
}

/// A column with all that schema and plan need to know of it.
pub(super) struct Resolved<'a> {
    pub column: &'a Column,
    pub avro_name: String,
    pub encoding: Encoding,
    pub default: Option<defaults::Default>,
    /// Not in values, by the settings' lists.
    pub left_out: bool,
}

impl Resolved<'_> {
    fn field(&self) -> Field {
        Field {
            name: self.avro_name.clone(),
            avro: self.encoding.avro(),
            nullable: self.column.nullable,
            default: self.default.as_ref().map(|default| default.json.clone()),
        }
    }
}

/// The table's columns with their encodings, and with names that Avro allows.
pub(super) fn columns<'a>(table: &'a Table, settings: &EncodingSettings) -> Vec<Resolved<'a>> {
    let names = distinct_avro_names(table.columns.iter().map(|column| column.name.as_str()));
    let resolve = |(column, avro_name): (&'a Column, String)| {
        let encoding = resolve::encoding(&column.column_type, column.type_modifier, settings);
        let default = defaults::default(column, &encoding);
        let left_out = settings.columns.leave_out(&table.schema, &table.name, &column.name);
        Resolved { column, avro_name, encoding, default, left_out }
    };
    table.columns.iter().zip(names).map(resolve).collect()
}

fn notes(table: &Table, settings: &EncodingSettings, columns: &[Resolved<'_>]) -> Vec<String> {
    let full_name = format!("{}.{}.{}", settings.prefix, table.schema, table.name);
    let namespace = table_namespace(table, settings);
    let table_note = (namespace != full_name)
        .then(|| format!("{full_name} is not a name that Avro allows; its schemas are called {namespace}"));
    let renamed = columns.iter().filter(|column| column.avro_name != column.column.name);
    let column_notes = renamed.map(|column| {
        let (name, avro_name) = (&column.column.name, &column.avro_name);
        format!("{}: column \"{name}\" is not a name that Avro allows; events call it {avro_name}", table.full_name())
    });
    table_note.into_iter().chain(column_notes).collect()
}

fn envelope(namespace: &str, row: Record) -> Record {
    let row_reference = Avro::Record(Record { fields: Vec::new(), ..row.clone() });
    let fields = vec![
        Field::nullable("before", Avro::Record(row)),
        Field::nullable("after", row_reference),
        Field::required("source", source()),
        Field::nullable("transaction", transaction_block()),
        Field::required("op", Avro::Plain("string")),
        Field::nullable("ts_ms", Avro::Plain("long")),
        Field::nullable("ts_us", Avro::Plain("long")),
        Field::nullable("ts_ns", Avro::Plain("long")),
    ];
    let annotations = Annotations { version: Some(2), ..Annotations::connect(&format!("{namespace}.Envelope")) };
    Record { namespace: namespace.to_owned(), name: "Envelope".into(), fields, annotations }
}

pub(super) const POSTGRESQL_NAMESPACE: &str = "io.debezium.connector.postgresql";

/// The `source` record.
pub(super) fn source() -> Avro {
    let string = || Avro::Plain("string");
    let long = || Avro::Plain("long");
    let snapshot = Avro::With(
        "string",
        Annotations::connect("io.debezium.data.Enum").parameter(
            "allowed",
            "true,first,first_in_data_collection,last_in_data_collection,last,false,incremental".into(),
        ),
    );
    let fields = vec![
        Field::required("version", string()),
        Field::required("connector", string()),
        Field::required("name", string()),
        Field::required("ts_ms", long()),
        Field { name: "snapshot".into(), avro: snapshot, nullable: true, default: Some("false".into()) },
        Field::required("db", string()),
        Field::nullable("sequence", string()),
        Field::nullable("ts_us", long()),
        Field::nullable("ts_ns", long()),
        Field::required("schema", string()),
        Field::required("table", string()),
        Field::nullable("txId", long()),
        Field::nullable("lsn", long()),
        Field::nullable("xmin", long()),
        Field::nullable("origin", string()),
        Field::nullable("origin_lsn", long()),
    ];
    Avro::Record(Record {
        namespace: POSTGRESQL_NAMESPACE.into(),
        name: "Source".into(),
        fields,
        annotations: Annotations::connect("io.debezium.connector.postgresql.Source"),
    })
}

/// The `transaction` record.
pub(super) fn transaction_block() -> Avro {
    let fields = vec![
        Field::required("id", Avro::Plain("string")),
        Field::required("total_order", Avro::Plain("long")),
        Field::required("data_collection_order", Avro::Plain("long")),
    ];
    let annotations = Annotations::connect("event.block");
    Avro::Record(Record { namespace: "event".into(), name: "block".into(), fields, annotations })
}

/// An Avro type with Connect's annotations.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Avro {
    Plain(&'static str),
    With(&'static str, Annotations),
    Array(Box<Avro>, Annotations),
    Map(Box<Avro>),
    Record(Record),
    /// `["null", T]`, inside arrays and maps.
    Nullable(Box<Avro>),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    pub namespace: String,
    pub name: String,
    pub fields: Vec<Field>,
    pub annotations: Annotations,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Field {
    pub name: String,
    pub avro: Avro,
    pub nullable: bool,
    /// A default that is not null.
    pub default: Option<Value>,
}

impl Field {
    pub fn required(name: &str, avro: Avro) -> Self {
        Field { name: name.into(), avro, nullable: false, default: None }
    }

    pub fn nullable(name: &str, avro: Avro) -> Self {
        Field { name: name.into(), avro, nullable: true, default: None }
    }
}

/// The attributes that Confluent's converter adds to a type.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Annotations {
    /// Scale and precision.
    pub decimal: Option<(u32, u32)>,
    pub doc: Option<&'static str>,
    pub version: Option<u32>,
    pub parameters: Vec<(&'static str, String)>,
    pub name: Option<String>,
    pub connect_type: Option<&'static str>,
    pub logical_type: Option<&'static str>,
}

impl Annotations {
    /// A named type of version 1.
    pub fn connect(name: &str) -> Self {
        Annotations { version: Some(1), name: Some(name.to_owned()), ..Annotations::default() }
    }

    pub fn parameter(mut self, name: &'static str, value: String) -> Self {
        self.parameters.push((name, value));
        self
    }

    pub fn doc(self, doc: &'static str) -> Self {
        Annotations { doc: Some(doc), ..self }
    }
}

/// The schema's JSON text.
pub(super) fn render(avro: &Avro) -> String {
    let mut renderer = Renderer { out: String::new(), written: Vec::new() };
    renderer.avro(avro, None, "");
    renderer.out
}

struct Renderer {
    out: String,
    /// Full names of the records that stand in the text already.
    written: Vec<String>,
}

impl Renderer {
    fn avro(&mut self, avro: &Avro, default: Option<&Value>, namespace: &str) {
        match avro {
            Avro::Plain(kind) if default.is_none() => self.string(kind),
            Avro::Plain(kind) => self.with(kind, &Annotations::default(), default),
            Avro::With(kind, annotations) => self.with(kind, annotations, default),
            Avro::Array(items, annotations) => {
                self.out.push_str(r#"{"type":"array","items":"#);
                self.avro(items, None, namespace);
                self.annotations(annotations, default);
                self.out.push('}');
            }
            Avro::Map(values) => {
                self.out.push_str(r#"{"type":"map","values":"#);
                self.avro(values, None, namespace);
                self.out.push('}');
            }
            Avro::Nullable(inner) => {
                self.out.push_str(r#"["null","#);
                self.avro(inner, None, namespace);
                self.out.push(']');
            }
            Avro::Record(record) => self.record(record, namespace),
        }
    }

    fn with(&mut self, kind: &str, annotations: &Annotations, default: Option<&Value>) {
        self.out.push_str(r#"{"type":"#);
        self.string(kind);
        self.annotations(annotations, default);
        self.out.push('}');
    }

    fn record(&mut self, record: &Record, namespace: &str) {
        let full_name = format!("{}.{}", record.namespace, record.name);
        let inside = record.namespace == namespace;
        if self.written.contains(&full_name) {
            return self.string(if inside { &record.name } else { &full_name });
        }
        self.out.push_str(r#"{"type":"record","name":"#);
        self.string(&record.name);
        if !inside {
            self.attribute("namespace", &record.namespace.as_str().into());
        }
        self.out.push_str(r#","fields":["#);
        self.written.push(full_name);
        for (at, field) in record.fields.iter().enumerate() {
            if at > 0 {
                self.out.push(',');
            }
            self.field(field, &record.namespace);
        }
        self.out.push(']');
        self.annotations(&record.annotations, None);
        self.out.push('}');
    }

    fn field(&mut self, field: &Field, namespace: &str) {
        self.out.push_str(r#"{"name":"#);
        self.string(&field.name);
        self.out.push_str(r#","type":"#);
        let default = field.default.as_ref();
        match (field.nullable, default) {
            (false, _) => self.avro(&field.avro, default, namespace),
            // A union's default is of its first branch.
            (true, Some(_)) => {
                self.out.push('[');
                self.avro(&field.avro, default, namespace);
                self.out.push_str(r#","null"]"#);
            }
            (true, None) => {
                self.out.push_str(r#"["null","#);
                self.avro(&field.avro, None, namespace);
                self.out.push(']');
            }
        }
        if field.nullable || default.is_some() {
            self.attribute("default", default.unwrap_or(&Value::Null));
        }
        self.out.push('}');
    }

    fn annotations(&mut self, annotations: &Annotations, default: Option<&Value>) {
        if let Some((scale, precision)) = annotations.decimal {
            self.attribute("scale", &scale.into());
            self.attribute("precision", &precision.into());
        }
        if let Some(doc) = annotations.doc {
            self.attribute("connect.doc", &doc.into());
        }
        if let Some(version) = annotations.version {
            self.attribute("connect.version", &version.into());
        }
        if !annotations.parameters.is_empty() {
            let parameters = annotations.parameters.iter();
            let map = parameters.map(|(name, value)| ((*name).to_owned(), value.as_str().into())).collect();
            self.attribute("connect.parameters", &Value::Object(map));
        }
        if let Some(default) = default {
            self.attribute("connect.default", default);
        }
        if let Some(name) = &annotations.name {
            self.attribute("connect.name", &name.as_str().into());
        }
        if let Some(connect_type) = annotations.connect_type {
            self.attribute("connect.type", &connect_type.into());
        }
        if let Some(logical_type) = annotations.logical_type {
            self.attribute("logicalType", &logical_type.into());
        }
    }

    fn attribute(&mut self, name: &str, value: &Value) {
        // Writing to a String does not fail.
        let _ = write!(self.out, ",\"{name}\":{value}");
    }

    fn string(&mut self, text: &str) {
        let _ = write!(self.out, "{}", Value::from(text));
    }
}
