//! hstore text: `"a"=>"1", "b"=>NULL`.

use crate::avro::error::TextError;

const MALFORMED: TextError = TextError::Malformed("not an hstore");

/// Calls `each` with every pair, in the text's order.
pub(in crate::avro) fn pairs(
    text: &[u8],
    mut each: impl FnMut(&[u8], Option<&[u8]>) -> Result<(), TextError>,
) -> Result<(), TextError> {
    let (mut key, mut value) = (Vec::new(), Vec::new());
    let mut rest = text;
    if rest.is_empty() {
        return Ok(());
    }
    loop {
        rest = quoted(rest, &mut key)?.strip_prefix(b"=>").ok_or(MALFORMED)?;
        if let Some(after) = rest.strip_prefix(b"NULL") {
            rest = after;
            each(&key, None)?;
        } else {
            rest = quoted(rest, &mut value)?;
            each(&key, Some(&value))?;
        }
        match rest {
            [] => return Ok(()),
            [b',', b' ', after @ ..] => rest = after,
            _ => return Err(MALFORMED),
        }
    }
}

/// Reads `"…"` into `out`; what follows it.
fn quoted<'a>(text: &'a [u8], out: &mut Vec<u8>) -> Result<&'a [u8], TextError> {
    out.clear();
    let mut rest = text.strip_prefix(b"\"").ok_or(MALFORMED)?;
    loop {
        match rest {
            [b'"', after @ ..] => return Ok(after),
            [b'\\', escaped, after @ ..] => {
                out.push(*escaped);
                rest = after;
            }
            [] | [b'\\'] => return Err(MALFORMED),
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
    fn pairs_come_in_order_with_quotes_undone() {
        let read = |text: &str| {
            let mut out = Vec::new();
            pairs(text.as_bytes(), |key, value| {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                out.push((text(key), value.map(text)));
                Ok(())
            })
            .map(|()| out)
        };
        let pair = |key: &str, value: Option<&str>| (key.to_owned(), value.map(str::to_owned));
        assert_eq!(
            read(r#""a"=>"1", "b"=>NULL, "k k"=>"v\"q""#).unwrap(),
            [pair("a", Some("1")), pair("b", None), pair("k k", Some("v\"q"))]
        );
        assert_eq!(read("").unwrap(), []);
        for text in ["a", "\"a\"", "\"a\"=>", "\"a\"=>\"b", "\"a\"=>\"b\",", "\"a\"=>\"b\"\"c\"=>NULL"] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
