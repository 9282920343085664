//! `send: change`: each event by itself, in order, at least once, without a link.

use serde_json::json;
use tokio::time::Instant;

use super::decide::{not_mapped_outcome, scope};
use super::deliver::{Attempt, Delivery, pause_of};
use super::expressions::Answers;
use super::outcome::{Next, Outcome, Rejection};
use super::settings::Initial;
use super::work::{Event, KeyWork};
use crate::event::Operation;
use crate::mapping::Program;
use crate::pipeline::{Counts, Fault};
use crate::systems::Answer;

impl Delivery {
    pub(super) async fn changes(&self, work: &KeyWork) -> Result<Counts, Fault> {
        let mut counts = Counts::default();
        for (index, event) in work.events.iter().enumerate() {
            let one = KeyWork {
                table: work.table.clone(),
                key: work.key.clone(),
                events: vec![Event { record: event.record.clone(), change: event.change.clone() }],
                queue: work.queue.clone(),
                told: work.told,
            };
            match self.change(&one, event).await? {
                outcome @ (Outcome::Applied | Outcome::Skipped(_)) => {
                    counts += self.finish(&one, 0, outcome, &Attempt::default()).await?
                }
                outcome => {
                    counts += self.finish(work, index, outcome, &Attempt::default()).await?;
                    break;
                }
            }
        }
        Ok(counts)
    }

    async fn change(&self, work: &KeyWork, event: &Event) -> Result<Outcome, Fault> {
        let change = &event.change;
        if !self.settings.echo && change.origin.as_deref() == Some(self.settings.system.name()) {
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
            let ready = || {
                self.ownership.check().map_err(|fault| fault.message)?;
                self.held(work).map_err(|fault| fault.message)
            };
            self.ownership.check()?;
            self.held(work)?;
            match attempt.weigh(&request, self.settings.system.send_if(&request, &ready).await) {
                Answer::Applied(_) => step += 1,
                Answer::Rejected { response, reason } => {
                    let rejection =
                        Rejection::because(reason).of(&request).answered(self.settings.system.shown(&response));
                    return Ok(Outcome::Rejected(rejection));
                }
                Answer::Retry { after, response, reason } => {
                    match self.again(&mut attempt, after, response, reason, &request)? {
                        Next::Done(outcome) => return Ok(outcome),
                        Next::Again(pause) => self.pause(work, pause).await,
                    }
                }
                Answer::Unavailable { after, reason, .. } => return Err(Fault::unavailable(reason, after)),
                // At least once: the receiver tells events apart by `$idempotency_key`.
                Answer::Uncertain { reason } => {
                    attempt.unanswered += 1;
                    if attempt.unanswered > self.settings.retries {
                        return Err(Fault::unavailable(reason, None));
                    }
                    self.pause(work, pause_of(attempt.unanswered)).await;
                }
            }
        }
        Ok(Outcome::Applied)
    }
}
