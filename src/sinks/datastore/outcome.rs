//! What becomes of one record of a page.

use serde_json::{Map, Value, json};

use super::mapped::Mapped;
use crate::datastore::Link;

/// Decided, under the locks; not written yet.
pub enum Outcome {
    Insert {
        mapped: Mapped,
        values: Map<String, Value>,
    },
    /// `set` may be empty: then only the link is written, where it has news.
    Update {
        mapped: Mapped,
        key: Map<String, Value>,
        set: Map<String, Value>,
        /// What is agreed on from now on, by column.
        base: Map<String, Value>,
        link: Option<Link>,
        /// The row and the record were not linked before.
        paired: bool,
    },
    Skip {
        mapped: Mapped,
        why: &'static str,
    },
    Hold {
        mapped: Mapped,
        why: String,
    },
    Reject {
        mapped: Mapped,
        why: String,
    },
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    Written,
    Unchanged,
    Parked,
    Held,
}

impl Outcome {
    /// For `preview`.
    pub fn to_json(&self) -> Value {
        match self {
            Outcome::Insert { mapped, values } => json!({ "do": "insert", "id": mapped.id, "row": values }),
            Outcome::Update { mapped, key, set, paired, .. } => {
                let what = match (set.is_empty(), paired) {
                    (true, true) => "pair",
                    (true, false) => "nothing",
                    (false, true) => "pair and update",
                    (false, false) => "update",
                };
                json!({ "do": what, "id": mapped.id, "key": key, "set": set })
            }
            Outcome::Skip { mapped, why } => json!({ "do": "nothing", "id": mapped.id, "why": why }),
            Outcome::Hold { mapped, why } => json!({ "do": "hold", "id": mapped.id, "why": why }),
            Outcome::Reject { mapped, why } => json!({ "do": "park", "id": mapped.id, "why": why }),
        }
    }
}
