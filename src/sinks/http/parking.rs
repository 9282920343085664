//! Records set aside in the datastore, and taken out again (CORRECTNESS 17): before the offset is committed, and in
//! order per key. A dead letter stands for a row that could not be sent as it was: where the row is read anew, its next
//! change is tried in the letter's place, and what it stood for never goes out (CORRECTNESS 13).

use serde_json::Value;

use super::deliver::{Attempt, Delivery, db};
use super::outcome::{Outcome, Rejection};
use super::work::{Event, KeyWork};
use crate::datastore::{BEHIND, Client, NewParked, ParkedKind, has_queue, heal, owe, park, park_behind, unpark};
use crate::log::ConsumedRecord;
use crate::mapping::{Owed, Wanted};
use crate::pipeline::{Counts, Fault};

impl Delivery {
    /// Parks the events behind the key's queue, where it has one.
    pub(super) async fn stand_behind(&self, work: &KeyWork) -> Result<bool, Fault> {
        let mut client = self.datastore.client().await?;
        if !has_queue(&client, &self.connector, &work.key).await? {
            return Ok(false);
        }
        let transaction = client.transaction().await.map_err(db)?;
        let mut news = false;
        for Event { record, .. } in &work.events {
            news |= park_behind(&transaction, &self.connector, &work.key, record).await?;
        }
        if news && !self.sends_changes() {
            heal(&transaction, &self.connector, &work.key).await?;
        }
        transaction.commit().await.map_err(db)?;
        Ok(true)
    }

    /// Writes what became of the events from `from` on: taken out of the queue, or set aside.
    pub(super) async fn finish(
        &self,
        work: &KeyWork,
        from: usize,
        outcome: Outcome,
        attempt: &Attempt,
    ) -> Result<Counts, Fault> {
        let events = &work.events[from..];
        let queue = work.queue.as_ref().unwrap_or(&work.key);
        let rest = events.len().saturating_sub(1) as u64;
        let mut counts = Counts::default();
        let mut closes = None;
        let why = match outcome {
            Outcome::Applied | Outcome::Skipped(_) => {
                if work.queue.is_some() || attempt.was_owing || !attempt.owed.is_empty() {
                    let mut client = self.datastore.client().await?;
                    let transaction = client.transaction().await.map_err(db)?;
                    if work.queue.is_some() {
                        for event in events {
                            unpark(&transaction, &self.connector, queue, &event.record).await?;
                        }
                    }
                    if attempt.was_owing || !attempt.owed.is_empty() {
                        let owing = attempt.owed.first().map(|owed| self.owing(owed));
                        let last = events.last().map(|event| &event.record);
                        owe(&transaction, &self.connector, &work.key, last.zip(owing.as_ref())).await?;
                    }
                    transaction.commit().await.map_err(db)?;
                }
                // The events of one key are one attempt: what came before the last is in it.
                match outcome {
                    Outcome::Applied => counts.applied = 1,
                    _ => counts.skipped = 1,
                }
                counts.skipped += rest;
                if let Outcome::Skipped(why) = outcome {
                    let echo = work.is_echo_of(self.settings.system.name());
                    tracing::trace!(connector = self.connector, key = %work.key, echo, "skipped: {why}");
                    let reason = if echo { "echo" } else { why };
                    metrics::counter!("tidegate_sink_skipped_total", "connector" => self.connector.clone(), "reason" => reason)
                        .increment(1);
                }
                return Ok(counts);
            }
            Outcome::Rejected(mut rejection) => {
                closes = rejection.closes.take();
                tracing::warn!(connector = self.connector, key = %work.key, reason = rejection.reason, "a record was rejected");
                counts.rejected = 1;
                rejected(rejection)
            }
            Outcome::Waiting(wanted) => {
                counts.waiting = 1;
                self.waiting(wanted)
            }
        };
        counts.waiting += rest;
        if why.kind == ParkedKind::Rejected
            && let Some(first) = events.first()
        {
            self.dead_letters.copy(&first.record, &why.reason).await?;
        }
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        if let Some(closes) = &closes {
            self.close_in(&transaction, &closes.key, &closes.intent).await?;
        }
        for (index, event) in events.iter().enumerate() {
            let why = if index == 0 { &why } else { &behind() };
            park(&transaction, &self.connector, queue, &event.record, why).await?;
        }
        transaction.commit().await.map_err(db)?;
        Ok(counts)
    }

    fn owing(&self, (object, key): &Owed) -> NewParked {
        NewParked {
            waits_for: Some((self.settings.system.name().to_owned(), object.clone(), key.clone())),
            deadline_s: Some(self.settings.link_timeout.as_secs_f64()),
            ..NewParked::new(
                ParkedKind::Owing,
                format!("was sent without the link of {object} {key}, and is sent again when that is there"),
            )
        }
    }

    fn waiting(&self, wanted: Wanted) -> NewParked {
        let reason = format!("waits for {wanted}");
        let waits_for = match wanted {
            Wanted::Link { object, key } | Wanted::Later { object, key } => {
                Some((self.settings.system.name().to_owned(), object, key))
            }
            Wanted::Local { .. } => None,
        };
        NewParked {
            waits_for,
            deadline_s: Some(self.settings.link_timeout.as_secs_f64()),
            ..NewParked::new(ParkedKind::Waiting, reason)
        }
    }

    /// Makes a dead letter of one record.
    pub(super) async fn set_rejected(
        &self,
        client: &Client,
        key: &Value,
        record: &ConsumedRecord,
        rejection: Rejection,
    ) -> Result<(), Fault> {
        tracing::warn!(connector = self.connector, %key, reason = rejection.reason, "a record was rejected");
        self.dead_letters.copy(record, &rejection.reason).await?;
        park(client, &self.connector, key, record, &rejected(rejection)).await?;
        Ok(())
    }
}

fn rejected(rejection: Rejection) -> NewParked {
    let Rejection { reason, request, response, waits_for, heals, again_in, closes: _ } = rejection;
    let waits_for = waits_for.map(|link| *link);
    let retry_s = again_in.map(|time| time.as_secs_f64());
    NewParked { request, response, waits_for, heals, retry_s, ..NewParked::new(ParkedKind::Rejected, reason) }
}

fn behind() -> NewParked {
    NewParked::new(ParkedKind::Behind, BEHIND)
}
