//! PostgreSQL's text forms, parsed without allocating for ordinary values.
//!
//! Every parser takes the whole text or refuses it: a text is never half understood.

pub(super) mod array;
pub(super) mod bits;
pub(super) mod geometry;
pub(super) mod hstore;
pub(super) mod number;
pub(super) mod numeric;
pub(super) mod time;
