//! Counting how often a link goes back and forth: two rules that undo each other's work (a trigger here, a
//! normalisation there) would otherwise keep both systems busy forever (CORRECTNESS 14).

/// Which way a link was last written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A row to the system.
    Push,
    /// A record to the table.
    Pull,
}

/// A link that has changed direction more often than this, without a pause, is parked or held.
pub const MAX_FLIPS: i32 = 20;
/// After so long without a write a link starts to count anew, seconds.
const QUIET_S: f64 = 600.0;

/// The link's count after a write in `direction`. The count is even after a push and odd after a pull, so that the
/// last direction need not be kept beside it.
pub fn next_flips(flips: i32, direction: Direction, quiet_s: f64) -> i32 {
    let odd = direction == Direction::Pull;
    if quiet_s > QUIET_S {
        return i32::from(odd);
    }
    if (flips % 2 == 1) == odd { flips } else { flips.saturating_add(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_of_direction_count_and_a_pause_forgets_them() {
        let mut flips = 0;
        for direction in [Direction::Push, Direction::Push, Direction::Pull, Direction::Pull, Direction::Push] {
            flips = next_flips(flips, direction, 1.0);
        }
        assert_eq!(flips, 2);
        assert_eq!(next_flips(19, Direction::Pull, 601.0), 1);
        assert_eq!(next_flips(19, Direction::Push, 601.0), 0);
    }
}
