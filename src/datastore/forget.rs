//! What is kept of a connector that is no more: its cursor, records held back for it, its parked records.
//!
//! The invariant: nothing of a pull that another worker runs is touched.

use deadpool_postgres::GenericClient;

use super::{DatastoreError, has_parked};

/// Removes all of it; says how many records were parked. An error where another worker has the pull.
pub async fn forget_connector<C: GenericClient>(client: &C, connector: &str) -> Result<u64, DatastoreError> {
    // Captures alone never make the tables.
    if !has_parked(client).await? {
        return Ok(0);
    }
    // One statement: all of it or nothing, and only where nobody has the lease.
    let row = client
        .query_one(
            "WITH held AS (SELECT FROM tidegate.leases WHERE name = 'pull/' || $1::text AND expires_at > now()), \
                  cursor AS (DELETE FROM tidegate.cursors WHERE connector = $1 AND NOT EXISTS (SELECT FROM held)), \
                  aside AS (DELETE FROM tidegate.held WHERE connector = $1 AND NOT EXISTS (SELECT FROM held)), \
                  parked AS (DELETE FROM tidegate.parked WHERE connector = $1 AND NOT EXISTS (SELECT FROM held) \
                             RETURNING connector) \
             SELECT EXISTS (SELECT FROM held), (SELECT count(*) FROM parked)",
            &[&connector],
        )
        .await?;
    if row.get(0) {
        return Err(DatastoreError::rejected(format!(
            "another worker runs '{connector}', or did so seconds ago; hint: remove its file there, too"
        )));
    }
    Ok(row.get::<_, i64>(1).max(0) as u64)
}
