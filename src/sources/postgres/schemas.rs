//! What each table looked like, by LSN: kept in the log, in a topic of the capture's own.
//!
//! The WAL carries a table's names, types and identity; nullability, defaults, labels of an enum and the order of the
//! key are only in the catalog, which a backlog finds newer than its rows (CORRECTNESS 7). What a table was taken for
//! is therefore written down, and is preferred to the catalog after a restart.
//!
//! Invariant: a table that rows are written by is in the topic at the latest in the batch of the first of them, so that
//! it is durable whenever a position behind that row is.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event::{HeaderSet, Lsn, Oid, RecordBatch, SharedTable};
use crate::log::{Log, PollLimit, StartAt, StopAt, TopicSpec};
use crate::pipeline::Fault;

use super::settings::CaptureSettings;

/// A table from an LSN on; the value of a record, as JSON. LSNs of an earlier epoch say nothing any more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    epoch: u64,
    from: Lsn,
    #[serde(with = "shared")]
    table: SharedTable,
}

mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::event::{SharedTable, Table};

    pub fn serialize<S: Serializer>(table: &SharedTable, serializer: S) -> Result<S::Ok, S::Error> {
        table.as_ref().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SharedTable, D::Error> {
        Table::deserialize(deserializer).map(Arc::new)
    }
}

/// The topic's content, and what is on its way there.
pub(super) struct Schemas {
    topic: Arc<str>,
    entries: HashMap<Oid, Vec<Entry>>,
    /// In the batch that is being written: forgotten with it.
    unwritten: Vec<Entry>,
    loaded: bool,
}

/// The topic's name, `tidegate.schemas.CONNECTOR`: no topic of events, as prefixes are followed by a schema's name.
pub(super) fn topic(connector: &str) -> String {
    format!("tidegate.schemas.{connector}")
}

/// How the topic is made: nothing in it ever grows too old.
pub(super) fn topic_spec(connector: &str, settings: &CaptureSettings) -> TopicSpec {
    let kept = [("cleanup.policy", "delete"), ("retention.ms", "-1"), ("retention.bytes", "-1")];
    TopicSpec {
        name: topic(connector),
        partitions: 1,
        replication_factor: settings.replication_factor,
        settings: BTreeMap::from(kept.map(|(name, value)| (name.to_owned(), value.to_owned()))),
    }
}

impl Schemas {
    pub(super) fn new(connector: &str) -> Self {
        Schemas { topic: topic(connector).into(), entries: HashMap::new(), unwritten: Vec::new(), loaded: false }
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.loaded
    }

    /// Takes what [`read`] found for all that is durable.
    pub(super) fn load(&mut self, found: Vec<Found>) {
        self.entries.clear();
        self.unwritten.clear();
        for Found(entry) in found {
            self.entries.entry(entry.table.oid).or_default().push(entry);
        }
        self.loaded = true;
    }

    /// What is in memory may not be in the log: it is read again before it is used.
    pub(super) fn unload(&mut self) {
        self.unwritten.clear();
        self.loaded = false;
    }

    /// The batch was handed on, with so many records of this topic.
    pub(super) fn handed_on(&mut self) -> usize {
        let count = self.unwritten.len();
        for entry in self.unwritten.drain(..) {
            self.entries.entry(entry.table.oid).or_default().push(entry);
        }
        count
    }

    /// The batch was given up.
    pub(super) fn given_up(&mut self) {
        self.unwritten.clear();
    }

    /// What the table was at `lsn`, as far as it is known: the newest that is not of later.
    pub(super) fn at(&self, oid: Oid, epoch: u64, lsn: Lsn) -> Option<&SharedTable> {
        let written = self.entries.get(&oid).into_iter().flatten();
        let all = written.chain(self.unwritten.iter().filter(|entry| entry.table.oid == oid));
        let there = all.filter(|entry| entry.epoch < epoch || (entry.epoch == epoch && entry.from <= lsn));
        // Of equals the last, which was written later.
        there.max_by_key(|entry| (entry.epoch, entry.from)).map(|entry| &entry.table)
    }

    /// Writes down that rows from `lsn` on are taken for `table`, where that is news.
    pub(super) fn note(&mut self, table: &SharedTable, epoch: u64, lsn: Lsn, batch: &mut RecordBatch) {
        if self.at(table.oid, epoch, lsn) == Some(table) {
            return;
        }
        let entry = Entry { epoch, from: lsn, table: table.clone() };
        // Names and numbers only: it can always be written.
        let Ok(value) = serde_json::to_vec(&entry) else { return };
        let key = table.oid.to_string();
        batch.push(&self.topic, Some(key.as_bytes()), Some(&value), &HeaderSet::default());
        self.unwritten.push(entry);
    }
}

/// An entry of the topic.
pub(super) struct Found(Entry);

/// Makes the topic where it is missing, and reads it.
pub(super) async fn read(log: &Arc<dyn Log>, connector: &str, settings: &CaptureSettings) -> Result<Vec<Found>, Fault> {
    const DEADLINE: Duration = Duration::from_secs(60);
    let reading = async {
        log.ensure_topic(&topic_spec(connector, settings)).await?;
        let mut reader = log.reader(&topic(connector), StartAt::Beginning, StopAt::End).await?;
        let limit = PollLimit { bytes: 4 << 20, records: 10_000, wait: Duration::from_millis(200) };
        let mut found = Vec::new();
        while !reader.at_end() {
            for record in reader.poll(&limit).await? {
                match record.value.as_deref().map(serde_json::from_slice::<Entry>) {
                    Some(Ok(entry)) => found.push(Found(entry)),
                    Some(Err(error)) => tracing::warn!(connector, offset = record.offset.0, %error,
                        "a table's earlier shape can't be read and is passed over"),
                    None => {}
                }
            }
        }
        Ok(found)
    };
    tokio::time::timeout(DEADLINE, reading).await.unwrap_or_else(|_| {
        Err(Fault::unavailable(format!("reading topic '{}' took longer than a minute", topic(connector)), None))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{ReplicaIdentity, Table};

    fn table(name: &str) -> SharedTable {
        Arc::new(Table {
            oid: Oid(1),
            schema: "s".into(),
            name: name.into(),
            replica_identity: ReplicaIdentity::Default,
            columns: Vec::new(),
            key: Vec::new(),
        })
    }

    fn name(schemas: &Schemas, epoch: u64, lsn: u64) -> Option<&str> {
        schemas.at(Oid(1), epoch, Lsn(lsn)).map(|table| table.name.as_str())
    }

    #[test]
    fn a_row_gets_the_table_of_its_own_lsn_and_epoch() {
        let (mut schemas, mut batch) = (Schemas::new("c"), RecordBatch::new());
        schemas.note(&table("a"), 1, Lsn(100), &mut batch);
        schemas.note(&table("b"), 1, Lsn(200), &mut batch);
        schemas.note(&table("b"), 1, Lsn(250), &mut batch);
        assert_eq!(batch.len(), 2, "what is no news is not written");
        schemas.handed_on();
        schemas.note(&table("c"), 2, Lsn(50), &mut batch);
        assert_eq!(
            (name(&schemas, 1, 99), name(&schemas, 1, 199), name(&schemas, 1, 200)),
            (None, Some("a"), Some("b"))
        );
        assert_eq!((name(&schemas, 2, 49), name(&schemas, 2, 50)), (Some("b"), Some("c")));
        schemas.given_up();
        assert_eq!(name(&schemas, 2, 50), Some("b"), "what was given up is no news");

        let value = batch.iter().next().unwrap().value.unwrap();
        let entry: Entry = serde_json::from_slice(value).unwrap();
        assert_eq!(entry, Entry { epoch: 1, from: Lsn(100), table: table("a") });
    }
}
