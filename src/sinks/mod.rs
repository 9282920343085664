//! Where batches go: the log, the datastore, a system over HTTP.

pub mod datastore;
pub mod http;
pub mod log;
