//! Counting how often a link goes back and forth: two rules that undo each other's work (a trigger here, a
//! normalisation there) would otherwise keep both systems busy forever (CORRECTNESS 14).
//!
//! Rules that undo each other come back to values they had before; people, and systems that count something, go on to
//! new ones. So what is counted strictly is the change of direction that writes what was written before in that
//! direction; other changes of direction only stop a loop that makes a new value each time.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::equal::plain;

/// Which way a link was last written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// A row to the system.
    Push,
    /// A record to the table.
    Pull,
}

/// A link that has come back to earlier values more often than this, without a pause, is parked or held.
pub const MAX_RETURNS: u32 = 20;
/// The same of one that has changed direction so often, whatever it wrote.
pub const MAX_TURNS: u32 = 1000;
/// After so long without a write a link starts to count anew, seconds.
const QUIET_S: f64 = 600.0;
/// Writes that are remembered, of both directions.
const REMEMBERED: usize = 16;

/// How a link went back and forth since its last pause.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Turns {
    last: Option<Direction>,
    turns: u32,
    returns: u32,
    /// Digests of the last writes, oldest first.
    seen: VecDeque<u64>,
}

impl Turns {
    /// As kept in a link; what can't be read counts anew.
    pub fn of(kept: Option<&Value>) -> Self {
        kept.and_then(|kept| serde_json::from_value(kept.clone()).ok()).unwrap_or_default()
    }

    pub fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// After a write of `what` in `direction`, `quiet_s` seconds after the one before.
    pub fn after(mut self, direction: Direction, what: &Value, quiet_s: f64) -> Self {
        if quiet_s > QUIET_S {
            self = Turns::default();
        }
        let digest = digest(direction, what);
        if self.last.is_some_and(|last| last != direction) {
            self.turns = self.turns.saturating_add(1);
            if self.seen.contains(&digest) {
                self.returns = self.returns.saturating_add(1);
            }
        }
        self.last = Some(direction);
        self.seen.retain(|seen| *seen != digest);
        self.seen.push_back(digest);
        while self.seen.len() > REMEMBERED {
            self.seen.pop_front();
        }
        self
    }

    pub fn is_fight(&self) -> bool {
        self.returns > MAX_RETURNS || self.turns > MAX_TURNS
    }
}

/// FNV-1a, the same for what means the same, in every release: it is kept.
fn digest(direction: Direction, what: &Value) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    add(&mut hash, if direction == Direction::Push { "push" } else { "pull" });
    write(&mut hash, what);
    hash
}

fn add(hash: &mut u64, text: &str) {
    for byte in text.bytes().chain([0xff]) {
        *hash = (*hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
}

fn write(hash: &mut u64, value: &Value) {
    match value {
        Value::Object(members) => {
            add(hash, "{");
            let mut sorted: Vec<_> = members.iter().collect();
            sorted.sort_by_key(|(name, _)| *name);
            for (name, value) in sorted {
                add(hash, name);
                write(hash, value);
            }
            add(hash, "}");
        }
        Value::Array(items) => {
            add(hash, "[");
            items.iter().for_each(|item| write(hash, item));
            add(hash, "]");
        }
        Value::Number(number) => add(hash, &plain(number)),
        other => add(hash, &other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A push and a pull in turn, of what `values` gives for each.
    fn alternating(times: i64, quiet_s: f64, values: impl Fn(i64) -> (Value, Value)) -> Turns {
        let mut turns = Turns::default();
        for time in 0..times {
            let (push, pull) = values(time);
            turns = turns.after(Direction::Push, &push, quiet_s).after(Direction::Pull, &pull, quiet_s);
            turns = Turns::of(Some(&turns.to_value()));
        }
        turns
    }

    #[test]
    fn rules_that_undo_each_other_are_a_fight_and_edits_are_not() {
        let fight =
            |times| alternating(times, 1.0, |_| (json!({"name": "ANN"}), json!({"name": "Ann", "price": 9.90})));
        assert!(!fight(11).is_fight());
        assert!(fight(12).is_fight(), "{:?}", fight(12));
        // Three rules in a ring, and values spelled in another way.
        let ring = alternating(30, 1.0, |time| (json!({"a": time % 3, "b": 1}), json!({"b": 1.0, "a": time % 3})));
        assert!(ring.is_fight());
        let spelled = |time| if time % 2 == 0 { json!({"a": 1, "b": 9.90}) } else { json!({"b": 9.9, "a": 1.0}) };
        assert!(alternating(12, 1.0, |time| (spelled(time), json!({"a": 0}))).is_fight());
        // As fast, and of new values each time.
        assert!(!alternating(400, 1.0, |time| (json!({"stock": time}), json!({"stock": 1000 - time}))).is_fight());
        assert!(
            !alternating(400, 1.0, |time| (json!({"stock": time}), json!({"state": "sold", "at": time}))).is_fight()
        );
        // One side says the same again and again, the other never: nobody is undone by both. It is still counted.
        assert!(alternating(30, 1.0, |time| (json!({"a": 1}), json!({"a": time + 2}))).is_fight());
        // A loop that makes a new value each time ends, too.
        assert!(alternating(501, 1.0, |time| (json!({"n": time}), json!({"n": time}))).is_fight());
    }

    #[test]
    fn writes_in_one_direction_do_not_count_and_a_pause_forgets_them() {
        let mut turns = Turns::default();
        for _ in 0..100 {
            turns = turns.after(Direction::Push, &json!({"a": 1}), 1.0);
        }
        assert!(!turns.is_fight());
        assert!(!alternating(100, 601.0, |_| (json!({"a": 1}), json!({"a": 2}))).is_fight());
    }
}
