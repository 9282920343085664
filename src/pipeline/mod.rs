//! One loop for all connectors: a source of batches, a place to write them, acknowledgements in order.
//!
//! The pipeline owns what is common: the window of batches in flight (bounded in bytes), acknowledging in order,
//! retry with backoff, pause, drain at shutdown, counting. A source and a destination own only what is theirs.
//! The invariant: [`Source::acknowledge`] is called for a batch only after [`Destination::write`]'s future for it
//! and for all batches before it has resolved well.

pub mod backoff;
mod context;
mod drive;
mod fault;
mod meters;
pub mod progress;

use std::pin::Pin;

use async_trait::async_trait;

pub use context::{ConnectorContext, ConnectorState, Control, Counts, Lag, Plan, PlanStep, ResetTo, Signal, Status};
pub use drive::run;
pub use fault::{Fault, FaultKind};

/// Where batches come from.
#[async_trait]
pub trait Source: Send {
    type Batch: Send + 'static;
    /// What acknowledging a batch needs; small.
    type Mark: Send + 'static;

    /// The next batch, when there is one. Safe to drop at its await: nothing is lost by it.
    async fn next(&mut self) -> Result<Batch<Self::Batch, Self::Mark>, Fault>;

    /// Everything up to and with this batch is durable on the other side.
    async fn acknowledge(&mut self, mark: Self::Mark) -> Result<(), Fault>;

    /// Goes back to what is durable; called after a fault on either side and before `next` is called again. May be
    /// dropped at its await, after which only `close` is called.
    async fn restart(&mut self) -> Result<(), Fault>;

    /// Called about once a second, so that connections stay alive and lag is known. `paused`: `next` is not going
    /// to be called for now, because of a pause, or because the destination is away or stuck. Not called between
    /// a fault of the source and its restart.
    async fn tick(&mut self, paused: bool) -> Result<(), Fault>;

    /// Whether it has begun to read. Until then the connector is shown as starting, or as waiting behind a fault.
    fn is_reading(&self) -> bool {
        true
    }

    /// Says goodbye; nothing is in flight any more. Also called after a fault that stops the connector.
    async fn close(&mut self) -> Result<(), Fault>;
}

pub struct Batch<T, M> {
    pub body: T,
    pub mark: M,
    pub events: usize,
    pub bytes: usize,
}

/// Where batches go.
#[async_trait]
pub trait Destination: Send {
    type Batch: Send + 'static;

    /// Takes the batch (*accepted*); the future resolves when it is *durable* there, or parked. May be dropped at
    /// its await after a fault, and is then followed by `restart`.
    async fn write(&mut self, batch: Self::Batch) -> Result<Written, Fault>;

    /// Batches that may be accepted and not yet durable, at the most.
    fn window(&self) -> usize {
        1
    }

    /// Forgets what is in flight; called after a fault.
    async fn restart(&mut self) -> Result<(), Fault> {
        Ok(())
    }
}

pub type Written = Pin<Box<dyn Future<Output = Result<Counts, Fault>> + Send>>;
