//! What a value means beyond its Avro type, and its friendly form: times as ISO text, decimals as exact numbers,
//! JSON columns as JSON.

use serde_json::{Map, Value};

use super::encoding::{DAY_MICROS, date_from_days, instant_from_micros, instant_from_millis};
use super::text::time::{Instant, Interval, put_iso_date, put_iso_time, put_iso_timestamp};

/// The meaning of a type, out of its `connect.name` or `logicalType`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    Plain,
    Json,
    Decimal {
        scale: i64,
    },
    VariableScaleDecimal,
    Geometry,
    Days,
    TimeMillis,
    TimeMicros,
    TimeNanos,
    /// `utc`: an instant, shown with Z; else a local time.
    TimestampMillis {
        utc: bool,
    },
    TimestampMicros {
        utc: bool,
    },
    TimestampNanos,
    /// Text that ends in Z.
    Instant,
    DurationMicros,
}

impl Meaning {
    /// The meaning that the attributes of a type give it.
    pub fn of(attributes: &Map<String, Value>) -> Self {
        let text = |name: &str| attributes.get(name).and_then(Value::as_str).unwrap_or_default();
        let scale = || attributes.get("scale").and_then(Value::as_i64).unwrap_or(0);
        match text("connect.name") {
            "io.debezium.data.Json" => Meaning::Json,
            "io.debezium.data.VariableScaleDecimal" => Meaning::VariableScaleDecimal,
            "io.debezium.data.geometry.Geometry" | "io.debezium.data.geometry.Geography" => Meaning::Geometry,
            "io.debezium.time.Date" | "org.apache.kafka.connect.data.Date" => Meaning::Days,
            "io.debezium.time.Time" | "org.apache.kafka.connect.data.Time" => Meaning::TimeMillis,
            "io.debezium.time.MicroTime" => Meaning::TimeMicros,
            "io.debezium.time.NanoTime" => Meaning::TimeNanos,
            "io.debezium.time.Timestamp" | "org.apache.kafka.connect.data.Timestamp" => {
                Meaning::TimestampMillis { utc: false }
            }
            "io.debezium.time.MicroTimestamp" => Meaning::TimestampMicros { utc: false },
            "io.debezium.time.NanoTimestamp" => Meaning::TimestampNanos,
            "io.debezium.time.ZonedTimestamp" => Meaning::Instant,
            "io.debezium.time.MicroDuration" => Meaning::DurationMicros,
            _ => match text("logicalType") {
                "decimal" => Meaning::Decimal { scale: scale() },
                "date" => Meaning::Days,
                "time-millis" => Meaning::TimeMillis,
                "time-micros" => Meaning::TimeMicros,
                "timestamp-millis" => Meaning::TimestampMillis { utc: true },
                "timestamp-micros" => Meaning::TimestampMicros { utc: true },
                "local-timestamp-millis" => Meaning::TimestampMillis { utc: false },
                "local-timestamp-micros" => Meaning::TimestampMicros { utc: false },
                _ => Meaning::Plain,
            },
        }
    }

    /// An `int` or `long`.
    pub fn integer(&self, value: i64) -> Value {
        let time_of_day = |micros: Option<i64>| match micros {
            Some(micros @ 0..=DAY_MICROS) => text_of(|out| put_iso_time(micros, None, out)),
            // Not a time of day, so not shown as one.
            _ => value.into(),
        };
        match self {
            Meaning::Days => instant(date_from_days(value), put_iso_date),
            Meaning::TimeMillis => time_of_day(value.checked_mul(1000)),
            Meaning::TimeMicros => time_of_day(Some(value)),
            Meaning::TimeNanos => time_of_day(Some(value / 1000)),
            Meaning::TimestampMillis { utc } => timestamp(instant_from_millis(value), *utc),
            Meaning::TimestampMicros { utc } => timestamp(instant_from_micros(value), *utc),
            Meaning::TimestampNanos => match value {
                i64::MAX | i64::MIN => timestamp(instant_from_micros(value), false),
                nanos => timestamp(Instant::At(nanos.div_euclid(1000)), false),
            },
            Meaning::DurationMicros => text_of(|out| Interval { months: 0, days: 0, micros: value }.put_short_iso(out)),
            _ => value.into(),
        }
    }

    /// `bytes` or `fixed`; `None` where they are just bytes.
    pub fn bytes(&self, bytes: &[u8]) -> Option<Value> {
        match self {
            Meaning::Decimal { scale } => decimal(bytes, *scale),
            _ => None,
        }
    }

    pub fn text(&self, text: &str) -> Value {
        match self {
            Meaning::Json => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
            // As other times, and as PostgreSQL's own JSON: no zeros at the end of a second.
            Meaning::Instant => match text.strip_suffix('Z').and_then(|text| text.rsplit_once('.')) {
                Some((whole, fraction)) => match fraction.trim_end_matches('0') {
                    "" => format!("{whole}Z").into(),
                    fraction => format!("{whole}.{fraction}Z").into(),
                },
                None => text.into(),
            },
            _ => text.into(),
        }
    }
}

fn text_of(write: impl FnOnce(&mut Vec<u8>)) -> Value {
    let mut out = Vec::new();
    write(&mut out);
    String::from_utf8(out).unwrap_or_default().into()
}

fn instant(instant: Instant, write: impl FnOnce(i64, &mut Vec<u8>)) -> Value {
    match instant {
        Instant::At(at) => text_of(|out| write(at, out)),
        Instant::Infinity => "infinity".into(),
        Instant::NegativeInfinity => "-infinity".into(),
    }
}

fn timestamp(at: Instant, utc: bool) -> Value {
    instant(at, |micros, out| {
        put_iso_timestamp(micros, None, out);
        if utc {
            out.push(b'Z');
        }
    })
}

/// A decimal as an exact number; `None` for what no PostgreSQL numeric can be, so that hostile bytes can't ask for
/// gigabytes of digits.
pub(super) fn decimal(unscaled: &[u8], scale: i64) -> Option<Value> {
    const MOST_BYTES: usize = 1 << 16;
    const MOST_SCALE: i64 = 150_000;
    if unscaled.len() > MOST_BYTES || !(-MOST_SCALE..=MOST_SCALE).contains(&scale) {
        return None;
    }
    let negative = unscaled.first().is_some_and(|first| first & 0x80 != 0);
    let mut digits = magnitude_digits(unscaled, negative);
    if scale > 0 {
        let scale = scale as usize;
        if digits.len() <= scale {
            digits.insert_str(0, &"0".repeat(scale + 1 - digits.len()));
        }
        digits.insert(digits.len() - scale, '.');
    } else if digits != "0" {
        digits.push_str(&"0".repeat(scale.unsigned_abs() as usize));
    }
    if negative {
        digits.insert(0, '-');
    }
    digits.parse().ok().map(Value::Number)
}

/// The decimal digits of a two's complement integer's absolute value.
fn magnitude_digits(bytes: &[u8], negative: bool) -> String {
    if bytes.len() <= 16 {
        let fill = if negative { 0xff } else { 0 };
        let mut wide = [fill; 16];
        wide[16 - bytes.len()..].copy_from_slice(bytes);
        return i128::from_be_bytes(wide).unsigned_abs().to_string();
    }
    // Limbs of 32 bits, lowest first; a negative number turned around and one added.
    let mut limbs: Vec<u32> = bytes
        .rchunks(4)
        .map(|chunk| {
            let fill = if negative { u32::MAX } else { 0 };
            let value = chunk.iter().fold(fill, |value, byte| value << 8 | u32::from(*byte));
            if negative { !value } else { value }
        })
        .collect();
    if negative {
        for limb in &mut limbs {
            let (sum, overflow) = limb.overflowing_add(1);
            *limb = sum;
            if !overflow {
                break;
            }
        }
    }
    let mut groups = Vec::new();
    while limbs.iter().any(|&limb| limb != 0) {
        let mut remainder = 0u64;
        for limb in limbs.iter_mut().rev() {
            let value = remainder << 32 | u64::from(*limb);
            *limb = (value / 1_000_000_000) as u32;
            remainder = value % 1_000_000_000;
        }
        groups.push(remainder);
        while limbs.last() == Some(&0) {
            limbs.pop();
        }
    }
    let mut digits = groups.pop().unwrap_or(0).to_string();
    for group in groups.iter().rev() {
        digits.push_str(&format!("{group:09}"));
    }
    digits
}

/// The forms that the placeholder of an unchanged TOAST value takes.
#[derive(Clone, Debug)]
pub(super) struct Unavailable {
    placeholder: Vec<u8>,
    /// Under `binary.handling.mode` base64, base64-url-safe, hex.
    others: [Vec<u8>; 3],
}

impl Unavailable {
    pub fn new(placeholder: &str) -> Self {
        use base64::Engine;
        use base64::engine::general_purpose::{STANDARD, URL_SAFE};
        let hex: String = placeholder.bytes().map(|byte| format!("{byte:02x}")).collect();
        Unavailable {
            placeholder: placeholder.as_bytes().to_vec(),
            others: [STANDARD.encode(placeholder).into(), URL_SAFE.encode(placeholder).into(), hex.into()],
        }
    }

    pub fn placeholder(&self) -> &[u8] {
        &self.placeholder
    }

    pub fn is(&self, bytes: &[u8]) -> bool {
        !bytes.is_empty() && (bytes == self.placeholder || self.others.iter().any(|other| bytes == other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_exact_at_any_size() {
        let show = |bytes: &[u8], scale| decimal(bytes, scale).map(|value| value.to_string());
        assert_eq!(show(&[], 0).as_deref(), Some("0"));
        assert_eq!(show(&[0, 0x96], 2).as_deref(), Some("1.50"));
        assert_eq!(show(&[0xff], 18).as_deref(), Some("-0.000000000000000001"));
        let mut two_160 = vec![1];
        two_160.extend([0; 20]);
        assert_eq!(show(&two_160, 0).as_deref(), Some("1461501637330902918203684832716283019655932542976"));
        two_160[0] = 0xff;
        assert_eq!(show(&two_160, 40).as_deref(), Some("-146150163.7330902918203684832716283019655932542976"));
        assert_eq!(show(&[1], i64::from(i32::MAX)), None);
        assert_eq!(show(&vec![1; 1 << 17], 0), None);
    }

    #[test]
    fn times_are_iso_text() {
        assert_eq!(Meaning::Days.integer(20_638), "2026-07-04");
        assert_eq!(Meaning::TimeMicros.integer(86_400_000_000), "24:00:00");
        assert_eq!(Meaning::TimeMicros.integer(-1), -1);
        assert_eq!(Meaning::TimestampMillis { utc: false }.integer(-1000), "1969-12-31T23:59:59");
        assert_eq!(Meaning::TimestampMicros { utc: true }.integer(1), "1970-01-01T00:00:00.000001Z");
        assert_eq!(Meaning::Instant.text("2024-05-06T05:08:09.120000Z"), "2024-05-06T05:08:09.12Z");
        assert_eq!(Meaning::Instant.text("2024-05-06T05:08:10.000000Z"), "2024-05-06T05:08:10Z");
        assert_eq!(Meaning::Instant.text("2024-05-06T05:08:10Z"), "2024-05-06T05:08:10Z");
        assert_eq!(Meaning::Instant.text("infinity"), "infinity");
        assert_eq!(Meaning::TimestampMicros { utc: false }.integer(i64::MAX), "infinity");
        assert_eq!(Meaning::DurationMicros.integer(90_500_000), "PT1M30.5S");
        assert_eq!(Meaning::DurationMicros.integer(i64::MIN), "PT-2562047788H-54.775808S");
    }
}
