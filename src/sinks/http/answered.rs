//! The outcome of a request written to its link, while the intent is still there.

use serde_json::{Map, Value};
use tokio::time::Instant;

use super::decide::{Decision, Doing, Job};
use super::deliver::{Delivery, db};
use super::ends::End;
use super::expressions::{Answers, Unmapped};
use super::outcome::Rejection;
use super::sent;
use crate::datastore::{GenericClient, Link, LinkKey, delete_link, lock_link, next_push_seq, save_lines, save_link};
use crate::mapping::{Program, Scope};
use crate::pipeline::Fault;
use crate::systems::{HttpResponse, RequestTemplate};

/// What follows a request that was applied.
pub(super) enum Applied {
    /// The next step of a create, its intent committed.
    Step(Box<Job>),
    /// Another decision: more than was sent has changed.
    Anew,
    All,
}

impl Delivery {
    /// Writes that the request was applied; where that can't be written now, it is known when the link is looked at
    /// again. `Err`: what came back, or the next step, is of no use; the intent is closed when that is parked.
    pub(super) async fn applied(
        &self,
        key: &LinkKey,
        job: &Job,
        response: Option<&HttpResponse>,
    ) -> Result<Result<Applied, Rejection>, Fault> {
        let written = self.write_applied(key, job, response).await;
        if written.is_err() {
            self.ends.know(&job.intent.id, End::Applied(Box::new((job.clone(), response.cloned()))));
        }
        written
    }

    async fn write_applied(
        &self,
        key: &LinkKey,
        job: &Job,
        response: Option<&HttpResponse>,
    ) -> Result<Result<Applied, Rejection>, Fault> {
        let begun = Instant::now();
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
            link.owed.clear();
            link.step = 0;
        } else if let Err(reason) = sent::remember(&mut link, &job.intent, template, response) {
            refused = refused.or(Some(reason));
        }
        let mut next = None;
        let more = matches!(job.operation, Doing::Create(step) if step + 1 < self.settings.create.len());
        if refused.is_none() && more {
            let mut answers = Answers::new(self.settings.system.name());
            let doing = Doing::Create(link.step as usize);
            let document = job.intent.document.clone();
            let idempotency_key = format!("{}-{}", job.intent.idempotency_key, link.step);
            let (owed, sent) = (job.intent.owed.clone(), job.intent.sent.clone());
            let decision = Decision { doing, document, owed, sent, body: None, idempotency_key, begun };
            match self.prepare(&transaction, &mut answers, &link, decision).await? {
                Ok(job) => {
                    link.intent = Some(job.intent.clone());
                    next = Some(job);
                }
                Err(Unmapped::Failed(reason)) => refused = Some(reason),
                Err(Unmapped::Waits(wanted)) => refused = Some(format!("a step of `create` waits for {wanted}")),
            }
        }
        // What the steps after the first send is no part of what was agreed.
        if refused.is_none() && matches!(job.operation, Doing::Create(0) | Doing::Update) {
            link.base_doc = Some(job.intent.document.clone());
            link.owed.clone_from(&job.intent.owed);
            save_lines(&transaction, key, &self.shape.line_keys(&job.intent.document)).await?;
        }
        if refused.is_some() {
            link.intent = Some(job.intent.clone());
        }
        match save_link(&transaction, &link).await {
            Ok(()) => {
                if let Err(error) = transaction.commit().await {
                    // Whether it was committed or not, the next step was not sent.
                    if let Some(next) = next {
                        self.ends.know(&next.intent.id, End::NotApplied);
                    }
                    return Err(db(error));
                }
            }
            Err(error) if error.is_taken() && link.external.is_some() => {
                let id = link.external.unwrap_or_default();
                let rejection = Rejection::because(format!(
                    "the system answered with id {id}, which is linked to another row already"
                ));
                return Ok(Err(rejection.closing(key, &job.intent.id)));
            }
            Err(error) => return Err(error.into()),
        }
        Ok(match refused {
            None => Ok(match next {
                Some(next) => Applied::Step(Box::new(next)),
                // The row has changed since it was made: the steps that were left said nothing of it.
                None if job.operation != Doing::Delete && link.base_doc.as_ref() != Some(&job.intent.document) => {
                    Applied::Anew
                }
                None => Applied::All,
            }),
            Some(reason) => Err(Rejection::because(reason).closing(key, &job.intent.id)),
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

    /// The request was not applied, and may be sent anew; where that can't be written now, it is known when the link is
    /// looked at again.
    pub(super) async fn not_applied(&self, key: &LinkKey, intent: &str) -> Result<(), Fault> {
        let closed = self.close_intent(key, intent).await;
        match &closed {
            Ok(()) => self.ends.forget(intent),
            Err(_) => self.ends.know(intent, End::NotApplied),
        }
        closed
    }

    /// The link is as if the request had never been sent.
    pub(super) async fn close_intent(&self, key: &LinkKey, intent: &str) -> Result<(), Fault> {
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        self.close_in(&transaction, key, intent).await?;
        transaction.commit().await.map_err(db)
    }

    pub(super) async fn close_in<C: GenericClient>(
        &self,
        transaction: &C,
        key: &LinkKey,
        intent: &str,
    ) -> Result<(), Fault> {
        let Some(mut link) = self.lock_own(transaction, key, intent).await? else { return Ok(()) };
        link.intent = None;
        if link.external.is_none() && link.base_doc.is_none() && link.base_remote.is_none() {
            delete_link(transaction, key).await?;
        } else {
            save_link(transaction, &link).await?;
        }
        Ok(())
    }
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
) -> Result<Map<String, Value>, String> {
    match keep.first(answer, &response_scope(response)) {
        Ok(Value::Object(facts)) => Ok(facts),
        Ok(Value::Null) => Ok(Map::new()),
        Ok(other) => Err(format!("`keep` must give an object; `{}` gives {other}", keep.text())),
        Err(error) => Err(format!("`keep`: {error}")),
    }
}
