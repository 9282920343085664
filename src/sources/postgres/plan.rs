//! What a capture would make, what is missing for it, and what its first events would look like.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::avro::{self, Decoder, EventMeta, SnapshotMarker, TablePlan, TransactionMeta};
use crate::event::{CapturePosition, Lsn, Operation};
use crate::log::Log;
use crate::pipeline::{Fault, Plan, PlanStep};
use crate::postgres::catalog::{self, CatalogTable, load_tables};
use crate::postgres::copy_text::RowReader;
use crate::postgres::frames::next_frame;
use crate::postgres::slot::Loss;
use crate::postgres::{Address, Purpose, identifier, publication, qualified, slot, snapshot};
use crate::registry::Registry;

use super::relations::encoding_fault;
use super::settings::{CaptureSettings, SnapshotMode};
use super::wanted::{shared_topic, wanted, wish, without_publication};

fn step(action: &'static str, what: &'static str, name: &str, detail: Option<String>) -> PlanStep {
    PlanStep { action, what, name: name.to_owned(), detail }
}

/// Looks, and changes nothing.
pub async fn plan(
    connector: &str,
    settings: &CaptureSettings,
    address: &Address,
    log: &Arc<dyn Log>,
    registry: &Arc<dyn Registry>,
    stored: Option<&CapturePosition>,
) -> Result<Plan, Fault> {
    let mut settings = settings.clone();
    settings.encoding.database.clone_from(&address.dbname);
    let mut plan = Plan::default();
    // A role that may not replicate yet is told so, and can look at the rest.
    let mut replicating = address.connect(Purpose::Replication).await.ok();
    let mut session = address.connect(Purpose::Sql).await?;
    let facts = catalog::server_facts(&mut session).await?;
    plan.problems = facts.problems();
    plan.dba_sql = facts.dba_sql();
    let role = identifier(&facts.user);

    let wanted = wanted(&mut session, &settings).await?;
    plan.problems.extend(shared_topic(&wanted, &settings));
    let found = publication::find(&mut session, &settings.publication).await?;
    match publication::changes(found.as_ref(), &wish(&settings, &wanted, &facts)) {
        Ok(changes) if changes.sql.is_empty() => {
            plan.steps.push(step("keep", "publication", &settings.publication, None));
        }
        Ok(changes) => {
            let action = if changes.creates { "create" } else { "change" };
            plan.steps.push(step(action, "publication", &settings.publication, Some(changes.sql.join("; "))));
            let added = |table: &&CatalogTable| !table.owned && changes.added.contains(&table.full_name());
            let mut foreign: Vec<String> = wanted.tables.iter().filter(added).map(CatalogTable::full_name).collect();
            if found.as_ref().is_some_and(|found| !found.owned) {
                foreign.push(format!("publication {}", settings.publication));
            }
            if (changes.creates && !facts.may_create_publications) || (!foreign.is_empty() && !facts.superuser) {
                plan.problems.push(format!(
                    "role '{}' may not {action} the publication: it {}must own {}",
                    facts.user,
                    if changes.creates { "needs CREATE on the database and " } else { "" },
                    if foreign.is_empty() { "the tables".to_owned() } else { foreign.join(", ") }
                ));
                plan.dba_sql.extend(changes.sql.iter().map(|sql| format!("{sql};")));
            }
        }
        Err(error) => plan.problems.push(error.to_string()),
    }

    let unpublished = found.is_none();
    let found = slot::find(&mut session, &settings.slot).await?;
    let snapshot = if settings.snapshot == SnapshotMode::NoData { "no snapshot" } else { "then a snapshot" };
    match (&found, stored) {
        (None, None) => {
            plan.steps.push(step("create", "slot", &settings.slot, Some(format!("pgoutput, {snapshot}"))));
            if facts.slots >= facts.max_slots {
                plan.problems
                    .push(format!("all {} replication slots are taken (max_replication_slots)", facts.max_slots));
                let more = facts.max_slots + 5;
                plan.dba_sql.push(format!("ALTER SYSTEM SET max_replication_slots = {more}; -- then restart"));
            }
        }
        (Some(_), None) if settings.snapshot == SnapshotMode::NoData => {
            plan.steps.push(step("keep", "slot", &settings.slot, Some("from where it stands".into())));
        }
        (Some(_), None) => plan.problems.push(format!(
            "replication slot '{}' is there, but the log has no position for it: somebody else's, or the log was lost",
            settings.slot
        )),
        (found, Some(stored)) if stored.snapshot.is_some() => {
            let begun = stored.snapshot.as_ref().is_some_and(|progress| progress.consistent_point != Lsn::ZERO);
            let (action, detail) = match (found, begun) {
                (Some(_), true) => ("keep", "the snapshot goes on with the tables that are left"),
                (Some(_), false) => ("change", "made anew, then a snapshot"),
                (None, _) => ("create", "the snapshot is begun anew"),
            };
            plan.steps.push(step(action, "slot", &settings.slot, Some(detail.into())));
        }
        (found, Some(stored)) => {
            if let Some(found) = found {
                let behind = found.confirmed_flush.map(|lsn| lsn.to_string()).unwrap_or_default();
                let detail = format!("from {}, the server knows of {behind}", stored.commit_end);
                plan.steps.push(step("keep", "slot", &settings.slot, Some(detail)));
            }
            if unpublished && settings.snapshot != SnapshotMode::NoData {
                plan.problems.push(without_publication(&settings));
            }
            if let Some(replicating) = &mut replicating {
                let server = slot::look(replicating, &settings.slot, Some(stored)).await?;
                // Beside a capture that runs, the slot may have moved on since the position was read.
                let runs = server.slot.as_ref().is_some_and(|slot| slot.active_pid.is_some());
                match slot::check(&settings.slot, &server, stored, stored.commit_end) {
                    Err(Loss::Ahead { .. }) if runs => {}
                    Err(loss) => plan.problems.push(loss.to_string()),
                    Ok(()) => {}
                }
            } else if found.is_none() {
                plan.problems.push(format!("replication slot '{}' is gone", settings.slot));
            }
        }
    }

    let topics: Vec<String> = match log.topics().await {
        Ok(topics) => topics.into_iter().map(|topic| topic.name).collect(),
        Err(error) => {
            plan.problems.push(error.to_string());
            Vec::new()
        }
    };
    if let Some(replicating) = replicating {
        replicating.close().await;
    }
    let own = super::schemas::topic(connector);
    let made = topics.contains(&own);
    plan.steps.push(step(if made { "keep" } else { "create" }, "topic", &own, Some("shapes of tables, by LSN".into())));
    let oids: Vec<_> = wanted.tables.iter().map(|table| table.oid).collect();
    let shapes = load_tables(&mut session, &oids, facts.version >= 180_000).await?;
    session.close().await;
    for table in &wanted.tables {
        let name = table.full_name();
        let rows = match table.estimated_rows {
            0 => "empty, or never analyzed".to_owned(),
            1 => "about 1 row".to_owned(),
            rows => format!("about {rows} rows"),
        };
        plan.steps.push(step("keep", "table", &name, Some(rows)));
        if !table.readable && settings.snapshot != SnapshotMode::NoData {
            plan.problems.push(format!("role '{}' may not read {name}", facts.user));
            plan.dba_sql.push(format!("GRANT USAGE ON SCHEMA {} TO {role};", identifier(&table.schema)));
            plan.dba_sql.push(format!("GRANT SELECT ON {} TO {role};", qualified(&table.schema, &table.name)));
        }
        if table.rows_hidden && settings.snapshot != SnapshotMode::NoData {
            plan.problems.push(format!("row-level security hides rows of {name} from role '{}'", facts.user));
            plan.dba_sql.push(format!("ALTER ROLE {role} BYPASSRLS;"));
        }
        if !table.has_identity() {
            plan.problems.push(format!(
                "{name} has no replica identity: PostgreSQL refuses its updates and deletes while it is published"
            ));
            plan.dba_sql.push(format!("ALTER TABLE {} REPLICA IDENTITY FULL;", qualified(&table.schema, &table.name)));
        }
        let Some(shape) = shapes.get(&table.oid) else { continue };
        let topic = avro::topic_name(&settings.prefix, &shape.schema, &shape.name);
        let made = topics.contains(&topic);
        let detail = (!made).then(|| match settings.partitions {
            1 => "1 partition".to_owned(),
            partitions => format!("{partitions} partitions"),
        });
        plan.steps.push(step(if made { "keep" } else { "create" }, "topic", &topic, detail));
        match avro::schemas(shape, &settings.encoding) {
            Err(error) => plan.problems.push(error.to_string()),
            Ok(schemas) => {
                let both = [("key", schemas.key), ("value", Some(schemas.value))];
                for (part, schema) in both.into_iter().filter_map(|(part, schema)| Some((part, schema?))) {
                    let subject = format!("{topic}-{part}");
                    match registry.lookup(&subject, &schema).await {
                        Ok(Some(_)) => plan.steps.push(step("keep", "subject", &subject, None)),
                        Ok(None) => plan.steps.push(step("create", "subject", &subject, None)),
                        Err(error) => plan.problems.push(error.to_string()),
                    }
                }
            }
        }
    }
    Ok(plan)
}

/// The events that a snapshot would write first, decoded; nothing is made or written.
pub async fn preview(settings: &CaptureSettings, address: &Address, limit: usize) -> Result<Vec<Value>, Fault> {
    let mut settings = settings.clone();
    settings.encoding.database.clone_from(&address.dbname);
    let mut session = address.connect(Purpose::Sql).await?;
    let facts = catalog::server_facts(&mut session).await?;
    let wanted = wanted(&mut session, &settings).await?;
    let meta = TransactionMeta::new(&settings.encoding, super::now_us(), None, None, None);
    let mut events = Vec::new();
    for table in &wanted.tables {
        let left = limit.saturating_sub(events.len());
        if left == 0 {
            break;
        }
        let shapes = load_tables(&mut session, &[table.oid], facts.version >= 180_000).await?;
        let Some(shape) = shapes.get(&table.oid).filter(|shape| !shape.columns.is_empty()) else { continue };
        let schemas = avro::schemas(shape, &settings.encoding).map_err(encoding_fault)?;
        let key_id = schemas.key.as_ref().map(|_| 0);
        let plan = TablePlan::compile(shape, &settings.encoding, key_id, 0).map_err(encoding_fault)?;
        let key = schemas.key.as_deref().map(Decoder::compile).transpose().map_err(encoding_fault)?;
        let value = Decoder::compile(&schemas.value).map_err(encoding_fault)?;
        let sql = snapshot::copy_sql(shape, table.partitioned, None, Some(left));
        session.copy_out(&sql).await?;
        while let Some(mut rows) = session.copy_chunk(&sql).await? {
            while let Some((frame, length)) = next_frame(&rows)? {
                let start = length - frame.body.len();
                let mut row = rows.split_to(length);
                let mut cells = Vec::new();
                RowReader::default().read(&mut row[start..], &mut cells)?;
                let event = EventMeta {
                    transaction: &meta,
                    operation: Operation::Read,
                    lsn: Default::default(),
                    snapshot: SnapshotMarker::True,
                    block: None,
                    processed_ns: super::now_ns(),
                };
                let (mut key_bytes, mut value_bytes) = (Vec::new(), Vec::new());
                plan.write_key(&cells, &mut key_bytes).map_err(encoding_fault)?;
                plan.write_value(None, Some(&cells), &event, &mut value_bytes).map_err(encoding_fault)?;
                let decoded = |decoder: &Decoder, wire: &[u8]| {
                    let (_, body) = avro::split_wire(wire).map_err(encoding_fault)?;
                    decoder.decode(body).map_err(encoding_fault)
                };
                events.push(json!({
                    "topic": avro::topic_name(&settings.prefix, &shape.schema, &shape.name),
                    "key": key.as_ref().map(|key| decoded(key, &key_bytes)).transpose()?,
                    "value": decoded(&value, &value_bytes)?,
                }));
            }
        }
    }
    session.close().await;
    Ok(events)
}
