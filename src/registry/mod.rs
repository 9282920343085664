//! Schemas by id: a client of any Confluent-compatible registry, and a durable registry of our own with the
//! same REST API.

mod builtin;
mod client;
mod compatibility;
mod decoder;

use std::sync::Arc;

use async_trait::async_trait;

pub use builtin::{BuiltinError, BuiltinRegistry, Registered, Version};
pub use client::{RegistryAuth, RegistryClient};
pub use compatibility::CompatibilityLevel;
pub use decoder::{DecodeError, EventDecoder};

#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// The id of `schema` (Avro JSON text) under `subject`, registered where it is new.
    async fn register(&self, subject: &str, schema: &str) -> Result<SchemaId, RegistryError>;

    /// The schema's text. Cached: ids never change their meaning.
    async fn schema(&self, id: SchemaId) -> Result<Arc<str>, RegistryError>;

    /// What would happen on `register`, without doing it (for `plan`).
    async fn lookup(&self, subject: &str, schema: &str) -> Result<Option<SchemaId>, RegistryError>;
}

/// The 4 bytes after the magic byte of the Confluent wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SchemaId(pub u32);

#[derive(Clone, Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("the schema registry is unavailable: {0}")]
    Unavailable(String),
    /// The new schema may not follow the ones before it (409).
    #[error("subject '{subject}' refuses the schema: {reason}")]
    Incompatible { subject: String, reason: String },
    #[error("schema id {0} is not in the registry")]
    UnknownId(u32),
    #[error("{0}")]
    Rejected(String),
}
