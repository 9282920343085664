//! Avro's binary primitives and the Confluent wire format.

use super::AvroError;

/// Appends a zigzag varint: Avro's `int` and `long`.
pub(super) fn put_long(out: &mut Vec<u8>, value: i64) {
    let mut rest = ((value << 1) ^ (value >> 63)) as u64;
    if rest < 0x80 {
        out.push(rest as u8);
        return;
    }
    let mut bytes = [0u8; 10];
    let mut used = 0;
    while rest >= 0x80 {
        bytes[used] = rest as u8 | 0x80;
        rest >>= 7;
        used += 1;
    }
    bytes[used] = rest as u8;
    out.extend_from_slice(&bytes[..=used]);
}

/// Appends Avro `bytes`, or a `string` given as UTF-8.
pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_long(out, bytes.len() as i64);
    out.extend_from_slice(bytes);
}

pub(super) fn put_float(out: &mut Vec<u8>, value: f32) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put_double(out: &mut Vec<u8>, value: f64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Turns what was appended since `start` into Avro `bytes`, by putting its length in front.
pub(super) fn prefix_with_length(out: &mut Vec<u8>, start: usize) {
    let body = out.len() - start;
    put_long(out, body as i64);
    let prefix = out.len() - start - body;
    out[start..].rotate_right(prefix);
}

/// Turns `count` items appended since `start` into an Avro array or map: the count in front, the end behind.
pub(super) fn prefix_with_count(out: &mut Vec<u8>, start: usize, count: usize) {
    if count > 0 {
        let body = out.len() - start;
        put_long(out, count as i64);
        let prefix = out.len() - start - body;
        out[start..].rotate_right(prefix);
    }
    out.push(0);
}

/// Appends byte 0 and the schema id: what stands before the Avro body.
pub fn write_wire_header(schema_id: u32, out: &mut Vec<u8>) {
    out.push(0);
    out.extend_from_slice(&schema_id.to_be_bytes());
}

/// Schema id and Avro body of a record's key or value.
pub fn split_wire(wire: &[u8]) -> Result<(u32, &[u8]), AvroError> {
    match wire {
        [0, a, b, c, d, body @ ..] => Ok((u32::from_be_bytes([*a, *b, *c, *d]), body)),
        [0, ..] | [] => Err(AvroError::NotWire(format!("{} bytes are fewer than 5", wire.len()))),
        [first, ..] => Err(AvroError::NotWire(format!("the first byte is {first}, not 0"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longs_are_zigzag_varints() {
        let cases: [(i64, &[u8]); 6] = [
            (0, &[0]),
            (-1, &[1]),
            (1, &[2]),
            (64, &[0x80, 1]),
            (i64::MAX, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]),
            (i64::MIN, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]),
        ];
        for (value, bytes) in cases {
            let mut out = Vec::new();
            put_long(&mut out, value);
            assert_eq!(out, bytes, "{value}");
        }
    }

    #[test]
    fn a_length_put_in_front_afterwards_reads_as_bytes() {
        for size in [0, 1, 63, 64, 10_000] {
            let (mut direct, mut later) = (vec![9], vec![9]);
            let body = vec![7; size];
            put_bytes(&mut direct, &body);
            later.extend_from_slice(&body);
            prefix_with_length(&mut later, 1);
            assert_eq!(direct, later);
        }
    }
}
