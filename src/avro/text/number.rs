//! Booleans, integers and floats.

use crate::avro::error::TextError;

pub(in crate::avro) fn boolean(text: &[u8]) -> Result<bool, TextError> {
    match text {
        b"t" | b"true" => Ok(true),
        b"f" | b"false" => Ok(false),
        _ => Err(TextError::Malformed("a boolean is t or f")),
    }
}

/// A decimal integer that lies within `min..=max`.
pub(in crate::avro) fn integer(text: &[u8], min: i64, max: i64) -> Result<i64, TextError> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    if digits.is_empty() {
        return Err(TextError::Malformed("no digits"));
    }
    // Counted downwards, since the negative side reaches one further.
    let mut value: i64 = 0;
    for &digit in digits {
        if !digit.is_ascii_digit() {
            return Err(TextError::Malformed("not a decimal integer"));
        }
        value = value
            .checked_mul(10)
            .and_then(|value| value.checked_sub(i64::from(digit - b'0')))
            .ok_or(TextError::Malformed("out of range"))?;
    }
    if !negative {
        value = value.checked_neg().ok_or(TextError::Malformed("out of range"))?;
    }
    if value < min || value > max { Err(TextError::Malformed("out of range")) } else { Ok(value) }
}

fn special_float(text: &[u8]) -> Option<f64> {
    match text {
        b"NaN" => Some(f64::NAN),
        b"Infinity" => Some(f64::INFINITY),
        b"-Infinity" => Some(f64::NEG_INFINITY),
        _ => None,
    }
}

fn plain_float(text: &[u8]) -> Result<&str, TextError> {
    let plain = text.iter().all(|b| b.is_ascii_digit() || matches!(b, b'+' | b'-' | b'.' | b'e' | b'E'));
    std::str::from_utf8(text).ok().filter(|_| plain).ok_or(TextError::Malformed("not a number"))
}

/// `float8`. The shortest exact text (extra_float_digits > 0) gives the same bits back.
pub(in crate::avro) fn double(text: &[u8]) -> Result<f64, TextError> {
    match special_float(text) {
        Some(special) => Ok(special),
        None => plain_float(text)?.parse().map_err(|_| TextError::Malformed("not a number")),
    }
}

/// `float4`, parsed as such: by way of a double it could round twice.
pub(in crate::avro) fn float(text: &[u8]) -> Result<f32, TextError> {
    match special_float(text) {
        Some(special) => Ok(special as f32),
        None => plain_float(text)?.parse().map_err(|_| TextError::Malformed("not a number")),
    }
}

/// Decodes `\x…` (bytea_output=hex) or, for settings that were not ours to choose, the escape form.
pub(in crate::avro) fn bytea(text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    match text {
        [b'\\', b'x', digits @ ..] => hex(digits, out),
        escaped => escape_form(escaped, out),
    }
}

/// Pairs of hexadecimal digits.
pub(in crate::avro) fn hex(digits: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(TextError::Malformed("an odd number of hexadecimal digits"));
    }
    let start = out.len();
    out.reserve(pairs.len());
    for [high, low] in pairs {
        let (high, low) = (HEX_VALUE[*high as usize], HEX_VALUE[*low as usize]);
        if (high | low) & 0xf0 != 0 {
            out.truncate(start);
            return Err(TextError::Malformed("not hexadecimal"));
        }
        out.push(high << 4 | low);
    }
    Ok(())
}

const HEX_VALUE: [u8; 256] = {
    let mut table = [0xffu8; 256];
    let mut digit = 0u8;
    while digit < 16 {
        if digit < 10 {
            table[(b'0' + digit) as usize] = digit;
        } else {
            table[(b'a' + digit - 10) as usize] = digit;
            table[(b'A' + digit - 10) as usize] = digit;
        }
        digit += 1;
    }
    table
};

fn escape_form(text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    let start = out.len();
    let mut rest = text;
    loop {
        match rest {
            [] => return Ok(()),
            [b'\\', b'\\', after @ ..] => {
                out.push(b'\\');
                rest = after;
            }
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            [b'\\', ..] => {
                out.truncate(start);
                return Err(TextError::Malformed("neither the hex nor the escape form of bytea"));
            }
            [plain, after @ ..] => {
                out.push(*plain);
                rest = after;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_reach_their_limits_and_no_further() {
        assert_eq!(integer(b"-9223372036854775808", i64::MIN, i64::MAX), Ok(i64::MIN));
        assert_eq!(integer(b"9223372036854775807", i64::MIN, i64::MAX), Ok(i64::MAX));
        for text in ["9223372036854775808", "-9223372036854775809", "", "-", "+1", "1 ", "1.0", "0x1"] {
            assert!(integer(text.as_bytes(), i64::MIN, i64::MAX).is_err(), "{text}");
        }
        assert!(integer(b"32768", i16::MIN.into(), i16::MAX.into()).is_err());
    }

    #[test]
    fn floats_keep_every_bit() {
        assert_eq!(double(b"-0").unwrap().to_bits(), (-0.0f64).to_bits());
        assert_eq!(double(b"5e-324").unwrap().to_bits(), 1);
        assert_eq!(float(b"1e-45").unwrap().to_bits(), 1);
        assert_eq!(float(b"3.4028235e+38").unwrap(), f32::MAX);
        assert!(double(b"NaN").unwrap().is_nan());
        assert_eq!(double(b"-Infinity").unwrap(), f64::NEG_INFINITY);
        for text in ["inf", "nan", "", "1_0", "infinity", " 1"] {
            assert!(double(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn bytea_is_read_in_both_forms() {
        let read = |text: &str| {
            let mut out = Vec::new();
            bytea(text.as_bytes(), &mut out).map(|()| out)
        };
        assert_eq!(read("\\x00ff01DEADbeef").unwrap(), [0, 255, 1, 0xde, 0xad, 0xbe, 0xef]);
        assert_eq!(read("\\x").unwrap(), b"");
        assert_eq!(read("a\\\\\\001b").unwrap(), b"a\\\x01b");
        assert!(read("\\x0").is_err() && read("\\x0g").is_err() && read("\\9").is_err());
    }
}
