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
    /// The push sequence noted before the record was fetched: a link pushed since is newer than the record.
    pub push_seq: i64,
    /// The record's own cursor, so that it can be listed again; null where the pull has none.
    pub cursor: Value,
    pub attempts: i32,
}

/// A record to hold back.
#[derive(Clone, Copy, Debug)]
pub struct Hold<'a> {
    pub system: &'a str,
    pub object: &'a str,
    pub id: &'a Value,
    pub record: &'a Value,
    pub reason: &'a str,
    pub push_seq: i64,
    pub cursor: &'a Value,
    /// Tried again after so many seconds.
    pub retry_s: f64,
}

/// Holds a record back; the newest record of an id replaces the older.
pub async fn hold<C: GenericClient>(transaction: &C, connector: &str, hold: &Hold<'_>) -> Result<(), DatastoreError> {
    let insert = transaction
        .prepare_cached(
            "INSERT INTO tidegate.held AS h (connector, system, object, external_id, record, reason, push_seq, cursor, \
                 retry_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, now() + make_interval(secs => $9::float8)) \
             ON CONFLICT (connector, object, external_id) DO UPDATE SET record = excluded.record, \
                reason = excluded.reason, push_seq = excluded.push_seq, cursor = excluded.cursor, \
                retry_at = excluded.retry_at, attempts = h.attempts + 1",
        )
        .await?;
    let id = external_text(hold.id);
    transaction
        .execute(
            &insert,
            &[
                &connector,
                &hold.system,
                &hold.object,
                &id,
                hold.record,
                &hold.reason,
                &hold.push_seq,
                hold.cursor,
                &hold.retry_s,
            ],
        )
        .await?;
    Ok(())
}

/// True where the held record `h` is older than the last push of its link: only a new look at the system tells.
const STALE: &str = "EXISTS (SELECT FROM tidegate.links l WHERE l.system = h.system AND l.object = h.object \
     AND l.external_id = h.external_id AND l.pushed_seq > h.push_seq)";
/// True while something is being sent to the counterpart of the held record `h`: how that ends tells whether the
/// record has become old, and a look at the system before is too early.
const IN_FLIGHT: &str = "EXISTS (SELECT FROM tidegate.links l WHERE l.system = h.system AND l.object = h.object \
     AND l.external_id = h.external_id AND l.intent IS NOT NULL)";

/// Held records of `connector`, oldest first; with `due`, only those whose time has come and that may be tried as
/// they are: no push has made them old, and none is under way.
pub async fn held<C: GenericClient>(
    client: &C,
    connector: &str,
    due: bool,
    limit: i64,
) -> Result<Vec<Held>, DatastoreError> {
    let select = client
        .prepare_cached(&format!(
            "SELECT system, object, external_id, record, reason, push_seq, cursor, attempts FROM tidegate.held h \
             WHERE connector = $1 AND (NOT $2 OR (retry_at <= now() AND NOT {STALE} AND NOT {IN_FLIGHT})) \
             ORDER BY held_at, external_id LIMIT $3"
        ))
        .await?;
    let rows = client.query(&select, &[&connector, &due, &limit]).await?;
    Ok(rows
        .iter()
        .map(|row| Held {
            system: row.get(0),
            object: row.get(1),
            external_id: row.get(2),
            record: row.get(3),
            reason: row.get(4),
            push_seq: row.get(5),
            cursor: row.get::<_, Option<Value>>(6).unwrap_or_default(),
            attempts: row.get(7),
        })
        .collect())
}

/// Cursors of the held records that a push has made old: they must be listed again from there.
pub async fn stale_cursors<C: GenericClient>(client: &C, connector: &str) -> Result<Vec<Value>, DatastoreError> {
    let select = client
        .prepare_cached(&format!("SELECT cursor FROM tidegate.held h WHERE connector = $1 AND {STALE} LIMIT 10000"))
        .await?;
    let rows = client.query(&select, &[&connector]).await?;
    Ok(rows.iter().map(|row| row.get::<_, Option<Value>>(0).unwrap_or_default()).collect())
}

/// After a complete listing that began at `push_seq`: what a push had made old before, and the listing did not
/// bring again, is not in the system any more.
pub async fn drop_unlisted<C: GenericClient>(
    transaction: &C,
    connector: &str,
    push_seq: i64,
) -> Result<u64, DatastoreError> {
    let delete = transaction
        .prepare_cached(
            "DELETE FROM tidegate.held h USING tidegate.links l WHERE h.connector = $1 AND h.push_seq < $2 \
             AND l.system = h.system AND l.object = h.object AND l.external_id = h.external_id \
             AND l.intent IS NULL AND l.pushed_seq > h.push_seq AND l.pushed_seq <= $2",
        )
        .await?;
    Ok(transaction.execute(&delete, &[&connector, &push_seq]).await?)
}

/// How many records `connector` holds back.
pub async fn held_count<C: GenericClient>(client: &C, connector: &str) -> Result<i64, DatastoreError> {
    Ok(client.query_one("SELECT count(*) FROM tidegate.held WHERE connector = $1", &[&connector]).await?.get(0))
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
