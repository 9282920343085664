//! Tables and types as the catalog has them now, which may be newer than the WAL: see [`super::relation`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::event::{Column, ColumnType, Oid, ReplicaIdentity, Table, TypeKind};

use super::pgoutput::replica_identity;
use super::{PostgresError, Session};

const DEADLINE: Duration = Duration::from_secs(30);

/// A table or partitioned table.
#[derive(Clone, Debug, PartialEq)]
pub struct CatalogTable {
    pub oid: Oid,
    pub schema: String,
    pub name: String,
    /// Holds no rows itself; its partitions do.
    pub partitioned: bool,
    /// Partitioned tables that it is a part of, nearest first.
    pub ancestors: Vec<(String, String)>,
    pub replica_identity: ReplicaIdentity,
    pub has_primary_key: bool,
    /// The planner's guess at its rows.
    pub estimated_rows: u64,
    pub readable: bool,
    /// Policies hide some of its rows from the present role (row-level security).
    pub rows_hidden: bool,
    /// Owned by the present role, directly or through a role it is in.
    pub owned: bool,
}

impl CatalogTable {
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    /// Whether updates and deletes can be published; where not, PostgreSQL refuses them to the application.
    pub fn has_identity(&self) -> bool {
        match self.replica_identity {
            ReplicaIdentity::Default => self.has_primary_key,
            ReplicaIdentity::Nothing => false,
            ReplicaIdentity::Full | ReplicaIdentity::Index => true,
        }
    }
}

fn text(row: &[Option<String>], at: usize) -> &str {
    row.get(at).and_then(Option::as_deref).unwrap_or_default()
}

fn number<T: std::str::FromStr>(row: &[Option<String>], at: usize) -> Result<T, PostgresError> {
    text(row, at).parse().map_err(|_| PostgresError::Protocol(format!("the catalog says '{}'", text(row, at))))
}

fn is_true(row: &[Option<String>], at: usize) -> bool {
    text(row, at) == "t"
}

/// All permanent tables outside the system's schemas, by name.
pub async fn tables(session: &mut Session) -> Result<Vec<CatalogTable>, PostgresError> {
    let rows = session
        .query(
            "SELECT c.oid, n.nspname, c.relname, c.relkind = 'p', c.relreplident, \
             EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary), \
             greatest(c.reltuples, 0)::bigint, \
             has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'), \
             pg_has_role(c.relowner, 'USAGE'), row_security_active(c.oid) \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND n.nspname !~ '^pg_' \
             AND n.nspname <> 'information_schema' ORDER BY 2, 3",
            DEADLINE,
        )
        .await?;
    let mut tables = Vec::with_capacity(rows.len());
    for row in &rows {
        tables.push(CatalogTable {
            oid: Oid(number(row, 0)?),
            schema: text(row, 1).to_owned(),
            name: text(row, 2).to_owned(),
            partitioned: is_true(row, 3),
            ancestors: Vec::new(),
            replica_identity: replica_identity(text(row, 4).bytes().next().unwrap_or_default())?,
            has_primary_key: is_true(row, 5),
            estimated_rows: number(row, 6)?,
            readable: is_true(row, 7),
            owned: is_true(row, 8),
            rows_hidden: is_true(row, 9),
        });
    }
    let parents = session
        .query(
            "SELECT h.inhrelid, h.inhparent FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid \
             WHERE c.relispartition",
            DEADLINE,
        )
        .await?;
    let mut parent_of = BTreeMap::new();
    for row in &parents {
        parent_of.insert(Oid(number(row, 0)?), Oid(number(row, 1)?));
    }
    let names: BTreeMap<Oid, (String, String)> =
        tables.iter().map(|table| (table.oid, (table.schema.clone(), table.name.clone()))).collect();
    for table in &mut tables {
        let mut at = table.oid;
        while let Some(parent) = parent_of.get(&at) {
            table.ancestors.extend(names.get(parent).cloned());
            at = *parent;
        }
    }
    Ok(tables)
}

fn list(oids: impl IntoIterator<Item = Oid>) -> String {
    let oids: Vec<String> = oids.into_iter().map(|oid| oid.to_string()).collect();
    format!("'{{{}}}'::oid[]", oids.join(","))
}

/// The tables that are still there, in the shape they have now. Generated columns are left out where the stream
/// has none (`generated`: whether it has), so that snapshot and stream agree.
pub async fn load_tables(
    session: &mut Session,
    oids: &[Oid],
    generated: bool,
) -> Result<BTreeMap<Oid, Table>, PostgresError> {
    if oids.is_empty() {
        return Ok(BTreeMap::new());
    }
    let wanted = list(oids.iter().copied());
    let rows = session
        .query(
            &format!(
                "SELECT c.oid, n.nspname, c.relname, c.relreplident FROM pg_class c \
                 JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY({wanted})"
            ),
            DEADLINE,
        )
        .await?;
    let mut tables = BTreeMap::new();
    for row in &rows {
        let table = Table {
            oid: Oid(number(row, 0)?),
            schema: text(row, 1).to_owned(),
            name: text(row, 2).to_owned(),
            replica_identity: replica_identity(text(row, 3).bytes().next().unwrap_or_default())?,
            columns: Vec::new(),
            key: Vec::new(),
        };
        tables.insert(table.oid, table);
    }
    let kept = if generated { "a.attgenerated <> 'v'" } else { "a.attgenerated = ''" };
    let columns = session
        .query(
            &format!(
                "SELECT a.attrelid, a.attname, a.atttypid, a.atttypmod, a.attnotnull, \
                 CASE WHEN a.attgenerated = '' THEN pg_get_expr(d.adbin, d.adrelid) END \
                 FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
                 WHERE a.attrelid = ANY({wanted}) AND a.attnum > 0 AND NOT a.attisdropped AND {kept} \
                 ORDER BY a.attrelid, a.attnum"
            ),
            DEADLINE,
        )
        .await?;
    let mut type_oids = BTreeSet::new();
    for row in &columns {
        type_oids.insert(Oid(number(row, 2)?));
    }
    let types = load_types(session, type_oids).await?;
    for row in &columns {
        let Some(table) = tables.get_mut(&Oid(number(row, 0)?)) else { continue };
        let type_oid = Oid(number(row, 2)?);
        table.columns.push(Column {
            name: text(row, 1).to_owned(),
            column_type: types.get(&type_oid).cloned().unwrap_or_else(|| unknown_type(type_oid)),
            type_modifier: number(row, 3)?,
            nullable: !is_true(row, 4),
            default_expression: row.get(5).cloned().flatten(),
            generated: false,
        });
    }
    let keys = session
        .query(
            &format!(
                "SELECT i.indrelid, a.attname, i.indisprimary FROM pg_index i \
                 JOIN pg_class c ON c.oid = i.indrelid \
                 CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, at) \
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum \
                 WHERE i.indrelid = ANY({wanted}) AND k.at <= i.indnkeyatts AND i.indisvalid \
                 AND CASE WHEN c.relreplident = 'i' THEN i.indisreplident ELSE i.indisprimary END \
                 ORDER BY i.indrelid, k.at"
            ),
            DEADLINE,
        )
        .await?;
    for row in &keys {
        let Some(table) = tables.get_mut(&Oid(number(row, 0)?)) else { continue };
        let at = table.columns.iter().position(|column| column.name == text(row, 1));
        table.key.extend(at);
    }
    Ok(tables)
}

/// A type that the catalog no longer has: its values are text.
pub fn unknown_type(oid: Oid) -> ColumnType {
    ColumnType { oid, schema: "pg_catalog".into(), name: "unknown".into(), kind: TypeKind::Base }
}

struct TypeRow {
    schema: String,
    name: String,
    kind: u8,
    base: Oid,
    modifier: i32,
    element: Option<Oid>,
}

/// Types with all that they are made of.
pub async fn load_types(
    session: &mut Session,
    oids: BTreeSet<Oid>,
) -> Result<BTreeMap<Oid, ColumnType>, PostgresError> {
    let mut known: BTreeMap<Oid, TypeRow> = BTreeMap::new();
    let mut missing = oids.clone();
    // Domains over arrays over domains …: each round resolves one level.
    while !missing.is_empty() {
        let rows = session
            .query(
                &format!(
                    "SELECT t.oid, n.nspname, t.typname, t.typtype, t.typbasetype, t.typtypmod, \
                     CASE WHEN t.typinput = 'pg_catalog.array_in'::regproc THEN t.typelem ELSE 0 END \
                     FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.oid = ANY({})",
                    list(missing.iter().copied())
                ),
                DEADLINE,
            )
            .await?;
        let mut next = BTreeSet::new();
        for row in &rows {
            let found = TypeRow {
                schema: text(row, 1).to_owned(),
                name: text(row, 2).to_owned(),
                kind: text(row, 3).bytes().next().unwrap_or_default(),
                base: Oid(number(row, 4)?),
                modifier: number(row, 5)?,
                element: Some(Oid(number(row, 6)?)).filter(|oid| oid.0 != 0),
            };
            next.extend(found.element);
            if found.kind == b'd' {
                next.insert(found.base);
            }
            known.insert(Oid(number(row, 0)?), found);
        }
        missing = next.into_iter().filter(|oid| !known.contains_key(oid)).collect();
    }
    let enums: Vec<Oid> = known.iter().filter(|(_, row)| row.kind == b'e').map(|(oid, _)| *oid).collect();
    let mut labels: BTreeMap<Oid, Vec<String>> = BTreeMap::new();
    if !enums.is_empty() {
        let rows = session
            .query(
                &format!(
                    "SELECT enumtypid, enumlabel FROM pg_enum WHERE enumtypid = ANY({}) ORDER BY 1, enumsortorder",
                    list(enums)
                ),
                DEADLINE,
            )
            .await?;
        for row in &rows {
            labels.entry(Oid(number(row, 0)?)).or_default().push(text(row, 1).to_owned());
        }
    }
    Ok(oids.into_iter().map(|oid| (oid, resolve(oid, &known, &labels, 0))).collect())
}

fn resolve(oid: Oid, known: &BTreeMap<Oid, TypeRow>, labels: &BTreeMap<Oid, Vec<String>>, depth: u32) -> ColumnType {
    let Some(row) = known.get(&oid).filter(|_| depth < 32) else { return unknown_type(oid) };
    let inner = |oid| Box::new(resolve(oid, known, labels, depth + 1));
    let kind = match (row.kind, row.element) {
        (b'e', _) => TypeKind::Enum { labels: labels.get(&oid).cloned().unwrap_or_default() },
        (b'd', _) => TypeKind::Domain { base: inner(row.base), type_modifier: row.modifier },
        (b'r', _) => TypeKind::Range,
        (b'm', _) => TypeKind::Multirange,
        (b'c', _) => TypeKind::Composite,
        (_, Some(element)) => TypeKind::Array { element: inner(element) },
        _ => TypeKind::Base,
    };
    ColumnType { oid, schema: row.schema.clone(), name: row.name.clone(), kind }
}

/// What the server and the role are like, for checks before anything is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFacts {
    /// `server_version_num`: 150004.
    pub version: u32,
    pub wal_level: String,
    pub may_replicate: bool,
    pub may_create_publications: bool,
    pub superuser: bool,
    pub user: String,
    pub database: String,
    pub max_slots: u32,
    pub slots: u32,
    pub max_senders: u32,
}

pub async fn server_facts(session: &mut Session) -> Result<ServerFacts, PostgresError> {
    let rows = session
        .query(
            "SELECT current_setting('server_version_num'), current_setting('wal_level'), \
             r.rolreplication OR r.rolsuper, \
             has_database_privilege(current_database(), 'CREATE'), r.rolsuper, current_user, current_database(), \
             current_setting('max_replication_slots'), (SELECT count(*) FROM pg_replication_slots), \
             current_setting('max_wal_senders') FROM pg_roles r WHERE r.rolname = current_user",
            DEADLINE,
        )
        .await?;
    let row = rows.first().ok_or_else(|| PostgresError::Protocol("the catalog does not know the role".into()))?;
    Ok(ServerFacts {
        version: number(row, 0)?,
        wal_level: text(row, 1).to_owned(),
        may_replicate: is_true(row, 2),
        may_create_publications: is_true(row, 3),
        superuser: is_true(row, 4),
        user: text(row, 5).to_owned(),
        database: text(row, 6).to_owned(),
        max_slots: number(row, 7)?,
        slots: number(row, 8)?,
        max_senders: number(row, 9)?,
    })
}

/// The settings that must be other than they are, in words.
impl ServerFacts {
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.version < 140_000 {
            problems.push(format!("PostgreSQL {} is too old: 14 or newer is needed", self.version / 10_000));
        }
        if self.wal_level != "logical" {
            problems.push(format!("wal_level is '{}', it must be 'logical' (needs a restart)", self.wal_level));
        }
        if !self.may_replicate {
            problems.push(format!("role '{}' may not replicate", self.user));
        }
        problems
    }

    pub fn dba_sql(&self) -> Vec<String> {
        let mut sql = Vec::new();
        if self.wal_level != "logical" {
            sql.push("ALTER SYSTEM SET wal_level = 'logical'; -- then restart the server".to_owned());
        }
        if !self.may_replicate {
            sql.push(format!("ALTER ROLE {} REPLICATION;", super::identifier(&self.user)));
        }
        sql
    }
}

/// File of each table as a snapshot sees it (`seen`) or now: they differ when the table was rewritten since
/// (CORRECTNESS 3).
pub async fn file_nodes(session: &mut Session, oids: &[Oid]) -> Result<BTreeMap<Oid, (u32, u32)>, PostgresError> {
    let rows = session
        .query(
            &format!(
                "SELECT oid, relfilenode, coalesce(pg_relation_filenode(oid), 0) FROM pg_class \
                 WHERE oid = ANY({})",
                list(oids.iter().copied())
            ),
            DEADLINE,
        )
        .await?;
    let mut nodes = BTreeMap::new();
    for row in &rows {
        nodes.insert(Oid(number(row, 0)?), (number(row, 1)?, number(row, 2)?));
    }
    Ok(nodes)
}

/// A transaction on it lasts as long as it takes, whatever the role's `transaction_timeout` (PostgreSQL 17).
pub async fn lift_transaction_timeout(session: &mut Session) -> Result<(), PostgresError> {
    // Nothing of a table or view: it is asked on the stream's connection, too.
    let sql = "SELECT set_config('transaction_timeout', '0', false) \
               WHERE current_setting('server_version_num')::int >= 170000";
    session.query(sql, DEADLINE).await.map(drop)
}
