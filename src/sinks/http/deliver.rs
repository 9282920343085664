//! A batch worked off: keys in parallel, the events of one key as one attempt.
//!
//! The way of one key: decide under the link's lock (`decide`), send with an intent behind (`sending`), write the
//! outcome (`answered`); what can't be delivered is set aside (`parking`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::RngExt;
use serde_json::Value;
use tokio::time::Instant;

use super::dead_letters::DeadLetters;
use super::intake::Work;
use super::outcome::{Next, Outcome, Rejection};
use super::ownership::Ownership;
use super::settings::Settings;
use super::shape::Shape;
use super::work::KeyWork;
use crate::datastore::{Datastore, GenericClient, Intent, LinkKey, lease_owner_alive};
use crate::pipeline::{ConnectorContext, Counts, Fault, FaultKind, Status};
use crate::registry::EventDecoder;

/// An intent as old as this is resolved by whoever meets it: its owner may live and have lost the partition since.
const LONGEST_INTENT_MS: i64 = 300_000;
/// Pauses between tries of one record.
const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

pub struct Delivery {
    pub(super) settings: Arc<Settings>,
    pub(super) connector: String,
    pub(super) datastore: Datastore,
    pub(super) decoder: EventDecoder,
    pub(super) shape: Shape,
    pub(super) ownership: Ownership,
    pub(super) dead_letters: DeadLetters,
    /// When requests without a certain outcome came to their end, by intent; of those open only.
    pub(super) lost: Mutex<HashMap<String, Instant>>,
    pub(super) status: Arc<Status>,
}

/// One attempt at a key, over all its tries.
#[derive(Default)]
pub(super) struct Attempt {
    /// `match` has been asked, and found nothing.
    pub looked_up: bool,
    /// Of a create that may have gone out before.
    pub idempotency_key: Option<String>,
    pub tries: u32,
    /// The request for people of a step that had no answer and is sent again.
    pub sent_again: Option<String>,
    /// What a create was answered that is neither a yes nor a no: a status of 500 or more.
    pub doubtful: Option<Rejection>,
    /// All its tries are used up: what `doubtful` says is the end of it, unless `match` finds the record.
    pub given_up: bool,
    pub(super) started: Option<Instant>,
}

pub(super) fn db(error: tokio_postgres::Error) -> Fault {
    crate::datastore::DatastoreError::from(error).into()
}

impl Delivery {
    pub async fn open(settings: Arc<Settings>, context: &ConnectorContext) -> Result<Self, Fault> {
        let alone = context.log.kind() == "embedded";
        let topic = settings.dead_letter_topic.clone().unwrap_or_else(|| format!("dead.{}", context.name));
        Ok(Delivery {
            connector: context.name.to_string(),
            datastore: context.datastore.clone(),
            decoder: EventDecoder::new(context.registry.clone()),
            shape: Shape::resolve(&settings, &context.datastore).await?,
            ownership: Ownership::take(&context.datastore, &context.name, alone).await?,
            dead_letters: DeadLetters::new(context.log.clone(), &context.name, &topic),
            lost: Mutex::default(),
            status: context.status.clone(),
            settings,
        })
    }

    pub async fn release(&self) {
        self.ownership.release(&self.connector).await;
    }

    pub(super) fn sends_changes(&self) -> bool {
        matches!(self.shape, Shape::Changes)
    }

    /// Works a batch off, keys in parallel; resolves when every record is applied, skipped or set aside. After a
    /// fault no further key is begun, and those in work are finished.
    pub async fn run(&self, work: Work) -> Result<Counts, Fault> {
        let (works, mut counts) = self.sort(work).await?;
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
                Some(Ok(more)) => counts += more,
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

    async fn key(&self, work: &KeyWork) -> Result<Counts, Fault> {
        if work.queue.is_none() && self.stand_behind(work).await? {
            return Ok(Counts { waiting: work.events.len() as u64, ..Counts::default() });
        }
        if self.sends_changes() {
            return self.changes(work).await;
        }
        self.rekey(work).await?;
        let outcome = self.attempt(work).await?;
        self.finish(work, 0, outcome).await
    }

    /// True while another worker is at it.
    pub(super) async fn is_anothers<C: GenericClient>(&self, client: &C, intent: &Intent) -> Result<bool, Fault> {
        let age = chrono::Utc::now().timestamp_millis() - intent.started_ms;
        Ok(intent.owner != self.ownership.owner()
            && age < LONGEST_INTENT_MS
            && lease_owner_alive(client, &intent.owner).await?)
    }

    /// Tries until the outcome is certain.
    async fn attempt(&self, work: &KeyWork) -> Result<Outcome, Fault> {
        let mut attempt = Attempt { started: Some(Instant::now()), ..Attempt::default() };
        let mut conflicts = 0;
        loop {
            match self.step(work, &mut attempt).await {
                Ok(Next::Done(outcome)) => return Ok(outcome),
                Ok(Next::Again(pause)) => tokio::time::sleep(pause).await,
                // Another transaction was in the way.
                Err(fault) if matches!(fault.kind, FaultKind::Retry { .. }) && conflicts < 5 => {
                    conflicts += 1;
                    tracing::debug!(key = %work.key, %fault, "tried again");
                    tokio::time::sleep(pause_of(conflicts)).await;
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

/// Doubling, capped, half of it by chance.
pub(super) fn pause_of(tries: u32) -> Duration {
    let longest = FIRST_PAUSE.saturating_mul(1 << tries.saturating_sub(1).min(10)).min(LONGEST_PAUSE);
    longest.mul_f64(rand::rng().random_range(0.5..1.0))
}
