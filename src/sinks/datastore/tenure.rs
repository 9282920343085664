//! Which worker runs a pull: the one that has its lease in the datastore (CORRECTNESS 25).
//!
//! Invariant: nothing is written for a pull but in a transaction that has found the lease still its own, and that holds
//! it so until it commits. So a worker that was cut off, stopped or slow writes nothing after another has taken over.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::datastore::{Datastore, DatastoreErrorKind, Transaction};
use crate::datastore::{Lease, acquire_lease, holds_lease, is_anothers_lease, release_leases, seize_lease};
use crate::pipeline::{ConnectorContext, ConnectorState, Fault, Signal};

/// A worker that is gone is followed after so long.
const TIME: Duration = Duration::from_secs(15);
const RENEW: Duration = Duration::from_secs(4);
/// Between looks of a worker that stands by.
const LOOK: Duration = Duration::from_secs(2);

pub struct Tenure {
    datastore: Datastore,
    lease: Lease,
    /// The log has one process only, and so have the pulls; none where workers share a log.
    alone: bool,
    losing: watch::Sender<bool>,
    lost: watch::Receiver<bool>,
    renewing: Option<JoinHandle<()>>,
}

/// What a transaction checks the lease by.
#[derive(Clone)]
pub struct Hold {
    lease: Lease,
    alone: bool,
    losing: watch::Sender<bool>,
}

impl Tenure {
    /// Waits until the pull is this worker's to run; `None`: told to stop before it was.
    pub async fn take(context: &ConnectorContext) -> Result<Option<Self>, Fault> {
        let alone = context.log.kind() == "embedded";
        let name = format!("pull/{}", context.name);
        let owner = format!("{}:{}", context.name, uuid::Uuid::new_v4().simple());
        let mut control = context.control.clone();
        let mut told = false;
        let lease = loop {
            let client = context.datastore.client().await?;
            let taken = match alone {
                // Whoever had it before is surely gone.
                true => Some(seize_lease(&client, &name, &owner, TIME).await?),
                false => match acquire_lease(&client, &name, &owner, TIME).await {
                    // A transaction of the one that has it is under way.
                    Err(error) if error.kind == DatastoreErrorKind::Conflict => None,
                    taken => taken?,
                },
            };
            drop(client);
            if let Some(lease) = taken {
                break lease;
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!(connector = %context.name, "stands by: another worker runs this pull");
                context.status.set_state(ConnectorState::Running);
                context.status.set_fact("standby", true);
            }
            let signal = control.signal();
            let changed = tokio::time::timeout(LOOK, control.changed_from(signal)).await;
            if control.signal() == Signal::Stop || matches!(changed, Ok(Signal::Stop)) {
                return Ok(None);
            }
        };
        context.status.set_fact("standby", false);
        let (losing, lost) = watch::channel(false);
        let renewing = (!alone).then(|| tokio::spawn(renew(context.datastore.clone(), lease.clone(), losing.clone())));
        Ok(Some(Tenure { datastore: context.datastore.clone(), lease, alone, losing, lost, renewing }))
    }

    pub fn hold(&self) -> Hold {
        Hold { lease: self.lease.clone(), alone: self.alone, losing: self.losing.clone() }
    }

    /// Resolves when another worker has taken over, or the datastore does not know of it any more.
    pub async fn lost(&self) {
        if self.lost.clone().wait_for(|lost| *lost).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Lets another worker have it at once.
    pub async fn release(&self) {
        if let Some(renewing) = &self.renewing {
            renewing.abort();
        }
        let released = async {
            let client = self.datastore.client().await?;
            release_leases(&client, &self.lease.owner, std::slice::from_ref(&self.lease.name)).await
        };
        if let Ok(Err(error)) = tokio::time::timeout(TIME, released).await {
            tracing::debug!(%error, "the lease is left to lapse");
        }
    }
}

impl Drop for Tenure {
    fn drop(&mut self) {
        if let Some(renewing) = &self.renewing {
            renewing.abort();
        }
    }
}

impl Hold {
    /// Keeps others from taking over until the transaction ends.
    pub async fn check(&self, transaction: &Transaction<'_>) -> Result<(), Fault> {
        if holds_lease(transaction, &self.lease).await? {
            return Ok(());
        }
        if self.alone && !is_anothers_lease(transaction, &self.lease).await? {
            self.losing.send_replace(true);
            return Err(Fault::retry(format!("the datastore has lost '{}', which is taken anew", self.lease.name)));
        }
        Err(match self.alone {
            true => Fault::stop(format!(
                "another worker has taken over '{}' on the same datastore, with an embedded log of its own; hint: one of \
                 the two is too many, or they need a log in common",
                self.lease.name
            )),
            false => Fault::retry(format!("another worker has taken over '{}'", self.lease.name)),
        })
    }
}

/// Ends when the lease is another's.
async fn renew(datastore: Datastore, lease: Lease, lost: watch::Sender<bool>) {
    loop {
        tokio::time::sleep(RENEW).await;
        let renewed = async {
            let client = datastore.client().await?;
            acquire_lease(&client, &lease.name, &lease.owner, TIME).await
        };
        match tokio::time::timeout(TIME, renewed).await {
            Ok(Ok(Some(held))) if held.generation == lease.generation => {}
            Ok(Ok(_)) => {
                tracing::warn!(name = lease.name, "another worker has taken over");
                lost.send_replace(true);
                return;
            }
            // Nothing can be written either, until the datastore answers; then the lease tells.
            Ok(Err(error)) => tracing::warn!(name = lease.name, %error, "the lease could not be renewed"),
            Err(_) => tracing::warn!(name = lease.name, "renewing the lease took too long"),
        }
    }
}
