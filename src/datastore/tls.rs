//! TLS to the datastore, by libpq's `sslmode`: what is encrypted, and what is verified.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{DatastoreError, DatastoreSettings, SslMode};

pub(super) fn connector(settings: &DatastoreSettings) -> Result<MakeRustlsConnect, DatastoreError> {
    let config = match client_config(settings)? {
        Some(config) => config,
        // Never used: the connection asks for no TLS.
        None => lenient(None, Arc::new(ring::default_provider()))?,
    };
    Ok(MakeRustlsConnect::new(config))
}

pub(super) fn client_config(settings: &DatastoreSettings) -> Result<Option<ClientConfig>, DatastoreError> {
    let provider = Arc::new(ring::default_provider());
    let by_name = match settings.ssl_mode {
        SslMode::Disable => return Ok(None),
        SslMode::Prefer => return lenient(None, provider).map(Some),
        SslMode::Require if settings.ssl_root_cert.is_none() => return lenient(None, provider).map(Some),
        SslMode::Require | SslMode::VerifyCa => false,
        SslMode::VerifyFull => true,
    };
    let roots = Arc::new(roots(settings)?);
    if by_name {
        return Ok(Some(builder(provider)?.with_root_certificates(roots).with_no_client_auth()));
    }
    let chain = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|error| DatastoreError::setup(format!("TLS to the datastore: {error}")))?;
    lenient(Some(chain), provider).map(Some)
}

fn builder(
    provider: Arc<CryptoProvider>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, DatastoreError> {
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| DatastoreError::setup(format!("TLS to the datastore: {error}")))
}

fn lenient(
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
) -> Result<ClientConfig, DatastoreError> {
    let verifier = Arc::new(Lenient { chain, provider: provider.clone() });
    Ok(builder(provider)?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

fn roots(settings: &DatastoreSettings) -> Result<RootCertStore, DatastoreError> {
    let mut roots = RootCertStore::empty();
    let Some(path) = &settings.ssl_root_cert else {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            return Err(DatastoreError::setup(
                "this machine has no trusted authorities; hint: name the server's with 'sslrootcert'",
            ));
        }
        return Ok(roots);
    };
    let wrong =
        |error: &dyn std::fmt::Display| DatastoreError::setup(format!("sslrootcert {}: {error}", path.display()));
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| wrong(&error))? {
        roots.add(certificate.map_err(|error| wrong(&error))?).map_err(|error| wrong(&error))?;
    }
    if roots.is_empty() {
        return Err(wrong(&"holds no certificate in PEM form"));
    }
    Ok(roots)
}

/// Less than everything is verified: the chain without the name (`verify-ca`), or nothing (`prefer` and plain `require`:
/// encrypted, from whomever). Whoever it is must have the certificate's key in any case.
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
