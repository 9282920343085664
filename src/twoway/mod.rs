//! What to send, write, hold or merge when two systems own the same record: decisions without I/O.
//!
//! Each side is only ever compared with itself (CORRECTNESS 14): what a row maps to now with what it mapped to when
//! last agreed, a record with the record last seen. So a mapping that rounds or reformats does not make the two
//! answer each other forever; that they fall silent is tested against a model.

mod equal;
mod flips;
#[cfg(test)]
mod model_tests;
mod order;
mod receive;
mod send;
mod sent;

pub use equal::same;
pub use flips::{Direction, MAX_RETURNS, Turns};
pub use order::{moment, naive, order};
pub use receive::{Conflict, Incoming, Owner, Policy, Write, what_to_write};
pub use send::{Fields, Outgoing, Send, difference, what_to_send};
pub use sent::{Sent, SentColumn, SentColumns, changed_columns, other_than};
