//! Records as bytes: a *chunk* holds consecutive records of one partition, and is one blob in the database.
//!
//! ```text
//! u8 format (1) | varint header sets | per set: varint length, raw headers | records to the end
//! record: varint hole (offsets skipped since the record before) | varint ms since the chunk's first timestamp
//!         | varint header set (0: none, n: the n-th) | varint key length + 1 (0: null), key | the same for value
//! ```
//! Raw headers are `(u32 le length, bytes)` for name, value, name, value …, as in a [`RecordBatch`]. Headers that
//! many records share are written once. The CRC of the blob is kept beside it and checked when it is read.
//!
//! [`RecordBatch`]: crate::event::RecordBatch

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::event::{Offset, RecordRef};
use crate::log::ConsumedRecord;

const FORMAT: u8 = 1;

/// Records of one partition on their way to disk.
#[derive(Default)]
pub(super) struct ChunkBuilder {
    records: Vec<u8>,
    sets: Vec<u8>,
    set_numbers: HashMap<Box<[u8]>, u64>,
    set_count: u64,
    /// The set seen last: (batch, its place there) and its number. Most records share one.
    last_set: Option<(u64, u32, u64)>,
    count: u32,
}

impl ChunkBuilder {
    /// Adds a record right behind the one before. `batch` tells batches apart.
    pub fn push(&mut self, record: &RecordRef<'_>, batch: u64, ms_since_first: u64) {
        let set = self.header_set(record, batch);
        put_varint(&mut self.records, 0);
        put_varint(&mut self.records, ms_since_first);
        put_varint(&mut self.records, set);
        for part in [record.key, record.value] {
            match part {
                None => put_varint(&mut self.records, 0),
                Some(bytes) => {
                    put_varint(&mut self.records, bytes.len() as u64 + 1);
                    self.records.extend_from_slice(bytes);
                }
            }
        }
        self.count += 1;
    }

    fn header_set(&mut self, record: &RecordRef<'_>, batch: u64) -> u64 {
        let raw = record.raw_headers();
        if raw.is_empty() {
            return 0;
        }
        match self.last_set {
            Some((last_batch, place, number)) if last_batch == batch && place == record.headers_id() => number,
            _ => {
                let number = match self.set_numbers.get(raw) {
                    Some(number) => *number,
                    None => {
                        self.set_count += 1;
                        put_varint(&mut self.sets, raw.len() as u64);
                        self.sets.extend_from_slice(raw);
                        self.set_numbers.insert(raw.into(), self.set_count);
                        self.set_count
                    }
                };
                self.last_set = Some((batch, record.headers_id(), number));
                number
            }
        }
    }

    pub fn count(&self) -> u32 {
        self.count
    }

    pub fn byte_size(&self) -> usize {
        self.records.len() + self.sets.len()
    }

    /// Writes the blob into `out`, which is emptied first, and empties the builder. Returns the blob's CRC.
    pub fn finish(&mut self, out: &mut Vec<u8>) -> u32 {
        out.clear();
        out.reserve(self.byte_size() + 8);
        out.push(FORMAT);
        put_varint(out, self.set_count);
        out.extend_from_slice(&self.sets);
        out.extend_from_slice(&self.records);
        self.clear();
        crc32fast::hash(out)
    }

    pub fn clear(&mut self) {
        self.records.clear();
        self.sets.clear();
        self.set_numbers.clear();
        self.set_count = 0;
        self.last_set = None;
        self.count = 0;
    }
}

/// A chunk being read: hands out its records as views of its bytes.
#[derive(Debug)]
pub(super) struct Chunk {
    data: Bytes,
    at: usize,
    next_offset: i64,
    first_timestamp_ms: i64,
    header_sets: Vec<Vec<(Arc<str>, Bytes)>>,
}

/// What is wrong with a chunk.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Corrupt(pub &'static str);

impl Chunk {
    pub fn open(data: Bytes, base: i64, first_timestamp_ms: i64, crc: u32) -> Result<Self, Corrupt> {
        if crc32fast::hash(&data) != crc {
            return Err(Corrupt("its checksum is wrong"));
        }
        if data.first() != Some(&FORMAT) {
            return Err(Corrupt("it has an unknown format"));
        }
        let mut chunk = Chunk { data, at: 1, next_offset: base, first_timestamp_ms, header_sets: Vec::new() };
        let sets = chunk.varint()?;
        for _ in 0..sets {
            let size = chunk.varint()?;
            let raw = chunk.take(size)?;
            chunk.header_sets.push(read_headers(&raw)?);
        }
        Ok(chunk)
    }

    /// The next record; `None` at the end.
    pub fn next(&mut self, topic: &Arc<str>, partition: i32) -> Result<Option<ConsumedRecord>, Corrupt> {
        if self.at == self.data.len() {
            return Ok(None);
        }
        let hole = i64::try_from(self.varint()?).map_err(|_| Corrupt("an offset is too large"))?;
        let offset = self.next_offset.checked_add(hole).ok_or(Corrupt("an offset is too large"))?;
        let since_first = i64::try_from(self.varint()?).map_err(|_| Corrupt("a timestamp is too large"))?;
        let headers = match self.varint()? {
            0 => Vec::new(),
            number => usize::try_from(number - 1)
                .ok()
                .and_then(|i| self.header_sets.get(i))
                .ok_or(Corrupt("a record names headers that are not there"))?
                .clone(),
        };
        let key = self.sized()?;
        let value = self.sized()?;
        self.next_offset = offset.checked_add(1).ok_or(Corrupt("an offset is too large"))?;
        Ok(Some(ConsumedRecord {
            topic: topic.clone(),
            partition,
            offset: Offset(offset),
            timestamp_ms: self.first_timestamp_ms.saturating_add(since_first),
            key,
            value,
            headers,
        }))
    }

    fn sized(&mut self) -> Result<Option<Bytes>, Corrupt> {
        match self.varint()? {
            0 => Ok(None),
            size => self.take(size - 1).map(Some),
        }
    }

    fn take(&mut self, size: u64) -> Result<Bytes, Corrupt> {
        let end = usize::try_from(size).ok().and_then(|size| self.at.checked_add(size));
        match end {
            Some(end) if end <= self.data.len() => {
                let part = self.data.slice(self.at..end);
                self.at = end;
                Ok(part)
            }
            _ => Err(Corrupt("it ends inside a record")),
        }
    }

    fn varint(&mut self) -> Result<u64, Corrupt> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.data.get(self.at).ok_or(Corrupt("it ends inside a number"))?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Corrupt("a number is too long"))
    }
}

fn read_headers(raw: &Bytes) -> Result<Vec<(Arc<str>, Bytes)>, Corrupt> {
    let mut headers = Vec::new();
    let mut at = 0;
    let mut part = || {
        let size = raw.get(at..at + 4).and_then(|size| size.try_into().ok()).map(u32::from_le_bytes);
        let start = at + 4;
        let end = start + size.ok_or(Corrupt("a header is cut short"))? as usize;
        if end > raw.len() {
            return Err(Corrupt("a header is cut short"));
        }
        at = end;
        Ok((raw.slice(start..end), at == raw.len()))
    };
    if raw.is_empty() {
        return Ok(headers);
    }
    loop {
        let (name, _) = part()?;
        let (value, last) = part()?;
        let name = std::str::from_utf8(&name).map_err(|_| Corrupt("a header's name is not UTF-8"))?;
        headers.push((name.into(), value));
        if last {
            return Ok(headers);
        }
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::RecordBatch;

    fn read_all(chunk: &mut Chunk) -> Result<Vec<ConsumedRecord>, Corrupt> {
        let topic: Arc<str> = "t".into();
        std::iter::from_fn(|| chunk.next(&topic, 0).transpose()).collect()
    }

    fn encode(batch: &RecordBatch) -> (Vec<u8>, u32) {
        let mut builder = ChunkBuilder::default();
        for record in batch.iter() {
            builder.push(&record, 1, 5);
        }
        let mut blob = Vec::new();
        let crc = builder.finish(&mut blob);
        (blob, crc)
    }

    type Parts = (Option<Vec<u8>>, Option<Vec<u8>>, Vec<(String, Vec<u8>)>);

    proptest! {
        #[test]
        fn what_is_written_is_read(records in proptest::collection::vec(any::<Parts>(), 0..40)) {
            let mut batch = RecordBatch::new();
            for (key, value, headers) in &records {
                let set = batch.header_set(headers.iter().map(|(n, v)| (n.as_str(), v.as_slice())));
                batch.push(&"t".into(), key.as_deref(), value.as_deref(), &set);
            }
            let (blob, crc) = encode(&batch);
            let read = read_all(&mut Chunk::open(blob.into(), 100, 1000, crc).unwrap()).unwrap();
            prop_assert_eq!(read.len(), records.len());
            for (i, (record, (key, value, headers))) in read.iter().zip(&records).enumerate() {
                prop_assert_eq!(record.offset, Offset(100 + i as i64));
                prop_assert_eq!(record.timestamp_ms, 1005);
                prop_assert_eq!(record.key.as_deref(), key.as_deref());
                prop_assert_eq!(record.value.as_deref(), value.as_deref());
                let got: Vec<_> = record.headers.iter().map(|(n, v)| (n.to_string(), v.to_vec())).collect();
                prop_assert_eq!(&got, headers);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut blob = vec![FORMAT];
            blob.extend(bytes);
            let crc = crc32fast::hash(&blob);
            if let Ok(mut chunk) = Chunk::open(blob.into(), 0, 0, crc) {
                let _ = read_all(&mut chunk);
            }
        }
    }

    #[test]
    fn headers_that_records_share_are_written_once() {
        let mut batch = RecordBatch::new();
        let set = batch.header_set([("a-long-header-name", [7u8; 100].as_slice())]);
        for _ in 0..100 {
            batch.push(&"t".into(), Some(b"k"), None, &set);
        }
        assert!(encode(&batch).0.len() < 1000);
    }

    #[test]
    fn a_flipped_bit_is_noticed() {
        let mut batch = RecordBatch::new();
        batch.push(&"t".into(), Some(b"key"), Some(b"value"), &Default::default());
        let (mut blob, crc) = encode(&batch);
        *blob.last_mut().unwrap() ^= 1;
        assert_eq!(Chunk::open(blob.into(), 0, 0, crc).unwrap_err(), Corrupt("its checksum is wrong"));
    }
}
