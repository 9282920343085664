//! Where pulls stand, and the records they hold back so that the cursor may pass them.

use deadpool_postgres::GenericClient;
use serde_json::Value;

use super::DatastoreError;
use super::links::external_text;

#[derive(Clone, Debug, PartialEq)]
pub struct Cursor {
    pub cursor: Value,
    /// Rises with every save; 0 before the first.
    pub generation: i64,
}

/// `null` and generation 0 for a connector that has none yet.
pub async fn load_cursor<C: GenericClient>(client: &C, connector: &str) -> Result<Cursor, DatastoreError> {
    let row =
        client.query_opt("SELECT cursor, generation FROM tidegate.cursors WHERE connector = $1", &[&connector]).await?;
    Ok(match row {
        Some(row) => Cursor { cursor: row.get::<_, Option<Value>>(0).unwrap_or_default(), generation: row.get(1) },
        None => Cursor { cursor: Value::Null, generation: 0 },
    })
}

/// Moves the cursor on from `seen`; `Lost` when another has moved it since.
pub async fn save_cursor<C: GenericClient>(
    transaction: &C,
    connector: &str,
    cursor: &Value,
    seen: i64,
) -> Result<Cursor, DatastoreError> {
    let save = transaction
        .prepare_cached(
            "INSERT INTO tidegate.cursors AS c (connector, cursor, generation) SELECT $1, $2, 1 WHERE $3 = 0::bigint \
                OR EXISTS (SELECT FROM tidegate.cursors WHERE connector = $1) \
             ON CONFLICT (connector) DO UPDATE SET cursor = excluded.cursor, generation = c.generation + 1, \
                updated_at = now() WHERE c.generation = $3 RETURNING generation",
        )
        .await?;
    match transaction.query_opt(&save, &[&connector, cursor, &seen]).await? {
        Some(row) => Ok(Cursor { cursor: cursor.clone(), generation: row.get(0) }),
        None => Err(DatastoreError::lost(format!("another worker has moved the cursor of '{connector}'"))),
    }
}

/// A record that a pull could not apply yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    pub system: String,
    pub object: String,
    pub external_id: String,
    pub record: Value,
    pub reason: String,
    pub attempts: i32,
}

/// Holds a record back, to be tried again after `retry_s` seconds; the newest record of an id replaces the older.
pub async fn hold<C: GenericClient>(
    transaction: &C,
    connector: &str,
    (system, object, id): (&str, &str, &Value),
    record: &Value,
    reason: &str,
    retry_s: f64,
) -> Result<(), DatastoreError> {
    let insert = transaction
        .prepare_cached(
            "INSERT INTO tidegate.held AS h (connector, system, object, external_id, record, reason, retry_at) \
             VALUES ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7::float8)) \
             ON CONFLICT (connector, object, external_id) DO UPDATE SET record = excluded.record, \
                reason = excluded.reason, retry_at = excluded.retry_at, attempts = h.attempts + 1",
        )
        .await?;
    transaction
        .execute(&insert, &[&connector, &system, &object, &external_text(id), record, &reason, &retry_s])
        .await?;
    Ok(())
}

/// Held records of `connector`, oldest first; with `due`, only those whose time has come.
pub async fn held<C: GenericClient>(
    client: &C,
    connector: &str,
    due: bool,
    limit: i64,
) -> Result<Vec<Held>, DatastoreError> {
    let rows = client
        .query(
            "SELECT system, object, external_id, record, reason, attempts FROM tidegate.held \
             WHERE connector = $1 AND (NOT $2 OR retry_at <= now()) ORDER BY held_at, external_id LIMIT $3",
            &[&connector, &due, &limit],
        )
        .await?;
    Ok(rows
        .iter()
        .map(|row| Held {
            system: row.get(0),
            object: row.get(1),
            external_id: row.get(2),
            record: row.get(3),
            reason: row.get(4),
            attempts: row.get(5),
        })
        .collect())
}

/// The record is applied, or superseded.
pub async fn drop_held<C: GenericClient>(
    transaction: &C,
    connector: &str,
    object: &str,
    id: &Value,
) -> Result<(), DatastoreError> {
    let delete = transaction
        .prepare_cached("DELETE FROM tidegate.held WHERE connector = $1 AND object = $2 AND external_id = $3")
        .await?;
    transaction.execute(&delete, &[&connector, &object, &external_text(id)]).await?;
    Ok(())
}
