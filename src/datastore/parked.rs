//! Records that were rejected, wait for another row's link, or stand behind one of those, in order per key.
//!
//! A record is parked before its offset is committed (CORRECTNESS 17). The first of a key's queue says why; those
//! behind it wait for their turn. People and the command line only set a command; the connector that owns the
//! record's partition executes it. What the datastore may have mended meanwhile is tried again by itself: a dead letter
//! when the link is there that it waited for, or when its row has changed ([`heal`]).

use std::time::SystemTime;

use deadpool_postgres::GenericClient;
use serde::Serialize;
use serde_json::Value;
use tokio_postgres::Row;

use super::DatastoreError;
use super::links::key_text_of;
use crate::event::Offset;
use crate::log::ConsumedRecord;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ParkedKind {
    Rejected,
    /// For another row's link.
    Waiting,
    /// For the first of its key's queue.
    Behind,
    /// Delivered without another row's link, which it is sent again with; nothing stands behind it.
    Owing,
}

impl ParkedKind {
    fn text(self) -> &'static str {
        match self {
            ParkedKind::Rejected => "rejected",
            ParkedKind::Waiting => "waiting",
            ParkedKind::Behind => "behind",
            ParkedKind::Owing => "owing",
        }
    }

    fn parse(text: &str) -> Self {
        match text {
            "waiting" => ParkedKind::Waiting,
            "behind" => ParkedKind::Behind,
            "owing" => ParkedKind::Owing,
            _ => ParkedKind::Rejected,
        }
    }
}

/// What a person asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    Replay,
    Drop,
}

/// Why a record that stands behind another is parked.
pub const BEHIND: &str = "stands behind an earlier record of its key";

/// Why a record is parked.
#[derive(Clone, Debug)]
pub struct NewParked {
    pub kind: ParkedKind,
    /// The link waited for: system, object, key.
    pub waits_for: Option<(String, String, Value)>,
    pub reason: String,
    pub request: Option<Value>,
    pub response: Option<Value>,
    /// Seconds from now until waiting becomes a dead letter.
    pub deadline_s: Option<f64>,
    /// Rejected for what the row is now: a later change of it is tried in its place.
    pub heals: bool,
    /// Seconds from now until it is tried again by itself; doubled with each try, up to an hour.
    pub retry_s: Option<f64>,
}

impl NewParked {
    pub fn new(kind: ParkedKind, reason: impl Into<String>) -> Self {
        NewParked {
            kind,
            waits_for: None,
            reason: reason.into(),
            request: None,
            response: None,
            deadline_s: None,
            heals: false,
            retry_s: None,
        }
    }
}

/// A parked record without its bytes.
#[derive(Clone, Debug, Serialize)]
pub struct ParkedSummary {
    pub connector: String,
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub key: Value,
    pub kind: ParkedKind,
    pub waits_for: Option<Value>,
    pub reason: String,
    pub request: Option<Value>,
    pub response: Option<Value>,
    pub attempts: i32,
    /// RFC 3339.
    pub parked_at: String,
    pub command: Option<Command>,
}

#[derive(Clone, Debug)]
pub struct Parked {
    pub summary: ParkedSummary,
    /// When waiting ends.
    pub deadline: Option<SystemTime>,
    /// The link waited for is there, or the row has changed since.
    pub satisfied: bool,
    /// As it was read from the log; headers included.
    pub record: ConsumedRecord,
}

/// How much of the queues is taken up at once: records, and bytes of their keys and values; one record at the least.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub records: i64,
    pub bytes: i64,
}

/// Of a request or an answer, members with more text than this are cut.
const SHOWN: usize = 32 << 10;

const SUMMARY: &str = "p.connector, p.topic, p.partition, p.\"offset\", p.key, p.kind, p.waits_system, p.waits_object, \
     p.waits_key, p.reason, p.request, p.response, p.attempts, \
     to_char(p.parked_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), p.command";

/// What is needed to deliver it: what people are shown is left where it is.
fn work() -> String {
    SUMMARY.replace("p.request, p.response", "NULL::json, NULL::json")
        + ", p.record_key, p.record_value, p.headers, p.deadline"
}

/// The rows of `select`, of columns `p.*` and `satisfied`, in the order of `seq` as far as there is room for them.
fn within(select: &str, bytes: &str) -> String {
    format!(
        "SELECT {}, p.satisfied FROM (SELECT p.*, sum(p.size) OVER (ORDER BY p.seq) - p.size AS before FROM ({select}) p) p \
         WHERE p.before < {bytes}::bigint ORDER BY p.seq",
        work()
    )
}

/// Of keys and values, in bytes.
const SIZE: &str = "coalesce(octet_length(p.record_key), 0) + coalesce(octet_length(p.record_value), 0) + \
     coalesce(pg_column_size(p.headers), 0) AS size";

/// True when the time has come that `p` was to be tried again at, or the link that it waits for has a counterpart: asked
/// for by key and by the text of a key, so that each question has its index.
fn satisfied() -> String {
    let link = "EXISTS (SELECT FROM tidegate.links l WHERE l.system = p.waits_system AND l.object = p.waits_object \
         AND l.external_id IS NOT NULL AND NOT l.deleted \
         AND coalesce(l.intent->>'operation', 'update') IN ('update', 'delete')";
    let text = key_text_of("p.waits_key");
    format!(
        "(coalesce(p.retry_at <= now(), false) OR p.waits_key IS NOT NULL AND {link} AND l.local_key = p.waits_key) \
         OR p.waits_key IS NOT NULL AND jsonb_typeof(p.waits_key) <> 'object' AND {link} AND l.key_text = {text}))"
    )
}

fn summary(row: &Row) -> ParkedSummary {
    let kind: String = row.get(5);
    let waits: (Option<String>, Option<String>, Option<Value>) = (row.get(6), row.get(7), row.get(8));
    let command: Option<String> = row.get(14);
    ParkedSummary {
        connector: row.get(0),
        topic: row.get(1),
        partition: row.get(2),
        offset: row.get(3),
        key: row.get(4),
        kind: ParkedKind::parse(&kind),
        waits_for: waits.2.map(|key| serde_json::json!({"system": waits.0, "object": waits.1, "key": key})),
        reason: row.get(9),
        request: row.get(10),
        response: row.get(11),
        attempts: row.get(12),
        parked_at: row.get(13),
        command: command.map(|text| if text == "drop" { Command::Drop } else { Command::Replay }),
    }
}

fn parked(row: &Row) -> Parked {
    let summary = summary(row);
    let headers: Option<Value> = row.get(17);
    let headers = headers.as_ref().and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let bytes = |column: usize| row.get::<_, Option<Vec<u8>>>(column).map(Into::into);
    let record = ConsumedRecord {
        topic: summary.topic.as_str().into(),
        partition: summary.partition,
        offset: Offset(summary.offset),
        timestamp_ms: 0,
        key: bytes(15),
        value: bytes(16),
        headers: headers
            .iter()
            .filter_map(|pair| Some((pair.get(0)?.as_str()?.into(), unhex(pair.get(1)?.as_str()?)?.into())))
            .collect(),
    };
    Parked { deadline: row.get(18), satisfied: row.get(19), record, summary }
}

/// Parks a record of `connector` at the end of its key's queue; parking the same record again changes why.
pub async fn park<C: GenericClient>(
    transaction: &C,
    connector: &str,
    key: &Value,
    record: &ConsumedRecord,
    why: &NewParked,
) -> Result<(), DatastoreError> {
    // What an expression says of its failure is any text; the datastore's hold no NUL.
    let reason = why.reason.replace('\0', "\u{fffd}");
    let (system, object, waits_key) = match &why.waits_for {
        Some((system, object, key)) => (Some(system), Some(object), Some(key)),
        None => (None, None, None),
    };
    let insert = transaction
        .prepare_cached(
            "INSERT INTO tidegate.parked AS p (connector, topic, \"partition\", \"offset\", key, kind, waits_system, \
                 waits_object, waits_key, reason, request, response, deadline, record_key, record_value, headers, \
                 heals, retry_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, \
                 now() + make_interval(secs => $13::float8), $14, $15, $16, $17, \
                 now() + make_interval(secs => $18::float8)) \
             ON CONFLICT (connector, topic, \"partition\", \"offset\", key) DO UPDATE SET kind = excluded.kind, \
                 waits_system = excluded.waits_system, waits_object = excluded.waits_object, \
                 waits_key = excluded.waits_key, reason = excluded.reason, request = excluded.request, \
                 response = excluded.response, attempts = p.attempts + 1, command = NULL, heals = excluded.heals, \
                 tried_at = now(), retry_at = now() + least((excluded.retry_at - now()) * power(2, least(p.attempts, 20)), \
                     interval '1 hour'), \
                 deadline = CASE WHEN excluded.deadline IS NULL THEN NULL \
                     ELSE coalesce(p.deadline, excluded.deadline) END",
        )
        .await?;
    transaction
        .execute(
            &insert,
            &[
                &connector,
                &record.topic.as_ref(),
                &record.partition,
                &record.offset.0,
                key,
                &why.kind.text(),
                &system,
                &object,
                &waits_key,
                &reason,
                &why.request.as_ref().map(cut),
                &why.response.as_ref().map(cut),
                &why.deadline_s,
                &record.key.as_deref(),
                &record.value.as_deref(),
                &headers(record),
                &why.heals,
                &why.retry_s,
            ],
        )
        .await?;
    Ok(())
}

/// Whether the key has a queue: a later record of the key must stand behind it.
pub async fn has_queue<C: GenericClient>(client: &C, connector: &str, key: &Value) -> Result<bool, DatastoreError> {
    let select = client
        .prepare_cached(
            "SELECT EXISTS (SELECT FROM tidegate.parked WHERE connector = $1 AND key = $2 AND kind <> 'owing')",
        )
        .await?;
    Ok(client.query_one(&select, &[&connector, key]).await?.get(0))
}

/// Parks the record at the end of its key's queue, to wait for its turn. False where it is parked already: it keeps its
/// place and its reason.
pub async fn park_behind<C: GenericClient>(
    transaction: &C,
    connector: &str,
    key: &Value,
    record: &ConsumedRecord,
) -> Result<bool, DatastoreError> {
    let insert = transaction
        .prepare_cached(
            "INSERT INTO tidegate.parked (connector, topic, \"partition\", \"offset\", key, kind, reason, record_key, \
                 record_value, headers) VALUES ($1, $2, $3, $4, $5, 'behind', $6, $7, $8, $9) ON CONFLICT DO NOTHING",
        )
        .await?;
    let made = transaction
        .execute(
            &insert,
            &[
                &connector,
                &record.topic.as_ref(),
                &record.partition,
                &record.offset.0,
                key,
                &BEHIND,
                &record.key.as_deref(),
                &record.value.as_deref(),
                &headers(record),
            ],
        )
        .await?;
    Ok(made > 0)
}

/// A later record of the key was parked behind: the first of its queue is tried again, where a change of the row may
/// mend it; soon, and after more tries in vain up to a minute after the last one.
pub async fn heal<C: GenericClient>(transaction: &C, connector: &str, key: &Value) -> Result<(), DatastoreError> {
    let update = transaction
        .prepare_cached(
            "UPDATE tidegate.parked p SET retry_at = greatest(now(), p.tried_at + least(interval '1 minute', \
                 interval '1 second' * (power(2, least(p.attempts, 10) - 1) - 1))) \
             WHERE p.connector = $1 AND p.key = $2 AND (p.kind = 'waiting' OR p.kind = 'rejected' AND p.heals) \
               AND p.seq = (SELECT min(seq) FROM tidegate.parked WHERE connector = $1 AND key = $2 AND kind <> 'owing')",
        )
        .await?;
    transaction.execute(&update, &[&connector, key]).await?;
    Ok(())
}

/// Whose parked records a worker sees to.
#[derive(Clone, Debug, Default)]
pub struct Owned {
    /// Topic and partition of each partition that it reads.
    pub topics: Vec<String>,
    pub partitions: Vec<i32>,
    /// Those of topics other than these, too, which nobody reads any more.
    pub strays_of: Option<Vec<String>>,
}

impl Owned {
    /// Every record of the connector.
    pub fn all() -> Self {
        Owned { strays_of: Some(Vec::new()), ..Owned::default() }
    }
}

/// Heads of queues that may be tried now: told to, their link is there, their row has changed, their time is up, or
/// nothing is before them any more. Of what is `owned`, oldest first, as far as there is room.
pub async fn parked_ready<C: GenericClient>(
    client: &C,
    connector: &str,
    owned: &Owned,
    room: Room,
) -> Result<Vec<Parked>, DatastoreError> {
    let satisfied = satisfied();
    let ready = format!(
        "SELECT p.*, {SIZE}, {satisfied} AS satisfied FROM tidegate.parked p WHERE p.connector = $1 \
           AND (p.command IS NOT NULL OR p.kind = 'behind' OR {satisfied} \
                OR (p.kind IN ('waiting', 'owing') AND p.deadline < now())) \
           AND (p.command = 'drop' OR NOT EXISTS (SELECT FROM tidegate.parked b WHERE b.connector = p.connector \
                AND b.key = p.key AND b.kind <> 'owing' AND b.seq <> p.seq AND (b.seq < p.seq OR p.kind = 'owing'))) \
           AND ((p.topic, p.\"partition\") IN (SELECT * FROM unnest($3::text[], $4::int[])) \
                OR p.topic <> ALL ($5::text[])) \
         ORDER BY p.seq LIMIT $2"
    );
    let select = client.prepare_cached(&within(&ready, "$6")).await?;
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
        [&connector, &room.records, &owned.topics, &owned.partitions, &owned.strays_of, &room.bytes];
    Ok(client.query(&select, &parameters).await?.iter().map(parked).collect())
}

/// Whether anything was ever parked here: the first connector that may park makes the table.
pub async fn has_parked<C: GenericClient>(client: &C) -> Result<bool, DatastoreError> {
    let row = client.query_one("SELECT to_regclass('tidegate.parked') IS NOT NULL", &[]).await?;
    Ok(row.get(0))
}

/// How many are parked, by connector and kind; of one connector or all.
pub async fn parked_counts<C: GenericClient>(
    client: &C,
    connector: Option<&str>,
) -> Result<Vec<(String, ParkedKind, i64)>, DatastoreError> {
    let rows = match connector {
        Some(connector) => {
            let one = "SELECT connector, kind, count(*) FROM tidegate.parked WHERE connector = $1 \
                       GROUP BY connector, kind ORDER BY 1, 2";
            client.query(one, &[&connector]).await?
        }
        None => {
            let all = "SELECT connector, kind, count(*) FROM tidegate.parked GROUP BY connector, kind ORDER BY 1, 2";
            client.query(all, &[]).await?
        }
    };
    Ok(rows.iter().map(|row| (row.get(0), ParkedKind::parse(row.get(1)), row.get(2))).collect())
}

/// The queue of a key, oldest first, as far as there is room: what stands in order, or what is `owing`.
pub async fn parked_queue<C: GenericClient>(
    client: &C,
    connector: &str,
    key: &Value,
    owing: bool,
    room: Room,
) -> Result<Vec<Parked>, DatastoreError> {
    let queue = format!(
        "SELECT p.*, {SIZE}, {} AS satisfied FROM tidegate.parked p WHERE p.connector = $1 AND p.key = $2 \
         AND (p.kind = 'owing') = $4 ORDER BY p.seq LIMIT $3",
        satisfied()
    );
    let select = client.prepare_cached(&within(&queue, "$5")).await?;
    let rows = client.query(&select, &[&connector, key, &room.records, &owing, &room.bytes]).await?;
    Ok(rows.iter().map(parked).collect())
}

/// Forgets what the key owes, and parks its record anew as owing where it does so still; it keeps its deadline.
pub async fn owe<C: GenericClient>(
    transaction: &C,
    connector: &str,
    key: &Value,
    still: Option<(&ConsumedRecord, &NewParked)>,
) -> Result<(), DatastoreError> {
    let forget = transaction
        .prepare_cached(
            "WITH gone AS (DELETE FROM tidegate.parked WHERE connector = $1 AND key = $2 AND kind = 'owing' \
             RETURNING deadline) SELECT extract(epoch FROM min(deadline) - now())::float8 FROM gone",
        )
        .await?;
    let left: Option<f64> = transaction.query_one(&forget, &[&connector, key]).await?.get(0);
    if let Some((record, why)) = still {
        let deadline_s = left.or(why.deadline_s);
        park(transaction, connector, key, record, &NewParked { deadline_s, ..why.clone() }).await?;
    }
    Ok(())
}

/// Takes the record out of its key's queue.
pub async fn unpark<C: GenericClient>(
    transaction: &C,
    connector: &str,
    key: &Value,
    record: &ConsumedRecord,
) -> Result<(), DatastoreError> {
    let delete = transaction
        .prepare_cached(
            "DELETE FROM tidegate.parked WHERE connector = $1 AND topic = $2 AND \"partition\" = $3 \
             AND \"offset\" = $4 AND key = $5",
        )
        .await?;
    transaction
        .execute(&delete, &[&connector, &record.topic.as_ref(), &record.partition, &record.offset.0, key])
        .await?;
    Ok(())
}

/// Parked records for people, oldest first; of one connector or all.
pub async fn list_parked<C: GenericClient>(
    client: &C,
    connector: Option<&str>,
    limit: i64,
) -> Result<Vec<ParkedSummary>, DatastoreError> {
    let rows = client
        .query(
            &format!(
                "SELECT {SUMMARY} FROM tidegate.parked p WHERE $1::text IS NULL OR p.connector = $1 \
                 ORDER BY p.seq LIMIT $2"
            ),
            &[&connector, &limit],
        )
        .await?;
    Ok(rows.iter().map(summary).collect())
}

/// One parked record, with its bytes.
pub async fn show_parked<C: GenericClient>(
    client: &C,
    connector: &str,
    topic: &str,
    partition: i32,
    offset: i64,
) -> Result<Option<Parked>, DatastoreError> {
    let rows = client
        .query(
            &format!(
                "SELECT {SUMMARY}, p.record_key, p.record_value, p.headers, p.deadline, {} FROM tidegate.parked p \
                 WHERE p.connector = $1 AND p.topic = $2 AND p.partition = $3 AND p.\"offset\" = $4 ORDER BY p.seq",
                satisfied()
            ),
            &[&connector, &topic, &partition, &offset],
        )
        .await?;
    Ok(rows.first().map(parked))
}

/// Asks the owner of the records to replay or drop them: one record where it is named, else all of the
/// connector that are not just standing behind another. Returns how many were asked for.
pub async fn command_parked<C: GenericClient>(
    client: &C,
    connector: &str,
    record: Option<(&str, i32, i64)>,
    command: Command,
) -> Result<u64, DatastoreError> {
    let text = match command {
        Command::Replay => "replay",
        Command::Drop => "drop",
    };
    let (topic, partition, offset) = match record {
        Some((topic, partition, offset)) => (Some(topic), Some(partition), Some(offset)),
        None => (None, None, None),
    };
    Ok(client
        .execute(
            "UPDATE tidegate.parked SET command = $2 WHERE connector = $1 \
             AND CASE WHEN $3::text IS NULL THEN kind <> 'behind' OR $2 = 'drop' \
                 ELSE topic = $3 AND \"partition\" = $4::int AND \"offset\" = $5::bigint END",
            &[&connector, &text, &topic, &partition, &offset],
        )
        .await?)
}

fn headers(record: &ConsumedRecord) -> Value {
    record.headers.iter().map(|(name, value)| serde_json::json!([name.as_ref(), hex(value)])).collect()
}

/// What people are shown of a request or an answer: long members by their beginning.
fn cut(shown: &Value) -> Value {
    let Some(members) = shown.as_object() else { return shown.clone() };
    let short = |value: &Value| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        match text.char_indices().map(|(at, _)| at).find(|at| *at >= SHOWN) {
            Some(end) => format!("{}… ({} bytes in all)", &text[..end], text.len()).into(),
            None => value.clone(),
        }
    };
    Value::Object(members.iter().map(|(name, value)| (name.clone(), short(value))).collect())
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}
