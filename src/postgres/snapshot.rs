//! Reading tables as they were at the slot's consistent point.
//!
//! The slot's creation exports a snapshot. A second connection takes it up in a REPEATABLE READ transaction, locks
//! every table in ACCESS SHARE, and only then compares each table's file under the snapshot with the present one: a
//! table rewritten in between would read as empty (CORRECTNESS 3). Where one differs, the snapshot is begun anew
//! with a new slot, which is exact; the locks, held until the last row is read, keep later rewrites out. The slot
//! comes before the locks, never after: creating a slot waits for running transactions, and one of those may wait
//! for a lock that we hold.

use std::time::Duration;

use bytes::BytesMut;

use crate::event::{Oid, Table};

use super::catalog::{file_nodes, lift_transaction_timeout, load_tables};
use super::publication::{self, Published};
use super::{PostgresError, Session, literal, qualified};

const DEADLINE: Duration = Duration::from_secs(60);

/// A transaction at a snapshot, with its tables locked.
pub struct SnapshotReader {
    session: Session,
    /// Time of the snapshot, microseconds since 1970.
    pub time_us: i64,
    /// The first transaction that the snapshot does not see.
    pub xid: u32,
}

/// The tables were rewritten between the slot and the locks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewritten(pub Vec<String>);

/// What `SET TRANSACTION SNAPSHOT` says of one whose exporter has ended: 22023 up to PostgreSQL 16, 42704 since, and 55000
/// where it ends just then (`ImportSnapshot` and `ProcArrayInstallImportedXmin` of the server).
fn gone(error: PostgresError) -> PostgresError {
    match error {
        PostgresError::Server(error) if matches!(error.code.as_str(), "22023" | "42704" | "55000") => {
            PostgresError::SnapshotGone(error)
        }
        other => other,
    }
}

impl SnapshotReader {
    /// Takes up `snapshot` and locks `tables`. `Err(Rewritten)` inside: begin anew.
    pub async fn open(
        mut session: Session,
        snapshot: &str,
        tables: &[(Oid, String, String)],
    ) -> Result<Result<Self, Rewritten>, PostgresError> {
        lift_transaction_timeout(&mut session).await?;
        session.query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", DEADLINE).await?;
        session.query(&format!("SET TRANSACTION SNAPSHOT {}", literal(snapshot)), DEADLINE).await.map_err(gone)?;
        session.query("SET LOCAL lock_timeout = '30s'; SET LOCAL statement_timeout = 0", DEADLINE).await?;
        session.query("SET LOCAL idle_in_transaction_session_timeout = 0", DEADLINE).await?;
        for (_, schema, name) in tables {
            let sql = format!("LOCK TABLE ONLY {} IN ACCESS SHARE MODE", qualified(schema, name));
            session.query(&sql, DEADLINE).await?;
        }
        let oids: Vec<Oid> = tables.iter().map(|(oid, ..)| *oid).collect();
        let nodes = file_nodes(&mut session, &oids).await?;
        let rewritten: Vec<String> = tables
            .iter()
            .filter(|(oid, ..)| nodes.get(oid).is_none_or(|(seen, now)| seen != now))
            .map(|(_, schema, name)| format!("{schema}.{name}"))
            .collect();
        if !rewritten.is_empty() {
            session.close().await;
            return Ok(Err(Rewritten(rewritten)));
        }
        let sql = "SELECT (extract(epoch FROM now()) * 1000000)::bigint, \
                   (pg_snapshot_xmax(pg_current_snapshot())::text::bigint % 4294967296)::bigint";
        let rows = session.query(sql, DEADLINE).await?;
        let number = |at: usize| rows.first().and_then(|row| row.get(at)?.as_deref()?.parse::<i64>().ok());
        let (time_us, xid) = (number(0).unwrap_or_default(), number(1).unwrap_or_default() as u32);
        Ok(Ok(SnapshotReader { session, time_us, xid }))
    }

    /// How much of each table is published. Asked under the snapshot: a column that came while the slot was made is in
    /// the rows, and would be left out of them by an older list.
    pub async fn published(&mut self, name: &str) -> Result<Vec<Published>, PostgresError> {
        Ok(publication::find(&mut self.session, name).await?.unwrap_or_default().tables)
    }

    /// The table's shape under the snapshot, with the columns that the stream will have, too.
    pub async fn table(
        &mut self,
        oid: Oid,
        generated: bool,
        published: Option<&Published>,
    ) -> Result<Option<Table>, PostgresError> {
        let mut table = load_tables(&mut self.session, &[oid], generated).await?.remove(&oid);
        if let (Some(table), Some(columns)) = (&mut table, published.and_then(|of| of.columns.as_ref())) {
            table.keep_columns(columns);
        }
        Ok(table)
    }

    /// Begins to read all rows, columns in the table's order; then [`SnapshotReader::rows`].
    pub async fn begin(
        &mut self,
        table: &Table,
        whole_tree: bool,
        published: Option<&Published>,
    ) -> Result<String, PostgresError> {
        let sql = copy_sql(table, whole_tree, published.and_then(|of| of.filter.as_deref()), None);
        self.session.copy_out(&sql).await?;
        Ok(sql)
    }

    /// Whole CopyData messages of many rows; `None` at the end.
    pub async fn rows(&mut self, sql: &str) -> Result<Option<BytesMut>, PostgresError> {
        self.session.copy_chunk(sql).await
    }

    pub async fn finish(mut self) -> Result<(), PostgresError> {
        self.session.query("COMMIT", DEADLINE).await?;
        self.session.close().await;
        Ok(())
    }
}

/// `whole_tree`: a partitioned table that stands for its partitions. `filter`: the publication's.
pub fn copy_sql(table: &Table, whole_tree: bool, filter: Option<&str>, limit: Option<usize>) -> String {
    let columns: Vec<String> = table.columns.iter().map(|column| super::identifier(&column.name)).collect();
    let only = if whole_tree { "" } else { "ONLY " };
    let filter = filter.map(|filter| format!(" WHERE ({filter})")).unwrap_or_default();
    let limit = limit.map(|rows| format!(" LIMIT {rows}")).unwrap_or_default();
    format!(
        "COPY (SELECT {} FROM {only}{}{filter}{limit}) TO STDOUT",
        columns.join(", "),
        qualified(&table.schema, &table.name)
    )
}
