//! A pull's page of records against the datastore: links and rows locked in key order, what another transaction has
//! locked left out rather than waited for (CORRECTNESS 21), and rows written.

use deadpool_postgres::GenericClient;
use serde_json::{Map, Value};

use super::DatastoreError;
use super::links::{COLUMNS, Link, external_text, read};
use super::rows::{TableName, in_table, quote, utc, zoned};

/// What a caller is after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To look at; nothing is locked.
    Look,
    /// To change, within the caller's transaction.
    Lock,
}

impl Access {
    fn clause(self, of: &str) -> String {
        match self {
            Access::Look => String::new(),
            Access::Lock => format!("FOR UPDATE OF {of} SKIP LOCKED"),
        }
    }
}

/// Links of a page's records, in the order of their local keys.
#[derive(Debug, Default)]
pub struct PageLinks {
    pub links: Vec<Link>,
    /// External ids, as text, whose link another transaction has locked.
    pub busy: Vec<String>,
}

/// An id as the text that makes it unique: a string as it stands, anything else as JSON.
pub fn id_text(id: &Value) -> String {
    external_text(id)
}

pub async fn links_of_page<C: GenericClient>(
    client: &C,
    system: &str,
    object: &str,
    ids: &[String],
    access: Access,
) -> Result<PageLinks, DatastoreError> {
    let clause = access.clause("l");
    let select = client
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM tidegate.links l WHERE system = $1 AND object = $2 AND external_id = ANY($3) \
             ORDER BY local_key {clause}"
        ))
        .await?;
    let rows = client.query(&select, &[&system, &object, &ids]).await?;
    let links = rows.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let mut busy = Vec::new();
    if access == Access::Lock && links.len() < ids.len() {
        let select = client
            .prepare_cached(
                "SELECT external_id FROM tidegate.links WHERE system = $1 AND object = $2 AND external_id = ANY($3)",
            )
            .await?;
        let known: Vec<String> = links.iter().filter_map(|link| link.external.as_ref().map(external_text)).collect();
        let there = client.query(&select, &[&system, &object, &ids]).await?;
        busy = there.iter().map(|row| row.get(0)).filter(|id| !known.contains(id)).collect();
    }
    Ok(PageLinks { links, busy })
}

/// The key of the row whose create of this object has been under way, or uncertain, for longest: a record without a
/// link may be what it made. `None`: there is no such create, or its sink is no more: the create is a day old, and
/// there has been no lease of the sink for a week.
pub async fn open_create<C: GenericClient>(
    client: &C,
    system: &str,
    object: &str,
) -> Result<Option<Value>, DatastoreError> {
    let select = client
        .prepare_cached(
            "SELECT local_key FROM tidegate.links WHERE system = $1 AND object = $2 AND external_id IS NULL \
             AND intent IS NOT NULL AND (updated_at > now() - interval '1 day' OR EXISTS (SELECT FROM tidegate.leases \
                 WHERE starts_with(name, 'delivery/' || split_part(intent ->> 'owner', ':', 1) || '/') \
                 AND expires_at > now() - interval '7 days')) ORDER BY (intent ->> 'started_ms')::bigint, local_key LIMIT 1",
        )
        .await?;
    Ok(client.query_opt(&select, &[&system, &object]).await?.map(|row| row.get(0)))
}

/// Rows by key.
#[derive(Debug, Default)]
pub struct PageRows {
    pub rows: Vec<Value>,
    /// Rows, as they were at the last look, that another transaction has locked.
    pub busy: Vec<Value>,
}

/// The rows with these keys (an array of objects by column name), locked in the order of `key_columns`.
pub async fn rows_of_page<C: GenericClient>(
    client: &C,
    table: &TableName,
    key_columns: &[String],
    keys: &[Value],
    access: Access,
) -> Result<PageRows, DatastoreError> {
    if keys.is_empty() {
        return Ok(PageRows::default());
    }
    let name = table.quoted();
    let equal: Vec<_> = key_columns.iter().map(|column| format!("t.{0} = k.{0}", quote(column))).collect();
    let order: Vec<_> = key_columns.iter().map(|column| format!("t.{}", quote(column))).collect();
    let statement = |clause: &str| {
        format!(
            "SELECT row_to_json(t), {} FROM {name} t JOIN json_populate_recordset(NULL::{name}, $1) k ON {} ORDER BY {} {clause}",
            zoned(table),
            equal.join(" AND "),
            order.join(", ")
        )
    };
    let keys_json = Value::Array(keys.to_vec());
    let select =
        client.prepare_cached(&statement(&access.clause("t"))).await.map_err(|error| in_table(error, table))?;
    let rows = client.query(&select, &[&keys_json]).await.map_err(|error| in_table(error, table))?;
    let rows: Vec<Value> = rows.iter().map(shown).collect();
    let mut busy = Vec::new();
    if access == Access::Lock && rows.len() < keys.len() {
        let select = client.prepare_cached(&statement("")).await.map_err(|error| in_table(error, table))?;
        let there = client.query(&select, &[&keys_json]).await.map_err(|error| in_table(error, table))?;
        let key =
            |row: &Value| -> Vec<Value> { key_columns.iter().map(|column| row[column.as_str()].clone()).collect() };
        let locked: Vec<Vec<Value>> = rows.iter().map(key).collect();
        busy = there.iter().map(shown).filter(|row| !locked.contains(&key(row))).collect();
    }
    Ok(PageRows { rows, busy })
}

/// Rows whose `columns` are as in `values`, and that no other record of (system, object) is linked to; at most two,
/// since with two there is no telling. A row that another transaction has locked is in `busy`.
pub async fn rows_that_match<C: GenericClient>(
    client: &C,
    table: &TableName,
    (system, object): (&str, &str),
    key_columns: &[String],
    columns: &[String],
    values: &Value,
    access: Access,
) -> Result<PageRows, DatastoreError> {
    let name = table.quoted();
    let equal: Vec<_> = columns.iter().map(|column| format!("t.{0} = k.{0}", quote(column))).collect();
    let key: Vec<_> =
        key_columns.iter().map(|column| format!("'{}', t.{}", column.replace('\'', "''"), quote(column))).collect();
    let order: Vec<_> = key_columns.iter().map(|column| format!("t.{}", quote(column))).collect();
    let statement = |clause: &str| {
        format!(
            "SELECT row_to_json(t), {} FROM {name} t, json_populate_record(NULL::{name}, $1) k WHERE {} \
             AND NOT EXISTS (SELECT FROM tidegate.links l WHERE l.system = $2 AND l.object = $3 \
                 AND l.local_key = jsonb_build_object({}) AND l.external_id IS NOT NULL) ORDER BY {} LIMIT 2 {clause}",
            zoned(table),
            equal.join(" AND "),
            key.join(", "),
            order.join(", ")
        )
    };
    let look = client.prepare_cached(&statement("")).await.map_err(|error| in_table(error, table))?;
    let there = client.query(&look, &[values, &system, &object]).await.map_err(|error| in_table(error, table))?;
    let there: Vec<Value> = there.iter().map(shown).collect();
    if access == Access::Look || there.is_empty() {
        return Ok(PageRows { rows: there, busy: Vec::new() });
    }
    let select =
        client.prepare_cached(&statement(&access.clause("t"))).await.map_err(|error| in_table(error, table))?;
    let rows = client.query(&select, &[values, &system, &object]).await.map_err(|error| in_table(error, table))?;
    let rows: Vec<Value> = rows.iter().map(shown).collect();
    let busy = if rows.len() < there.len() { there } else { Vec::new() };
    Ok(PageRows { rows, busy })
}

/// A column as far as writing it goes.
#[derive(Clone, Debug)]
pub struct ColumnFacts {
    pub name: String,
    /// A default, an identity, or a generated value fills it.
    pub filled: bool,
}

/// Columns of a table in their order; empty where there is no such table.
pub async fn columns_of<C: GenericClient>(client: &C, table: &TableName) -> Result<Vec<ColumnFacts>, DatastoreError> {
    let rows = client
        .query(
            "SELECT attname::text, atthasdef OR attidentity <> '' FROM pg_attribute \
             WHERE attrelid = to_regclass($1::text) AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            &[&table.quoted()],
        )
        .await?;
    Ok(rows.iter().map(|row| ColumnFacts { name: row.get(0), filled: row.get(1) }).collect())
}

/// Inserts a row of these columns and gives the whole row as it is then. The server's own error, so that a caller
/// can tell a bad record from a bad moment.
pub async fn insert_row<C: GenericClient>(
    client: &C,
    table: &TableName,
    values: &Map<String, Value>,
) -> Result<Value, tokio_postgres::Error> {
    let name = table.quoted();
    let columns: Vec<_> = values.keys().map(|column| quote(column)).collect();
    let columns = columns.join(", ");
    let statement = format!(
        "INSERT INTO {name} AS t ({columns}) SELECT {columns} FROM json_populate_record(NULL::{name}, $1) \
         RETURNING row_to_json(t), {}",
        zoned(table)
    );
    let insert = client.prepare_cached(&statement).await?;
    Ok(shown(&client.query_one(&insert, &[&Value::Object(values.clone())]).await?))
}

/// Sets these columns of the row with this key; `None` where there is no such row.
pub async fn update_row<C: GenericClient>(
    client: &C,
    table: &TableName,
    key: &Map<String, Value>,
    values: &Map<String, Value>,
) -> Result<Option<Value>, tokio_postgres::Error> {
    let name = table.quoted();
    let set: Vec<_> = values.keys().map(|column| format!("{0} = v.{0}", quote(column))).collect();
    let equal: Vec<_> = key.keys().map(|column| format!("t.{0} = k.{0}", quote(column))).collect();
    let statement = format!(
        "UPDATE {name} AS t SET {} FROM json_populate_record(NULL::{name}, $1) v, json_populate_record(NULL::{name}, $2) k \
         WHERE {} RETURNING row_to_json(t), {}",
        set.join(", "),
        equal.join(" AND "),
        zoned(table)
    );
    let update = client.prepare_cached(&statement).await?;
    let row = client.query_opt(&update, &[&Value::Object(values.clone()), &Value::Object(key.clone())]).await?;
    Ok(row.as_ref().map(shown))
}

/// Of a statement whose columns are `row_to_json` and [`zoned`].
fn shown(row: &tokio_postgres::Row) -> Value {
    let mut value: Value = row.get(0);
    utc(&mut value, &row.get(1));
    value
}
