//! The topics of the embedded log as the processes' tasks share them: ids, settings, and how far each partition
//! is durable. Only the commit thread writes here, and only after its commit: what a tail shows is on disk.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rusqlite::Connection;

use super::database::reading;
use crate::log::LogError;

#[derive(Debug)]
pub(super) struct Topic {
    pub id: i64,
    pub name: Arc<str>,
    pub settings: BTreeMap<String, String>,
    /// Per partition the offset its next record will get.
    tails: Vec<AtomicI64>,
}

impl Topic {
    pub fn new(id: i64, name: Arc<str>, settings: BTreeMap<String, String>, tails: Vec<i64>) -> Self {
        Topic { id, name, settings, tails: tails.into_iter().map(AtomicI64::new).collect() }
    }

    pub fn partitions(&self) -> i32 {
        self.tails.len() as i32
    }

    pub fn tail(&self, partition: i32) -> i64 {
        self.tails.get(partition as usize).map_or(0, |tail| tail.load(Ordering::Acquire))
    }

    pub fn set_tail(&self, partition: i32, next: i64) {
        if let Some(tail) = self.tails.get(partition as usize) {
            tail.store(next, Ordering::Release);
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Catalog {
    topics: RwLock<BTreeMap<Arc<str>, Arc<Topic>>>,
}

impl Catalog {
    pub fn get(&self, name: &str) -> Option<Arc<Topic>> {
        self.topics.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Topic>> {
        self.topics.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    pub fn put(&self, topic: Arc<Topic>) {
        self.topics.write().unwrap_or_else(PoisonError::into_inner).insert(topic.name.clone(), topic);
    }

    /// Brings in what another process has written since.
    pub fn refresh(&self, conn: &Connection) -> Result<(), LogError> {
        for topic in load(conn)? {
            match self.get(&topic.name) {
                Some(known) if known.id == topic.id && known.partitions() == topic.partitions() => {
                    for partition in 0..topic.partitions() {
                        known.set_tail(partition, topic.tail(partition));
                    }
                }
                _ => self.put(Arc::new(topic)),
            }
        }
        Ok(())
    }
}

fn load(conn: &Connection) -> Result<Vec<Topic>, LogError> {
    let read = || -> rusqlite::Result<Vec<Topic>> {
        let mut topics: Vec<(i64, String, String, Vec<i64>)> = Vec::new();
        let mut statement = conn.prepare_cached(
            "SELECT t.id, t.name, t.settings, p.next FROM topics t JOIN partitions p ON p.topic = t.id
             ORDER BY t.id, p.partition",
        )?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let id: i64 = row.get(0)?;
            if topics.last().is_none_or(|last| last.0 != id) {
                topics.push((id, row.get(1)?, row.get(2)?, Vec::new()));
            }
            if let Some(last) = topics.last_mut() {
                last.3.push(row.get(3)?);
            }
        }
        let topic = |(id, name, settings, tails): (i64, String, String, Vec<i64>)| {
            let settings = serde_json::from_str(&settings).unwrap_or_default();
            Topic::new(id, name.into(), settings, tails)
        };
        Ok(topics.into_iter().map(topic).collect())
    };
    read().map_err(reading)
}
