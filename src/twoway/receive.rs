//! Pull: from a record and the row it is linked to, to what is to be written, kept or held.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};

use super::{SentColumns, same};

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
    /// What was sent since the record was last seen.
    pub sent: &'a SentColumns,
    /// When each side was changed, for `newest`.
    pub incoming_time: Option<SystemTime>,
    pub row_time: Option<SystemTime>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// `columns` are to be written (none: the row is as it should be). `agreed` is what the base of the row becomes
    /// for these columns: the state that the other side is known to have, so that the sink sends what differs. `again`:
    /// columns that the record has only moved for not having what was sent.
    Row { columns: Map<String, Value>, agreed: Map<String, Value>, again: Vec<String> },
    /// Both sides changed these columns.
    Hold { columns: Vec<String> },
}

pub fn what_to_write(side: &Incoming<'_>, policy: &Policy) -> Write {
    let (mut columns, mut agreed, mut held, mut again) = (Map::new(), Map::new(), Vec::new(), Vec::new());
    for (name, value) in side.incoming {
        let row = side.row.get(name).unwrap_or(&Value::Null);
        if same(value, row) {
            agreed.insert(name.clone(), value.clone());
            continue;
        }
        match moved(name, value, side) {
            // The record says what it said: the row's own change, or what the mapping or the system loses.
            Moved::No => continue,
            Moved::Yes => {}
            Moved::NotTaken => again.push(name.clone()),
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
    if held.is_empty() { Write::Row { columns, agreed, again } } else { Write::Hold { columns: held } }
}

enum Moved {
    No,
    Yes,
    /// It is as before a push.
    NotTaken,
}

/// Whether the record has changed a column, which is not as the row has it, since the two last met: in an answer to a
/// push, or when the record was last seen.
fn moved(name: &str, value: &Value, side: &Incoming<'_>) -> Moved {
    let than = |known: &Value| if same(known, value) { Moved::No } else { Moved::Yes };
    let sent = side.sent.get(name);
    if let Some(answered) = sent.and_then(|sent| sent.answered.as_ref()) {
        return than(answered);
    }
    // What was sent since the record was last seen, and is there: only the row has changed again. Not the record's
    // change, however many times both have moved, and no policy is asked.
    if side.row_base.and_then(|base| base.get(name)).is_some_and(|agreed| same(agreed, value)) {
        return Moved::No;
    }
    match side.incoming_base.and_then(|base| base.get(name)).map_or(Moved::Yes, than) {
        Moved::No => {}
        moved => return moved,
    }
    // Sent, and not there: put back, or not taken. Not where what is agreed is as it was before, nor where it is unknown
    // until everything has been sent again.
    let (Some(sent), Some(agreed)) = (sent, side.row_base.and_then(|base| base.get(name))) else { return Moved::No };
    let tried_before = || sent.tried.as_ref().is_some_and(|tried| same(&tried[0], agreed) && same(&tried[1], value));
    if same(agreed, &sent.was) || tried_before() { Moved::No } else { Moved::NotTaken }
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
    use crate::twoway::SentColumn;

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
            sent: &SentColumns::new(),
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
            let Write::Row { columns, agreed, .. } = write else { panic!("{policy:?} held it") };
            assert_eq!((columns, agreed), (map(json!({"a": 2})), map(json!({"a": 2}))), "{policy:?}");
        }
    }

    #[test]
    fn a_change_on_both_sides_goes_by_the_policy() {
        let both = |policy| decided(policy, json!({"a": 2}), json!({"a": 1}), json!({"a": 3}), json!({"a": 1}));
        assert_eq!(both(Conflict::Hold), Write::Hold { columns: vec!["a".into()] });
        assert_eq!(
            both(Conflict::Upstream),
            Write::Row { columns: map(json!({"a": 2})), agreed: map(json!({"a": 2})), again: vec![] }
        );
        assert_eq!(
            both(Conflict::Datastore),
            Write::Row { columns: Map::new(), agreed: map(json!({"a": 2})), again: vec![] }
        );
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
            Write::Row {
                columns: map(json!({"theirs": 2})),
                agreed: map(json!({"mine": 2, "theirs": 2})),
                again: vec![]
            }
        );
    }

    #[test]
    fn a_record_that_says_what_was_sent_has_not_changed_whatever_the_policy() {
        let nothing = Write::Row { columns: Map::new(), agreed: Map::new(), again: vec![] };
        for policy in [Conflict::Hold, Conflict::Upstream, Conflict::Datastore, Conflict::Merge, Conflict::Newest] {
            // Last seen as 1, sent 2, then the row became 3.
            let write = decided(policy, json!({"a": 2}), json!({"a": 1}), json!({"a": 3}), json!({"a": 2}));
            assert_eq!(write, nothing, "{policy:?}");
        }
    }

    /// Agreed on 1, then 2 was sent; the record says 1 again.
    fn put_back(conflict: Conflict, answered: Option<Value>, tried: Option<Value>, row: Value) -> Write {
        let sent = SentColumns::from([("a".to_owned(), SentColumn { was: json!(1), answered, tried })]);
        let policy = Policy { conflict, owner: BTreeMap::new(), skew: Duration::ZERO };
        let side = Incoming {
            incoming: &map(json!({"a": 1})),
            incoming_base: Some(&map(json!({"a": 1}))),
            row: &map(row),
            row_base: Some(&map(json!({"a": 2}))),
            sent: &sent,
            incoming_time: None,
            row_time: None,
        };
        what_to_write(&side, &policy)
    }

    #[test]
    fn what_was_sent_and_put_back_is_taken_and_what_the_system_did_not_take_is_not() {
        let hold = Conflict::Hold;
        let taken =
            |again: Vec<String>| Write::Row { columns: map(json!({"a": 1})), agreed: map(json!({"a": 1})), again };
        assert_eq!(put_back(hold, None, None, json!({"a": 2})), taken(vec!["a".into()]));
        assert_eq!(put_back(hold, Some(json!(2)), None, json!({"a": 2})), taken(vec![]));
        assert_eq!(put_back(hold, Some(json!(2)), None, json!({"a": 3})), Write::Hold { columns: vec!["a".into()] });
        let nothing = Write::Row { columns: Map::new(), agreed: Map::new(), again: vec![] };
        assert_eq!(put_back(hold, Some(json!(1)), None, json!({"a": 2})), nothing, "answered so: it is ignored");
        let again = Write::Row { columns: Map::new(), agreed: map(json!({"a": 1})), again: vec!["a".into()] };
        assert_eq!(put_back(Conflict::Datastore, None, None, json!({"a": 3})), again, "sent once more");
        assert_eq!(put_back(hold, None, Some(json!([2, 1])), json!({"a": 2})), nothing, "and not a third time");
    }

    #[test]
    fn both_sides_alike_are_agreed_and_not_written() {
        let write = decided(Conflict::Hold, json!({"a": 5}), json!({"a": 1}), json!({"a": 5.0}), json!({"a": 2}));
        assert_eq!(write, Write::Row { columns: Map::new(), agreed: map(json!({"a": 5})), again: vec![] });
    }
}
