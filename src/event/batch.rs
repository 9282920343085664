//! A batch of records on its way into a log: one byte buffer, and a small entry a record.
//!
//! Built once by a source, read once by a log. Nothing is allocated per record once the buffers have
//! grown: keys, values and headers are ranges of one `Vec<u8>`. Records stay in the order they were added.

use std::ops::Range;
use std::sync::Arc;

/// Which topic of the batch's topic list a record goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TopicSlot(u32);

impl TopicSlot {
    /// Index into [`RecordBatch::topics`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Headers written once into a batch and shared by any number of its records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderSet(Range<u32>);

#[derive(Clone, Debug)]
struct Entry {
    topic: TopicSlot,
    key: Option<Range<u32>>,
    value: Option<Range<u32>>,
    headers: Range<u32>,
}

/// Records in order, with their bytes in one buffer. At most 1 GiB: see [`RecordBatch::is_full`].
#[derive(Clone, Debug, Default)]
pub struct RecordBatch {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    topics: Vec<Arc<str>>,
}

/// One record of a batch, as views.
#[derive(Clone, Copy, Debug)]
pub struct RecordRef<'a> {
    pub topic: &'a Arc<str>,
    pub topic_slot: TopicSlot,
    pub key: Option<&'a [u8]>,
    pub value: Option<&'a [u8]>,
    headers: &'a [u8],
    headers_at: u32,
}

impl<'a> RecordRef<'a> {
    /// Names and values of the headers, in order.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + use<'a> {
        let mut rest = self.headers;
        std::iter::from_fn(move || {
            let (name, after) = split_sized(rest)?;
            let (value, after) = split_sized(after)?;
            rest = after;
            Some((std::str::from_utf8(name).unwrap_or_default(), value))
        })
    }

    /// The headers as they stand in the buffer: `(u32 le length, bytes)` for name, value, name, value …
    pub fn raw_headers(&self) -> &'a [u8] {
        self.headers
    }

    /// Place of the raw headers in the batch: equal places mean the same shared set.
    pub fn headers_id(&self) -> u32 {
        self.headers_at
    }
}

fn split_sized(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (size, rest) = bytes.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*size) as usize)
}

impl RecordBatch {
    pub fn new() -> Self {
        Self::default()
    }

    /// Empties the batch and keeps its buffers.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.entries.clear();
        self.topics.clear();
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of keys, values and headers: what queues are bounded by.
    pub fn byte_size(&self) -> usize {
        self.bytes.len() + self.entries.len() * size_of::<Entry>()
    }

    /// Bytes that the buffers hold, or could without growing.
    pub fn capacity(&self) -> usize {
        self.bytes.capacity() + self.entries.capacity() * size_of::<Entry>()
    }

    /// True when no record may be added any more (ranges are 32 bits wide).
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= 1 << 30
    }

    /// The slot of `topic`, added where it is new. Slots are only good for this batch, until `clear`.
    pub fn topic_slot(&mut self, topic: &Arc<str>) -> TopicSlot {
        let at = self.topics.iter().position(|t| t == topic).unwrap_or_else(|| {
            self.topics.push(topic.clone());
            self.topics.len() - 1
        });
        TopicSlot(at as u32)
    }

    pub fn topics(&self) -> &[Arc<str>] {
        &self.topics
    }

    /// Writes headers once; the set may be given to many records of this batch.
    pub fn header_set<'h>(&mut self, headers: impl IntoIterator<Item = (&'h str, &'h [u8])>) -> HeaderSet {
        let start = self.bytes.len() as u32;
        for (name, value) in headers {
            for part in [name.as_bytes(), value] {
                self.bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
                self.bytes.extend_from_slice(part);
            }
        }
        HeaderSet(start..self.bytes.len() as u32)
    }

    /// Starts a record: write the key, then the value, into the builder's buffer, then `finish`. A builder that
    /// is dropped unfinished leaves no record and no bytes behind.
    pub fn record(&mut self, topic: TopicSlot, headers: &HeaderSet) -> RecordBuilder<'_> {
        let start = self.bytes.len();
        RecordBuilder { batch: self, start, topic, headers: headers.0.clone(), key: None, value: None, finished: false }
    }

    /// Adds a whole record; for callers off the hot path.
    pub fn push(&mut self, topic: &Arc<str>, key: Option<&[u8]>, value: Option<&[u8]>, headers: &HeaderSet) {
        let slot = self.topic_slot(topic);
        let mut record = self.record(slot, headers);
        if let Some(key) = key {
            record.key(|out| out.extend_from_slice(key));
        }
        if let Some(value) = value {
            record.value(|out| out.extend_from_slice(value));
        }
        record.finish();
    }

    /// Where the batch is now, for [`RecordBatch::undo`].
    pub fn mark(&self) -> (usize, usize) {
        (self.entries.len(), self.bytes.len())
    }

    /// Takes back every record and header set added since `mark`.
    pub fn undo(&mut self, mark: (usize, usize)) {
        self.entries.truncate(mark.0);
        self.bytes.truncate(mark.1);
    }

    pub fn get(&self, index: usize) -> Option<RecordRef<'_>> {
        self.entries.get(index).map(|entry| self.view(entry))
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = RecordRef<'_>> {
        self.entries.iter().map(|entry| self.view(entry))
    }

    fn view<'a>(&'a self, entry: &Entry) -> RecordRef<'a> {
        let part = |range: &Range<u32>| &self.bytes[range.start as usize..range.end as usize];
        RecordRef {
            topic: &self.topics[entry.topic.0 as usize],
            topic_slot: entry.topic,
            key: entry.key.as_ref().map(part),
            value: entry.value.as_ref().map(part),
            headers: part(&entry.headers),
            headers_at: entry.headers.start,
        }
    }
}

/// A record being written straight into its batch's buffer.
pub struct RecordBuilder<'a> {
    batch: &'a mut RecordBatch,
    start: usize,
    topic: TopicSlot,
    headers: Range<u32>,
    key: Option<Range<u32>>,
    value: Option<Range<u32>>,
    finished: bool,
}

impl RecordBuilder<'_> {
    /// Writes the key; what `write` returns is handed back. Not called: the key is null.
    pub fn key<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let start = self.batch.bytes.len() as u32;
        let out = write(&mut self.batch.bytes);
        self.key = Some(start..self.batch.bytes.len() as u32);
        out
    }

    /// Writes the value. Not called: the value is null (a tombstone).
    pub fn value<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let start = self.batch.bytes.len() as u32;
        let out = write(&mut self.batch.bytes);
        self.value = Some(start..self.batch.bytes.len() as u32);
        out
    }

    /// Reuses the key bytes of the record before this one (a tombstone after its delete).
    pub fn same_key_as_previous(&mut self) {
        self.key = self.batch.entries.last().and_then(|entry| entry.key.clone());
    }

    pub fn finish(mut self) {
        self.finished = true;
        let entry =
            Entry { topic: self.topic, key: self.key.take(), value: self.value.take(), headers: self.headers.clone() };
        self.batch.entries.push(entry);
    }
}

impl Drop for RecordBuilder<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.batch.bytes.truncate(self.start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_as_they_were_written_and_share_headers() {
        let mut batch = RecordBatch::new();
        let topic: Arc<str> = "shop.public.orders".into();
        let headers = batch.header_set([("a", b"1".as_slice()), ("b", b"")]);
        batch.push(&topic, Some(b"k"), Some(b"v"), &headers);
        let slot = batch.topic_slot(&topic);
        let mut tombstone = batch.record(slot, &headers);
        tombstone.same_key_as_previous();
        tombstone.finish();

        let got: Vec<_> = batch.iter().map(|r| (r.key, r.value, r.headers().collect::<Vec<_>>())).collect();
        let expected = vec![("a", b"1".as_slice()), ("b", b"".as_slice())];
        assert_eq!(got[0], (Some(b"k".as_slice()), Some(b"v".as_slice()), expected.clone()));
        assert_eq!(got[1], (Some(b"k".as_slice()), None, expected));
    }

    #[test]
    fn a_record_given_up_leaves_nothing_behind() {
        let mut batch = RecordBatch::new();
        let slot = batch.topic_slot(&"t".into());
        let before = batch.byte_size();
        let mut record = batch.record(slot, &HeaderSet::default());
        record.value(|out| out.extend_from_slice(b"half"));
        drop(record);
        assert_eq!((batch.len(), batch.byte_size()), (0, before));
    }
}
