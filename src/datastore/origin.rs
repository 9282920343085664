//! The tag that says whose data a transaction carries (CORRECTNESS 22).

use deadpool_postgres::GenericClient;

use super::DatastoreError;
use crate::event::{ORIGIN_MESSAGE_PREFIX, Origin};

/// Tags the transaction; to be its first statement. Needs no grant.
pub async fn tag<C: GenericClient>(transaction: &C, origin: &Origin) -> Result<(), DatastoreError> {
    let content = serde_json::to_string(origin).map_err(|error| DatastoreError::rejected(error.to_string()))?;
    let statement =
        transaction.prepare_cached("SELECT pg_logical_emit_message(true, $1::text, $2::text)::text").await?;
    transaction.execute(&statement, &[&ORIGIN_MESSAGE_PREFIX, &content]).await?;
    Ok(())
}
