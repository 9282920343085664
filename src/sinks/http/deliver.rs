//! The way of one key's events: decide under the link's lock, send with an intent behind, write the outcome.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::RngExt;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;

use super::dead_letters::DeadLetters;
use super::expressions::{Answers, Unmapped};
use super::intake::Work;
use super::outcome::{Next, Outcome, Rejection};
use super::ownership::Ownership;
use super::settings::{Initial, Settings, Update};
use super::shape::Shape;
use super::work::{Event, KeyWork};
use crate::datastore::{
    Client, Datastore, DatastoreErrorKind, GenericClient, Intent, Link, LinkKey, NewParked, ParkedKind, delete_link,
    lease_owner_alive, lock_link, next_push_seq, park, parked_places, rekey_link, save_lines, save_link, unpark,
};
use crate::event::{Change, Operation};
use crate::log::ConsumedRecord;
use crate::mapping::{Program, Scope, Wanted};
use crate::pipeline::{ConnectorContext, Counts, Fault, FaultKind, Status};
use crate::registry::EventDecoder;
use crate::systems::{Answer, HttpRequest, HttpResponse, RequestTemplate};
use crate::twoway::{Direction, MAX_FLIPS, Outgoing, Send, next_flips, what_to_send};

/// Between looks at an intent that another worker has open.
const BUSY: Duration = Duration::from_millis(500);
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
    ownership: Ownership,
    dead_letters: DeadLetters,
    /// When requests without a certain outcome came to their end, by intent; of those open only.
    lost: Mutex<HashMap<String, Instant>>,
    status: Arc<Status>,
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
    started: Option<Instant>,
}

/// A request that is about to be sent, with its intent committed.
struct Job {
    operation: Doing,
    intent: Intent,
    request: HttpRequest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// Step of the create, from 0.
    Create(usize),
    Update,
    Delete,
}

impl Doing {
    fn text(self) -> &'static str {
        match self {
            Doing::Create(0) => "create",
            Doing::Create(_) => "step",
            Doing::Update => "update",
            Doing::Delete => "delete",
        }
    }
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

    /// Parks the events behind the key's queue, where it has one.
    async fn stand_behind(&self, work: &KeyWork) -> Result<bool, Fault> {
        let mut client = self.datastore.client().await?;
        let places = parked_places(&client, &self.connector, &work.key).await?;
        if places.is_empty() {
            return Ok(false);
        }
        let transaction = client.transaction().await.map_err(db)?;
        for Event { record, .. } in &work.events {
            let there = |(topic, partition, offset): &(String, i32, i64)| {
                **topic == *record.topic && *partition == record.partition && *offset == record.offset.0
            };
            if !places.iter().any(there) {
                park(&transaction, &self.connector, &work.key, record, &behind()).await?;
            }
        }
        transaction.commit().await.map_err(db)?;
        Ok(true)
    }

    /// Gives links the new keys of their rows (CORRECTNESS 16).
    async fn rekey(&self, work: &KeyWork) -> Result<(), Fault> {
        for event in &work.events {
            let change = &event.change;
            if change.schema != work.table.schema || change.table != work.table.name {
                // A line of the document: its key is not the root's.
                continue;
            }
            let (old, new) = match (&change.new_key, &change.old_key) {
                (Some(new), _) if change.operation == Operation::Delete => (&change.key, new),
                (_, Some(old)) => (old, &change.key),
                _ => continue,
            };
            let mut tries = 0;
            while !self.try_rekey(&work.table.to_string(), old, new).await? {
                tries += 1;
                if tries > 60 {
                    return Err(Fault::retry(format!(
                        "the link of {old} stays busy, so it can't become that of {new}"
                    )));
                }
                tokio::time::sleep(BUSY).await;
            }
        }
        Ok(())
    }

    /// False while a request for the link is under way.
    async fn try_rekey(&self, table: &str, old: &Value, new: &Value) -> Result<bool, Fault> {
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        let key = self.link_key(old);
        let Some(link) = lock_link(&transaction, &key).await? else { return Ok(true) };
        if link.table != table {
            return Ok(true);
        }
        if let Some(intent) = &link.intent
            && self.is_anothers(&transaction, intent).await?
        {
            return Ok(false);
        }
        rekey_link(&transaction, &key, new).await?;
        transaction.commit().await.map_err(db)?;
        Ok(true)
    }

    /// True while another worker is at it.
    async fn is_anothers<C: GenericClient>(&self, client: &C, intent: &Intent) -> Result<bool, Fault> {
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

    /// One decision, and what it asks for.
    async fn step(&self, work: &KeyWork, attempt: &mut Attempt) -> Result<Next, Fault> {
        let settings = &self.settings;
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        let key = self.link_key(&work.key);
        let link = lock_link(&transaction, &key).await?;
        if let Some(link) = &link
            && link.table != work.table.to_string()
        {
            return Ok(Next::rejected(Rejection::because(format!(
                "key {} of object '{}' is linked to a row of {}, and this row is of {}; hint: rows of two tables can't \
                 share an object: give one of the sinks another `object`",
                work.key, settings.object, link.table, work.table
            ))));
        }
        if let Some(intent) = link.as_ref().and_then(|link| link.intent.clone()) {
            if self.is_anothers(&transaction, &intent).await? {
                return Ok(Next::Again(BUSY));
            }
            drop(transaction);
            drop(client);
            return self.resolve(&key, intent, attempt).await;
        }
        let mut link = link.unwrap_or_else(|| Link::new(key, work.table.to_string()));
        let document = match self.shape.read(&transaction, &work.table, &work.key).await {
            Ok(document) => document,
            Err(error) if error.kind == DatastoreErrorKind::Rejected => {
                return Ok(Next::rejected(Rejection::because(error.message)));
            }
            Err(error) => return Err(error.into()),
        };
        if link.deleted && document.is_some() {
            revive(&mut link, settings.delete.is_some());
        }
        let shown = link.shown();
        let mut answers = Answers::new(settings.system.name());
        let now = match &document {
            None => None,
            Some(document) => {
                if let Some(when) = &settings.when {
                    let held = answers
                        .run(&transaction, |links| when.holds(document, &scope(&shown, None, Some(links))))
                        .await?;
                    match held {
                        Ok(true) => {}
                        Ok(false) => return Ok(Next::skipped("`when` does not hold")),
                        Err(unmapped) => return Ok(not_mapped(unmapped)),
                    }
                }
                match self.map(&transaction, &mut answers, document, &shown).await? {
                    Ok(now) => Some(now),
                    Err(unmapped) => return Ok(not_mapped(unmapped)),
                }
            }
        };
        let base = match (&link.base_doc, &document) {
            // A base that can't be mapped any more is not known.
            (Some(base), Some(_)) => self.map(&transaction, &mut answers, base, &shown).await?.ok(),
            _ => None,
        };
        let decision = what_to_send(
            &Outgoing {
                linked: link.external.is_some(),
                deleted: link.deleted,
                steps_done: link.steps_done(settings.create.len()),
                steps: settings.create.len(),
                base: base.as_ref(),
                now: now.as_ref(),
            },
            settings.fields,
        );
        let (doing, body) = match decision {
            Send::Nothing => {
                if document.is_some() && link.base_doc != document {
                    link.base_doc = document;
                    save_link(&transaction, &link).await?;
                }
                transaction.commit().await.map_err(db)?;
                return Ok(Next::skipped("nothing differs"));
            }
            Send::NothingToDelete => {
                if link.external.is_none() && link.generation > 0 {
                    delete_link(&transaction, &link.key).await?;
                    transaction.commit().await.map_err(db)?;
                }
                return Ok(Next::skipped("the row is gone, and has no counterpart"));
            }
            Send::Create => {
                let snapshot = work.is_snapshot();
                if snapshot && settings.initial == Initial::Skip {
                    return Ok(Next::skipped("`initial: skip`"));
                }
                if settings.matching.is_some() && !attempt.looked_up {
                    drop(transaction);
                    drop(client);
                    return self.pair(work, &document.unwrap_or_default(), attempt).await;
                }
                if snapshot && settings.initial == Initial::Match {
                    return Ok(Next::skipped("not in the system, and `initial: match` creates nothing"));
                }
                if settings.create.is_empty() {
                    return Ok(Next::skipped("not in the system, and nothing is created"));
                }
                (Doing::Create(0), now)
            }
            Send::Finish(step) => (Doing::Create(step), None),
            Send::Update(changed) => match &settings.update {
                Update::Request(_) => {
                    link.flips = next_flips(link.flips, Direction::Push, link.quiet_s);
                    if link.flips > MAX_FLIPS {
                        // A replay starts to count anew.
                        link.flips = 0;
                        save_link(&transaction, &link).await?;
                        transaction.commit().await.map_err(db)?;
                        return Ok(Next::rejected(Rejection::because(format!(
                            "row and record have changed each other more than {MAX_FLIPS} times without a pause; hint: a \
                             trigger or a rule of the system undoes what is sent"
                        ))));
                    }
                    (Doing::Update, Some(changed))
                }
                Update::Reject => {
                    let mut rejection =
                        Rejection::because("the row has changed, and `update: reject` sends no changes");
                    rejection.request = Some(json!({ "changed": changed }));
                    return Ok(Next::rejected(rejection));
                }
                Update::Nothing => {
                    link.base_doc = document;
                    save_link(&transaction, &link).await?;
                    transaction.commit().await.map_err(db)?;
                    return Ok(Next::skipped("changes are not sent (`update` is not set)"));
                }
            },
            Send::Delete if settings.delete.is_none() => {
                link.deleted = true;
                save_link(&transaction, &link).await?;
                transaction.commit().await.map_err(db)?;
                return Ok(Next::skipped("deletes are not sent (`delete` is not set)"));
            }
            Send::Delete => (Doing::Delete, None),
        };
        let document = document.unwrap_or_else(|| gone(work, &link));
        let idempotency_key = attempt.idempotency_key.clone().unwrap_or_else(|| Uuid::new_v4().simple().to_string());
        let job = self.prepare(&transaction, &mut answers, &link, doing, document, body, idempotency_key).await?;
        let job = match job {
            Ok(job) => job,
            Err(unmapped) => return Ok(not_mapped(unmapped)),
        };
        self.ownership.check()?;
        link.intent = Some(job.intent.clone());
        save_link(&transaction, &link).await?;
        transaction.commit().await.map_err(db)?;
        drop(client);
        self.carry_out(work, link.key, job, attempt).await
    }

    /// What a document maps to.
    pub(super) async fn map<C: GenericClient>(
        &self,
        client: &C,
        answers: &mut Answers<'_>,
        document: &Value,
        shown: &Option<Value>,
    ) -> Result<Result<Value, Unmapped>, Fault> {
        let Some(map) = &self.settings.map else {
            return Ok(Ok(document.get("after").cloned().unwrap_or_default()));
        };
        Ok(answers.run(client, |links| map.first(document, &scope(shown, None, Some(links)))).await?)
    }

    fn template(&self, doing: Doing) -> Result<&RequestTemplate, Fault> {
        let template = match (doing, &self.settings.update) {
            (Doing::Create(step), _) => self.settings.create.get(step).map(|step| &step.request),
            (Doing::Update, Update::Request(template)) => Some(&**template),
            (Doing::Update, _) => None,
            (Doing::Delete, _) => self.settings.delete.as_ref(),
        };
        template.ok_or_else(|| Fault::retry(format!("the settings have no request for {}", doing.text())))
    }

    /// The request of a decision, and its intent.
    #[allow(clippy::too_many_arguments)] // all of them are the decision
    async fn prepare<C: GenericClient>(
        &self,
        client: &C,
        answers: &mut Answers<'_>,
        link: &Link,
        doing: Doing,
        document: Value,
        body: Option<Value>,
        idempotency_key: String,
    ) -> Result<Result<Job, Unmapped>, Fault> {
        let template = self.template(doing)?;
        let shown = link.shown();
        let rendered = answers
            .run(client, |links| template.render(&document, &scope(&shown, Some(&idempotency_key), Some(links))))
            .await?;
        let mut request = match rendered {
            Ok(request) => request.purpose(doing.text()),
            Err(unmapped) => return Ok(Err(unmapped)),
        };
        if template.body.is_none() {
            // An action without a body of its own is sent an empty object: many servers refuse a POST with none.
            let wants_body = [Method::POST, Method::PUT, Method::PATCH].contains(&request.method);
            request.body = body.or_else(|| wants_body.then(|| json!({})));
            request.masked.body = self.settings.map.as_ref().is_some_and(Program::masked);
        }
        let intent = Intent {
            id: Uuid::new_v4().simple().to_string(),
            operation: doing.text().to_owned(),
            request: request.line(),
            idempotency_key,
            owner: self.ownership.owner().to_owned(),
            started_ms: chrono::Utc::now().timestamp_millis(),
            document,
        };
        Ok(Ok(Job { operation: doing, intent, request }))
    }

    /// Sends the job's request, and those of the steps after it; writes what came of each.
    async fn carry_out(
        &self,
        work: &KeyWork,
        key: LinkKey,
        mut job: Job,
        attempt: &mut Attempt,
    ) -> Result<Next, Fault> {
        loop {
            let answer = self.settings.system.send(&job.request).await;
            match answer {
                Answer::Applied(response) => match self.applied(&key, &job, Some(&response)).await? {
                    Ok(Some(next)) => job = next,
                    Ok(None) => return Ok(Next::Done(Outcome::Applied)),
                    Err(rejection) => {
                        let rejection = rejection.of(&job.request).answered(response.to_json());
                        return Ok(Next::rejected(rejection));
                    }
                },
                // It is gone already, which is what was asked for.
                Answer::Rejected { response, .. }
                    if job.operation == Doing::Delete && matches!(response.status, 404 | 410) =>
                {
                    self.applied(&key, &job, None).await?.map_err(|rejection| Fault::retry(rejection.reason))?;
                    return Ok(Next::Done(Outcome::Applied));
                }
                Answer::Rejected { response, mut reason } => {
                    self.close_intent(&key, &job.intent.id).await?;
                    if attempt.sent_again.as_ref() == Some(&job.intent.request) {
                        reason += "; an earlier try had no answer and may have gone through; hint: give the step a `done` \
                                   that asks the system";
                    }
                    let rejection = Rejection::because(reason).of(&job.request).answered(response.to_json());
                    return Ok(Next::rejected(rejection));
                }
                // The system may have made it and failed after: as with no answer, it is looked up before it is made
                // again. The intent stays open for that.
                Answer::Retry { after, response: Some(response), reason }
                    if job.operation == Doing::Create(0) && response.status >= 500 =>
                {
                    let mut doubtful =
                        Rejection::because(reason.as_str()).of(&job.request).answered(response.to_json());
                    if self.settings.matching.is_none() && !self.settings.idempotent {
                        self.close_intent(&key, &job.intent.id).await?;
                        doubtful.reason += "; without `match` or an idempotency key nobody knows whether it was applied; \
                                            hint: look in the system: drop this record if it is there, replay it if it \
                                            is not";
                        return Ok(Next::rejected(doubtful));
                    }
                    self.set_lost(&job.intent.id);
                    attempt.looked_up = false;
                    attempt.doubtful = Some(doubtful);
                    return match self.again(attempt, after, Some(response), reason, &job.request)? {
                        // Once more asked, then a dead letter.
                        Next::Done(_) => {
                            attempt.given_up = true;
                            Ok(Next::Again(Duration::ZERO))
                        }
                        again => Ok(again),
                    };
                }
                Answer::Retry { after, response, reason } => {
                    self.close_intent(&key, &job.intent.id).await?;
                    attempt.looked_up = false;
                    attempt.idempotency_key = Some(job.intent.idempotency_key.clone());
                    return self.again(attempt, after, response, reason, &job.request);
                }
                Answer::Unavailable { after, reason, maybe_applied } => {
                    if maybe_applied {
                        self.set_lost(&job.intent.id);
                    } else {
                        self.close_intent(&key, &job.intent.id).await?;
                    }
                    return Err(Fault::unavailable(reason, after));
                }
                Answer::Uncertain { reason } => {
                    // The intent stays open; the next step finds and resolves it.
                    attempt.tries += 1;
                    self.set_lost(&job.intent.id);
                    attempt.looked_up = false;
                    tracing::warn!(connector = self.connector, key = %work.key, "{reason}; what became of it is looked up");
                    if attempt.tries > self.settings.retries {
                        return Err(Fault::unavailable(reason, None));
                    }
                    return Ok(Next::Again(Duration::ZERO));
                }
            }
        }
    }

    /// The intent's request has come to its end, and nobody knows to which.
    fn set_lost(&self, intent: &str) {
        let longest = self.settings.system.longest_request() + self.settings.settle;
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        // Older ones count as those of a worker that is gone, and have waited long enough as such.
        lost.retain(|_, at| at.elapsed() < longest);
        lost.insert(intent.to_owned(), Instant::now());
    }

    /// How long ago the intent's request ended; `None` for one of a worker that is gone.
    pub(super) fn lost_for(&self, intent: &str) -> Option<Duration> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).get(intent).map(Instant::elapsed)
    }

    /// Whether to try again, or to give the record up.
    pub(super) fn again(
        &self,
        attempt: &mut Attempt,
        after: Option<Duration>,
        response: Option<HttpResponse>,
        reason: String,
        request: &HttpRequest,
    ) -> Result<Next, Fault> {
        let spent = attempt.started.map_or(Duration::ZERO, |started| started.elapsed());
        let Some(response) = response else {
            // The system is busy, which is not this record's doing.
            if spent > self.settings.retry_for {
                return Err(Fault::unavailable(reason, after));
            }
            return Ok(Next::Again(after.unwrap_or_else(|| pause_of(1))));
        };
        attempt.tries += 1;
        if attempt.tries > self.settings.retries || spent > self.settings.retry_for {
            let reason = format!("{reason} (tried {} times)", attempt.tries);
            return Ok(Next::rejected(Rejection::because(reason).of(request).answered(response.to_json())));
        }
        Ok(Next::Again(after.unwrap_or_else(|| pause_of(attempt.tries))))
    }

    /// Writes that the request was applied. Some: the next step, its intent committed. `Err`: what came back, or
    /// the next step, is of no use; the intent is closed.
    async fn applied(
        &self,
        key: &LinkKey,
        job: &Job,
        response: Option<&HttpResponse>,
    ) -> Result<Result<Option<Job>, Rejection>, Fault> {
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        let Some(mut link) = self.lock_own(&transaction, key, &job.intent.id).await? else {
            return Err(Fault::retry(format!(
                "the link of {} was taken over while its request was under way",
                key.key
            )));
        };
        link.intent = None;
        link.pushed_seq = next_push_seq(&transaction).await?;
        let empty = Value::Null;
        let answer = response.map_or(&empty, |response| &response.body);
        let template = self.template(job.operation)?;
        let mut refused = None;
        if let Doing::Create(step) = job.operation {
            match external_id(template, step, answer, response) {
                Ok(Some(id)) => link.external = Some(id),
                Ok(None) => {}
                Err(reason) => refused = Some(reason),
            }
            if refused.is_none() {
                link.step = step as i32 + 1;
            }
        }
        if let (Some(keep), Doing::Create(_) | Doing::Update) = (&template.keep, job.operation) {
            match keep_facts(keep, answer, response) {
                Ok(facts) => link.kept.extend(facts),
                Err(reason) => refused = refused.or(Some(reason)),
            }
        }
        if job.operation == Doing::Delete {
            link.deleted = true;
            link.base_doc = None;
            link.step = 0;
        }
        let mut next = None;
        let more = matches!(job.operation, Doing::Create(step) if step + 1 < self.settings.create.len());
        if refused.is_none() && more {
            let mut answers = Answers::new(self.settings.system.name());
            let doing = Doing::Create(link.step as usize);
            let document = job.intent.document.clone();
            let idempotency_key = format!("{}-{}", job.intent.idempotency_key, link.step);
            let prepared =
                self.prepare(&transaction, &mut answers, &link, doing, document, None, idempotency_key).await?;
            match prepared {
                Ok(job) => {
                    link.intent = Some(job.intent.clone());
                    next = Some(job);
                }
                Err(Unmapped::Failed(reason)) => refused = Some(reason),
                Err(Unmapped::Waits(wanted)) => refused = Some(format!("a step of `create` waits for {wanted}")),
            }
        } else if refused.is_none() && job.operation != Doing::Delete {
            link.base_doc = Some(job.intent.document.clone());
            save_lines(&transaction, key, &self.shape.line_keys(&job.intent.document)).await?;
        }
        match save_link(&transaction, &link).await {
            Ok(()) => transaction.commit().await.map_err(db)?,
            Err(error) if error.kind == DatastoreErrorKind::Conflict && link.external.is_some() => {
                drop(transaction);
                drop(client);
                self.close_intent(key, &job.intent.id).await?;
                let id = link.external.unwrap_or_default();
                return Ok(Err(Rejection::because(format!(
                    "the system answered with id {id}, which is linked to another row already"
                ))));
            }
            Err(error) => return Err(error.into()),
        }
        Ok(match refused {
            None => Ok(next),
            Some(reason) => Err(Rejection::because(reason)),
        })
    }

    /// The link, locked, if the intent is still open on it.
    pub(super) async fn lock_own<C: GenericClient>(
        &self,
        transaction: &C,
        key: &LinkKey,
        intent: &str,
    ) -> Result<Option<Link>, Fault> {
        let link = lock_link(transaction, key).await?;
        Ok(link.filter(|link| link.intent.as_ref().is_some_and(|open| open.id == intent)))
    }

    /// The request was not applied: the link is as if it had never been sent.
    pub(super) async fn close_intent(&self, key: &LinkKey, intent: &str) -> Result<(), Fault> {
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        if let Some(mut link) = self.lock_own(&transaction, key, intent).await? {
            link.intent = None;
            if link.external.is_none() && link.base_doc.is_none() && link.base_remote.is_none() {
                delete_link(&transaction, key).await?;
            } else {
                save_link(&transaction, &link).await?;
            }
        }
        transaction.commit().await.map_err(db)
    }

    pub(super) fn link_key(&self, key: &Value) -> LinkKey {
        LinkKey {
            system: self.settings.system.name().to_owned(),
            object: self.settings.object.clone(),
            key: key.clone(),
        }
    }

    /// Writes what became of the events from `from` on: taken out of the queue, or set aside.
    async fn finish(&self, work: &KeyWork, from: usize, outcome: Outcome) -> Result<Counts, Fault> {
        let events = &work.events[from..];
        let queue = work.queue.as_ref().unwrap_or(&work.key);
        let rest = events.len().saturating_sub(1) as u64;
        let mut counts = Counts::default();
        let why = match outcome {
            Outcome::Applied | Outcome::Skipped(_) => {
                if work.queue.is_some() {
                    let mut client = self.datastore.client().await?;
                    let transaction = client.transaction().await.map_err(db)?;
                    for event in events {
                        unpark(&transaction, &self.connector, queue, &event.record).await?;
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
            Outcome::Rejected(rejection) => {
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
        for (index, event) in events.iter().enumerate() {
            let why = if index == 0 { &why } else { &behind() };
            park(&transaction, &self.connector, queue, &event.record, why).await?;
        }
        transaction.commit().await.map_err(db)?;
        Ok(counts)
    }

    fn waiting(&self, wanted: Wanted) -> NewParked {
        let reason = format!("waits for {wanted}");
        let waits_for = match wanted {
            Wanted::Link { object, key } => Some((self.settings.system.name().to_owned(), object, key)),
            Wanted::Local { .. } => None,
        };
        NewParked {
            kind: ParkedKind::Waiting,
            waits_for,
            reason,
            request: None,
            response: None,
            deadline_s: Some(self.settings.link_timeout.as_secs_f64()),
        }
    }

    /// Makes a dead letter of one record.
    pub(super) async fn set_rejected(
        &self,
        client: &Client,
        key: &Value,
        record: &ConsumedRecord,
        rejection: &Rejection,
    ) -> Result<(), Fault> {
        tracing::warn!(connector = self.connector, %key, reason = rejection.reason, "a record was rejected");
        self.dead_letters.copy(record, &rejection.reason).await?;
        let why = rejected(Rejection {
            reason: rejection.reason.clone(),
            request: rejection.request.clone(),
            response: rejection.response.clone(),
        });
        park(client, &self.connector, key, record, &why).await?;
        Ok(())
    }

    /// `send: change`: each event by itself, in order, at least once.
    async fn changes(&self, work: &KeyWork) -> Result<Counts, Fault> {
        let mut counts = Counts::default();
        for (index, event) in work.events.iter().enumerate() {
            let one = KeyWork {
                table: work.table.clone(),
                key: work.key.clone(),
                events: vec![Event { record: event.record.clone(), change: event.change.clone() }],
                queue: work.queue.clone(),
            };
            match self.change(event).await? {
                outcome @ (Outcome::Applied | Outcome::Skipped(_)) => counts += self.finish(&one, 0, outcome).await?,
                outcome => {
                    counts += self.finish(work, index, outcome).await?;
                    break;
                }
            }
        }
        Ok(counts)
    }

    async fn change(&self, event: &Event) -> Result<Outcome, Fault> {
        let change = &event.change;
        if change.origin.as_deref() == Some(self.settings.system.name()) {
            return Ok(Outcome::Skipped("it came from this system"));
        }
        if self.settings.initial == Initial::Skip && change.operation == Operation::Read {
            return Ok(Outcome::Skipped("`initial: skip`"));
        }
        let record = &event.record;
        let idempotency_key = format!("{}/{}/{}/{}", self.connector, record.topic, record.partition, record.offset);
        let input = json!({
            "op": change.operation.letter(), "key": change.key, "before": change.before, "after": change.after,
            "source": {
                "schema": change.schema, "table": change.table, "lsn": change.commit_lsn,
                "ts_us": change.commit_time_us, "origin": change.origin,
            },
        });
        let mut attempt = Attempt { started: Some(Instant::now()), ..Attempt::default() };
        let mut step = 0;
        while let Some(template) = self.settings.create.get(step).map(|step| &step.request) {
            let client = self.datastore.client().await?;
            let mut answers = Answers::new(self.settings.system.name());
            if let Some(when) = &self.settings.when {
                match answers.run(&client, |links| when.holds(&input, &scope(&None, None, Some(links)))).await? {
                    Ok(true) => {}
                    Ok(false) => return Ok(Outcome::Skipped("`when` does not hold")),
                    Err(unmapped) => return Ok(not_mapped_outcome(unmapped)),
                }
            }
            let rendered = answers
                .run(&client, |links| template.render(&input, &scope(&None, Some(&idempotency_key), Some(links))))
                .await?;
            let mut request = match rendered {
                Ok(request) => request.purpose("change"),
                Err(unmapped) => return Ok(not_mapped_outcome(unmapped)),
            };
            if template.body.is_none() {
                let body = match &self.settings.map {
                    None => Ok(input.clone()),
                    Some(map) => {
                        answers.run(&client, |links| map.first(&input, &scope(&None, None, Some(links)))).await?
                    }
                };
                match body {
                    Ok(body) => {
                        request.body = Some(body);
                        request.masked.body = self.settings.map.as_ref().is_some_and(Program::masked);
                    }
                    Err(unmapped) => return Ok(not_mapped_outcome(unmapped)),
                }
            }
            drop(client);
            self.ownership.check()?;
            match self.settings.system.send(&request).await {
                Answer::Applied(_) => step += 1,
                Answer::Rejected { response, reason } => {
                    let rejection = Rejection::because(reason).of(&request).answered(response.to_json());
                    return Ok(Outcome::Rejected(rejection));
                }
                Answer::Retry { after, response, reason } => {
                    match self.again(&mut attempt, after, response, reason, &request)? {
                        Next::Done(outcome) => return Ok(outcome),
                        Next::Again(pause) => tokio::time::sleep(pause).await,
                    }
                }
                Answer::Unavailable { after, reason, .. } => return Err(Fault::unavailable(reason, after)),
                // At least once: the receiver tells events apart by `$idempotency_key`.
                Answer::Uncertain { reason } => {
                    attempt.tries += 1;
                    if attempt.tries > self.settings.retries {
                        return Err(Fault::unavailable(reason, None));
                    }
                    tokio::time::sleep(pause_of(attempt.tries)).await;
                }
            }
        }
        Ok(Outcome::Applied)
    }
}

pub(super) fn scope<'a>(
    link: &'a Option<Value>,
    idempotency_key: Option<&'a str>,
    links: Option<&'a crate::mapping::Links>,
) -> Scope<'a> {
    Scope { link: link.as_ref(), idempotency_key, links, ..Scope::default() }
}

pub(super) fn response_scope(response: Option<&HttpResponse>) -> Scope<'static> {
    Scope { status: response.map(|response| i64::from(response.status)), ..Scope::default() }
}

/// The id in the answer of a create's step: the first step must give one.
fn external_id(
    template: &RequestTemplate,
    step: usize,
    answer: &Value,
    response: Option<&HttpResponse>,
) -> Result<Option<Value>, String> {
    let id = match (&template.id, step) {
        (Some(id), _) => id.first(answer, &response_scope(response)).map_err(|error| format!("`id`: {error}"))?,
        (None, 0) => answer.get("id").cloned().unwrap_or_default(),
        (None, _) => return Ok(None),
    };
    match id {
        Value::String(_) | Value::Number(_) => Ok(Some(id)),
        other => Err(format!(
            "the system took the record, but `{}` finds no id in its answer (it gives {other}); hint: correct `id`, link \
             or remove the record there, then replay",
            template.id.as_ref().map_or(".id", Program::text)
        )),
    }
}

pub(super) fn keep_facts(
    keep: &Program,
    answer: &Value,
    response: Option<&HttpResponse>,
) -> Result<serde_json::Map<String, Value>, String> {
    match keep.first(answer, &response_scope(response)) {
        Ok(Value::Object(facts)) => Ok(facts),
        Ok(Value::Null) => Ok(serde_json::Map::new()),
        Ok(other) => Err(format!("`keep` must give an object; `{}` gives {other}", keep.text())),
        Err(error) => Err(format!("`keep`: {error}")),
    }
}

/// The row is there again. What was deleted there is made anew; what was only left alone is taken up again.
fn revive(link: &mut Link, was_deleted_there: bool) {
    link.deleted = false;
    link.base_doc = None;
    if was_deleted_there {
        link.external = None;
        link.base_remote = None;
        link.remote_version = None;
        link.kept.clear();
        link.step = 0;
    }
}

/// The input of a delete's request: the key, and the row as it was last known.
fn gone(work: &KeyWork, link: &Link) -> Value {
    let before = link.base_doc.as_ref().and_then(|base| base.get("after")).cloned().or_else(|| {
        // Not of a line of the document: that is another row.
        let own = |change: &Change| change.schema == work.table.schema && change.table == work.table.name;
        let changes = work.events.iter().rev().map(|event| &event.change);
        changes.filter(|change| own(change)).map(|change| &change.before).find(|before| before.is_object()).cloned()
    });
    json!({ "key": work.key, "before": before, "after": null })
}

fn not_mapped(unmapped: Unmapped) -> Next {
    Next::Done(not_mapped_outcome(unmapped))
}

fn not_mapped_outcome(unmapped: Unmapped) -> Outcome {
    match unmapped {
        Unmapped::Waits(wanted) => Outcome::Waiting(wanted),
        Unmapped::Failed(reason) => Outcome::Rejected(Rejection::because(reason)),
    }
}

fn rejected(rejection: Rejection) -> NewParked {
    NewParked {
        kind: ParkedKind::Rejected,
        waits_for: None,
        reason: rejection.reason,
        request: rejection.request,
        response: rejection.response,
        deadline_s: None,
    }
}

fn behind() -> NewParked {
    NewParked {
        kind: ParkedKind::Behind,
        waits_for: None,
        reason: "stands behind an earlier record of its key".into(),
        request: None,
        response: None,
        deadline_s: None,
    }
}

/// Doubling, capped, half of it by chance.
fn pause_of(tries: u32) -> Duration {
    let longest = FIRST_PAUSE.saturating_mul(1 << tries.saturating_sub(1).min(10)).min(LONGEST_PAUSE);
    longest.mul_f64(rand::rng().random_range(0.5..1.0))
}
