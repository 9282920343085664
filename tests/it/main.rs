//! Tests by behaviour, on real servers that they start themselves.

mod backlog;
mod capture;
mod cli;
mod config;
mod crash;
mod datastore;
mod delivery;
mod echo;
mod faults;
mod first_run;
mod golden;
mod imports;
mod kafka;
mod log_conformance;
mod losses;
mod options;
mod pull;
mod references;
mod registry;
mod registry_away;
mod snapshots;
mod support;
mod types;
mod whole;
mod worker;
