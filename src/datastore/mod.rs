//! All that Tidegate keeps in the datastore itself, in the schema `tidegate`: links, parked records, cursors, leases.

/// A handle on the datastore; cheap to clone.
#[derive(Clone)]
pub struct Datastore;
