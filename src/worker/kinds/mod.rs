//! The kinds of connectors, by their `type:`. One file a kind, all with the same entry points: `Settings::read`,
//! `run`, `plan`, `preview`, `reset`, `forget`. A new kind is one file here and one line in [`read`].

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

/// Removes what a connector of this kind has left in the datastore (a slot, say); says what was done.
pub async fn forget(kind: &str, identity: &Identity, context: &ConnectorContext) -> Result<String, Fault> {
    match kind {
        "postgres-source" => postgres_source::forget(identity, context).await,
        _ => Ok(String::new()),
    }
}
