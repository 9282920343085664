//! Who a worker is to the others: a lease that says its open intents are in good hands (CORRECTNESS 25).
//!
//! An intent whose owner's lease has lapsed may be resolved by anybody; so a worker that could not renew its lease
//! sends nothing more.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::datastore::{Datastore, DatastoreError, acquire_lease, release_leases};
use crate::pipeline::Fault;

const TIME: Duration = Duration::from_secs(15);
const RENEW: Duration = Duration::from_secs(4);

pub struct Ownership {
    owner: String,
    datastore: Datastore,
    good_until: Arc<Mutex<Instant>>,
    renewing: JoinHandle<()>,
}

impl Ownership {
    /// `alone`: the log has one process only, so that whoever had this connector before is surely gone.
    pub async fn take(datastore: &Datastore, connector: &str, alone: bool) -> Result<Self, DatastoreError> {
        let owner = format!("{connector}:{}", uuid::Uuid::new_v4().simple());
        let asked = Instant::now();
        let client = datastore.client().await?;
        if alone {
            client
                .execute("DELETE FROM tidegate.leases WHERE starts_with(name, $1)", &[&name_of(connector, "")])
                .await?;
        }
        // Of workers that crashed: nobody needs them any more.
        client
            .execute(
                "DELETE FROM tidegate.leases WHERE starts_with(name, $1) AND expires_at < now() - interval '1 hour'",
                &[&name_of(connector, "")],
            )
            .await?;
        acquire_lease(&client, &name_of(connector, &owner), &owner, TIME).await?;
        drop(client);
        let good_until = Arc::new(Mutex::new(asked + TIME));
        let renewing =
            tokio::spawn(renew(datastore.clone(), name_of(connector, &owner), owner.clone(), good_until.clone()));
        Ok(Ownership { owner, datastore: datastore.clone(), good_until, renewing })
    }

    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// To be asked before a request is sent.
    pub fn check(&self) -> Result<(), Fault> {
        let good_until = *self.good_until.lock().unwrap_or_else(PoisonError::into_inner);
        // What is sent now must be answered, or timed out, by another's rules: leave a margin.
        if Instant::now() + Duration::from_secs(2) < good_until {
            return Ok(());
        }
        Err(Fault::unavailable(
            "the worker's lease in the datastore has lapsed; nothing is sent until it is renewed",
            None,
        ))
    }

    /// Gives the lease back, so that another need not wait for it to lapse. With an intent still open it lapses by
    /// itself, and stays as a sign that the sink comes back for it.
    pub async fn release(&self, connector: &str) {
        self.renewing.abort();
        let released = async {
            let client = self.datastore.client().await?;
            let open = "SELECT EXISTS (SELECT FROM tidegate.links WHERE intent ->> 'owner' = $1)";
            if !client.query_one(open, &[&self.owner]).await?.get::<_, bool>(0) {
                release_leases(&client, &self.owner, &[name_of(connector, &self.owner)]).await?;
            }
            Ok::<_, DatastoreError>(())
        };
        if let Err(error) = released.await {
            tracing::debug!(%error, "the lease is left to lapse");
        }
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        self.renewing.abort();
    }
}

fn name_of(connector: &str, owner: &str) -> String {
    format!("delivery/{connector}/{owner}")
}

async fn renew(datastore: Datastore, name: String, owner: String, good_until: Arc<Mutex<Instant>>) {
    loop {
        tokio::time::sleep(RENEW).await;
        let asked = Instant::now();
        let renewed = async {
            let client = datastore.client().await?;
            acquire_lease(&client, &name, &owner, TIME).await
        };
        match tokio::time::timeout(TIME, renewed).await {
            Ok(Ok(Some(_))) => *good_until.lock().unwrap_or_else(PoisonError::into_inner) = asked + TIME,
            Ok(Ok(None)) => tracing::warn!(name, "the lease was taken over"),
            Ok(Err(error)) => tracing::warn!(name, %error, "the lease could not be renewed"),
            Err(_) => tracing::warn!(name, "renewing the lease took too long"),
        }
    }
}
