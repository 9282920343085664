//! The schema `tidegate` and its versions, made under an advisory lock so that workers may start together.
//!
//! A role that may only use what is there gets by when the tables are there already; when they are not, the
//! error carries the SQL for a DBA.

use std::time::Duration;

use deadpool_postgres::GenericClient;

use super::{Datastore, DatastoreError, DatastoreErrorKind};
use crate::event::OWN_SCHEMA;

/// Versions in order; a version once released never changes.
const VERSIONS: &[(i32, &str)] = &[(1, include_str!("schema.sql"))];
/// Key of the advisory lock: "tidegate" in ASCII.
const LOCK: i64 = 0x7469_6465_6761_7465;

/// What only a DBA can do.
#[derive(Clone, Debug)]
pub struct Missing {
    pub problem: String,
    /// To be run by a superuser or the database's owner, in order.
    pub sql: Vec<String>,
}

/// The whole of what `migrate` does, for a role that may not: statements for a DBA.
pub fn setup_sql(role: &str) -> Vec<String> {
    let role = format!("\"{}\"", role.replace('"', "\"\""));
    vec![
        format!("CREATE SCHEMA IF NOT EXISTS {OWN_SCHEMA};"),
        format!("GRANT USAGE, CREATE ON SCHEMA {OWN_SCHEMA} TO {role};"),
    ]
}

pub(super) async fn migrate(datastore: &Datastore) -> Result<(), DatastoreError> {
    for attempt in 0.. {
        match try_migrate(datastore).await {
            // Another worker held the lock, or an old server raced on the catalog.
            Err(error) if error.kind == DatastoreErrorKind::Conflict && attempt < 5 => {
                tokio::time::sleep(Duration::from_millis(200 << attempt)).await;
            }
            other => return other,
        }
    }
    Ok(())
}

async fn try_migrate(datastore: &Datastore) -> Result<(), DatastoreError> {
    let mut client = datastore.client().await?;
    let transaction = client.transaction().await?;
    make(&transaction, &datastore.settings().place()).await?;
    transaction.commit().await?;
    Ok(())
}

/// Whether the schema is there, in its newest version.
pub(super) async fn is_whole<C: GenericClient>(client: &C) -> Result<bool, DatastoreError> {
    Ok(look(client).await?.version == newest())
}

/// Makes what is missing, within the transaction that `client` is in; `place` is for errors.
pub(super) async fn make<C: GenericClient>(transaction: &C, place: &str) -> Result<(), DatastoreError> {
    transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK]).await?;
    let state = look(transaction).await?;
    if state.version == newest() {
        return Ok(());
    }
    if let Some(missing) = what_is_missing(&state) {
        return Err(DatastoreError::setup(format!(
            "datastore {place}: {}; hint: have a DBA run:\n  {}",
            missing.problem,
            missing.sql.join("\n  ")
        )));
    }
    if !state.schema {
        transaction.batch_execute(&format!("CREATE SCHEMA {OWN_SCHEMA}")).await?;
    }
    if !state.migrations {
        transaction
            .batch_execute(
                "CREATE TABLE tidegate.migrations (version int PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())",
            )
            .await?;
    }
    for (version, sql) in VERSIONS.iter().filter(|(version, _)| *version > state.version) {
        transaction.batch_execute(sql).await.map_err(|error| {
            DatastoreError::from(error).context(format!("version {version} of schema {OWN_SCHEMA}"))
        })?;
        transaction.execute("INSERT INTO tidegate.migrations (version) VALUES ($1)", &[version]).await?;
    }
    Ok(())
}

pub(super) async fn missing(datastore: &Datastore) -> Result<Option<Missing>, DatastoreError> {
    let state = look(&datastore.client().await?).await?;
    Ok(if state.version == newest() { None } else { what_is_missing(&state) })
}

struct State {
    role: String,
    schema: bool,
    migrations: bool,
    version: i32,
    may_create_schema: bool,
    may_create_tables: bool,
}

fn newest() -> i32 {
    VERSIONS.last().map_or(0, |(version, _)| *version)
}

async fn look<C: GenericClient>(transaction: &C) -> Result<State, DatastoreError> {
    let row = transaction
        .query_one(
            "SELECT current_user::text, n.oid IS NOT NULL, to_regclass('tidegate.migrations') IS NOT NULL, \
                    has_database_privilege(current_database(), 'CREATE'), \
                    coalesce(has_schema_privilege(n.oid, 'CREATE') AND has_schema_privilege(n.oid, 'USAGE'), false) \
             FROM (SELECT 1) one LEFT JOIN pg_namespace n ON n.nspname = 'tidegate'",
            &[],
        )
        .await?;
    let migrations: bool = row.get(2);
    let version = if migrations {
        let row = transaction.query_one("SELECT coalesce(max(version), 0) FROM tidegate.migrations", &[]).await?;
        row.get(0)
    } else {
        0
    };
    if version > newest() {
        return Err(DatastoreError::setup(format!(
            "schema {OWN_SCHEMA} is of version {version}, made by a newer tidegate; this one knows {}",
            newest()
        )));
    }
    Ok(State {
        role: row.get(0),
        schema: row.get(1),
        migrations,
        version,
        may_create_schema: row.get(3),
        may_create_tables: row.get(4),
    })
}

fn what_is_missing(state: &State) -> Option<Missing> {
    let problem = if state.schema {
        (!state.may_create_tables).then(|| format!("role {} may not create tables in schema {OWN_SCHEMA}", state.role))
    } else {
        (!state.may_create_schema)
            .then(|| format!("schema {OWN_SCHEMA} is not there and role {} may not create it", state.role))
    };
    problem.map(|problem| Missing { problem, sql: setup_sql(&state.role) })
}
