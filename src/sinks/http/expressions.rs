//! Expressions that may ask for other rows' links: what they ask for is fetched, and they are run again.

use serde_json::Value;

use crate::datastore::{DatastoreError, GenericClient, Link, LinkKey, find_link, link_by_external};
use crate::mapping::{Links, MapError, Owed, Wanted};

/// An expression asks for one more link each time at the most; beyond this it asks without end.
const ROUNDS: usize = 1000;

/// Why there is no value.
#[derive(Debug)]
pub enum Unmapped {
    Waits(Wanted),
    Failed(String),
}

/// What one record's expressions have been answered.
pub struct Answers<'a> {
    system: &'a str,
    links: Links,
}

impl<'a> Answers<'a> {
    pub fn new(system: &'a str) -> Self {
        Answers { system, links: Links::default() }
    }

    /// Runs `expression` until all that it asks for has been answered.
    pub async fn run<C: GenericClient, T>(
        &mut self,
        client: &C,
        expression: impl Fn(&Links) -> Result<T, MapError>,
    ) -> Result<Result<T, Unmapped>, DatastoreError> {
        for _ in 0..ROUNDS {
            match expression(&self.links) {
                Ok(value) => return Ok(Ok(value)),
                Err(MapError::Waits(wanted)) => return Ok(Err(Unmapped::Waits(wanted))),
                Err(MapError::Failed(reason)) => return Ok(Err(Unmapped::Failed(reason))),
                Err(MapError::Needs(wanted)) => {
                    for wanted in wanted {
                        self.fetch(client, wanted).await?;
                    }
                }
            }
        }
        Ok(Err(Unmapped::Failed(format!("the expression asked for other links more than {ROUNDS} times"))))
    }

    /// What `link_later(…)` was asked for so far, and was not there.
    pub fn owed(&self) -> &[Owed] {
        self.links.owed()
    }

    /// The same answers, but without the links that were not there at another time.
    pub fn without(&self, owed: &[Owed]) -> Self {
        let mut links = self.links.clone();
        owed.iter().for_each(|(object, key)| links.put_later(object, key, None));
        Answers { system: self.system, links }
    }

    async fn link<C: GenericClient>(
        &self,
        client: &C,
        object: &str,
        key: &Value,
    ) -> Result<Option<Value>, DatastoreError> {
        let link = LinkKey { system: self.system.to_owned(), object: object.to_owned(), key: key.clone() };
        Ok(find_link(client, &link).await?.filter(is_settled).and_then(|link| link.shown()))
    }

    async fn fetch<C: GenericClient>(&mut self, client: &C, wanted: Wanted) -> Result<(), DatastoreError> {
        match wanted {
            Wanted::Link { object, key } => {
                let answer = self.link(client, &object, &key).await?;
                self.links.put_link(&object, &key, answer);
            }
            Wanted::Later { object, key } => {
                let answer = self.link(client, &object, &key).await?;
                self.links.put_later(&object, &key, answer);
            }
            Wanted::Local { object, id } => {
                let link = link_by_external(client, self.system, &object, &id, false).await?;
                let answer = link.filter(|link| !link.deleted).map(|link| local_key(&link.key.key));
                self.links.put_local(&object, &id, answer);
            }
        }
        Ok(())
    }
}

/// The counterpart is there, and no step of its create is under way.
fn is_settled(link: &Link) -> bool {
    !link.deleted
        && link.intent.as_ref().is_none_or(|intent| intent.operation == "update" || intent.operation == "delete")
}

/// The one value of a key of one column, else the key.
fn local_key(key: &Value) -> Value {
    match key.as_object() {
        Some(columns) if columns.len() == 1 => columns.values().next().cloned().unwrap_or_default(),
        _ => key.clone(),
    }
}
