//! Where batches come from: the WAL, a system over HTTP, the log.

pub mod http;
pub mod log;
pub mod postgres;
