//! Delivery: from what a row maps to now, and what was last agreed, to what is to be sent.

use serde_json::{Map, Value};

use super::same;

/// What of a changed row is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fields {
    /// The members that differ; one that is no longer there as null.
    Changed,
    /// Everything, when anything differs.
    All,
}

crate::choices!(Fields { "changed" => Fields::Changed, "all" => Fields::All });

/// A link and its row, as far as the decision needs them.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// The link has a counterpart.
    pub linked: bool,
    /// The counterpart was deleted on behalf of this row.
    pub deleted: bool,
    /// Steps of the create that are done, and how many there are.
    pub steps_done: usize,
    pub steps: usize,
    /// What the document last agreed on maps to; `None` when it is not known.
    pub base: Option<&'a Value>,
    /// What the present document maps to; `None` when the row is gone.
    pub now: Option<&'a Value>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Send {
    /// Nothing differs that the system could hold; the present document becomes the base, or a difference too small
    /// to be sent would hold back pulls for ever.
    Nothing,
    /// The row is gone, and there is no counterpart to delete.
    NothingToDelete,
    /// Look for a counterpart, and make one where there is none.
    Create,
    /// The create's steps from this one on.
    Finish(usize),
    Update(Value),
    Delete,
}

pub fn what_to_send(state: &Outgoing<'_>, fields: Fields) -> Send {
    let Some(now) = state.now else {
        return if state.linked && !state.deleted { Send::Delete } else { Send::NothingToDelete };
    };
    if !state.linked || state.deleted {
        return Send::Create;
    }
    if state.steps_done < state.steps {
        return Send::Finish(state.steps_done);
    }
    match state.base {
        None => Send::Update(now.clone()),
        Some(base) if same(base, now) => Send::Nothing,
        Some(base) => Send::Update(match fields {
            Fields::All => now.clone(),
            Fields::Changed => difference(base, now),
        }),
    }
}

/// The members of `now` that differ from `base`, and null for those it no longer has. Anything but two objects
/// differs as a whole.
pub fn difference(base: &Value, now: &Value) -> Value {
    let (Value::Object(base), Value::Object(now)) = (base, now) else { return now.clone() };
    let mut changed = Map::new();
    for (name, value) in now {
        if !base.get(name).is_some_and(|old| same(old, value)) {
            changed.insert(name.clone(), value.clone());
        }
    }
    for name in base.keys().filter(|name| !now.contains_key(*name)) {
        changed.insert(name.clone(), Value::Null);
    }
    Value::Object(changed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const LINKED: Outgoing<'_> =
        Outgoing { linked: true, deleted: false, steps_done: 1, steps: 1, base: None, now: None };

    #[test]
    fn only_what_differs_is_sent() {
        let (base, now) = (json!({"a": 1, "b": 2, "c": 3}), json!({"a": 1.0, "b": 5}));
        let state = Outgoing { base: Some(&base), now: Some(&now), ..LINKED };
        assert_eq!(what_to_send(&state, Fields::Changed), Send::Update(json!({"b": 5, "c": null})));
        assert_eq!(what_to_send(&state, Fields::All), Send::Update(now.clone()));
        let state = Outgoing { base: None, ..state };
        assert_eq!(what_to_send(&state, Fields::Changed), Send::Update(now.clone()));
        let state = Outgoing { base: Some(&now), ..state };
        assert_eq!(what_to_send(&state, Fields::All), Send::Nothing);
    }

    #[test]
    fn a_row_is_created_once_finished_and_deleted_once() {
        let now = json!({});
        let fresh = Outgoing { linked: false, steps_done: 0, steps: 3, now: Some(&now), ..LINKED };
        assert_eq!(what_to_send(&fresh, Fields::Changed), Send::Create);
        assert_eq!(what_to_send(&Outgoing { now: None, ..fresh }, Fields::Changed), Send::NothingToDelete);
        let half = Outgoing { linked: true, steps_done: 2, ..fresh };
        assert_eq!(what_to_send(&half, Fields::Changed), Send::Finish(2));
        assert_eq!(what_to_send(&LINKED, Fields::Changed), Send::Delete);
        let deleted = Outgoing { deleted: true, ..LINKED };
        assert_eq!(what_to_send(&deleted, Fields::Changed), Send::NothingToDelete);
        assert_eq!(what_to_send(&Outgoing { now: Some(&now), ..deleted }, Fields::Changed), Send::Create);
    }
}
