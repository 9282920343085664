//! The tables a sink reads, resolved against the catalog; and which documents an event belongs to.

use serde_json::{Map, Value, json};

use super::settings::{SendMode, Settings};
use crate::datastore::{
    Datastore, DatastoreError, GenericClient, Lines, TableName, primary_key, query_document, read_document, read_row,
    root_of_line,
};
use crate::event::{Change, Operation};

pub enum Shape {
    Rows,
    Document {
        root: TableName,
        /// The column of the root's key that lines refer to.
        root_key: String,
        lines: Vec<Lines>,
        query: Option<String>,
    },
    Changes,
}

impl Shape {
    pub async fn resolve(settings: &Settings, datastore: &Datastore) -> Result<Self, DatastoreError> {
        let SendMode::Document { root, lines, query } = &settings.send else {
            return Ok(if matches!(settings.send, SendMode::Change) { Shape::Changes } else { Shape::Rows });
        };
        let client = datastore.client().await?;
        let root_key = primary_key(&client, root).await?;
        let [root_key] = root_key.as_slice() else {
            return Err(DatastoreError::setup(format!(
                "table {root} needs a primary key of one column to be the root of a document; it has {}",
                if root_key.is_empty() { "none, or is not there".to_owned() } else { root_key.join(", ") }
            )));
        };
        let mut resolved = Vec::new();
        for line in lines {
            let order = primary_key(&client, &line.table).await?;
            if order.is_empty() {
                return Err(DatastoreError::setup(format!(
                    "table {} needs a primary key to be a document's lines, or is not there",
                    line.table
                )));
            }
            resolved.push(Lines {
                name: line.name.clone(),
                table: line.table.clone(),
                column: line.column.clone(),
                order,
            });
        }
        Ok(Shape::Document { root: root.clone(), root_key: root_key.clone(), lines: resolved, query: query.clone() })
    }

    /// Table and keys of what a change is about: its own row, or the documents that the line is or was in.
    pub async fn keys<C: GenericClient>(
        &self,
        client: &C,
        (system, object): (&str, &str),
        change: &Change,
    ) -> Result<Vec<(TableName, Value)>, DatastoreError> {
        let table = TableName { schema: change.schema.clone(), name: change.table.clone() };
        let Shape::Document { root, root_key, lines, .. } = self else {
            return Ok(vec![(table, change.key.clone())]);
        };
        if table == *root {
            return Ok(vec![(table, change.key.clone())]);
        }
        let mut keys: Vec<Value> = Vec::new();
        for line in lines.iter().filter(|line| line.table == table) {
            let mut add = |value: &Value| {
                let key = json!({ root_key.as_str(): value });
                if !value.is_null() && !keys.contains(&key) {
                    keys.push(key);
                }
            };
            change.after.get(&line.column).map(&mut add);
            let before = change.before.get(&line.column);
            before.map(&mut add);
            // The event of a delete, or of a line that moved, often has no more than the line's key.
            if before.is_none_or(Value::is_null)
                && matches!(change.operation, Operation::Delete | Operation::Update)
                && let Some(root) = root_of_line(client, system, object, &table.to_string(), &change.key).await?
                && !keys.contains(&root)
            {
                keys.push(root);
            }
        }
        Ok(keys.into_iter().map(|key| (root.clone(), key)).collect())
    }

    /// `{key, after, …}` as it is now; `None` when the row is gone.
    pub async fn read<C: GenericClient>(
        &self,
        client: &C,
        table: &TableName,
        key: &Value,
    ) -> Result<Option<Value>, DatastoreError> {
        match self {
            Shape::Document { query: Some(query), .. } => query_document(client, query, key).await,
            Shape::Document { root, lines, query: None, .. } => read_document(client, root, key, lines).await,
            Shape::Rows | Shape::Changes => {
                Ok(read_row(client, table, key).await?.map(|row| json!({ "key": key, "after": row })))
            }
        }
    }

    /// Tables and keys of the lines in a document.
    pub fn line_keys(&self, document: &Value) -> Vec<(String, Value)> {
        let Shape::Document { lines, .. } = self else { return Vec::new() };
        let mut keys = Vec::new();
        for line in lines {
            for row in document.get(&line.name).and_then(Value::as_array).into_iter().flatten() {
                let columns = line.order.iter().filter_map(|column| Some((column.clone(), row.get(column)?.clone())));
                keys.push((line.table.to_string(), Value::Object(columns.collect::<Map<_, _>>())));
            }
        }
        keys
    }
}
