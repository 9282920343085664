//! Which schema may follow which, as Confluent's registry decides it: the reader of the one has to understand
//! everything the writer of the other may write.

use std::fmt;
use std::str::FromStr;

use apache_avro::Schema;
use apache_avro::schema_compatibility::{Compatibility, SchemaCompatibility};

/// How a subject's schemas may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompatibilityLevel {
    None,
    /// Readers of the new schema understand what was written by the last one. Confluent's default.
    #[default]
    Backward,
    /// … by all before it.
    BackwardTransitive,
    /// Readers of the last schema understand what is written by the new one.
    Forward,
    ForwardTransitive,
    Full,
    FullTransitive,
}

const NAMES: [(CompatibilityLevel, &str); 7] = [
    (CompatibilityLevel::None, "NONE"),
    (CompatibilityLevel::Backward, "BACKWARD"),
    (CompatibilityLevel::BackwardTransitive, "BACKWARD_TRANSITIVE"),
    (CompatibilityLevel::Forward, "FORWARD"),
    (CompatibilityLevel::ForwardTransitive, "FORWARD_TRANSITIVE"),
    (CompatibilityLevel::Full, "FULL"),
    (CompatibilityLevel::FullTransitive, "FULL_TRANSITIVE"),
];

impl fmt::Display for CompatibilityLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES.iter().find(|(level, _)| level == self).map_or("NONE", |(_, name)| name))
    }
}

impl FromStr for CompatibilityLevel {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let known = NAMES.iter().find(|(_, name)| name.eq_ignore_ascii_case(text));
        known.map(|(level, _)| *level).ok_or(())
    }
}

impl CompatibilityLevel {
    /// Is every version before looked at, or only the last?
    pub fn is_transitive(self) -> bool {
        use CompatibilityLevel::{BackwardTransitive, ForwardTransitive, FullTransitive};
        matches!(self, BackwardTransitive | ForwardTransitive | FullTransitive)
    }

    fn backward(self) -> bool {
        use CompatibilityLevel::{Backward, BackwardTransitive, Full, FullTransitive};
        matches!(self, Backward | BackwardTransitive | Full | FullTransitive)
    }

    fn forward(self) -> bool {
        use CompatibilityLevel::{Forward, ForwardTransitive, Full, FullTransitive};
        matches!(self, Forward | ForwardTransitive | Full | FullTransitive)
    }
}

/// Why `new` may not follow `old`; empty where it may.
pub(super) fn breaks(level: CompatibilityLevel, new: &Schema, old: &Schema, old_version: i32) -> Vec<String> {
    let mut reasons = Vec::new();
    let mut read = |writer: &Schema, reader: &Schema, says: &str| {
        match SchemaCompatibility::can_read(writer, reader) {
            Ok(Compatibility::Full) => {}
            // Some of what may be written can't be read: a lost enum symbol, a lost branch of a union.
            Ok(Compatibility::Partial) => reasons.push(format!("{says} version {old_version} only in part")),
            Err(error) => reasons.push(format!("{says} version {old_version}: {error}")),
        }
    };
    if level.backward() {
        read(old, new, "the new schema cannot read data of");
    }
    if level.forward() {
        read(new, old, "data of the new schema cannot be read with");
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(fields: &str) -> Schema {
        Schema::parse_str(&format!(r#"{{"type":"record","name":"Value","namespace":"shop","fields":[{fields}]}}"#))
            .unwrap()
    }

    fn allows(level: CompatibilityLevel, old: &Schema, new: &Schema) -> bool {
        breaks(level, new, old, 1).is_empty()
    }

    #[test]
    fn columns_come_and_go_as_confluent_allows_it() {
        use CompatibilityLevel::{Backward, Forward, Full};
        let id = r#"{"name":"id","type":"int"}"#;
        let old = row(id);
        let optional = row(&format!(r#"{id},{{"name":"note","type":["null","string"],"default":null}}"#));
        let required = row(&format!(r#"{id},{{"name":"note","type":"string"}}"#));
        assert!(allows(Backward, &old, &optional) && allows(Forward, &old, &optional) && allows(Full, &old, &optional));
        assert!(!allows(Backward, &old, &required), "a reader has no value for what was not written");
        assert!(allows(Forward, &old, &required));
        assert!(allows(Backward, &required, &old), "a dropped column is not read");
        assert!(!allows(Forward, &required, &old));
        assert!(!allows(Full, &required, &old));
    }

    #[test]
    fn types_widen_and_do_not_narrow() {
        let (int, long) = (row(r#"{"name":"id","type":"int"}"#), row(r#"{"name":"id","type":"long"}"#));
        assert!(allows(CompatibilityLevel::Backward, &int, &long));
        assert!(!allows(CompatibilityLevel::Backward, &long, &int));
        assert!(allows(CompatibilityLevel::None, &long, &int));
        let text = row(r#"{"name":"id","type":["null","string"]}"#);
        let not_null = row(r#"{"name":"id","type":"string"}"#);
        assert!(allows(CompatibilityLevel::Backward, &not_null, &text));
        assert!(!allows(CompatibilityLevel::Backward, &text, &not_null), "null may have been written");
    }

    #[test]
    fn levels_are_read_as_they_are_shown() {
        for (level, name) in NAMES {
            assert_eq!((name.parse(), level.to_string()), (Ok(level), name.to_owned()));
        }
        assert!("SIDEWAYS".parse::<CompatibilityLevel>().is_err());
    }
}
