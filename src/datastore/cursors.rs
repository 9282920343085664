//! Where pulls stand, and the records they hold back so that the cursor may pass them.

use deadpool_postgres::GenericClient;
use serde::{Deserialize, Serialize};
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
    /// The system has shown a newer version before: only a new look tells, and this record is never applied.
    pub behind: bool,
    /// Tried again after so many seconds.
    pub retry_s: f64,
}

/// Holds a record back; the newest record of an id replaces the older.
pub async fn hold<C: GenericClient>(transaction: &C, connector: &str, hold: &Hold<'_>) -> Result<(), DatastoreError> {
    let insert = transaction
        .prepare_cached(
            "INSERT INTO tidegate.held AS h (connector, system, object, external_id, record, reason, push_seq, cursor, \
                 behind, retry_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, now() + make_interval(secs => $10::float8)) \
             ON CONFLICT (connector, object, external_id) DO UPDATE SET record = excluded.record, \
                reason = excluded.reason, push_seq = excluded.push_seq, cursor = excluded.cursor, \
                behind = excluded.behind, listed_at = now(), retry_at = excluded.retry_at, attempts = h.attempts + 1",
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
                &hold.behind,
                &hold.retry_s,
            ],
        )
        .await?;
    Ok(())
}

/// True where the held record `h` is older than the last push of its link, or than a version seen before: only a new
/// look at the system tells.
const STALE: &str = "(h.behind OR EXISTS (SELECT FROM tidegate.links l WHERE l.system = h.system AND l.object = h.object \
     AND l.external_id = h.external_id AND l.pushed_seq > h.push_seq))";
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

/// When, by the datastore's clock, and at which push sequence a listing began.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Listed {
    pub push_seq: i64,
    /// Microseconds since 1970.
    pub at_us: i64,
}

/// Cursors of held records that a listing goes back for, at the most.
const MOST_STALE: usize = 10_000;

/// What a listing that begins now must know: the push sequence, the datastore's time, and the cursors of held records
/// that have become old, or are about to (what is pushed just now may have its number already), which must be listed
/// again from there. `None`: so many that everything is to be listed.
pub async fn listing_begins<C: GenericClient>(
    client: &C,
    connector: &str,
) -> Result<(Listed, Option<Vec<Value>>), DatastoreError> {
    let select = client
        .prepare_cached(&format!(
            "SELECT CASE WHEN s.is_called THEN s.last_value ELSE 0 END, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, \
                 (SELECT json_agg(cursor) FROM (SELECT cursor FROM tidegate.held h \
                     WHERE connector = $1 AND ({STALE} OR {IN_FLIGHT}) LIMIT {}) c) \
             FROM tidegate.push_seq s",
            MOST_STALE + 1
        ))
        .await?;
    let row = client.query_one(&select, &[&connector]).await?;
    let cursors = match row.get::<_, Option<Value>>(2) {
        Some(Value::Array(cursors)) => cursors,
        _ => Vec::new(),
    };
    let listed = Listed { push_seq: row.get(0), at_us: row.get(1) };
    Ok((listed, (cursors.len() <= MOST_STALE).then_some(cursors)))
}

/// After a complete listing that began at `listed`: what a push, or a newer version, had made old before, and the
/// listing did not bring again, is not in the system any more. What was held since is for the next listing, which goes
/// back for it.
pub async fn drop_unlisted<C: GenericClient>(
    transaction: &C,
    connector: &str,
    listed: Listed,
) -> Result<u64, DatastoreError> {
    let began_us = listed.at_us as f64;
    let behind = transaction
        .prepare_cached(
            "DELETE FROM tidegate.held WHERE connector = $1 AND behind \
             AND listed_at < to_timestamp(0) + make_interval(secs => $2::float8 / 1000000)",
        )
        .await?;
    let behind = transaction.execute(&behind, &[&connector, &began_us]).await?;
    let delete = transaction
        .prepare_cached(
            "DELETE FROM tidegate.held h USING tidegate.links l WHERE h.connector = $1 AND h.push_seq < $2 \
             AND h.listed_at < to_timestamp(0) + make_interval(secs => $3::float8 / 1000000) \
             AND l.system = h.system AND l.object = h.object AND l.external_id = h.external_id AND l.intent IS NULL AND l.pushed_seq > h.push_seq AND l.pushed_seq <= $2",
        )
        .await?;
    Ok(behind + transaction.execute(&delete, &[&connector, &listed.push_seq, &began_us]).await?)
}

/// What a pull has put aside: how much of it there is, and whether any of it may be tried now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aside {
    pub held: i64,
    pub held_due: bool,
    /// Held records have become old: the system is to be asked again.
    pub stale: bool,
    pub letters_due: bool,
}

/// A look at all that `connector` has put aside, in one statement.
pub async fn put_aside<C: GenericClient>(client: &C, connector: &str) -> Result<Aside, DatastoreError> {
    let select = client
        .prepare_cached(&format!(
            "SELECT (SELECT count(*) FROM tidegate.held WHERE connector = $1), \
                 EXISTS (SELECT FROM tidegate.held h WHERE connector = $1 AND retry_at <= now() AND NOT {STALE} AND NOT {IN_FLIGHT}), \
                 EXISTS (SELECT FROM tidegate.held h WHERE connector = $1 AND {STALE}), \
                 EXISTS (SELECT FROM tidegate.parked WHERE connector = $1 AND (command IS NOT NULL OR kind <> 'rejected' OR retry_at <= now()))"
        ))
        .await?;
    let row = client.query_one(&select, &[&connector]).await?;
    Ok(Aside { held: row.get(0), held_due: row.get(1), stale: row.get(2), letters_due: row.get(3) })
}

/// Of these external ids, as text, those whose record `connector` holds or has parked; and whether it holds any record.
pub async fn ids_aside<C: GenericClient>(
    client: &C,
    connector: &str,
    object: &str,
    ids: &[String],
) -> Result<(Vec<String>, bool), DatastoreError> {
    let select = client
        .prepare_cached(
            "SELECT ARRAY(SELECT external_id FROM tidegate.held WHERE connector = $1 AND object = $2 AND external_id = ANY($3) \
                 UNION ALL SELECT key ->> 'id' FROM tidegate.parked WHERE connector = $1 AND key ->> 'id' = ANY($3)), \
                 EXISTS (SELECT FROM tidegate.held WHERE connector = $1)",
        )
        .await?;
    let row = client.query_one(&select, &[&connector, &object, &ids]).await?;
    Ok((row.get(0), row.get(1)))
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
