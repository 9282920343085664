//! Waiting for conditions with a deadline, in place of sleeping for luck.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// What one look at a condition answers: there, or not yet (and what was seen instead).
pub trait Look {
    type Found;
    fn outcome(self) -> Result<Self::Found, String>;
}

impl Look for bool {
    type Found = ();
    fn outcome(self) -> Result<(), String> {
        if self { Ok(()) } else { Err("false".into()) }
    }
}

impl<T> Look for Option<T> {
    type Found = T;
    fn outcome(self) -> Result<T, String> {
        self.ok_or_else(|| "none".into())
    }
}

impl<T, E: Display> Look for Result<T, E> {
    type Found = T;
    fn outcome(self) -> Result<T, String> {
        self.map_err(|error| error.to_string())
    }
}

/// Looks again and again (20 ms apart, slower later) until `look` finds; panics after `deadline` with `what` and the last
/// thing seen. `look` answers a `bool`, an `Option` or a `Result`.
///
/// ```ignore
/// eventually(Duration::from_secs(10), "two rows", async || rows().await.len() == 2).await;
/// ```
#[track_caller]
pub fn eventually<L: Look, F: AsyncFnMut() -> L>(
    deadline: Duration,
    what: &str,
    mut look: F,
) -> impl Future<Output = L::Found> {
    let caller = std::panic::Location::caller();
    async move {
        let start = Instant::now();
        let mut pause = Duration::from_millis(20);
        let mut seen = String::new();
        loop {
            seen = match tokio::time::timeout(deadline.saturating_sub(start.elapsed()), look()).await {
                Ok(look) => match look.outcome() {
                    Ok(found) => return found,
                    Err(seen) => seen,
                },
                // The deadline cut it off: the one before says more.
                Err(_) => format!("{seen} (and a look that did not end)"),
            };
            assert!(start.elapsed() < deadline, "{caller}: not within {deadline:?}: {what}; last seen: {seen}");
            tokio::time::sleep(pause).await;
            pause = (pause * 3 / 2).min(Duration::from_millis(250));
        }
    }
}
