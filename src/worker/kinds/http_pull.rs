//! `type: http-pull`: a system's records into a table of the datastore.

use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};

use super::{Connector, Identity, World};
use crate::config::{ConfigError, Section};
use crate::datastore::{Missing, forget_versions, load_cursor, save_cursor};
use crate::pipeline::{self, ConnectorContext, ConnectorState, Fault, Plan, PlanStep, ResetTo};
use crate::sinks::datastore::{DatastoreSink, Hold, TableSettings, Tenure};
use crate::sources::http::{HttpSource, PullSettings};

pub struct Settings {
    system: String,
    object: String,
    pull: Arc<PullSettings>,
    table: Arc<TableSettings>,
}

impl Settings {
    pub fn read(section: &mut Section, world: &World<'_>) -> Result<Self, ConfigError> {
        let system = super::system(section, world)?.value;
        let object: String = section.require("object")?;
        let table = TableSettings::read(section, system.compiler(), &object)?;
        let pull = PullSettings::read(section, system.clone(), object.clone())?;
        Ok(Settings { system: system.name().to_owned(), object, pull: Arc::new(pull), table: Arc::new(table) })
    }

    fn source(&self, context: &ConnectorContext) -> HttpSource {
        HttpSource::new(
            Arc::clone(&self.pull),
            Arc::clone(&context.name),
            context.datastore.clone(),
            Arc::clone(&context.status),
        )
    }

    fn sink(&self, context: &ConnectorContext, hold: Option<Hold>) -> DatastoreSink {
        DatastoreSink::new(
            &context.name,
            (&self.system, &self.object),
            Arc::clone(&self.table),
            context.datastore.clone(),
            Arc::clone(&context.status),
            hold,
            &context.log,
        )
    }
}

#[async_trait]
impl Connector for Settings {
    fn identity(&self) -> Identity {
        Identity::from([
            ("system".to_owned(), self.system.clone()),
            ("object".to_owned(), self.object.clone()),
            ("into".to_owned(), self.table.into.to_string()),
        ])
    }

    fn groups(&self, _: &str) -> Vec<String> {
        Vec::new()
    }

    async fn run(&self, context: ConnectorContext) -> Result<(), Fault> {
        context.datastore.migrate().await?;
        loop {
            let Some(tenure) = Tenure::take(&context).await? else {
                context.status.set_state(ConnectorState::Stopped);
                return Ok(());
            };
            let running = pipeline::run(self.source(&context), self.sink(&context, Some(tenure.hold())), &context);
            let ended = tokio::select! {
                ended = running => ended,
                // What was under way is rolled back, and read again by the one that took over.
                () = tenure.lost() => continue,
            };
            tenure.release().await;
            return ended;
        }
    }

    async fn plan(&self, context: &ConnectorContext) -> Result<Plan, Fault> {
        let mut missing: Vec<Missing> = context.datastore.missing().await?.into_iter().collect();
        missing.extend(self.sink(context, None).problems().await?);
        let client = context.datastore.client().await?;
        let cursor = match load_cursor(&client, &context.name).await {
            Ok(stored) => stored.cursor.get("cursor").cloned().unwrap_or_default(),
            // Before the first start there is no table of cursors yet.
            Err(_) => Value::Null,
        };
        let from = match cursor {
            Value::Null => "from the beginning".to_owned(),
            cursor => format!("from {cursor}"),
        };
        let step = PlanStep {
            action: "keep",
            what: "table",
            name: self.table.into.to_string(),
            detail: Some(format!("reads {} of '{}' {from}", self.object, self.system)),
        };
        let mut plan = Plan { steps: vec![step], ..Plan::default() };
        for missing in missing {
            plan.problems.push(missing.problem);
            plan.dba_sql.extend(missing.sql);
        }
        Ok(plan)
    }

    /// What the first page of a run would do to the table now; nothing is written. Records that would change nothing
    /// are left out.
    async fn preview(&self, context: &ConnectorContext, limit: usize) -> Result<Vec<Value>, Fault> {
        let page = self.source(context).preview().await?;
        let mut shown = self.sink(context, None).preview(&page).await?;
        shown.retain(|decided| decided["do"] != "nothing");
        shown.truncate(limit);
        Ok(shown)
    }

    async fn reset(&self, context: &ConnectorContext, to: &ResetTo) -> Result<String, Fault> {
        let time = |ms: i64| {
            let time = DateTime::<Utc>::from_timestamp_millis(ms);
            let time = time.ok_or_else(|| Fault::stop(format!("{ms} ms is no time")))?;
            Ok::<_, Fault>(Value::from(time.to_rfc3339_opts(SecondsFormat::Secs, true)))
        };
        let cursor = match to {
            ResetTo::Beginning => Value::Null,
            ResetTo::Cursor(cursor) => cursor.clone(),
            ResetTo::End => time(Utc::now().timestamp_millis())?,
            ResetTo::TimeMs(ms) => time(*ms)?,
            ResetTo::Offset(_) => {
                return Err(Fault::stop("a pull has a cursor and no offsets; hint: give a time or a cursor"));
            }
        };
        if !cursor.is_null() && !self.pull.is_incremental() {
            return Err(Fault::stop("this pull reads everything in every run: it has no cursor to move"));
        }
        let client = context.datastore.client().await?;
        if cursor.is_null() {
            forget_versions(&client, &self.system, &self.object).await?;
        }
        let stored = load_cursor(&client, &context.name).await?;
        save_cursor(&client, &context.name, &json!({ "cursor": cursor }), stored.generation).await?;
        Ok(match cursor {
            Value::Null => format!("'{}' reads everything again", context.name),
            cursor => format!("'{}' goes on from {cursor}", context.name),
        })
    }
}
