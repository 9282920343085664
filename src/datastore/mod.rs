//! All that Tidegate keeps in the datastore itself, in the schema `tidegate`: links, parked records, cursors, leases.
//!
//! Functions take a client or a transaction of the caller, so that what belongs together commits together. The
//! invariants: a link is unique both ways within its (system, object); what is parked or held is durable before
//! whatever it came from is acknowledged; a cursor, a lease and an intent only move for the one who holds them.

mod cursors;
mod error;
mod forget;
mod grants;
mod history;
mod leases;
mod links;
mod migrations;
mod origin;
mod pages;
mod parked;
mod rows;
mod settings;
mod tls;
mod visible;

use std::time::Duration;

use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};

pub use cursors::{
    Aside, Cursor, Held, Hold, Listed, drop_held, drop_unlisted, held, hold, ids_aside, listing_begins, load_cursor,
    put_aside, save_cursor,
};
pub use deadpool_postgres::{Client, GenericClient, Transaction};
pub use error::{DatastoreError, DatastoreErrorKind};
pub use forget::forget_connector;
pub use grants::missing_grants;
pub use history::restored_at;
pub use leases::{
    Lease, acquire_lease, holds_lease, is_anothers_lease, lease_owner_alive, release_leases, renew_leases, seize_lease,
};
pub use links::{
    Intent, Link, LinkKey, delete_link, find_link, forget_versions, link_by_external, lock_link, next_push_seq,
    push_seq_now, rekey_link, root_of_line, save_lines, save_link,
};
pub use migrations::{Missing, setup_sql};
pub use origin::tag;
pub use pages::{
    Access, ColumnFacts, PageLinks, PageRows, columns_of, id_text, insert_row, links_of_page, open_create,
    rows_of_page, rows_that_match, update_row,
};
pub use parked::{
    BEHIND, Command, NewParked, Owned, Parked, ParkedKind, ParkedSummary, Room, command_parked, has_parked, has_queue,
    heal, list_parked, owe, park, park_behind, parked_counts, parked_queue, parked_ready, show_parked, unpark,
};
pub use rows::{
    Lines, TableName, TableNameError, normalize_rows, primary_key, query_document, read_document, read_row,
};
pub use settings::{DatastoreSettings, SslMode, connect};
pub use visible::running_transactions;

/// How long a caller waits for a connection of the pool, a new one included.
const POOL_WAIT: Duration = Duration::from_secs(15);
/// What every session of the pool starts with: deadlines on the server's side, and texts that do not depend on
/// the server's settings.
const SESSION: &str = "SET statement_timeout = '60s'; SET lock_timeout = '10s'; \
    SET idle_in_transaction_session_timeout = '120s'; SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; \
    SET IntervalStyle = 'postgres'; SET bytea_output = 'hex'; SET application_name = 'tidegate'";

/// A handle on the datastore with a bounded pool of connections; cheap to clone.
#[derive(Clone)]
pub struct Datastore {
    pool: Pool,
    settings: DatastoreSettings,
}

impl std::fmt::Debug for Datastore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Datastore").field(&self.settings).finish()
    }
}

impl Datastore {
    /// This datastore, for looking only: where the schema `tidegate` is not there yet, as if it were. It is then one
    /// connection in a transaction that made the schema and is never committed, so hold one client at a time.
    pub async fn for_looking(&self) -> Result<Self, DatastoreError> {
        if migrations::is_whole(&self.client().await?).await? {
            return Ok(self.clone());
        }
        let mut settings = self.settings.clone();
        settings.pool_size = 1;
        let trial = Datastore::open(&settings)?;
        let client = trial.client().await?;
        client.batch_execute("BEGIN").await?;
        migrations::make(&client, &self.settings.place()).await?;
        Ok(trial)
    }

    /// Makes the pool; connects only when a client is asked for.
    pub fn open(settings: &DatastoreSettings) -> Result<Self, DatastoreError> {
        let mut config = settings.config();
        // An address may lead to a standby, until a failover has moved it: nothing that is read there is of use.
        config.target_session_attrs(tokio_postgres::config::TargetSessionAttrs::ReadWrite);
        let manager = Manager::from_config(
            config,
            tls::connector(settings)?,
            ManagerConfig { recycling_method: RecyclingMethod::Fast },
        );
        let pool = Pool::builder(manager)
            .max_size(settings.pool_size)
            .runtime(Runtime::Tokio1)
            .timeouts(deadpool_postgres::Timeouts {
                wait: Some(POOL_WAIT),
                create: Some(POOL_WAIT),
                recycle: Some(Duration::from_secs(5)),
            })
            // One that a server which stands by, or DDL, has spoilt is closed, and a new one made.
            .pre_recycle(Hook::sync_fn(|_, metrics| match error::is_trusted(metrics.created) {
                true => Ok(()),
                false => Err(HookError::message("an earlier session was at fault")),
            }))
            .post_create(Hook::async_fn(|client, _| {
                Box::pin(async move { client.batch_execute(SESSION).await.map_err(HookError::Backend) })
            }))
            .build()
            .map_err(|error| DatastoreError::setup(format!("the datastore's pool can't be made: {error}")))?;
        Ok(Datastore { pool, settings: settings.clone() })
    }

    /// A client of the pool, within 15 seconds.
    pub async fn client(&self) -> Result<Client, DatastoreError> {
        self.pool.get().await.map_err(|error| DatastoreError::from_pool(error, &self.settings))
    }

    pub fn settings(&self) -> &DatastoreSettings {
        &self.settings
    }

    /// Creates or completes the schema `tidegate`. Several workers may do so at once.
    pub async fn migrate(&self) -> Result<(), DatastoreError> {
        migrations::migrate(self).await
    }

    /// What `migrate` would need that the role may not do; `None` when nothing is missing.
    pub async fn missing(&self) -> Result<Option<Missing>, DatastoreError> {
        migrations::missing(self).await
    }

    pub fn close(&self) {
        self.pool.close();
    }
}
