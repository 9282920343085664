//! Asking the system before something is made: counterparts of rows without a link, and what became of a request
//! whose answer was lost (CORRECTNESS 19).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Map, Value};

use super::answered::{keep_facts, response_scope};
use super::decide::{Doing, scope};
use super::deliver::{Attempt, Delivery, db, says_missing};
use super::expressions::{Answers, Unmapped};
use super::outcome::{Next, Outcome, Rejection};
use super::sent;
use super::settings::Update;
use super::work::KeyWork;
use crate::datastore::{
    Intent, Link, LinkKey, delete_link, find_link, link_by_external, lock_link, next_push_seq, save_lines, save_link,
};
use crate::pipeline::Fault;
use crate::systems::Answer;

/// What `match` found.
enum Found {
    Nothing,
    One {
        id: Value,
        kept: Map<String, Value>,
    },
    Several(Vec<Value>),
    /// The question itself came to something else.
    Not(Next),
}

impl Delivery {
    /// Asks `match` about a document.
    async fn look_up(&self, document: &Value, attempt: &mut Attempt) -> Result<Found, Fault> {
        let Some(matching) = &self.settings.matching else { return Ok(Found::Nothing) };
        let client = self.datastore.client().await?;
        let mut answers = Answers::new(self.settings.system.name());
        let rendered =
            answers.run(&client, |links| matching.render(document, &scope(&None, None, Some(links)))).await?;
        drop(client);
        let request = match rendered {
            Ok(request) => request.purpose("match"),
            Err(Unmapped::Waits(wanted)) => return Ok(Found::Not(Next::Done(Outcome::Waiting(wanted)))),
            Err(Unmapped::Failed(reason)) => {
                return Ok(Found::Not(Next::rejected(Rejection::of_row(format!("`match`: {reason}")))));
            }
        };
        let system = &self.settings.system;
        let well = AtomicBool::new(false);
        let ready = || {
            well.store(system.was_just_well(), Ordering::Relaxed);
            Ok(())
        };
        let answer = system.send_if(&request, &ready).await;
        // Of a system that was well right before it was asked, the first word will do: many say of each row that is new
        // that it is not there.
        let believed = well.into_inner() && says_missing(&request, &answer);
        let answer = if believed { answer } else { attempt.weigh(&request, answer) };
        let response = match answer {
            Answer::Applied(response) => response,
            Answer::Rejected { response, .. } if matches!(response.status, 404 | 410) => return Ok(Found::Nothing),
            Answer::Rejected { response, reason } => {
                let rejection = Rejection::of_row(format!("`match` was refused: {reason}"));
                return Ok(Found::Not(Next::rejected(
                    rejection.of(&request).answered(self.settings.system.shown(&response)),
                )));
            }
            Answer::Retry { after, response, reason } => {
                return self.again(attempt, after, response, reason, &request).map(Found::Not);
            }
            Answer::Unavailable { after, reason, .. } => return Err(Fault::unavailable(reason, after)),
            Answer::Uncertain { reason } => return Err(Fault::retry(reason)),
        };
        let failed = |reason: String| {
            let rejection = Rejection::of_row(format!("`match`: {reason}"))
                .of(&request)
                .answered(self.settings.system.shown(&response));
            Ok(Found::Not(Next::rejected(rejection)))
        };
        let Some(id) = &matching.id else { return failed("it has no `id`".into()) };
        let ids = match id.run(&response.body, &response_scope(Some(&response))) {
            Ok(ids) => ids,
            Err(error) => return failed(error.to_string()),
        };
        let mut found: Vec<Value> = Vec::new();
        for id in ids {
            match id {
                Value::Null => {}
                Value::String(_) | Value::Number(_) if found.contains(&id) => {}
                Value::String(_) | Value::Number(_) => found.push(id),
                other => return failed(format!("`id` must give a text or a number, and gives {other}")),
            }
        }
        let kept = match &matching.keep {
            Some(keep) if found.len() == 1 => match keep_facts(keep, &response.body, Some(&response)) {
                Ok(kept) => kept,
                Err(reason) => return failed(reason),
            },
            _ => Map::new(),
        };
        Ok(match found.len() {
            0 => Found::Nothing,
            1 => Found::One { id: found.swap_remove(0), kept },
            _ => Found::Several(found),
        })
    }

    /// Pairs a row that has no link with its counterpart, where the system has one.
    pub(super) async fn pair(&self, work: &KeyWork, document: &Value, attempt: &mut Attempt) -> Result<Next, Fault> {
        let (id, kept) = match self.look_up(document, attempt).await? {
            Found::Nothing => {
                attempt.looked_up = true;
                return Ok(Next::Again(Duration::ZERO));
            }
            Found::One { id, kept } => (id, kept),
            Found::Several(ids) => return Ok(Next::rejected(several(&ids))),
            Found::Not(next) => return Ok(next),
        };
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        let key = self.link_key(&work.key);
        let link = lock_link(&transaction, &key).await?;
        if link.as_ref().is_some_and(|link| link.intent.is_some() || (link.external.is_some() && !link.deleted)) {
            return Ok(Next::Again(Duration::ZERO));
        }
        if let Some(other) = self.linked_elsewhere(&transaction, &key, &id).await? {
            return Ok(Next::rejected(other));
        }
        let mut link = link.unwrap_or_else(|| Link::new(key, work.table.to_string()));
        link.external = Some(id);
        link.kept = kept;
        link.deleted = false;
        link.step = self.settings.create.len() as i32;
        // What the two agree on is not known yet: the next change sends everything. Rows of a first run are only
        // paired; which side is right then is not for the sink to say.
        link.base_doc = match self.settings.update {
            Update::Request(_) => None,
            _ => Some(document.clone()),
        };
        save_link(&transaction, &link).await?;
        transaction.commit().await.map_err(db)?;
        if work.is_snapshot() || link.base_doc.is_some() {
            return Ok(Next::Done(Outcome::Applied));
        }
        Ok(Next::Again(Duration::ZERO))
    }

    /// An intent is open whose request nobody will hear of any more: finds out what became of it.
    /// `quiet`: how long ago the link was written.
    pub(super) async fn resolve(
        &self,
        key: &LinkKey,
        intent: Intent,
        quiet: Duration,
        attempt: &mut Attempt,
    ) -> Result<Next, Fault> {
        if let Some(rest) = intent.settles_in(quiet, self.settings.settle) {
            // The system may still be at it.
            return Ok(Next::Again(rest.max(Duration::from_millis(10))));
        }
        tracing::info!(connector = self.connector, key = %key.key, request = intent.request, "an open intent is resolved");
        if intent.operation == "step" {
            return self.resolve_step(key, &intent, attempt).await;
        }
        let idempotent = self.is_idempotent(Doing::of(&intent, 0));
        // A delete is carried to its end though the row be back by now: it can't be told from one that was done, and
        // there may be nothing more to change.
        if intent.operation == "delete" && self.settings.delete.is_some() {
            return Ok(same_again(&intent, attempt));
        }
        if intent.operation != "create" {
            return if idempotent { Ok(same_again(&intent, attempt)) } else { self.forget(key, &intent).await };
        }
        if self.settings.matching.is_some() {
            return match self.look_up(&intent.document, attempt).await? {
                Found::Nothing => {
                    if attempt.given_up
                        && let Some(doubtful) = attempt.doubtful.take()
                    {
                        self.close_intent(key, &intent.id).await?;
                        return Ok(Next::rejected(doubtful));
                    }
                    attempt.looked_up = true;
                    if idempotent {
                        return Ok(same_again(&intent, attempt));
                    }
                    self.close_intent(key, &intent.id).await?;
                    Ok(Next::Again(Duration::ZERO))
                }
                Found::One { id, kept } => {
                    attempt.is_settled();
                    self.adopt(key, &intent, id, kept).await
                }
                Found::Several(ids) => {
                    self.close_intent(key, &intent.id).await?;
                    Ok(Next::rejected(several(&ids)))
                }
                Found::Not(next) => {
                    if matches!(next, Next::Done(_)) {
                        self.close_intent(key, &intent.id).await?;
                    }
                    Ok(next)
                }
            };
        }
        if idempotent && !attempt.given_up {
            return Ok(same_again(&intent, attempt));
        }
        if attempt.given_up
            && let Some(doubtful) = attempt.doubtful.take()
        {
            return Ok(Next::rejected(doubtful.closing(key, &intent.id)));
        }
        let rejection = Rejection::because(format!(
            "no answer came to {}, and without `match` or an idempotency key nobody knows whether it was applied; hint: \
             look in the system: drop this record if it is there, replay it if it is not",
            intent.request
        ));
        Ok(Next::rejected(rejection.closing(key, &intent.id)))
    }

    /// A step of a create had no answer: asks whether it is done, where the settings say how.
    async fn resolve_step(&self, key: &LinkKey, intent: &Intent, attempt: &mut Attempt) -> Result<Next, Fault> {
        let client = self.datastore.client().await?;
        let Some(link) = find_link(&client, key).await? else { return Ok(Next::Again(Duration::ZERO)) };
        let step = self.settings.create.get(link.steps_done(self.settings.create.len()));
        let idempotent = step.is_some_and(|step| step.idempotent);
        let Some(done) = step.and_then(|step| step.done.as_ref()) else {
            if idempotent {
                return Ok(same_again(intent, attempt));
            }
            attempt.sent_again = Some(intent.request.clone());
            return self.forget(key, intent).await;
        };
        let shown = link.shown();
        let mut answers = Answers::new(self.settings.system.name());
        let rendered = answers
            .run(&client, |links| done.request.render(&intent.document, &scope(&shown, None, Some(links))))
            .await?;
        drop(client);
        let request = match rendered {
            Ok(request) => request.purpose("done"),
            Err(Unmapped::Waits(wanted)) => return Ok(Next::Done(Outcome::Waiting(wanted))),
            Err(Unmapped::Failed(reason)) => {
                return Ok(Next::rejected(Rejection::of_row(format!("`done`: {reason}"))));
            }
        };
        let response = match attempt.weigh(&request, self.settings.system.send(&request).await) {
            Answer::Applied(response) => response,
            Answer::Rejected { response, reason } => {
                let rejection = Rejection::of_row(format!("`done` was refused: {reason}"));
                return Ok(Next::rejected(rejection.of(&request).answered(self.settings.system.shown(&response))));
            }
            Answer::Retry { after, response, reason } => {
                return self.again(attempt, after, response, reason, &request);
            }
            Answer::Unavailable { after, reason, .. } => return Err(Fault::unavailable(reason, after)),
            Answer::Uncertain { reason } => return Err(Fault::retry(reason)),
        };
        match done.when.holds(&response.body, &response_scope(Some(&response))) {
            Ok(false) if attempt.given_up => {
                self.close_intent(key, &intent.id).await?;
                let given_up = attempt.doubtful.take().unwrap_or_else(|| Rejection::because("the step is not done"));
                Ok(Next::rejected(given_up))
            }
            Ok(false) if idempotent => Ok(same_again(intent, attempt)),
            Ok(false) => self.forget(key, intent).await,
            Ok(true) => {
                attempt.is_settled();
                self.step_is_done(key, intent).await
            }
            Err(error) => {
                let rejection = Rejection::of_row(format!("`done`: {error}"));
                Ok(Next::rejected(rejection.of(&request).answered(self.settings.system.shown(&response))))
            }
        }
    }

    async fn step_is_done(&self, key: &LinkKey, intent: &Intent) -> Result<Next, Fault> {
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        if let Some(mut link) = self.lock_own(&transaction, key, &intent.id).await? {
            link.intent = None;
            link.step += 1;
            link.pushed_seq = next_push_seq(&transaction).await?;
            save_link(&transaction, &link).await?;
            transaction.commit().await.map_err(db)?;
        }
        Ok(Next::Again(Duration::ZERO))
    }

    /// An update or a step is decided and sent again; what an update reached is not known.
    async fn forget(&self, key: &LinkKey, intent: &Intent) -> Result<Next, Fault> {
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        if let Some(mut link) = self.lock_own(&transaction, key, &intent.id).await? {
            link.intent = None;
            if intent.operation == "update" {
                sent::lost(&mut link);
                link.base_doc = None;
            }
            save_link(&transaction, &link).await?;
            transaction.commit().await.map_err(db)?;
        }
        Ok(Next::Again(Duration::ZERO))
    }

    /// The create went through: the link gets what the lost answer said.
    async fn adopt(&self, key: &LinkKey, intent: &Intent, id: Value, kept: Map<String, Value>) -> Result<Next, Fault> {
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        let Some(mut link) = self.lock_own(&transaction, key, &intent.id).await? else {
            return Ok(Next::Again(Duration::ZERO));
        };
        if let Some(other) = self.linked_elsewhere(&transaction, key, &id).await? {
            drop(transaction);
            drop(client);
            self.close_intent(key, &intent.id).await?;
            return Ok(Next::rejected(other));
        }
        link.intent = None;
        link.external = Some(id);
        link.kept = kept;
        link.step = 1;
        // Only the first step is known to be done; the others follow.
        link.base_doc = Some(intent.document.clone());
        link.owed.clone_from(&intent.owed);
        save_lines(&transaction, key, &self.shape.line_keys(&intent.document)).await?;
        save_link(&transaction, &link).await?;
        transaction.commit().await.map_err(db)?;
        Ok(Next::Again(Duration::ZERO))
    }

    /// Why `id` can't be linked to `key`, where another row has it. The link of a deleted row gives way.
    async fn linked_elsewhere(
        &self,
        transaction: &crate::datastore::Transaction<'_>,
        key: &LinkKey,
        id: &Value,
    ) -> Result<Option<Rejection>, Fault> {
        let other = link_by_external(transaction, &key.system, &key.object, id, true).await?;
        match other.filter(|other| other.key != *key) {
            None => Ok(None),
            Some(other) if other.deleted => {
                delete_link(transaction, &other.key).await?;
                Ok(None)
            }
            Some(other) => Ok(Some(Rejection::of_row(format!(
                "`match` finds {} {id}, which is linked to row {} already; hint: two rows answer to the same question",
                key.object, other.key.key
            )))),
        }
    }
}

/// The intent stays open until the same request takes its place: nobody makes another meanwhile, whatever happens.
fn same_again(intent: &Intent, attempt: &mut Attempt) -> Next {
    attempt.again = Some(intent.id.clone());
    Next::Again(Duration::ZERO)
}

fn several(ids: &[Value]) -> Rejection {
    let shown: Vec<_> = ids.iter().take(10).map(ToString::to_string).collect();
    Rejection::of_row(format!(
        "`match` finds {} records ({}); hint: join them in the system, or ask more narrowly, then replay",
        ids.len(),
        shown.join(", ")
    ))
}
