//! Records to units of work: the events of one key in a batch are one attempt.

use std::collections::{BTreeSet, HashMap};

use serde_json::{Value, json};

use super::deliver::Delivery;
use super::intake::{Work, size};
use super::outcome::Rejection;
use crate::datastore::{Client, Command, Parked, ParkedKind, Room, TableName, has_queue, parked_queue, unpark};
use crate::event::{Change, Lsn, Operation, TopicPartition};
use crate::log::ConsumedRecord;
use crate::pipeline::{Counts, Fault};

/// Records of all queues that are taken up at once, and their bytes. What there is no room for has its turn next.
const AT_ONCE: Room = Room { records: 2000, bytes: 4 << 20 };

pub struct Event {
    pub record: ConsumedRecord,
    pub change: Change,
}

/// All that a batch has for one key, in order.
pub struct KeyWork {
    pub table: TableName,
    pub key: Value,
    pub events: Vec<Event>,
    /// The events come from this queue of parked records: that of the key, or of a record that could not be read.
    pub queue: Option<Value>,
    /// A person asked for it.
    pub told: bool,
}

impl KeyWork {
    /// The partition that it is worked on for, where that is among the `revoked`. A queue is its head's, whatever
    /// partitions the others in it are of.
    pub fn lost(&self, revoked: &BTreeSet<TopicPartition>) -> Option<TopicPartition> {
        if revoked.is_empty() {
            return None;
        }
        let events = if self.queue.is_some() { self.events.get(..1).unwrap_or_default() } else { &self.events };
        let mut places =
            events.iter().map(|event| TopicPartition::new(event.record.topic.clone(), event.record.partition));
        places.find(|place| revoked.contains(place))
    }

    /// Nothing but rows read by a snapshot.
    pub fn is_snapshot(&self) -> bool {
        self.events.iter().all(|event| event.change.operation == Operation::Read)
    }

    /// The row itself was inserted after this.
    pub fn is_made_since(&self, lsn: Lsn) -> bool {
        let made = |change: &Change| change.operation == Operation::Create && change.table == self.table.name;
        self.events.iter().any(|event| made(&event.change) && event.change.lsn > lsn)
    }

    /// Nothing but what was pulled from the system itself.
    pub fn is_echo_of(&self, system: &str) -> bool {
        self.events.iter().all(|event| event.change.origin.as_deref() == Some(system))
    }
}

impl Delivery {
    /// What is to be done for a batch, and counts of what needs nothing more.
    pub(super) async fn sort(&self, work: Work) -> Result<(Vec<KeyWork>, Counts), Fault> {
        match work {
            Work::Records(records) => self.sort_records(records).await,
            Work::Parked(parked) => self.sort_parked(parked).await,
        }
    }

    async fn sort_records(&self, records: Vec<ConsumedRecord>) -> Result<(Vec<KeyWork>, Counts), Fault> {
        let mut counts = Counts::default();
        let mut works: Vec<KeyWork> = Vec::new();
        let mut places: HashMap<(String, String), usize> = HashMap::new();
        let client = self.datastore.client().await?;
        for record in records {
            counts.bytes += record.value.as_ref().map_or(0, |value| value.len()) as u64;
            let keys = match self.decode(&record).await? {
                Ok(Some(change)) => match self.keys(&client, &change).await? {
                    Ok(keys) if keys.is_empty() => {
                        counts.skipped += 1;
                        continue;
                    }
                    Ok(keys) => keys.into_iter().map(|(table, key)| (table, key, change.clone())).collect::<Vec<_>>(),
                    Err(rejection) => {
                        self.refuse(&client, record, rejection).await?;
                        counts.rejected += 1;
                        continue;
                    }
                },
                Ok(None) => {
                    counts.skipped += 1;
                    continue;
                }
                Err(rejection) => {
                    self.refuse(&client, record, rejection).await?;
                    counts.rejected += 1;
                    continue;
                }
            };
            for (table, key, change) in keys {
                let event = Event { record: record.clone(), change };
                let at = *places.entry((table.to_string(), key.to_string())).or_insert_with(|| {
                    works.push(KeyWork { table, key, events: Vec::new(), queue: None, told: false });
                    works.len() - 1
                });
                works[at].events.push(event);
            }
        }
        Ok((works, counts))
    }

    /// Heads of queues whose time has come, each with those behind it.
    async fn sort_parked(&self, heads: Vec<Parked>) -> Result<(Vec<KeyWork>, Counts), Fault> {
        let mut counts = Counts::default();
        let mut works = Vec::new();
        let mut room = AT_ONCE;
        let client = self.datastore.client().await?;
        for head in heads {
            let key = &head.summary.key;
            if head.summary.command == Some(Command::Drop) {
                unpark(&client, &self.connector, key, &head.record).await?;
                tracing::info!(connector = self.connector, %key, offset = head.summary.offset, "a dead letter was dropped");
                continue;
            }
            let told = head.summary.command == Some(Command::Replay);
            let owing = head.summary.kind == ParkedKind::Owing;
            if (owing || head.summary.kind == ParkedKind::Waiting) && !head.satisfied && head.summary.command.is_none()
            {
                let mut reason = format!("waited too long: {}", head.summary.reason);
                if !owing {
                    reason += "; hint: of rows that wait for each other, one can go first without the other's link, which \
                               `link_later(…)` leaves out until it is there";
                }
                let rejection = Rejection { waits_for: waits_for(&head).map(Box::new), ..Rejection::of_row(reason) };
                self.set_rejected(&client, key, &head.record, rejection).await?;
                counts.rejected += 1;
                continue;
            }
            let mut events = Vec::new();
            let mut own: Option<(TableName, Value)> = None;
            if room.records <= 0 || room.bytes <= 0 {
                continue;
            }
            for parked in parked_queue(&client, &self.connector, key, owing, room).await? {
                room.records -= 1;
                room.bytes -= size(&parked.record) as i64;
                match self.decode(&parked.record).await? {
                    Ok(Some(change)) => {
                        let keys = match self.keys(&client, &change).await? {
                            Ok(keys) => keys,
                            Err(rejection) => {
                                self.set_rejected(&client, key, &parked.record, rejection).await?;
                                break;
                            }
                        };
                        // A record that could not be read before has another key now.
                        let found = keys.iter().find(|(_, own)| own == key).or(keys.first()).cloned();
                        match found {
                            // Another table's row of the same key: its turn comes when those before it are gone.
                            Some((table, _)) if own.as_ref().is_some_and(|(own, _)| *own != table) => break,
                            Some(found) => {
                                own.get_or_insert(found);
                                events.push(Event { record: parked.record, change });
                            }
                            None => unpark(&client, &self.connector, key, &parked.record).await?,
                        }
                    }
                    Ok(None) => unpark(&client, &self.connector, key, &parked.record).await?,
                    Err(rejection) => {
                        self.set_rejected(&client, key, &parked.record, rejection).await?;
                        break;
                    }
                }
            }
            if let Some((table, own)) = own {
                works.push(KeyWork { table, key: own, events, queue: Some(key.clone()), told });
            }
        }
        Ok((works, counts))
    }

    /// `Err`: the record can't be read, and never will; `None`: there is nothing in it to deliver.
    async fn decode(&self, record: &ConsumedRecord) -> Result<Result<Option<Change>, Rejection>, Fault> {
        match self.decoder.change(record).await {
            Ok(Some(change)) if matches!(change.operation, Operation::Truncate | Operation::Message) => {
                if change.operation == Operation::Truncate {
                    tracing::warn!(
                        connector = self.connector,
                        table = format!("{}.{}", change.schema, change.table),
                        "a truncate is not delivered: it does not say which rows are gone"
                    );
                }
                Ok(Ok(None))
            }
            Ok(change) => Ok(Ok(change)),
            Err(error) if error.is_retriable() => Err(Fault::unavailable(error.to_string(), None)),
            Err(error) => Ok(Err(Rejection::because(format!("the record can't be decoded: {error}")))),
        }
    }

    async fn keys(
        &self,
        client: &Client,
        change: &Change,
    ) -> Result<Result<Vec<(TableName, Value)>, Rejection>, Fault> {
        let keys = self.shape.keys(client, (self.settings.system.name(), &self.settings.object), change).await?;
        if let Some((table, _)) = keys.iter().find(|(_, key)| key.as_object().is_none_or(serde_json::Map::is_empty))
            && !self.sends_changes()
        {
            return Ok(Err(Rejection::because(format!(
                "table {table} has no key, so its rows can't be linked; give it one, or use `send: change`"
            ))));
        }
        Ok(Ok(keys))
    }

    /// Sets a record aside that belongs to no key.
    async fn refuse(&self, client: &Client, record: ConsumedRecord, rejection: Rejection) -> Result<(), Fault> {
        let key = json!({ "record": format!("{}-{}@{}", record.topic, record.partition, record.offset) });
        if !has_queue(client, &self.connector, &key).await? {
            self.set_rejected(client, &key, &record, rejection).await?;
        }
        Ok(())
    }
}

/// Should the link come after all, the record goes on.
fn waits_for(parked: &Parked) -> Option<(String, String, Value)> {
    let waits_for = parked.summary.waits_for.as_ref()?;
    Some((waits_for["system"].as_str()?.to_owned(), waits_for["object"].as_str()?.to_owned(), waits_for["key"].clone()))
}
