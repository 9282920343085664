//! Tidegate keeps a PostgreSQL datastore and the systems around it in step.
//!
//! `ARCHITECTURE.md` has the map. Imports point one way, and a test holds them to it:
//! `config`, `event` <- `postgres`, `avro`, `mapping` <- `log` <- `registry` <- `datastore`, `systems`, `twoway`
//! <- `pipeline` <- `sources` <- `sinks` <- `worker` <- `rest` <- `cli`.

#![deny(unsafe_code)] // but in log/kafka/native.rs, which says why

pub mod avro;
pub mod cli;
pub mod config;
pub mod datastore;
pub mod event;
pub mod log;
pub mod mapping;
pub mod pipeline;
pub mod postgres;
pub mod registry;
pub mod rest;
pub mod sinks;
pub mod sources;
pub mod systems;
pub mod twoway;
pub mod worker;
