//! From a record to the columns it means: mapped with jq, in the table's own form, before anything is locked.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::writing::stand_in;
use super::{Inside, Table};
use crate::datastore::{
    Access, Client, DatastoreError, DatastoreErrorKind, LinkKey, find_link, id_text, link_by_external, links_of_page,
    normalize_row,
};
use crate::log::ConsumedRecord;
use crate::mapping::{Links, MapError, Program, Scope, Wanted};
use crate::pipeline::Fault;
use crate::sources::http::{Page, PageRecord};

/// A record of a page, mapped.
pub struct Mapped {
    /// An object (`{"record": hash}`) where the record has none: then it is parked.
    pub id: Value,
    pub record: Value,
    /// The push sequence noted before it was fetched.
    pub push_seq: i64,
    pub cursor: Value,
    /// The dead letter that it is replayed from.
    pub letter: Option<Box<(Value, ConsumedRecord)>>,
    pub means: Means,
    /// What the record last seen means, where there was one.
    pub before: Option<Map<String, Value>>,
    pub kept: Map<String, Value>,
}

/// What a record says about its row.
pub enum Means {
    Row(Map<String, Value>),
    Nothing(&'static str),
    /// The row behind a link that the map asks for is not there yet.
    Waits(String),
    Bad(String),
}

/// How many times an expression may come back for more links.
const ROUNDS: usize = 16;

impl Inside {
    /// Every record of the page once: of two with the same id the later one counts.
    pub(super) async fn map(&self, client: &Client, page: &Page, table: &Table) -> Result<Vec<Mapped>, Fault> {
        let mut records: Vec<(Value, &PageRecord, Option<String>)> = Vec::new();
        let mut without = 0;
        for record in &page.records {
            let (id, bad) = match self.settings.id.first(&record.record, &Scope::default()) {
                Ok(id @ (Value::String(_) | Value::Number(_))) => (id, record.bad.clone()),
                Ok(other) => (stand_in(&record.record), Some(self.no_id(record, &format!("it gives {other}")))),
                Err(error) => (stand_in(&record.record), Some(self.no_id(record, &error.to_string()))),
            };
            // One record is its own fault; a whole page without ids is the settings'.
            without += usize::from(id.is_object());
            if let Some(reason) = &bad
                && page.save.is_some()
                && without > 1
                && without == page.records.len()
            {
                return Err(Fault::stop(reason.clone()));
            }
            records.retain(|(known, ..)| *known != id);
            records.push((id, record, bad));
        }
        let ids: Vec<String> = records.iter().map(|(id, ..)| id_text(id)).collect();
        let links = links_of_page(client, &self.system, &self.object, &ids, Access::Look).await?.links;
        let mut links: BTreeMap<String, _> =
            links.into_iter().filter_map(|link| Some((id_text(link.external.as_ref()?), link))).collect();
        let mut answers = Links::default();
        let mut mapped = Vec::with_capacity(records.len());
        for (id, record, bad) in records {
            if let Some(reason) = bad {
                mapped.push(Mapped {
                    id,
                    record: record.record.clone(),
                    push_seq: record.push_seq,
                    cursor: record.cursor.clone(),
                    letter: record.letter.clone(),
                    means: Means::Bad(reason),
                    before: None,
                    kept: Map::new(),
                });
                continue;
            }
            let link = links.remove(&id_text(&id));
            let shown = link.as_ref().and_then(|link| link.shown());
            let means = self.means(client, table, &record.record, shown.as_ref(), &mut answers).await?;
            let own = link.filter(|link| link.table == self.settings.into.to_string());
            let before = match own.and_then(|link| link.base_remote) {
                Some(before) if before == record.record => match &means {
                    Means::Row(row) => Some(row.clone()),
                    _ => None,
                },
                Some(before) => match self.means(client, table, &before, shown.as_ref(), &mut answers).await? {
                    Means::Row(row) => Some(row),
                    _ => None,
                },
                None => None,
            };
            let kept = match &self.settings.keep {
                None => Ok(Map::new()),
                Some(keep) => match self.run(client, keep, &record.record, shown.as_ref(), &mut answers).await? {
                    Ok(Value::Object(kept)) => Ok(kept),
                    Ok(Value::Null) => Ok(Map::new()),
                    Ok(other) => Err(Means::Bad(format!("`keep` must give an object, but gives {other}"))),
                    Err(means) => Err(means),
                },
            };
            let (means, kept) = match (means, kept) {
                (Means::Row(_), Err(instead)) => (instead, Map::new()),
                (means, kept) => (means, kept.unwrap_or_default()),
            };
            mapped.push(Mapped {
                id,
                record: record.record.clone(),
                push_seq: record.push_seq,
                cursor: record.cursor.clone(),
                letter: record.letter.clone(),
                means,
                before,
                kept,
            });
        }
        Ok(mapped)
    }

    fn no_id(&self, record: &PageRecord, why: &str) -> String {
        let text: String = record.record.to_string().chars().take(300).collect();
        format!("`id: {}` gives no id for the record {text}: {why}", self.settings.id.text())
    }

    /// The columns a record means, in the table's own form.
    async fn means(
        &self,
        client: &Client,
        table: &Table,
        record: &Value,
        link: Option<&Value>,
        answers: &mut Links,
    ) -> Result<Means, Fault> {
        if let Some(when) = &self.settings.when {
            match self.run(client, when, record, link, answers).await? {
                Ok(Value::Null | Value::Bool(false)) => return Ok(Means::Nothing("`when` does not want it")),
                Ok(_) => {}
                Err(means) => return Ok(means),
            }
        }
        let row = match self.run(client, &self.settings.map, record, link, answers).await? {
            Ok(Value::Object(row)) if row.is_empty() => return Ok(Means::Nothing("the map gives no column")),
            Ok(Value::Object(row)) => row,
            Ok(Value::Null) => return Ok(Means::Nothing("the map gives nothing")),
            Ok(other) => return Ok(Means::Bad(format!("the map must give an object, but gives {other}"))),
            Err(means) => return Ok(means),
        };
        let unknown: BTreeSet<&str> = row.keys().map(String::as_str).filter(|column| !table.has(column)).collect();
        if !unknown.is_empty() {
            let names: Vec<_> = unknown.into_iter().collect();
            return Ok(Means::Bad(format!("table {} has no column {}", self.settings.into, names.join(", "))));
        }
        match normalize_row(client, &self.settings.into, &Value::Object(row)).await {
            Ok(Value::Object(row)) => Ok(Means::Row(row)),
            Ok(_) => Ok(Means::Nothing("the map gives no column")),
            Err(DatastoreError { kind: DatastoreErrorKind::Rejected, message }) => Ok(Means::Bad(message)),
            Err(error) => Err(error.into()),
        }
    }

    /// Runs an expression, fetching the links it asks for.
    async fn run(
        &self,
        client: &Client,
        program: &Program,
        record: &Value,
        link: Option<&Value>,
        answers: &mut Links,
    ) -> Result<Result<Value, Means>, Fault> {
        for _ in 0..ROUNDS {
            let scope = Scope { link, links: Some(answers), ..Scope::default() };
            match program.first(record, &scope) {
                Ok(value) => return Ok(Ok(value)),
                Err(MapError::Failed(text)) => return Ok(Err(Means::Bad(text))),
                Err(MapError::Waits(wanted)) => return Ok(Err(Means::Waits(format!("waits for {wanted}")))),
                Err(MapError::Needs(wanted)) => {
                    for wanted in wanted {
                        self.fetch(client, wanted, answers).await?;
                    }
                }
            }
        }
        Ok(Err(Means::Bad(format!("`{}` asks for ever more links", program.text()))))
    }

    async fn fetch(&self, client: &Client, wanted: Wanted, answers: &mut Links) -> Result<(), Fault> {
        match wanted {
            Wanted::Link { object, key } => {
                let of = LinkKey { system: self.system.clone(), object: object.clone(), key: key.clone() };
                let found = find_link(client, &of).await?;
                answers.put_link(&object, &key, found.and_then(|link| link.shown()));
            }
            Wanted::Later { object, key } => {
                let of = LinkKey { system: self.system.clone(), object: object.clone(), key: key.clone() };
                let found = find_link(client, &of).await?;
                answers.put_later(&object, &key, found.and_then(|link| link.shown()));
            }
            Wanted::Local { object, id } => {
                let found = link_by_external(client, &self.system, &object, &id, false).await?;
                let key = found.filter(|link| !link.deleted).map(|link| match link.key.key {
                    Value::Object(columns) if columns.len() == 1 => {
                        columns.into_iter().next().map(|(_, value)| value).unwrap_or_default()
                    }
                    key => key,
                });
                answers.put_local(&object, &id, key);
            }
        }
        Ok(())
    }
}
