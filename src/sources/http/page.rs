//! A page: the records of one answer, and the state of the pull that is saved with them.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde_json::Value;

use super::settings::PullSettings;
use crate::datastore::Listed;
use crate::log::ConsumedRecord;
use crate::mapping::{MapError, Scope};
use crate::pipeline::Fault;
use crate::systems::HttpResponse;

/// A page on its way into the datastore.
#[derive(Debug)]
pub struct Page {
    pub records: Vec<PageRecord>,
    /// `None` for records that are only tried again.
    pub save: Option<SaveCursor>,
    pub bytes: usize,
}

#[derive(Clone, Debug)]
pub struct PageRecord {
    pub record: Value,
    /// The push sequence noted before the record was fetched.
    pub push_seq: i64,
    /// The record's own cursor; null without one.
    pub cursor: Value,
    /// Why it can't be applied: its cursor is none.
    pub bad: Option<String>,
    /// The dead letter that it is replayed from: its key, and how it is parked.
    pub letter: Option<Box<(Value, ConsumedRecord)>>,
}

/// The pull's state after a page.
#[derive(Clone, Debug)]
pub struct SaveCursor {
    pub state: Value,
    /// Generation of the state that the page began from.
    pub seen: i64,
    /// At the end of a complete run: when it began.
    pub listed_since: Option<Listed>,
    /// The state tells nothing that the stored one does not: it need not be written.
    pub idle: bool,
}

impl Page {
    pub fn new(records: Vec<PageRecord>, save: Option<SaveCursor>) -> Self {
        let bytes = records.iter().map(|record| size(&record.record)).sum();
        Page { records, save, bytes }
    }
}

impl PageRecord {
    /// Tells it from the records beside it.
    pub(super) fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.record.to_string().hash(&mut hasher);
        hasher.finish()
    }
}

impl PullSettings {
    /// `reached`: the furthest cursor so far. A record whose cursor can't be taken for one is its own fault, but a page
    /// of nothing else is the settings'.
    pub(super) fn records_of(
        &self,
        response: &HttpResponse,
        push_seq: i64,
        reached: &Value,
    ) -> Result<Vec<PageRecord>, Fault> {
        let wrong = |error: MapError| Fault::stop(format!("`records: {}`: {error}", self.records.text()));
        let found = self.records.run(&response.body, &Scope::default()).map_err(wrong)?;
        let found = match <[Value; 1]>::try_from(found) {
            Ok([Value::Array(records)]) => records,
            Ok([Value::Null]) => Vec::new(),
            Ok([other]) if !other.is_object() => {
                return Err(Fault::stop(format!(
                    "`records: {}` must give records, but gives: {}; hint: where in the answer is the list?",
                    self.records.text(),
                    response.excerpt()
                )));
            }
            Ok([record]) => vec![record],
            Err(records) => records,
        };
        let page_record = |record: Value| {
            let cursor = match &self.incremental {
                Some(incremental) => incremental.of(&record, reached).map(|(cursor, _)| cursor),
                None => Ok(Value::Null),
            };
            let (cursor, bad) = match cursor {
                Ok(cursor) => (cursor, None),
                Err(reason) => (Value::Null, Some(reason)),
            };
            PageRecord { record, push_seq, cursor, bad, letter: None }
        };
        let records: Vec<_> = found.into_iter().map(page_record).collect();
        match records.first().and_then(|record| record.bad.as_deref()) {
            Some(reason) if records.len() > 1 && records.iter().all(|record| record.bad.is_some()) => {
                Err(Fault::stop(format!("no record of the page has a cursor: {reason}; hint: look at `incremental`")))
            }
            _ => Ok(records),
        }
    }
}

/// About the bytes a value takes.
fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 24,
        Value::Array(items) => 24 + items.iter().map(size).sum::<usize>(),
        Value::Object(members) => members.iter().map(|(name, value)| name.len() + 48 + size(value)).sum(),
        _ => 24,
    }
}
