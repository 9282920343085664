//! Reading Avro by its writer's schema, into JSON.
//!
//! Bytes and schemas are anyone's: nothing here panics, recurses without bound, or allocates more than a small
//! multiple of the input.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Number, Value};

use super::friendly::{Meaning, Unavailable};
use super::{AvroError, UNAVAILABLE_VALUE};

/// Values nested deeper than this are refused.
const MOST_DEPTH: usize = 64;

/// Reads bodies of one schema.
#[derive(Clone, Debug)]
pub struct Decoder {
    nodes: Vec<Node>,
    root: usize,
    unavailable: Unavailable,
}

#[derive(Clone, Debug)]
pub(super) enum Node {
    Null,
    Boolean,
    Int(Meaning),
    Long(Meaning),
    Float,
    Double,
    Bytes(Meaning),
    String(Meaning),
    Fixed(usize, Meaning),
    Enum(Vec<String>),
    Array(usize),
    Map(usize),
    Union(Vec<usize>),
    Record {
        fields: Vec<(String, usize)>,
        meaning: Meaning,
    },
    /// A name that is used before its definition is read.
    Pending,
}

/// Which JSON a value becomes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Times as ISO text, decimals as exact numbers, unchanged TOAST values left out.
    Friendly,
    /// Numbers as they are in Avro, bytes in base64.
    Raw,
}

impl Decoder {
    /// Compiles the JSON text of a schema.
    pub fn compile(schema_json: &str) -> Result<Self, AvroError> {
        Self::with_placeholder(schema_json, UNAVAILABLE_VALUE)
    }

    /// As [`Decoder::compile`], for events written with another `unavailable.value.placeholder`.
    pub fn with_placeholder(schema_json: &str, placeholder: &str) -> Result<Self, AvroError> {
        let json: Value =
            serde_json::from_str(schema_json).map_err(|error| AvroError::Schema(format!("not JSON: {error}")))?;
        let mut compiler = Compiler { nodes: Vec::new(), names: HashMap::new() };
        let root = compiler.node(&json, "", 0)?;
        Ok(Decoder { nodes: compiler.nodes, root, unavailable: Unavailable::new(placeholder) })
    }

    /// The body in friendly form: what expressions and `consume` see.
    pub fn decode(&self, body: &[u8]) -> Result<Value, AvroError> {
        self.decode_as(body, Form::Friendly)
    }

    /// The body with numbers as they are in Avro and bytes in base64.
    pub fn decode_raw(&self, body: &[u8]) -> Result<Value, AvroError> {
        self.decode_as(body, Form::Raw)
    }

    /// The friendly form of a value that is already in raw JSON, as in the headers of a changed key. What does not
    /// fit the schema stays as it is.
    pub fn friendly_from_raw(&self, raw: Value) -> Value {
        self.make_friendly(self.root, raw, 0)
    }

    fn decode_as(&self, body: &[u8], form: Form) -> Result<Value, AvroError> {
        let mut run = Run { decoder: self, reader: Reader::new(body), form, budget: 4 * body.len() + 100_000 };
        let value = run.value(self.root, 0)?;
        if run.reader.rest().is_empty() {
            Ok(value)
        } else {
            Err(run.reader.malformed(format!("{} bytes are left over", run.reader.rest().len())))
        }
    }

    fn make_friendly(&self, node: usize, raw: Value, depth: usize) -> Value {
        if depth > MOST_DEPTH {
            return raw;
        }
        match (&self.nodes[node], raw) {
            (Node::Int(meaning) | Node::Long(meaning), Value::Number(number)) => match number.as_i64() {
                Some(value) => meaning.integer(value),
                None => Value::Number(number),
            },
            (Node::Bytes(meaning), Value::String(text)) => match STANDARD.decode(&text) {
                Ok(bytes) => meaning.bytes(&bytes).unwrap_or(Value::String(text)),
                Err(_) => Value::String(text),
            },
            (Node::String(meaning), Value::String(text)) => meaning.text(&text),
            (Node::Union(branches), raw) if !raw.is_null() => {
                match branches.iter().find(|&&branch| !matches!(self.nodes[branch], Node::Null)) {
                    Some(&branch) => self.make_friendly(branch, raw, depth + 1),
                    None => raw,
                }
            }
            (Node::Record { fields, .. }, Value::Object(mut map)) => {
                for (name, node) in fields {
                    if let Some(value) = map.get_mut(name) {
                        *value = self.make_friendly(*node, value.take(), depth + 1);
                    }
                }
                Value::Object(map)
            }
            (_, raw) => raw,
        }
    }
}

/// A position in a body.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    body: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(body: &'a [u8]) -> Self {
        Reader { body, at: 0 }
    }

    fn rest(&self) -> &'a [u8] {
        self.body.get(self.at..).unwrap_or_default()
    }

    fn malformed(&self, reason: impl Into<String>) -> AvroError {
        AvroError::Malformed { at: self.at, reason: reason.into() }
    }

    pub fn take(&mut self, size: usize) -> Result<&'a [u8], AvroError> {
        let rest = self.rest();
        let taken = rest
            .get(..size)
            .ok_or_else(|| self.malformed(format!("{size} bytes are announced and {} are left", rest.len())))?;
        self.at += size;
        Ok(taken)
    }

    /// A zigzag varint of at most 64 bits.
    pub fn long(&mut self) -> Result<i64, AvroError> {
        let mut value: u64 = 0;
        for (index, &byte) in self.rest().iter().enumerate().take(10) {
            let bits = u64::from(byte & 0x7f);
            if index == 9 && bits > 1 {
                break;
            }
            value |= bits << (7 * index);
            if byte & 0x80 == 0 {
                self.at += index + 1;
                return Ok((value >> 1) as i64 ^ -((value & 1) as i64));
            }
        }
        Err(self.malformed("not a number of at most 64 bits"))
    }

    fn length(&mut self) -> Result<usize, AvroError> {
        let length = self.long()?;
        usize::try_from(length).map_err(|_| self.malformed(format!("a length of {length}")))
    }

    pub fn bytes(&mut self) -> Result<&'a [u8], AvroError> {
        let size = self.length()?;
        self.take(size)
    }

    /// Items of the next block of an array or map; 0 at the end.
    pub fn block(&mut self) -> Result<u64, AvroError> {
        let count = self.long()?;
        if count < 0 {
            // The block's size in bytes, for skipping.
            self.long()?;
        }
        Ok(count.unsigned_abs())
    }
}

struct Run<'a> {
    decoder: &'a Decoder,
    reader: Reader<'a>,
    form: Form,
    /// Values that may still be made: bounds what bodies of items without bytes can ask for.
    budget: usize,
}

impl Run<'_> {
    fn value(&mut self, node: usize, depth: usize) -> Result<Value, AvroError> {
        if depth > MOST_DEPTH {
            return Err(self.reader.malformed("nested too deep"));
        }
        self.budget = self.budget.checked_sub(1).ok_or_else(|| self.reader.malformed("more values than bytes"))?;
        let friendly = self.form == Form::Friendly;
        let decoder = self.decoder;
        Ok(match &decoder.nodes[node] {
            Node::Null => Value::Null,
            Node::Boolean => match self.reader.take(1)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                _ => return Err(self.reader.malformed("a boolean is 0 or 1")),
            },
            Node::Int(meaning) => {
                let value = self.reader.long()?;
                if i32::try_from(value).is_err() {
                    return Err(self.reader.malformed(format!("{value} is not an int")));
                }
                if friendly { meaning.integer(value) } else { value.into() }
            }
            Node::Long(meaning) => {
                let value = self.reader.long()?;
                if friendly { meaning.integer(value) } else { value.into() }
            }
            Node::Float => {
                let bytes = self.reader.take(4)?;
                float_text(f32::from_le_bytes(bytes.try_into().unwrap_or_default()))
            }
            Node::Double => {
                let bytes = self.reader.take(8)?;
                double_value(f64::from_le_bytes(bytes.try_into().unwrap_or_default()))
            }
            Node::Bytes(meaning) => {
                let bytes = self.reader.bytes()?;
                self.bytes(bytes, meaning)?
            }
            Node::Fixed(size, meaning) => {
                let bytes = self.reader.take(*size)?;
                self.bytes(bytes, meaning)?
            }
            Node::String(meaning) => {
                let bytes = self.reader.bytes()?;
                let text =
                    std::str::from_utf8(bytes).map_err(|_| self.reader.malformed("a string that is not UTF-8"))?;
                if friendly { meaning.text(text) } else { text.into() }
            }
            Node::Enum(symbols) => {
                let index = self.reader.long()?;
                let symbol = usize::try_from(index).ok().and_then(|index| symbols.get(index));
                symbol.ok_or_else(|| self.reader.malformed(format!("no symbol {index}")))?.as_str().into()
            }
            Node::Array(items) => {
                let mut out = Vec::new();
                loop {
                    let count = self.reader.block()?;
                    if count == 0 {
                        break Value::Array(out);
                    }
                    for _ in 0..count {
                        out.push(self.value(*items, depth + 1)?);
                    }
                }
            }
            Node::Map(values) => {
                let mut out = Map::new();
                loop {
                    let count = self.reader.block()?;
                    if count == 0 {
                        break Value::Object(out);
                    }
                    for _ in 0..count {
                        let key = String::from_utf8_lossy(self.reader.bytes()?).into_owned();
                        let value = self.value(*values, depth + 1)?;
                        out.insert(key, value);
                    }
                }
            }
            Node::Union(_) => {
                let branch = decoder.branch(node, &mut self.reader)?;
                self.value(branch, depth + 1)?
            }
            Node::Record { fields, meaning } => {
                let start = self.reader;
                let mut out = Map::with_capacity(fields.len());
                for (name, field) in fields {
                    let unavailable = friendly && decoder.is_unavailable(*field, &mut { self.reader });
                    let value = self.value(*field, depth + 1)?;
                    if !unavailable {
                        out.insert(name.clone(), value);
                    }
                }
                match meaning {
                    Meaning::VariableScaleDecimal if friendly => decoder.variable_scale(fields, start)?,
                    _ => Value::Object(out),
                }
            }
            Node::Pending => return Err(AvroError::Schema("a name is not defined".into())),
        })
    }

    fn bytes(&self, bytes: &[u8], meaning: &Meaning) -> Result<Value, AvroError> {
        let friendly = (self.form == Form::Friendly).then(|| meaning.bytes(bytes)).flatten();
        Ok(friendly.unwrap_or_else(|| STANDARD.encode(bytes).into()))
    }
}

impl Decoder {
    fn branch(&self, union: usize, reader: &mut Reader<'_>) -> Result<usize, AvroError> {
        let Node::Union(branches) = &self.nodes[union] else {
            return Err(AvroError::Schema("not a union".into()));
        };
        let index = reader.long()?;
        let branch = usize::try_from(index).ok().and_then(|index| branches.get(index));
        branch.copied().ok_or_else(|| reader.malformed(format!("no branch {index} in a union of {}", branches.len())))
    }

    fn variable_scale(&self, fields: &[(String, usize)], mut reader: Reader<'_>) -> Result<Value, AvroError> {
        let [(_, scale), (_, value)] = fields else {
            return Err(AvroError::Schema("VariableScaleDecimal has a scale and a value".into()));
        };
        if !matches!((&self.nodes[*scale], &self.nodes[*value]), (Node::Int(_), Node::Bytes(_))) {
            return Err(AvroError::Schema("VariableScaleDecimal has an int scale and bytes".into()));
        }
        let scale = reader.long()?;
        let unscaled = reader.bytes()?;
        super::friendly::decimal(unscaled, scale).ok_or_else(|| reader.malformed("a decimal out of all proportion"))
    }

    /// Whether the value that follows stands for an unchanged TOAST value. Malformed bytes do not.
    fn is_unavailable(&self, node: usize, reader: &mut Reader<'_>) -> bool {
        self.try_is_unavailable(node, reader, 0).unwrap_or(false)
    }

    fn try_is_unavailable(&self, node: usize, reader: &mut Reader<'_>, depth: usize) -> Result<bool, AvroError> {
        if depth > 8 {
            return Ok(false);
        }
        Ok(match &self.nodes[node] {
            Node::Union(_) => {
                let branch = self.branch(node, reader)?;
                self.try_is_unavailable(branch, reader, depth + 1)?
            }
            Node::String(_) | Node::Bytes(_) => self.unavailable.is(reader.bytes()?),
            Node::Map(_) => reader.block()? == 1 && self.unavailable.is(reader.bytes()?),
            Node::Array(items) => match reader.block()? {
                0 => false,
                1 => self.try_is_unavailable(*items, reader, depth + 1)?,
                count => {
                    let bytes = self.unavailable.placeholder();
                    let bits = bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1));
                    if count == bytes.len() as u64 {
                        self.are_small_numbers(*items, bytes.iter().copied(), reader, depth)?
                    } else if count == bytes.len() as u64 * 8 {
                        self.are_small_numbers(*items, bits, reader, depth)?
                    } else {
                        false
                    }
                }
            },
            Node::Record { fields, meaning } => match (meaning, &fields[..]) {
                (Meaning::VariableScaleDecimal, [(_, scale), (_, value)]) => {
                    matches!(self.nodes[*scale], Node::Int(_))
                        && reader.long()? == 0
                        && self.try_is_unavailable(*value, reader, depth + 1)?
                }
                (Meaning::Geometry, [(_, wkb), ..]) => self.try_is_unavailable(*wkb, reader, depth + 1)?,
                _ => false,
            },
            _ => false,
        })
    }

    fn are_small_numbers(
        &self,
        node: usize,
        expected: impl Iterator<Item = u8>,
        reader: &mut Reader<'_>,
        depth: usize,
    ) -> Result<bool, AvroError> {
        for expected in expected {
            if self.small_number(node, reader, depth + 1)? != Some(f64::from(expected)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The value that follows, or its first field, as a number.
    fn small_number(&self, node: usize, reader: &mut Reader<'_>, depth: usize) -> Result<Option<f64>, AvroError> {
        if depth > 8 {
            return Ok(None);
        }
        let node = match &self.nodes[node] {
            Node::Union(_) => self.branch(node, reader)?,
            _ => node,
        };
        Ok(match &self.nodes[node] {
            Node::Boolean => Some(f64::from(reader.take(1)?[0])),
            Node::Int(_) | Node::Long(_) => Some(reader.long()? as f64),
            Node::Float => Some(f32::from_le_bytes(reader.take(4)?.try_into().unwrap_or_default()).into()),
            Node::Double => Some(f64::from_le_bytes(reader.take(8)?.try_into().unwrap_or_default())),
            Node::Record { fields, .. } => {
                let Some(((_, first), rest)) = fields.split_first() else { return Ok(None) };
                let number = self.small_number(*first, reader, depth + 1)?;
                let rest_of = Reader { body: reader.body, at: reader.at };
                let mut run = Run { decoder: self, reader: rest_of, form: Form::Raw, budget: 100 };
                for (_, field) in rest {
                    run.value(*field, depth + 1)?;
                }
                reader.at = run.reader.at;
                number
            }
            _ => None,
        })
    }
}

/// JSON has no NaN and no infinities: they are text.
fn double_value(value: f64) -> Value {
    match Number::from_f64(value) {
        Some(number) => Value::Number(number),
        None => special_float(value),
    }
}

/// The shortest text that gives the float back; its double would have more digits than it means.
fn float_text(value: f32) -> Value {
    match format!("{value:?}").parse() {
        Ok(number) if value.is_finite() => Value::Number(number),
        _ => special_float(value.into()),
    }
}

fn special_float(value: f64) -> Value {
    let text = if value.is_nan() {
        "NaN"
    } else if value > 0.0 {
        "Infinity"
    } else {
        "-Infinity"
    };
    text.into()
}

struct Compiler {
    nodes: Vec<Node>,
    /// Full name to node.
    names: HashMap<String, usize>,
}

impl Compiler {
    fn node(&mut self, json: &Value, namespace: &str, depth: usize) -> Result<usize, AvroError> {
        if depth > MOST_DEPTH || self.nodes.len() > 100_000 {
            return Err(AvroError::Schema("nested too deep, or too large".into()));
        }
        match json {
            Value::String(name) => self.named(name, namespace, &Meaning::Plain),
            Value::Array(branches) => {
                let branches = branches.iter().map(|branch| self.node(branch, namespace, depth + 1));
                let branches = branches.collect::<Result<Vec<_>, _>>()?;
                Ok(self.add(Node::Union(branches)))
            }
            Value::Object(map) => self.complex(map, namespace, depth),
            other => Err(AvroError::Schema(format!("{other} is no type"))),
        }
    }

    fn add(&mut self, node: Node) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn named(&mut self, name: &str, namespace: &str, meaning: &Meaning) -> Result<usize, AvroError> {
        let node = match name {
            "null" => Node::Null,
            "boolean" => Node::Boolean,
            "int" => Node::Int(meaning.clone()),
            "long" => Node::Long(meaning.clone()),
            "float" => Node::Float,
            "double" => Node::Double,
            "bytes" => Node::Bytes(meaning.clone()),
            "string" => Node::String(meaning.clone()),
            _ => {
                let full_name = full_name(name, namespace);
                let known = self.names.get(&full_name).or_else(|| self.names.get(name));
                return known.copied().ok_or_else(|| AvroError::Schema(format!("'{full_name}' is not defined")));
            }
        };
        Ok(self.add(node))
    }

    fn complex(&mut self, map: &Map<String, Value>, namespace: &str, depth: usize) -> Result<usize, AvroError> {
        let text = |name: &str| map.get(name).and_then(Value::as_str);
        let missing = |what: &str| AvroError::Schema(format!("a type lacks its '{what}'"));
        let kind = map.get("type").ok_or_else(|| missing("type"))?;
        let Value::String(kind) = kind else { return self.node(kind, namespace, depth + 1) };
        let meaning = Meaning::of(map);
        match kind.as_str() {
            "array" => {
                let items = self.node(map.get("items").ok_or_else(|| missing("items"))?, namespace, depth + 1)?;
                Ok(self.add(Node::Array(items)))
            }
            "map" => {
                let values = self.node(map.get("values").ok_or_else(|| missing("values"))?, namespace, depth + 1)?;
                Ok(self.add(Node::Map(values)))
            }
            "record" | "error" | "enum" | "fixed" => {
                let name = text("name").ok_or_else(|| missing("name"))?;
                let full_name = match text("namespace") {
                    Some(own) if !name.contains('.') => full_name(name, own),
                    _ => full_name(name, namespace),
                };
                let own_namespace = full_name.rsplit_once('.').map_or("", |(namespace, _)| namespace).to_owned();
                let at = self.add(Node::Pending);
                if self.names.insert(full_name.clone(), at).is_some() {
                    return Err(AvroError::Schema(format!("'{full_name}' is defined twice")));
                }
                self.nodes[at] = match kind.as_str() {
                    "enum" => Node::Enum(symbols(map).ok_or_else(|| missing("symbols"))?),
                    "fixed" => {
                        let size = map.get("size").and_then(Value::as_u64).ok_or_else(|| missing("size"))?;
                        Node::Fixed(usize::try_from(size).map_err(|_| missing("size"))?, meaning)
                    }
                    _ => {
                        let fields = map.get("fields").and_then(Value::as_array).ok_or_else(|| missing("fields"))?;
                        let fields = fields.iter().map(|field| self.field(field, &own_namespace, depth));
                        Node::Record { fields: fields.collect::<Result<_, _>>()?, meaning }
                    }
                };
                Ok(at)
            }
            name => self.named(name, namespace, &meaning),
        }
    }

    fn field(&mut self, field: &Value, namespace: &str, depth: usize) -> Result<(String, usize), AvroError> {
        let lacks = |what: &str| AvroError::Schema(format!("a field lacks its '{what}'"));
        let name = field.get("name").and_then(Value::as_str).ok_or_else(|| lacks("name"))?;
        let node = self.node(field.get("type").ok_or_else(|| lacks("type"))?, namespace, depth + 1)?;
        Ok((name.to_owned(), node))
    }
}

fn symbols(map: &Map<String, Value>) -> Option<Vec<String>> {
    map.get("symbols")?.as_array()?.iter().map(|symbol| symbol.as_str().map(str::to_owned)).collect()
}

fn full_name(name: &str, namespace: &str) -> String {
    if name.contains('.') || namespace.is_empty() { name.to_owned() } else { format!("{namespace}.{name}") }
}
