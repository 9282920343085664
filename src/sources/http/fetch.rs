//! One page asked for, and the answer as the run takes it.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::paginator::Position;
use super::run::Run;
use super::settings::PullSettings;
use crate::datastore::{Datastore, push_seq_now};
use crate::mapping::Scope;
use crate::pipeline::{Fault, FaultKind};
use crate::systems::{Answer, HttpRequest, HttpResponse};

/// A page as it came.
pub(super) struct Fetched {
    pub request: HttpRequest,
    pub answered: Answered,
    /// Noted before it was asked for.
    pub push_seq: i64,
    /// From before it was asked for until the answer was there.
    pub took: Duration,
}

pub(super) enum Answered {
    Page(HttpResponse),
    /// There is no such page: the listing has ended before it.
    NoPage,
    /// It can't be had like this, for this reason.
    Refused(String),
}

impl Fetched {
    pub fn response(&self) -> Option<&HttpResponse> {
        match &self.answered {
            Answered::Page(response) => Some(response),
            Answered::NoPage | Answered::Refused(_) => None,
        }
    }

    /// By the system's own clock (the header `Date`), a time before it looked for what it answered.
    pub fn asked_at(&self) -> Option<DateTime<Utc>> {
        let answered = DateTime::parse_from_rfc2822(self.response()?.header("date")?).ok()?.to_utc();
        answered.checked_sub_signed(chrono::TimeDelta::from_std(self.took).ok()?)
    }
}

/// The page that the run has come to.
pub(super) async fn fetch(settings: Arc<PullSettings>, datastore: Datastore, run: &Run) -> Result<Fetched, Fault> {
    let position = &run.next;
    let push_seq = match position {
        // Noted when the run began, which was before any request.
        Position::Start if run.pages == 0 => run.listed.push_seq,
        _ => push_seq_now(&datastore.client().await?).await?,
    };
    let page = settings.paginator.shown(position, &run.tie);
    let scope = Scope { cursor: Some(&run.since), page: Some(&page), ..Scope::default() };
    let request = settings.request.render(&Value::Null, &scope);
    let mut request = request.map_err(|error| Fault::stop(format!("`request`: {error}")))?.purpose("pull");
    settings.paginator.turn_to(&mut request, position);
    let asked = tokio::time::Instant::now();
    let answer = settings.system.send(&request).await;
    let took = asked.elapsed();
    let answered = match answer {
        Answer::Applied(response) => Answered::Page(response),
        Answer::Rejected { response, .. } if response.status == 404 && settings.paginator.ends_by_404(position) => {
            Answered::NoPage
        }
        Answer::Rejected { reason, .. } => Answered::Refused(reason),
        Answer::Retry { after, reason, .. } => {
            return Err(Fault { kind: FaultKind::Retry { after }, message: reason });
        }
        Answer::Unavailable { after, reason, .. } => return Err(Fault::unavailable(reason, after)),
        // A listing by POST changes nothing: it is asked again.
        Answer::Uncertain { reason } => return Err(Fault::retry(reason)),
    };
    Ok(Fetched { request, answered, push_seq, took })
}
