//! Array text: `{a,"b c",NULL}`, nested, with or without bounds in front.

use crate::avro::error::TextError;

/// The leaves of an array, in row-major order. A multidimensional array is read flat: a column's type does not
/// say how many dimensions its values have.
pub(in crate::avro) struct Elements<'a> {
    rest: &'a [u8],
    depth: usize,
    /// A leaf or a closing brace came last: a delimiter or a closing brace must follow.
    after_item: bool,
    delimiter: u8,
    unescaped: &'a mut Vec<u8>,
}

/// One leaf: NULL, or text that lives until the next call.
pub(in crate::avro) enum Element<'b> {
    Null,
    Text(&'b [u8]),
}

const MALFORMED: TextError = TextError::Malformed("not an array");
const MOST_DIMENSIONS: usize = 6;

impl<'a> Elements<'a> {
    /// `delimiter` is the type's `typdelim`: `;` for box, else `,`. `scratch` holds unescaped text.
    pub fn new(text: &'a [u8], delimiter: u8, scratch: &'a mut Vec<u8>) -> Result<Self, TextError> {
        let body = match text.first() {
            Some(b'[') => {
                let equals = text.iter().position(|&b| b == b'=').ok_or(MALFORMED)?;
                &text[equals + 1..]
            }
            _ => text,
        };
        if body.first() != Some(&b'{') {
            return Err(MALFORMED);
        }
        Ok(Elements { rest: &body[1..], depth: 1, after_item: false, delimiter, unescaped: scratch })
    }

    /// The next leaf; `None` after the last.
    pub fn next(&mut self) -> Result<Option<Element<'_>>, TextError> {
        loop {
            let (&first, after) = match self.rest.split_first() {
                Some(split) => split,
                None if self.depth == 0 => return Ok(None),
                None => return Err(TextError::Malformed("the array is not closed")),
            };
            if self.depth == 0 {
                return Err(TextError::Malformed("text after the array"));
            }
            match first {
                b'}' => {
                    self.depth -= 1;
                    self.after_item = true;
                    self.rest = after;
                }
                _ if first == self.delimiter => {
                    if !self.after_item {
                        return Err(MALFORMED);
                    }
                    self.after_item = false;
                    self.rest = after;
                }
                _ if self.after_item => return Err(MALFORMED),
                b'{' => {
                    if self.depth == MOST_DIMENSIONS {
                        return Err(TextError::Malformed("an array has at most 6 dimensions"));
                    }
                    self.depth += 1;
                    self.rest = after;
                }
                b'"' => {
                    self.after_item = true;
                    self.rest = after;
                    return self.quoted().map(Some);
                }
                _ => {
                    self.after_item = true;
                    return self.bare().map(Some);
                }
            }
        }
    }

    fn quoted(&mut self) -> Result<Element<'_>, TextError> {
        const OPEN: TextError = TextError::Malformed("a quoted element is not closed");
        let end = self.rest.iter().position(|b| matches!(b, b'"' | b'\\')).ok_or(OPEN)?;
        if self.rest[end] == b'"' {
            let text = &self.rest[..end];
            self.rest = &self.rest[end + 1..];
            return Ok(Element::Text(text));
        }
        self.unescaped.clear();
        loop {
            let end = self.rest.iter().position(|b| matches!(b, b'"' | b'\\')).ok_or(OPEN)?;
            self.unescaped.extend_from_slice(&self.rest[..end]);
            let stop = self.rest[end];
            self.rest = &self.rest[end + 1..];
            if stop == b'"' {
                return Ok(Element::Text(self.unescaped));
            }
            let (&escaped, after) = self.rest.split_first().ok_or(OPEN)?;
            self.unescaped.push(escaped);
            self.rest = after;
        }
    }

    fn bare(&mut self) -> Result<Element<'_>, TextError> {
        let ends = |&b: &u8| b == self.delimiter || matches!(b, b'}' | b'{' | b'"' | b'\\');
        let end = self.rest.iter().position(ends).ok_or(MALFORMED)?;
        let text = &self.rest[..end];
        self.rest = &self.rest[end..];
        Ok(if text == b"NULL" { Element::Null } else { Element::Text(text) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Option<String>>, TextError> {
        let mut scratch = Vec::new();
        let mut elements = Elements::new(text.as_bytes(), b',', &mut scratch)?;
        let mut out = Vec::new();
        while let Some(element) = elements.next()? {
            out.push(match element {
                Element::Null => None,
                Element::Text(text) => Some(String::from_utf8(text.to_vec()).unwrap()),
            });
        }
        Ok(out)
    }

    #[test]
    fn elements_with_quotes_nulls_bounds_and_dimensions() {
        let some = |items: &[&str]| items.iter().map(|item| Some(item.to_string())).collect::<Vec<_>>();
        assert_eq!(read("{}").unwrap(), []);
        assert_eq!(read("{1,2}").unwrap(), some(&["1", "2"]));
        assert_eq!(
            read(r#"{a,"b c","q\"uote","back\\slash","",NULL,"NULL","{c}","a,b"}"#).unwrap(),
            ["a", "b c", "q\"uote", "back\\slash", "", "\0", "NULL", "{c}", "a,b"]
                .map(|item| (item != "\0").then(|| item.to_owned()))
        );
        assert_eq!(read("{{1,2},{3,4}}").unwrap(), some(&["1", "2", "3", "4"]));
        assert_eq!(read("[0:1][3:4]={{1,2},{3,4}}").unwrap(), some(&["1", "2", "3", "4"]));
    }

    #[test]
    fn what_is_not_an_array_is_refused() {
        for text in
            ["", "1", "{", "{1", "{1,2}}", "{1}2", "{\"a}", "{,1}", "{1{2}}", "{a\"b\"}", "[1:2]", "{{{{{{{1}}}}}}}"]
        {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
