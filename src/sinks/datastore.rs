//! Where pulls write: rows of the datastore's tables, with their links and the pull's cursor.
//!
//! A page of records is one transaction, tagged with its origin first. Within it: links are locked, then rows, both
//! in key order and never waited for; what is decided is decided under these locks; a row is written only where
//! something differs; the cursor moves in the same transaction, and only from where the page began.
//!
//! One bad record stops only itself: it is written under a savepoint, and parked with the server's reason. A record
//! whose row is locked, has unsent changes, or was pushed after the page was fetched is held: stored, so that the
//! cursor may pass it, and tried again (CORRECTNESS 20 to 22).

mod mapped;
mod outcome;
mod settings;
mod tenure;
mod writing;

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;

use crate::datastore::{
    Access, ColumnFacts, Datastore, DatastoreError, DatastoreErrorKind, Missing, columns_of, drop_unlisted, id_text,
    missing_grants, primary_key, save_cursor, tag,
};
use crate::event::Origin;
use crate::log::Log;
use crate::pipeline::{Counts, Destination, Fault, Status, Written};
use crate::sinks::http::dead_letters::DeadLetters;
use crate::sources::http::Page;

use mapped::MappedPage;
use outcome::{Decided, Done};
pub use settings::TableSettings;
pub use tenure::{Hold, Tenure};

/// Tries of one page when another transaction gets in its way.
const TRIES: u32 = 6;

#[derive(Clone)]
pub struct DatastoreSink(Arc<Inside>);

struct Inside {
    connector: String,
    system: String,
    object: String,
    settings: Arc<TableSettings>,
    datastore: Datastore,
    status: Arc<Status>,
    /// The right to write; `None` to look only.
    hold: Option<Hold>,
    /// Copies of what is parked, where a topic for them is set.
    dead_letters: Option<DeadLetters>,
    /// Hashes of the records parked since the connector started, by id: one that comes again as it was is passed over.
    refused: Mutex<HashMap<String, u64>>,
    table: tokio::sync::Mutex<Option<Arc<Table>>>,
    /// Columns that the table had at some time since the connector started.
    columns_seen: Mutex<HashSet<String>>,
}

/// The datastore ends a transaction in which nothing is asked for so long.
const STANDSTILL: Duration = Duration::from_secs(10);
/// Records whose refusal is remembered; beyond it they are tried anew.
const MOST_REFUSED: usize = 10_000;

fn hash(record: &Value) -> u64 {
    let mut hasher = DefaultHasher::new();
    record.to_string().hash(&mut hasher);
    hasher.finish()
}

/// Something of the table is not there: it may be altered just now, and is looked for again.
fn waits(message: String) -> Fault {
    DatastoreError::setup(message).into()
}

/// What the catalog says of the table.
struct Table {
    key: Vec<String>,
    columns: Vec<ColumnFacts>,
}

impl Table {
    fn has(&self, column: &str) -> bool {
        self.columns.iter().any(|known| known.name == column)
    }
}

/// Why a page could not be written now.
enum Stopped {
    /// Another transaction was in the way: the whole page again.
    Again(String),
    Fault(Fault),
}

impl From<DatastoreError> for Stopped {
    fn from(error: DatastoreError) -> Self {
        match error.kind {
            DatastoreErrorKind::Conflict => Stopped::Again(error.message),
            _ => Stopped::Fault(error.into()),
        }
    }
}

impl From<tokio_postgres::Error> for Stopped {
    fn from(error: tokio_postgres::Error) -> Self {
        DatastoreError::from(error).into()
    }
}

impl DatastoreSink {
    pub fn new(
        connector: &str,
        (system, object): (&str, &str),
        settings: Arc<TableSettings>,
        datastore: Datastore,
        status: Arc<Status>,
        hold: Option<Hold>,
        log: &Arc<dyn Log>,
    ) -> Self {
        let topic = settings.dead_letter_topic.as_ref();
        let dead_letters = topic.map(|topic| DeadLetters::new(log.clone(), connector, topic));
        DatastoreSink(Arc::new(Inside {
            connector: connector.to_owned(),
            system: system.to_owned(),
            object: object.to_owned(),
            settings,
            datastore,
            status,
            hold,
            dead_letters,
            refused: Mutex::default(),
            table: tokio::sync::Mutex::new(None),
            columns_seen: Mutex::default(),
        }))
    }

    /// What the page would do now; nothing is locked and nothing written.
    pub async fn preview(&self, page: &Page) -> Result<Vec<Value>, Fault> {
        let inside = &self.0;
        let table = inside.table().await?;
        let mut client = inside.datastore.client().await?;
        let mapped = inside.map(&client, page, &table).await?.mapped;
        let transaction = client.build_transaction().read_only(true).start().await.map_err(DatastoreError::from)?;
        match inside.decide(&transaction, &table, mapped, Access::Look).await {
            Ok(decided) => Ok(decided.iter().map(Decided::to_json).collect()),
            Err(Stopped::Again(reason)) => Err(Fault::retry(reason)),
            Err(Stopped::Fault(fault)) => Err(fault),
        }
    }

    /// What keeps the pull from writing: a missing right, table or column; and what a DBA may do about it, as SQL.
    pub async fn problems(&self) -> Result<Vec<Missing>, Fault> {
        let inside = &self.0;
        let client = inside.datastore.client().await?;
        let into = &inside.settings.into;
        let wanted: &[&str] =
            if inside.settings.insert { &["SELECT", "INSERT", "UPDATE"] } else { &["SELECT", "UPDATE"] };
        if let Some(missing) = missing_grants(&client, into, wanted).await? {
            // Without the right to look there is no telling what else is wrong.
            return Ok(vec![missing]);
        }
        let told = |problem: String| Missing { problem, sql: Vec::new() };
        let columns = columns_of(&client, into).await?;
        if columns.is_empty() {
            return Ok(vec![told(format!("table {into} does not exist"))]);
        }
        let has = |wanted: &String| columns.iter().any(|column| column.name == *wanted);
        let mut problems: Vec<Missing> = inside
            .settings
            .named_columns()
            .filter(|column| !has(column))
            .map(|column| told(format!("table {into} has no column '{column}'")))
            .collect();
        if inside.settings.key.is_none() && primary_key(&client, into).await?.is_empty() {
            let problem = "has no primary key; name the columns that tell its rows apart as `key`";
            problems.push(told(format!("table {into} {problem}")));
        }
        Ok(problems)
    }
}

#[async_trait]
impl Destination for DatastoreSink {
    type Batch = Page;

    async fn write(&mut self, page: Page) -> Result<Written, Fault> {
        let inside = Arc::clone(&self.0);
        Ok(Box::pin(async move { inside.apply(&page).await }))
    }

    async fn restart(&mut self) -> Result<(), Fault> {
        *self.0.table.lock().await = None;
        Ok(())
    }
}

impl Inside {
    async fn table(&self) -> Result<Arc<Table>, Fault> {
        let mut known = self.table.lock().await;
        if let Some(table) = &*known {
            return Ok(Arc::clone(table));
        }
        let client = self.datastore.client().await?;
        let into = &self.settings.into;
        let columns = columns_of(&client, into).await?;
        if columns.is_empty() {
            return Err(waits(format!("table {into}, which `into` names, does not exist")));
        }
        let key = match &self.settings.key {
            Some(key) => key.clone(),
            None => primary_key(&client, into).await?,
        };
        if key.is_empty() {
            return Err(waits(format!(
                "table {into} has no primary key; name the columns that tell its rows apart as `key`"
            )));
        }
        let table = Arc::new(Table { key, columns });
        if let Some(missing) = self.settings.named_columns().chain(&table.key).find(|column| !table.has(column)) {
            return Err(waits(format!("table {into} has no column '{missing}'")));
        }
        *known = Some(Arc::clone(&table));
        let names = table.columns.iter().map(|column| column.name.clone());
        self.columns_seen.lock().unwrap_or_else(PoisonError::into_inner).extend(names);
        Ok(table)
    }

    async fn apply(&self, page: &Page) -> Result<Counts, Fault> {
        let table = self.table().await?;
        let mut pause = Duration::from_millis(20);
        let mut last = String::new();
        for attempt in 0..TRIES {
            match self.try_apply(page, &table, attempt + 1 == TRIES).await {
                Ok(counts) => return Ok(counts),
                Err(Stopped::Fault(fault)) => return Err(fault),
                Err(Stopped::Again(reason)) => {
                    tracing::debug!(connector = self.connector, reason, "a page is written again");
                    metrics::counter!("tidegate_pull_conflicts_total", "connector" => self.connector.clone())
                        .increment(1);
                    last = reason;
                }
            }
            tokio::time::sleep(pause.mul_f64(0.5 + rand::random::<f64>())).await;
            pause *= 2;
        }
        Err(Fault::retry(format!("a page for {} was in the way of others {TRIES} times: {last}", self.settings.into)))
    }

    /// `last`: a unique key that is taken is the record's fault by now.
    async fn try_apply(&self, page: &Page, table: &Table, last: bool) -> Result<Counts, Stopped> {
        let mut client = self.datastore.client().await?;
        let MappedPage { mut mapped, unchanged, any_held } =
            self.map(&client, page, table).await.map_err(Stopped::Fault)?;
        let mut counts = Counts { skipped: unchanged, bytes: page.bytes as u64, ..Counts::default() };
        if !self.settings.link && !any_held && mapped.iter().all(|mapped| mapped.letter.is_none()) {
            // Rows beside linked ones have no base to be compared with: a look at them, without locks, comes first.
            let look = client.build_transaction().read_only(true).start().await?;
            let (same, news): (Vec<_>, Vec<_>) =
                self.decide(&look, table, mapped, Access::Look).await?.into_iter().partition(Decided::is_nothing);
            counts.skipped += same.len() as u64;
            mapped = news.into_iter().map(|decided| decided.mapped).collect();
        }
        let nothing_to_save = page.save.as_ref().is_none_or(|save| save.idle && !any_held);
        if mapped.is_empty() && nothing_to_save {
            return Ok(counts);
        }
        let transaction = client.transaction().await?;
        let origin = Origin { system: self.system.clone(), connector: self.connector.clone() };
        tag(&transaction, &origin).await?;
        // Deferred constraints would only speak up at commit, and take the whole page with them.
        let settings = format!(
            "SET LOCAL lock_timeout = '{}ms'; SET LOCAL idle_in_transaction_session_timeout = '{}s'; \
             SET CONSTRAINTS ALL IMMEDIATE",
            self.settings.lock_timeout.as_millis(),
            // A worker that stands still here holds the pull's lease.
            STANDSTILL.as_secs()
        );
        transaction.batch_execute(&settings).await?;
        if let Some(hold) = &self.hold {
            hold.check(&transaction).await.map_err(Stopped::Fault)?;
        }
        let mut parked = Vec::new();
        for decided in self.decide(&transaction, table, mapped, Access::Lock).await? {
            let (id, hash) = (id_text(&decided.mapped.id), hash(&decided.mapped.record));
            match self.write_one(&transaction, table, decided, last).await? {
                Done::Written => counts.applied += 1,
                Done::Unchanged => counts.skipped += 1,
                Done::Parked => {
                    counts.rejected += 1;
                    parked.push((id, hash));
                }
                Done::Held => counts.waiting += 1,
            }
        }
        if let Some(save) = &page.save {
            if let Some(listed) = save.listed_since
                && any_held
            {
                drop_unlisted(&transaction, &self.connector, listed).await?;
            }
            if !save.idle {
                save_cursor(&transaction, &self.connector, &save.state, save.seen).await?;
            }
        }
        transaction.commit().await?;
        if !parked.is_empty() {
            let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
            if refused.len() + parked.len() > MOST_REFUSED {
                refused.clear();
            }
            refused.extend(parked);
        }
        if counts.rejected > 0 {
            self.status.set_error(format!("{} records were parked; see `tidegate dead-letters list`", counts.rejected));
        }
        Ok(counts)
    }
}
