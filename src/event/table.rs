//! What a captured table looks like at some LSN, and one row of it as PostgreSQL sent it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Oid;

/// A table as it was when its rows were written. Built from the catalog and kept by LSN, since the catalog may
/// be newer than the WAL (CORRECTNESS 7).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    pub oid: Oid,
    pub schema: String,
    pub name: String,
    pub replica_identity: ReplicaIdentity,
    /// In attribute order, dropped columns left out; the order of pgoutput's tuples.
    pub columns: Vec<Column>,
    /// Indices into `columns` of the key, in the index's order; empty for a table without a key. The primary
    /// key, or the columns of the index of `REPLICA IDENTITY USING INDEX`.
    pub key: Vec<usize>,
}

impl Table {
    /// Leaves out the columns that are not among `names`; a key without one of its columns is none.
    pub fn keep_columns(&mut self, names: &[String]) {
        let key: Vec<String> = self.key.iter().filter_map(|at| Some(self.columns.get(*at)?.name.clone())).collect();
        self.columns.retain(|column| names.contains(&column.name));
        let place = |name: &String| self.columns.iter().position(|column| column.name == *name);
        self.key = key.iter().map(place).collect::<Option<_>>().unwrap_or_default();
    }

    /// `schema.table`
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaIdentity {
    Default,
    Nothing,
    Full,
    Index,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    pub name: String,
    pub column_type: ColumnType,
    /// `atttypmod`; -1 where the type has no modifier.
    pub type_modifier: i32,
    pub nullable: bool,
    /// The default as `pg_get_expr` shows it (`'dflt'::text`, `nextval('…'::regclass)`).
    pub default_expression: Option<String>,
    /// `GENERATED ALWAYS AS (…) STORED`: absent from the stream before PostgreSQL 18, present in a snapshot.
    pub generated: bool,
}

/// A type, resolved as far as its kind asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ColumnType {
    pub oid: Oid,
    pub schema: String,
    /// `typname`: `int4`, `numeric`, `_text`, `mood`.
    pub name: String,
    pub kind: TypeKind,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TypeKind {
    Base,
    Enum {
        labels: Vec<String>,
    },
    Array {
        element: Box<ColumnType>,
    },
    /// `type_modifier` is the domain's own, -1 where it has none.
    Domain {
        base: Box<ColumnType>,
        type_modifier: i32,
    },
    Range,
    Multirange,
    Composite,
}

/// One column of one row, as PostgreSQL's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell<'a> {
    Null,
    /// An unchanged TOAST value: not sent.
    Unchanged,
    Text(&'a [u8]),
}

/// A table that many batches share.
pub type SharedTable = Arc<Table>;
