//! librdkafka's messages to records: keys and values of a poll in one buffer, of which each record has views.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use rdkafka::Message as _;
use rdkafka::message::{BorrowedMessage, Headers as _};

use crate::event::Offset;
use crate::log::{ConsumedRecord, PollLimit};

#[derive(Default)]
pub(super) struct Gatherer {
    bytes: Vec<u8>,
    found: Vec<Found>,
    /// Topic names and header names, made once.
    names: HashMap<String, Arc<str>>,
}

struct Found {
    topic: Arc<str>,
    partition: i32,
    offset: i64,
    timestamp_ms: i64,
    key: Option<Range<usize>>,
    value: Option<Range<usize>>,
    headers: Vec<(Arc<str>, Range<usize>)>,
}

/// Names kept; header names come from outside and may be without number.
const NAMES: usize = 10_000;

impl Gatherer {
    pub fn push(&mut self, message: &BorrowedMessage<'_>) {
        let topic = self.name(message.topic());
        let key = message.key().map(|key| self.put(key));
        let value = message.payload().map(|value| self.put(value));
        let mut headers = Vec::new();
        if let Some(borrowed) = message.headers() {
            headers.reserve_exact(borrowed.count());
            for header in borrowed.iter() {
                headers.push((self.name(header.key), self.put(header.value.unwrap_or_default())));
            }
        }
        self.found.push(Found {
            topic,
            partition: message.partition(),
            offset: message.offset(),
            timestamp_ms: message.timestamp().to_millis().unwrap_or_default(),
            key,
            value,
            headers,
        });
    }

    fn name(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.names.get(name) {
            return known.clone();
        }
        let made: Arc<str> = name.into();
        if self.names.len() < NAMES {
            self.names.insert(name.to_owned(), made.clone());
        }
        made
    }

    fn put(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        start..self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub fn is_full(&self, limit: &PollLimit) -> bool {
        self.found.len() >= limit.records || self.bytes.len() >= limit.bytes
    }

    /// What has been gathered; empties it.
    pub fn take(&mut self) -> Vec<ConsumedRecord> {
        let all = Bytes::from(std::mem::take(&mut self.bytes));
        let part = |range: Range<usize>| all.slice(range);
        self.found
            .drain(..)
            .map(|found| ConsumedRecord {
                topic: found.topic,
                partition: found.partition,
                offset: Offset(found.offset),
                timestamp_ms: found.timestamp_ms,
                key: found.key.map(part),
                value: found.value.map(part),
                headers: found.headers.into_iter().map(|(name, range)| (name, part(range))).collect(),
            })
            .collect()
    }
}
