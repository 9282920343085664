//! Questions that go out to the log and the datastore beside the observer's look: each with a deadline, never two of
//! one kind at a time, so that a server that does not answer makes figures old and never the worker slow.
//!
//! One that goes unanswered is told by name, with the reason and since when.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(10);
/// A server counts as silent when questions have gone unanswered for this long.
const SILENT: Duration = Duration::from_secs(15);

/// One kind of question, asked again and again.
pub struct Question {
    every: Duration,
    inside: Arc<Mutex<Inside>>,
}

#[derive(Default)]
struct Inside {
    under_way: bool,
    asked: Option<Instant>,
    /// Since when it fails, and the latest reason.
    failing: Option<(Instant, String)>,
}

impl Question {
    pub fn new(every: Duration) -> Self {
        Question { every, inside: Arc::default() }
    }

    /// Asks when it is time to: `ask` gives the future to be waited for, `note` takes the answer.
    pub fn ask<T, E, F>(&self, ask: impl FnOnce() -> F, note: impl FnOnce(T) + Send + 'static)
    where
        F: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: std::fmt::Display + Send + 'static,
    {
        let mut inside = lock(&self.inside);
        if inside.under_way || inside.asked.is_some_and(|asked| asked.elapsed() < self.every) {
            return;
        }
        inside.under_way = true;
        drop(inside);
        let (question, shared) = (ask(), self.inside.clone());
        // Owned by `under_way`: it ends by its deadline, and no second one begins before.
        tokio::spawn(async move {
            let began = Instant::now();
            let failed = match tokio::time::timeout(DEADLINE, question).await {
                Ok(Ok(answer)) => {
                    note(answer);
                    None
                }
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some(format!("no answer within {DEADLINE:?}")),
            };
            let mut inside = lock(&shared);
            inside.under_way = false;
            inside.asked = Some(Instant::now());
            inside.failing = failed.map(|reason| (inside.failing.take().map_or(began, |(since, _)| since), reason));
        });
    }

    /// How long there has been no answer, and why, once that is long enough to be told.
    pub fn silent(&self) -> Option<(Duration, String)> {
        let inside = lock(&self.inside);
        let (since, reason) = inside.failing.as_ref()?;
        (since.elapsed() >= SILENT).then(|| (since.elapsed(), reason.clone()))
    }
}

fn lock(inside: &Mutex<Inside>) -> MutexGuard<'_, Inside> {
    inside.lock().unwrap_or_else(PoisonError::into_inner)
}
