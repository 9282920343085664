//! What can go wrong between a row and its Avro form.

/// Why a table, a row or an event cannot be encoded or decoded, and what to do about it.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum AvroError {
    /// A column's text is not what its type should show, or has no place in the form that was chosen.
    #[error(transparent)]
    Value(Box<RefusedValue>),
    /// NULL where the schema has no null. The row decides: compile the table anew with the column nullable.
    #[error("{schema}.{table}.{column} is NULL, but the schema says it never is; the table was altered since")]
    NullInRequired {
        schema: String,
        table: String,
        column: String,
        /// Index into the table's columns.
        index: usize,
    },
    /// The row does not have as many columns as the table that the plan was compiled for.
    #[error("{schema}.{table}: the row has {got} columns, the table as known has {expected}")]
    Width { schema: String, table: String, expected: usize, got: usize },
    /// A schema that is not valid Avro, or uses what no event uses.
    #[error("the schema cannot be used: {0}")]
    Schema(String),
    /// Bytes that do not follow their schema.
    #[error("the bytes do not follow their schema at byte {at}: {reason}")]
    Malformed { at: usize, reason: String },
    /// Not the Confluent wire format.
    #[error("not in the wire format (byte 0, schema id, Avro): {0}")]
    NotWire(String),
}

/// A column's value that cannot be encoded.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{schema}.{table}.{column}: cannot encode {shown} as {expected}: {reason}. hint: {hint}")]
pub struct RefusedValue {
    pub schema: String,
    pub table: String,
    pub column: String,
    /// The text, cut at 100 characters.
    pub shown: String,
    pub expected: String,
    pub reason: String,
    pub hint: String,
}

/// Why one text cannot be encoded; the column is added where it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TextError {
    /// The text is not of its type; says what is wrong with it.
    Malformed(&'static str),
    /// A right value that the chosen form has no place for; says why, and what to set.
    NoPlace { reason: &'static str, hint: &'static str },
}

impl TextError {
    pub fn reason(&self) -> &'static str {
        match self {
            TextError::Malformed(reason) | TextError::NoPlace { reason, .. } => reason,
        }
    }

    pub fn hint(&self) -> &'static str {
        match self {
            TextError::Malformed(_) => {
                "the table is probably known in another shape than the row was written in; restart the connector, and \
                 exclude the column (column.exclude.list) if it stays"
            }
            TextError::NoPlace { hint, .. } => hint,
        }
    }
}

/// `'text'` for messages, cut at 100 characters.
pub(super) fn shown(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    match text.char_indices().nth(100) {
        Some((cut, _)) => format!("'{}…' ({} bytes)", &text[..cut], text.len()),
        None => format!("'{text}'"),
    }
}
