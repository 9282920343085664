//! Systems: one HTTP client each, with its auth, budget, breaker, probe and classes of answers.

/// One system; every connector of it shares the one.
pub struct System;
