//! Whether what the log tells of can be read already.
//!
//! A commit is in the WAL, and may be decoded, before the server lets other sessions see it: the committing session takes
//! itself off the list of running transactions only after the flush, and after the answer of a synchronous standby. Whoever
//! reads a row for an event of such a transaction reads it as it was before, and takes the event for one that changes
//! nothing. So the invariant: a row is read for an event when the event's transaction is not running any more.

use deadpool_postgres::GenericClient;
use tokio_postgres::error::SqlState;

use super::DatastoreError;

/// Those of `xids` (the low 32 bits, as events have them) whose transactions are running, as far as this server knows
/// them: what another server has numbered so is none of its own.
pub async fn running_transactions<C: GenericClient>(client: &C, xids: &[u32]) -> Result<Vec<u32>, DatastoreError> {
    let snapshot = client
        .prepare_cached(
            "SELECT pg_snapshot_xmin(s)::text::bigint, pg_snapshot_xmax(s)::text::bigint FROM pg_current_snapshot() s",
        )
        .await?;
    let row = client.query_one(&snapshot, &[]).await?;
    let (all_over_below, next): (i64, i64) = (row.get(0), row.get(1));
    let mut running = Vec::new();
    for xid in xids {
        let whole = whole_xid(*xid, next);
        if whole < all_over_below {
            continue;
        }
        let status = client.prepare_cached("SELECT pg_xact_status($1::text::xid8)").await?;
        match client.query_one(&status, &[&whole.to_string()]).await {
            Ok(row) if row.get::<_, Option<&str>>(0) == Some("in progress") => running.push(*xid),
            Ok(_) => {}
            // In the future: a server that was restored, or is not the one that was captured.
            Err(error) if error.code() == Some(&SqlState::INVALID_PARAMETER_VALUE) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(running)
}

/// The transaction nearest to `next` with these low bits.
fn whole_xid(xid: u32, next: i64) -> i64 {
    next + i64::from(xid.wrapping_sub(next as u32) as i32)
}

#[cfg(test)]
mod tests {
    use super::whole_xid;

    #[test]
    fn low_bits_mean_the_transaction_that_is_nearest() {
        let epoch = 1i64 << 32;
        assert_eq!(whole_xid(700, 750), 700);
        assert_eq!(whole_xid(751, 750), 751);
        assert_eq!(whole_xid(u32::MAX - 1, 5 * epoch + 10), 5 * epoch - 2);
        assert_eq!(whole_xid(12, 5 * epoch - 3), 5 * epoch + 12);
        // Older than this server knows any: below everything that runs.
        assert!(whole_xid(u32::MAX - 1, 10) < 0);
    }
}
