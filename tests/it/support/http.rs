//! An HTTP client for tests.

/// A client with time-outs; installs the TLS provider that the library leaves open.
pub fn http() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default(); // Err: one is there
    let timeout = std::time::Duration::from_secs(30);
    reqwest::Client::builder().timeout(timeout).build().expect("a client without special settings")
}
