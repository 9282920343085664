//! Avro: the schemas of change events as Debezium registers them, the plan that writes a row's text straight
//! into Avro, and decoding.
//!
//! One [`Encoding`](encoding::Encoding) a column says both what the schema is and how PostgreSQL's text becomes
//! Avro, so that the two cannot disagree. [`schemas`] renders the schema text to register; [`TablePlan`] is
//! compiled once per relation and writes the Confluent wire format (byte 0, schema id, Avro) into a batch's
//! buffer; [`Decoder`] reads any event back, also one that someone else wrote.
//!
//! Text must come from a session with [`SESSION_SETTINGS`]: the parsers know PostgreSQL's ISO forms only.
//!
//! Where events differ from Debezium's on purpose is listed in [`deviations`].

mod control;
mod decode;
mod defaults;
pub mod deviations;
mod encoding;
mod error;
mod friendly;
mod meta;
mod names;
mod plan;
mod resolve;
mod schema;
mod settings;
#[cfg(test)]
mod tests;
mod text;
mod wire;

pub use control::{ControlSchema, HeartbeatPlan, MessagePlan};
pub use decode::Decoder;
pub use error::{AvroError, RefusedValue};
pub use meta::{EventMeta, SnapshotMarker, TransactionBlock, TransactionMeta};
pub use names::topic_name;
pub use plan::TablePlan;
pub use schema::{TableSchemas, schemas};
pub use settings::{
    BinaryMode, ColumnLists, DecimalMode, EncodingSettings, HstoreMode, IntervalMode, TimeMode, UNAVAILABLE_VALUE,
};
pub use wire::{split_wire, write_wire_header};

/// What a session whose text is encoded must have set, for replication and for snapshots alike.
pub const SESSION_SETTINGS: &[(&str, &str)] = &[
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
];
