//! Pure decisions of two-way sync, without I/O: what to send, hold, merge.
