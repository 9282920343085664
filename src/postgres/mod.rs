//! PostgreSQL as capture sees it: connections, the replication stream, pgoutput, the catalog.
//!
//! Nothing here knows of topics, Avro or the log; the source above turns what comes from here into records.
//! All outside bytes go through [`frames`], [`pgoutput`] and [`copy_text`], which never panic on them.

pub mod catalog;
mod connection;
pub mod copy_text;
mod error;
pub mod frames;
pub mod pgoutput;
pub mod publication;
pub mod relation;
pub mod replication;
mod session;
pub mod slot;
pub mod snapshot;
mod socket;
pub mod table_filter;

pub use connection::{Address, ChannelBinding, Purpose, Tls};
pub use error::{PostgresError, ServerError};
pub use session::{Rows, Session, identifier, literal, qualified};
pub use table_filter::TableFilter;
