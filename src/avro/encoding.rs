//! One column's form: the Avro type it has, and how PostgreSQL's text is written as that type.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};

use super::error::TextError;
use super::schema::{Annotations, Avro, Field, Record};
use super::text::array::{Element, Elements};
use super::text::geometry::{self, Shape};
use super::text::time::{self, Instant, MICROS_PER_DAY};
use super::text::{bits, hstore, number, numeric};
use super::wire::{prefix_with_count, prefix_with_length, put_bytes, put_double, put_float, put_long};
use super::{BinaryMode, DecimalMode, HstoreMode, IntervalMode};

/// What a column's text becomes. The variants carry all that their parsers need to know.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Encoding {
    Boolean,
    /// `bit(1)`
    Bit,
    Bits {
        length: i32,
    },
    Int16,
    Int32,
    Int64,
    Float,
    Double,
    Text(TextKind),
    Enum {
        allowed: String,
    },
    Bytes(BinaryMode),
    Decimal {
        precision: u32,
        scale: u32,
    },
    VariableScaleDecimal,
    Money {
        mode: DecimalMode,
        digits: u32,
    },
    Date(DateForm),
    Time(ClockForm),
    Timestamp(ClockForm),
    ZonedTimestamp {
        digits: u32,
    },
    ZonedTime,
    Interval(IntervalMode),
    Hstore(HstoreMode),
    Point,
    Line,
    Circle,
    Geometry(Shape),
    PostGis {
        geography: bool,
    },
    Vector {
        halves: bool,
    },
    Array {
        element: Box<Encoding>,
        /// Debezium's arrays of enums are the only ones whose items cannot be null.
        nullable_items: bool,
        delimiter: u8,
    },
}

/// Strings by their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TextKind {
    Plain,
    Json,
    Xml,
    Uuid,
    Ltree,
    Tsvector,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DateForm {
    Days,
    ConnectDays,
    Iso,
}

/// The form of a time of day, or of a timestamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClockForm {
    Millis,
    Micros,
    Nanos,
    ConnectMillis,
    Iso,
}

/// Infinite dates as Debezium streams them, days since 1970-01-01.
pub(super) const DATE_INFINITY: i64 = 2_146_033_979;
pub(super) const DATE_NEGATIVE_INFINITY: i64 = -2_147_472_691;
/// Infinite timestamps in milliseconds: the JDBC driver's.
pub(super) const MILLIS_INFINITY: i64 = 9_223_372_036_825_200_000;
pub(super) const MILLIS_NEGATIVE_INFINITY: i64 = -9_223_372_036_832_400_000;

const POINT: &str = "Point";
const GEOMETRY_NAMESPACE: &str = "io.debezium.data.geometry";

impl Encoding {
    /// The Avro type, without null.
    pub fn avro(&self) -> Avro {
        let named = |kind: &'static str, name: &str| Avro::With(kind, Annotations::connect(name));
        match self {
            Encoding::Boolean | Encoding::Bit => Avro::Plain("boolean"),
            Encoding::Bits { length } => {
                let name = Annotations::connect("io.debezium.data.Bits");
                Avro::With("bytes", name.parameter("length", length.to_string()))
            }
            Encoding::Int16 => Avro::With("int", Annotations { connect_type: Some("int16"), ..Annotations::default() }),
            Encoding::Int32 => Avro::Plain("int"),
            Encoding::Int64 => Avro::Plain("long"),
            Encoding::Float => Avro::Plain("float"),
            Encoding::Double => Avro::Plain("double"),
            Encoding::Text(kind) => match kind {
                TextKind::Plain => Avro::Plain("string"),
                TextKind::Json => named("string", "io.debezium.data.Json"),
                TextKind::Xml => named("string", "io.debezium.data.Xml"),
                TextKind::Uuid => named("string", "io.debezium.data.Uuid"),
                TextKind::Ltree => named("string", "io.debezium.data.Ltree"),
                TextKind::Tsvector => named("string", "io.debezium.data.Tsvector"),
            },
            Encoding::Enum { allowed } => {
                let name = Annotations::connect("io.debezium.data.Enum");
                Avro::With("string", name.parameter("allowed", allowed.clone()))
            }
            Encoding::Bytes(BinaryMode::Bytes) => Avro::Plain("bytes"),
            Encoding::Bytes(_) => Avro::Plain("string"),
            Encoding::Decimal { precision, scale } => connect_decimal(*scale, Some(*precision)),
            Encoding::VariableScaleDecimal => Avro::Record(Record {
                namespace: "io.debezium.data".into(),
                name: "VariableScaleDecimal".into(),
                fields: vec![
                    Field::required("scale", Avro::Plain("int")),
                    Field::required("value", Avro::Plain("bytes")),
                ],
                annotations: Annotations::connect("io.debezium.data.VariableScaleDecimal")
                    .doc("Variable scaled decimal"),
            }),
            Encoding::Money { mode, digits } => match mode {
                DecimalMode::Precise => connect_decimal(*digits, None),
                DecimalMode::Double => Avro::Plain("double"),
                DecimalMode::String => Avro::Plain("string"),
            },
            Encoding::Date(form) => match form {
                DateForm::Days => named("int", "io.debezium.time.Date"),
                DateForm::ConnectDays => connect_logical("int", "Date", "date"),
                DateForm::Iso => named("string", "io.debezium.time.IsoDate"),
            },
            Encoding::Time(form) => match form {
                ClockForm::Millis => named("int", "io.debezium.time.Time"),
                ClockForm::Micros => named("long", "io.debezium.time.MicroTime"),
                ClockForm::Nanos => named("long", "io.debezium.time.NanoTime"),
                ClockForm::ConnectMillis => connect_logical("int", "Time", "time-millis"),
                ClockForm::Iso => named("string", "io.debezium.time.IsoTime"),
            },
            Encoding::Timestamp(form) => match form {
                ClockForm::Millis => named("long", "io.debezium.time.Timestamp"),
                ClockForm::Micros => named("long", "io.debezium.time.MicroTimestamp"),
                ClockForm::Nanos => named("long", "io.debezium.time.NanoTimestamp"),
                ClockForm::ConnectMillis => connect_logical("long", "Timestamp", "timestamp-millis"),
                ClockForm::Iso => named("string", "io.debezium.time.IsoTimestamp"),
            },
            Encoding::ZonedTimestamp { .. } => named("string", "io.debezium.time.ZonedTimestamp"),
            Encoding::ZonedTime => named("string", "io.debezium.time.ZonedTime"),
            Encoding::Interval(IntervalMode::Numeric) => named("long", "io.debezium.time.MicroDuration"),
            Encoding::Interval(IntervalMode::String) => named("string", "io.debezium.time.Interval"),
            Encoding::Hstore(HstoreMode::Json) => named("string", "io.debezium.data.Json"),
            Encoding::Hstore(HstoreMode::Map) => Avro::Map(Box::new(Avro::Nullable(Box::new(Avro::Plain("string"))))),
            Encoding::Point => point_record(),
            Encoding::Line => geometric_record(
                "Line",
                1,
                "Geometry (LINE)",
                ["a", "b", "c"].map(|name| Field::required(name, Avro::Plain("double"))).into(),
            ),
            Encoding::Circle => geometric_record(
                "Circle",
                1,
                "Geometry (CIRCLE)",
                vec![Field::required("center", point_record()), Field::required("radius", Avro::Plain("double"))],
            ),
            Encoding::Geometry(_) | Encoding::PostGis { geography: false } => {
                geometric_record("Geometry", 2, "Geometry", wkb_fields())
            }
            Encoding::PostGis { geography: true } => geometric_record("Geography", 2, "Geography", wkb_fields()),
            Encoding::Vector { halves } => {
                let (items, name) = if *halves { ("float", "FloatVector") } else { ("double", "DoubleVector") };
                Avro::Array(Box::new(Avro::Plain(items)), Annotations::connect(&format!("io.debezium.data.{name}")))
            }
            Encoding::Array { element, nullable_items, .. } => {
                let items = element.avro();
                let items = if *nullable_items { Avro::Nullable(Box::new(items)) } else { items };
                Avro::Array(Box::new(items), Annotations::default())
            }
        }
    }

    /// Appends `text` in this form. On an error `out` may hold a part of it.
    pub fn put(&self, text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
        match self {
            Encoding::Boolean => out.push(number::boolean(text)?.into()),
            Encoding::Bit => out.push(bits::single(text)?.into()),
            Encoding::Bits { .. } => put_sized(out, |out| bits::put_little_endian(text, out))?,
            Encoding::Int16 => put_long(out, number::integer(text, i16::MIN.into(), i16::MAX.into())?),
            Encoding::Int32 => put_long(out, number::integer(text, i32::MIN.into(), i32::MAX.into())?),
            Encoding::Int64 => put_long(out, number::integer(text, i64::MIN, i64::MAX)?),
            Encoding::Float => put_float(out, number::float(text)?),
            Encoding::Double => put_double(out, number::double(text)?),
            Encoding::Text(_) | Encoding::Enum { .. } => put_text(text, out)?,
            Encoding::Bytes(mode) => put_binary(*mode, text, out)?,
            Encoding::Decimal { scale, .. } => {
                let decimal = numeric::parse(text)?;
                put_sized(out, |out| decimal.put_unscaled(*scale as usize, out))?;
            }
            Encoding::VariableScaleDecimal => {
                let decimal = numeric::parse(text)?.stripped();
                put_long(out, decimal.fraction.len() as i64);
                put_sized(out, |out| decimal.put_unscaled(decimal.fraction.len(), out))?;
            }
            Encoding::Money { mode, digits } => put_money(*mode, *digits, text, out)?,
            Encoding::Date(form) => put_date(*form, time::date(text)?, out)?,
            Encoding::Time(form) => put_time(*form, time::time(text)?, out),
            Encoding::Timestamp(form) => put_timestamp(*form, time::timestamp(text)?, out),
            Encoding::ZonedTimestamp { digits } => put_zoned_timestamp(*digits, time::timestamp_with_zone(text)?, out),
            Encoding::ZonedTime => {
                let micros = time::time_with_zone(text)?;
                put_sized(out, |out| {
                    time::put_iso_time(micros, None, out);
                    out.push(b'Z');
                    Ok(())
                })?;
            }
            Encoding::Interval(mode) => put_interval(*mode, text, out)?,
            Encoding::Hstore(HstoreMode::Json) => put_sized(out, |out| put_hstore_json(text, out))?,
            Encoding::Hstore(HstoreMode::Map) => put_hstore_map(text, out)?,
            Encoding::Point => {
                let [x, y] = geometry::point(text)?;
                put_point(x, y, out);
            }
            Encoding::Line => {
                for number in geometry::line(text)? {
                    put_double(out, number);
                }
            }
            Encoding::Circle => {
                let [x, y, radius] = geometry::circle(text)?;
                put_point(x, y, out);
                put_double(out, radius);
            }
            Encoding::Geometry(shape) => put_geometry(*shape, text, out)?,
            Encoding::PostGis { .. } => put_postgis(text, out)?,
            Encoding::Vector { halves } => put_vector(*halves, text, out)?,
            Encoding::Array { element, nullable_items, delimiter } => {
                put_array(element, *nullable_items, *delimiter, text, out)?;
            }
        }
        Ok(())
    }

    /// Appends what stands for a value that is not there in a field that cannot be null: columns outside the
    /// replica identity in the `before` of a delete, as Debezium fills them.
    pub fn put_zero(&self, out: &mut Vec<u8>) {
        match self {
            Encoding::Boolean | Encoding::Bit => out.push(0),
            Encoding::Float => put_float(out, 0.0),
            Encoding::Double => put_double(out, 0.0),
            Encoding::Money { mode: DecimalMode::Double, .. } => put_double(out, 0.0),
            Encoding::Money { mode: DecimalMode::String, digits } => {
                put_bytes(out, plain_decimal(0, *digits).as_bytes());
            }
            Encoding::Decimal { .. } | Encoding::Money { mode: DecimalMode::Precise, .. } => put_bytes(out, &[0]),
            Encoding::VariableScaleDecimal => {
                put_long(out, 0);
                put_bytes(out, &[0]);
            }
            Encoding::ZonedTimestamp { .. } | Encoding::Timestamp(ClockForm::Iso) => {
                put_bytes(out, b"1970-01-01T00:00:00Z");
            }
            Encoding::ZonedTime | Encoding::Time(ClockForm::Iso) => put_bytes(out, b"00:00:00Z"),
            Encoding::Date(DateForm::Iso) => put_bytes(out, b"1970-01-01Z"),
            Encoding::Interval(IntervalMode::String) => put_bytes(out, b"P0Y0M0DT0H0M0S"),
            Encoding::Hstore(HstoreMode::Json) => put_bytes(out, b"{}"),
            Encoding::Point => put_point(0.0, 0.0, out),
            Encoding::Line => (0..3).for_each(|_| put_double(out, 0.0)),
            Encoding::Circle => {
                put_point(0.0, 0.0, out);
                put_double(out, 0.0);
            }
            Encoding::Geometry(_) | Encoding::PostGis { .. } => {
                put_bytes(out, &[]);
                out.extend_from_slice(&[0, 0]);
            }
            // Empty bytes, strings, arrays and maps, and the number 0, are all one zero byte.
            Encoding::Bits { .. }
            | Encoding::Int16
            | Encoding::Int32
            | Encoding::Int64
            | Encoding::Text(_)
            | Encoding::Enum { .. }
            | Encoding::Bytes(_)
            | Encoding::Date(_)
            | Encoding::Time(_)
            | Encoding::Timestamp(_)
            | Encoding::Interval(IntervalMode::Numeric)
            | Encoding::Hstore(HstoreMode::Map)
            | Encoding::Vector { .. }
            | Encoding::Array { .. } => out.push(0),
        }
    }

    /// Appends what stands for an unchanged TOAST value; false where the type has no place for it. Strings and
    /// bytes are the placeholder itself, arrays of strings one such element, arrays of numbers its bytes.
    pub fn put_unavailable(&self, placeholder: &str, out: &mut Vec<u8>) -> bool {
        let bytes = placeholder.as_bytes();
        match self {
            Encoding::Text(_) | Encoding::Enum { .. } | Encoding::Interval(IntervalMode::String) => {
                put_bytes(out, bytes)
            }
            Encoding::Bytes(mode) => put_bytes(out, &binary_text(*mode, bytes)),
            Encoding::Bits { .. } | Encoding::Decimal { .. } => put_bytes(out, bytes),
            Encoding::VariableScaleDecimal => {
                put_long(out, 0);
                put_bytes(out, bytes);
            }
            Encoding::Hstore(HstoreMode::Json) => put_bytes(out, bytes),
            Encoding::Hstore(HstoreMode::Map) => {
                put_long(out, 1);
                put_bytes(out, bytes);
                put_long(out, 1);
                put_bytes(out, bytes);
                out.push(0);
            }
            Encoding::Geometry(_) | Encoding::PostGis { .. } => {
                put_bytes(out, bytes);
                out.extend_from_slice(&[0, 0]);
            }
            Encoding::Vector { halves } => {
                put_long(out, bytes.len() as i64);
                for &byte in bytes {
                    if *halves { put_float(out, byte.into()) } else { put_double(out, byte.into()) }
                }
                out.push(0);
            }
            Encoding::Array { element, nullable_items, .. } => {
                return put_unavailable_array(element, *nullable_items, placeholder, out);
            }
            _ => return false,
        }
        true
    }

    /// What the text should have been, for messages.
    pub fn expected(&self) -> Cow<'static, str> {
        match self.avro() {
            Avro::Plain(kind) => kind.into(),
            Avro::With(kind, annotations) => match annotations.name {
                Some(name) => format!("{kind} ({name})").into(),
                None => kind.into(),
            },
            Avro::Record(record) => format!("{}.{}", record.namespace, record.name).into(),
            Avro::Array(..) => "array".into(),
            Avro::Map(_) => "map".into(),
            Avro::Nullable(_) => "nullable".into(),
        }
    }
}

fn connect_decimal(scale: u32, precision: Option<u32>) -> Avro {
    let name = Annotations::connect("org.apache.kafka.connect.data.Decimal").parameter("scale", scale.to_string());
    let name = match precision {
        Some(precision) => name.parameter("connect.decimal.precision", precision.to_string()),
        None => name,
    };
    // 64 is what Confluent's converter takes where no precision is known.
    let decimal = Some((scale, precision.unwrap_or(64)));
    Avro::With("bytes", Annotations { decimal, logical_type: Some("decimal"), ..name })
}

fn connect_logical(kind: &'static str, name: &str, logical_type: &'static str) -> Avro {
    let name = Annotations::connect(&format!("org.apache.kafka.connect.data.{name}"));
    Avro::With(kind, Annotations { logical_type: Some(logical_type), ..name })
}

fn geometric_record(name: &str, version: u32, doc: &'static str, fields: Vec<Field>) -> Avro {
    let annotations = Annotations::connect(&format!("{GEOMETRY_NAMESPACE}.{name}")).doc(doc);
    Avro::Record(Record {
        namespace: GEOMETRY_NAMESPACE.into(),
        name: name.into(),
        fields,
        annotations: Annotations { version: Some(version), ..annotations },
    })
}

fn point_record() -> Avro {
    let fields = vec![
        Field::required("x", Avro::Plain("double")),
        Field::required("y", Avro::Plain("double")),
        Field::nullable("wkb", Avro::Plain("bytes")),
        Field::nullable("srid", Avro::Plain("int")),
    ];
    geometric_record(POINT, 1, "Geometry (POINT)", fields)
}

fn wkb_fields() -> Vec<Field> {
    vec![
        Field::required("wkb", Avro::Plain("bytes")),
        Field::nullable("srid", Avro::Plain("int")),
        Field::nullable("extensions", Avro::Map(Box::new(Avro::Plain("string")))),
    ]
}

/// Appends what `write` appends, with its length in front.
fn put_sized(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>) -> Result<(), TextError>) -> Result<(), TextError> {
    let start = out.len();
    write(out)?;
    prefix_with_length(out, start);
    Ok(())
}

fn put_text(text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    if std::str::from_utf8(text).is_err() {
        return Err(TextError::NoPlace {
            reason: "the text is not valid UTF-8",
            hint: "a database with the encoding SQL_ASCII may hold such text: correct the row, or exclude the column \
                   (column.exclude.list)",
        });
    }
    put_bytes(out, text);
    Ok(())
}

fn binary_text(mode: BinaryMode, bytes: &[u8]) -> Cow<'_, [u8]> {
    match mode {
        BinaryMode::Bytes => bytes.into(),
        BinaryMode::Base64 => STANDARD.encode(bytes).into_bytes().into(),
        BinaryMode::Base64UrlSafe => URL_SAFE.encode(bytes).into_bytes().into(),
        BinaryMode::Hex => bytes.iter().flat_map(|b| [b >> 4, b & 15]).map(hex_digit).collect::<Vec<_>>().into(),
    }
}

fn hex_digit(nibble: u8) -> u8 {
    if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 }
}

fn put_binary(mode: BinaryMode, text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    match mode {
        BinaryMode::Bytes => {
            if let [b'\\', b'x', digits @ ..] = text {
                put_long(out, (digits.len() / 2) as i64);
                return number::hex(digits, out);
            }
            put_sized(out, |out| number::bytea(text, out))
        }
        _ => {
            let mut bytes = Vec::new();
            number::bytea(text, &mut bytes)?;
            put_bytes(out, &binary_text(mode, &bytes));
            Ok(())
        }
    }
}

/// `123456` at scale 2 as `1234.56`.
fn plain_decimal(unscaled: i128, scale: u32) -> String {
    let sign = if unscaled < 0 { "-" } else { "" };
    let digits = format!("{:0>width$}", unscaled.unsigned_abs(), width = scale as usize + 1);
    let (integral, fraction) = digits.split_at(digits.len() - scale as usize);
    if fraction.is_empty() { format!("{sign}{integral}") } else { format!("{sign}{integral}.{fraction}") }
}

fn put_money(mode: DecimalMode, digits: u32, text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    let unscaled = numeric::money(text, digits)?;
    match mode {
        DecimalMode::Precise => put_sized(out, |out| {
            numeric::put_i128(unscaled, out);
            Ok(())
        }),
        DecimalMode::Double => {
            put_double(out, number::double(plain_decimal(unscaled, digits).as_bytes())?);
            Ok(())
        }
        DecimalMode::String => {
            put_bytes(out, plain_decimal(unscaled, digits).as_bytes());
            Ok(())
        }
    }
}

fn put_date(form: DateForm, date: Instant, out: &mut Vec<u8>) -> Result<(), TextError> {
    match (form, date) {
        (DateForm::Iso, Instant::At(days)) => put_sized(out, |out| {
            time::put_iso_date(days, out);
            out.push(b'Z');
            Ok(())
        })?,
        (DateForm::Iso, Instant::Infinity) => put_bytes(out, b"infinity"),
        (DateForm::Iso, Instant::NegativeInfinity) => put_bytes(out, b"-infinity"),
        (_, Instant::At(days)) => {
            let days = i32::try_from(days).map_err(|_| TextError::Malformed("the date is out of range"))?;
            put_long(out, days.into());
        }
        (_, Instant::Infinity) => put_long(out, DATE_INFINITY),
        (_, Instant::NegativeInfinity) => put_long(out, DATE_NEGATIVE_INFINITY),
    }
    Ok(())
}

fn put_time(form: ClockForm, micros: i64, out: &mut Vec<u8>) {
    match form {
        ClockForm::Millis | ClockForm::ConnectMillis => put_long(out, micros / 1000),
        ClockForm::Micros => put_long(out, micros),
        ClockForm::Nanos => put_long(out, micros * 1000),
        ClockForm::Iso => {
            let start = out.len();
            time::put_iso_time(micros, None, out);
            out.push(b'Z');
            prefix_with_length(out, start);
        }
    }
}

fn put_timestamp(form: ClockForm, instant: Instant, out: &mut Vec<u8>) {
    let millis = matches!(form, ClockForm::Millis | ClockForm::ConnectMillis);
    match (form, instant) {
        (ClockForm::Iso, Instant::At(micros)) => {
            let start = out.len();
            time::put_iso_timestamp(micros, None, out);
            out.push(b'Z');
            prefix_with_length(out, start);
        }
        (ClockForm::Iso, Instant::Infinity) => put_bytes(out, b"infinity"),
        (ClockForm::Iso, Instant::NegativeInfinity) => put_bytes(out, b"-infinity"),
        (_, Instant::Infinity) => put_long(out, if millis { MILLIS_INFINITY } else { i64::MAX }),
        (_, Instant::NegativeInfinity) => put_long(out, if millis { MILLIS_NEGATIVE_INFINITY } else { i64::MIN }),
        (ClockForm::Nanos, Instant::At(micros)) => put_long(out, micros.saturating_mul(1000)),
        (_, Instant::At(micros)) => put_long(out, if millis { micros.div_euclid(1000) } else { micros }),
    }
}

fn put_zoned_timestamp(digits: u32, instant: Instant, out: &mut Vec<u8>) {
    match instant {
        Instant::Infinity => put_bytes(out, b"infinity"),
        Instant::NegativeInfinity => put_bytes(out, b"-infinity"),
        Instant::At(micros) => {
            let start = out.len();
            time::put_iso_timestamp(micros, Some(digits), out);
            out.push(b'Z');
            prefix_with_length(out, start);
        }
    }
}

fn put_interval(mode: IntervalMode, text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    match (mode, text) {
        // From PostgreSQL 17 on; as what is too long to be counted.
        (IntervalMode::Numeric, b"infinity") => put_long(out, i64::MAX),
        (IntervalMode::Numeric, b"-infinity") => put_long(out, i64::MIN),
        (IntervalMode::Numeric, _) => put_long(out, time::interval(text)?.saturating_micros()),
        (IntervalMode::String, b"infinity" | b"-infinity") => put_bytes(out, text),
        (IntervalMode::String, _) => {
            let interval = time::interval(text)?;
            put_sized(out, |out| {
                interval.put_iso(out);
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn put_hstore_json(text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    let put_string = |bytes: &[u8], out: &mut Vec<u8>| -> Result<(), TextError> {
        let text = std::str::from_utf8(bytes).map_err(|_| TextError::Malformed("the hstore is not valid UTF-8"))?;
        serde_json::to_writer(out, text).map_err(|_| TextError::Malformed("the hstore cannot be shown as JSON"))
    };
    out.push(b'{');
    let mut first = true;
    hstore::pairs(text, |key, value| {
        if !std::mem::take(&mut first) {
            out.push(b',');
        }
        put_string(key, out)?;
        out.push(b':');
        match value {
            Some(value) => put_string(value, out),
            None => {
                out.extend_from_slice(b"null");
                Ok(())
            }
        }
    })?;
    out.push(b'}');
    Ok(())
}

fn put_hstore_map(text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    let start = out.len();
    let mut count = 0;
    hstore::pairs(text, |key, value| {
        count += 1;
        put_text(key, out)?;
        match value {
            Some(value) => {
                put_long(out, 1);
                put_text(value, out)
            }
            None => {
                put_long(out, 0);
                Ok(())
            }
        }
    })?;
    prefix_with_count(out, start, count);
    Ok(())
}

fn put_point(x: f64, y: f64, out: &mut Vec<u8>) {
    put_double(out, x);
    put_double(out, y);
    put_long(out, 1);
    put_long(out, 21);
    geometry::put_wkb_point(x, y, out);
    // No SRID.
    out.push(0);
}

fn put_geometry(shape: Shape, text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    put_sized(out, |out| geometry::put_wkb(shape, text, out))?;
    out.push(0);
    let closed = if geometry::path_is_closed(text) { "true" } else { "false" };
    let extensions: &[(&str, &str)] = match shape {
        Shape::Lseg => &[("type", "lseg")],
        Shape::Box => &[("type", "box")],
        Shape::Path => &[("closed", closed), ("type", "path")],
        Shape::Polygon => &[("type", "polygon")],
    };
    put_long(out, 1);
    put_long(out, extensions.len() as i64);
    for (name, value) in extensions {
        put_bytes(out, name.as_bytes());
        put_bytes(out, value.as_bytes());
    }
    out.push(0);
    Ok(())
}

fn put_postgis(text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    let start = out.len();
    number::hex(text, out)?;
    let srid = geometry::ewkb_srid(&out[start..]);
    prefix_with_length(out, start);
    match srid {
        Some(srid) => {
            put_long(out, 1);
            put_long(out, srid.into());
        }
        None => out.push(0),
    }
    out.push(0);
    Ok(())
}

fn put_vector(halves: bool, text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    let body = text.strip_prefix(b"[").and_then(|text| text.strip_suffix(b"]"));
    let body = body.ok_or(TextError::Malformed("not a vector"))?;
    let start = out.len();
    let mut count = 0;
    for number in body.split(|&b| b == b',').filter(|_| !body.is_empty()) {
        count += 1;
        if halves { put_float(out, number::float(number)?) } else { put_double(out, number::double(number)?) }
    }
    prefix_with_count(out, start, count);
    Ok(())
}

fn put_array(
    element: &Encoding,
    nullable_items: bool,
    delimiter: u8,
    text: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), TextError> {
    let mut scratch = Vec::new();
    let mut elements = Elements::new(text, delimiter, &mut scratch)?;
    let start = out.len();
    let mut count = 0;
    while let Some(item) = elements.next()? {
        count += 1;
        match item {
            Element::Text(text) => {
                if nullable_items {
                    put_long(out, 1);
                }
                element.put(text, out)?;
            }
            Element::Null if nullable_items => put_long(out, 0),
            Element::Null => {
                return Err(TextError::NoPlace {
                    reason: "Debezium's schema has no null in arrays of an enum",
                    hint: "replace the NULL element, or exclude the column (column.exclude.list)",
                });
            }
        }
    }
    prefix_with_count(out, start, count);
    Ok(())
}

/// Of numbers the placeholder's bytes, of booleans its bits, of points (and what begins with one) its bytes as x; of
/// anything else the placeholder itself.
fn put_unavailable_array(element: &Encoding, nullable_items: bool, placeholder: &str, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let bytes = placeholder.as_bytes();
    let mut items = |count: usize, put: &mut dyn FnMut(usize, &mut Vec<u8>) -> bool| {
        put_long(out, count as i64);
        for at in 0..count {
            if nullable_items {
                put_long(out, 1);
            }
            if !put(at, out) {
                out.truncate(start);
                return false;
            }
        }
        out.push(0);
        true
    };
    let number = |put: fn(u8, &mut Vec<u8>)| {
        move |at: usize, out: &mut Vec<u8>| {
            put(bytes[at], out);
            true
        }
    };
    match element {
        Encoding::Boolean | Encoding::Bit => items(bytes.len() * 8, &mut |at, out| {
            out.push(bytes[at / 8] >> (7 - at % 8) & 1);
            true
        }),
        Encoding::Float => items(bytes.len(), &mut number(|byte, out| put_float(out, byte.into()))),
        Encoding::Double | Encoding::Money { mode: DecimalMode::Double, .. } => {
            items(bytes.len(), &mut number(|byte, out| put_double(out, byte.into())))
        }
        Encoding::Int16
        | Encoding::Int32
        | Encoding::Int64
        | Encoding::Date(DateForm::Days | DateForm::ConnectDays)
        | Encoding::Time(ClockForm::Millis | ClockForm::Micros | ClockForm::Nanos | ClockForm::ConnectMillis)
        | Encoding::Timestamp(ClockForm::Millis | ClockForm::Micros | ClockForm::Nanos | ClockForm::ConnectMillis)
        | Encoding::Interval(IntervalMode::Numeric) => {
            items(bytes.len(), &mut number(|byte, out| put_long(out, byte.into())))
        }
        Encoding::Point => items(bytes.len(), &mut number(|byte, out| put_point(byte.into(), 0.0, out))),
        Encoding::Line => items(
            bytes.len(),
            &mut number(|byte, out| {
                [byte.into(), 0.0, 0.0].into_iter().for_each(|part| put_double(out, part));
            }),
        ),
        Encoding::Circle => items(
            bytes.len(),
            &mut number(|byte, out| {
                put_point(byte.into(), 0.0, out);
                put_double(out, 0.0);
            }),
        ),
        Encoding::Date(_)
        | Encoding::Time(_)
        | Encoding::Timestamp(_)
        | Encoding::ZonedTime
        | Encoding::ZonedTimestamp { .. }
        | Encoding::Money { .. } => items(1, &mut |_, out| {
            put_bytes(out, bytes);
            true
        }),
        _ => items(1, &mut |_, out| element.put_unavailable(placeholder, out)),
    }
}

/// Days that a friendly form shows as infinite.
pub(super) fn date_from_days(days: i64) -> Instant {
    match days {
        DATE_INFINITY => Instant::Infinity,
        DATE_NEGATIVE_INFINITY => Instant::NegativeInfinity,
        days => Instant::At(days),
    }
}

/// Microseconds out of a timestamp's milliseconds or microseconds, infinities told apart.
pub(super) fn instant_from_millis(millis: i64) -> Instant {
    match millis {
        MILLIS_INFINITY => Instant::Infinity,
        MILLIS_NEGATIVE_INFINITY => Instant::NegativeInfinity,
        millis => millis
            .checked_mul(1000)
            .map_or(if millis < 0 { Instant::NegativeInfinity } else { Instant::Infinity }, Instant::At),
    }
}

/// As [`instant_from_millis`].
pub(super) fn instant_from_micros(micros: i64) -> Instant {
    match micros {
        i64::MAX => Instant::Infinity,
        i64::MIN => Instant::NegativeInfinity,
        micros => Instant::At(micros),
    }
}

/// A whole day, for times of day.
pub(super) const DAY_MICROS: i64 = MICROS_PER_DAY;
