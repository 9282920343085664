//! YAML files to settings: every value knows its file, line and column, and every error says what would be right.
//!
//! A file is parsed into a tree of [`Node`]s. Each connector, beside its code, reads its own settings from a
//! [`Section`]; `Section::finish` refuses names that nobody asked for and suggests near ones. Dotted and nested
//! spellings are one (`topic.prefix: x` is `topic: {prefix: x}`); free maps are taken as they stand; a list is a
//! YAML list or one string split at commas. `${env:…}` and `${file:…}` are replaced in scalars when they are read
//! (so a command that does not read a setting does not need its secret), and what came from them is never shown.

mod error;
mod locate;
pub(crate) mod names;
mod node;
mod place;
mod reference;
mod section;
#[cfg(test)]
mod tests;
mod value;
mod yaml;

pub use error::ConfigError;
pub use node::{Node, NodeKind, Scalar};
pub use place::{Place, Spanned};
pub use section::Section;
pub use value::{ByteSize, FromNode, Secret, choose};
pub use yaml::{parse_file, parse_text};
