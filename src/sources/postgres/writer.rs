//! Changes to records: the hot path. Received bytes go in, a [`RecordBatch`] comes out; nothing is allocated per row.
//!
//! Invariant: `position` says exactly what the records written so far bring the log to. Within a transaction it counts
//! every change that pgoutput sent, kept or filtered, so that the count means the same after a restart with other
//! filters (CORRECTNESS 6).

use std::collections::HashMap;
use std::sync::Arc;

use crate::avro::{AvroError, EventMeta, SnapshotMarker, TransactionMeta};
use crate::event::{
    CapturePosition, Cell, HeaderSet, Lsn, ORIGIN_MESSAGE_PREFIX, Oid, Operation, Origin, Quarantine, RecordBatch,
    Spares,
};
use crate::pipeline::Fault;
use crate::postgres::PostgresError;
use crate::postgres::copy_text::RowReader;
use crate::postgres::frames::{Reader, next_frame};
use crate::postgres::pgoutput::{self, Message, OldRow, Relation};

use super::envelope::{Context, MessageTopic};
use super::page::Page;
use super::relations::{Captured, encoding_fault};
use super::settings::CaptureSettings;

/// Why [`Writer::run`] stopped before the end of a chunk.
pub(super) enum Step {
    /// All is written.
    Consumed,
    /// The batch is as large as it may be.
    Full,
    /// These relations must be made ready for the change at `lsn`. The cursor stands before that.
    Relations { relations: Vec<Arc<Relation>>, lsn: Lsn },
    /// A row has a null where the table has none: the table is to be made ready with this column nullable. The
    /// cursor stands before the row.
    Nullable { oid: Oid, column: usize, lsn: Lsn },
    /// The backlog ([`Writer::behind`]) is over. The cursor stands before the first message behind it.
    CaughtUp { lsn: Lsn },
    /// The message topic must be made ready. The cursor stands before the message.
    Messages,
}

struct Transaction {
    xid: u32,
    commit_lsn: Lsn,
    time_us: i64,
    /// Changes met so far.
    ordinal: u64,
    /// Changes that are in the log already; all of them where the whole transaction is.
    skip: u64,
    origin: Option<Arc<str>>,
}

pub(super) struct Writer {
    settings: Arc<CaptureSettings>,
    pub relations: HashMap<Oid, Captured>,
    pub messages: Option<MessageTopic>,
    pub batch: RecordBatch,
    /// Number of the batch: topic slots and header sets are good for one only.
    number: u64,
    context: Context,
    headers: Option<HeaderSet>,
    /// Row changes in the batch.
    pub events: usize,
    /// What the records so far bring the log to.
    pub position: CapturePosition,
    transaction: Option<Transaction>,
    /// What all events of the transaction, or of the snapshot, say of it; encoded.
    meta: TransactionMeta,
    /// Commit time of the last transaction, microseconds since 1970.
    pub last_commit_us: Option<i64>,
    rows: RowReader,
    /// Relations told, and no change of theirs met yet: a Relation message itself has no LSN.
    announced: Vec<Arc<Relation>>,
    /// Transactions that end before this are a backlog: the catalog was read when the server was there already.
    pub behind: Option<Lsn>,
    pub spares: Spares,
    /// A table was quarantined since the last batch: the position is to be stored soon.
    pub quarantined: bool,
}

/// What became of a row of a snapshot.
pub(super) enum RowWritten {
    Yes,
    /// It has a null in this column, where the table has none.
    Nullable(usize),
    /// It can't be written, and why.
    Refused(String),
}

impl Writer {
    pub(super) fn new(settings: Arc<CaptureSettings>, context: Context, position: CapturePosition) -> Self {
        Writer {
            settings,
            relations: HashMap::new(),
            messages: None,
            batch: RecordBatch::new(),
            number: 1,
            context,
            headers: None,
            events: 0,
            position,
            transaction: None,
            meta: TransactionMeta::default(),
            last_commit_us: None,
            rows: RowReader::default(),
            announced: Vec::new(),
            behind: None,
            spares: Spares::default(),
            quarantined: false,
        }
    }

    /// Gives up what is written and not handed on, and begins behind `position`. Relations are told anew by the
    /// server; what they were taken for is kept until then.
    pub(super) fn reset(&mut self, position: CapturePosition) {
        self.position = position;
        self.transaction = None;
        self.announced.clear();
        self.take();
    }

    /// The batch so far, and its number of events.
    pub(super) fn take(&mut self) -> (RecordBatch, usize) {
        self.number += 1;
        self.headers = None;
        self.quarantined = false;
        for captured in self.relations.values_mut() {
            if let Some(output) = captured.output.as_mut().or(captured.aside.as_deref_mut()) {
                output.counters.flush();
            }
        }
        (std::mem::replace(&mut self.batch, self.spares.take()), std::mem::take(&mut self.events))
    }

    /// Gives up buffers that are not needed while nothing is written.
    pub(super) fn rest(&mut self) {
        if self.batch.is_empty() {
            self.batch = RecordBatch::new();
            self.headers = None;
            self.number += 1;
            self.spares.shed();
        }
    }

    pub(super) fn in_transaction(&self) -> bool {
        self.transaction.is_some()
    }

    /// Commit time of the transaction that is being written, or of the last one; microseconds since 1970.
    pub(super) fn commit_us(&self) -> Option<i64> {
        self.transaction.as_ref().map(|transaction| transaction.time_us).or(self.last_commit_us)
    }

    pub(super) fn is_full(&self) -> bool {
        self.batch.byte_size() >= self.settings.batch_bytes
    }

    /// Writes what `chunk` (whole messages) holds from `cursor` on. `now_ns`: what events say as time of processing.
    pub(super) fn run(&mut self, chunk: &[u8], cursor: &mut usize, now_ns: i64) -> Result<Step, Fault> {
        let (mut old, mut new) = (Vec::new(), Vec::new());
        while let Some((frame, length)) = next_frame(&chunk[*cursor..])? {
            let mut body = Reader::new(frame.body);
            match body.u8()? {
                b'w' => {
                    let lsn = Lsn(body.u64()?);
                    if lsn != Lsn::ZERO && !self.announced.is_empty() {
                        return Ok(Step::Relations { relations: std::mem::take(&mut self.announced), lsn });
                    }
                    body.bytes(16)?;
                    let message = pgoutput::decode(body.rest(), &mut old, &mut new)?;
                    let at = At { lsn, now_ns };
                    if let Some(step) = self.message(message, &at, &old, &mut new)? {
                        return Ok(step);
                    }
                }
                b'k' => {
                    let end = Lsn(body.u64()?);
                    // Between transactions, all that ends before this has been sent.
                    if self.transaction.is_none() && end > self.position.commit_end {
                        self.position.commit_end = end;
                    }
                }
                other => {
                    let what = format!("stream message '{}'", other.escape_ascii());
                    return Err(PostgresError::Protocol(what).into());
                }
            }
            *cursor += length;
            if self.is_full() {
                return Ok(Step::Full);
            }
        }
        Ok(Step::Consumed)
    }

    fn message<'a>(
        &mut self,
        message: Message<'a>,
        at: &At,
        old: &[Cell<'a>],
        new: &mut [Cell<'a>],
    ) -> Result<Option<Step>, Fault> {
        match message {
            Message::Insert { relation } => {
                if self.counts_as_new()? {
                    return self.row(relation, Operation::Create, at, OldRow::None, old, new);
                }
            }
            Message::Update { relation, old: kind } => {
                if self.counts_as_new()? {
                    return self.row(relation, Operation::Update, at, kind, old, new);
                }
            }
            Message::Delete { relation, old: kind } => {
                if self.counts_as_new()? {
                    return self.row(relation, Operation::Delete, at, kind, old, new);
                }
            }
            Message::Truncate { relations, .. } => {
                if self.counts_as_new()? && !self.settings.skipped.contains(&'t') {
                    if let Some(step) = relations.iter().find_map(|relation| self.try_again(relation, at)) {
                        return Ok(Some(step));
                    }
                    for relation in relations.iter() {
                        self.truncate(relation, at)?;
                    }
                }
            }
            Message::Begin { commit_lsn, commit_time_us, xid } => {
                if self.behind.is_some_and(|end| commit_lsn >= end) {
                    self.behind = None;
                    return Ok(Some(Step::CaughtUp { lsn: at.lsn.max(self.position.commit_end) }));
                }
                let covered = commit_lsn < self.position.commit_end;
                let resumed = xid == self.position.ordinal_xid && self.position.ordinal > 0;
                let skip = match (covered, resumed) {
                    (true, _) => u64::MAX,
                    (false, true) if self.position.fingerprint == self.settings.fingerprint() => self.position.ordinal,
                    (false, true) => {
                        tracing::warn!(
                            xid,
                            "slot or publication was changed in the middle of a transaction that is \
                            partly in the log: it is written again from its start"
                        );
                        0
                    }
                    (false, false) => 0,
                };
                self.transaction =
                    Some(Transaction { xid, commit_lsn, time_us: commit_time_us, ordinal: 0, skip, origin: None });
                self.describe_transaction();
            }
            Message::Commit { end_lsn, commit_time_us, .. } => {
                self.transaction = None;
                self.last_commit_us = Some(commit_time_us);
                let position = &mut self.position;
                if end_lsn > position.commit_end {
                    position.commit_end = end_lsn;
                    position.last_commit = end_lsn;
                    position.ordinal = 0;
                    position.ordinal_xid = 0;
                    position.fingerprint = self.settings.fingerprint();
                    if !position.read_at.is_empty() {
                        position.read_at.retain(|_, until| *until > end_lsn);
                    }
                }
            }
            Message::Relation(relation) => self.announced.push(relation),
            Message::LogicalMessage { transactional, lsn, prefix, content } => {
                return self.logical_message(transactional, lsn, prefix, content, at);
            }
            Message::Origin { name, .. } => {
                if let Some(transaction) = &mut self.transaction {
                    transaction.origin.get_or_insert_with(|| name.into());
                }
                self.describe_transaction();
            }
            Message::Type { .. } => {}
        }
        Ok(None)
    }

    fn describe_transaction(&mut self) {
        if let Some(transaction) = &self.transaction {
            let last_commit = Some(self.position.last_commit);
            let (time_us, xid) = (transaction.time_us, Some(transaction.xid));
            self.meta.reset(&self.settings.encoding, time_us, xid, last_commit, transaction.origin.as_deref());
        }
    }

    /// The snapshot that rows are of: its time (microseconds since 1970) and the first transaction it does not see.
    pub(super) fn describe_snapshot(&mut self, time_us: i64, xid: u32) {
        self.meta.reset(&self.settings.encoding, time_us, Some(xid), None, None);
    }

    /// Counts a change of the transaction; false where it is in the log already.
    #[inline]
    fn counts_as_new(&mut self) -> Result<bool, Fault> {
        let transaction = self.transaction.as_mut().ok_or_else(|| {
            Fault::from(PostgresError::Protocol("pgoutput sent a change outside a transaction".into()))
        })?;
        transaction.ordinal += 1;
        if transaction.ordinal <= transaction.skip {
            return Ok(false);
        }
        self.position.ordinal = transaction.ordinal;
        self.position.ordinal_xid = transaction.xid;
        Ok(true)
    }

    /// Takes a change back that is to be written again.
    fn uncount(&mut self) {
        if let Some(transaction) = &mut self.transaction {
            transaction.ordinal -= 1;
            self.position.ordinal = transaction.ordinal;
        }
    }

    fn row<'a>(
        &mut self,
        oid: Oid,
        operation: Operation,
        at: &At,
        kind: OldRow,
        old: &[Cell<'a>],
        new: &mut [Cell<'a>],
    ) -> Result<Option<Step>, Fault> {
        let Some(captured) = self.relations.get_mut(&oid) else {
            let what = format!("pgoutput sent a row of relation {oid} before the relation");
            return Err(PostgresError::Protocol(what).into());
        };
        let Some(output) = &mut captured.output else {
            return Ok(self.passed_over(oid, operation, at, kind, old, new));
        };
        if self.transaction.as_ref().is_some_and(|transaction| transaction.commit_lsn < captured.from) {
            return Ok(None);
        }
        let letter = match operation {
            Operation::Create => 'c',
            Operation::Update => 'u',
            _ => 'd',
        };
        if self.settings.skipped.contains(&letter) {
            return Ok(None);
        }
        if kind != OldRow::None {
            // The old row has what the new one leaves out as unchanged: all of it, or the key.
            for (new, old) in new.iter_mut().zip(old) {
                if *new == Cell::Unchanged && matches!(old, Cell::Text(_)) {
                    *new = *old;
                }
            }
        }
        let meta = EventMeta {
            transaction: &self.meta,
            operation,
            lsn: at.lsn,
            snapshot: SnapshotMarker::False,
            block: None,
            processed_ns: at.now_ns,
        };
        let mark = self.batch.mark();
        let headers = self.headers.get_or_insert_with(|| self.context.headers(&mut self.batch, None)).clone();
        let mut page = Page { batch: &mut self.batch, number: self.number, output, headers, context: &self.context };
        let tombstones = self.settings.encoding.tombstones_on_delete;
        let (before, after) = (Some(old).filter(|_| kind != OldRow::None), Some(&*new));
        let written = match operation {
            Operation::Update => {
                let moved = kind != OldRow::None && !page.output.plan.same_key(old, new);
                // The old key alone is no row to show as `before`; Debezium shows none either.
                let before = before.filter(|_| kind == OldRow::Full);
                if moved { page.moved(meta, old, new, tombstones) } else { page.event(&meta, before, after) }
            }
            Operation::Delete => page.event(&meta, before, None).map(|()| {
                if tombstones {
                    page.tombstone();
                }
            }),
            _ => page.event(&meta, None, after),
        };
        match written {
            Ok(()) => {
                output.counters.add(operation);
                self.events += 1;
                Ok(None)
            }
            Err(AvroError::NullInRequired { index, .. }) => {
                self.undo(mark);
                self.uncount();
                Ok(Some(Step::Nullable { oid, column: index, lsn: at.lsn }))
            }
            Err(error) => {
                self.undo(mark);
                if let Some(captured) = self.relations.get_mut(&oid) {
                    captured.set_aside();
                    let table = captured.table.full_name();
                    self.quarantine(table, at.lsn, error.to_string());
                }
                Ok(self.passed_over(oid, operation, at, kind, old, new))
            }
        }
    }

    fn undo(&mut self, mark: (usize, usize)) {
        if self.batch.mark() != mark {
            self.batch.undo(mark);
            self.headers = None;
        }
    }

    /// From the change at `since` on nothing of the table is written but deletes. The position says so in the batch that
    /// the change would have been in.
    #[cold]
    pub(super) fn quarantine(&mut self, table: String, since: Lsn, reason: String) {
        let tried_with = self.attempt();
        self.position.quarantined.entry(table).or_insert(Quarantine { since, reason, tried_with });
        self.quarantined = true;
    }

    pub(super) fn attempt(&self) -> u32 {
        self.settings.attempt()
    }

    /// Up to where the position, or the transaction that is being read, has come.
    pub(super) fn reached(&self) -> Lsn {
        self.transaction.as_ref().map_or(self.position.commit_end, |transaction| transaction.commit_lsn)
    }

    /// A change of a table that was refused in a shape of earlier, from before it was read: now it counts.
    #[cold]
    fn try_again(&mut self, oid: Oid, at: &At) -> Option<Step> {
        let reached = self.reached();
        let captured = self.relations.get(&oid)?;
        let again = captured.refused.is_some() && reached >= captured.from;
        if !again || self.position.quarantined.contains_key(&captured.table.full_name()) {
            return None;
        }
        let relation = captured.relation.clone()?;
        self.uncount();
        Some(Step::Relations { relations: vec![relation], lsn: at.lsn })
    }

    /// A change of a table that is not asked for, or in quarantine. There a key that is gone is told all the same: the
    /// table is read anew one day, and what that does not find would stay in the topic for ever.
    #[cold]
    fn passed_over<'a>(
        &mut self,
        oid: Oid,
        operation: Operation,
        at: &At,
        kind: OldRow,
        old: &[Cell<'a>],
        new: &mut [Cell<'a>],
    ) -> Option<Step> {
        if let Some(step) = self.try_again(oid, at) {
            return Some(step);
        }
        let reached = self.reached();
        let captured = self.relations.get_mut(&oid)?;
        let output = captured.aside.as_deref_mut()?;
        let gone = match operation {
            Operation::Delete => true,
            Operation::Update => kind != OldRow::None && !output.plan.same_key(old, new),
            _ => false,
        };
        if !gone || reached < captured.from || self.settings.skipped.contains(&'d') {
            return None;
        }
        let meta = EventMeta {
            transaction: &self.meta,
            operation: Operation::Delete,
            lsn: at.lsn,
            snapshot: SnapshotMarker::False,
            block: None,
            processed_ns: at.now_ns,
        };
        let mark = self.batch.mark();
        let headers = self.headers.get_or_insert_with(|| self.context.headers(&mut self.batch, None)).clone();
        let mut page = Page { batch: &mut self.batch, number: self.number, output, headers, context: &self.context };
        let mut written = page.event(&meta, Some(old), None);
        if written.is_err() {
            // Its key alone, which is what a delete is about.
            let in_key = |(at, cell): (usize, &Cell<'a>)| match captured.table.key.contains(&at) {
                true => *cell,
                false => Cell::Unchanged,
            };
            let bare: Vec<Cell<'a>> = old.iter().enumerate().map(in_key).collect();
            written = page.event(&meta, Some(&bare), None);
        }
        if written.is_err() {
            // No row of such a key was ever written.
            self.undo(mark);
            return None;
        }
        if self.settings.encoding.tombstones_on_delete {
            page.tombstone();
        }
        output.counters.add(Operation::Delete);
        self.events += 1;
        None
    }

    fn truncate(&mut self, oid: Oid, at: &At) -> Result<(), Fault> {
        let Some(captured) = self.relations.get_mut(&oid) else { return Ok(()) };
        let Some(output) = captured.output.as_mut().or(captured.aside.as_deref_mut()) else { return Ok(()) };
        if self.transaction.as_ref().is_some_and(|transaction| transaction.commit_lsn < captured.from) {
            return Ok(());
        }
        let meta = EventMeta {
            transaction: &self.meta,
            operation: Operation::Truncate,
            lsn: at.lsn,
            snapshot: SnapshotMarker::False,
            block: None,
            processed_ns: at.now_ns,
        };
        let headers = self.headers.get_or_insert_with(|| self.context.headers(&mut self.batch, None)).clone();
        let mut page = Page { batch: &mut self.batch, number: self.number, output, headers, context: &self.context };
        page.keyless(&meta).map_err(encoding_fault)?;
        output.counters.add(Operation::Truncate);
        self.events += 1;
        Ok(())
    }

    fn logical_message(
        &mut self,
        transactional: bool,
        lsn: Lsn,
        prefix: &str,
        content: &[u8],
        at: &At,
    ) -> Result<Option<Step>, Fault> {
        if transactional && prefix == ORIGIN_MESSAGE_PREFIX {
            match serde_json::from_slice::<Origin>(content) {
                Ok(origin) => {
                    if let Some(transaction) = &mut self.transaction {
                        transaction.origin = Some(origin.system.into());
                    }
                    self.describe_transaction();
                }
                Err(error) => tracing::warn!(%lsn, %error, "a '{prefix}' message that can't be read is passed over"),
            }
        }
        let wanted = self.settings.wants_message(prefix);
        if wanted && self.messages.is_none() {
            return Ok(Some(Step::Messages));
        }
        // Outside a transaction, `lsn` is the end of the message's record, which is where the next record begins.
        let new = if transactional { self.counts_as_new()? } else { lsn > self.position.commit_end };
        if let Some(messages) = self.messages.as_mut().filter(|_| wanted && new) {
            let alone;
            let transaction = if transactional {
                &self.meta
            } else {
                let time_us = self.last_commit_us.unwrap_or(at.now_ns / 1000);
                let last_commit = Some(self.position.last_commit);
                alone = TransactionMeta::new(&self.settings.encoding, time_us, None, last_commit, None);
                &alone
            };
            let meta = EventMeta {
                transaction,
                operation: Operation::Message,
                lsn: at.lsn,
                snapshot: SnapshotMarker::False,
                block: None,
                processed_ns: at.now_ns,
            };
            messages.write(&mut self.batch, &meta, prefix, content);
            self.events += 1;
        }
        // Outside a transaction it is a point of its own: nothing that ends before it is still to come. Not a byte
        // further: the next record may be a commit, whose own LSN is this one.
        if !transactional && self.transaction.is_none() && new {
            self.position.commit_end = lsn;
        }
        Ok(None)
    }

    /// Writes one row of a snapshot; its bytes are rewritten in place.
    pub(super) fn snapshot_row(
        &mut self,
        captured: &mut Captured,
        row: &mut [u8],
        marker: SnapshotMarker,
        now_ns: i64,
    ) -> Result<RowWritten, Fault> {
        let Some(output) = &mut captured.output else { return Ok(RowWritten::Yes) };
        let mut cells = Vec::with_capacity(captured.table.columns.len());
        self.rows.read(row, &mut cells)?;
        let meta = EventMeta {
            transaction: &self.meta,
            operation: Operation::Read,
            lsn: self.position.commit_end,
            snapshot: marker,
            block: None,
            processed_ns: now_ns,
        };
        let mark = self.batch.mark();
        let headers = self.headers.get_or_insert_with(|| self.context.headers(&mut self.batch, None)).clone();
        let mut page = Page { batch: &mut self.batch, number: self.number, output, headers, context: &self.context };
        match page.event(&meta, None, Some(&cells)) {
            Ok(()) => {
                output.counters.add(Operation::Read);
                self.events += 1;
                Ok(RowWritten::Yes)
            }
            Err(error) => {
                self.undo(mark);
                Ok(match error {
                    AvroError::NullInRequired { index, .. } => RowWritten::Nullable(index),
                    error => RowWritten::Refused(error.to_string()),
                })
            }
        }
    }
}

/// Where a message is.
struct At {
    lsn: Lsn,
    now_ns: i64,
}
