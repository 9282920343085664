//! Tables that can't be written: told, and tried again when a person has seen to them.
//!
//! Invariant: a table is in quarantine in every position from the change on that could not be written, until all its
//! rows have been read anew. So no restart passes over it without a word, and none stops over it again.

use std::collections::BTreeMap;

use serde_json::json;

use crate::event::{CapturePosition, Quarantine, SnapshotProgress};
use crate::pipeline::Status;

use super::opening::Opening;
use super::settings::SnapshotMode;
use super::wanted::Wanted;

/// Name of the fact of tables in quarantine: `[{table, since, reason}]`.
const QUARANTINED: &str = "quarantined";

/// Says what is in quarantine `now`, and what is not any more.
pub(super) fn tell(
    connector: &str,
    status: &Status,
    before: &BTreeMap<String, Quarantine>,
    now: &BTreeMap<String, Quarantine>,
) {
    let is_news = |(table, quarantine): &(&String, &Quarantine)| {
        before.get(*table).is_none_or(|before| (before.since, &before.reason) != (quarantine.since, &quarantine.reason))
    };
    for (table, quarantine) in now.iter().filter(is_news) {
        tracing::error!(connector, %table, since = %quarantine.since,
            "{table} is in quarantine, none of its changes is captured but deletes: {}. The other tables go on. hint: \
             when it is put right, 'tidegate connectors restart {connector}' reads it anew", quarantine.reason);
    }
    for table in before.keys().filter(|table| !now.contains_key(*table)) {
        tracing::info!(connector, %table, "is in quarantine no more");
    }
    let shown = |(table, quarantine): (&String, &Quarantine)| json!({ "table": table, "since": quarantine.since.to_string(), "reason": quarantine.reason });
    status.set_fact(QUARANTINED, now.iter().map(shown).collect::<Vec<_>>());
}

/// The position from which the tables in quarantine that are due are read anew; `None` where none is due: a person has
/// not asked for it, and settings and version are those that it was tried with.
pub(super) fn released(opening: &Opening, position: &CapturePosition, wanted: &Wanted) -> Option<CapturePosition> {
    let attempt = opening.settings.attempt();
    let is_due = |quarantine: &Quarantine| opening.release || quarantine.tried_with != attempt;
    let due = position.quarantined.iter().filter(|(_, quarantine)| is_due(quarantine));
    let due: Vec<String> = due.map(|(table, _)| table.clone()).collect();
    if due.is_empty() {
        return None;
    }
    let mut position = position.clone();
    let names: Vec<String> = wanted.tables.iter().map(|table| table.full_name()).collect();
    // One that is dropped or excluded by now is nothing to be told of any more.
    let (again, gone): (Vec<String>, Vec<String>) = due.into_iter().partition(|table| names.contains(table));
    gone.iter().for_each(|table| drop(position.quarantined.remove(table)));
    let again_text = again.join(", ");
    if opening.settings.snapshot == SnapshotMode::NoData {
        again.iter().for_each(|table| drop(position.quarantined.remove(table)));
        tracing::warn!(connector = %opening.name, tables = %again_text,
            "captured again from here on; what was changed in quarantine is not in the log (snapshot.mode: no_data)");
    } else if !again.is_empty() {
        // Whatever becomes of it: not tried twice for one reason.
        position.quarantined.values_mut().for_each(|quarantine| quarantine.tried_with = attempt);
        let done = names.into_iter().filter(|name| !again.contains(name)).collect();
        let consistent_point = position.commit_end;
        position.snapshot = Some(SnapshotProgress { consistent_point, done, begun: Vec::new(), adopting: true });
        tracing::info!(connector = %opening.name, tables = %again_text, "in quarantine: reading them anew, then on");
    }
    Some(position)
}
