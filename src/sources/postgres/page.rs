//! One change as records: key, value, headers and tombstones, in the batch's buffer.
//!
//! Invariant: nothing is allocated for a row, but where its key changes.

use crate::avro::{AvroError, EventMeta};
use crate::event::{Cell, HeaderSet, Operation, RecordBatch, TopicSlot};

use super::envelope::Context;
use super::relations::Output;

/// A place to write the records of one change.
pub(super) struct Page<'w> {
    pub batch: &'w mut RecordBatch,
    pub number: u64,
    pub output: &'w mut Output,
    pub headers: HeaderSet,
    pub context: &'w Context,
}

impl Page<'_> {
    #[inline]
    fn slot(&mut self) -> TopicSlot {
        match self.output.slot {
            Some((number, slot)) if number == self.number => slot,
            _ => {
                let slot = self.batch.topic_slot(&self.output.topic);
                self.output.slot = Some((self.number, slot));
                slot
            }
        }
    }

    #[inline]
    pub(super) fn event(
        &mut self,
        meta: &EventMeta<'_>,
        before: Option<&[Cell<'_>]>,
        after: Option<&[Cell<'_>]>,
    ) -> Result<(), AvroError> {
        let slot = self.slot();
        let mut record = self.batch.record(slot, &self.headers);
        if self.output.plan.has_key()
            && let Some(row) = after.or(before)
        {
            record.key(|out| self.output.plan.write_key(row, out))?;
        }
        record.value(|out| self.output.plan.write_value(before, after, meta, out))?;
        record.finish();
        Ok(())
    }

    pub(super) fn keyless(&mut self, meta: &EventMeta<'_>) -> Result<(), AvroError> {
        let slot = self.slot();
        let mut record = self.batch.record(slot, &self.headers);
        record.value(|out| self.output.plan.write_value(None, None, meta, out))?;
        record.finish();
        Ok(())
    }

    pub(super) fn tombstone(&mut self) {
        let slot = self.slot();
        let mut record = self.batch.record(slot, &self.headers);
        record.same_key_as_previous();
        record.finish();
    }

    /// A row under another key: a delete and a tombstone that name the new key, a create that names the old one.
    pub(super) fn moved(
        &mut self,
        meta: EventMeta<'_>,
        old: &[Cell<'_>],
        new: &[Cell<'_>],
        tombstones: bool,
    ) -> Result<(), AvroError> {
        let plain = self.headers.clone();
        let (mut old_key, mut new_key) = (Vec::new(), Vec::new());
        self.output.plan.write_key_json(old, &mut old_key)?;
        self.output.plan.write_key_json(new, &mut new_key)?;
        self.headers = self.context.headers(self.batch, Some(("__debezium.newkey", &new_key)));
        self.event(&EventMeta { operation: Operation::Delete, ..meta }, Some(old), None)?;
        if tombstones {
            self.tombstone();
        }
        self.headers = self.context.headers(self.batch, Some(("__debezium.oldkey", &old_key)));
        self.event(&EventMeta { operation: Operation::Create, ..meta }, None, Some(new))?;
        self.headers = plain;
        Ok(())
    }
}
