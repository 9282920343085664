//! A table as its rows in the WAL are: the Relation message, completed from the catalog.
//!
//! The WAL is the authority on what it carries: names, types and the identity's columns. The catalog, which may be
//! newer (CORRECTNESS 7), adds what the WAL leaves out: nullability, defaults, enum labels, the order of the key. Where
//! the catalog no longer has a column, what was known of it before is used, and without that it is nullable with
//! no default: the value decides.

use std::collections::BTreeMap;

use crate::event::{Column, ColumnType, Oid, ReplicaIdentity, Table};

use super::catalog::unknown_type;
use super::pgoutput::Relation;

/// Puts a table together. `now` is the catalog's, `before` what this capture took the table for last.
pub fn table(
    relation: &Relation,
    now: Option<&Table>,
    before: Option<&Table>,
    types: &BTreeMap<Oid, ColumnType>,
) -> Table {
    let known = |name: &str, table: Option<&Table>| -> Option<Column> {
        table?.columns.iter().find(|column| column.name == name).cloned()
    };
    let columns: Vec<Column> = relation
        .columns
        .iter()
        .map(|wal| {
            let catalog = known(&wal.name, now);
            let earlier = known(&wal.name, before);
            let column_type = types
                .get(&wal.type_oid)
                .filter(|found| found.name != "unknown")
                .or_else(|| earlier.as_ref().map(|column| &column.column_type).filter(|of| of.oid == wal.type_oid))
                .cloned()
                .unwrap_or_else(|| unknown_type(wal.type_oid));
            let told = catalog.or(earlier);
            Column {
                name: wal.name.clone(),
                type_modifier: wal.type_modifier,
                nullable: told.as_ref().is_none_or(|column| column.nullable),
                default_expression: told
                    .as_ref()
                    .filter(|column| is_same_kind(column.column_type.oid, wal.type_oid))
                    .and_then(|column| column.default_expression.clone()),
                // What is in the WAL has a cell in every row.
                generated: false,
                column_type,
            }
        })
        .collect();
    let key = key(relation, &columns, now, before);
    Table {
        oid: relation.oid,
        schema: relation.schema.clone(),
        name: relation.name.clone(),
        replica_identity: relation.replica_identity,
        columns,
        key,
    }
}

/// Whether a default of one type is one of the other, too: the type may have been changed since (`int` to `bigint`).
fn is_same_kind(one: Oid, other: Oid) -> bool {
    let integer = |oid: Oid| matches!(oid.0, 20 | 21 | 23);
    one == other || (integer(one) && integer(other))
}

/// The key's columns in the order of its index, as far as the index is known to be the one of the WAL.
fn key(relation: &Relation, columns: &[Column], now: Option<&Table>, before: Option<&Table>) -> Vec<usize> {
    let place = |name: &str| columns.iter().position(|column| column.name == name);
    let ordered = |table: &Table| -> Option<Vec<usize>> {
        table.key.iter().map(|at| place(&table.columns.get(*at)?.name)).collect()
    };
    let flagged: Vec<usize> =
        relation.columns.iter().enumerate().filter(|(_, column)| column.identity).map(|(at, _)| at).collect();
    let known = [now, before].into_iter().flatten();
    match relation.replica_identity {
        // The WAL says which columns, but not in which order.
        ReplicaIdentity::Default | ReplicaIdentity::Index => known
            .filter_map(ordered)
            .find(|key| {
                let mut sorted = key.clone();
                sorted.sort_unstable();
                sorted == flagged
            })
            .unwrap_or(flagged),
        // Nothing in the WAL tells the primary key.
        ReplicaIdentity::Full | ReplicaIdentity::Nothing => {
            known.filter_map(ordered).find(|key| !key.is_empty()).unwrap_or_default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::TypeKind;
    use crate::postgres::pgoutput::RelationColumn;

    fn int4() -> ColumnType {
        ColumnType { oid: Oid(23), schema: "pg_catalog".into(), name: "int4".into(), kind: TypeKind::Base }
    }

    fn column(name: &str, nullable: bool) -> Column {
        Column {
            name: name.into(),
            column_type: int4(),
            type_modifier: -1,
            nullable,
            default_expression: None,
            generated: false,
        }
    }

    fn wal(columns: &[(&str, bool)]) -> Relation {
        Relation {
            oid: Oid(1),
            schema: "s".into(),
            name: "t".into(),
            replica_identity: ReplicaIdentity::Default,
            columns: columns
                .iter()
                .map(|(name, identity)| RelationColumn {
                    identity: *identity,
                    name: (*name).into(),
                    type_oid: Oid(23),
                    type_modifier: -1,
                })
                .collect(),
        }
    }

    fn known(columns: Vec<Column>, key: Vec<usize>) -> Table {
        Table {
            oid: Oid(1),
            schema: "s".into(),
            name: "t".into(),
            replica_identity: ReplicaIdentity::Default,
            columns,
            key,
        }
    }

    #[test]
    fn a_column_that_the_catalog_dropped_since_is_still_in_the_table_of_the_wal() {
        let now = known(vec![column("id", false)], vec![0]);
        let types = BTreeMap::from([(Oid(23), int4())]);
        let table = table(&wal(&[("id", true), ("gone", false)]), Some(&now), None, &types);
        let columns: Vec<_> = table.columns.iter().map(|column| (column.name.as_str(), column.nullable)).collect();
        assert_eq!(columns, [("id", false), ("gone", true)]);
    }

    #[test]
    fn the_keys_order_is_the_indexs_unless_the_index_is_another_one() {
        let now = known(vec![column("a", false), column("b", false)], vec![1, 0]);
        let types = BTreeMap::from([(Oid(23), int4())]);
        assert_eq!(table(&wal(&[("a", true), ("b", true)]), Some(&now), None, &types).key, [1, 0]);
        assert_eq!(table(&wal(&[("a", true), ("b", false)]), Some(&now), None, &types).key, [0]);
    }
}
