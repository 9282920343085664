//! Dead letters: rejected records, parked in the datastore until a person acts. A replay or a drop is asked for
//! here and carried out by the connector that owns the record's partition.

use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

use super::resources::Resources;
use crate::datastore::{self, Command, Datastore, DatastoreError, ParkedSummary};
use crate::registry::EventDecoder;

pub use crate::datastore::Command as Verdict;

/// `TOPIC:PARTITION:OFFSET`, as lists print it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetterId {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
}

impl DeadLetterId {
    pub fn of(letter: &ParkedSummary) -> Self {
        DeadLetterId { topic: letter.topic.clone(), partition: letter.partition, offset: letter.offset }
    }
}

impl fmt::Display for DeadLetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.topic, self.partition, self.offset)
    }
}

impl FromStr for DeadLetterId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' names no dead letter. hint: it is TOPIC:PARTITION:OFFSET, as lists print it");
        let mut parts = text.rsplitn(3, ':');
        let offset = parts.next().and_then(|part| part.parse().ok()).ok_or_else(wrong)?;
        let partition = parts.next().and_then(|part| part.parse().ok()).ok_or_else(wrong)?;
        let topic = parts.next().filter(|part| !part.is_empty()).ok_or_else(wrong)?;
        Ok(DeadLetterId { topic: topic.to_owned(), partition, offset })
    }
}

pub async fn list(
    datastore: &Datastore,
    connector: Option<&str>,
    limit: i64,
) -> Result<Vec<ParkedSummary>, DatastoreError> {
    let client = datastore.client().await?;
    if !datastore::has_parked(&client).await? {
        return Ok(Vec::new());
    }
    datastore::list_parked(&client, connector, limit).await
}

/// A list of them as JSON, each with the `id` by which it is asked for.
pub fn as_json(letters: &[ParkedSummary]) -> Vec<Value> {
    letters.iter().map(one_as_json).collect()
}

fn one_as_json(letter: &ParkedSummary) -> Value {
    let mut shown = serde_json::to_value(letter).unwrap_or_default();
    if let Value::Object(fields) = &mut shown {
        fields.insert("id".into(), json!(DeadLetterId::of(letter).to_string()));
    }
    shown
}

/// The letter with its record decoded, as JSON.
pub async fn show(resources: &Resources, connector: &str, id: &DeadLetterId) -> Result<Option<Value>, DatastoreError> {
    let client = resources.datastore.client().await?;
    if !datastore::has_parked(&client).await? {
        return Ok(None);
    }
    let found = datastore::show_parked(&client, connector, &id.topic, id.partition, id.offset).await?;
    let Some(parked) = found else { return Ok(None) };
    let decoder = EventDecoder::new(resources.registry.clone());
    let value = match &parked.record.value {
        // A record that a pull parked is JSON as the system gave it; an event's first byte is 0.
        Some(json) if json.first() != Some(&0) => {
            serde_json::from_slice(json).unwrap_or_else(|error| json!({ "undecodable": error.to_string() }))
        }
        Some(wire) => decoder.value(wire).await.unwrap_or_else(|error| json!({ "undecodable": error.to_string() })),
        None => Value::Null,
    };
    let mut shown = one_as_json(&parked.summary);
    if let Value::Object(fields) = &mut shown {
        fields.insert("record".into(), value);
    }
    Ok(Some(shown))
}

/// Asks for it; says for how many. All of the connector when no one letter is named.
pub async fn judge(
    datastore: &Datastore,
    connector: &str,
    id: Option<&DeadLetterId>,
    verdict: Command,
) -> Result<u64, DatastoreError> {
    let one = id.map(|id| (id.topic.as_str(), id.partition, id.offset));
    let client = datastore.client().await?;
    if !datastore::has_parked(&client).await? {
        return Ok(0);
    }
    datastore::command_parked(&client, connector, one, verdict).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_and_a_wrong_one_is_explained() {
        let id = DeadLetterId { topic: "shop.public.odd:name".into(), partition: 3, offset: 12 };
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in ["", "topic", "topic:1", "topic:1:x", ":1:2", "topic:x:2"] {
            assert!(wrong.parse::<DeadLetterId>().unwrap_err().contains("TOPIC:PARTITION:OFFSET"), "{wrong}");
        }
    }
}
