//! The settings of a pull's target: table, mapping, pairing, and whose value wins.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use crate::config::{ConfigError, Section, Spanned};
use crate::datastore::TableName;
use crate::mapping::{Compiler, Program};
use crate::twoway::{Conflict, Owner, Policy};

pub struct TableSettings {
    pub into: TableName,
    /// Columns that tell rows apart; `None`: the primary key.
    pub key: Option<Vec<String>>,
    /// False: records without a row stay where they are.
    pub insert: bool,
    /// Columns by which a record without a link finds a row that is already there.
    pub match_columns: Vec<String>,
    pub policy: Policy,
    /// For `conflict: newest`.
    pub newest: Option<Newest>,
    /// Of the record: its id in the system.
    pub id: Program,
    /// Of the record: whether it is wanted at all.
    pub when: Option<Program>,
    /// Of the record: the columns. A column that is missing is left alone, null is written.
    pub map: Program,
    /// Of the record: facts kept in the link.
    pub keep: Option<Program>,
    /// Of the record: a text or number that rises with every change of it.
    pub version: Option<Program>,
    /// Whether the row is linked with the record. False where a row is found through another row's link.
    pub link: bool,
    /// Where copies of parked records go.
    pub dead_letter_topic: Option<String>,
    pub lock_timeout: Duration,
    /// How soon a record that was held is tried again.
    pub held_retry: Duration,
}

/// When each side was changed.
pub struct Newest {
    /// Of the record: an ISO time.
    pub record: Program,
    /// Of the row: a timestamp.
    pub column: String,
    /// How far the two clocks may be apart.
    pub skew: Duration,
}

impl TableSettings {
    /// Takes `into`, `key`, `insert`, `match`, `conflict`, `owner`, `newest`, `id`, `when`, `map`, `keep`, `version`,
    /// `link`, `lock.timeout`, `held.retry`.
    pub fn read(section: &mut Section, compiler: &Compiler, object: &str) -> Result<Self, ConfigError> {
        let into: Spanned<String> = section.require("into")?;
        let into = TableName::from_str(&into).map_err(|error| ConfigError::new(&into.place, error.to_string()))?;
        let map: Spanned<String> = section.require("map")?;
        let program = |text: Option<Spanned<String>>| text.map(|text| compiler.jq(&text)).transpose();
        let id: Option<Spanned<String>> = section.take("id")?;
        let default_id = || Spanned::new(".id".to_owned(), section.place().clone());
        let id = compiler.jq(&id.unwrap_or_else(default_id))?;
        let link = match section.take("link")? {
            Some(link) => link,
            None => !asks_for_local(&map, object),
        };
        let owner: Option<BTreeMap<String, Owner>> = section.take("owner")?;
        let conflict: Option<Spanned<Conflict>> = section.take("conflict")?;
        let conflict = match (conflict.map(|conflict| conflict.value), &owner) {
            (Some(Conflict::Merge), None) => {
                return Err(section
                    .error("conflict", "`conflict: merge` needs `owner`")
                    .hint("for example `owner: { email: upstream, name: datastore }`"));
            }
            (None | Some(Conflict::Merge), Some(_)) => Conflict::Merge,
            (Some(_), Some(_)) => return Err(section.error("owner", "`owner` goes with `conflict: merge` only")),
            (conflict, None) => conflict.unwrap_or(Conflict::Hold),
        };
        let newest = match (section.section("newest")?, conflict == Conflict::Newest) {
            (None, false) => None,
            (None, true) => {
                return Err(section
                    .error("conflict", "`conflict: newest` needs `newest`: when each side was changed")
                    .hint("newest: { record: .updated_at, column: updated_at }"));
            }
            (Some(_), false) => return Err(section.error("newest", "`newest` goes with `conflict: newest` only")),
            (Some(mut inner), true) => {
                let newest = Newest {
                    record: compiler.jq(&inner.require("record")?)?,
                    column: inner.require("column")?,
                    skew: inner.or("skew", Duration::from_secs(2))?,
                };
                inner.finish()?;
                Some(newest)
            }
        };
        let skew = newest.as_ref().map_or(Duration::ZERO, |newest| newest.skew);
        let policy = Policy { conflict, owner: owner.unwrap_or_default(), skew };
        let key: Option<Vec<String>> = section.take("key")?;
        if key.as_ref().is_some_and(Vec::is_empty) {
            return Err(section.error("key", "`key` must name at least one column"));
        }
        Ok(TableSettings {
            key,
            insert: section.or("insert", true)?,
            match_columns: section.or("match.columns", Vec::new())?,
            policy,
            newest,
            id,
            when: program(section.take("when")?)?,
            keep: program(section.take("keep")?)?,
            version: program(section.take("version")?)?,
            map: compiler.jq(&map)?,
            link,
            dead_letter_topic: section.take("errors.deadletterqueue.topic.name")?,
            lock_timeout: section.or("lock.timeout", Duration::from_secs(2))?.max(Duration::from_millis(1)),
            held_retry: section.or("held.retry", Duration::from_secs(10))?,
            into,
        })
    }

    /// Columns that the settings name, so that a wrong name is told before anything runs.
    pub fn named_columns(&self) -> impl Iterator<Item = &String> {
        self.key
            .iter()
            .flatten()
            .chain(&self.match_columns)
            .chain(self.policy.owner.keys())
            .chain(self.newest.iter().map(|newest| &newest.column))
    }
}

/// A map that finds its row by the object's own link writes to a row beside the linked one: `local("product"; .id)`.
fn asks_for_local(map: &str, object: &str) -> bool {
    let dense: String = map.chars().filter(|character| !character.is_whitespace()).collect();
    dense.contains(&format!("local(\"{object}\";"))
}
