//! Tests by behaviour, on real servers that they start themselves.

mod backlog;
mod capture;
mod cli;
mod config;
mod crash;
mod creates;
mod datastore;
mod delivery;
mod documents;
mod echo;
mod faults;
mod first_run;
mod folder;
mod golden;
mod health;
mod imports;
mod kafka;
mod keys;
mod log_conformance;
mod losses;
mod operate;
mod options;
mod pull;
#[cfg(feature = "kafka")]
mod pull_workers;
mod references;
mod registry;
mod registry_away;
mod shutdown;
mod snapshots;
mod support;
mod two_workers;
mod types;
mod whole;
mod worker;
