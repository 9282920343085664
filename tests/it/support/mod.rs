//! Real servers for the tests: started on free ports of 127.0.0.1, ended when the test process ends for whatever reason.
//!
//! [`process`] keeps that promise; the files beside it know one server each.
#![allow(dead_code, unused_imports)] // each test file takes what it needs

pub mod api;
pub mod apicurio;
pub mod capture;
pub mod connector;
pub mod cuts;
pub mod gate;
pub mod http;
pub mod kafka;
pub mod office;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod python;
pub mod scripted;
pub mod shop;
pub mod tryton;
pub mod wait;
pub mod worker;

pub use api::Api;
pub use apicurio::Apicurio;
pub use connector::{Running, Stage, system};
pub use cuts::{Cuts, Said, When};
pub use gate::Gate;
pub use http::http;
pub use kafka::Kafka;
pub use office::{Mood, Office};
pub use postgres::{Database, Postgres, Version};
pub use process::{Launch, Process, tidegate};
pub use proxy::{Fault, Proxy, Script};
pub use python::python;
pub use scripted::{Asked, Scripted, Told};
pub use tryton::Tryton;
pub use wait::eventually;
pub use worker::{WorkerLog, Workshop};
