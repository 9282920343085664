//! What a push tells the pulls of its object: which columns it sent, and what the system answered (CORRECTNESS 14, 20).
//!
//! A record that a pull sees next is compared with this, so that a value which was put back is told from one that the
//! system never took.

use serde_json::{Map, Value};

use super::answered::response_scope;
use super::deliver::Delivery;
use super::expressions::Answers;
use crate::datastore::{GenericClient, Intent, Link};
use crate::pipeline::Fault;
use crate::systems::{HttpResponse, RequestTemplate};
use crate::twoway::{Sent, changed_columns, other_than, same};

impl Delivery {
    /// The columns of a document that differ from what is agreed on and are seen in what is sent, each with its agreed
    /// value (null where nothing is known to be agreed on): by itself, changed in the one or put back in the other.
    pub(super) async fn sent_columns<C: GenericClient>(
        &self,
        client: &C,
        answers: &mut Answers<'_>,
        agreed: Option<&Value>,
        document: &Value,
        shown: &Option<Value>,
    ) -> Result<Map<String, Value>, Fault> {
        let row_of = |document: &Value| document.get("after").and_then(Value::as_object).cloned();
        let Some(now) = row_of(document) else { return Ok(Map::new()) };
        let before = agreed.and_then(row_of);
        let mut changed = changed_columns(before.as_ref(), &now);
        if self.settings.map.is_none() {
            return Ok(changed);
        }
        let mut unseen = Vec::new();
        for (name, was) in &changed {
            let put_back = (document, with(document, name, was));
            let second = match agreed {
                Some(agreed) => (agreed, with(agreed, name, &now[name.as_str()])),
                // A map may take null for the very value: zero, an empty text.
                None => (document, with(document, name, &other_than(&now[name.as_str()]))),
            };
            let mut seen = false;
            for (one, other) in [put_back, second] {
                if seen {
                    break;
                }
                let one = self.map(client, answers, one, shown).await?;
                let other = self.map(client, answers, &other, shown).await?;
                // What can't be mapped so may still be sent.
                seen = seen || !matches!((one, other), (Ok(one), Ok(other)) if same(&one, &other));
            }
            if !seen {
                unseen.push(name.clone());
            }
        }
        for name in unseen {
            changed.remove(&name);
        }
        Ok(changed)
    }
}

fn with(document: &Value, column: &str, value: &Value) -> Value {
    let mut document = document.clone();
    if let Some(row) = document.get_mut("after").and_then(Value::as_object_mut) {
        row.insert(column.to_owned(), value.clone());
    }
    document
}

/// Remembers in the link what was applied by the intent's request. `Err`: the answer has not what the settings look for.
pub(super) fn remember(
    link: &mut Link,
    intent: &Intent,
    template: &RequestTemplate,
    response: Option<&HttpResponse>,
) -> Result<(), String> {
    let body = response.map_or(&Value::Null, |response| &response.body);
    let record = match &template.record {
        None => None,
        Some(record) => match record.first(body, &response_scope(response)) {
            Ok(record @ Value::Object(_)) => Some(record),
            Ok(Value::Null) => None,
            Ok(other) => return Err(format!("`record` must give an object; `{}` gives {other}", record.text())),
            Err(error) => return Err(format!("`record`: {error}")),
        },
    };
    if let Some(version) = &template.version {
        match version.first(body, &response_scope(response)) {
            Ok(Value::Null) => {}
            Ok(found @ (Value::String(_) | Value::Number(_))) => link.remote_version = Some(found),
            Ok(other) => {
                return Err(format!("`version` must give a text or a number; `{}` gives {other}", version.text()));
            }
            Err(error) => return Err(format!("`version`: {error}")),
        }
    }
    let mut sent = sent_of(link);
    // Of a create's steps the first answer with the record is the one: what changes after it is the system's doing.
    if intent.operation != "step" || sent.is_empty() {
        sent.push(&intent.sent, link.base_doc.is_some(), record);
    }
    set_sent(link, &sent);
    Ok(())
}

/// Nobody knows what became of an update, and all is sent again: anything agreed on may have been sent.
pub(super) fn lost(link: &mut Link) {
    if let Some(agreed) = link.base_doc.as_ref().and_then(|base| base.get("after")).and_then(Value::as_object) {
        let mut sent = sent_of(link);
        sent.lost(agreed);
        set_sent(link, &sent);
    }
}

fn sent_of(link: &Link) -> Sent {
    link.sent.clone().and_then(|sent| serde_json::from_value(sent).ok()).unwrap_or_default()
}

fn set_sent(link: &mut Link, sent: &Sent) {
    link.sent = (!sent.is_empty()).then(|| serde_json::to_value(sent).unwrap_or_default());
}
