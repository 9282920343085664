//! A decision carried out: its request, those of the steps after it, and what becomes of each.
//!
//! The invariant: a request whose outcome is not certain leaves its intent open.

use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::Instant;

use super::decide::{Doing, Job};
use super::deliver::{Attempt, Delivery, pause_of};
use super::outcome::{Next, Outcome, Rejection};
use super::work::KeyWork;
use crate::datastore::LinkKey;
use crate::pipeline::Fault;
use crate::systems::{Answer, HttpRequest, HttpResponse};

impl Delivery {
    /// Sends the job's request, and those of the steps after it; writes what came of each.
    pub(super) async fn carry_out(
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
}
