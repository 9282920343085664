//! Events that are no rows: logical messages (topic `<prefix>.message`) and heartbeats
//! (`__debezium-heartbeat.<prefix>`).

use super::EventMeta;
use super::schema::{Annotations, Avro, Field, POSTGRESQL_NAMESPACE, Record, render, source, transaction_block};
use super::wire::{put_bytes, put_long, write_wire_header};

const COMMON_NAMESPACE: &str = "io.debezium.connector.common";

/// The key and value schemas to register for a control topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSchema {
    pub key: String,
    pub value: String,
}

/// Writes logical messages.
#[derive(Clone, Copy, Debug)]
pub struct MessagePlan {
    key_id: u32,
    value_id: u32,
}

impl MessagePlan {
    pub fn schemas() -> ControlSchema {
        let record = |name: &str, fields| record(POSTGRESQL_NAMESPACE, name, fields);
        let message = record(
            "Message",
            vec![Field::nullable("prefix", Avro::Plain("string")), Field::nullable("content", Avro::Plain("bytes"))],
        );
        let value = record(
            "MessageValue",
            vec![
                Field::required("op", Avro::Plain("string")),
                Field::nullable("ts_ms", Avro::Plain("long")),
                Field::required("source", source()),
                Field::nullable("transaction", transaction_block()),
                Field::required("message", message),
            ],
        );
        let key = record("MessageKey", vec![Field::nullable("prefix", Avro::Plain("string"))]);
        ControlSchema { key: render(&key), value: render(&value) }
    }

    pub fn new(key_id: u32, value_id: u32) -> Self {
        MessagePlan { key_id, value_id }
    }

    /// Appends the wire bytes of the key.
    pub fn write_key(&self, prefix: &str, out: &mut Vec<u8>) {
        write_wire_header(self.key_id, out);
        put_long(out, 1);
        put_bytes(out, prefix.as_bytes());
    }

    /// Appends the wire bytes of the value. `meta.operation` is to be `Message`.
    pub fn write_value(&self, prefix: &str, content: &[u8], meta: &EventMeta<'_>, out: &mut Vec<u8>) {
        write_wire_header(self.value_id, out);
        put_bytes(out, meta.operation.letter().as_bytes());
        put_long(out, 1);
        put_long(out, meta.processed_ns.div_euclid(1_000_000));
        // A message belongs to no table: schema and table are empty.
        meta.put_source(&[0, 0], out);
        meta.put_block(out);
        put_long(out, 1);
        put_bytes(out, prefix.as_bytes());
        put_long(out, 1);
        put_bytes(out, content);
    }
}

/// Writes heartbeats.
#[derive(Clone, Copy, Debug)]
pub struct HeartbeatPlan {
    key_id: u32,
    value_id: u32,
}

impl HeartbeatPlan {
    pub fn schemas() -> ControlSchema {
        let record = |name: &str, field| record(COMMON_NAMESPACE, name, vec![field]);
        let key = record("ServerNameKey", Field::required("serverName", Avro::Plain("string")));
        let value = record("Heartbeat", Field::required("ts_ms", Avro::Plain("long")));
        ControlSchema { key: render(&key), value: render(&value) }
    }

    /// `__debezium-heartbeat.<prefix>`
    pub fn topic(prefix: &str) -> String {
        format!("__debezium-heartbeat.{prefix}")
    }

    pub fn new(key_id: u32, value_id: u32) -> Self {
        HeartbeatPlan { key_id, value_id }
    }

    pub fn write_key(&self, prefix: &str, out: &mut Vec<u8>) {
        write_wire_header(self.key_id, out);
        put_bytes(out, prefix.as_bytes());
    }

    pub fn write_value(&self, now_ms: i64, out: &mut Vec<u8>) {
        write_wire_header(self.value_id, out);
        put_long(out, now_ms);
    }
}

fn record(namespace: &str, name: &str, fields: Vec<Field>) -> Avro {
    let annotations = Annotations::connect(&format!("{namespace}.{name}"));
    Avro::Record(Record { namespace: namespace.into(), name: name.into(), fields, annotations })
}
