//! A table as its rows in the WAL are: the Relation message, completed from what else is known.
//!
//! The WAL is the authority on what it carries: names, types and the identity's columns. What it leaves out
//! (nullability, defaults, enum labels, the order of the key) is in the catalog, which may be newer, and in what the
//! table was taken for before (CORRECTNESS 7). For rows of a backlog the latter goes before the former. Where neither
//! has a column it is nullable with no default: the value decides.

use std::collections::BTreeMap;

use crate::event::{Column, ColumnType, Oid, ReplicaIdentity, Table};

use super::catalog::unknown_type;
use super::pgoutput::{Relation, RelationColumn};

/// What is known of a table beside the WAL.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known<'a> {
    /// The catalog's, now.
    pub now: Option<&'a Table>,
    /// What it was taken for before.
    pub before: Option<&'a Table>,
    /// The row is of a backlog: what was known before is nearer to it than the catalog.
    pub behind: bool,
}

/// Whether `table` is what the WAL says: rows can be taken for it without asking anybody.
pub fn matches(table: &Table, relation: &Relation) -> bool {
    let same_column = |(column, wal): (&Column, &RelationColumn)| {
        column.name == wal.name && column.column_type.oid == wal.type_oid && column.type_modifier == wal.type_modifier
    };
    let same_identity = || match relation.replica_identity {
        ReplicaIdentity::Default | ReplicaIdentity::Index => {
            relation.columns.iter().enumerate().all(|(at, column)| column.identity == table.key.contains(&at))
        }
        ReplicaIdentity::Full | ReplicaIdentity::Nothing => true,
    };
    table.schema == relation.schema
        && table.name == relation.name
        && table.replica_identity == relation.replica_identity
        && table.columns.len() == relation.columns.len()
        && table.columns.iter().zip(&relation.columns).all(same_column)
        && same_identity()
}

/// Puts a table together.
pub fn table(relation: &Relation, known: Known<'_>, types: &BTreeMap<Oid, ColumnType>) -> Table {
    let Known { now, before, behind } = known;
    let named = |name: &str, table: Option<&Table>| -> Option<Column> {
        table?.columns.iter().find(|column| column.name == name).cloned()
    };
    let columns: Vec<Column> = relation
        .columns
        .iter()
        .enumerate()
        .map(|(at, wal)| {
            let catalog = named(&wal.name, now);
            let earlier = named(&wal.name, before);
            let same_type = earlier.as_ref().map(|column| &column.column_type).filter(|of| of.oid == wal.type_oid);
            let found = types.get(&wal.type_oid).filter(|found| found.name != "unknown");
            let column_type = if behind { same_type.or(found) } else { found.or(same_type) };
            let column_type = column_type.cloned().unwrap_or_else(|| unknown_type(wal.type_oid));
            let told = match behind {
                true => earlier.or(catalog).or_else(|| renamed(relation, at, before).cloned()),
                false => catalog.or(earlier),
            };
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
    let key = key(relation, &columns, known);
    Table {
        oid: relation.oid,
        schema: relation.schema.clone(),
        name: relation.name.clone(),
        replica_identity: relation.replica_identity,
        columns,
        key,
    }
}

/// The column that bore another name before, and whose name was changed again since: a renamed column keeps its place
/// and its type.
fn renamed<'t>(relation: &Relation, at: usize, before: Option<&'t Table>) -> Option<&'t Column> {
    let before = before.filter(|table| table.columns.len() == relation.columns.len())?;
    let column = before.columns.get(at)?;
    let gone = relation.columns.iter().all(|wal| wal.name != column.name);
    (gone && column.column_type.oid == relation.columns.get(at)?.type_oid).then_some(column)
}

/// Whether a default of one type is one of the other, too: the type may have been changed since (`int` to `bigint`).
fn is_same_kind(one: Oid, other: Oid) -> bool {
    let integer = |oid: Oid| matches!(oid.0, 20 | 21 | 23);
    one == other || (integer(one) && integer(other))
}

/// The key's columns in the order of its index, as far as the index is known to be the one of the WAL.
fn key(relation: &Relation, columns: &[Column], known: Known<'_>) -> Vec<usize> {
    let place = |name: &str| columns.iter().position(|column| column.name == name);
    let ordered = |table: &Table| -> Option<Vec<usize>> {
        table.key.iter().map(|at| place(&table.columns.get(*at)?.name)).collect()
    };
    let flagged: Vec<usize> =
        relation.columns.iter().enumerate().filter(|(_, column)| column.identity).map(|(at, _)| at).collect();
    let tables = if known.behind { [known.before, known.now] } else { [known.now, known.before] };
    let tables = tables.into_iter().flatten();
    match relation.replica_identity {
        // The WAL says which columns, but not in which order.
        ReplicaIdentity::Default | ReplicaIdentity::Index => tables
            .filter_map(ordered)
            .find(|key| {
                let mut sorted = key.clone();
                sorted.sort_unstable();
                sorted == flagged
            })
            .unwrap_or(flagged),
        // Nothing in the WAL tells the primary key.
        ReplicaIdentity::Full | ReplicaIdentity::Nothing => {
            tables.filter_map(ordered).find(|key| !key.is_empty()).unwrap_or_default()
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
        let relation = wal(&[("id", true), ("gone", false)]);
        let nullable = |known| -> Vec<bool> {
            table(&relation, known, &types).columns.iter().map(|column| column.nullable).collect()
        };
        let known_now = Known { now: Some(&now), ..Known::default() };
        assert_eq!(nullable(known_now), [false, true]);
        let before = known(vec![column("id", false), column("gone", false)], vec![0]);
        assert_eq!(nullable(Known { before: Some(&before), ..known_now }), [false, false]);
        assert!(matches(&before, &relation) && !matches(&now, &relation));
        assert!(!matches(&before, &wal(&[("id", true), ("gone", true)])), "another identity");
    }

    #[test]
    fn rows_of_a_backlog_are_taken_for_what_the_table_was() {
        let now = known(vec![column("id", true), column("last", true)], vec![0]);
        let before = known(vec![column("id", false), column("first", false)], vec![0]);
        let types = BTreeMap::from([(Oid(23), int4())]);
        let nullable = |second: &str, behind: bool| -> Vec<bool> {
            let known = Known { now: Some(&now), before: Some(&before), behind };
            let table = table(&wal(&[("id", true), (second, false)]), known, &types);
            table.columns.iter().map(|column| column.nullable).collect()
        };
        assert_eq!(nullable("first", true), [false, false]);
        assert_eq!(nullable("last", true), [false, true], "a name that the catalog has is the catalog's");
        assert_eq!(nullable("second", true), [false, false], "renamed twice");
        assert_eq!(nullable("last", false), [true, true]);
    }

    #[test]
    fn the_keys_order_is_the_indexs_unless_the_index_is_another_one() {
        let now = known(vec![column("a", false), column("b", false)], vec![1, 0]);
        let types = BTreeMap::from([(Oid(23), int4())]);
        let known = Known { now: Some(&now), ..Known::default() };
        assert_eq!(table(&wal(&[("a", true), ("b", true)]), known, &types).key, [1, 0]);
        assert_eq!(table(&wal(&[("a", true), ("b", false)]), known, &types).key, [0]);
    }
}
