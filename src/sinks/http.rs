//! Delivery to a system over HTTP: rows and documents as requests, each counterpart made once and kept in step.
//!
//! An event says that a row moved; what is sent is what differs between the row as it is now and what was last
//! agreed (CORRECTNESS 13, 14). The way of one key, in `deliver`: under the link's lock read the document, map it,
//! decide (`twoway`), write an intent, commit; send; lock again, and, if the intent is still there, write the
//! outcome. No transaction is open while a request is under way. A request whose outcome is not known leaves its
//! intent open, and `resolve` asks the system before anything is sent again (CORRECTNESS 19).
//!
//! A record that can't be delivered is set aside in the datastore, and later ones of its key behind it; then its
//! offset may be committed (CORRECTNESS 17). Keys are worked on in parallel, the events of one key in a batch are
//! one attempt. A cycle of rows that wait for each other's links is cut by `link_later` in their map: the row is sent
//! without that link, which the link's `owed` notes, and again once it is there (CORRECTNESS 18).

mod answered;
mod changes;
pub(super) mod dead_letters;
mod decide;
mod deliver;
mod ends;
mod expressions;
mod intake;
mod outcome;
mod ownership;
mod parking;
mod preview;
mod rekey;
mod resolve;
mod sending;
mod sent;
mod settings;
mod shape;
mod work;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use intake::{Intake, Work};
pub use settings::{Initial, LineSource, SendMode, Settings, Update};

use crate::pipeline::{ConnectorContext, Destination, Fault, Written};
use crate::sources::log::LogSource;
use crate::systems::BreakerState;
use deliver::Delivery;

/// How long a restart waits for the system before it says that it is still away.
const AVAILABLE: Duration = Duration::from_secs(5);

pub struct HttpSink {
    delivery: Arc<Delivery>,
}

/// The group of a sink's consumers.
pub fn group_of(connector: &str) -> String {
    format!("tidegate-{connector}")
}

/// The sink and what it reads from, ready to be driven.
pub async fn open(settings: Arc<Settings>, context: &ConnectorContext) -> Result<(Intake, HttpSink), Fault> {
    let log = LogSource::new(
        context.log.clone(),
        group_of(&context.name),
        settings.topics.clone(),
        settings.batching,
        context.status.clone(),
    );
    let delivery = Delivery::open(settings.clone(), context, log.revoked()).await?;
    let system = settings.system.clone();
    let intake = Intake::new(log, context.datastore.clone(), system, &context.name, context.status.clone());
    Ok((intake, HttpSink { delivery: Arc::new(delivery) }))
}

pub use preview::preview;

impl HttpSink {
    /// Lets go of the lease; to be called when the pipeline has ended. What is cloned here ends with it.
    pub fn farewell(&self) -> impl Future<Output = ()> + Send + 'static {
        let delivery = self.delivery.clone();
        async move { delivery.release().await }
    }
}

#[async_trait]
impl Destination for HttpSink {
    type Batch = Work;

    async fn write(&mut self, work: Work) -> Result<Written, Fault> {
        let system = &self.delivery.settings.system;
        if system.breaker() == BreakerState::Open {
            let reason = format!("'{}' is unavailable: {}", system.name(), system.breaker_reason());
            return Err(Fault::unavailable(reason, Some(Duration::from_millis(500))));
        }
        let delivery = self.delivery.clone();
        Ok(Box::pin(async move { delivery.run(work).await }))
    }

    async fn restart(&mut self) -> Result<(), Fault> {
        let system = &self.delivery.settings.system;
        if tokio::time::timeout(AVAILABLE, system.wait_available()).await.is_err() {
            let reason = format!("'{}' is unavailable: {}", system.name(), system.breaker_reason());
            return Err(Fault::unavailable(reason, Some(Duration::from_secs(1))));
        }
        Ok(())
    }
}
