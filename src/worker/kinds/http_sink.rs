//! `type: http-sink`: rows and documents to a system over HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::Value;

use super::{Connector, Identity, World};
use crate::config::{ConfigError, Section};
use crate::datastore::primary_key;
use crate::log::StartAt;
use crate::pipeline::{self, ConnectorContext, Fault, Plan, PlanStep, ResetTo};
use crate::sinks::http::{self, SendMode, Settings};

pub struct HttpSinkConnector {
    settings: Arc<Settings>,
}

/// Reads the settings; the caller finishes the section.
pub fn read(section: &mut Section, world: &World<'_>) -> Result<Arc<dyn Connector>, ConfigError> {
    let system = super::system(section, world)?.value;
    let settings = Settings::read(section, system)?;
    Ok(Arc::new(HttpSinkConnector { settings: Arc::new(settings) }))
}

#[async_trait]
impl Connector for HttpSinkConnector {
    /// Links belong to the system and object, not to the connector.
    fn identity(&self) -> Identity {
        BTreeMap::new()
    }

    fn groups(&self, name: &str) -> Vec<String> {
        vec![http::group_of(name)]
    }

    async fn run(&self, context: ConnectorContext) -> Result<(), Fault> {
        context.datastore.migrate().await?;
        // Before the first read, so that retention keeps what this sink has still to deliver.
        register(&self.settings, &context).await?;
        let (source, sink) = http::open(self.settings.clone(), &context).await?;
        let farewell = sink.farewell();
        let result = pipeline::run(source, sink, &context).await;
        farewell.await;
        result
    }

    async fn plan(&self, context: &ConnectorContext) -> Result<Plan, Fault> {
        let settings = &self.settings;
        let mut plan = Plan::default();
        if let Some(missing) = context.datastore.missing().await? {
            plan.problems.push(missing.problem);
            plan.dba_sql.extend(missing.sql);
        }
        let topics = context.log.topics().await?;
        let there = |name: &str| topics.iter().any(|topic| topic.name == name);
        let step = |there: bool, what, name: String, detail: &str| PlanStep {
            action: if there { "keep" } else { "create" },
            what,
            name,
            detail: Some(detail.to_owned()),
        };
        for topic in settings.topics.iter().filter(|topic| !there(topic)) {
            let detail = Some("not there yet; it comes with the first event of its table".to_owned());
            plan.steps.push(PlanStep { action: "await", what: "topic", name: topic.clone(), detail });
        }
        let group = http::group_of(&context.name);
        let known = context.log.group_lag(&group).await.is_ok_and(|lag| lag.iter().any(|lag| lag.committed.is_some()));
        plan.steps.push(step(known, "group", group, "consumer group of this sink"));
        let dead = settings.dead_letter_topic.clone().unwrap_or_else(|| format!("dead.{}", context.name));
        plan.steps.push(step(there(&dead), "topic", dead, "copies of rejected records"));
        if let SendMode::Document { root, lines, .. } = &settings.send {
            let client = context.datastore.client().await?;
            for table in std::iter::once(root).chain(lines.iter().map(|line| &line.table)) {
                if primary_key(&client, table).await?.is_empty() {
                    plan.problems.push(format!("table {table} is not there, or has no primary key"));
                }
            }
        }
        Ok(plan)
    }

    async fn preview(&self, context: &ConnectorContext, limit: usize) -> Result<Vec<Value>, Fault> {
        http::preview(&self.settings, context, limit).await
    }

    async fn reset(&self, context: &ConnectorContext, to: &ResetTo) -> Result<String, Fault> {
        let (start, said) = match to {
            ResetTo::Beginning => (StartAt::Beginning, "the first record".to_owned()),
            ResetTo::End => (StartAt::End, "what comes from now on".to_owned()),
            ResetTo::Offset(offset) => (StartAt::Offset(crate::event::Offset(*offset)), format!("offset {offset}")),
            ResetTo::TimeMs(time) => {
                let since = DateTime::<Utc>::from_timestamp_millis(*time).unwrap_or_default();
                let since = since.to_rfc3339_opts(SecondsFormat::Millis, true);
                (StartAt::TimeMs(*time), format!("records appended since {since}"))
            }
            ResetTo::Cursor(_) => return Err(Fault::stop("a sink has offsets, not a cursor")),
        };
        let group = http::group_of(&context.name);
        context.log.reset_group(&group, &self.settings.topics, start).await?;
        Ok(format!("group {group} goes on at {said}"))
    }
}

async fn register(settings: &Settings, context: &ConnectorContext) -> Result<(), Fault> {
    match context.log.register_group(&http::group_of(&context.name), &settings.topics).await {
        // It comes with the first event of its table, and is not read before.
        Ok(()) | Err(crate::log::LogError::UnknownTopic(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
