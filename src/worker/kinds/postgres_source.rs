//! `postgres-source`: captures committed changes of a PostgreSQL database into the log.

use async_trait::async_trait;
use serde_json::Value;

use super::{Connector, Identity, World};
use crate::config::{ConfigError, Section};
use crate::datastore::DatastoreSettings;
use crate::event::{CapturePosition, Lsn, SnapshotProgress};
use crate::pipeline::{self, ConnectorContext, Fault, Plan, ResetTo};
use crate::postgres::slot::{self, Slot};
use crate::postgres::{Address, Purpose, Session, identifier, literal, publication, replication};
use crate::sinks::log::{LogDestination, stored_position};
use crate::sources::postgres::{self, CaptureSettings, PostgresSource};

pub const SLOT: &str = "slot.name";
const PUBLICATION: &str = "publication.name";

#[derive(Clone, Debug)]
pub struct Settings(CaptureSettings);

impl Settings {
    pub fn read(section: &mut Section, _world: &World<'_>) -> Result<Self, ConfigError> {
        CaptureSettings::read(section).map(Settings)
    }

    fn address(&self, context: &ConnectorContext) -> Result<Address, Fault> {
        self.0.address(context.datastore.settings())
    }
}

#[async_trait]
impl Connector for Settings {
    fn identity(&self) -> Identity {
        let settings = &self.0;
        let database = settings.database.as_ref().map(|database| database.dbname().to_owned());
        Identity::from([
            ("topic.prefix".to_owned(), settings.prefix.clone()),
            (SLOT.to_owned(), settings.slot.clone()),
            (PUBLICATION.to_owned(), settings.publication.clone()),
            ("database.dbname".to_owned(), database.unwrap_or_default()),
        ])
    }

    fn server(&self) -> Option<String> {
        self.0.database.as_ref().map(DatastoreSettings::place)
    }

    fn groups(&self, _: &str) -> Vec<String> {
        Vec::new()
    }

    async fn run(&self, context: ConnectorContext) -> Result<(), Fault> {
        let address = self.address(&context)?;
        let destination = LogDestination::open(context.log.clone(), &context.name).await?;
        let source = PostgresSource::new(
            self.0.clone(),
            address,
            context.name.clone(),
            context.log.clone(),
            context.registry.clone(),
            context.status.clone(),
            destination.stored(),
        )
        .releasing(context.control.take_restarted());
        pipeline::run(source, destination, &context).await
    }

    async fn plan(&self, context: &ConnectorContext) -> Result<Plan, Fault> {
        let address = self.address(context)?;
        // A worker that runs has the writer: the position is only read.
        let stored = stored_position(&context.log, &context.name).await?;
        postgres::plan(&context.name, &self.0, &address, &context.log, &context.registry, stored.as_ref()).await
    }

    async fn preview(&self, context: &ConnectorContext, limit: usize) -> Result<Vec<Value>, Fault> {
        postgres::preview(&self.0, &self.address(context)?, limit).await
    }

    async fn reset(&self, context: &ConnectorContext, to: &ResetTo) -> Result<String, Fault> {
        let address = self.address(context)?;
        let mut destination = LogDestination::open(context.log.clone(), &context.name).await?;
        let stored = destination.stored().get();
        let epoch = stored.as_ref().map_or(1, |stored| stored.epoch + 1);
        let slot_name = &self.0.slot;
        let mut session = address.connect(Purpose::Replication).await?;
        if matches!(to, ResetTo::End) {
            // What is committed without it is not streamed.
            postgres::ensure_publication(&mut session, &self.0).await?;
        }
        let system = replication::identify_system(&mut session).await?;
        let found = slot::find(&mut session, slot_name).await?;
        let fresh = CapturePosition {
            epoch,
            system_identifier: system.system_identifier,
            timeline: system.timeline,
            slot: slot_name.clone(),
            commit_end: Lsn::ZERO,
            last_commit: Lsn::ZERO,
            ordinal: 0,
            ordinal_xid: 0,
            fingerprint: self.0.fingerprint(),
            snapshot: None,
            read_at: Default::default(),
            quarantined: Default::default(),
        };
        match to {
            ResetTo::Beginning => {
                let position = CapturePosition { snapshot: Some(SnapshotProgress::default()), ..fresh };
                destination.store(&position).await?;
                Ok(format!("all tables are read again at the next start, with a new slot '{slot_name}'"))
            }
            ResetTo::End => {
                let lost = found.as_ref().is_none_or(|slot| slot.wal_status == "lost");
                let end = if lost {
                    slot::drop_slot(&mut session, slot_name).await?;
                    let kind = replication::SlotKind::Lasting { failover: self.0.failover };
                    replication::create_slot(&mut session, slot_name, kind, false, self.0.slot_creation)
                        .await?
                        .consistent_point
                } else {
                    system.wal_end
                };
                let end = end.max(found.and_then(|slot| slot.confirmed_flush).unwrap_or_default());
                destination.store(&CapturePosition { commit_end: end, last_commit: end, ..fresh }).await?;
                Ok(format!("goes on at {end}; what was committed before is left out"))
            }
            ResetTo::Offset(_) | ResetTo::TimeMs(_) | ResetTo::Cursor(_) => Err(Fault::stop(
                "a capture is reset to 'beginning' (all tables read again) or to 'end' (only what comes from now on)",
            )),
        }
    }
}

/// Drops the slot and the publication of a capture that is no more.
pub async fn forget(identity: &Identity, context: &ConnectorContext) -> Result<String, Fault> {
    let mut session = connect(identity, context).await?;
    let mut done = Vec::new();
    if let Some(name) = identity.get(SLOT)
        && slot::find(&mut session, name).await?.is_some()
    {
        slot::drop_slot(&mut session, name).await?;
        done.push(format!("dropped slot '{name}'"));
    }
    if let Some(name) = identity.get(PUBLICATION)
        && publication::find(&mut session, name).await?.is_some()
    {
        let sql = format!("DROP PUBLICATION {}", identifier(name));
        session.query(&sql, std::time::Duration::from_secs(20)).await?;
        done.push(format!("dropped publication '{name}'"));
    }
    session.close().await;
    Ok(done.join(", "))
}

pub fn forget_sql(identity: &Identity) -> Vec<String> {
    let slot =
        identity.get(SLOT).map(|name| format!("SELECT pg_drop_replication_slot({});", literal(name).trim_start()));
    let publication = identity.get(PUBLICATION).map(|name| format!("DROP PUBLICATION {};", identifier(name)));
    slot.into_iter().chain(publication).collect()
}

pub async fn left_slot(identity: &Identity, context: &ConnectorContext) -> Result<Option<(String, Slot)>, Fault> {
    let Some(name) = identity.get(SLOT) else { return Ok(None) };
    let mut session = connect(identity, context).await?;
    let found = slot::find(&mut session, name).await?;
    session.close().await;
    Ok(found.map(|slot| (name.clone(), slot)))
}

/// To the database that a capture without a file had, in the datastore's server.
async fn connect(identity: &Identity, context: &ConnectorContext) -> Result<Session, Fault> {
    let mut address = CaptureSettings::new("").address(context.datastore.settings())?;
    if let Some(database) = identity.get("database.dbname").filter(|name| !name.is_empty()) {
        address.dbname.clone_from(database);
    }
    Ok(address.connect(Purpose::Sql).await?)
}
