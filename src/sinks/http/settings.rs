//! Settings of an `http-sink`.

use std::sync::Arc;
use std::time::Duration;

use crate::config::{ConfigError, Node, NodeKind, Section, Spanned};
use crate::datastore::TableName;
use crate::mapping::{Compiler, Program};
use crate::sources::log::Batching;
use crate::systems::{RequestTemplate, System};
use crate::twoway::Fields;

pub struct Settings {
    pub system: Arc<System>,
    /// The kind of record in the system; links belong to (system, object).
    pub object: String,
    pub topics: Vec<String>,
    pub send: SendMode,
    /// Rows it does not hold for are left alone.
    pub when: Option<Program>,
    /// Document to body; without it, `.after`.
    pub map: Option<Program>,
    /// Finds the counterpart of a row without a link.
    pub matching: Option<RequestTemplate>,
    /// Steps; empty: nothing is created.
    pub create: Vec<Step>,
    pub update: Update,
    pub delete: Option<RequestTemplate>,
    /// Update and delete can be sent again with their idempotency keys.
    pub idempotent: Idempotent,
    pub fields: Fields,
    pub initial: Initial,
    /// With `send: change`: events that a pull from the system wrote are sent, too.
    pub echo: bool,
    pub batching: Batching,
    /// Keys in work at the same time, at the most; the system's budget may allow fewer.
    pub concurrency: usize,
    /// `None`: `dead.<connector>`.
    pub dead_letter_topic: Option<String>,
    /// How long one record is tried again, and how often, before it is a dead letter.
    pub retry_for: Duration,
    pub retries: u32,
    /// How long a record waits for another row's link before it is a dead letter.
    pub link_timeout: Duration,
    /// After a request without an answer: how long until the system is asked what became of it.
    pub settle: Duration,
}

/// What an event makes the sink send.
#[derive(Clone, Debug)]
pub enum SendMode {
    /// The row as it is now.
    Row,
    /// The root row as it is now with its lines, or what a query says of it.
    Document { root: TableName, lines: Vec<LineSource>, query: Option<String> },
    /// The event itself, once per event, without a link.
    Change,
}

/// One request of a create.
pub struct Step {
    pub request: RequestTemplate,
    /// Asked when the request had no answer: whether the step is done. Without it the request is sent again.
    pub done: Option<Done>,
    /// The request can be sent again with its idempotency key.
    pub idempotent: bool,
}

/// Requests that carry an idempotency key.
#[derive(Clone, Copy, Debug, Default)]
pub struct Idempotent {
    pub update: bool,
    pub delete: bool,
}

/// `done: { request: GET /sale.sale/{{ $link.id }}, when: .state != "draft" }`
pub struct Done {
    pub request: RequestTemplate,
    /// Of the answer.
    pub when: Program,
}

impl Step {
    fn read(node: &Node, compiler: &Compiler) -> Result<Self, ConfigError> {
        let idempotent = mentions_idempotency_key(node);
        if !node.is_map() {
            return Ok(Step { request: RequestTemplate::read(node, compiler)?, done: None, idempotent });
        }
        let mut section = Section::new(node.clone(), "create")?;
        let request = RequestTemplate::from_section(&mut section, compiler)?;
        let done = match section.section("done")? {
            None => None,
            Some(mut done) => {
                let request = RequestTemplate::from_section(&mut done, compiler)?;
                let when = compiler.jq(&done.require("when")?)?;
                done.finish()?;
                Some(Done { request, when })
            }
        };
        section.finish()?;
        Ok(Step { request, done, idempotent })
    }
}

/// `name: schema.table.column` in `document`: rows whose column is the root's key.
#[derive(Clone, Debug)]
pub struct LineSource {
    pub name: String,
    pub table: TableName,
    pub column: String,
}

pub enum Update {
    Request(Box<RequestTemplate>),
    /// A changed row is a dead letter.
    Reject,
    /// A changed row is left alone.
    Nothing,
}

/// What rows of a snapshot come to, where they have no link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// Paired with what is in the system already; what is not is left until it changes.
    Match,
    /// Paired, else created.
    Create,
    Skip,
}

crate::choices!(Initial { "match" => Initial::Match, "create" => Initial::Create, "skip" => Initial::Skip });

/// What becomes of an event that a pull from the system wrote.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Echo {
    Skip,
    Send,
}

crate::choices!(Echo { "skip" => Echo::Skip, "send" => Echo::Send });

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Row,
    Document,
    Change,
}

crate::choices!(Mode { "row" => Mode::Row, "document" => Mode::Document, "change" => Mode::Change });

impl Settings {
    /// Takes all of a sink's settings but `name`, `type` and `system`; the caller finishes the section.
    pub fn read(section: &mut Section, system: Arc<System>) -> Result<Self, ConfigError> {
        let compiler = system.compiler().clone();
        let topics: Vec<String> = section.require("topics")?;
        if topics.is_empty() {
            return Err(section.error("topics", "`topics` names no topic").hint("topics: shop.public.customers"));
        }
        let send = read_mode(section)?;
        let change = matches!(send, SendMode::Change);
        let object = match section.take("object")? {
            Some(object) => object,
            None if change => String::new(),
            None => return Err(section.missing("object")),
        };
        let create = steps(section, &compiler, if change { "request" } else { "create" })?;
        let matching = request(section, "match", &compiler)?;
        if let Some(matching) = &matching
            && matching.id.is_none()
        {
            return Err(section
                .error("match", "`match` needs an `id`: where in the answer the record's id is")
                .hint("id: .[].id"));
        }
        let mut idempotent = Idempotent::default();
        let update = match section.node("update")? {
            Some(node) => {
                idempotent.update = mentions_idempotency_key(&node);
                read_update(&node, &compiler)?
            }
            None => Update::Nothing,
        };
        let delete = match section.node("delete")? {
            Some(node) if word(&node) == Some("none") => None,
            Some(node) => {
                idempotent.delete = mentions_idempotency_key(&node);
                Some(RequestTemplate::read(&node, &compiler)?)
            }
            None => None,
        };
        if create.is_empty() && matching.is_none() && matches!(update, Update::Nothing) && delete.is_none() {
            return Err(ConfigError::new(section.place(), "this sink would never send anything")
                .hint("give at least one of `create`, `update`, `delete`, `match`; with `send: change`, `request`"));
        }
        if change && (matching.is_some() || !matches!(update, Update::Nothing) || delete.is_some()) {
            return Err(section.error(
                "send",
                "`send: change` sends each event by one `request`; `match`, `update` and `delete` need links",
            ));
        }
        let echo: Option<Echo> = section.take("echo")?;
        if echo.is_some() && !change {
            return Err(
                section.error("echo", "`echo` goes with `send: change`: rows are compared with what was last agreed")
            );
        }
        let echo = echo == Some(Echo::Send);
        let map = program(section, "map", &compiler)?;
        if !change
            && !matches!(update, Update::Request(_))
            && let Some(map) = map.as_ref().filter(|map| map.text().contains("link_later"))
        {
            return Err(ConfigError::new(
                map.place(),
                "what `link_later` leaves out is sent by an `update`, and there is none",
            )
            .hint("give an `update`, or take `link`, which makes the row wait"));
        }
        let settings = Settings {
            object,
            topics,
            send,
            when: program(section, "when", &compiler)?,
            map,
            matching,
            create,
            idempotent,
            update,
            delete,
            fields: section.or("fields", Fields::Changed)?,
            initial: section.or("initial", Initial::Match)?,
            echo,
            batching: Batching::read(section)?,
            concurrency: section.or("concurrency", 8usize)?.clamp(1, 256),
            dead_letter_topic: section.take("errors.deadletterqueue.topic.name")?,
            retry_for: section.or("errors.retry.timeout", Duration::from_secs(300))?,
            retries: section.or("errors.retry.count", 5u32)?,
            link_timeout: section.or("link.timeout", Duration::from_secs(24 * 3600))?,
            settle: section.or("settle", Duration::from_secs(5))?,
            system,
        };
        Ok(settings)
    }
}

fn read_mode(section: &mut Section) -> Result<SendMode, ConfigError> {
    let document = section.node("document")?;
    let query: Option<Spanned<String>> = section.take("query")?;
    let mode = section.take::<Mode>("send")?;
    let mode = match (mode, document.is_some() || query.is_some()) {
        (None, true) => Mode::Document,
        (None, false) => Mode::Row,
        (Some(mode), false) | (Some(mode @ Mode::Document), true) => mode,
        (Some(_), true) => {
            return Err(section.error("send", "`document` and `query` go with `send: document` only"));
        }
    };
    match mode {
        Mode::Row => Ok(SendMode::Row),
        Mode::Change => Ok(SendMode::Change),
        Mode::Document => {
            let Some(node) = document else {
                return Err(section.error("send", "`send: document` needs `document`").hint(DOCUMENT_HINT));
            };
            read_document(&node, query)
        }
    }
}

const DOCUMENT_HINT: &str = "document: { root: public.orders, lines: public.order_lines.order_id }";

fn read_document(node: &Node, query: Option<Spanned<String>>) -> Result<SendMode, ConfigError> {
    let mut root = None;
    let mut lines = Vec::new();
    for (name, value) in node.map("document").map_err(|error| error.hint(DOCUMENT_HINT))? {
        let text = value.text(name)?;
        let wrong =
            |error: &dyn std::fmt::Display| ConfigError::new(&value.place, error.to_string()).hint(DOCUMENT_HINT);
        if name.value == "root" {
            root = Some(text.value.parse::<TableName>().map_err(|error| wrong(&error))?);
            continue;
        }
        if ["key", "after", "before"].contains(&name.value.as_str()) {
            return Err(ConfigError::new(&name.place, format!("`{}` is taken by the root row", name.value)));
        }
        let (table, column) = text
            .value
            .rsplit_once('.')
            .filter(|(table, column)| !table.is_empty() && !column.is_empty())
            .ok_or_else(|| wrong(&format!("'{}' is not schema.table.column", text.value)))?;
        let table = table.parse::<TableName>().map_err(|error| wrong(&error))?;
        lines.push(LineSource { name: name.value.clone(), table, column: column.to_owned() });
    }
    let Some(root) = root else {
        return Err(ConfigError::new(&node.place, "`document` has no `root`").hint(DOCUMENT_HINT));
    };
    Ok(SendMode::Document { root, lines, query: query.map(|query| query.value) })
}

fn read_update(node: &Node, compiler: &Compiler) -> Result<Update, ConfigError> {
    match word(node) {
        Some("reject") => Ok(Update::Reject),
        Some("none") => Ok(Update::Nothing),
        _ => Ok(Update::Request(Box::new(RequestTemplate::read(node, compiler)?))),
    }
}

/// A scalar of one word.
fn word(node: &Node) -> Option<&str> {
    match &node.kind {
        NodeKind::Scalar(scalar) => Some(scalar.raw().trim()),
        _ => None,
    }
}

/// One request or a list of them.
fn steps(section: &mut Section, compiler: &Compiler, name: &str) -> Result<Vec<Step>, ConfigError> {
    let Some(node) = section.node(name)? else { return Ok(Vec::new()) };
    let nodes = match &node.kind {
        NodeKind::List(nodes) => nodes.as_slice(),
        _ if word(&node) == Some("none") => &[],
        _ => std::slice::from_ref(&node),
    };
    nodes.iter().map(|node| Step::read(node, compiler)).collect()
}

fn mentions_idempotency_key(node: &Node) -> bool {
    match &node.kind {
        NodeKind::Null => false,
        NodeKind::Scalar(scalar) => scalar.raw().contains("$idempotency_key"),
        NodeKind::List(nodes) => nodes.iter().any(mentions_idempotency_key),
        NodeKind::Map(entries) => entries.iter().any(|(_, node)| mentions_idempotency_key(node)),
    }
}

fn request(section: &mut Section, name: &str, compiler: &Compiler) -> Result<Option<RequestTemplate>, ConfigError> {
    section.node(name)?.map(|node| RequestTemplate::read(&node, compiler)).transpose()
}

fn program(section: &mut Section, name: &str, compiler: &Compiler) -> Result<Option<Program>, ConfigError> {
    section.take::<Spanned<String>>(name)?.map(|text| compiler.jq(&text)).transpose()
}
