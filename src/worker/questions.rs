//! Questions that go out to the log and the datastore beside the observer's look: each with a deadline, never two of
//! one kind at a time, so that a server that does not answer makes figures old and never the worker slow.
//!
//! One that goes unanswered is told by name, with the reason and since when.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;

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
            let answered = async {
                match tokio::time::timeout(DEADLINE, question).await {
                    Ok(Ok(answer)) => {
                        note(answer);
                        None
                    }
                    Ok(Err(error)) => Some(error.to_string()),
                    Err(_) => Some(format!("no answer within {DEADLINE:?}")),
                }
            };
            // Of one that breaks down, too, the end is seen.
            let answered = AssertUnwindSafe(answered).catch_unwind().await;
            let failed =
                answered.unwrap_or_else(|_| Some("the question itself broke down; the log says why".to_owned()));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_question_that_panics_is_asked_again_and_told() {
        let question = Question::new(Duration::ZERO);
        let ended = async || {
            while lock(&question.inside).under_way {
                tokio::task::yield_now().await;
            }
        };
        let seen: Arc<Mutex<Option<u8>>> = Arc::default();
        question.ask(|| async { Ok::<u8, String>(1) }, |_| panic!("as it may be"));
        tokio::time::timeout(DEADLINE, ended()).await.unwrap();
        assert!(lock(&question.inside).failing.as_ref().unwrap().1.contains("broke down"));
        let note = seen.clone();
        question.ask(|| async { Ok::<u8, String>(2) }, move |answer| *note.lock().unwrap() = Some(answer));
        tokio::time::timeout(DEADLINE, ended()).await.unwrap();
        assert_eq!(*seen.lock().unwrap(), Some(2));
        assert!(lock(&question.inside).failing.is_none());
    }
}
