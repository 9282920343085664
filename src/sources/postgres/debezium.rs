//! Settings of Debezium's connector that are not Tidegate's: accepted where they ask for what is done anyway, else
//! refused by name, with what there is instead.

use crate::config::{ConfigError, Node, Section, Spanned};

/// Name, the values that change nothing, and what there is instead.
const FOREIGN: &[(&str, &[&str], &str)] = &[
    ("connector.class", &["io.debezium.connector.postgresql.PostgresConnector"], "the kind is 'type: postgres-source'"),
    ("tasks.max", &["1"], "a capture is one task"),
    ("plugin.name", &["pgoutput"], "pgoutput is the plugin that every server has"),
    ("schema.name.adjustment.mode", &["avro"], "names that Avro forbids are always adjusted, as 'avro' does"),
    ("field.name.adjustment.mode", &["avro"], "names that Avro forbids are always adjusted, as 'avro' does"),
    ("include.unknown.datatypes", &["true"], "types that Debezium does not know are PostgreSQL's text"),
    ("slot.drop.on.stop", &["false"], "when its file is removed, 'tidegate connectors forget NAME' drops the slot"),
    (
        "provide.transaction.metadata",
        &["false"],
        "source.txId and source.sequence say which transaction a row belongs to, and in which order",
    ),
    ("heartbeat.action.query", &[], "an idle slot is moved on without a query (idle.advance.interval)"),
    ("include.schema.changes", &["false"], "the topic's schemas in the registry say how a table changed"),
    ("message.key.columns", &[], "the key is the primary key, or the index of REPLICA IDENTITY USING INDEX"),
    (
        "snapshot.select.statement.overrides",
        &[],
        "a snapshot reads all rows; filter with 'when' where they are delivered",
    ),
    ("snapshot.locking.mode", &["none"], "tables are read under ACCESS SHARE, which no row change waits for"),
    ("snapshot.isolation.mode", &["repeatable_read"], "the snapshot is the slot's"),
    ("snapshot.fetch.size", &[], "rows are read by COPY, in bounded memory"),
    ("snapshot.max.threads", &["1"], "tables are read one after another"),
    ("max.batch.size", &[], "batches are bounded in bytes: batch.bytes"),
    ("max.queue.size", &[], "queues are bounded in bytes"),
    ("poll.interval.ms", &[], "nothing is polled: what is committed is sent by the server"),
    (
        "event.processing.failure.handling.mode",
        &[],
        "a table that can't be encoded is left out by itself, and told; column.exclude.list leaves out a column",
    ),
    ("datatype.propagate.source.type", &[], "schemas carry no types of the source"),
    ("time.zone", &[], "times are in UTC"),
];

/// Beginnings of names.
const FAMILIES: &[(&str, &str)] = &[
    ("transforms", "change events where they are delivered, with jq in 'map' and 'when'"),
    ("predicates", "filter events where they are delivered, with jq in 'when'"),
    ("key.converter", "keys are Avro with a schema id, as Confluent's converter writes them"),
    ("value.converter", "values are Avro with a schema id, as Confluent's converter writes them"),
    ("converters", "column types are written as in docs/debezium-differences.md"),
    ("column.mask", "leave a column out with column.exclude.list"),
    ("column.truncate", "leave a column out with column.exclude.list"),
    ("signal", "'tidegate connectors reset NAME --to beginning' reads all tables again"),
    ("incremental.snapshot", "'tidegate connectors reset NAME --to beginning' reads all tables again"),
    ("schema.history.internal", "tables' shapes are kept in the log, in the topic tidegate.schemas.NAME"),
];

pub(super) fn refuse(section: &mut Section) -> Result<(), ConfigError> {
    for (name, harmless, instead) in FOREIGN {
        let Some(value) = section.foreign::<Spanned<String>>(name)? else { continue };
        if !harmless.contains(&value.as_str()) {
            return Err(
                ConfigError::new(&value.place, format!("{name}: '{}' is not supported", value.value)).hint(*instead)
            );
        }
    }
    for (family, instead) in FAMILIES {
        let node: Option<Node> = section.foreign_node(family)?;
        if let Some(node) = node {
            return Err(ConfigError::new(&node.place, format!("{family}: not supported")).hint(*instead));
        }
    }
    Ok(())
}
