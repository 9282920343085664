//! What the sink would send now: the events that its group has not read yet, decided as `deliver` does, with nothing
//! sent and nothing written.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::decide::scope;
use super::expressions::{Answers, Unmapped};
use super::group_of;
use super::settings::{Initial, Settings, Update};
use super::shape::Shape;
use crate::datastore::{BEHIND, Client, LinkKey, TableName, find_link, has_queue};
use crate::event::{Change, Offset, Operation, TopicPartition};
use crate::log::{LogError, PollLimit, StartAt, StopAt};
use crate::mapping::Links;
use crate::pipeline::{ConnectorContext, Fault};
use crate::registry::EventDecoder;
use crate::systems::RequestTemplate;
use crate::twoway::{Outgoing, Send, what_to_send};

/// Records looked at, at the most, and for how long.
const RECORDS: usize = 20_000;
const TIME: Duration = Duration::from_secs(30);

/// At most `limit` keys, each with the requests that it would cause, or why it would not be delivered.
pub async fn preview(settings: &Settings, context: &ConnectorContext, limit: usize) -> Result<Vec<Value>, Fault> {
    let shape = Shape::resolve(settings, &context.datastore).await?;
    let decoder = EventDecoder::new(context.registry.clone());
    let client = context.datastore.client().await?;
    let committed: BTreeMap<TopicPartition, Offset> = context
        .log
        .group_lag(&group_of(&context.name))
        .await
        .or_else(|error| if matches!(error, LogError::UnknownTopic(_)) { Ok(Vec::new()) } else { Err(error) })?
        .into_iter()
        .filter_map(|lag| Some((lag.topic_partition, lag.committed?)))
        .collect();
    let (mut shown, mut seen, mut looked) = (Vec::new(), BTreeSet::new(), 0);
    let until = Instant::now() + TIME;
    for topic in &settings.topics {
        let from = committed.iter().filter(|(at, _)| *at.topic == **topic).map(|(_, offset)| *offset).min();
        let start = from.map_or(StartAt::Beginning, StartAt::Offset);
        let mut reader = match context.log.reader(topic, start, StopAt::End).await {
            Ok(reader) => reader,
            Err(LogError::UnknownTopic(_)) => continue,
            Err(error) => return Err(error.into()),
        };
        let poll = PollLimit { bytes: 4 << 20, records: 500, wait: Duration::from_millis(200) };
        loop {
            for record in reader.poll(&poll).await? {
                looked += 1;
                let place = TopicPartition::new(record.topic.clone(), record.partition);
                if committed.get(&place).is_some_and(|offset| record.offset < *offset) {
                    continue;
                }
                let change = match decoder.change(&record).await {
                    Ok(Some(change)) => change,
                    Ok(None) => continue,
                    Err(error) if error.is_retriable() => return Err(Fault::unavailable(error.to_string(), None)),
                    Err(error) => {
                        let place = format!("{place}@{}", record.offset);
                        shown.push(json!({ "record": place, "does": "reject", "why": error.to_string() }));
                        continue;
                    }
                };
                let names = (settings.system.name(), settings.object.as_str());
                for (table, key) in shape.keys(&client, names, &change).await? {
                    if !seen.insert(format!("{table} {key}")) {
                        continue;
                    }
                    let one = One { settings, shape: &shape, client: &client, connector: &context.name };
                    shown.extend(one.show(&table, &key, &change).await?);
                }
                if shown.len() >= limit {
                    shown.truncate(limit);
                    return Ok(shown);
                }
            }
            if looked >= RECORDS || Instant::now() > until || reader.at_end() {
                break;
            }
        }
    }
    Ok(shown)
}

struct One<'a> {
    settings: &'a Settings,
    shape: &'a Shape,
    client: &'a Client,
    connector: &'a str,
}

impl One<'_> {
    /// `None`: nothing would be sent.
    async fn show(&self, table: &TableName, key: &Value, change: &Change) -> Result<Option<Value>, Fault> {
        if matches!(self.shape, Shape::Changes) {
            let lines: Vec<_> = self.settings.create.iter().map(|step| line(&step.request)).collect();
            return Ok(Some(json!({ "key": key, "does": "change", "requests": lines })));
        }
        if has_queue(self.client, self.connector, key).await? {
            return Ok(Some(json!({ "key": key, "does": "wait", "why": BEHIND })));
        }
        let system = self.settings.system.name();
        let link_key = LinkKey { system: system.to_owned(), object: self.settings.object.clone(), key: key.clone() };
        let link = find_link(self.client, &link_key).await?;
        let document = self.shape.read(self.client, table, key).await?;
        let link_shown = link.as_ref().filter(|link| !link.deleted).and_then(|link| link.shown());
        let mut answers = Answers::new(system);
        let unmapped = |unmapped: Unmapped| {
            Ok(Some(match unmapped {
                Unmapped::Waits(wanted) => json!({ "key": key, "does": "wait", "why": format!("waits for {wanted}") }),
                Unmapped::Failed(reason) => json!({ "key": key, "does": "reject", "why": reason }),
            }))
        };
        let (mut now, mut base) = (None, None);
        if let Some(document) = &document {
            if let Some(when) = &self.settings.when {
                let held = |links: &Links| when.holds(document, &scope(&link_shown, None, Some(links)));
                match answers.run(self.client, held).await? {
                    Ok(true) => {}
                    Ok(false) => return Ok(None),
                    Err(why) => return unmapped(why),
                }
            }
            match self.map(&mut answers, document, &link_shown).await? {
                Ok(mapped) => now = Some(mapped),
                Err(why) => return unmapped(why),
            }
            if let Some(agreed) = link.as_ref().and_then(|link| link.base_doc.as_ref()) {
                let owed = link.as_ref().map(|link| link.owed.as_slice()).unwrap_or_default();
                base = self.map(&mut answers.without(owed), agreed, &link_shown).await?.ok();
            }
        }
        let settings = self.settings;
        let decision = what_to_send(
            &Outgoing {
                linked: link_shown.is_some(),
                deleted: link.as_ref().is_some_and(|link| link.deleted),
                steps_done: link.as_ref().map_or(0, |link| link.steps_done(settings.create.len())),
                steps: settings.create.len(),
                base: base.as_ref(),
                now: now.as_ref(),
            },
            settings.fields,
        );
        let input = document.unwrap_or_else(|| json!({ "key": key, "before": change.before, "after": null }));
        let mut requests = Vec::new();
        let does = match decision {
            Send::Nothing | Send::NothingToDelete => return Ok(None),
            Send::Create => {
                let snapshot = change.operation == Operation::Read;
                let pairs_only = (snapshot && settings.initial == Initial::Match) || settings.create.is_empty();
                if (snapshot && settings.initial == Initial::Skip) || (pairs_only && settings.matching.is_none()) {
                    return Ok(None);
                }
                if let Some(matching) = &settings.matching {
                    requests.push((matching, None));
                }
                if !pairs_only && let Some(first) = settings.create.first() {
                    requests.push((&first.request, now));
                }
                if pairs_only { "match" } else { "create" }
            }
            Send::Finish(step) => {
                requests.extend(settings.create.get(step).map(|step| (&step.request, None)));
                "finish the create"
            }
            Send::Update(body) => match &settings.update {
                Update::Request(template) => {
                    requests.push((template, Some(body)));
                    "update"
                }
                Update::Reject => {
                    let why = "the row has changed, and `update: reject` sends no changes";
                    return Ok(Some(json!({ "key": key, "does": "reject", "why": why, "changed": body })));
                }
                Update::Nothing => return Ok(None),
            },
            Send::Delete => {
                let Some(template) = &settings.delete else { return Ok(None) };
                requests.push((template, None));
                "delete"
            }
        };
        let mut rendered = Vec::new();
        for (template, body) in requests {
            let request = answers
                .run(self.client, |links| template.render(&input, &scope(&link_shown, Some("(new)"), Some(links))))
                .await?;
            match request {
                Ok(mut request) => {
                    if template.body.is_none() {
                        request.body = body;
                        request.masked.body = self.settings.map.as_ref().is_some_and(crate::mapping::Program::masked);
                    }
                    rendered.push(request.to_json());
                }
                Err(why) => return unmapped(why),
            }
        }
        let later = match does {
            "create" => settings.create.iter().skip(1).map(|step| line(&step.request)).collect(),
            _ => Vec::new(),
        };
        let mut shown = json!({ "key": key, "does": does, "requests": rendered });
        if does == "create" && settings.matching.is_some() {
            shown["note"] = "the create is sent when the first request finds nothing".into();
        }
        if !later.is_empty() {
            shown["then"] = later.into();
        }
        Ok(Some(shown))
    }

    async fn map(
        &self,
        answers: &mut Answers<'_>,
        document: &Value,
        link: &Option<Value>,
    ) -> Result<Result<Value, Unmapped>, Fault> {
        let Some(map) = &self.settings.map else {
            return Ok(Ok(document.get("after").cloned().unwrap_or_default()));
        };
        Ok(answers.run(self.client, |links| map.first(document, &scope(link, None, Some(links)))).await?)
    }
}

/// A request as it stands in the file: what it is for is not known before the step ahead of it is done.
fn line(template: &RequestTemplate) -> Value {
    format!("{} {}", template.method, template.text).into()
}
