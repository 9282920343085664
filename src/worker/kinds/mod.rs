//! The kinds of connectors, by their `type:`. One file a kind, all with the same four entry points:
//! `Settings::read`, `run`, `plan`, `preview`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::systems::System;

/// What the settings of a connector may refer to while they are read.
pub struct World<'a> {
    pub systems: &'a BTreeMap<String, Arc<System>>,
    /// Folder of the worker's own state (embedded log, registry, spool files).
    pub state: &'a Path,
}
