//! The worker over HTTP: health, metrics, status, the registry.
