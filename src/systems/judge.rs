//! What came back, or did not, classed by what is to be done about it.

use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::classes::{Class, Meaning, meaning};
use super::exchange::{Lost, NO_ANSWER};
use super::system::{JUST_NOW, System};
use super::{Answer, HttpRequest, HttpResponse, headers};

impl System {
    /// What an answer means, and whether an outage is certain.
    pub(super) async fn class(&self, request: &HttpRequest, response: HttpResponse) -> (Answer, bool) {
        let answered = Instant::now();
        let status = response.status;
        for rule in self.settings.rules.iter().filter(|rule| rule.matches_status(status)) {
            let mut certain = false;
            let probe = if rule.asks_probe() {
                let probed = self.probe(answered).await;
                certain = !probed.ok && probed.sent;
                json!({ "ok": probed.ok, "status": probed.status, "reason": probed.reason })
            } else {
                Value::Null
            };
            match rule.class(status, &response.body, &probe) {
                Ok(Some(class)) => {
                    let outage = certain && class == Class::Unavailable;
                    return (self.answer(class, request, response), outage);
                }
                Ok(None) => {}
                // Not the record's fault, and no reason to lose it.
                Err(error) => {
                    let reason = format!("a rule of `errors` of '{}' failed: {error}", self.name());
                    return (Answer::Retry { after: None, response: Some(response), reason }, false);
                }
            }
        }
        let after = headers::retry_after(&response);
        let page = response.is_page();
        match if page { Meaning::AskProbe } else { meaning(status, request.method == Method::DELETE) } {
            Meaning::Class(class) => (self.answer(class, request, response), false),
            Meaning::Busy => {
                let reason = self.reason(request, &response);
                (Answer::Retry { after, response: None, reason }, false)
            }
            Meaning::GatewayLost => {
                let reason = self.reason(request, &response);
                (Answer::Unavailable { after, reason, maybe_applied: true }, false)
            }
            Meaning::Credentials => {
                let reason = format!("{}; check `auth` of system '{}'", self.reason(request, &response), self.name());
                (Answer::Unavailable { after, reason, maybe_applied: false }, false)
            }
            Meaning::NotThere(class) if self.settings.probe.is_none() => (self.answer(class, request, response), false),
            Meaning::NotThere(class) => {
                // What changes nothing may be asked often: an answer of just now will do.
                let since =
                    if request.is_safe() { answered.checked_sub(JUST_NOW).unwrap_or(answered) } else { answered };
                let probed = self.probe(since).await;
                if probed.ok {
                    return (self.answer(class, request, response), false);
                }
                let reason = format!("{}, and {}", self.reason(request, &response), probed.reason);
                (Answer::Unavailable { after, reason, maybe_applied: false }, true)
            }
            Meaning::AskProbe if self.settings.probe.is_none() => (self.answer(Class::Retry, request, response), false),
            Meaning::AskProbe => {
                let probed = self.probe(answered).await;
                // Where the probe is answered with a page, too, that one says nothing of the system.
                if probed.ok && !(page && probed.page) {
                    return (self.answer(Class::Retry, request, response), false);
                }
                let reason = format!("{}, and {}", self.reason(request, &response), probed.reason);
                match probed.sent {
                    true => (Answer::Unavailable { after, reason, maybe_applied: true }, true),
                    // Neither the record's fault nor an outage, as far as is known.
                    false if request.is_safe() => (Answer::Retry { after, response: None, reason }, false),
                    false => (Answer::Uncertain { reason }, false),
                }
            }
        }
    }

    fn answer(&self, class: Class, request: &HttpRequest, response: HttpResponse) -> Answer {
        let after = headers::retry_after(&response);
        let reason = self.reason(request, &response);
        match class {
            Class::Applied => Answer::Applied(response),
            Class::Reject => Answer::Rejected { response, reason },
            Class::Retry => Answer::Retry { after, response: Some(response), reason },
            Class::Unavailable => Answer::Unavailable { after, reason, maybe_applied: response.status >= 500 },
        }
    }

    fn reason(&self, request: &HttpRequest, response: &HttpResponse) -> String {
        let answer = self.without_secrets(response.excerpt());
        let line = format!("{} {} answered {}", request.method, request.shown_path(), response.status);
        if response.is_page() {
            return format!(
                "{line} with a web page, as for people: {answer}; hint: is `base_url` right, and does something before \
                 the system want a login? If pages are what it answers with, say so: `errors: [{{ status: {}, then: \
                 applied }}]`",
                response.status
            );
        }
        format!("{line}: {answer}")
    }

    fn too_long(&self) -> String {
        format!(
            "the answer is longer than {}; hint: ask for fewer records at a time (the paginator's `limit`) or fewer \
             fields, or raise `response.limit` of system '{}'",
            self.settings.response_limit,
            self.name()
        )
    }

    pub(super) fn no_answer(&self, request: &HttpRequest, lost: Lost) -> Answer {
        let line = format!("{} {}", request.method, request.shown_path());
        match lost {
            Lost::Unfit(reason) => {
                let response = HttpResponse { status: 0, headers: Vec::new(), body: Value::Null };
                Answer::Rejected { response, reason: format!("{line} can't be sent: {reason}") }
            }
            Lost::NotSent(reason) => {
                Answer::Unavailable { after: None, reason: format!("{line}: {reason}"), maybe_applied: false }
            }
            Lost::TooLong(status) => {
                let reason = format!("{line} answered {status}: {}", self.too_long());
                if request.is_safe() {
                    let response = HttpResponse { status, headers: Vec::new(), body: Value::Null };
                    return Answer::Rejected { response, reason };
                }
                Answer::Uncertain { reason }
            }
            Lost::AfterSending(reason) if request.is_safe() => {
                Answer::Retry { after: None, response: None, reason: format!("{line}: {NO_ANSWER}: {reason}") }
            }
            Lost::AfterSending(reason) => Answer::Uncertain { reason: format!("{line}: {NO_ANSWER}: {reason}") },
            Lost::NoTurn(wait) => Answer::Retry {
                after: Some(wait),
                response: None,
                reason: format!("the budget of '{}' is used up for {} s", self.name(), wait.as_secs()),
            },
            Lost::KeptBack(reason) => Answer::Retry { after: None, response: None, reason },
            Lost::Credentials(reason) => Answer::Unavailable { after: None, reason, maybe_applied: false },
        }
    }
}
