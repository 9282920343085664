//! A decision carried out: its request, those of the steps after it, and what becomes of each.
//!
//! The invariants: a request whose outcome is not certain leaves its intent open; and none leaves when its intent may
//! be in other hands: later than its turn allows, after the lease has lapsed, or after the partition was taken away.

use std::sync::OnceLock;
use std::time::Duration;

use tokio::time::Instant;

use super::answered::Applied;
use super::decide::{Doing, Job};
use super::deliver::{Attempt, Delivery, db, pause_after};
use super::outcome::{Next, Outcome, Rejection};
use super::work::KeyWork;
use crate::datastore::{LinkKey, save_link};
use crate::pipeline::Fault;
use crate::systems::{Answer, HttpRequest, HttpResponse};

impl Delivery {
    /// Sends the job's request, and those of the steps after it; writes what came of each. `known`: the answer to the first
    /// has come already, and could not be written then.
    pub(super) async fn carry_out(
        &self,
        work: &KeyWork,
        key: LinkKey,
        mut job: Job,
        attempt: &mut Attempt,
        mut known: Option<Option<HttpResponse>>,
    ) -> Result<Next, Fault> {
        // An earlier try may have gone through: that this one did not tells nothing of that one, whose intent stays.
        let mut resent = attempt.anew;
        loop {
            if let Some(None) = known {
                self.write_gone(&key, &job).await?;
                return Ok(Next::Done(Outcome::Applied));
            }
            let left = OnceLock::new();
            let ready = || {
                left.get_or_init(Instant::now);
                let system = &self.settings.system;
                if job.begun.elapsed() > system.longest_turn() {
                    return Err(format!("its turn in the budget of '{}' came too late", system.name()));
                }
                self.ownership.check().map_err(|fault| fault.message)?;
                self.held(work).map_err(|fault| fault.message)
            };
            let answer = match known.take().flatten() {
                Some(response) => Answer::Applied(response),
                None => self.settings.system.send_if(&job.request, &ready).await,
            };
            let took = left.get().map_or(Duration::ZERO, Instant::elapsed);
            // Where nobody knows what became of it, it is not sent again to see.
            let blind = job.operation == Doing::Create(0)
                && self.settings.matching.is_none()
                && !self.is_idempotent(job.operation);
            let answer = if blind { answer } else { attempt.weigh(&job.request, answer) };
            match answer {
                Answer::Applied(response) => match self.applied(&key, &job, Some(&response)).await? {
                    Ok(Applied::Step(next)) => {
                        job = *next;
                        resent = false;
                    }
                    Ok(Applied::Anew) => {
                        attempt.sent = true;
                        return Ok(Next::Again(Duration::ZERO));
                    }
                    Ok(Applied::All) if std::mem::take(&mut attempt.anew) => {
                        attempt.sent = true;
                        return Ok(Next::Again(Duration::ZERO));
                    }
                    Ok(Applied::All) => return Ok(Next::Done(Outcome::Applied)),
                    Err(rejection) => {
                        // The system took it: it may be sent again only where it would be found.
                        let found = job.operation != Doing::Create(0) || self.settings.matching.is_some();
                        let rejection = rejection.of(&job.request).answered(self.settings.system.shown(&response));
                        return Ok(Next::rejected(rejection.healing(found)));
                    }
                },
                // It is gone already, which is what was asked for.
                Answer::Rejected { response, .. }
                    if job.operation == Doing::Delete && matches!(response.status, 404 | 410) =>
                {
                    self.write_gone(&key, &job).await?;
                    return Ok(Next::Done(Outcome::Applied));
                }
                // An earlier try without an answer may have gone through after all, later than was waited for, and be why
                // this one is refused: asked once more.
                Answer::Rejected { response, reason } if attempt.unanswered > 0 && self.can_ask(job.operation) => {
                    let rejection =
                        Rejection::because(reason).of(&job.request).answered(self.settings.system.shown(&response));
                    self.set_ended(&key, &job.intent.id, took).await;
                    attempt.doubtful = Some(rejection.healing(self.settings.matching.is_some()));
                    attempt.given_up = true;
                    return Ok(Next::Again(Duration::ZERO));
                }
                Answer::Rejected { response, mut reason } => {
                    match resent || attempt.unanswered > 0 {
                        true => self.close_intent(&key, &job.intent.id).await?,
                        false => self.not_applied(&key, &job.intent.id).await?,
                    }
                    let mut heals = !blind || !matches!(response.status, 300..400 | 500..);
                    if attempt.sent_again.as_ref() == Some(&job.intent.request) {
                        heals = false;
                        reason += "; an earlier try had no answer and may have gone through; hint: give the step a `done` \
                                   that asks the system";
                    }
                    let rejection =
                        Rejection::because(reason).of(&job.request).answered(self.settings.system.shown(&response));
                    return Ok(Next::rejected(rejection.healing(heals)));
                }
                // The system may have made it and failed after: as with no answer, it is looked up before it is made
                // again. The intent stays open for that.
                Answer::Retry { after, response: Some(response), reason }
                    if job.operation == Doing::Create(0) && response.is_doubtful() =>
                {
                    let mut doubtful = Rejection::because(reason.as_str())
                        .of(&job.request)
                        .answered(self.settings.system.shown(&response))
                        .healing(self.settings.matching.is_some());
                    if blind {
                        doubtful = doubtful.closing(&key, &job.intent.id);
                        doubtful.reason += "; without `match` or an idempotency key nobody knows whether it was applied; \
                                            hint: look in the system: drop this record if it is there, replay it if it \
                                            is not";
                        return Ok(Next::rejected(doubtful));
                    }
                    self.set_ended(&key, &job.intent.id, took).await;
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
                // The same of what can be asked, or known as the same.
                Answer::Retry { after, response: Some(response), reason }
                    if response.is_doubtful() && self.can_tell(job.operation) =>
                {
                    let next = self.again(attempt, after, Some(response), reason, &job.request)?;
                    match next {
                        Next::Done(_) => self.close_intent(&key, &job.intent.id).await?,
                        Next::Again(_) => self.set_ended(&key, &job.intent.id, took).await,
                    }
                    return Ok(next);
                }
                Answer::Retry { after, response, reason }
                    if resent || job.operation == Doing::Delete && attempt.missed =>
                {
                    let next = self.again(attempt, after, response, reason, &job.request)?;
                    match next {
                        Next::Done(_) => self.close_intent(&key, &job.intent.id).await?,
                        Next::Again(_) => attempt.again = Some(job.intent.id),
                    }
                    return Ok(next);
                }
                Answer::Retry { after, response, reason } => {
                    self.not_applied(&key, &job.intent.id).await?;
                    attempt.looked_up = false;
                    return self.again(attempt, after, response, reason, &job.request);
                }
                Answer::Unavailable { after, reason, maybe_applied } => {
                    if maybe_applied || resent {
                        self.set_ended(&key, &job.intent.id, took).await;
                    } else {
                        self.not_applied(&key, &job.intent.id).await?;
                    }
                    return Err(Fault::unavailable(reason, after));
                }
                Answer::Uncertain { reason } => {
                    // The intent stays open; the next step finds and resolves it.
                    attempt.unanswered += 1;
                    self.set_ended(&key, &job.intent.id, took).await;
                    attempt.looked_up = false;
                    tracing::warn!(connector = self.connector, key = %work.key, "{reason}; what became of it is looked up");
                    if attempt.unanswered > self.settings.retries {
                        return Err(Fault::unavailable(reason, None));
                    }
                    return Ok(Next::Again(Duration::ZERO));
                }
            }
        }
    }

    /// What was to be deleted is gone.
    async fn write_gone(&self, key: &LinkKey, job: &Job) -> Result<(), Fault> {
        let written = self.applied(key, job, None).await?;
        written.map(drop).map_err(|rejection| Fault::retry(rejection.reason))
    }

    /// Whether a request that may or may not have been applied does no harm when it is resolved.
    fn can_tell(&self, doing: Doing) -> bool {
        doing == Doing::Delete
            || self.is_idempotent(doing)
            || matches!(doing, Doing::Create(step) if step > 0) && self.can_ask(doing)
    }

    /// Whether the settings say how to ask the system if the request was applied.
    fn can_ask(&self, doing: Doing) -> bool {
        match doing {
            Doing::Create(0) => self.settings.matching.is_some(),
            Doing::Create(step) => self.settings.create.get(step).is_some_and(|step| step.done.is_some()),
            Doing::Update | Doing::Delete => false,
        }
    }

    /// The intent's request has come to its end, and nobody knows to which: whoever has the key next need not wait for
    /// that end. Where it can't be written, its time tells.
    async fn set_ended(&self, key: &LinkKey, intent: &str, took: Duration) {
        let written = async {
            let mut client = self.datastore.client().await?;
            let transaction = client.transaction().await.map_err(db)?;
            if let Some(mut link) = self.lock_own(&transaction, key, intent).await? {
                if let Some(intent) = &mut link.intent {
                    intent.ended = true;
                    intent.longest_ms = took.as_millis() as i64;
                }
                save_link(&transaction, &link).await?;
            }
            transaction.commit().await.map_err(db)
        };
        if let Err(fault) = written.await {
            tracing::debug!(key = %key.key, %fault, "the end of a request is not noted");
        }
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
            attempt.busy += 1;
            return Ok(Next::Again(pause_after(after, attempt.busy)));
        };
        attempt.tries += 1;
        if attempt.tries > self.settings.retries || spent > self.settings.retry_for {
            let reason = format!("{reason} (tried {} times)", attempt.tries);
            return Ok(Next::rejected(
                Rejection::of_row(reason).of(request).answered(self.settings.system.shown(&response)),
            ));
        }
        Ok(Next::Again(pause_after(after, attempt.tries)))
    }
}
