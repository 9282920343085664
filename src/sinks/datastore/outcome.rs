//! What becomes of one record of a page.

use serde_json::{Map, Value, json};

use super::mapped::Mapped;
use crate::datastore::Link;

/// A record with what was decided about it under the locks; not written yet.
pub struct Decided {
    pub mapped: Mapped,
    pub verdict: Verdict,
}

pub enum Verdict {
    Insert {
        values: Map<String, Value>,
    },
    /// `set` may be empty: then only the link is written, where it has news.
    Update {
        key: Map<String, Value>,
        set: Map<String, Value>,
        /// What is agreed on from now on, by column.
        base: Map<String, Value>,
        /// Columns that the record has only moved for not having what was sent.
        again: Vec<String>,
        link: Option<Box<Link>>,
        /// The row and the record were not linked before.
        paired: bool,
    },
    Skip(&'static str),
    Hold {
        why: String,
        /// It is older than what is known of the record: only a new look at the system tells.
        behind: bool,
    },
    Reject(String),
}

impl Verdict {
    pub fn hold(why: impl Into<String>) -> Self {
        Verdict::Hold { why: why.into(), behind: false }
    }
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    Written,
    Unchanged,
    Parked,
    Held,
}

impl Decided {
    /// Without a link: the row is as the record says.
    pub fn is_nothing(&self) -> bool {
        !self.mapped.aside
            && match &self.verdict {
                Verdict::Update { set, link, .. } => set.is_empty() && link.is_none(),
                Verdict::Skip(_) => true,
                _ => false,
            }
    }

    /// For `preview`.
    pub fn to_json(&self) -> Value {
        let id = &self.mapped.id;
        match &self.verdict {
            Verdict::Insert { values } => json!({ "do": "insert", "id": id, "row": values }),
            Verdict::Update { key, set, paired, .. } => {
                let what = match (set.is_empty(), paired) {
                    (true, true) => "pair",
                    (true, false) => "nothing",
                    (false, true) => "pair and update",
                    (false, false) => "update",
                };
                json!({ "do": what, "id": id, "key": key, "set": set })
            }
            Verdict::Skip(why) => json!({ "do": "nothing", "id": id, "why": why }),
            Verdict::Hold { why, .. } => json!({ "do": "hold", "id": id, "why": why }),
            Verdict::Reject(why) => json!({ "do": "park", "id": id, "why": why }),
        }
    }
}
