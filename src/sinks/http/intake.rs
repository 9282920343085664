//! What the sink works on: the group's records, and parked ones whose time has come, never both in one batch.
//!
//! Coming by the same way, one after the other, parked and live records of a key can't overtake each other.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use crate::datastore::{Datastore, Owned, Parked, ParkedKind, Room, parked_counts, parked_ready};
use crate::event::TopicPartition;
use crate::log::ConsumedRecord;
use crate::pipeline::{Batch, Fault, Source, Status};
use crate::sources::log::{LogSource, Offsets};
use crate::systems::System;

/// How often the parked records are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Queues taken up at once, and bytes of their heads.
const AT_ONCE: Room = Room { records: 200, bytes: 4 << 20 };

/// A batch of the sink.
pub enum Work {
    Records(Vec<ConsumedRecord>),
    Parked(Vec<Parked>),
}

pub struct Intake {
    log: LogSource,
    datastore: Datastore,
    system: Arc<System>,
    connector: String,
    status: Arc<Status>,
    look_at: Instant,
    ticks: u32,
}

impl Intake {
    pub fn new(
        log: LogSource,
        datastore: Datastore,
        system: Arc<System>,
        connector: &str,
        status: Arc<Status>,
    ) -> Self {
        Intake { log, datastore, system, connector: connector.to_owned(), status, look_at: Instant::now(), ticks: 0 }
    }

    async fn ready(&mut self) -> Result<Vec<Parked>, Fault> {
        let assigned = self.log.assigned();
        if assigned.is_empty() {
            return Ok(Vec::new());
        }
        let owned = Owned {
            topics: assigned.iter().map(|place| place.topic.to_string()).collect(),
            partitions: assigned.iter().map(|place| place.partition).collect(),
            strays_of: self.log.sees_to_strays().map(<[String]>::to_vec),
        };
        let client = self.datastore.client().await?;
        Ok(parked_ready(&client, &self.connector, &owned, AT_ONCE).await?)
    }

    async fn tell_parked(&mut self) -> Result<(), Fault> {
        let client = self.datastore.client().await?;
        let (mut rejected, mut waiting) = (0, 0);
        for (_, kind, count) in parked_counts(&client, Some(&self.connector)).await? {
            *(if kind == ParkedKind::Rejected { &mut rejected } else { &mut waiting }) += count;
        }
        self.status.set_fact("dead_letters", rejected);
        self.status.set_fact("waiting", waiting);
        Ok(())
    }
}

#[async_trait]
impl Source for Intake {
    type Batch = Work;
    type Mark = Offsets;

    async fn next(&mut self) -> Result<Batch<Work, Offsets>, Fault> {
        loop {
            if self.look_at <= Instant::now() {
                self.look_at = Instant::now() + LOOK;
                // Live records go on without it: none overtakes, for each asks for its key's queue itself.
                let parked = self.ready().await.unwrap_or_else(|fault| {
                    tracing::warn!(connector = self.connector, %fault, "the parked records can't be looked at");
                    Vec::new()
                });
                if !parked.is_empty() {
                    let (events, bytes) = (parked.len(), parked.iter().map(|p| size(&p.record)).sum());
                    let place =
                        |parked: &Parked| TopicPartition::new(parked.record.topic.clone(), parked.record.partition);
                    self.log.lend(parked.iter().map(place).collect());
                    return Ok(Batch { body: Work::Parked(parked), mark: Offsets::new(), events, bytes });
                }
            }
            tokio::select! {
                batch = self.log.next() => {
                    let batch = batch?;
                    return Ok(Batch {
                        body: Work::Records(batch.body),
                        mark: batch.mark,
                        events: batch.events,
                        bytes: batch.bytes,
                    });
                }
                () = tokio::time::sleep_until(self.look_at) => {}
            }
        }
    }

    async fn acknowledge(&mut self, mark: Offsets) -> Result<(), Fault> {
        self.log.acknowledge(mark).await
    }

    async fn restart(&mut self) -> Result<(), Fault> {
        self.log.restart().await
    }

    async fn tick(&mut self, paused: bool) -> Result<(), Fault> {
        self.status.set_fact("breaker", serde_json::json!(self.system.breaker()));
        self.ticks = self.ticks.wrapping_add(1);
        if self.ticks % 3 == 1 {
            self.tell_parked().await?;
        }
        self.log.tick(paused).await
    }

    async fn close(&mut self) -> Result<(), Fault> {
        self.log.close().await
    }
}

pub(super) fn size(record: &ConsumedRecord) -> usize {
    record.key.as_ref().map_or(0, |key| key.len()) + record.value.as_ref().map_or(0, |value| value.len())
}
