//! Pull: from a record and the row it is linked to, to what is to be written, kept or held.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};

use super::same;

/// What happens to a column that both sides have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// The record waits until the row's change has been sent, or a person decides.
    Hold,
    Upstream,
    Datastore,
    /// Each column by its owner.
    Merge,
    /// The later one; within the clocks' skew the record is held.
    Newest,
}

crate::choices!(Conflict {
    "hold" => Conflict::Hold,
    "upstream" => Conflict::Upstream,
    "datastore" => Conflict::Datastore,
    "merge" => Conflict::Merge,
    "newest" => Conflict::Newest,
});

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Upstream,
    Datastore,
}

crate::choices!(Owner { "upstream" => Owner::Upstream, "datastore" => Owner::Datastore });

#[derive(Clone, Debug)]
pub struct Policy {
    pub conflict: Conflict,
    /// For `merge`; a column without an owner is upstream's. An owner decides also where only the other side
    /// changed a column: its change is undone.
    pub owner: BTreeMap<String, Owner>,
    /// For `newest`: how far the two clocks may be apart.
    pub skew: Duration,
}

/// A record and its row. All members are columns, in the table's own form.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    /// What the record maps to.
    pub incoming: &'a Map<String, Value>,
    /// What the record last seen maps to; `None` for a record that was never seen.
    pub incoming_base: Option<&'a Map<String, Value>>,
    /// The row as it is.
    pub row: &'a Map<String, Value>,
    /// The row as last agreed; columns that were never agreed on are not there.
    pub row_base: Option<&'a Map<String, Value>>,
    /// When each side was changed, for `newest`.
    pub incoming_time: Option<SystemTime>,
    pub row_time: Option<SystemTime>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// `columns` are to be written (none: the row is as it should be). `agreed` is what the base of the row becomes
    /// for these columns: the state that the other side is known to have, so that the sink sends what differs.
    Row { columns: Map<String, Value>, agreed: Map<String, Value> },
    /// Both sides changed these columns.
    Hold { columns: Vec<String> },
}

pub fn what_to_write(side: &Incoming<'_>, policy: &Policy) -> Write {
    let (mut columns, mut agreed, mut held) = (Map::new(), Map::new(), Vec::new());
    for (name, value) in side.incoming {
        let row = side.row.get(name).unwrap_or(&Value::Null);
        if same(value, row) {
            agreed.insert(name.clone(), value.clone());
            continue;
        }
        let moved = side.incoming_base.and_then(|base| base.get(name)).is_none_or(|base| !same(base, value));
        if !moved {
            // The record says what it said: the row's own change, or what the mapping loses.
            continue;
        }
        // A column that was never agreed on has nothing to lose but what differs.
        let touched = side.row_base.and_then(|base| base.get(name)).is_none_or(|base| !same(base, row));
        match decide(name, touched, side, policy) {
            Some(Owner::Upstream) => {
                columns.insert(name.clone(), value.clone());
                agreed.insert(name.clone(), value.clone());
            }
            Some(Owner::Datastore) => {
                agreed.insert(name.clone(), value.clone());
            }
            None => held.push(name.clone()),
        }
    }
    if held.is_empty() { Write::Row { columns, agreed } } else { Write::Hold { columns: held } }
}

/// Who wins a column that the record changed; `touched`: the row changed it too. `None`: nobody, hold.
fn decide(name: &str, touched: bool, side: &Incoming<'_>, policy: &Policy) -> Option<Owner> {
    if policy.conflict == Conflict::Merge {
        return Some(policy.owner.get(name).copied().unwrap_or(Owner::Upstream));
    }
    if !touched {
        return Some(Owner::Upstream);
    }
    match policy.conflict {
        Conflict::Hold | Conflict::Merge => None,
        Conflict::Upstream => Some(Owner::Upstream),
        Conflict::Datastore => Some(Owner::Datastore),
        Conflict::Newest => {
            let (incoming, row) = (side.incoming_time?, side.row_time?);
            let (later, apart) = match incoming.duration_since(row) {
                Ok(apart) => (Owner::Upstream, apart),
                Err(error) => (Owner::Datastore, error.duration()),
            };
            (apart > policy.skew).then_some(later)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn decided(policy: Conflict, incoming: Value, incoming_base: Value, row: Value, row_base: Value) -> Write {
        let owner = BTreeMap::from([("mine".to_owned(), Owner::Datastore)]);
        let policy = Policy { conflict: policy, owner, skew: Duration::from_secs(2) };
        let side = Incoming {
            incoming: &map(incoming),
            incoming_base: Some(&map(incoming_base)),
            row: &map(row),
            row_base: Some(&map(row_base)),
            incoming_time: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(100)),
            row_time: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(50)),
        };
        what_to_write(&side, &policy)
    }

    #[test]
    fn a_change_on_one_side_is_kept_whatever_the_policy() {
        for policy in [Conflict::Hold, Conflict::Upstream, Conflict::Datastore, Conflict::Newest] {
            let write = decided(
                policy,
                json!({"a": 2, "b": 1}),
                json!({"a": 1, "b": 1}),
                json!({"a": 1, "b": 9}),
                json!({"a": 1, "b": 1}),
            );
            let Write::Row { columns, agreed } = write else { panic!("{policy:?} held it") };
            assert_eq!((columns, agreed), (map(json!({"a": 2})), map(json!({"a": 2}))), "{policy:?}");
        }
    }

    #[test]
    fn a_change_on_both_sides_goes_by_the_policy() {
        let both = |policy| decided(policy, json!({"a": 2}), json!({"a": 1}), json!({"a": 3}), json!({"a": 1}));
        assert_eq!(both(Conflict::Hold), Write::Hold { columns: vec!["a".into()] });
        assert_eq!(
            both(Conflict::Upstream),
            Write::Row { columns: map(json!({"a": 2})), agreed: map(json!({"a": 2})) }
        );
        assert_eq!(both(Conflict::Datastore), Write::Row { columns: Map::new(), agreed: map(json!({"a": 2})) });
        assert_eq!(both(Conflict::Newest), both(Conflict::Upstream));
        let write = decided(
            Conflict::Merge,
            json!({"mine": 2, "theirs": 2}),
            json!({"mine": 1, "theirs": 1}),
            json!({"mine": 1, "theirs": 3}),
            json!({"mine": 1, "theirs": 1}),
        );
        assert_eq!(
            write,
            Write::Row { columns: map(json!({"theirs": 2})), agreed: map(json!({"mine": 2, "theirs": 2})) }
        );
    }

    #[test]
    fn both_sides_alike_are_agreed_and_not_written() {
        let write = decided(Conflict::Hold, json!({"a": 5}), json!({"a": 1}), json!({"a": 5.0}), json!({"a": 2}));
        assert_eq!(write, Write::Row { columns: Map::new(), agreed: map(json!({"a": 5})) });
    }
}
