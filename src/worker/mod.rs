//! The running worker: kinds of connectors, the watched folder, lifecycle, health.

pub mod kinds;
