//! YAML files to settings: every value knows its file, line and column, and every error says what would be right.
//!
//! A file is parsed into a tree of [`Node`]s. Each connector, beside its code, reads its own settings from a
//! [`Section`]; `Section::finish` refuses names that nobody asked for and suggests near ones. Dotted and nested
//! spellings are one (`topic.prefix: x` is `topic: {prefix: x}`); free maps are taken as they stand; a list is a
//! YAML list or one string split at commas. `${env:…}` and `${file:…}` are replaced in scalars, and what came
//! from them is never shown.

// mod error;
// mod node;
// mod section;

// pub use error::{ConfigError, Place};
// pub use node::{Node, NodeKind, Scalar, parse_file, parse_text};
// pub use section::{FromNode, Section, Spanned};
