//! The kinds of connectors, by their `type:`. One file a kind, all with the same entry points: `Settings::read`,
//! `run`, `plan`, `preview`, `reset`, `forget`. A new kind is one file here and a line in [`TYPES`] and [`read`].

pub mod http_pull;
pub mod http_sink;
pub mod postgres_source;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

use crate::config::{ConfigError, Section, Spanned};
use crate::pipeline::{ConnectorContext, Fault, Plan, ResetTo};
use crate::postgres::slot::Slot;
use crate::systems::System;

/// What the settings of a connector may refer to while they are read.
pub struct World<'a> {
    pub systems: &'a BTreeMap<String, Arc<System>>,
    /// Folder of the worker's own state (embedded log, registry, spool files).
    pub state: &'a Path,
}

/// What may not change while a connector keeps its name: settings and their values.
pub type Identity = BTreeMap<String, String>;

/// A connector with its settings read, whatever its kind.
#[async_trait]
pub trait Connector: Send + Sync + 'static {
    fn identity(&self) -> Identity;

    /// The server that it keeps something on, where that is not the worker's datastore: `user@host:port/database`.
    fn server(&self) -> Option<String> {
        None
    }

    /// Consumer groups that it reads the log with, under the connector's name.
    fn groups(&self, name: &str) -> Vec<String>;

    /// Works until told to stop.
    async fn run(&self, context: ConnectorContext) -> Result<(), Fault>;

    async fn plan(&self, context: &ConnectorContext) -> Result<Plan, Fault>;

    async fn preview(&self, context: &ConnectorContext, limit: usize) -> Result<Vec<Value>, Fault>;

    /// Moves the stopped connector; says in one line what was done.
    async fn reset(&self, context: &ConnectorContext, to: &ResetTo) -> Result<String, Fault>;
}

/// The types there are.
pub const TYPES: [&str; 3] = ["postgres-source", "http-sink", "http-pull"];

/// Reads the settings of a connector of this type; the caller finishes the section.
pub fn read(
    kind: &Spanned<String>,
    section: &mut Section,
    world: &World<'_>,
) -> Result<Arc<dyn Connector>, ConfigError> {
    match kind.as_str() {
        "http-sink" => http_sink::read(section, world),
        "http-pull" => Ok(Arc::new(http_pull::Settings::read(section, world)?)),
        "postgres-source" => Ok(Arc::new(postgres_source::Settings::read(section, world)?)),
        other => Err(ConfigError::new(&kind.place, format!("there is no connector type `{other}`"))
            .hint(format!("known: {}", TYPES.join(", ")))),
    }
}

/// The system that `system:` names.
fn system(section: &mut Section, world: &World<'_>) -> Result<Spanned<Arc<System>>, ConfigError> {
    let name: Spanned<String> = section.require("system")?;
    if let Some(system) = world.systems.get(name.as_str()) {
        return Ok(Spanned::new(system.clone(), name.place));
    }
    let known: Vec<&str> = world.systems.keys().map(String::as_str).collect();
    let error = ConfigError::new(&name.place, format!("there is no system `{}`", name.as_str()));
    let read = "a running worker has read them at its start: restart it after a change";
    Err(match known.is_empty() {
        true => error.hint(format!("systems are set in the worker's file, under `systems`; {read}")),
        false => error.hint(format!("known: {}; {read}", known.join(", "))),
    })
}

/// Removes what a connector of this kind has left in the datastore (a slot, say); says what was done.
pub async fn forget(kind: &str, identity: &Identity, context: &ConnectorContext) -> Result<String, Fault> {
    match kind {
        "postgres-source" => postgres_source::forget(identity, context).await,
        _ => Ok(String::new()),
    }
}

/// The statements that [`forget`] runs, for a server that it can't reach.
pub fn forget_sql(kind: &str, identity: &Identity) -> Vec<String> {
    match kind {
        "postgres-source" => postgres_source::forget_sql(identity),
        _ => Vec::new(),
    }
}

/// The slot that a connector without a file still holds in the datastore's server, by name.
pub async fn left_slot(
    kind: &str,
    identity: &Identity,
    context: &ConnectorContext,
) -> Result<Option<(String, Slot)>, Fault> {
    match kind {
        "postgres-source" => postgres_source::left_slot(identity, context).await,
        _ => Ok(None),
    }
}

/// Whether a connector of this identity holds a slot.
pub fn has_slot(identity: &Identity) -> bool {
    identity.contains_key(postgres_source::SLOT)
}

/// The name under which what a connector had before its identity changed is remembered, where something of it is
/// left. No connector can have such a name.
pub fn orphan_of(name: &str, before: &Identity, now: &Identity) -> Option<String> {
    let slot = before.get(postgres_source::SLOT)?;
    let place = ["database.dbname", postgres_source::SLOT];
    let moved = place.iter().any(|setting| before.get(*setting) != now.get(*setting));
    moved.then(|| format!("{name}@{slot}"))
}
