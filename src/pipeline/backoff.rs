//! How long to wait before trying again: growing, capped, and never the same for everybody.

use std::time::Duration;

use super::FaultKind;

const RETRY_FIRST: Duration = Duration::from_millis(200);
const UNAVAILABLE_FIRST: Duration = Duration::from_millis(500);
/// After a first fault whose other side asked for no pause.
const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_secs(30);

/// The pause before try number `attempt` + 1, `attempt` counting from 1. What the other side asked for is kept to,
/// and up to a tenth added; otherwise the pause doubles up to half a minute, and a random half of it is left out. Who
/// asks for none, again and again, waits longer each time all the same.
pub fn pause(kind: FaultKind, attempt: u32) -> Duration {
    let (first, after) = match kind {
        FaultKind::Retry { after } => (RETRY_FIRST, after),
        FaultKind::Unavailable { after } => (UNAVAILABLE_FIRST, after),
        FaultKind::Stop => return Duration::ZERO,
    };
    let chance: f64 = rand::random();
    match after {
        Some(after) => {
            let least = SHORTEST.saturating_mul(1 << attempt.saturating_sub(1).min(16)).min(first);
            (after + after.mul_f64(0.1 * chance)).max(least.mul_f64(0.5 + 0.5 * chance))
        }
        None => {
            let doubled = first.saturating_mul(1 << attempt.saturating_sub(1).min(16)).min(LONGEST);
            doubled.mul_f64(0.5 + 0.5 * chance)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_cap_and_differ() {
        let kind = FaultKind::Retry { after: None };
        for attempt in 1..100 {
            let pause = pause(kind, attempt);
            assert!(pause >= RETRY_FIRST / 2 && pause <= LONGEST, "{attempt}: {pause:?}");
        }
        assert!(pause(kind, 1) <= RETRY_FIRST);
        assert!(pause(kind, 60) >= LONGEST / 2);
        assert!((0..20).map(|_| pause(kind, 60)).collect::<std::collections::BTreeSet<_>>().len() > 1);
    }

    #[test]
    fn a_pause_that_was_asked_for_is_kept_to() {
        let after = Duration::from_secs(7);
        let pause = pause(FaultKind::Unavailable { after: Some(after) }, 9);
        assert!(pause >= after && pause <= after.mul_f64(1.1));
        let none = |attempt| super::pause(FaultKind::Unavailable { after: Some(Duration::ZERO) }, attempt);
        assert!(none(1) >= SHORTEST / 2 && none(1) <= SHORTEST, "never at once: {:?}", none(1));
        assert!(none(10) >= UNAVAILABLE_FIRST / 2 && none(99) <= UNAVAILABLE_FIRST, "{:?}", none(10));
    }
}
