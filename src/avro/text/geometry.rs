//! PostgreSQL's geometric types to little-endian WKB, as Debezium has them.

use super::number::double;
use crate::avro::error::TextError;

const MALFORMED: TextError = TextError::Malformed("not of its geometric type");

/// Shapes that arrive as `io.debezium.data.geometry.Geometry`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::avro) enum Shape {
    Lseg,
    Box,
    Path,
    Polygon,
}

/// All numbers of the text, at most `N`; brackets and commas stand between them.
fn numbers<const N: usize>(text: &[u8]) -> Result<[f64; N], TextError> {
    let mut out = [0.0; N];
    let mut count = 0;
    for number in number_texts(text) {
        *out.get_mut(count).ok_or(MALFORMED)? = double(number)?;
        count += 1;
    }
    if count == N { Ok(out) } else { Err(MALFORMED) }
}

fn number_texts(text: &[u8]) -> impl Iterator<Item = &[u8]> + Clone {
    let between = |b: &u8| matches!(b, b'(' | b')' | b'[' | b']' | b'{' | b'}' | b'<' | b'>' | b',');
    text.split(between).filter(|part| !part.is_empty())
}

/// `(x,y)`
pub(in crate::avro) fn point(text: &[u8]) -> Result<[f64; 2], TextError> {
    numbers(text)
}

/// `{a,b,c}`
pub(in crate::avro) fn line(text: &[u8]) -> Result<[f64; 3], TextError> {
    numbers(text)
}

/// `<(x,y),r>`
pub(in crate::avro) fn circle(text: &[u8]) -> Result<[f64; 3], TextError> {
    numbers(text)
}

/// Appends a point's WKB.
pub(in crate::avro) fn put_wkb_point(x: f64, y: f64, out: &mut Vec<u8>) {
    out.push(1);
    out.extend_from_slice(&1u32.to_le_bytes());
    put_xy(x, y, out);
}

fn put_xy(x: f64, y: f64, out: &mut Vec<u8>) {
    out.extend_from_slice(&x.to_le_bytes());
    out.extend_from_slice(&y.to_le_bytes());
}

/// Appends a shape's WKB: line strings and polygons, rings closed.
pub(in crate::avro) fn put_wkb(shape: Shape, text: &[u8], out: &mut Vec<u8>) -> Result<(), TextError> {
    const LINE_STRING: u32 = 2;
    const POLYGON: u32 = 3;
    let count = number_texts(text).count();
    if count == 0 || !count.is_multiple_of(2) {
        return Err(MALFORMED);
    }
    let header = |kind: u32, points: usize, out: &mut Vec<u8>| {
        out.push(1);
        out.extend_from_slice(&kind.to_le_bytes());
        if kind == POLYGON {
            out.extend_from_slice(&1u32.to_le_bytes());
        }
        out.extend_from_slice(&(points as u32).to_le_bytes());
    };
    if shape == Shape::Box {
        let [x1, y1, x2, y2] = numbers(text)?;
        header(POLYGON, 5, out);
        for (x, y) in [(x1, y1), (x1, y2), (x2, y2), (x2, y1), (x1, y1)] {
            put_xy(x, y, out);
        }
        return Ok(());
    }
    let closing = usize::from(shape == Shape::Polygon);
    header(if shape == Shape::Polygon { POLYGON } else { LINE_STRING }, count / 2 + closing, out);
    let first = out.len();
    for number in number_texts(text) {
        out.extend_from_slice(&double(number)?.to_le_bytes());
    }
    if closing == 1 {
        out.extend_from_within(first..first + 16);
    }
    Ok(())
}

/// A path in square brackets is open, one in parentheses closed.
pub(in crate::avro) fn path_is_closed(text: &[u8]) -> bool {
    text.first() == Some(&b'(')
}

/// The SRID of PostGIS's extended WKB, where it has one.
pub(in crate::avro) fn ewkb_srid(ewkb: &[u8]) -> Option<i32> {
    const HAS_SRID: u32 = 0x2000_0000;
    let [order, kind @ .., s0, s1, s2, s3] = ewkb.get(..9)? else { return None };
    let kind: [u8; 4] = kind.try_into().ok()?;
    let srid = [*s0, *s1, *s2, *s3];
    let (kind, srid) = match order {
        1 => (u32::from_le_bytes(kind), i32::from_le_bytes(srid)),
        0 => (u32::from_be_bytes(kind), i32::from_be_bytes(srid)),
        _ => return None,
    };
    (kind & HAS_SRID != 0).then_some(srid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_are_not_theirs_are_refused() {
        let mut out = Vec::new();
        assert!(point(b"(1)").is_err() && point(b"(1,2,3)").is_err() && point(b"(a,b)").is_err());
        assert!(
            put_wkb(Shape::Lseg, b"[]", &mut out).is_err() && put_wkb(Shape::Path, b"((1,2),(3))", &mut out).is_err()
        );
        assert_eq!(line(b"{1,2,3}"), Ok([1.0, 2.0, 3.0]));
    }

    #[test]
    fn srid_is_read_from_either_byte_order() {
        assert_eq!(ewkb_srid(&[1, 1, 0, 0, 0x20, 0xe6, 0x10, 0, 0]), Some(4326));
        assert_eq!(ewkb_srid(&[0, 0x20, 0, 0, 1, 0, 0, 0x10, 0xe6]), Some(4326));
        assert_eq!(ewkb_srid(&[1, 1, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(ewkb_srid(&[1]), None);
    }
}
