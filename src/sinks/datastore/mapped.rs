//! From a record to the columns it means: mapped with jq, in the table's own form, before anything is locked.
//!
//! A record that says what it said when it was last applied, with nothing sent or put aside since, means nothing new:
//! it is only counted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;

use serde_json::{Map, Value};

use super::writing::stand_in;
use super::{Inside, Table};
use crate::datastore::{
    Access, Client, DatastoreError, DatastoreErrorKind, Link, LinkKey, find_link, id_text, ids_aside, link_by_external,
    links_of_page, normalize_rows,
};
use crate::log::ConsumedRecord;
use crate::mapping::{Links, MapError, Program, Scope, Wanted};
use crate::pipeline::Fault;
use crate::sources::http::{Page, PageRecord};
use crate::twoway::{Sent, SentColumn, SentColumns, same};

/// The records of a page that may have something to say.
pub struct MappedPage {
    pub mapped: Vec<Mapped>,
    /// How many were as they were last applied.
    pub unchanged: u64,
    /// The pull holds records, of this page or others.
    pub any_held: bool,
}

/// A record of a page, mapped.
pub struct Mapped {
    /// An object (`{"record": hash}`) where the record has none: then it is parked.
    pub id: Value,
    pub record: Value,
    /// The push sequence noted before it was fetched.
    pub push_seq: i64,
    pub cursor: Value,
    /// Its version in the system; null where there is none.
    pub version: Value,
    /// The dead letter that it is replayed from.
    pub letter: Option<Box<(Value, ConsumedRecord)>>,
    pub means: Means,
    /// What the record last seen means, where there was one.
    pub before: Option<Map<String, Value>>,
    pub sent: SentColumns,
    /// The row as it was when it was decided about; empty before that.
    pub row: Map<String, Value>,
    /// Generation of the link that all this was mapped with.
    pub link_generation: Option<i64>,
    /// A record of its id is held or parked.
    pub aside: bool,
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

/// Rows as the map gives them, for the datastore to bring into the table's form.
#[derive(Default)]
struct Raw {
    rows: Vec<Value>,
}

/// A record whose rows are in [`Raw`], by index.
struct Draft {
    mapped: Mapped,
    means: Option<usize>,
    before: Option<usize>,
    /// Of each push: its columns, and the row that its answer means.
    pushes: Vec<(Map<String, Value>, Option<usize>)>,
    sent: Sent,
}

/// How many times an expression may come back for more links.
const ROUNDS: usize = 16;

impl Raw {
    fn add(&mut self, row: Map<String, Value>) -> usize {
        self.rows.push(Value::Object(row));
        self.rows.len() - 1
    }
}

impl Inside {
    /// Every record of the page once: of two with the same id the later one counts.
    pub(super) async fn map(&self, client: &Client, page: &Page, table: &Table) -> Result<MappedPage, Fault> {
        let mut records: Vec<(Value, &PageRecord, Option<String>)> = Vec::new();
        let mut without = 0;
        let mut place: BTreeMap<String, usize> = BTreeMap::new();
        for record in &page.records {
            let (id, bad) = match self.settings.id.first(&record.record, &Scope::default()) {
                Ok(Value::String(id)) if id.contains('\0') => (
                    stand_in(&record.record),
                    Some(self.no_id(record, "it holds a NUL, which no text of the datastore can")),
                ),
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
            match place.get(&id_text(&id)) {
                Some(at) => records[*at] = (id, record, bad),
                None => {
                    place.insert(id_text(&id), records.len());
                    records.push((id, record, bad));
                }
            }
        }
        let ids: Vec<String> = records.iter().map(|(id, ..)| id_text(id)).collect();
        let links = links_of_page(client, &self.system, &self.object, &ids, Access::Look).await?.links;
        let mut links: BTreeMap<String, _> =
            links.into_iter().filter_map(|link| Some((id_text(link.external.as_ref()?), link))).collect();
        let (aside, any_held) = ids_aside(client, &self.connector, &self.object, &ids).await?;
        let aside: BTreeSet<String> = aside.into_iter().collect();
        let mut answers = Links::default();
        let mut raw = Raw::default();
        let mut drafts = Vec::with_capacity(records.len());
        let mut unchanged = 0;
        for (id, record, bad) in records {
            let link = links.remove(&id_text(&id));
            if record.letter.is_none() && page.save.is_some() && self.was_refused(&id, &record.record) {
                unchanged += 1;
                continue;
            }
            let listed = page.save.is_some() && record.letter.is_none() && bad.is_none();
            if listed
                && let Some(link) = &link
                && !aside.contains(&id_text(&id))
                && self.says_nothing_new(client, &record.record, link, &mut answers).await?
            {
                unchanged += 1;
                continue;
            }
            let is_aside = aside.contains(&id_text(&id));
            let mut draft = self.draft(client, table, (id, record, bad), link, &mut answers, &mut raw).await?;
            draft.mapped.aside = is_aside;
            drafts.push(draft);
        }
        let rows = self.normalized(client, raw.rows).await?;
        let row = |at: Option<usize>| at.and_then(|at| rows.get(at));
        let finish = |draft: Draft| {
            let Draft { mut mapped, means, before, pushes, sent } = draft;
            match row(means) {
                Some(Ok(row)) => mapped.means = Means::Row(row.clone()),
                Some(Err(reason)) => mapped.means = Means::Bad(reason.clone()),
                None => {}
            }
            mapped.before = row(before).and_then(|row| row.clone().ok());
            for (columns, answer) in pushes {
                let answered = row(answer).and_then(|row| row.as_ref().ok());
                for (name, was) in columns {
                    let answered = answered.and_then(|row| row.get(&name)).cloned();
                    let tried = sent.tried(&name).cloned();
                    mapped.sent.insert(name, SentColumn { was, answered, tried });
                }
            }
            mapped
        };
        Ok(MappedPage { mapped: drafts.into_iter().map(finish).collect(), unchanged, any_held })
    }

    /// This very record was parked, and comes again only since the listing does. Once another has come in its place it
    /// is a change when it comes again.
    fn was_refused(&self, id: &Value, record: &Value) -> bool {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let id = id_text(id);
        let same = refused.get(&id).is_some_and(|known| *known == super::hash(record));
        if !same {
            refused.remove(&id);
        }
        same
    }

    /// The record is as it was last applied, and nothing was sent since.
    async fn says_nothing_new(
        &self,
        client: &Client,
        record: &Value,
        link: &Link,
        answers: &mut Links,
    ) -> Result<bool, Fault> {
        let settled = self.settings.link
            && link.table == self.settings.into.to_string()
            && !link.deleted
            && link.intent.is_none()
            && link.sent.is_none()
            && link.base_remote.as_ref() == Some(record);
        if !settled {
            return Ok(false);
        }
        // Facts may be asked for by now that were not before.
        let Some(keep) = &self.settings.keep else { return Ok(true) };
        let kept = self.run(client, keep, record, link.shown().as_ref(), answers).await?;
        Ok(match kept {
            Ok(Value::Object(kept)) => {
                kept.iter().all(|(name, fact)| link.kept.get(name).is_some_and(|known| same(known, fact)))
            }
            _ => false,
        })
    }

    async fn draft(
        &self,
        client: &Client,
        table: &Table,
        (id, record, bad): (Value, &PageRecord, Option<String>),
        link: Option<Link>,
        answers: &mut Links,
        raw: &mut Raw,
    ) -> Result<Draft, Fault> {
        let mapped = Mapped {
            id,
            record: record.record.clone(),
            push_seq: record.push_seq,
            cursor: record.cursor.clone(),
            version: Value::Null,
            letter: record.letter.clone(),
            means: Means::Nothing("the map gives nothing"),
            before: None,
            sent: SentColumns::new(),
            row: Map::new(),
            link_generation: link.as_ref().map(|link| link.generation),
            aside: false,
            kept: Map::new(),
        };
        let mut draft = Draft { mapped, means: None, before: None, pushes: Vec::new(), sent: Sent::default() };
        if let Some(reason) = bad {
            draft.mapped.means = Means::Bad(reason);
            return Ok(draft);
        }
        let shown = link.as_ref().and_then(|link| link.shown());
        match self.means(client, table, &record.record, shown.as_ref(), answers).await? {
            Means::Row(row) => draft.means = Some(raw.add(row)),
            other => draft.mapped.means = other,
        }
        if let Some(keep) = &self.settings.keep
            && draft.means.is_some()
        {
            match self.run(client, keep, &record.record, shown.as_ref(), answers).await? {
                Ok(Value::Object(kept)) => draft.mapped.kept = kept,
                Ok(Value::Null) => {}
                Ok(other) => {
                    draft.mapped.means = Means::Bad(format!("`keep` must give an object, but gives {other}"));
                    draft.means = None;
                }
                Err(means) => {
                    draft.mapped.means = means;
                    draft.means = None;
                }
            }
        }
        if let Some(version) = &self.settings.version {
            match version.first(&record.record, &Scope::default()) {
                Ok(version @ (Value::Null | Value::String(_) | Value::Number(_))) => draft.mapped.version = version,
                Ok(other) => {
                    draft.mapped.means =
                        Means::Bad(format!("`version` must give a text or a number, but gives {other}"));
                    draft.means = None;
                }
                Err(error) => {
                    draft.mapped.means = Means::Bad(format!("`version`: {error}"));
                    draft.means = None;
                }
            }
        }
        let Some(own) = link.filter(|link| link.table == self.settings.into.to_string()) else { return Ok(draft) };
        draft.before = match own.base_remote {
            Some(before) if before == record.record => draft.means,
            Some(before) => match self.means(client, table, &before, shown.as_ref(), answers).await? {
                Means::Row(row) => Some(raw.add(row)),
                _ => None,
            },
            None => None,
        };
        let sent: Sent = own.sent.map(serde_json::from_value).transpose().unwrap_or_default().unwrap_or_default();
        for push in sent.pushes() {
            let answer = match &push.answer {
                Some(answer) => match self.means(client, table, answer, shown.as_ref(), answers).await? {
                    Means::Row(row) => Some(raw.add(row)),
                    _ => None,
                },
                None => None,
            };
            draft.pushes.push((push.columns.clone(), answer));
        }
        draft.sent = sent;
        Ok(draft)
    }

    /// Rows in the table's own form; by itself, each that the table has no form for.
    async fn normalized(
        &self,
        client: &Client,
        rows: Vec<Value>,
    ) -> Result<Vec<Result<Map<String, Value>, String>>, Fault> {
        let into = &self.settings.into;
        let object = |row: Value| match row {
            Value::Object(row) => Ok(row),
            other => Err(format!("{other} is no row")),
        };
        match normalize_rows(client, into, &rows).await {
            Ok(rows) => return Ok(rows.into_iter().map(object).collect()),
            Err(DatastoreError { kind: DatastoreErrorKind::Rejected, .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let mut normal = Vec::with_capacity(rows.len());
        for row in rows {
            normal.push(match normalize_rows(client, into, std::slice::from_ref(&row)).await {
                Ok(rows) => rows.into_iter().next().ok_or_else(|| "it gives no row".to_owned()).and_then(object),
                Err(DatastoreError { kind: DatastoreErrorKind::Rejected, message }) => Err(message),
                Err(error) => return Err(error.into()),
            });
        }
        Ok(normal)
    }

    fn no_id(&self, record: &PageRecord, why: &str) -> String {
        let text: String = record.record.to_string().chars().take(300).collect();
        format!("`id: {}` gives no id for the record {text}: {why}", self.settings.id.text())
    }

    /// The columns a record means, as the map gives them.
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
            // One that was there before is away while the table is altered; any other, the map has made up.
            let away = {
                let seen = self.columns_seen.lock().unwrap_or_else(PoisonError::into_inner);
                unknown.iter().any(|column| seen.contains(*column))
            };
            let names: Vec<_> = unknown.into_iter().collect();
            let reason = format!("table {} has no column {}", self.settings.into, names.join(", "));
            return if away { Err(DatastoreError::setup(reason).into()) } else { Ok(Means::Bad(reason)) };
        }
        Ok(Means::Row(row))
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
