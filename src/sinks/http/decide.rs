//! One decision about a key, under its link's lock: what is to be sent, with its intent committed, or why nothing is.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Map, Value, json};
use tokio::time::Instant;
use uuid::Uuid;

use super::deliver::{Attempt, Delivery, MISSING_AGAIN, db};
use super::ends::End;
use super::expressions::{Answers, Unmapped};
use super::outcome::{Next, Outcome, Rejection};
use super::settings::{Initial, Update};
use super::work::KeyWork;
use crate::datastore::{DatastoreErrorKind, GenericClient, Intent, Link, delete_link, lock_link, save_link};
use crate::event::Change;
use crate::mapping::{Links, Owed, Program, Scope};
use crate::pipeline::Fault;
use crate::systems::{HttpRequest, RequestTemplate};
use crate::twoway::{Direction, Fields, MAX_RETURNS, Outgoing, Send, Turns, difference, what_to_send};

/// Between looks at an intent that another worker has open.
const BUSY: Duration = Duration::from_millis(500);

/// A request that is about to be sent, with its intent committed.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) operation: Doing,
    pub(super) intent: Intent,
    pub(super) request: HttpRequest,
    /// Before the intent was written.
    pub(super) begun: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// Step of the create, from 0.
    Create(usize),
    Update,
    Delete,
}

impl Doing {
    /// What the intent is for; of a create's steps, `done` are.
    pub(super) fn of(intent: &Intent, done: usize) -> Self {
        match intent.operation.as_str() {
            "create" => Doing::Create(0),
            "step" => Doing::Create(done),
            "update" => Doing::Update,
            _ => Doing::Delete,
        }
    }

    pub(super) fn text(self) -> &'static str {
        match self {
            Doing::Create(0) => "create",
            Doing::Create(_) => "step",
            Doing::Update => "update",
            Doing::Delete => "delete",
        }
    }
}

/// What is to be sent.
pub(super) struct Decision {
    pub(super) doing: Doing,
    pub(super) document: Value,
    /// Links that are not there, and that the document is mapped without.
    pub(super) owed: Vec<Owed>,
    /// Columns that it tells of, each with the value agreed on before.
    pub(super) sent: Map<String, Value>,
    /// What the connector's map gives, where the request has no body of its own.
    pub(super) body: Option<Value>,
    pub(super) idempotency_key: String,
    /// Before the transaction that writes the intent.
    pub(super) begun: Instant,
}

impl Delivery {
    /// One decision, and what it asks for.
    pub(super) async fn step(&self, work: &KeyWork, attempt: &mut Attempt) -> Result<Next, Fault> {
        let settings = &self.settings;
        let begun = Instant::now();
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
        if let Some(link) = &link
            && let Some(intent) = link.intent.clone()
        {
            if self.is_anothers(&transaction, link).await? {
                return Ok(Next::Again(BUSY));
            }
            match self.ends.of(&intent.id) {
                Some(End::NotApplied) => {
                    drop(transaction);
                    drop(client);
                    self.not_applied(&key, &intent.id).await?;
                    return Ok(Next::Again(Duration::ZERO));
                }
                Some(End::Applied(end)) => {
                    drop(transaction);
                    drop(client);
                    let (job, response) = *end;
                    return self.carry_out(work, key, job, attempt, Some(response)).await;
                }
                None => {}
            }
            if attempt.again.take_if(|again| *again == intent.id).is_some() {
                let mut link = link.clone();
                let job = match self.same_again(&transaction, &link, intent, begun).await? {
                    Ok(job) => job,
                    Err(unmapped) => return Ok(not_mapped(unmapped)),
                };
                self.ownership.check()?;
                link.intent = Some(job.intent.clone());
                save_link(&transaction, &link).await?;
                transaction.commit().await.map_err(db)?;
                drop(client);
                attempt.anew = true;
                return self.carry_out(work, link.key, job, attempt, None).await;
            }
            let quiet = link.quiet();
            drop(transaction);
            drop(client);
            return self.resolve(&key, intent, quiet, attempt).await;
        }
        let mut link = link.unwrap_or_else(|| Link::new(key, work.table.to_string()));
        let document = match self.shape.read(&transaction, &work.table, &work.key).await {
            Ok(document) => {
                self.is_missing(&work.table, true);
                document
            }
            Err(error) if error.kind == DatastoreErrorKind::Rejected => {
                return Ok(Next::rejected(Rejection::of_row(error.message)));
            }
            // A table that is altered is there again in a moment; one that is gone must not hold up the others.
            Err(error) if error.kind == DatastoreErrorKind::Setup && self.is_missing(&work.table, false) => {
                let rejection = Rejection { again_in: Some(MISSING_AGAIN), ..Rejection::of_row(error.message) };
                return Ok(Next::rejected(rejection));
            }
            Err(error) => return Err(error.into()),
        };
        if link.deleted && document.is_some() {
            revive(&mut link, settings.delete.is_some());
        }
        attempt.was_owing |= !link.owed.is_empty();
        attempt.owed.clear();
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
        let owed = answers.owed().to_vec();
        let base = match (&link.base_doc, &document) {
            // A base that can't be mapped any more is not known. It was sent without the links that were owed then.
            (Some(base), Some(_)) => self.map(&transaction, &mut answers.without(&link.owed), base, &shown).await?.ok(),
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
                if document.is_some() && (link.base_doc != document || link.owed != owed) {
                    link.base_doc = document;
                    link.owed.clone_from(&owed);
                    save_link(&transaction, &link).await?;
                }
                transaction.commit().await.map_err(db)?;
                attempt.owed = owed;
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
                if let Some(restored) = self.restored
                    && settings.matching.is_none()
                    && !work.told
                    && !work.is_made_since(restored)
                {
                    return Ok(Next::rejected(Rejection::because(
                        "the datastore was restored, or another took its place, after this row was made: without `match` \
                         nobody knows whether it is in the system already; hint: look there: drop this record if it is, \
                         replay it if it is not",
                    )));
                }
                (Doing::Create(0), now)
            }
            Send::Finish(step) => (Doing::Create(step), None),
            Send::Update(changed) => match &settings.update {
                Update::Request(_) => {
                    let turns = Turns::of(link.turns.as_ref()).after(Direction::Push, &changed, link.quiet_s);
                    link.turns = Some(turns.to_value());
                    if turns.is_fight() {
                        // A replay starts to count anew.
                        link.turns = None;
                        save_link(&transaction, &link).await?;
                        transaction.commit().await.map_err(db)?;
                        return Ok(Next::rejected(Rejection::because(format!(
                            "row and record have changed each other again and again without a pause, more than \
                             {MAX_RETURNS} times to what they were before; hint: a trigger or a rule of the system undoes \
                             what is sent"
                        ))));
                    }
                    (Doing::Update, Some(changed))
                }
                Update::Reject => {
                    let mut rejection = Rejection::of_row("the row has changed, and `update: reject` sends no changes");
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
        let idempotency_key = Uuid::new_v4().simple().to_string();
        attempt.owed.clone_from(&owed);
        let sent = match doing {
            // What a create sent tells something beside an answer only: nothing was seen of the record before.
            Doing::Create(_) if settings.create.iter().all(|step| step.request.record.is_none()) => Map::new(),
            Doing::Create(_) => self.sent_columns(&transaction, &mut answers, None, &document, &shown).await?,
            Doing::Update => {
                self.sent_columns(&transaction, &mut answers, link.base_doc.as_ref(), &document, &shown).await?
            }
            Doing::Delete => Map::new(),
        };
        let decision = Decision { doing, document, owed, sent, body, idempotency_key, begun };
        let job = self.prepare(&transaction, &mut answers, &link, decision).await?;
        let job = match job {
            Ok(job) => job,
            Err(unmapped) => return Ok(not_mapped(unmapped)),
        };
        self.ownership.check()?;
        link.intent = Some(job.intent.clone());
        save_link(&transaction, &link).await?;
        if let Err(error) = transaction.commit().await {
            // It may be there, but its request was not sent.
            self.ends.know(&job.intent.id, End::NotApplied);
            return Err(db(error));
        }
        drop(client);
        self.carry_out(work, link.key, job, attempt, None).await
    }

    /// The request of an open intent once more, as it was: a system that knows it by its idempotency key answers as it
    /// did then, whatever the row is now.
    async fn same_again<C: GenericClient>(
        &self,
        client: &C,
        link: &Link,
        intent: Intent,
        begun: Instant,
    ) -> Result<Result<Job, Unmapped>, Fault> {
        let doing = Doing::of(&intent, link.steps_done(self.settings.create.len()));
        let shown = link.shown();
        let mut answers = Answers::new(self.settings.system.name()).without(&intent.owed);
        let mut body = None;
        if matches!(doing, Doing::Create(0) | Doing::Update) {
            let now = match self.map(client, &mut answers, &intent.document, &shown).await? {
                Ok(now) => now,
                Err(unmapped) => return Ok(Err(unmapped)),
            };
            let base = match &link.base_doc {
                Some(base) if doing == Doing::Update && self.settings.fields == Fields::Changed => {
                    self.map(client, &mut answers.without(&link.owed), base, &shown).await?.ok()
                }
                _ => None,
            };
            body = Some(base.map_or_else(|| now.clone(), |base| difference(&base, &now)));
        }
        let Intent { document, owed, sent, idempotency_key, .. } = intent;
        let decision = Decision { doing, document, owed, sent, body, idempotency_key, begun };
        self.prepare(client, &mut answers, link, decision).await
    }

    /// A request can be sent again, known as the same by its idempotency key.
    pub(super) fn is_idempotent(&self, doing: Doing) -> bool {
        match doing {
            Doing::Create(step) => self.settings.create.get(step).is_some_and(|step| step.idempotent),
            Doing::Update => self.settings.idempotent.update,
            Doing::Delete => self.settings.idempotent.delete,
        }
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

    pub(super) fn template(&self, doing: Doing) -> Result<&RequestTemplate, Fault> {
        let template = match (doing, &self.settings.update) {
            (Doing::Create(step), _) => self.settings.create.get(step).map(|step| &step.request),
            (Doing::Update, Update::Request(template)) => Some(&**template),
            (Doing::Update, _) => None,
            (Doing::Delete, _) => self.settings.delete.as_ref(),
        };
        template.ok_or_else(|| Fault::retry(format!("the settings have no request for {}", doing.text())))
    }

    /// The request of a decision, and its intent.
    pub(super) async fn prepare<C: GenericClient>(
        &self,
        client: &C,
        answers: &mut Answers<'_>,
        link: &Link,
        decision: Decision,
    ) -> Result<Result<Job, Unmapped>, Fault> {
        let Decision { doing, document, owed, sent, body, idempotency_key, begun } = decision;
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
        let system = &self.settings.system;
        let intent = Intent {
            id: Uuid::new_v4().simple().to_string(),
            operation: doing.text().to_owned(),
            request: request.line(),
            idempotency_key,
            owner: self.ownership.owner().to_owned(),
            started_ms: chrono::Utc::now().timestamp_millis(),
            longest_ms: (system.longest_turn() + system.time_limit(&request)).as_millis() as i64,
            ended: false,
            document,
            owed,
            sent,
        };
        Ok(Ok(Job { operation: doing, intent, request, begun }))
    }
}

pub(super) fn scope<'a>(
    link: &'a Option<Value>,
    idempotency_key: Option<&'a str>,
    links: Option<&'a Links>,
) -> Scope<'a> {
    Scope { link: link.as_ref(), idempotency_key, links, ..Scope::default() }
}

/// The row is there again. What was deleted there is made anew; what was only left alone is taken up again.
fn revive(link: &mut Link, was_deleted_there: bool) {
    link.deleted = false;
    link.base_doc = None;
    link.owed.clear();
    if was_deleted_there {
        link.external = None;
        link.base_remote = None;
        link.sent = None;
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

pub(super) fn not_mapped_outcome(unmapped: Unmapped) -> Outcome {
    match unmapped {
        Unmapped::Waits(wanted) => Outcome::Waiting(wanted),
        Unmapped::Failed(reason) => Outcome::Rejected(Rejection::of_row(reason)),
    }
}
