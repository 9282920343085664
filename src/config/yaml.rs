//! YAML text to [`Node`]s, from the events of saphyr-parser.
//!
//! Bounded whatever the text holds: size, depth, and the number of nodes once aliases are expanded. One document a
//! file, names are texts and stand once in a map; anchors, aliases and `<<` are understood.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span, Tag};

use super::{ConfigError, Node, NodeKind, Place, Scalar, Spanned};

const LARGEST_FILE: usize = 4 << 20;
const DEEPEST: usize = 64;
const MOST_NODES: usize = 100_000;

/// Reads a file. An empty one is [`NodeKind::Null`].
pub fn parse_file(path: impl AsRef<Path>) -> Result<Node, ConfigError> {
    let path = path.as_ref();
    let nowhere = Place::start(path, "");
    let bytes = std::fs::read(path).map_err(|cause| ConfigError::new(&nowhere, format!("cannot be read: {cause}")))?;
    match String::from_utf8(bytes) {
        Ok(text) => parse_text(&text, path),
        Err(error) => {
            let valid = String::from_utf8_lossy(&error.as_bytes()[..error.utf8_error().valid_up_to()]).into_owned();
            let line = valid.matches('\n').count() + 1;
            let column = valid.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
            let place = Place::start(path, &valid).at(line as u32, column as u32);
            Err(ConfigError::new(&place, "a byte that is not UTF-8").hint("save the file as UTF-8"))
        }
    }
}

/// Reads `text` as if it were the file `name`.
pub fn parse_text(text: &str, name: impl AsRef<Path>) -> Result<Node, ConfigError> {
    let start = Place::start(name.as_ref(), text);
    if text.len() > LARGEST_FILE {
        return Err(ConfigError::new(&start, format!("the file has {} bytes, more than {LARGEST_FILE}", text.len())));
    }
    if let Some(at) = text.find('\0') {
        let line = text[..at].matches('\n').count() + 1;
        return Err(ConfigError::new(&start.at(line as u32, 1), "a NUL byte: this is no text file")
            .hint("is it UTF-16? save the file as UTF-8"));
    }
    // What could not be read as UTF-8 comes so from those who read the file.
    if let Some(at) = text.find('\u{fffd}') {
        let line = text[..at].matches('\n').count() + 1;
        let column = text[..at].rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        return Err(ConfigError::new(&start.at(line as u32, column as u32), "a byte that is not UTF-8")
            .hint("save the file as UTF-8"));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut builder = Builder { start, open: Vec::new(), anchors: HashMap::new(), nodes: 0, documents: 0, root: None };
    for event in Parser::new_from_str(text) {
        match event {
            Ok((event, span)) => builder.event(event, span)?,
            Err(error) => return Err(unreadable(&builder.start, &error)),
        }
    }
    Ok(builder.root.unwrap_or(Node { place: builder.start, kind: NodeKind::Null }))
}

struct Builder {
    start: Place,
    open: Vec<Open>,
    anchors: HashMap<usize, Anchored>,
    nodes: usize,
    documents: usize,
    root: Option<Node>,
}

struct Anchored {
    node: Node,
    nodes: usize,
    depth: usize,
}

/// A list or map whose end has not come yet.
struct Open {
    place: Place,
    anchor: usize,
    nodes_before: usize,
    deepest: usize,
    inside: Inside,
}

enum Inside {
    List(Vec<Node>),
    Map {
        entries: Vec<(Spanned<String>, Node)>,
        names: HashSet<String>,
        name: Option<Spanned<String>>,
        merged: Vec<Node>,
    },
}

impl Builder {
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), ConfigError> {
        let place = self.start.at(span.start.line() as u32, span.start.col() as u32 + 1);
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => Ok(()),
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(ConfigError::new(&place, "a second document begins here")
                        .hint("a file is one document: remove the `---`, or write two files"));
                }
                Ok(())
            }
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain && tag.is_none();
                refuse_tag(&place, tag.as_deref(), "str")?;
                let kind = match (plain, text.as_ref()) {
                    (true, "" | "~" | "null" | "Null" | "NULL") if !self.wants_name() => NodeKind::Null,
                    _ => NodeKind::Scalar(Scalar::new(text.into_owned(), plain)),
                };
                self.nodes += 1;
                self.add(Node { place, kind }, anchor, 1, 0)
            }
            Event::SequenceStart(anchor, tag) => {
                refuse_tag(&place, tag.as_deref(), "seq")?;
                self.begin(place, anchor, Inside::List(Vec::new()))
            }
            Event::MappingStart(anchor, tag) => {
                refuse_tag(&place, tag.as_deref(), "map")?;
                let inside = Inside::Map { entries: Vec::new(), names: HashSet::new(), name: None, merged: Vec::new() };
                self.begin(place, anchor, inside)
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(Open { place, anchor, nodes_before, deepest, inside }) = self.open.pop() else {
                    return Err(ConfigError::new(&place, "an end without its beginning"));
                };
                let kind = match inside {
                    Inside::List(items) => NodeKind::List(items),
                    Inside::Map { entries, merged, .. } => NodeKind::Map(merge(entries, merged)?),
                };
                self.add(Node { place, kind }, anchor, self.nodes - nodes_before, deepest)
            }
            Event::Alias(anchor) => {
                let Some(Anchored { node, nodes, depth }) = self.anchors.get(&anchor) else {
                    return Err(ConfigError::new(&place, "this alias stands inside what it refers to"));
                };
                let (mut node, nodes, depth) = (node.clone(), *nodes, *depth);
                self.nodes += nodes;
                if self.nodes > MOST_NODES || self.open.len() + depth > DEEPEST {
                    return Err(too_much(&place));
                }
                if !matches!(node.kind, NodeKind::Map(_)) {
                    node.place = place;
                }
                self.add(node, 0, nodes, depth)
            }
        }
    }

    /// Whether the next node is the name of an entry.
    fn wants_name(&self) -> bool {
        matches!(self.open.last(), Some(Open { inside: Inside::Map { name: None, .. }, .. }))
    }

    fn begin(&mut self, place: Place, anchor: usize, inside: Inside) -> Result<(), ConfigError> {
        if self.wants_name() {
            return Err(not_a_name(&place));
        }
        if self.open.len() >= DEEPEST {
            return Err(ConfigError::new(&place, format!("nested more than {DEEPEST} deep")));
        }
        let nodes_before = self.nodes;
        self.nodes += 1;
        self.open.push(Open { place, anchor, nodes_before, deepest: 0, inside });
        Ok(())
    }

    /// Puts a finished node of `nodes` nodes, `depth` levels deep, where it belongs.
    fn add(&mut self, node: Node, anchor: usize, nodes: usize, depth: usize) -> Result<(), ConfigError> {
        if self.nodes > MOST_NODES {
            return Err(too_much(&node.place));
        }
        if anchor != 0 {
            self.anchors.insert(anchor, Anchored { node: node.clone(), nodes, depth });
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        open.deepest = open.deepest.max(depth + 1);
        match &mut open.inside {
            Inside::List(items) => items.push(node),
            Inside::Map { entries, names, name, merged } => match name.take() {
                None => {
                    let NodeKind::Scalar(text) = node.kind else { return Err(not_a_name(&node.place)) };
                    let given = Spanned::new(text.raw().to_owned(), node.place);
                    if given.value != "<<" && !names.insert(given.value.clone()) {
                        let before = entries.iter().find(|(known, _)| known.value == given.value);
                        let line = before.map_or(0, |(known, _)| known.place.line);
                        return Err(ConfigError::new(
                            &given.place,
                            format!("`{}` stands here a second time", given.value),
                        )
                        .hint(format!("it is already set in line {line}; keep one of them")));
                    }
                    *name = Some(given);
                }
                Some(given) if given.value == "<<" => merged.push(node),
                Some(given) => entries.push((given, node)),
            },
        }
        Ok(())
    }
}

/// `<<`: what the merged maps have and the map itself has not. Of two merged maps the first wins.
fn merge(
    mut entries: Vec<(Spanned<String>, Node)>,
    merged: Vec<Node>,
) -> Result<Vec<(Spanned<String>, Node)>, ConfigError> {
    let mut maps = Vec::new();
    for node in merged {
        match node.kind {
            NodeKind::List(items) => maps.extend(items),
            _ => maps.push(node),
        }
    }
    if maps.is_empty() {
        return Ok(entries);
    }
    let mut known: HashSet<String> = entries.iter().map(|(name, _)| name.value.clone()).collect();
    for node in maps {
        let NodeKind::Map(more) = node.kind else {
            return Err(
                ConfigError::new(&node.place, "`<<` merges maps, and this is none").hint("write <<: *anchor_of_a_map")
            );
        };
        entries.extend(more.into_iter().filter(|(name, _)| known.insert(name.value.clone())));
    }
    Ok(entries)
}

fn refuse_tag(place: &Place, tag: Option<&Tag>, allowed: &str) -> Result<(), ConfigError> {
    match tag {
        None => Ok(()),
        Some(tag) if tag.is_yaml_core_schema() && tag.suffix == allowed => Ok(()),
        Some(tag) => Err(ConfigError::new(place, format!("the YAML tag `{tag}` is not understood"))
            .hint("put quotes around a text that begins with `!`")),
    }
}

fn too_much(place: &Place) -> ConfigError {
    ConfigError::new(
        place,
        format!("too much for one file: more than {MOST_NODES} values, or more than {DEEPEST} deep"),
    )
    .hint("aliases (`*name`) count with all that they stand for")
}

fn not_a_name(place: &Place) -> ConfigError {
    ConfigError::new(place, "a map or list cannot be a name").hint(
        "`{{ … }}` without quotes is a map to YAML: put quotes around the text; so does a jq expression with `{` or `[`",
    )
}

pub(super) const NO_BREAK_SPACE: &str =
    "a no-break space, which looks like a space and is none: type a space in its place";

/// What the scanner could not read, said so that the reason is seen.
fn unreadable(start: &Place, error: &ScanError) -> ConfigError {
    let mark = error.marker();
    let mut place = start.at(mark.line() as u32, mark.col() as u32 + 1);
    // At the end of the file the scanner stands behind the last line.
    if place.line_text().is_none() {
        let last = start.file_text().lines().count().max(1);
        let column = start.file_text().lines().last().map_or(0, |line| line.chars().count());
        place = start.at(last as u32, column as u32 + 1);
    }
    let line = place.line_text().unwrap_or_default().to_owned();
    let told = error.info();
    let indentation = &line[..line.len() - line.trim_start().len()];
    let error = ConfigError::new(&place, format!("this is not YAML: {told}"));
    if indentation.contains('\t') || told.contains("tab") {
        return error.hint("a tab: YAML is indented with spaces only");
    }
    if line.contains('\t') {
        return error.hint("a tab: put spaces in its place");
    }
    if line.contains('\u{a0}') {
        return error.hint(NO_BREAK_SPACE);
    }
    if told.contains("quoted scalar") && told.contains("end of stream") {
        return error.hint("the quote that begins here is not closed");
    }
    let count = |signs: [char; 2]| line.chars().filter(|c| signs.contains(c)).count();
    if told.contains("flow") && count(['{', '[']) > count(['}', ']']) {
        return error
            .hint("a `{` or `[` of this line is not closed; in a text or a jq expression it needs quotes around");
    }
    if let Some(hint) = expression_hint(&line, told) {
        return error.hint(hint);
    }
    if told.contains("indent")
        || told.contains("mapping values")
        || told.contains("block")
        || told.contains("simple key")
        || told.contains("':'")
    {
        return error.hint(
            "look at the indentation of this line and the one above: entries of one map begin in the same column, \
             and a name is followed by a colon and a space",
        );
    }
    if told.contains("anchor") || told.contains("alias") {
        return error
            .hint("`*name` refers to an earlier `&name`; put quotes around a text that begins with `*` or `&`");
    }
    error
}

/// A line that has jq or a template in it without quotes.
fn expression_hint(line: &str, told: &str) -> Option<String> {
    let (name, value) = line.split_once(": ")?;
    let name = name.trim().trim_start_matches("- ").trim_start_matches('{').trim();
    let value = value.trim();
    if value.starts_with("{{") || value.contains("{{") && !value.starts_with(['"', '\'']) {
        return Some(format!("put quotes around a text with `{{{{ … }}}}`: {name}: '{}'", value.trim_end_matches(',')));
    }
    if value.starts_with('%') || value.starts_with('@') || value.starts_with('`') {
        return Some(format!("put quotes around a text that begins with `{}`", &value[..1]));
    }
    if value.starts_with('"') && told.contains("escape") {
        return Some(
            "in double quotes YAML reads `\\` as its own: use single quotes, or a block (`|`), for jq with `\\(…)`"
                .to_owned(),
        );
    }
    let jq = ["| ", "\\(", "==", "[]", "//", "(.", "if ", ": .", "$"].iter().any(|sign| value.contains(sign))
        || value.starts_with(['{', '[', '.']);
    (jq && !value.starts_with(['"', '\'', '|', '>'])).then(|| {
        format!("a jq expression with `{{`, `[`, `: ` or ` #` needs quotes ({name}: '…') or a block ({name}: | and the expression indented below)")
    })
}
