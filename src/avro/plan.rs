//! A relation's compiled plan: PostgreSQL's text cells straight into the Confluent wire format.
//!
//! Nothing is allocated per row beyond the growth of the output, and a row that fails leaves the output as it was.

use super::encoding::Encoding;
use super::error::{RefusedValue, shown};
use super::schema::{columns, schemas};
use super::wire::{put_bytes, write_wire_header};
use super::{AvroError, Decoder, EncodingSettings, EventMeta};
use crate::event::{Cell, ReplicaIdentity, Table};

/// How a table's rows become keys and values. Compiled once per relation and pair of schema ids.
///
/// A row has one [`Cell`] for every column of the table, in the table's order.
pub struct TablePlan {
    schema: String,
    table: String,
    key_header: Option<Vec<u8>>,
    value_header: Vec<u8>,
    columns: Vec<ColumnPlan>,
    /// Indices into `columns`, in the key's order.
    key: Vec<usize>,
    key_decoder: Option<Decoder>,
    /// Old rows are whole (replica identity full): a null in one is the row's own, not what was left out.
    whole_before: bool,
    /// `source.schema` and `source.table`, encoded.
    names: Vec<u8>,
}

struct ColumnPlan {
    name: String,
    encoding: Encoding,
    /// Branch of the value in its union with null.
    branch: Option<u8>,
    /// What NULL is written as; `None` where the schema has no null.
    null: Option<u8>,
    /// What stands in a required field for a value that was not sent: its default, or the type's zero.
    absent: Vec<u8>,
    /// What an unchanged TOAST value is written as.
    unavailable: Vec<u8>,
    /// Not in values.
    left_out: bool,
}

impl TablePlan {
    /// `key_id` and `value_id` are the registered ids of [`schemas`]' texts; a table without a key has no `key_id`.
    pub fn compile(
        table: &Table,
        settings: &EncodingSettings,
        key_id: Option<u32>,
        value_id: u32,
    ) -> Result<Self, AvroError> {
        let columns: Vec<ColumnPlan> = columns(table, settings)
            .into_iter()
            .map(|resolved| {
                let nullable = resolved.column.nullable;
                // A union with a default has the value first, else null first.
                let (branch, null) = match (nullable, &resolved.default) {
                    (false, _) => (None, None),
                    (true, Some(_)) => (Some(0), Some(2)),
                    (true, None) => (Some(2), Some(0)),
                };
                let mut absent = Vec::new();
                match (null, &resolved.default) {
                    (Some(null), _) => absent.push(null),
                    (None, Some(default)) => absent.extend_from_slice(&default.bytes),
                    (None, None) => resolved.encoding.put_zero(&mut absent),
                }
                let mut unavailable: Vec<u8> = branch.into_iter().collect();
                if !resolved.encoding.put_unavailable(&settings.unavailable_value, &mut unavailable) {
                    unavailable.clone_from(&absent);
                }
                ColumnPlan {
                    name: resolved.column.name.clone(),
                    encoding: resolved.encoding,
                    branch,
                    null,
                    absent,
                    unavailable,
                    left_out: resolved.left_out,
                }
            })
            .collect();
        let key = table.key.iter().copied().filter(|&at| at < columns.len()).collect();
        let key_decoder = schemas(table, settings)?.key.map(|text| Decoder::compile(&text)).transpose()?;
        let header = |id| {
            let mut bytes = Vec::with_capacity(5);
            write_wire_header(id, &mut bytes);
            bytes
        };
        let mut names = Vec::new();
        put_bytes(&mut names, table.schema.as_bytes());
        put_bytes(&mut names, table.name.as_bytes());
        Ok(TablePlan {
            schema: table.schema.clone(),
            table: table.name.clone(),
            key_header: key_id.map(header),
            value_header: header(value_id),
            columns,
            key,
            key_decoder,
            whole_before: table.replica_identity == ReplicaIdentity::Full,
            names,
        })
    }

    /// False for a table without a key: its records' keys are null.
    pub fn has_key(&self) -> bool {
        !self.key.is_empty()
    }

    /// Appends the wire bytes of the row's key; for a table without a key nothing.
    pub fn write_key(&self, row: &[Cell<'_>], out: &mut Vec<u8>) -> Result<(), AvroError> {
        let Some(header) = &self.key_header else { return Ok(()) };
        self.undone_on_error(out, |out| {
            self.check_width(row)?;
            out.extend_from_slice(header);
            self.put_key(row, out)
        })
    }

    /// True when both rows have the same key; the text decides, as one session writes equal values alike.
    pub fn same_key(&self, one: &[Cell<'_>], other: &[Cell<'_>]) -> bool {
        self.key.iter().all(|&at| one.get(at) == other.get(at))
    }

    /// The row's key as the JSON text of the headers `__debezium.newkey` and `__debezium.oldkey`.
    pub fn write_key_json(&self, row: &[Cell<'_>], out: &mut Vec<u8>) -> Result<(), AvroError> {
        let Some(decoder) = &self.key_decoder else { return Ok(()) };
        self.check_width(row)?;
        let mut body = Vec::new();
        self.put_key(row, &mut body)?;
        out.extend_from_slice(decoder.decode_raw(&body)?.to_string().as_bytes());
        Ok(())
    }

    /// Appends the wire bytes of an event. A truncate has neither row; a delete under the default replica identity
    /// has NULL for all but the key in `before`, where required fields get their default or zero, as Debezium's do.
    pub fn write_value(
        &self,
        before: Option<&[Cell<'_>]>,
        after: Option<&[Cell<'_>]>,
        meta: &EventMeta<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), AvroError> {
        self.undone_on_error(out, |out| {
            out.extend_from_slice(&self.value_header);
            match before {
                Some(row) => {
                    self.check_width(row)?;
                    out.push(2);
                    for (at, cell) in row.iter().enumerate() {
                        match cell {
                            _ if self.columns[at].left_out => {}
                            Cell::Null if !self.whole_before => out.extend_from_slice(&self.columns[at].absent),
                            cell => self.put_cell(at, *cell, out)?,
                        }
                    }
                }
                None => out.push(0),
            }
            match after {
                Some(row) => {
                    self.check_width(row)?;
                    out.push(2);
                    for (at, cell) in row.iter().enumerate().filter(|(at, _)| !self.columns[*at].left_out) {
                        self.put_cell(at, *cell, out)?;
                    }
                }
                None => out.push(0),
            }
            meta.put_source(&self.names, out);
            meta.put_block(out);
            meta.put_operation_and_clocks(out);
            Ok(())
        })
    }

    fn put_key(&self, row: &[Cell<'_>], out: &mut Vec<u8>) -> Result<(), AvroError> {
        for &at in &self.key {
            match row[at] {
                Cell::Unchanged => return Err(self.key_was_not_sent(&self.columns[at])),
                cell => self.put_cell(at, cell, out)?,
            }
        }
        Ok(())
    }

    fn put_cell(&self, at: usize, cell: Cell<'_>, out: &mut Vec<u8>) -> Result<(), AvroError> {
        let column = &self.columns[at];
        match cell {
            Cell::Text(text) => {
                if let Some(branch) = column.branch {
                    out.push(branch);
                }
                column.encoding.put(text, out).map_err(|error| self.refused(column, text, &error))
            }
            Cell::Null => match column.null {
                Some(null) => {
                    out.push(null);
                    Ok(())
                }
                None => Err(AvroError::NullInRequired {
                    schema: self.schema.clone(),
                    table: self.table.clone(),
                    column: column.name.clone(),
                    index: at,
                }),
            },
            Cell::Unchanged => {
                out.extend_from_slice(&column.unavailable);
                Ok(())
            }
        }
    }

    fn undone_on_error(
        &self,
        out: &mut Vec<u8>,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), AvroError>,
    ) -> Result<(), AvroError> {
        let start = out.len();
        write(out).inspect_err(|_| out.truncate(start))
    }

    fn check_width(&self, row: &[Cell<'_>]) -> Result<(), AvroError> {
        if row.len() == self.columns.len() {
            return Ok(());
        }
        Err(AvroError::Width {
            schema: self.schema.clone(),
            table: self.table.clone(),
            expected: self.columns.len(),
            got: row.len(),
        })
    }

    #[cold]
    fn refused(&self, column: &ColumnPlan, text: &[u8], error: &super::error::TextError) -> AvroError {
        AvroError::Value(Box::new(RefusedValue {
            schema: self.schema.clone(),
            table: self.table.clone(),
            column: column.name.clone(),
            shown: shown(text),
            expected: column.encoding.expected().into_owned(),
            reason: error.reason().into(),
            hint: error.hint().into(),
        }))
    }

    #[cold]
    fn key_was_not_sent(&self, column: &ColumnPlan) -> AvroError {
        AvroError::Value(Box::new(RefusedValue {
            schema: self.schema.clone(),
            table: self.table.clone(),
            column: column.name.clone(),
            shown: "an unchanged TOAST value".into(),
            expected: "a part of the key".into(),
            reason: "the WAL does not carry it".into(),
            hint: "choose a key of small columns, or set REPLICA IDENTITY FULL on the table".into(),
        }))
    }
}
