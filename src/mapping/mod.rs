//! jq where a value is computed, `{{ jq }}` inside text, and what expressions may see.
//!
//! Expressions never do I/O: `link(…)` and `local(…)` answer from a [`Links`] the caller has filled; what is not
//! there yet comes back as [`MapError::Needs`], the caller fetches it and runs the expression again.
