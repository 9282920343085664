//! Deciding under the locks, and writing what was decided, each record under its own savepoint.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};
use tokio_postgres::error::SqlState;

use super::mapped::{Mapped, Means};
use super::outcome::{Decided, Done, Verdict};
use super::{Inside, Stopped, Table};
use crate::datastore::{
    Access, DatastoreError, DatastoreErrorKind, Hold, Link, LinkKey, NewParked, ParkedKind, Transaction, drop_held,
    hold, id_text, insert_row, links_of_page, open_create, park, rows_of_page, rows_that_match, save_link, unpark,
    update_row,
};
use crate::event::Offset;
use crate::log::ConsumedRecord;
use crate::mapping::Scope;
use crate::twoway::{Conflict, Direction, Incoming, Sent, Turns, Write, moment, order, same, what_to_write};

/// When a record that the table has refused is tried again by itself for the first time; then after twice as long each
/// time, up to an hour.
const REFUSED_AGAIN: Duration = Duration::from_secs(60);

/// Where a record's row was found.
struct Target {
    key: Map<String, Value>,
    link: Option<Box<Link>>,
    paired: bool,
}

enum Found {
    Row(Target),
    /// To be inserted.
    Nothing,
    Decided(Verdict),
}

/// What a page's records are looked up in.
struct Look<'a> {
    table: &'a Table,
    /// External ids, as text, whose link another transaction has locked.
    busy: Vec<String>,
    /// The row whose create of this object is under way.
    creating: Option<Value>,
    access: Access,
}

impl Inside {
    /// What becomes of each record. With [`Access::Lock`], links and then rows are locked in the order of their keys.
    pub(super) async fn decide(
        &self,
        transaction: &Transaction<'_>,
        table: &Table,
        mapped: Vec<Mapped>,
        access: Access,
    ) -> Result<Vec<Decided>, Stopped> {
        let ids: Vec<String> = mapped.iter().map(|mapped| id_text(&mapped.id)).collect();
        let page_links = links_of_page(transaction, &self.system, &self.object, &ids, access).await?;
        let mut links: BTreeMap<String, Link> =
            page_links.links.into_iter().filter_map(|link| Some((id_text(link.external.as_ref()?), link))).collect();
        let creating = open_create(transaction, &self.system, &self.object).await?;
        let look = Look { table, busy: page_links.busy, creating, access };
        let mut found = Vec::with_capacity(mapped.len());
        for mapped in &mapped {
            let link = links.remove(&id_text(&mapped.id)).map(Box::new);
            found.push(self.find(transaction, &look, mapped, link).await?);
        }
        let mut keys: Vec<Value> = Vec::new();
        for target in found.iter().filter_map(|found| if let Found::Row(target) = found { Some(target) } else { None })
        {
            let key = Value::Object(target.key.clone());
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let page_rows = rows_of_page(transaction, &self.settings.into, &table.key, &keys, access).await?;
        let decide = |(mut mapped, found): (Mapped, Found)| {
            let verdict = match found {
                Found::Decided(verdict) => verdict,
                Found::Nothing => self.insert(&mapped),
                Found::Row(target) => {
                    let is_it =
                        |row: &&Value| target.key.iter().all(|(column, value)| same(&row[column.as_str()], value));
                    match page_rows.rows.iter().find(is_it) {
                        Some(row) => self.compare(&mut mapped, target, row),
                        None if page_rows.busy.iter().any(|row| is_it(&row)) => {
                            Verdict::hold("the row is locked by another transaction")
                        }
                        // Linked, and no row any more: deleted here; its delete is the sink's to deliver.
                        None if target.link.is_some() => Verdict::Skip("its row was deleted here"),
                        None => self.insert(&mapped),
                    }
                }
            };
            Decided { mapped, verdict }
        };
        Ok(mapped.into_iter().zip(found).map(decide).collect())
    }

    async fn find(
        &self,
        transaction: &Transaction<'_>,
        look: &Look<'_>,
        mapped: &Mapped,
        link: Option<Box<Link>>,
    ) -> Result<Found, Stopped> {
        let hold = |why: &str| Ok(Found::Decided(Verdict::hold(why)));
        let reject = |why: String| Ok(Found::Decided(Verdict::Reject(why)));
        let row = match &mapped.means {
            Means::Row(row) => row,
            Means::Nothing(why) => return Ok(Found::Decided(Verdict::Skip(why))),
            Means::Waits(why) => return hold(why),
            Means::Bad(why) => return reject(why.clone()),
        };
        let key_columns = &look.table.key;
        let own_key: Option<Map<String, Value>> =
            key_columns.iter().map(|column| Some((column.clone(), row.get(column)?.clone()))).collect();
        if own_key.as_ref().is_some_and(|key| key.values().any(Value::is_null)) {
            return hold("the row it belongs to is not there yet (the map gives null for its key)");
        }
        if !self.settings.link {
            return match own_key {
                Some(key) => Ok(Found::Row(Target { key, link: None, paired: false })),
                None => reject(format!("without a link the map must give {}", key_columns.join(", "))),
            };
        }
        if look.busy.contains(&id_text(&mapped.id)) {
            return hold("its link is locked by a delivery");
        }
        let into = &self.settings.into;
        if let Some(link) = link {
            if link.deleted {
                return Ok(Found::Decided(Verdict::Skip("its row was deleted here")));
            }
            if link.intent.is_some() || link.pushed_seq > mapped.push_seq {
                return hold("it was sent to the system after this page was fetched");
            }
            if link.table == into.to_string() && mapped.link_generation != Some(link.generation) {
                return hold("its link was changed while it was mapped");
            }
            if let Some(known) = &link.remote_version
                && !mapped.version.is_null()
                && order(&mapped.version, known).is_lt()
            {
                let why = format!("its version {} is older than {known}, which was seen before", mapped.version);
                return Ok(Found::Decided(Verdict::Hold { why, behind: true }));
            }
            if link.table != into.to_string() {
                return reject(format!("the record is linked to a row of {}; hint: set `link: false`", link.table));
            }
            return match link.key.key.clone() {
                Value::Object(key) => Ok(Found::Row(Target { key, link: Some(link), paired: false })),
                key => reject(format!("the key {key} of its link is no object")),
            };
        }
        if let Some(key) = &look.creating {
            return hold(&format!("it may be what the open create of row {key} has made"));
        }
        if let Some(key) = own_key {
            return Ok(Found::Row(Target { key, link: None, paired: true }));
        }
        let columns = &self.settings.match_columns;
        let tells = |column: &String| row.get(column).is_some_and(|value| !value.is_null());
        if columns.is_empty() || !columns.iter().all(tells) {
            return Ok(Found::Nothing);
        }
        let values = Value::Object(row.clone());
        let of = (self.system.as_str(), self.object.as_str());
        let matching = rows_that_match(transaction, into, of, key_columns, columns, &values, look.access).await?;
        if !matching.busy.is_empty() {
            return hold("the row it matches is locked by another transaction");
        }
        match matching.rows.as_slice() {
            [] => Ok(Found::Nothing),
            [row] => {
                let key = key_columns.iter().map(|column| (column.clone(), row[column.as_str()].clone())).collect();
                Ok(Found::Row(Target { key, link: None, paired: true }))
            }
            _ => reject(format!("several rows of {into} match it by {}", columns.join(", "))),
        }
    }

    fn insert(&self, mapped: &Mapped) -> Verdict {
        match &mapped.means {
            Means::Row(_) if !self.settings.insert => Verdict::Skip("it has no row here, and `insert` is false"),
            Means::Row(row) => Verdict::Insert { values: row.clone() },
            _ => Verdict::Skip("the map gives nothing"),
        }
    }

    fn compare(&self, mapped: &mut Mapped, target: Target, row: &Value) -> Verdict {
        mapped.row = row.as_object().cloned().unwrap_or_default();
        let (Means::Row(incoming), Some(row)) = (&mapped.means, row.as_object()) else {
            return Verdict::Skip("the map gives nothing");
        };
        let base = target.link.as_ref().and_then(|link| link.base_doc.as_ref()?.get("after")?.as_object());
        // Without a link to say what was agreed: a row beside the linked one is upstream's in the columns that are
        // mapped; so is a row found by its columns, unless the datastore is to win.
        let row_base = match base {
            Some(base) => Some(base),
            None if !self.settings.link => Some(row),
            None if target.link.is_none() && self.settings.policy.conflict == Conflict::Hold => Some(row),
            // Linked, and never agreed on: not overwritten.
            None => None,
        };
        let newest = self.settings.newest.as_ref();
        let time = |value: Value| moment(&value).map(SystemTime::from);
        let side = Incoming {
            incoming,
            incoming_base: mapped.before.as_ref(),
            row,
            row_base,
            sent: &mapped.sent,
            incoming_time: newest
                .and_then(|newest| newest.record.first(&mapped.record, &Scope::default()).ok())
                .and_then(time),
            row_time: newest.and_then(|newest| row.get(&newest.column).cloned()).and_then(time),
        };
        match what_to_write(&side, &self.settings.policy) {
            Write::Row { columns, .. } if !columns.is_empty() && turns(target.link.as_deref(), &columns).is_fight() => {
                let names: Vec<_> = columns.keys().map(String::as_str).collect();
                Verdict::hold(format!(
                    "both sides undo each other's changes of {}; hint: look at triggers and maps",
                    names.join(", ")
                ))
            }
            Write::Row { columns, agreed, again } => Verdict::Update {
                key: target.key,
                set: columns,
                base: agreed,
                again,
                link: target.link,
                paired: target.paired,
            },
            Write::Hold { columns } => Verdict::hold(format!("the row has unsent changes in {}", columns.join(", "))),
        }
    }

    // -- writing

    pub(super) async fn write_one(
        &self,
        transaction: &Transaction<'_>,
        table: &Table,
        decided: Decided,
        last: bool,
    ) -> Result<Done, Stopped> {
        let Decided { mapped, verdict } = decided;
        match verdict {
            Verdict::Skip(_) => {
                self.settled(transaction, &mapped).await?;
                Ok(Done::Unchanged)
            }
            Verdict::Hold { why, behind } => {
                let why = why.replace('\0', "\u{fffd}");
                tracing::debug!(connector = self.connector, id = %mapped.id, why, "held back");
                let held = Hold {
                    system: &self.system,
                    object: &self.object,
                    id: &mapped.id,
                    record: &mapped.record,
                    reason: &why,
                    push_seq: mapped.push_seq,
                    cursor: &mapped.cursor,
                    behind,
                    retry_s: self.settings.held_retry.as_secs_f64(),
                };
                hold(transaction, &self.connector, &held).await?;
                // A dead letter that is replayed waits as a held record from now on.
                unpark(transaction, &self.connector, &parked_key(&mapped.id), &self.letter(&mapped)).await?;
                self.replayed(transaction, &mapped).await?;
                Ok(Done::Held)
            }
            Verdict::Reject(why) => self.park(transaction, &mapped, NewParked::new(ParkedKind::Rejected, why)).await,
            Verdict::Insert { values } => {
                transaction.batch_execute("SAVEPOINT record").await?;
                if let Err(error) = self.insert_linked(transaction, table, &mapped, &values).await {
                    return self.refused(transaction, &mapped, json!({ "insert": values }), error, last).await;
                }
                transaction.batch_execute("RELEASE SAVEPOINT record").await?;
                self.settled(transaction, &mapped).await?;
                Ok(Done::Written)
            }
            Verdict::Update { key, set, base, again, link, .. } => {
                transaction.batch_execute("SAVEPOINT record").await?;
                if let Err(error) = self.update_linked(transaction, &mapped, &key, &set, (base, &again), link).await {
                    let request = json!({ "update": key, "set": set });
                    return self.refused(transaction, &mapped, request, error, last).await;
                }
                transaction.batch_execute("RELEASE SAVEPOINT record").await?;
                self.settled(transaction, &mapped).await?;
                Ok(if set.is_empty() { Done::Unchanged } else { Done::Written })
            }
        }
    }

    async fn insert_linked(
        &self,
        transaction: &Transaction<'_>,
        table: &Table,
        mapped: &Mapped,
        values: &Map<String, Value>,
    ) -> Result<(), RowError> {
        let row = insert_row(transaction, &self.settings.into, values).await?;
        if !self.settings.link {
            return Ok(());
        }
        let key: Map<String, Value> =
            table.key.iter().map(|column| (column.clone(), row[column.as_str()].clone())).collect();
        // What was meant, not what a trigger made of it (CORRECTNESS 15). A column that only a default can have
        // filled is as it is; any other that was not mapped was meant to be empty.
        let mut after = Map::new();
        for column in &table.columns {
            let value = match values.get(&column.name) {
                Some(value) => value.clone(),
                None if column.filled || key.contains_key(&column.name) => row[column.name.as_str()].clone(),
                None => Value::Null,
            };
            after.insert(column.name.clone(), value);
        }
        let link_key =
            LinkKey { system: self.system.clone(), object: self.object.clone(), key: Value::Object(key.clone()) };
        let mut link = Link::new(link_key, self.settings.into.to_string());
        link.base_doc = Some(json!({ "key": key, "after": after }));
        self.remember(&mut link, mapped);
        Ok(save_link(transaction, &link).await?)
    }

    async fn update_linked(
        &self,
        transaction: &Transaction<'_>,
        mapped: &Mapped,
        key: &Map<String, Value>,
        set: &Map<String, Value>,
        (base, again): (Map<String, Value>, &[String]),
        link: Option<Box<Link>>,
    ) -> Result<(), RowError> {
        let mut row = None;
        if !set.is_empty() {
            row = update_row(transaction, &self.settings.into, key, set).await?;
            if row.is_none() {
                return Err(RowError::Rejected("the row is gone".to_owned()));
            }
        }
        if !self.settings.link {
            return Ok(());
        }
        let before = link.clone();
        let mut link = match link {
            Some(link) => *link,
            None => self.link_of(transaction, key).await?,
        };
        // After an update whose answer was lost, nothing is agreed on until the sink has sent everything again.
        let unknown = link.base_doc.is_none() && link.sent.is_some();
        let sent = self.sent_after(link.sent.take(), unknown, mapped, &base, again, row.as_ref());
        let mut document = link.base_doc.take().unwrap_or_else(|| json!({ "key": key, "after": {} }));
        if let Some(after) = document.get_mut("after").and_then(Value::as_object_mut) {
            for (column, value) in base {
                // The same value in another spelling is no news.
                if after.get(&column).is_none_or(|known| !same(known, &value)) {
                    after.insert(column, value);
                }
            }
        }
        link.base_doc = (!unknown).then_some(document);
        self.remember(&mut link, mapped);
        link.sent = sent;
        if !set.is_empty() {
            link.turns = Some(turns(Some(&link), set).to_value());
        }
        if before.as_deref() != Some(&link) {
            save_link(transaction, &link).await?;
        }
        Ok(())
    }

    /// What the link is to know of its pushes from now on. `row`: as it was written, where it was.
    fn sent_after(
        &self,
        sent: Option<Value>,
        unknown: bool,
        mapped: &Mapped,
        agreed: &Map<String, Value>,
        again: &[String],
        row: Option<&Value>,
    ) -> Option<Value> {
        if unknown {
            return sent;
        }
        let sent: Sent = serde_json::from_value(sent?).ok()?;
        let Means::Row(incoming) = &mapped.means else { return None };
        let row = row.and_then(Value::as_object).unwrap_or(&mapped.row);
        let left = sent.seen(agreed, again, incoming, row);
        (!left.is_empty()).then(|| serde_json::to_value(left).unwrap_or_default())
    }

    /// The link of a row that has just been paired: new, or one that has no counterpart yet.
    async fn link_of(&self, transaction: &Transaction<'_>, key: &Map<String, Value>) -> Result<Link, RowError> {
        let of = LinkKey { system: self.system.clone(), object: self.object.clone(), key: Value::Object(key.clone()) };
        match crate::datastore::lock_link(transaction, &of).await? {
            Some(link) => match &link.external {
                None => Ok(link),
                Some(external) => Err(RowError::Rejected(format!("the row is linked to {external} already"))),
            },
            None => Ok(Link::new(of, self.settings.into.to_string())),
        }
    }

    fn remember(&self, link: &mut Link, mapped: &Mapped) {
        link.external = Some(mapped.id.clone());
        link.base_remote = Some(mapped.record.clone());
        link.sent = None;
        if !mapped.version.is_null() {
            link.remote_version = Some(mapped.version.clone());
        }
        for (name, value) in &mapped.kept {
            link.kept.insert(name.clone(), value.clone());
        }
    }

    /// The record is applied, or there is nothing to apply: what was held or parked of it is over.
    async fn settled(&self, transaction: &Transaction<'_>, mapped: &Mapped) -> Result<(), Stopped> {
        drop_held(transaction, &self.connector, &self.object, &mapped.id).await?;
        unpark(transaction, &self.connector, &parked_key(&mapped.id), &self.letter(mapped)).await?;
        self.replayed(transaction, mapped).await
    }

    /// The dead letter that the record came from is over; one under another key than the record has by now, too.
    async fn replayed(&self, transaction: &Transaction<'_>, mapped: &Mapped) -> Result<(), Stopped> {
        if let Some(letter) = &mapped.letter {
            unpark(transaction, &self.connector, &letter.0, &letter.1).await?;
        }
        Ok(())
    }

    /// After an error under the savepoint: parks the record, or gives the page up for another try.
    async fn refused(
        &self,
        transaction: &Transaction<'_>,
        mapped: &Mapped,
        request: Value,
        error: RowError,
        last: bool,
    ) -> Result<Done, Stopped> {
        let why = match error {
            RowError::Rejected(why) => why,
            RowError::Taken(why) if last => why,
            RowError::Taken(why) => return Err(Stopped::Again(why)),
            RowError::Stopped(stopped) => return Err(stopped),
        };
        transaction.batch_execute("ROLLBACK TO SAVEPOINT record; RELEASE SAVEPOINT record").await?;
        // The table, or what it refers to, may take it later.
        let retry_s = Some(REFUSED_AGAIN.as_secs_f64());
        let parked = NewParked { request: Some(request), retry_s, ..NewParked::new(ParkedKind::Rejected, why) };
        self.park(transaction, mapped, parked).await
    }

    async fn park(&self, transaction: &Transaction<'_>, mapped: &Mapped, parked: NewParked) -> Result<Done, Stopped> {
        let (key, letter, why) = (parked_key(&mapped.id), self.letter(mapped), &parked.reason);
        let of = mapped.letter.as_deref();
        let again = of.is_some_and(|(of, record)| *of == key && record.offset == letter.offset);
        if again {
            tracing::debug!(connector = self.connector, id = %mapped.id, reason = why, "a record stays parked");
        } else {
            tracing::warn!(connector = self.connector, id = %mapped.id, reason = why, "a record is parked");
        }
        if !again && let Some(dead_letters) = &self.dead_letters {
            dead_letters.copy(&letter, why).await.map_err(Stopped::Fault)?;
        }
        if !again {
            self.replayed(transaction, mapped).await?;
        }
        park(transaction, &self.connector, &key, &letter, &parked).await?;
        drop_held(transaction, &self.connector, &self.object, &mapped.id).await?;
        Ok(Done::Parked)
    }

    /// A record of a system has no place in the log: its id stands for partition and offset, so that the newest
    /// record of an id replaces the one that is parked.
    fn letter(&self, mapped: &Mapped) -> ConsumedRecord {
        let id = id_text(&mapped.id);
        ConsumedRecord {
            topic: Arc::from(format!("{}/{}", self.system, self.object)),
            partition: 0,
            offset: Offset(letter_offset(&id)),
            timestamp_ms: chrono::Utc::now().timestamp_millis(),
            key: Some(id.into_bytes().into()),
            value: Some(mapped.record.to_string().into_bytes().into()),
            headers: Vec::new(),
        }
    }
}

/// How the link goes back and forth, after one more write by a pull.
fn turns(link: Option<&Link>, columns: &Map<String, Value>) -> Turns {
    let (kept, quiet_s) = link.map_or((None, f64::INFINITY), |link| (link.turns.as_ref(), link.quiet_s));
    Turns::of(kept).after(Direction::Pull, &Value::Object(columns.clone()), quiet_s)
}

/// `{"id": …}`, or what stands for the id of a record that has none.
pub fn parked_key(id: &Value) -> Value {
    if id.is_object() { id.clone() } else { json!({ "id": id }) }
}

/// What stands for the id of a record that has none.
pub(super) fn stand_in(record: &Value) -> Value {
    json!({ "record": format!("{:016x}", letter_offset(&record.to_string())) })
}

/// 63 bits of FNV-1a: the same for the same id, wherever and whenever.
fn letter_offset(id: &str) -> i64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in id.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    i64::try_from(hash >> 1).unwrap_or(i64::MAX)
}

/// Why one row could not be written.
enum RowError {
    /// The record's own fault.
    Rejected(String),
    /// A unique key is taken: by a transaction that came first, or for good.
    Taken(String),
    Stopped(Stopped),
}

impl From<tokio_postgres::Error> for RowError {
    fn from(error: tokio_postgres::Error) -> Self {
        let taken = error.code() == Some(&SqlState::UNIQUE_VIOLATION);
        RowError::of(taken, error.into())
    }
}

impl From<DatastoreError> for RowError {
    fn from(error: DatastoreError) -> Self {
        RowError::of(error.is_taken(), error)
    }
}

impl RowError {
    fn of(taken: bool, error: DatastoreError) -> Self {
        match error.kind {
            _ if taken => RowError::Taken(error.message),
            DatastoreErrorKind::Rejected => RowError::Rejected(error.message),
            _ => RowError::Stopped(error.into()),
        }
    }
}
