//! A map of settings being read. Whoever reads asks for each setting by its dotted name; what nobody asked for is
//! refused at the end.

use std::collections::BTreeMap;

use super::names::nearest;
use super::{ConfigError, FromNode, Node, NodeKind, Place, Spanned};

type Entries = Vec<(Spanned<String>, Node)>;

/// A map of a file, on the way to becoming settings.
///
/// A name such as `topic.prefix` is found however it is spelled: `topic.prefix:`, `topic: {prefix:}`. The same
/// setting spelled twice is an error that names both places. A setting without a value (`name:`) counts as not set.
#[derive(Debug)]
pub struct Section {
    place: Place,
    /// What is being read, for errors: "connector", "system `erp`".
    what: String,
    /// What has not been taken yet.
    entries: Entries,
    asked: Vec<String>,
    places: BTreeMap<String, Place>,
}

impl Section {
    /// `what` says what is read, for errors: "connector `shop`". An empty file is an empty map.
    pub fn new(node: Node, what: &str) -> Result<Section, ConfigError> {
        let entries = match node.kind {
            NodeKind::Map(entries) => entries,
            NodeKind::Null => Vec::new(),
            _ => return Err(node.wrong(what, "a map of settings (`name: value`)")),
        };
        Ok(Section { place: node.place, what: what.to_owned(), entries, asked: Vec::new(), places: BTreeMap::new() })
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What is being read, as given to [`Section::new`].
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Where a setting that was taken stands; where this section begins, when it was not given.
    pub fn place_of(&self, name: &str) -> &Place {
        self.places.get(name).unwrap_or(&self.place)
    }

    /// An error at a setting that was taken.
    pub fn error(&self, name: &str, message: impl Into<String>) -> ConfigError {
        ConfigError::new(self.place_of(name), message)
    }

    /// The setting of this dotted name, if it is given.
    pub fn take<T: FromNode>(&mut self, name: &str) -> Result<Option<T>, ConfigError> {
        let node = if T::MAP { self.node(name)? } else { self.found(name)? };
        node.map(|node| T::from_node(node, name)).transpose()
    }

    /// As [`Section::take`], of a setting that is known only to be refused: it is no answer to what may stand here.
    pub fn foreign<T: FromNode>(&mut self, name: &str) -> Result<Option<T>, ConfigError> {
        let asked = self.asked.len();
        let taken = self.take(name);
        self.asked.truncate(asked);
        taken
    }

    /// As [`Section::node`], for the same.
    pub fn foreign_node(&mut self, name: &str) -> Result<Option<Node>, ConfigError> {
        let asked = self.asked.len();
        let taken = self.node(name);
        self.asked.truncate(asked);
        taken
    }

    /// A setting that must be given.
    pub fn require<T: FromNode>(&mut self, name: &str) -> Result<T, ConfigError> {
        match self.take(name)? {
            Some(value) => Ok(value),
            None => Err(self.missing(name)),
        }
    }

    /// A setting that has a default.
    pub fn or<T: FromNode>(&mut self, name: &str, default: T) -> Result<T, ConfigError> {
        Ok(self.take(name)?.unwrap_or(default))
    }

    /// A map of settings inside this one, if it is given, in whichever spelling.
    pub fn section(&mut self, name: &str) -> Result<Option<Section>, ConfigError> {
        match self.node(name)? {
            Some(node) => Section::new(node, name).map(Some),
            None => Ok(None),
        }
    }

    /// One map of settings, or a list of them.
    pub fn sections(&mut self, name: &str) -> Result<Vec<Section>, ConfigError> {
        match self.node(name)? {
            None => Ok(Vec::new()),
            Some(Node { kind: NodeKind::List(items), .. }) => {
                items.into_iter().map(|item| Section::new(item, name)).collect()
            }
            Some(node) => Ok(vec![Section::new(node, name)?]),
        }
    }

    /// The node of this name as it stands; a map in both spellings is one map.
    pub fn node(&mut self, name: &str) -> Result<Option<Node>, ConfigError> {
        let found = self.found(name)?;
        if found.as_ref().is_some_and(|node| !node.is_map()) {
            return Ok(found);
        }
        let mut below = Vec::new();
        take_below(&mut self.entries, name, &mut below);
        let Some((first, _)) = below.first() else { return Ok(found) };
        let place = found.as_ref().map_or(&first.place, |node| &node.place).clone();
        self.places.entry(name.to_owned()).or_insert_with(|| place.clone());
        let mut entries = match found {
            Some(Node { kind: NodeKind::Map(entries), .. }) => entries,
            _ => Vec::new(),
        };
        for (name, node) in below {
            add(&mut entries, name, node)?;
        }
        Ok(Some(Node { place, kind: NodeKind::Map(entries) }))
    }

    /// Every name under `prefix` that was not taken yet, dotted, without the prefix, in the order of the file. With
    /// an empty prefix, all that is left. For settings that are passed on to a library.
    pub fn entries(&mut self, prefix: &str) -> Result<Vec<(String, Spanned<String>)>, ConfigError> {
        let entries = match prefix {
            "" => std::mem::take(&mut self.entries),
            prefix => match self.node(prefix)? {
                None => Vec::new(),
                Some(Node { kind: NodeKind::Map(entries), .. }) => entries,
                Some(node) => return Err(node.wrong(prefix, "a map of settings (`name: value`)")),
            },
        };
        let mut flat = Vec::new();
        flatten("", entries, &mut flat)?;
        let mut seen: BTreeMap<&str, &Place> = BTreeMap::new();
        for (name, value) in &flat {
            if let Some(first) = seen.insert(name, &value.place) {
                return Err(twice(name, first, &value.place));
            }
        }
        Ok(flat)
    }

    /// Refuses what nobody asked for.
    pub fn finish(self) -> Result<(), ConfigError> {
        let mut unknown = Vec::new();
        self.unknown("", &self.entries, &mut unknown);
        ConfigError::all(unknown)
    }

    fn unknown(&self, prefix: &str, entries: &Entries, errors: &mut Vec<ConfigError>) {
        for (name, node) in entries {
            let full = join(prefix, name);
            let below = format!("{full}.");
            let known_prefix = self.asked.iter().any(|asked| asked.starts_with(&below));
            match &node.kind {
                NodeKind::Map(inside) if known_prefix => self.unknown(&full, inside, errors),
                NodeKind::Null if known_prefix || self.asked.contains(&full) => {}
                _ => errors.push(self.unknown_name(&full, &name.place)),
            }
        }
    }

    fn unknown_name(&self, full: &str, place: &Place) -> ConfigError {
        let error = ConfigError::new(place, format!("unknown setting `{full}` in {}", self.what));
        let mut known: Vec<&str> = self.asked.iter().map(String::as_str).collect();
        known.sort_unstable();
        known.dedup();
        match nearest(full, known.iter().copied()) {
            _ if full.contains('\u{a0}') => error.hint(super::yaml::NO_BREAK_SPACE),
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None if known.is_empty() => error,
            None => error.hint(format!("known here: {}", known.join(", "))),
        }
    }

    /// The error for a setting that must be given and is not.
    pub fn missing(&self, name: &str) -> ConfigError {
        let mut left = Vec::new();
        spellings("", &self.entries, &mut left);
        let error = |place: &Place| ConfigError::new(place, format!("`{name}` is missing in {}", self.what));
        match nearest(name, left.iter().map(|(name, _)| name.as_str())) {
            Some(near) => {
                let place = left.iter().find(|(name, _)| name == near).map_or(&self.place, |(_, place)| place);
                error(place).hint(format!("did you mean it by `{near}`?"))
            }
            None if self.entries.is_empty() && self.places.is_empty() => {
                error(&self.place).hint("there is nothing here")
            }
            None => error(&self.place),
        }
    }

    /// Takes the one node of this name; of two, an error with both places.
    fn found(&mut self, name: &str) -> Result<Option<Node>, ConfigError> {
        self.asked.push(name.to_owned());
        let mut found = Vec::new();
        take_exact(&mut self.entries, name, &mut found);
        let mut found = found.into_iter();
        let Some((_, mut node)) = found.next() else { return Ok(None) };
        for (spelling, other) in found {
            node = join_nodes(name, node, &spelling.place, other)?;
        }
        self.places.insert(name.to_owned(), node.place.clone());
        Ok((!node.is_null()).then_some(node))
    }
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

/// Takes out every entry whose dotted name is `path`, looking into maps.
fn take_exact(entries: &mut Entries, path: &str, found: &mut Entries) {
    let mut at = 0;
    while at < entries.len() {
        let (name, node) = &mut entries[at];
        if name.value == path {
            found.push(entries.remove(at));
            continue;
        }
        let rest = path.strip_prefix(name.value.as_str()).and_then(|rest| rest.strip_prefix('.'));
        if let (Some(rest), NodeKind::Map(inside)) = (rest, &mut node.kind) {
            take_exact(inside, rest, found);
            if inside.is_empty() {
                entries.remove(at);
                continue;
            }
        }
        at += 1;
    }
}

/// Takes out every entry whose dotted name begins with `prefix.`, named by the rest.
fn take_below(entries: &mut Entries, prefix: &str, found: &mut Entries) {
    let mut at = 0;
    while at < entries.len() {
        let (name, node) = &mut entries[at];
        if let Some(rest) = name.value.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.')) {
            let rest = rest.to_owned();
            let (name, node) = entries.remove(at);
            found.push((Spanned::new(rest, name.place), node));
            continue;
        }
        let rest = prefix.strip_prefix(name.value.as_str()).and_then(|rest| rest.strip_prefix('.'));
        if let (Some(rest), NodeKind::Map(inside)) = (rest, &mut node.kind) {
            take_below(inside, rest, found);
            if inside.is_empty() {
                entries.remove(at);
                continue;
            }
        }
        at += 1;
    }
}

/// Adds an entry to a map that may have it already: two maps become one.
fn add(entries: &mut Entries, name: Spanned<String>, node: Node) -> Result<(), ConfigError> {
    match entries.iter().position(|(known, _)| known.value == name.value) {
        None => entries.push((name, node)),
        Some(at) => {
            let (known, before) = entries.remove(at);
            let joined = join_nodes(&name.value, before, &name.place, node)?;
            entries.insert(at, (known, joined));
        }
    }
    Ok(())
}

fn join_nodes(name: &str, first: Node, place: &Place, second: Node) -> Result<Node, ConfigError> {
    match (first.kind, second.kind) {
        (NodeKind::Map(mut entries), NodeKind::Map(more)) => {
            for (name, node) in more {
                add(&mut entries, name, node)?;
            }
            Ok(Node { place: first.place, kind: NodeKind::Map(entries) })
        }
        (NodeKind::Null, kind) => Ok(Node { place: second.place, kind }),
        (kind, NodeKind::Null) => Ok(Node { place: first.place, kind }),
        _ => Err(twice(name, &first.place, place)),
    }
}

fn twice(name: &str, first: &Place, second: &Place) -> ConfigError {
    ConfigError::new(second, format!("`{name}` is set twice: here and at {first}"))
        .hint("dotted and nested spellings are the same setting; keep one of them")
}

fn flatten(prefix: &str, entries: Entries, flat: &mut Vec<(String, Spanned<String>)>) -> Result<(), ConfigError> {
    for (name, node) in entries {
        let full = join(prefix, &name);
        match node.kind {
            NodeKind::Null => {}
            NodeKind::Map(inside) => flatten(&full, inside, flat)?,
            NodeKind::List(_) => {
                let items = Vec::<String>::from_node(node.clone(), &full)?;
                let masked = matches!(&node.kind, NodeKind::List(items) if items.iter().any(Node::has_reference));
                flat.push((full, Spanned::new(items.join(","), node.place).mask(masked)));
            }
            NodeKind::Scalar(_) => {
                let text = node.text(&full)?;
                flat.push((full, text));
            }
        }
    }
    Ok(())
}

/// Every dotted name there is, with its place.
fn spellings(prefix: &str, entries: &Entries, names: &mut Vec<(String, Place)>) {
    for (name, node) in entries {
        let full = join(prefix, name);
        if let NodeKind::Map(inside) = &node.kind {
            spellings(&full, inside, names);
        }
        names.push((full, name.place.clone()));
    }
}
