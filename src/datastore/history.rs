//! Whether this datastore is the one that it was: a restored or promoted one may lack links of what was made since.
//!
//! The invariant: what is remembered is of the database that remembers it; a difference is noted once, with the LSN that
//! everything committed before it is below.

use deadpool_postgres::GenericClient;

use super::DatastoreError;
use crate::event::Lsn;

/// The LSN at which the datastore was last found to be another than before: its cluster, its timeline, or the table of
/// links itself is new. `None` where that never was.
pub async fn restored_at<C: GenericClient>(client: &C) -> Result<Option<Lsn>, DatastoreError> {
    let row = client
        .query_one(
            "INSERT INTO tidegate.history AS h (cluster, timeline, links) \
             SELECT CASE WHEN has_function_privilege('pg_control_system()', 'EXECUTE') \
                         THEN (SELECT system_identifier::text FROM pg_control_system()) ELSE '' END, \
                    left(pg_walfile_name(pg_current_wal_lsn()), 8), 'tidegate.links'::regclass::oid::bigint \
             ON CONFLICT (one) DO UPDATE SET cluster = excluded.cluster, timeline = excluded.timeline, \
                 links = excluded.links, \
                 restored_lsn = CASE WHEN (h.cluster, h.timeline, h.links) \
                     IS DISTINCT FROM (excluded.cluster, excluded.timeline, excluded.links) \
                     THEN pg_current_wal_lsn() ELSE h.restored_lsn END \
             RETURNING (restored_lsn - '0/0'::pg_lsn)::bigint",
            &[],
        )
        .await?;
    Ok(row.get::<_, Option<i64>>(0).map(|lsn| Lsn(lsn as u64)))
}
