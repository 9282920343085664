//! Links: the pairing of a local row with its counterpart in (system, object).
//!
//! Whoever decides about a link holds its lock ([`lock_link`]) from reading it to writing it. The lock is never
//! held while a request is under way: before a request an [`Intent`] is written and committed, and the link is
//! only written on while that very intent is still there (its `id` tells).

use std::time::Duration;

use deadpool_postgres::GenericClient;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio_postgres::Row;

use super::DatastoreError;

/// Which row's link: its key is an object by column name, `{"id": 7}`.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkKey {
    pub system: String,
    pub object: String,
    pub key: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Link {
    pub key: LinkKey,
    /// `schema.table` of the local row.
    pub table: String,
    /// The counterpart's id, as the system's JSON has it; `None` while there is none.
    pub external: Option<Value>,
    /// The document `{key, after: row, …}` that the sink's map was last agreed on.
    pub base_doc: Option<Value>,
    /// The record last seen from the system.
    pub base_remote: Option<Value>,
    /// The record's version as last seen or answered, as JSON.
    pub remote_version: Option<Value>,
    /// What was sent since the record was last seen, as `twoway::Sent` has it.
    pub sent: Option<Value>,
    /// Facts kept for mappings; an object.
    pub kept: Map<String, Value>,
    pub intent: Option<Intent>,
    /// Links (object, key) that were not there when `base_doc` was sent: it was mapped without them.
    pub owed: Vec<(String, Value)>,
    /// How many of the create's steps are done.
    pub step: i32,
    /// `push_seq` at the last push.
    pub pushed_seq: i64,
    /// How it went back and forth, as `twoway::Turns` has it.
    pub turns: Option<Value>,
    /// Rises with every write.
    pub generation: i64,
    /// Seconds since the last write, as read.
    pub quiet_s: f64,
    /// The local row is gone and the system was told; kept so that a pull does not bring it back.
    pub deleted: bool,
}

impl Link {
    /// A link that is not written yet.
    pub fn new(key: LinkKey, table: impl Into<String>) -> Self {
        Link {
            key,
            table: table.into(),
            external: None,
            base_doc: None,
            base_remote: None,
            remote_version: None,
            sent: None,
            kept: Map::new(),
            intent: None,
            owed: Vec::new(),
            step: 0,
            pushed_seq: 0,
            turns: None,
            generation: 0,
            quiet_s: f64::INFINITY,
            deleted: false,
        }
    }

    /// How many of a create's `steps` are done: all, where the counterpart was not made by this create.
    pub fn steps_done(&self, steps: usize) -> usize {
        match usize::try_from(self.step) {
            Ok(0) | Err(_) if self.external.is_some() => steps,
            Ok(done) => done,
            Err(_) => 0,
        }
    }

    /// How long ago it was last written, by the datastore's clock.
    pub fn quiet(&self) -> Duration {
        Duration::try_from_secs_f64(self.quiet_s.max(0.0)).unwrap_or(Duration::MAX)
    }

    /// What `$link` and `link("object"; key)` show: `{id, …kept facts}`; `None` without a counterpart.
    pub fn shown(&self) -> Option<Value> {
        let mut shown = Map::new();
        shown.insert("id".into(), self.external.clone()?);
        for (name, value) in &self.kept {
            shown.insert(name.clone(), value.clone());
        }
        Some(Value::Object(shown))
    }
}

/// The lines of a document as delivered, so that a line's delete finds its document: (table, keys of its lines).
/// Replaces what was remembered of the document.
pub async fn save_lines<C: GenericClient>(
    transaction: &C,
    root: &LinkKey,
    lines: &[(String, Value)],
) -> Result<(), DatastoreError> {
    let delete = transaction
        .prepare_cached("DELETE FROM tidegate.document_lines WHERE system = $1 AND object = $2 AND root_key = $3")
        .await?;
    transaction.execute(&delete, &[&root.system, &root.object, &root.key]).await?;
    let insert = transaction
        .prepare_cached(
            "INSERT INTO tidegate.document_lines (system, object, table_name, line_key, root_key) \
             SELECT $1, $2, t, k, $3 FROM unnest($4::text[], $5::jsonb[]) l (t, k) \
             ON CONFLICT (system, object, table_name, line_key) DO UPDATE SET root_key = excluded.root_key",
        )
        .await?;
    let (tables, keys): (Vec<_>, Vec<_>) = lines.iter().map(|(table, key)| (table, key)).unzip();
    transaction.execute(&insert, &[&root.system, &root.object, &root.key, &tables, &keys]).await?;
    Ok(())
}

/// Key of the document that the line was last delivered in.
pub async fn root_of_line<C: GenericClient>(
    client: &C,
    system: &str,
    object: &str,
    table: &str,
    line_key: &Value,
) -> Result<Option<Value>, DatastoreError> {
    let select = client
        .prepare_cached(
            "SELECT root_key FROM tidegate.document_lines WHERE system = $1 AND object = $2 AND table_name = $3 \
             AND line_key = $4",
        )
        .await?;
    let row = client.query_opt(&select, &[&system, &object, &table, line_key]).await?;
    Ok(row.map(|row| row.get(0)))
}

/// An id as the text that makes it unique: a string as it stands, anything else as JSON.
pub(super) fn external_text(id: &Value) -> String {
    match id {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Written and committed before a request goes out, removed with its outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Intent {
    /// Unique to this attempt; outcome and intent are matched by it.
    pub id: String,
    /// `create`, `step`, `update`, `delete`.
    pub operation: String,
    /// The request for people: `POST /sale.sale`.
    pub request: String,
    /// Same for every attempt at the same create.
    pub idempotency_key: String,
    /// Lease of the worker that sends it.
    pub owner: String,
    /// Ms since 1970, by the worker's clock.
    pub started_ms: i64,
    /// Its request has come to its end so many ms after the link was written, whatever became of it: turn in the
    /// budget and time-out. Of one that has `ended`, how long it was under way.
    #[serde(default = "longest")]
    pub longest_ms: i64,
    /// Its request has come to its end before the link was last written, and nobody knows to which.
    #[serde(default)]
    pub ended: bool,
    /// The document that is being sent.
    pub document: Value,
    /// Links that are not there, and that it is sent without.
    #[serde(default)]
    pub owed: Vec<(String, Value)>,
    /// Columns that the request tells of, each with the value agreed on before.
    #[serde(default)]
    pub sent: Map<String, Value>,
}

/// Of an intent that does not say.
fn longest() -> i64 {
    300_000
}

impl Intent {
    /// How long until its outcome may be asked for: the request has ended then, and the system had `settle` more to be
    /// done with it: a system that was slow over it is given as long again. `quiet`: how long ago the link was written,
    /// by the datastore's clock. `None`: now.
    pub fn settles_in(&self, quiet: Duration, settle: Duration) -> Option<Duration> {
        let longest = Duration::from_millis(self.longest_ms.max(0) as u64);
        let rest = if self.ended { longest.max(settle) } else { longest + settle };
        rest.checked_sub(quiet).filter(|rest| !rest.is_zero())
    }
}

pub(super) const COLUMNS: &str = "system, object, local_key, table_name, external_json, base_doc, base_remote, remote_version, \
     kept, intent, step, pushed_seq, turns, generation, deleted, extract(epoch FROM now() - updated_at)::float8, owed, sent";

pub(super) fn read(row: &Row) -> Result<Link, DatastoreError> {
    let intent: Option<Value> = row.get(9);
    let intent = intent
        .map(serde_json::from_value)
        .transpose()
        .map_err(|error| DatastoreError::rejected(format!("tidegate.links: an intent can't be read: {error}")))?;
    let owed =
        row.get::<_, Option<Value>>(16).map(serde_json::from_value).transpose().map_err(|error| {
            DatastoreError::rejected(format!("tidegate.links: what is owed can't be read: {error}"))
        })?;
    let kept: Option<Value> = row.get(8);
    Ok(Link {
        key: LinkKey { system: row.get(0), object: row.get(1), key: row.get(2) },
        table: row.get(3),
        external: row.get(4),
        base_doc: row.get(5),
        base_remote: row.get(6),
        remote_version: row.get::<_, Option<String>>(7).map(|text| serde_json::from_str(&text).unwrap_or(text.into())),
        sent: row.get(17),
        kept: match kept {
            Some(Value::Object(kept)) => kept,
            _ => Map::new(),
        },
        intent,
        owed: owed.unwrap_or_default(),
        step: row.get(10),
        pushed_seq: row.get(11),
        turns: row.get(12),
        generation: row.get(13),
        deleted: row.get(14),
        quiet_s: row.get(15),
    })
}

/// Takes the link's lock until the transaction ends, also for a link that is not there yet.
pub async fn lock_link<C: GenericClient>(transaction: &C, key: &LinkKey) -> Result<Option<Link>, DatastoreError> {
    let select = transaction
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM tidegate.links WHERE system = $1 AND object = $2 AND local_key = $3 FOR UPDATE"
        ))
        .await?;
    if let Some(row) = transaction.query_opt(&select, &[&key.system, &key.object, &key.key]).await? {
        return read(&row).map(Some);
    }
    lock_absent(transaction, key).await?;
    // Whoever held the lock may have written the link meanwhile.
    let row = transaction.query_opt(&select, &[&key.system, &key.object, &key.key]).await?;
    row.as_ref().map(read).transpose()
}

/// A row that is not there can't be locked; its name can.
async fn lock_absent<C: GenericClient>(transaction: &C, key: &LinkKey) -> Result<(), DatastoreError> {
    let lock = transaction
        .prepare_cached(
            "SELECT pg_advisory_xact_lock(hashtextextended($1::text || chr(1) || $2::text, jsonb_hash_extended($3::jsonb, 0)))",
        )
        .await?;
    transaction.execute(&lock, &[&key.system, &key.object, &key.key]).await?;
    Ok(())
}

/// SQL for the `key_text` of a scalar: numbers are told apart by value, not by the zeros at their end.
pub(super) fn key_text_of(scalar: &str) -> String {
    format!(
        "CASE jsonb_typeof({scalar}) WHEN 'number' THEN trim_scale(({scalar})::numeric)::text ELSE {scalar} #>> '{{}}' END"
    )
}

/// The link as it is, unlocked. A key that is no object means the one column of the key.
pub async fn find_link<C: GenericClient>(client: &C, key: &LinkKey) -> Result<Option<Link>, DatastoreError> {
    // A scalar key's column is not named; composite keys are asked for by name.
    let by = if key.key.is_object() {
        "local_key = $3".to_owned()
    } else {
        format!("key_text = {}", key_text_of("$3::jsonb"))
    };
    let select = client
        .prepare_cached(&format!("SELECT {COLUMNS} FROM tidegate.links WHERE system = $1 AND object = $2 AND {by}"))
        .await?;
    let rows = client.query(&select, &[&key.system, &key.object, &key.key]).await?;
    rows.first().map(read).transpose()
}

/// The link of a record; with `lock`, locked until the transaction ends.
pub async fn link_by_external<C: GenericClient>(
    client: &C,
    system: &str,
    object: &str,
    id: &Value,
    lock: bool,
) -> Result<Option<Link>, DatastoreError> {
    let lock = if lock { "FOR UPDATE" } else { "" };
    let select = client
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM tidegate.links WHERE system = $1 AND object = $2 AND external_id = $3 {lock}"
        ))
        .await?;
    let row = client.query_opt(&select, &[&system, &object, &external_text(id)]).await?;
    row.as_ref().map(read).transpose()
}

/// Writes the whole link, new or not; the caller holds its lock. `Conflict` when another row is linked to the
/// same counterpart.
pub async fn save_link<C: GenericClient>(transaction: &C, link: &Link) -> Result<(), DatastoreError> {
    let save = transaction
        .prepare_cached(
            "INSERT INTO tidegate.links AS l (system, object, local_key, table_name, external_id, external_json, \
                 base_doc, base_remote, remote_version, kept, intent, step, pushed_seq, turns, deleted, owed, sent) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17) \
             ON CONFLICT (system, object, local_key) DO UPDATE SET table_name = excluded.table_name, \
                 external_id = excluded.external_id, external_json = excluded.external_json, \
                 base_doc = excluded.base_doc, base_remote = excluded.base_remote, \
                 remote_version = excluded.remote_version, kept = excluded.kept, intent = excluded.intent, \
                 step = excluded.step, pushed_seq = excluded.pushed_seq, turns = excluded.turns, \
                 deleted = excluded.deleted, owed = excluded.owed, sent = excluded.sent, generation = l.generation + 1, \
                 updated_at = now()",
        )
        .await?;
    let intent = match &link.intent {
        Some(intent) => {
            Some(serde_json::to_value(intent).map_err(|error| DatastoreError::rejected(error.to_string()))?)
        }
        None => None,
    };
    transaction
        .execute(
            &save,
            &[
                &link.key.system,
                &link.key.object,
                &link.key.key,
                &link.table,
                &link.external.as_ref().map(external_text),
                &link.external,
                &link.base_doc,
                &link.base_remote,
                &link.remote_version.as_ref().map(Value::to_string),
                &Value::Object(link.kept.clone()),
                &intent,
                &link.step,
                &link.pushed_seq,
                &link.turns,
                &link.deleted,
                &(!link.owed.is_empty()).then(|| serde_json::json!(link.owed)),
                &link.sent,
            ],
        )
        .await
        .map_err(|error| DatastoreError::from(error).context(format!("link {} {}", link.key.object, link.key.key)))?;
    Ok(())
}

pub async fn delete_link<C: GenericClient>(transaction: &C, key: &LinkKey) -> Result<(), DatastoreError> {
    let delete = transaction
        .prepare_cached("DELETE FROM tidegate.links WHERE system = $1 AND object = $2 AND local_key = $3")
        .await?;
    transaction.execute(&delete, &[&key.system, &key.object, &key.key]).await?;
    Ok(())
}

/// Gives the link of `key` the new key of its row. False when there is no link, or the new key has one already;
/// so both orders of arrival of a changed key's two events are well (CORRECTNESS 16).
pub async fn rekey_link<C: GenericClient>(
    transaction: &C,
    key: &LinkKey,
    new_key: &Value,
) -> Result<bool, DatastoreError> {
    let update = transaction
        .prepare_cached(
            "UPDATE tidegate.links l SET local_key = $4, generation = generation + 1, updated_at = now() \
             WHERE system = $1 AND object = $2 AND local_key = $3 AND NOT EXISTS (SELECT FROM tidegate.links o \
                 WHERE o.system = $1 AND o.object = $2 AND o.local_key = $4)",
        )
        .await?;
    Ok(transaction.execute(&update, &[&key.system, &key.object, &key.key, new_key]).await? > 0)
}

/// Forgets the versions that records of this object were seen with: after the system was set back, they count anew.
pub async fn forget_versions<C: GenericClient>(client: &C, system: &str, object: &str) -> Result<u64, DatastoreError> {
    let forget = "UPDATE tidegate.links SET remote_version = NULL, generation = generation + 1 \
        WHERE system = $1 AND object = $2 AND remote_version IS NOT NULL";
    Ok(client.execute(forget, &[&system, &object]).await?)
}

/// The sequence as it stands, to be noted before a pull fetches: links with a later `pushed_seq`, or an open
/// intent, may be newer than the page (CORRECTNESS 20).
pub async fn push_seq_now<C: GenericClient>(client: &C) -> Result<i64, DatastoreError> {
    let row =
        client.query_one("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM tidegate.push_seq", &[]).await?;
    Ok(row.get(0))
}

/// The next number, for a link that has just been pushed.
pub async fn next_push_seq<C: GenericClient>(transaction: &C) -> Result<i64, DatastoreError> {
    let next = transaction.prepare_cached("SELECT nextval('tidegate.push_seq')").await?;
    Ok(transaction.query_one(&next, &[]).await?.get(0))
}
