//! Rows of the application's tables as JSON, in the form that events have: ISO times (`timestamptz` in UTC, with
//! `Z`), exact decimals, members by column name.

use std::fmt;
use std::str::FromStr;

use deadpool_postgres::GenericClient;
use serde_json::{Map, Value};

use super::DatastoreError;

/// `schema.table`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableName {
    pub schema: String,
    pub name: String,
}

#[derive(Clone, Debug, thiserror::Error)]
#[error("'{0}' is not a table's name; it looks like public.orders")]
pub struct TableNameError(String);

impl FromStr for TableName {
    type Err = TableNameError;

    /// `orders` is `public.orders`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (schema, name) = text.split_once('.').unwrap_or(("public", text));
        if schema.is_empty() || name.is_empty() || name.contains('.') {
            return Err(TableNameError(text.to_owned()));
        }
        Ok(TableName { schema: schema.to_owned(), name: name.to_owned() })
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

impl TableName {
    /// As SQL wants it.
    pub fn quoted(&self) -> String {
        format!("{}.{}", quote(&self.schema), quote(&self.name))
    }
}

pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// SQL for the names of the table's `timestamptz` columns, arrays of them included.
pub(super) fn zoned(table: &TableName) -> String {
    format!(
        "(SELECT coalesce(json_agg(attname), '[]') FROM pg_attribute WHERE attrelid = {}::regclass AND attnum > 0 \
         AND NOT attisdropped AND atttypid IN ('timestamptz'::regtype, 'timestamptz[]'::regtype))",
        literal(&table.quoted())
    )
}

/// `…+00:00` as `…Z`, as events have it.
pub(super) fn utc(row: &mut Value, zoned: &Value) {
    fn fix(value: &mut Value) {
        match value {
            Value::String(text) if text.ends_with("+00:00") => {
                text.truncate(text.len() - 6);
                text.push('Z');
            }
            Value::Array(items) => items.iter_mut().for_each(fix),
            _ => {}
        }
    }
    let (Some(row), Some(zoned)) = (row.as_object_mut(), zoned.as_array()) else { return };
    for column in zoned.iter().filter_map(Value::as_str) {
        if let Some(value) = row.get_mut(column) {
            fix(value);
        }
    }
}

fn key_condition(table: &TableName, key: &Value) -> Result<String, DatastoreError> {
    let columns = key
        .as_object()
        .filter(|columns| !columns.is_empty())
        .ok_or_else(|| DatastoreError::rejected(format!("a row of {table} is asked for by {key}, which is no key")))?;
    let equal: Vec<_> = columns.keys().map(|column| format!("t.{0} = k.{0}", quote(column))).collect();
    Ok(equal.join(" AND "))
}

/// The row as it is now; `None` when it is gone. `key` is an object by column name.
pub async fn read_row<C: GenericClient>(
    client: &C,
    table: &TableName,
    key: &Value,
) -> Result<Option<Value>, DatastoreError> {
    let name = table.quoted();
    let select = format!(
        "SELECT row_to_json(t), {} FROM {name} t, json_populate_record(NULL::{name}, $1) k WHERE {}",
        zoned(table),
        key_condition(table, key)?
    );
    let select = client.prepare_cached(&select).await.map_err(|error| in_table(error, table))?;
    let row = client.query_opt(&select, &[key]).await.map_err(|error| in_table(error, table))?;
    Ok(row.map(|row| {
        let mut value: Value = row.get(0);
        utc(&mut value, &row.get(1));
        value
    }))
}

/// A collection of a document: rows of `table` whose `column` is the root's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lines {
    /// The document's member.
    pub name: String,
    pub table: TableName,
    pub column: String,
    /// Columns that order the lines: the table's key.
    pub order: Vec<String>,
}

/// `{key, after: row, <lines>: [row, …]}`, all read in one statement; `None` when the root row is gone.
pub async fn read_document<C: GenericClient>(
    client: &C,
    root: &TableName,
    key: &Value,
    lines: &[Lines],
) -> Result<Option<Value>, DatastoreError> {
    let name = root.quoted();
    let mut columns = vec!["row_to_json(t)".to_owned(), zoned(root)];
    for line in lines {
        let key_column = single_column(root, key)?;
        let order: Vec<_> = line.order.iter().map(|column| format!("l.{}", quote(column))).collect();
        let order = if order.is_empty() { String::new() } else { format!(" ORDER BY {}", order.join(", ")) };
        columns.push(format!(
            "(SELECT coalesce(json_agg(row_to_json(l){order}), '[]') FROM {} l WHERE l.{} = t.{})",
            line.table.quoted(),
            quote(&line.column),
            quote(key_column)
        ));
        columns.push(zoned(&line.table));
    }
    let select = format!(
        "SELECT {} FROM {name} t, json_populate_record(NULL::{name}, $1) k WHERE {}",
        columns.join(", "),
        key_condition(root, key)?
    );
    let select = client.prepare_cached(&select).await.map_err(|error| in_table(error, root))?;
    let Some(row) = client.query_opt(&select, &[key]).await.map_err(|error| in_table(error, root))? else {
        return Ok(None);
    };
    let mut document = Map::new();
    document.insert("key".into(), key.clone());
    let mut after: Value = row.get(0);
    utc(&mut after, &row.get(1));
    document.insert("after".into(), after);
    for (index, line) in lines.iter().enumerate() {
        let mut rows: Value = row.get(2 + index * 2);
        let zoned: Value = row.get(3 + index * 2);
        rows.as_array_mut().into_iter().flatten().for_each(|row| utc(row, &zoned));
        document.insert(line.name.clone(), rows);
    }
    Ok(Some(Value::Object(document)))
}

fn single_column<'a>(root: &TableName, key: &'a Value) -> Result<&'a str, DatastoreError> {
    match key.as_object() {
        Some(columns) if columns.len() == 1 => Ok(columns.keys().next().map(String::as_str).unwrap_or_default()),
        _ => Err(DatastoreError::rejected(format!(
            "{root} has a key of several columns, which 'document' can't join its lines by; hint: use 'query'"
        ))),
    }
}

/// The one row of a query of the user's, which sees the key as `$1` (jsonb): its columns are the document's
/// members; where none is called `after`, the whole row is.
pub async fn query_document<C: GenericClient>(
    client: &C,
    query: &str,
    key: &Value,
) -> Result<Option<Value>, DatastoreError> {
    let query = query.trim().trim_end_matches(';');
    let select = client
        .prepare_typed_cached(
            &format!("SELECT row_to_json(q) FROM (SELECT $1::jsonb) k (_), LATERAL ({query}\n) q LIMIT 2"),
            &[tokio_postgres::types::Type::JSONB],
        )
        .await
        .map_err(|error| DatastoreError::from(error).context("the connector's query"))?;
    let rows = client
        .query(&select, &[key])
        .await
        .map_err(|error| DatastoreError::from(error).context("the connector's query"))?;
    let [row] = rows.as_slice() else {
        return match rows.len() {
            0 => Ok(None),
            _ => Err(DatastoreError::rejected(format!(
                "the connector's query gives more than one row for {key}; hint: it must depend on $1"
            ))),
        };
    };
    let row: Value = row.get(0);
    let mut document = Map::new();
    document.insert("key".into(), key.clone());
    if row.get("after").is_none() {
        document.insert("after".into(), row.clone());
    }
    if let Value::Object(columns) = row {
        document.extend(columns);
    }
    Ok(Some(Value::Object(document)))
}

/// The rows as the table would hold and show them (types, scale, form), without any trigger: members that are not
/// there stay away. `Setup` where the table has not (any more) a column that a row has a value for.
pub async fn normalize_rows<C: GenericClient>(
    client: &C,
    table: &TableName,
    rows: &[Value],
) -> Result<Vec<Value>, DatastoreError> {
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let select =
        format!("SELECT row_to_json(t), {} FROM json_populate_recordset(NULL::{}, $1) t", zoned(table), table.quoted());
    let select = client.prepare_cached(&select).await.map_err(|error| in_table(error, table))?;
    let found = client.query(&select, &[&Value::Array(rows.to_vec())]).await.map_err(|error| in_table(error, table))?;
    let mut normal = Vec::with_capacity(rows.len());
    for (values, row) in rows.iter().zip(&found) {
        let mut row_now: Value = row.get(0);
        utc(&mut row_now, &row.get(1));
        if let (Some(row), Some(values)) = (row_now.as_object_mut(), values.as_object()) {
            row.retain(|column, _| values.contains_key(column));
            // The server passes over what it does not know, and a value would be lost in silence.
            if let Some(missing) = values.keys().find(|column| !row.contains_key(*column)) {
                return Err(DatastoreError::setup(format!("table {table} has no column {missing}")));
            }
        }
        normal.push(row_now);
    }
    Ok(normal)
}

/// Columns of the primary key, in the index's order; empty without one.
pub async fn primary_key<C: GenericClient>(client: &C, table: &TableName) -> Result<Vec<String>, DatastoreError> {
    let rows = client
        .query(
            "SELECT a.attname::text FROM pg_index i CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY k (attnum, n) \
             JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum \
             WHERE i.indrelid = to_regclass($1::text) AND i.indisprimary ORDER BY k.n",
            &[&table.quoted()],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

pub(super) fn in_table(error: tokio_postgres::Error, table: &TableName) -> DatastoreError {
    DatastoreError::from(error).context(format!("table {table}"))
}
