//! From a column as the catalog has it to its encoding. Decided by the type's name, as Debezium decides.

use super::encoding::{ClockForm, DateForm, Encoding, TextKind};
use super::text::geometry::Shape;
use super::{DecimalMode, EncodingSettings, TimeMode};
use crate::event::{ColumnType, TypeKind};

/// The encoding of a column of `column_type`. Every type has one: what is not known is PostgreSQL's text.
pub(super) fn encoding(column_type: &ColumnType, type_modifier: i32, settings: &EncodingSettings) -> Encoding {
    match &column_type.kind {
        TypeKind::Domain { base, type_modifier: own } => {
            encoding(base, if type_modifier == -1 { *own } else { type_modifier }, settings)
        }
        TypeKind::Enum { labels } => Encoding::Enum { allowed: labels.join(",") },
        TypeKind::Array { element } => {
            let delimiter = delimiter(element);
            let nullable_items = !is_enum(element);
            let element = Box::new(encoding(element, type_modifier, settings));
            Encoding::Array { element, nullable_items, delimiter }
        }
        TypeKind::Range | TypeKind::Multirange | TypeKind::Composite => Encoding::Text(TextKind::Plain),
        TypeKind::Base => base_encoding(&column_type.name, type_modifier, settings),
    }
}

/// What stands between the elements of an array (`typdelim`): a comma but for these, and domains over them.
fn delimiter(element: &ColumnType) -> u8 {
    match &element.kind {
        TypeKind::Domain { base, .. } => delimiter(base),
        _ => match element.name.as_str() {
            "box" => b';',
            "geometry" | "geography" => b':',
            _ => b',',
        },
    }
}

fn is_enum(column_type: &ColumnType) -> bool {
    matches!(column_type.kind, TypeKind::Enum { .. })
}

fn base_encoding(type_name: &str, type_modifier: i32, settings: &EncodingSettings) -> Encoding {
    // Fraction digits of times, 6 unless the type says otherwise.
    let digits = if (0..=6).contains(&type_modifier) { type_modifier as u32 } else { 6 };
    match type_name {
        "bool" => Encoding::Boolean,
        "int2" => Encoding::Int16,
        "int4" => Encoding::Int32,
        "int8" | "oid" => Encoding::Int64,
        "float4" => Encoding::Float,
        "float8" => Encoding::Double,
        "numeric" => numeric(type_modifier, settings.decimal),
        "money" => Encoding::Money { mode: settings.decimal, digits: settings.money_fraction_digits },
        "json" | "jsonb" => Encoding::Text(TextKind::Json),
        "xml" => Encoding::Text(TextKind::Xml),
        "uuid" => Encoding::Text(TextKind::Uuid),
        "ltree" => Encoding::Text(TextKind::Ltree),
        "tsvector" => Encoding::Text(TextKind::Tsvector),
        "bytea" => Encoding::Bytes(settings.binary),
        "bit" | "varbit" => match (type_name, type_modifier) {
            (_, 1) | ("bit", -1) => Encoding::Bit,
            (_, -1) => Encoding::Bits { length: i32::MAX },
            (_, length) => Encoding::Bits { length },
        },
        "date" => Encoding::Date(match settings.time {
            TimeMode::Connect => DateForm::ConnectDays,
            TimeMode::IsoString => DateForm::Iso,
            _ => DateForm::Days,
        }),
        "time" => Encoding::Time(match settings.time {
            TimeMode::Adaptive if digits <= 3 => ClockForm::Millis,
            mode => clock_form(mode),
        }),
        "timestamp" => Encoding::Timestamp(match settings.time {
            TimeMode::Adaptive | TimeMode::AdaptiveTimeMicroseconds if digits <= 3 => ClockForm::Millis,
            mode => clock_form(mode),
        }),
        "timetz" => Encoding::ZonedTime,
        "timestamptz" => Encoding::ZonedTimestamp { digits },
        "interval" => Encoding::Interval(settings.interval),
        "hstore" => Encoding::Hstore(settings.hstore),
        "point" => Encoding::Point,
        "line" => Encoding::Line,
        "circle" => Encoding::Circle,
        "lseg" => Encoding::Geometry(Shape::Lseg),
        "box" => Encoding::Geometry(Shape::Box),
        "path" => Encoding::Geometry(Shape::Path),
        "polygon" => Encoding::Geometry(Shape::Polygon),
        "geometry" => Encoding::PostGis { geography: false },
        "geography" => Encoding::PostGis { geography: true },
        "vector" => Encoding::Vector { halves: false },
        "halfvec" => Encoding::Vector { halves: true },
        _ => Encoding::Text(TextKind::Plain),
    }
}

fn clock_form(mode: TimeMode) -> ClockForm {
    match mode {
        TimeMode::Adaptive | TimeMode::AdaptiveTimeMicroseconds | TimeMode::Microseconds => ClockForm::Micros,
        TimeMode::Nanoseconds => ClockForm::Nanos,
        TimeMode::Connect => ClockForm::ConnectMillis,
        TimeMode::IsoString => ClockForm::Iso,
    }
}

/// `numeric(p,s)`: the modifier packs precision and an 11-bit signed scale. Avro wants 0 <= scale <= precision,
/// so a negative scale becomes more digits, and a scale beyond the precision widens it.
fn numeric(type_modifier: i32, mode: DecimalMode) -> Encoding {
    match mode {
        DecimalMode::Double => Encoding::Double,
        DecimalMode::String => Encoding::Text(TextKind::Plain),
        DecimalMode::Precise if type_modifier < 4 => Encoding::VariableScaleDecimal,
        DecimalMode::Precise => {
            let packed = type_modifier - 4;
            let precision = packed >> 16 & 0xffff;
            let scale = ((packed & 0x7ff) ^ 1024) - 1024;
            let (precision, scale) = if scale < 0 { (precision - scale, 0) } else { (precision.max(scale), scale) };
            Encoding::Decimal { precision: precision as u32, scale: scale as u32 }
        }
    }
}
