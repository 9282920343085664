//! Texts with `{{ jq }}` in them, and maps of such texts.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use super::program::{Compiler, Program};
use super::scope::{MapError, Scope};
use crate::config::{ConfigError, Node, NodeKind, Spanned};

/// How values are written into the text. What stands outside of `{{ }}` is taken as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// As they are.
    None,
    /// As one segment of a path, percent-encoded; behind a `?` in the text, as part of a query. Null, an empty text,
    /// `.` and `..` are errors: the request would go somewhere else.
    Path,
    /// As part of a query, percent-encoded.
    Query,
}

const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A compiled text.
#[derive(Clone, Debug)]
pub struct Template {
    parts: Vec<Part>,
    text: Spanned<String>,
}

#[derive(Clone, Debug)]
enum Part {
    Text(String),
    Value(Program, Escape),
}

impl Template {
    pub(super) fn compile(compiler: &Compiler, text: &Spanned<String>, escape: Escape) -> Result<Self, ConfigError> {
        let mut parts = Vec::new();
        let mut escape = escape;
        let mut at = 0;
        while let Some(found) = text[at..].find("{{") {
            let open = at + found;
            let close = closing(&text.value, open + 2).ok_or_else(|| {
                ConfigError::new(&text.place_in(open), "`{{` without its `}}`")
                    .hint("`{{ … }}` holds a jq expression; a literal `{{` is written {{ \"{{\" }}")
            })?;
            literal(&mut parts, &text[at..open], &mut escape);
            parts.push(Part::Value(compiler.jq(&trimmed(text, open + 2, close))?, escape));
            at = close + 2;
        }
        literal(&mut parts, &text[at..], &mut escape);
        Ok(Template { parts, text: text.clone() })
    }

    /// The text with the values in it. Null and no value at all are empty; objects and lists are JSON.
    pub fn render(&self, input: &Value, scope: &Scope<'_>) -> Result<String, MapError> {
        let mut text = String::new();
        let mut needs = Vec::new();
        for part in &self.parts {
            match part {
                Part::Text(literal) => text.push_str(literal),
                Part::Value(program, escape) => match program.first(input, scope) {
                    Ok(value) => self.write(&value, *escape, program, &mut text)?,
                    Err(MapError::Needs(more)) => needs.extend(more),
                    Err(error) => return Err(error),
                },
            }
        }
        if needs.is_empty() { Ok(text) } else { Err(MapError::Needs(needs)) }
    }

    /// Where the text is one `{{ }}` and nothing else, its value as it is; else the text.
    pub fn value(&self, input: &Value, scope: &Scope<'_>) -> Result<Value, MapError> {
        match self.parts.as_slice() {
            [Part::Value(program, _)] => program.first(input, scope),
            _ => self.render(input, scope).map(Value::String),
        }
    }

    /// Whether a reference (`${env:…}`, `${file:…}`) went into it.
    pub fn masked(&self) -> bool {
        self.text.masked()
    }

    /// The text as written.
    pub fn text(&self) -> &str {
        &self.text.value
    }

    fn write(&self, value: &Value, escape: Escape, program: &Program, text: &mut String) -> Result<(), MapError> {
        let written = plain(value);
        match escape {
            Escape::None => text.push_str(&written),
            Escape::Query => text.extend(utf8_percent_encode(&written, KEPT)),
            Escape::Path if matches!(written.as_str(), "" | "." | "..") => {
                let found = if value.is_null() { "null".to_owned() } else { format!("`{written}`") };
                return Err(MapError::Failed(format!("{}: {found} cannot be a part of a path", program.place())));
            }
            Escape::Path => text.extend(utf8_percent_encode(&written, KEPT)),
        }
        Ok(())
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn literal(parts: &mut Vec<Part>, text: &str, escape: &mut Escape) {
    if *escape == Escape::Path && text.contains('?') {
        *escape = Escape::Query;
    }
    if !text.is_empty() {
        parts.push(Part::Text(text.to_owned()));
    }
}

fn trimmed(text: &Spanned<String>, from: usize, to: usize) -> Spanned<String> {
    let inside = &text.value[from..to];
    let start = from + (inside.len() - inside.trim_start().len());
    text.part(start..(from + inside.trim_end().len()).max(start))
}

/// The `}}` that ends the expression which begins at `from`: not one inside a text or of an object's end.
fn closing(text: &str, from: usize) -> Option<usize> {
    /// A text in quotes, or brackets inside `\( … )` of a text.
    enum Open {
        Bracket,
        Quote,
        Inside,
    }
    let mut open = Vec::new();
    let mut chars = text[from..].char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match (open.last(), c) {
            (Some(Open::Quote), '"') => drop(open.pop()),
            (Some(Open::Quote), '\\') => {
                if let Some((_, '(')) = chars.next() {
                    open.push(Open::Inside);
                }
            }
            (Some(Open::Quote), _) => {}
            (_, '"') => open.push(Open::Quote),
            (_, '{' | '[' | '(') => open.push(Open::Bracket),
            (None, '}') if chars.next_if(|(_, next)| *next == '}').is_some() => return Some(from + at),
            (Some(Open::Bracket | Open::Inside), '}' | ']' | ')') => drop(open.pop()),
            _ => {}
        }
    }
    None
}

/// A compiled free map of texts, in the order of the file.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    entries: Vec<(String, Vec<Template>)>,
}

impl Tree {
    pub(super) fn compile(compiler: &Compiler, node: &Node) -> Result<Self, ConfigError> {
        let one = |node: &Node, name: &str| compiler.template(&node.text(name)?, Escape::None);
        let mut entries = Vec::new();
        for (name, node) in node.map("params or headers")? {
            let templates = match &node.kind {
                NodeKind::Null => continue,
                NodeKind::List(items) => items.iter().map(|item| one(item, name)).collect::<Result<_, _>>()?,
                _ => vec![one(node, name)?],
            };
            entries.push((name.value.clone(), templates));
        }
        Ok(Tree { entries })
    }

    /// Names and texts. A list, in the file or as the value of a lone `{{ }}`, repeats its name; a lone `{{ }}` that
    /// gives null leaves its name out.
    pub fn render(&self, input: &Value, scope: &Scope<'_>) -> Result<Vec<(String, String)>, MapError> {
        let mut rendered = Vec::new();
        let mut needs = Vec::new();
        for (name, templates) in &self.entries {
            for template in templates {
                match template.value(input, scope) {
                    Ok(Value::Null) => {}
                    Ok(Value::Array(items)) => rendered.extend(items.iter().map(|item| (name.clone(), plain(item)))),
                    Ok(value) => rendered.push((name.clone(), plain(&value))),
                    Err(MapError::Needs(more)) => needs.extend(more),
                    Err(error) => return Err(error),
                }
            }
        }
        if needs.is_empty() { Ok(rendered) } else { Err(MapError::Needs(needs)) }
    }

    /// Names of the entries that a reference went into.
    pub fn masked_names(&self) -> Vec<String> {
        let masked = self.entries.iter().filter(|(_, templates)| templates.iter().any(Template::masked));
        masked.map(|(name, _)| name.clone()).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
