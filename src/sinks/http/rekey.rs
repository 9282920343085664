//! Links follow the keys of their rows (CORRECTNESS 16).

use std::time::Duration;

use serde_json::Value;

use super::deliver::{Delivery, db};
use super::work::KeyWork;
use crate::datastore::{lock_link, rekey_link};
use crate::event::Operation;
use crate::pipeline::Fault;

/// Between looks at a link that another worker's request is under way for.
const BUSY: Duration = Duration::from_millis(500);

impl Delivery {
    /// Gives links the new keys of their rows (CORRECTNESS 16).
    pub(super) async fn rekey(&self, work: &KeyWork) -> Result<(), Fault> {
        for event in &work.events {
            let change = &event.change;
            if change.schema != work.table.schema || change.table != work.table.name {
                // A line of the document: its key is not the root's.
                continue;
            }
            let (old, new) = match (&change.new_key, &change.old_key) {
                (Some(new), _) if change.operation == Operation::Delete => (&change.key, new),
                (_, Some(old)) => (old, &change.key),
                _ => continue,
            };
            let mut tries = 0;
            while !self.try_rekey(&work.table.to_string(), old, new).await? {
                tries += 1;
                if tries > 60 {
                    return Err(Fault::retry(format!(
                        "the link of {old} stays busy, so it can't become that of {new}"
                    )));
                }
                tokio::time::sleep(BUSY).await;
            }
        }
        Ok(())
    }

    /// False while a request for the link is under way.
    async fn try_rekey(&self, table: &str, old: &Value, new: &Value) -> Result<bool, Fault> {
        let mut client = self.datastore.client().await?;
        let transaction = client.transaction().await.map_err(db)?;
        let key = self.link_key(old);
        let Some(link) = lock_link(&transaction, &key).await? else { return Ok(true) };
        if link.table != table {
            return Ok(true);
        }
        if self.is_anothers(&transaction, &link).await? {
            return Ok(false);
        }
        rekey_link(&transaction, &key, new).await?;
        transaction.commit().await.map_err(db)?;
        Ok(true)
    }
}
