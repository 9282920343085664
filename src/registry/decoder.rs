//! Events of any topic as JSON and as changes: schemas looked up by the id that a record names, compiled once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use super::{Registry, RegistryError, SchemaId};
use crate::avro::{AvroError, Decoder, UNAVAILABLE_VALUE, split_wire};
use crate::event::{Change, Lsn, Operation};
use crate::log::ConsumedRecord;

/// Schemas kept compiled; beyond it all are forgotten and compiled anew as they come.
const MOST_SCHEMAS: usize = 10_000;

/// Decodes records written in the Confluent wire format. Shared by any number of readers.
pub struct EventDecoder {
    registry: Arc<dyn Registry>,
    placeholder: String,
    compiled: Mutex<HashMap<u32, Arc<Decoder>>>,
}

/// Why a record cannot be decoded.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DecodeError {
    /// The registry cannot give the schema; [`RegistryError::Unavailable`] passes.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("schema {schema_id}: {error}")]
    Avro { schema_id: u32, error: AvroError },
    #[error(transparent)]
    NotWire(AvroError),
    #[error("the event lacks {0}")]
    Incomplete(&'static str),
}

impl DecodeError {
    /// True when trying again later may help.
    pub fn is_retriable(&self) -> bool {
        matches!(self, DecodeError::Registry(RegistryError::Unavailable(_)))
    }
}

impl EventDecoder {
    pub fn new(registry: Arc<dyn Registry>) -> Self {
        Self::with_placeholder(registry, UNAVAILABLE_VALUE)
    }

    /// For topics written with another `unavailable.value.placeholder`.
    pub fn with_placeholder(registry: Arc<dyn Registry>, placeholder: &str) -> Self {
        EventDecoder { registry, placeholder: placeholder.to_owned(), compiled: Mutex::new(HashMap::new()) }
    }

    /// A key or value in friendly form: times as ISO text, decimals exact, JSON columns as JSON, bytes in base64,
    /// no key at all for an unchanged TOAST value.
    pub async fn value(&self, wire: &[u8]) -> Result<Value, DecodeError> {
        let (schema_id, body) = split_wire(wire).map_err(DecodeError::NotWire)?;
        let decoder = self.decoder(schema_id).await?;
        decoder.decode(body).map_err(|error| DecodeError::Avro { schema_id, error })
    }

    /// A key or value with numbers as they are in Avro.
    pub async fn raw(&self, wire: &[u8]) -> Result<Value, DecodeError> {
        let (schema_id, body) = split_wire(wire).map_err(DecodeError::NotWire)?;
        let decoder = self.decoder(schema_id).await?;
        decoder.decode_raw(body).map_err(|error| DecodeError::Avro { schema_id, error })
    }

    /// The change that a record tells of; `None` for a tombstone, and for what is no change event (a heartbeat).
    pub async fn change(&self, record: &ConsumedRecord) -> Result<Option<Change>, DecodeError> {
        let Some(wire) = &record.value else { return Ok(None) };
        let Value::Object(mut event) = self.value(wire).await? else { return Ok(None) };
        let Some(operation) = event.get("op").and_then(Value::as_str).and_then(Operation::from_letter) else {
            return Ok(None);
        };
        let Some(source) = event.remove("source") else { return Ok(None) };
        let key = match &record.key {
            Some(wire) => self.value(wire).await?,
            None => Value::Null,
        };
        let text = |name: &str| source.get(name).and_then(Value::as_str);
        let number = |name: &str| source.get(name).and_then(Value::as_i64);
        let lsn = Lsn(number("lsn").unwrap_or(0) as u64);
        let commit_time_us = number("ts_us").or_else(|| number("ts_ms").and_then(|ms| ms.checked_mul(1000)));
        let mut row = |name: &str| event.remove(name).unwrap_or(Value::Null);
        Ok(Some(Change {
            operation,
            schema: text("schema").unwrap_or_default().to_owned(),
            table: text("table").unwrap_or_default().to_owned(),
            key,
            before: row("before"),
            after: row(if operation == Operation::Message { "message" } else { "after" }),
            commit_lsn: text("sequence").and_then(last_commit).unwrap_or(lsn),
            lsn,
            commit_time_us: commit_time_us.ok_or(DecodeError::Incomplete("source.ts_ms"))?,
            xid: number("txId").map(|xid| xid as u32),
            origin: text("origin").map(str::to_owned),
            new_key: self.key_header(record, "__debezium.newkey").await?,
            old_key: self.key_header(record, "__debezium.oldkey").await?,
        }))
    }

    /// The other key of a changed primary key, in the friendly form that the record's own key has.
    async fn key_header(&self, record: &ConsumedRecord, name: &str) -> Result<Option<Value>, DecodeError> {
        let Some((_, json)) = record.headers.iter().find(|(header, _)| &**header == name) else { return Ok(None) };
        let Ok(raw) = serde_json::from_slice::<Value>(json) else { return Ok(None) };
        let Some(wire) = &record.key else { return Ok(Some(raw)) };
        let (schema_id, _) = split_wire(wire).map_err(DecodeError::NotWire)?;
        Ok(Some(self.decoder(schema_id).await?.friendly_from_raw(raw)))
    }

    async fn decoder(&self, schema_id: u32) -> Result<Arc<Decoder>, DecodeError> {
        let known = self.compiled.lock().unwrap_or_else(PoisonError::into_inner).get(&schema_id).cloned();
        if let Some(decoder) = known {
            return Ok(decoder);
        }
        let text = self.registry.schema(SchemaId(schema_id)).await?;
        let decoder = Decoder::with_placeholder(&text, &self.placeholder)
            .map_err(|error| DecodeError::Avro { schema_id, error })?;
        let decoder = Arc::new(decoder);
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if compiled.len() >= MOST_SCHEMAS {
            compiled.clear();
        }
        compiled.insert(schema_id, decoder.clone());
        Ok(decoder)
    }
}

/// The first part of `["lastCommitLsn","lsn"]`.
fn last_commit(sequence: &str) -> Option<Lsn> {
    let parts: Vec<Option<String>> = serde_json::from_str(sequence).ok()?;
    parts.into_iter().next()??.parse().ok().map(Lsn)
}
