//! The tables that are asked for, and the publication that carries them.
//!
//! Invariant: a table that can't be had, or a publication that leaves out what is needed, is told by name and never
//! passed over.

use std::collections::BTreeMap;

use crate::avro;
use crate::pipeline::Fault;
use crate::postgres::catalog::{self, CatalogTable, ServerFacts};
use crate::postgres::publication::{self, Autocreate, Published};
use crate::postgres::{PostgresError, Session};

use super::settings::CaptureSettings;

/// Name of the fact of tables that are asked for and can't be had.
pub(super) const NOT_CAPTURED: &str = "not_captured";

/// Tables that are asked for.
#[derive(Default)]
pub(super) struct Wanted {
    /// With rows of their own, or roots where partitions are published through them.
    pub tables: Vec<CatalogTable>,
    pub parents: Vec<CatalogTable>,
    /// Partitions that have the rows of roots.
    pub leaves: Vec<CatalogTable>,
    /// How much of each table is published.
    pub published: Vec<Published>,
}

pub(super) async fn wanted(session: &mut Session, settings: &CaptureSettings) -> Result<Wanted, PostgresError> {
    let all = catalog::tables(session).await?;
    let asked: Vec<CatalogTable> = all.into_iter().filter(|table| settings.tables.wants_table(table)).collect();
    let (parents, leaves): (Vec<_>, Vec<_>) = asked.into_iter().partition(|table| table.partitioned);
    if !settings.via_root {
        return Ok(Wanted { tables: leaves, parents, ..Wanted::default() });
    }
    // Through the root: a partition of a wanted root has no topic of its own.
    let covered = |table: &CatalogTable| {
        table
            .ancestors
            .iter()
            .any(|(schema, name)| parents.iter().any(|parent| parent.schema == *schema && parent.name == *name))
    };
    let (leaves, mut tables): (Vec<_>, Vec<_>) = leaves.into_iter().partition(covered);
    tables.extend(parents.iter().filter(|table| !covered(table)).cloned());
    Ok(Wanted { tables, leaves, ..Wanted::default() })
}

/// Takes out of `wanted` the tables that are not in the publication and that only another role can add (it takes the
/// owner of both); their names. A first publication is all or nothing.
pub(super) fn take_others(
    wanted: &mut Wanted,
    found: Option<&publication::Publication>,
    settings: &CaptureSettings,
    facts: &ServerFacts,
) -> Vec<String> {
    let Some(found) = found else { return Vec::new() };
    if facts.superuser || settings.autocreate != Autocreate::Filtered {
        return Vec::new();
    }
    let ours = |table: &CatalogTable| table.owned && found.owned || found.has(&table.schema, &table.name);
    let names = wanted.tables.iter().filter(|table| !ours(table)).map(CatalogTable::full_name).collect();
    wanted.tables.retain(|table| ours(table));
    names
}

/// Two tables whose rows would be mixed in one topic: their names differ in what Kafka forbids in a topic's.
pub(super) fn shared_topic(wanted: &Wanted, settings: &CaptureSettings) -> Option<String> {
    let mut topics: BTreeMap<String, String> = BTreeMap::new();
    for table in &wanted.tables {
        let topic = avro::topic_name(&settings.prefix, &table.schema, &table.name);
        if let Some(other) = topics.insert(topic.clone(), table.full_name()) {
            return Some(format!(
                "{other} and {} would share topic '{topic}'. hint: rename one, or leave it out with table.exclude.list",
                table.full_name()
            ));
        }
    }
    None
}

/// What a look at the publication of a running capture finds.
#[derive(Default)]
pub(super) struct Unpublished {
    /// Tables that are asked for and not published, and that this role can add.
    pub ours: Vec<String>,
    /// Those that only others can add.
    pub others: Vec<String>,
    /// The publication is gone, or leaves out what is needed: rows are passed over from here on.
    pub wrong: Option<String>,
}

/// Looks whether a running capture's publication is as it must be.
pub(super) async fn unpublished(
    session: &mut Session,
    settings: &CaptureSettings,
) -> Result<Unpublished, PostgresError> {
    let Some(found) = publication::find(session, &settings.publication).await? else {
        return Ok(Unpublished { wrong: Some(without_publication(settings)), ..Unpublished::default() });
    };
    let wrong = found.wrong(&settings.publication, settings.via_root);
    if wrong.is_some() || settings.autocreate != Autocreate::Filtered {
        return Ok(Unpublished { wrong, ..Unpublished::default() });
    }
    let facts = catalog::server_facts(session).await?;
    let mut wanted = wanted(session, settings).await?;
    let others = take_others(&mut wanted, Some(&found), settings, &facts);
    let ours = publication::changes(Some(&found), &wish(settings, &wanted, &facts))?.added;
    Ok(Unpublished { ours, others, wrong: None })
}

/// A loss: newer servers pass over rows of a publication that is gone, older ones refuse to go on.
pub(super) fn without_publication(settings: &CaptureSettings) -> String {
    format!(
        "publication '{}' is gone, or was: what was committed without it is in no stream and may be missing in the log",
        settings.publication
    )
}

/// Makes the publication where there is none.
pub async fn ensure_publication(session: &mut Session, settings: &CaptureSettings) -> Result<(), Fault> {
    if publication::find(session, &settings.publication).await?.is_some() {
        return Ok(());
    }
    let facts = catalog::server_facts(session).await?;
    let wanted = wanted(session, settings).await?;
    apply(session, &publication::changes(None, &wish(settings, &wanted, &facts))?).await
}

/// Brings the publication up to date.
pub(super) async fn apply(session: &mut Session, changes: &publication::Changes) -> Result<(), Fault> {
    publication::apply(session, changes).await.map_err(|error| match error.code() {
        Some("42501") => {
            Fault::stop(format!("{error}. hint: a role that owns the tables must run: {};", changes.sql.join("; ")))
        }
        // Somebody else has just made it, or a table was just dropped.
        Some("42710" | "23505" | "42P01") => Fault::retry(error.to_string()),
        _ => error.into(),
    })
}

pub(super) fn wish<'a>(
    settings: &'a CaptureSettings,
    wanted: &'a Wanted,
    facts: &ServerFacts,
) -> publication::Wish<'a> {
    publication::Wish {
        name: &settings.publication,
        autocreate: settings.autocreate,
        via_root: settings.via_root,
        tables: &wanted.tables,
        parents: &wanted.parents,
        server: facts.version,
    }
}
