//! A batch worked off: keys in parallel, the events of one key as one attempt.
//!
//! The way of one key: decide under the link's lock (`decide`), send with an intent behind (`sending`), write the
//! outcome (`answered`); what can't be delivered is set aside (`parking`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::RngExt;
use reqwest::Method;
use serde_json::Value;
use tokio::time::Instant;

use super::dead_letters::DeadLetters;
use super::ends::Ends;
use super::intake::Work;
use super::outcome::{Next, Outcome, Rejection};
use super::ownership::Ownership;
use super::settings::Settings;
use super::shape::Shape;
use super::work::KeyWork;
use crate::datastore::{
    Datastore, GenericClient, Link, LinkKey, TableName, lease_owner_alive, restored_at, running_transactions,
};
use crate::event::{Lsn, Operation};
use crate::mapping::Owed;
use crate::pipeline::{ConnectorContext, Counts, Fault, FaultKind, Status};
use crate::registry::EventDecoder;
use crate::sources::log::Revoked;
use crate::systems::{Answer, HttpRequest};

/// Pauses between tries of one record.
const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A commit that others can't see after this is told.
const VISIBLE: Duration = Duration::from_secs(10);
/// How long a table, or a column, that can't be read is taken for one that is being altered: deliveries wait for it.
const ALTERED: Duration = Duration::from_secs(60);
/// After that its records are parked, and tried again by themselves.
pub(super) const MISSING_AGAIN: Duration = Duration::from_secs(30);

pub struct Delivery {
    pub(super) settings: Arc<Settings>,
    pub(super) connector: String,
    pub(super) datastore: Datastore,
    pub(super) decoder: EventDecoder,
    pub(super) shape: Shape,
    pub(super) ownership: Ownership,
    pub(super) dead_letters: DeadLetters,
    pub(super) ends: Ends,
    /// Tables that can't be read, and since when.
    missing: Mutex<HashMap<TableName, Instant>>,
    revoked: Arc<Revoked>,
    /// Where the datastore's WAL stood when it was found to be restored.
    pub(super) restored: Option<Lsn>,
    pub(super) status: Arc<Status>,
}

/// One attempt at a key, over all its tries.
#[derive(Default)]
pub(super) struct Attempt {
    /// `match` has been asked, and found nothing.
    pub looked_up: bool,
    /// The intent whose request is to be sent again as it was, by its idempotency key.
    pub again: Option<String>,
    /// What is sent is not what the row is now: another decision is to follow.
    pub anew: bool,
    /// Answers that asked for another try.
    pub tries: u32,
    /// Requests without an answer: the network's or the system's doing, and not the record's.
    pub unanswered: u32,
    /// The request for people of a step that had no answer and is sent again.
    pub sent_again: Option<String>,
    /// What a create or a step was answered that is neither a yes nor a no: a status of 500 or more, or a refusal after
    /// an earlier try had no answer.
    pub doubtful: Option<Rejection>,
    /// It is not tried again: what `doubtful` says is the end of it, unless the system, asked, has it.
    pub given_up: bool,
    /// Links that were not there when the row was sent as it is now.
    pub owed: Vec<Owed>,
    /// It was sent without some before.
    pub was_owing: bool,
    /// A request was applied.
    pub sent: bool,
    /// Tries that a busy system put off: they are not counted, but their pauses grow.
    pub busy: u32,
    /// It was refused with a status of 500 or more.
    pub(super) refused: bool,
    /// It was told that there is no such thing.
    pub(super) missed: bool,
    pub(super) started: Option<Instant>,
}

impl Attempt {
    /// A status of 500 or more is the record's own only if it comes twice, and so is one that says that what is asked
    /// for is not there: the first time the system may have been half up, and its probe well a moment later.
    pub fn weigh(&mut self, request: &HttpRequest, answer: Answer) -> Answer {
        if !self.missed && says_missing(request, &answer) {
            self.missed = true;
            let reason = format!("{} {} is not there, which is asked once more", request.method, request.shown_path());
            return Answer::Retry { after: None, response: None, reason };
        }
        match answer {
            Answer::Rejected { response, reason } if response.status >= 500 && !self.refused => {
                self.refused = true;
                Answer::Retry { after: None, response: Some(response), reason }
            }
            other => other,
        }
    }

    /// The request in doubt was applied: what comes next has its own tries.
    pub fn is_settled(&mut self) {
        self.doubtful = None;
        self.given_up = false;
        self.tries = 0;
        self.unanswered = 0;
        self.sent = true;
    }
}

/// Not of what a rule of the system has taken as applied, or it would be applied twice; a `DELETE` may be.
pub(super) fn says_missing(request: &HttpRequest, answer: &Answer) -> bool {
    match answer {
        Answer::Applied(response) => request.method == Method::DELETE && matches!(response.status, 404 | 410),
        Answer::Rejected { response, .. } => matches!(response.status, 404 | 410),
        _ => false,
    }
}

pub(super) fn db(error: tokio_postgres::Error) -> Fault {
    crate::datastore::DatastoreError::from(error).into()
}

impl Delivery {
    pub async fn open(
        settings: Arc<Settings>,
        context: &ConnectorContext,
        revoked: Arc<Revoked>,
    ) -> Result<Self, Fault> {
        let alone = context.log.kind() == "embedded";
        let topic = settings.dead_letter_topic.clone().unwrap_or_else(|| format!("dead.{}", context.name));
        Ok(Delivery {
            connector: context.name.to_string(),
            datastore: context.datastore.clone(),
            decoder: EventDecoder::new(context.registry.clone()),
            shape: Shape::resolve(&settings, &context.datastore).await?,
            ownership: Ownership::take(&context.datastore, &context.name, alone).await?,
            dead_letters: DeadLetters::new(context.log.clone(), &context.name, &topic),
            ends: Ends::default(),
            missing: Mutex::default(),
            revoked,
            restored: restored_at(&context.datastore.client().await?).await?,
            status: context.status.clone(),
            settings,
        })
    }

    pub async fn release(&self) {
        self.ownership.release(&self.connector).await;
    }

    /// The table could be read, or not; `true`: not for so long by now that it is not altered just now.
    pub(super) fn is_missing(&self, table: &TableName, can_be_read: bool) -> bool {
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        match can_be_read {
            true => {
                missing.remove(table);
                false
            }
            false => missing.entry(table.clone()).or_insert_with(Instant::now).elapsed() > ALTERED,
        }
    }

    pub(super) fn sends_changes(&self) -> bool {
        matches!(self.shape, Shape::Changes)
    }

    /// Works a batch off, keys in parallel; resolves when every record is applied, skipped or set aside. After a
    /// fault no further key is begun, and those in work are finished.
    pub async fn run(&self, work: Work) -> Result<Counts, Fault> {
        let (works, mut counts) = self.sort(work).await?;
        self.until_visible(&works).await?;
        let mut waiting = works.iter();
        let mut running = FuturesUnordered::new();
        let mut fault: Option<Fault> = None;
        loop {
            while fault.is_none() && running.len() < self.settings.concurrency {
                let Some(work) = waiting.next() else { break };
                running.push(self.key(work));
            }
            match running.next().await {
                None => break,
                Some(Ok(more)) => {
                    counts += more;
                    self.status.set_moved();
                }
                // One that needs a person wins.
                Some(Err(again)) => {
                    if fault.as_ref().is_none_or(|fault| fault.kind != FaultKind::Stop) {
                        fault = Some(again);
                    }
                }
            }
        }
        match fault {
            Some(fault) => Err(fault),
            None => {
                self.status.set_fact("requests_sent", self.settings.system.requests_sent());
                Ok(counts)
            }
        }
    }

    /// Waits until the rows can be read as the events left them.
    async fn until_visible(&self, works: &[KeyWork]) -> Result<(), Fault> {
        let events = works.iter().filter(|work| work.queue.is_none()).flat_map(|work| &work.events);
        let changes = events.map(|event| &event.change).filter(|change| change.operation != Operation::Read);
        let mut xids: Vec<u32> = changes.filter_map(|change| change.xid).collect();
        xids.sort_unstable();
        xids.dedup();
        let (began, mut pause) = (Instant::now(), Duration::from_millis(1));
        while !xids.is_empty() && !self.sends_changes() {
            xids = running_transactions(&self.datastore.client().await?, &xids).await?;
            let Some(xid) = xids.first() else { break };
            if began.elapsed() > VISIBLE {
                return Err(Fault::unavailable(
                    format!(
                        "transaction {xid} is in the WAL, and can't be seen yet for {} s: it waits for a synchronous \
                         standby, most likely",
                        VISIBLE.as_secs()
                    ),
                    None,
                ));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(200));
        }
        Ok(())
    }

    async fn key(&self, work: &KeyWork) -> Result<Counts, Fault> {
        if work.queue.is_none() && self.stand_behind(work).await? {
            return Ok(Counts { waiting: work.events.len() as u64, ..Counts::default() });
        }
        if self.sends_changes() {
            return self.changes(work).await;
        }
        self.rekey(work).await?;
        let mut attempt = Attempt { started: Some(Instant::now()), ..Attempt::default() };
        let outcome = self.attempt(work, &mut attempt).await?;
        self.finish(work, 0, outcome, &attempt).await
    }

    /// True while another worker is at it. Not of an intent whose request must have ended: its owner may live and have
    /// lost the partition since.
    pub(super) async fn is_anothers<C: GenericClient>(&self, client: &C, link: &Link) -> Result<bool, Fault> {
        let Some(intent) = &link.intent else { return Ok(false) };
        Ok(intent.owner != self.ownership.owner()
            && intent.settles_in(link.quiet(), self.settings.settle).is_some()
            && !intent.ended
            && lease_owner_alive(client, &intent.owner).await?)
    }

    /// An `Err` when the work's partition was taken away meanwhile: whoever has it now goes on.
    pub(super) fn held(&self, work: &KeyWork) -> Result<(), Fault> {
        match self.revoked.look(|revoked| work.lost(revoked)) {
            None => Ok(()),
            Some(place) => Err(Fault::retry(format!("{place} was taken away, and is left to whoever has it now"))),
        }
    }

    /// Sleeps, unless the work's partition is taken away.
    pub(super) async fn pause(&self, work: &KeyWork, time: Duration) {
        let lost = self.revoked.until(|revoked| work.lost(revoked).is_some());
        let _ = tokio::time::timeout(time, lost).await;
    }

    /// Tries until the outcome is certain.
    async fn attempt(&self, work: &KeyWork, attempt: &mut Attempt) -> Result<Outcome, Fault> {
        let mut conflicts = 0;
        loop {
            self.held(work)?;
            match self.step(work, attempt).await {
                Ok(Next::Done(Outcome::Skipped(_))) if attempt.sent => return Ok(Outcome::Applied),
                Ok(Next::Done(outcome)) => return Ok(outcome),
                Ok(Next::Again(pause)) => self.pause(work, pause).await,
                // Another transaction was in the way.
                Err(fault) if matches!(fault.kind, FaultKind::Retry { .. }) && conflicts < 5 => {
                    conflicts += 1;
                    tracing::debug!(key = %work.key, %fault, "tried again");
                    self.pause(work, pause_of(conflicts)).await;
                }
                Err(fault) => return Err(fault),
            }
        }
    }

    pub(super) fn link_key(&self, key: &Value) -> LinkKey {
        LinkKey {
            system: self.settings.system.name().to_owned(),
            object: self.settings.object.clone(),
            key: key.clone(),
        }
    }
}

/// What was asked for, if it is longer than the pause of so many tries: a system that asks for none is not to be asked
/// without one.
pub(super) fn pause_after(after: Option<Duration>, tries: u32) -> Duration {
    after.unwrap_or_default().max(pause_of(tries))
}

/// Doubling, capped, half of it by chance.
pub(super) fn pause_of(tries: u32) -> Duration {
    let longest = FIRST_PAUSE.saturating_mul(1 << tries.saturating_sub(1).min(10)).min(LONGEST_PAUSE);
    longest.mul_f64(rand::rng().random_range(0.5..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_cap_differ_and_are_never_shorter_than_asked_for() {
        for tries in 1..100u32 {
            let longest = FIRST_PAUSE.saturating_mul(1 << (tries.min(11) - 1)).min(LONGEST_PAUSE);
            for pause in [pause_of(tries), pause_after(None, tries), pause_after(Some(Duration::ZERO), tries)] {
                assert!(pause >= longest / 2 && pause <= longest, "{tries}: {pause:?}");
            }
        }
        assert!(pause_of(u32::MAX) <= LONGEST_PAUSE && pause_of(u32::MAX) >= LONGEST_PAUSE / 2);
        assert!((0..20).map(|_| pause_of(9)).collect::<std::collections::BTreeSet<_>>().len() > 1);
        assert_eq!(pause_after(Some(Duration::from_secs(90)), 20), Duration::from_secs(90));
    }
}
