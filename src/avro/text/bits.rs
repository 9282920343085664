//! `bit` and `varbit`: text of 0 and 1 to little-endian bytes, as Debezium's `Bits`.

use crate::avro::error::TextError;

/// Appends the bits, the last one of the text lowest, without zero bytes at the end.
pub(in crate::avro) fn put_little_endian(text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    if !text.iter().all(|b| matches!(b, b'0' | b'1')) {
        return Err(TextError::Malformed("a bit string is of 0 and 1"));
    }
    let significant = text.iter().position(|&b| b == b'1').map_or(&text[..0], |first| &text[first..]);
    out.extend(significant.rchunks(8).map(|byte| byte.iter().fold(0, |value, bit| value << 1 | (bit - b'0'))));
    Ok(())
}

/// `bit(1)`.
pub(in crate::avro) fn single(text: &[u8]) -> Result<bool, TextError> {
    match text {
        b"0" => Ok(false),
        b"1" => Ok(true),
        _ => Err(TextError::Malformed("not a single bit")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bit_is_the_lowest() {
        let read = |text: &str| {
            let mut out = Vec::new();
            put_little_endian(text.as_bytes(), &mut out).map(|()| out)
        };
        assert_eq!(read("10101010").unwrap(), [0xaa]);
        assert_eq!(read("00000001").unwrap(), [1]);
        assert_eq!(read("1").unwrap(), [1]);
        assert_eq!(read("").unwrap(), b"");
        assert_eq!(read("0000").unwrap(), b"");
        assert_eq!(read(&format!("1{}1", "0".repeat(68))).unwrap(), [1, 0, 0, 0, 0, 0, 0, 0, 0x20]);
        assert!(read("102").is_err());
    }
}
