//! Rows of `COPY … TO STDOUT` in text format, read in place: escapes only ever make text shorter.

use crate::event::Cell;

use super::PostgresError;

/// Where the fields of a row are; kept between rows so that nothing is allocated.
#[derive(Default)]
pub struct RowReader {
    fields: Vec<Option<(usize, usize)>>,
}

impl RowReader {
    /// Reads one row (with or without its line end) into `cells`. The row's bytes are rewritten in place.
    pub fn read<'a>(&mut self, row: &'a mut [u8], cells: &mut Vec<Cell<'a>>) -> Result<(), PostgresError> {
        cells.clear();
        self.fields.clear();
        let end = row.len() - usize::from(row.ends_with(b"\n"));
        let (mut read, mut write, mut start, mut null) = (0, 0, 0, false);
        while read < end {
            match row[read] {
                b'\t' => {
                    self.fields.push((!null).then_some((start, write)));
                    (start, null) = (write, false);
                    read += 1;
                }
                b'\\' => {
                    let escaped = *row[..end]
                        .get(read + 1)
                        .ok_or_else(|| PostgresError::Protocol("a COPY row ends in a backslash".into()))?;
                    read += 2;
                    let plain = match escaped {
                        b'N' => {
                            null = true;
                            continue;
                        }
                        b'b' => 8,
                        b'f' => 12,
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'v' => 11,
                        other => other,
                    };
                    row[write] = plain;
                    write += 1;
                }
                plain => {
                    row[write] = plain;
                    (read, write) = (read + 1, write + 1);
                }
            }
        }
        self.fields.push((!null).then_some((start, write)));
        let row: &'a [u8] = row;
        cells.extend(self.fields.iter().map(|field| match field {
            None => Cell::Null,
            Some((start, end)) => Cell::Text(&row[*start..*end]),
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_nulls_and_empty_fields_are_told_apart() {
        let mut row = b"a\\tb\t\\N\t\t\\\\x00\t\\\\N\n".to_vec();
        let mut cells = Vec::new();
        RowReader::default().read(&mut row, &mut cells).unwrap();
        let text = |text: &'static str| Cell::Text(text.as_bytes());
        assert_eq!(cells, [text("a\tb"), Cell::Null, text(""), text("\\x00"), text("\\N")]);
        let mut cut = b"a\\".to_vec();
        assert!(RowReader::default().read(&mut cut, &mut Vec::new()).is_err());
    }
}
