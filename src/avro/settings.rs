//! What a user may choose about the form of events. Names and meanings are Debezium's.

use std::str::FromStr;

use regex::Regex;

/// Stands in an event for a TOAST value that the WAL did not carry because it did not change.
pub const UNAVAILABLE_VALUE: &str = "__debezium_unavailable_value";

/// Settings that decide what schemas and events look like; the capture reads them from its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodingSettings {
    /// `topic.prefix`: first part of schema names and topics, and `source.name`.
    pub prefix: String,
    /// Database name, `source.db`.
    pub database: String,
    /// `decimal.handling.mode`
    pub decimal: DecimalMode,
    /// `time.precision.mode`
    pub time: TimeMode,
    /// `binary.handling.mode`
    pub binary: BinaryMode,
    /// `hstore.handling.mode`
    pub hstore: HstoreMode,
    /// `interval.handling.mode`
    pub interval: IntervalMode,
    /// `money.fraction.digits`
    pub money_fraction_digits: u32,
    /// `tombstones.on.delete`: whether the capture follows a delete with a null value.
    pub tombstones_on_delete: bool,
    /// `unavailable.value.placeholder`
    pub unavailable_value: String,
    /// `column.include.list`, `column.exclude.list`
    pub columns: ColumnLists,
}

/// Which columns values have: expressions that match all of `schema.table.column`. Keys have theirs in any case.
#[derive(Clone, Debug, Default)]
pub struct ColumnLists {
    /// Only these, where there are any.
    pub include: Vec<Regex>,
    pub exclude: Vec<Regex>,
}

impl PartialEq for ColumnLists {
    fn eq(&self, other: &Self) -> bool {
        let same = |one: &[Regex], other: &[Regex]| one.iter().map(Regex::as_str).eq(other.iter().map(Regex::as_str));
        same(&self.include, &other.include) && same(&self.exclude, &other.exclude)
    }
}

impl Eq for ColumnLists {}

impl ColumnLists {
    pub fn leave_out(&self, schema: &str, table: &str, column: &str) -> bool {
        if self.include.is_empty() && self.exclude.is_empty() {
            return false;
        }
        let full = format!("{schema}.{table}.{column}");
        let any = |list: &[Regex]| list.iter().any(|pattern| pattern.is_match(&full));
        any(&self.exclude) || !(self.include.is_empty() || any(&self.include))
    }
}

impl EncodingSettings {
    /// Debezium's defaults.
    pub fn new(prefix: impl Into<String>, database: impl Into<String>) -> Self {
        EncodingSettings {
            prefix: prefix.into(),
            database: database.into(),
            decimal: DecimalMode::Precise,
            time: TimeMode::Adaptive,
            binary: BinaryMode::Bytes,
            hstore: HstoreMode::Json,
            interval: IntervalMode::Numeric,
            money_fraction_digits: 2,
            tombstones_on_delete: true,
            unavailable_value: UNAVAILABLE_VALUE.to_owned(),
            columns: ColumnLists::default(),
        }
    }
}

/// A mode by its Debezium name; the error lists the names there are.
macro_rules! mode {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }

        impl $name {
            /// Every name that may be written in a file.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok($name::$variant),)+
                    _ => Err(format!("'{text}' is none of {}", Self::NAMES.join(", "))),
                }
            }
        }
    };
}

mode! {
    /// How `numeric` and `money` appear.
    DecimalMode {
        /// Connect `Decimal`, or `VariableScaleDecimal` where the column has no scale.
        Precise = "precise",
        Double = "double",
        String = "string",
    }
}

mode! {
    /// How `date`, `time` and `timestamp` appear.
    TimeMode {
        /// Milliseconds up to precision 3, else microseconds.
        Adaptive = "adaptive",
        /// As adaptive, `time` always in microseconds.
        AdaptiveTimeMicroseconds = "adaptive_time_microseconds",
        /// Kafka Connect's own types, always milliseconds.
        Connect = "connect",
        /// ISO 8601 text in UTC.
        IsoString = "isostring",
        Microseconds = "microseconds",
        Nanoseconds = "nanoseconds",
    }
}

mode! {
    /// How `bytea` appears.
    BinaryMode { Bytes = "bytes", Base64 = "base64", Base64UrlSafe = "base64-url-safe", Hex = "hex" }
}

mode! {
    /// How `hstore` appears.
    HstoreMode { Json = "json", Map = "map" }
}

mode! {
    /// How `interval` appears.
    IntervalMode {
        /// Microseconds, a month being 365.25 / 12 days.
        Numeric = "numeric",
        /// ISO 8601 duration.
        String = "string",
    }
}
