//! One request budget per system, shared by every connector of it: limits per window of time, a limit on what is
//! in flight, and pauses that the system asks for.
//!
//! The invariant: in no window of `per` do more than `requests` requests leave. A token bucket as rate limiters
//! usually have it lets through twice the limit in its first window; what is counted here is a true sliding
//! window, at a resolution of 1/64 of it, always on the safe side. Turns are given first come, first served.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// `{ requests: 20, per: 1s }`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    pub requests: u32,
    pub per: Duration,
}

const BUCKETS: u32 = 64;

pub struct Budget {
    start: Instant,
    windows: Mutex<Vec<Window>>,
    in_flight: Option<Semaphore>,
    /// Held while waiting for the windows: tokio's mutex is fair, so that turns are taken in order.
    turn: tokio::sync::Mutex<()>,
    paused_until: Mutex<Option<Instant>>,
}

/// Leave to send one request; the place among those in flight is free again when it is dropped.
pub struct Turn<'a> {
    _in_flight: Option<SemaphorePermit<'a>>,
}

impl Budget {
    pub fn new(limits: &[Limit], concurrency: Option<usize>) -> Self {
        Budget {
            start: Instant::now(),
            windows: Mutex::new(limits.iter().map(|limit| Window::new(*limit)).collect()),
            in_flight: concurrency.map(Semaphore::new),
            turn: tokio::sync::Mutex::new(()),
            paused_until: Mutex::new(None),
        }
    }

    /// Waits for a turn, but not beyond `longest`: then the time still to wait is the error. Nothing is taken from
    /// the budget when the future is dropped.
    pub async fn turn(&self, longest: Duration) -> Result<Turn<'_>, Duration> {
        let deadline = Instant::now() + longest;
        let late = |_| self.wait_now();
        let in_flight = match &self.in_flight {
            None => None,
            Some(places) => match tokio::time::timeout_at(deadline, places.acquire()).await.map_err(late)? {
                Ok(permit) => Some(permit),
                // Never closed; were it, no limit would be kept.
                Err(_) => return Err(longest),
            },
        };
        let _turn = tokio::time::timeout_at(deadline, self.turn.lock()).await.map_err(late)?;
        loop {
            let wait = self.wait_now();
            if wait.is_zero() {
                let now = self.start.elapsed();
                lock(&self.windows).iter_mut().for_each(|window| window.take(now));
                return Ok(Turn { _in_flight: in_flight });
            }
            if Instant::now() + wait > deadline {
                return Err(wait);
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// No request leaves for so long; a longer pause asked for before stands.
    pub fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut paused = lock(&self.paused_until);
        if paused.is_none_or(|before| before < until) {
            *paused = Some(until);
        }
    }

    fn wait_now(&self) -> Duration {
        let now = self.start.elapsed();
        let windows = lock(&self.windows).iter_mut().map(|window| window.wait(now)).max().unwrap_or_default();
        let pause = lock(&self.paused_until).map(|until| until.saturating_duration_since(Instant::now()));
        windows.max(pause.unwrap_or_default())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Window {
    limit: u64,
    per: Duration,
    width: Duration,
    /// Requests by the end of their bucket, oldest first.
    buckets: VecDeque<(Duration, u64)>,
    total: u64,
}

impl Window {
    fn new(limit: Limit) -> Self {
        let width = (limit.per / BUCKETS).max(Duration::from_millis(1));
        Window { limit: u64::from(limit.requests.max(1)), per: limit.per, width, buckets: VecDeque::new(), total: 0 }
    }

    fn wait(&mut self, now: Duration) -> Duration {
        while let Some((end, count)) = self.buckets.front().copied() {
            if end + self.per > now {
                break;
            }
            self.total -= count;
            self.buckets.pop_front();
        }
        match self.buckets.front() {
            Some((end, _)) if self.total >= self.limit => end.saturating_add(self.per).saturating_sub(now),
            _ => Duration::ZERO,
        }
    }

    fn take(&mut self, now: Duration) {
        let width = self.width.as_nanos();
        let end = Duration::from_nanos(u64::try_from((now.as_nanos() / width + 1) * width).unwrap_or(u64::MAX));
        self.total += 1;
        match self.buckets.back_mut() {
            Some((last, count)) if *last == end => *count += 1,
            _ => self.buckets.push_back((end, 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_window_holds_more_requests_than_its_limit() {
        let mut window = Window::new(Limit { requests: 20, per: Duration::from_secs(1) });
        let mut now = Duration::ZERO;
        let mut times = Vec::new();
        for _ in 0..100 {
            now += window.wait(now);
            window.take(now);
            times.push(now);
            now += Duration::from_millis(7);
        }
        for (index, time) in times.iter().enumerate().skip(20) {
            assert!(*time - times[index - 20] >= Duration::from_secs(1), "21 requests within {:?}", *time);
        }
        assert!(times[99] < Duration::from_millis(4_400), "slower than the budget: {:?}", times[99]);
    }

    #[tokio::test]
    async fn a_pause_holds_every_request_and_too_long_a_wait_is_told() {
        let budget = Budget::new(&[], Some(4));
        budget.pause(Duration::from_millis(300));
        budget.pause(Duration::from_millis(5));
        let Err(wait) = budget.turn(Duration::from_millis(20)).await else { panic!("sent during a pause") };
        assert!(wait > Duration::from_millis(100) && wait <= Duration::from_millis(300), "{wait:?}");
        let start = Instant::now();
        assert!(budget.turn(Duration::from_secs(5)).await.is_ok());
        assert!(start.elapsed() > Duration::from_millis(100));
    }

    #[tokio::test]
    async fn the_number_in_flight_is_bounded() {
        let budget = Budget::new(&[], Some(1));
        let first = budget.turn(Duration::from_millis(10)).await;
        assert!(first.is_ok());
        assert!(budget.turn(Duration::from_millis(10)).await.is_err());
        drop(first);
        assert!(budget.turn(Duration::from_millis(10)).await.is_ok());
    }
}
