//! Tests by behaviour, on real servers that they start themselves.

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
mod pull;
mod references;
mod registry;
mod support;
mod types;
mod whole;
mod worker;
