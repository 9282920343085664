//! Nodes to the values that settings are made of.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use secrecy::SecretString;

use super::names::nearest;
use super::{ConfigError, Node, NodeKind, Scalar, Section, Spanned};

/// A secret: never shown, wiped when dropped. `expose_secret` (of `secrecy::ExposeSecret`) gives it.
pub type Secret = SecretString;

/// What a setting's node becomes. `name` is the setting's name, for errors.
pub trait FromNode: Sized {
    /// Whether names below the setting's (`headers.Accept`) belong to it.
    const MAP: bool = false;

    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError>;
}

impl FromNode for Node {
    const MAP: bool = true;

    fn from_node(node: Node, _: &str) -> Result<Self, ConfigError> {
        Ok(node)
    }
}

impl FromNode for Section {
    const MAP: bool = true;

    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        Section::new(node, name)
    }
}

impl FromNode for String {
    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        Ok(node.text(name)?.value)
    }
}

impl FromNode for Secret {
    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        Ok(Secret::from(node.text(name)?.value))
    }
}

/// A relative path starts at the folder of the file that names it.
impl FromNode for PathBuf {
    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        let path = node.text(name)?;
        Ok(path.place.beside(Path::new(&path.value)))
    }
}

impl FromNode for bool {
    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        match scalar(&node, name, "`true` or `false`")?.trim() {
            "true" | "True" | "TRUE" => Ok(true),
            "false" | "False" | "FALSE" => Ok(false),
            "yes" | "Yes" | "on" | "On" => Err(node.wrong(name, "`true` or `false`").hint("write `true`")),
            "no" | "No" | "off" | "Off" => Err(node.wrong(name, "`true` or `false`").hint("write `false`")),
            _ => Err(node.wrong(name, "`true` or `false`")),
        }
    }
}

/// The text of a scalar that is `wanted`; a map or list is told what would be right.
fn scalar(node: &Node, name: &str, wanted: &str) -> Result<Spanned<String>, ConfigError> {
    if node.is_scalar() { node.text(name) } else { Err(node.wrong(name, wanted)) }
}

fn number<T: FromStr>(node: &Node, name: &str, wanted: &str) -> Result<T, ConfigError> {
    scalar(node, name, wanted)?.trim().parse().map_err(|_| node.wrong(name, wanted))
}

macro_rules! whole_numbers {
    ($($type:ty),+) => {$(
        impl FromNode for $type {
            fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
                let (least, most) = (i128::from(<$type>::MIN as i64), <$type>::MAX as u128);
                // Nobody counts so far.
                let wanted = match (least, most) {
                    (0, 0x1_0000_0000..) => "a whole number, 0 or more".to_owned(),
                    (_, 0x1_0000_0000..) => "a whole number".to_owned(),
                    (least, most) => format!("a whole number from {least} to {most}"),
                };
                number(&node, name, &wanted)
            }
        }
    )+};
}

whole_numbers!(i32, i64, u8, u16, u32, u64, usize);

impl FromNode for f64 {
    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        let value: f64 = number(&node, name, "a number")?;
        if value.is_finite() { Ok(value) } else { Err(node.wrong(name, "a finite number")) }
    }
}

impl FromNode for Duration {
    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        const WANTED: &str = "a duration such as `500ms`, `2s`, `5m`, `1h`, `7d`";
        duration(scalar(&node, name, WANTED)?.trim()).ok_or_else(|| node.wrong(name, WANTED))
    }
}

/// A hundred years: what is longer is a slip, and no clock can be asked to add it.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 86_400);

/// `500ms`, `1.5s`, `1h30m`; a plain number is milliseconds, as in Kafka's settings.
fn duration(text: &str) -> Option<Duration> {
    if let Ok(milliseconds) = text.parse::<u64>() {
        return Some(Duration::from_millis(milliseconds)).filter(|time| *time <= LONGEST);
    }
    let mut rest = text;
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let unit_ends = rest[digits..].find(|c: char| !c.is_ascii_alphabetic()).map_or(rest.len(), |end| digits + end);
        let amount: f64 = rest[..digits].parse().ok()?;
        let seconds = match &rest[digits..unit_ends] {
            "ms" => amount / 1000.0,
            "s" => amount,
            "m" | "min" => amount * 60.0,
            "h" => amount * 3600.0,
            "d" => amount * 86_400.0,
            "w" => amount * 604_800.0,
            _ => return None,
        };
        sum = sum.checked_add(Duration::try_from_secs_f64(seconds).ok()?)?;
        rest = rest[unit_ends..].trim_start();
    }
    (!text.is_empty() && sum <= LONGEST).then_some(sum)
}

/// A number of bytes: `64kb`, `16mb`, `1gb` (by 1024), or a plain number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

impl ByteSize {
    pub const fn kb(amount: u64) -> Self {
        ByteSize(amount << 10)
    }

    pub const fn mb(amount: u64) -> Self {
        ByteSize(amount << 20)
    }

    pub const fn gb(amount: u64) -> Self {
        ByteSize(amount << 30)
    }

    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = self.0;
        for (unit, shift) in [("tb", 40), ("gb", 30), ("mb", 20), ("kb", 10)] {
            if size >= 1 << shift && size.trailing_zeros() >= shift {
                return write!(out, "{}{unit}", size >> shift);
            }
        }
        write!(out, "{size}")
    }
}

impl fmt::Debug for ByteSize {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl FromNode for ByteSize {
    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        const WANTED: &str = "a number of bytes such as `65536`, `64kb`, `16mb`, `1gb`";
        byte_size(scalar(&node, name, WANTED)?.trim()).ok_or_else(|| node.wrong(name, WANTED))
    }
}

fn byte_size(text: &str) -> Option<ByteSize> {
    if let Ok(bytes) = text.parse::<u64>() {
        return Some(ByteSize(bytes));
    }
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
    let unit: u64 = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return None,
    };
    if let Ok(whole) = text[..digits].parse::<u64>() {
        return whole.checked_mul(unit).map(ByteSize);
    }
    let amount: f64 = text[..digits].parse().ok()?;
    let bytes = amount * unit as f64;
    (bytes < u64::MAX as f64).then_some(ByteSize(bytes as u64))
}

impl<T: FromNode> FromNode for Spanned<T> {
    const MAP: bool = T::MAP;

    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        let place = node.place.clone();
        let masked = node.has_reference();
        Ok(Spanned::new(T::from_node(node, name)?, place).mask(masked))
    }
}

/// A YAML list; or one text split at commas (`\,` is a comma that does not split); a map is refused.
impl<T: FromNode> FromNode for Vec<T> {
    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        let items = match node.kind {
            NodeKind::List(items) => items,
            NodeKind::Scalar(_) => {
                let text = node.text(name)?;
                let item = |item| Node {
                    place: node.place.clone(),
                    kind: NodeKind::Scalar(Scalar::resolved(item, text.masked())),
                };
                at_commas(&text).into_iter().map(item).collect()
            }
            NodeKind::Null => Vec::new(),
            NodeKind::Map(_) => return Err(node.wrong(name, "a list")),
        };
        items.into_iter().map(|item| T::from_node(item, name)).collect()
    }
}

fn at_commas(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, items.last_mut()) {
            ('\\', Some(item)) if chars.next_if_eq(&',').is_some() => item.push(','),
            (',', _) => items.push(String::new()),
            (c, Some(item)) => item.push(c),
            (_, None) => {}
        }
    }
    items.iter().map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect()
}

/// A free map: names as they stand.
impl<T: FromNode> FromNode for BTreeMap<String, T> {
    const MAP: bool = true;

    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        let NodeKind::Map(entries) = node.kind else { return Err(node.wrong(name, "a map (`name: value`)")) };
        entries.into_iter().map(|(name, node)| Ok((name.value.clone(), T::from_node(node, &name)?))).collect()
    }
}

/// A free map whose order counts.
impl<T: FromNode> FromNode for Vec<(Spanned<String>, T)> {
    const MAP: bool = true;

    fn from_node(node: Node, name: &str) -> Result<Self, ConfigError> {
        let NodeKind::Map(entries) = node.kind else { return Err(node.wrong(name, "a map (`name: value`)")) };
        let entry = |(name, node): (Spanned<String>, Node)| {
            let value = T::from_node(node, &name)?;
            Ok((name, value))
        };
        entries.into_iter().map(entry).collect()
    }
}

/// One of a few words. Usually through [`choices!`](crate::choices).
pub fn choose<T: Clone>(node: &Node, name: &str, choices: &[(&str, T)]) -> Result<T, ConfigError> {
    let words = || choices.iter().map(|(word, _)| format!("`{word}`")).collect::<Vec<_>>().join(", ");
    let text = node.text(name)?;
    if let Some((_, value)) = choices.iter().find(|(word, _)| word.eq_ignore_ascii_case(text.trim())) {
        return Ok(value.clone());
    }
    let error = node.wrong(name, &format!("one of {}", words()));
    match nearest(&text, choices.iter().map(|(word, _)| *word)) {
        Some(near) if !text.masked() => Err(error.hint(format!("did you mean `{near}`?"))),
        _ => Err(error),
    }
}

/// `choices!(Conflict { "upstream" => Conflict::Upstream, "merge" => Conflict::Merge })`: reads an enum.
#[macro_export]
macro_rules! choices {
    ($type:ty { $($word:literal => $value:expr),+ $(,)? }) => {
        impl $crate::config::FromNode for $type {
            fn from_node(node: $crate::config::Node, name: &str) -> Result<Self, $crate::config::ConfigError> {
                $crate::config::choose(&node, name, &[$(($word, $value)),+])
            }
        }
    };
}
