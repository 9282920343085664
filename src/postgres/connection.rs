//! Getting to a server: TCP or a Unix socket, TLS, start-up, SCRAM. What comes out is a [`Session`].

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::frontend;
use rustls::pki_types::ServerName;
use sha2::{Digest, Sha256, Sha384, Sha512};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::der::oid::db::rfc5912::{
    ECDSA_WITH_SHA_256, ECDSA_WITH_SHA_384, ECDSA_WITH_SHA_512, SHA_1_WITH_RSA_ENCRYPTION, SHA_256_WITH_RSA_ENCRYPTION,
    SHA_384_WITH_RSA_ENCRYPTION, SHA_512_WITH_RSA_ENCRYPTION,
};

use super::frames::Reader;
use super::socket::Socket;
use super::{PostgresError, Session};

/// Where a server is, as whom, and how it is trusted. `Debug` shows no secret.
#[derive(Clone)]
pub struct Address {
    /// Host name, IP address, or (starting with `/`) the folder of a Unix socket.
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: Option<Vec<u8>>,
    pub dbname: String,
    pub tls: Tls,
    /// Of SCRAM to the TLS connection (`channel_binding`).
    pub channel_binding: ChannelBinding,
    /// Settings of each session: how values are written as text must not hang on those of the role or database.
    pub settings: Vec<(&'static str, &'static str)>,
}

/// What `sslmode` comes to.
#[derive(Clone)]
pub enum Tls {
    Disable,
    /// Where the server has it.
    Prefer(Arc<rustls::ClientConfig>),
    /// Or no connection at all; what of the certificate is verified is up to the configuration.
    Require(Arc<rustls::ClientConfig>),
}

/// libpq's `channel_binding`: whether SCRAM proves that nobody stands between, whoever signed the certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBinding {
    Disable,
    /// Where server and certificate allow it.
    Prefer,
    /// Or no connection at all.
    Require,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Plain SQL.
    Sql,
    /// A walsender: replication commands, and SQL too.
    Replication,
}

impl std::fmt::Debug for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.place())
    }
}

const CONNECT: Duration = Duration::from_secs(10);
const START_UP: Duration = Duration::from_secs(20);

const UNBOUND: &str = "the server does not bind SCRAM to the connection, and channel_binding is 'require'";

impl Address {
    /// `role@host:port/database`
    pub fn place(&self) -> String {
        format!("{}@{}:{}/{}", self.user, self.host, self.port, self.dbname)
    }

    pub async fn connect(&self, purpose: Purpose) -> Result<Session, PostgresError> {
        let late = |after| PostgresError::Connection {
            address: self.place(),
            reason: format!("no answer within {} s", Duration::as_secs(&after)),
        };
        let stream = timeout(CONNECT, self.open()).await.map_err(|_| late(CONNECT))??;
        let mut session = Session::new(stream, self.place());
        timeout(START_UP, self.start(&mut session, purpose)).await.map_err(|_| late(START_UP))??;
        Ok(session)
    }

    fn broken(&self, error: &io::Error) -> PostgresError {
        PostgresError::Connection { address: self.place(), reason: error.to_string() }
    }

    async fn open(&self) -> Result<Stream, PostgresError> {
        if self.host.starts_with('/') {
            let path = format!("{}/.s.PGSQL.{}", self.host.trim_end_matches('/'), self.port);
            let unix = UnixStream::connect(path).await.map_err(|error| self.broken(&error))?;
            return Ok(Stream::Plain(Socket::Unix(unix)));
        }
        let tcp = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(|error| self.broken(&error))?;
        tcp.set_nodelay(true).map_err(|error| self.broken(&error))?;
        let (config, required) = match &self.tls {
            Tls::Disable => return Ok(Stream::Plain(Socket::Tcp(tcp))),
            Tls::Prefer(config) => (config, false),
            Tls::Require(config) => (config, true),
        };
        self.ask_for_tls(tcp, config, required).await
    }

    async fn ask_for_tls(
        &self,
        mut tcp: TcpStream,
        config: &Arc<rustls::ClientConfig>,
        required: bool,
    ) -> Result<Stream, PostgresError> {
        let mut request = BytesMut::new();
        frontend::ssl_request(&mut request);
        tcp.write_all(&request).await.map_err(|error| self.broken(&error))?;
        let answer = tcp.read_u8().await.map_err(|error| self.broken(&error))?;
        let tls = |reason: String| PostgresError::Tls { address: self.place(), reason };
        match answer {
            b'S' => {}
            b'N' if required => return Err(tls("the server does not offer it, and sslmode asks for it".into())),
            b'N' => return Ok(Stream::Plain(Socket::Tcp(tcp))),
            other => {
                return Err(PostgresError::Protocol(format!("'{}' in answer to SSLRequest", other.escape_ascii())));
            }
        }
        let name = ServerName::try_from(self.host.clone()).map_err(|error| tls(error.to_string()))?;
        let stream = TlsConnector::from(config.clone()).connect(name, Socket::Tcp(tcp)).await.map_err(|error| {
            if error.kind() == io::ErrorKind::InvalidData { tls(error.to_string()) } else { self.broken(&error) }
        })?;
        Ok(Stream::Tls(Box::new(stream)))
    }

    async fn start(&self, session: &mut Session, purpose: Purpose) -> Result<(), PostgresError> {
        let mut parameters =
            vec![("user", self.user.as_str()), ("database", self.dbname.as_str()), ("application_name", "tidegate")];
        parameters.extend_from_slice(&self.settings);
        if purpose == Purpose::Replication {
            parameters.push(("replication", "database"));
        }
        let mut out = BytesMut::new();
        frontend::startup_message(parameters, &mut out).map_err(|error| self.broken(&error))?;
        session.send(&out).await?;
        self.authenticate(session).await?;
        session.ready("start-up").await
    }

    fn refused(&self, reason: impl Into<String>) -> PostgresError {
        PostgresError::Authentication { address: self.place(), reason: reason.into() }
    }

    /// The mechanism out of those offered, and how it is bound.
    fn mechanism(
        &self,
        session: &Session,
        offered: &[String],
    ) -> Result<(&'static str, sasl::ChannelBinding), PostgresError> {
        let offers = |wanted: &str| offered.iter().any(|name| name == wanted);
        let end_point = match self.channel_binding {
            ChannelBinding::Disable => None,
            _ => session.end_point(),
        };
        match end_point {
            Some(hash) if offers(sasl::SCRAM_SHA_256_PLUS) => {
                Ok((sasl::SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(hash)))
            }
            _ if self.channel_binding == ChannelBinding::Require => Err(self
                .refused(format!("{UNBOUND}: it needs TLS on both sides, and a certificate with a hash to bind to"))),
            _ if !offers(sasl::SCRAM_SHA_256) => {
                Err(self.refused(format!("the server offers only {}", offered.join(", "))))
            }
            // A server that does offer binding learns so that somebody took the offer away.
            Some(_) => Ok((sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested())),
            None => Ok((sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported())),
        }
    }

    async fn authenticate(&self, session: &mut Session) -> Result<(), PostgresError> {
        let mut bound = self.channel_binding != ChannelBinding::Require;
        let mut scram: Option<sasl::ScramSha256> = None;
        loop {
            let body = session.expect(b'R', "authentication").await?;
            let mut reader = Reader::new(&body);
            let mut out = BytesMut::new();
            match reader.u32()? {
                0 => {
                    // A server that skips its own half of the proof is not the one that knows the password.
                    return match scram {
                        Some(_) => Err(self.refused("the server did not finish SCRAM")),
                        None if !bound => Err(self.refused(UNBOUND)),
                        None => Ok(()),
                    };
                }
                3 | 5 if !bound => return Err(self.refused(UNBOUND)),
                3 if session.is_encrypted() => {
                    frontend::password_message(self.secret()?, &mut out).map_err(|error| self.broken(&error))?;
                }
                3 => return Err(self.refused("the server asks for the password in clear, without TLS")),
                5 => {
                    let salt = reader.bytes(4)?.try_into().map_err(|_| self.refused("salt of a wrong length"))?;
                    let hash = md5_hash(self.user.as_bytes(), self.secret()?, salt);
                    frontend::password_message(hash.as_bytes(), &mut out).map_err(|error| self.broken(&error))?;
                }
                10 => {
                    let mut offered = Vec::new();
                    while let Ok(name) = reader.text() {
                        if !name.is_empty() {
                            offered.push(name.to_owned());
                        }
                    }
                    let (mechanism, binding) = self.mechanism(session, &offered)?;
                    bound |= mechanism == sasl::SCRAM_SHA_256_PLUS;
                    let proof = sasl::ScramSha256::new(self.secret()?, binding);
                    frontend::sasl_initial_response(mechanism, proof.message(), &mut out)
                        .map_err(|error| self.broken(&error))?;
                    scram = Some(proof);
                }
                11 => {
                    let proof = scram.as_mut().ok_or_else(|| self.refused("SCRAM was not begun"))?;
                    proof.update(reader.rest()).map_err(|error| self.refused(error.to_string()))?;
                    frontend::sasl_response(proof.message(), &mut out).map_err(|error| self.broken(&error))?;
                }
                12 => {
                    let mut proof = scram.take().ok_or_else(|| self.refused("SCRAM was not begun"))?;
                    proof.finish(reader.rest()).map_err(|error| self.refused(error.to_string()))?;
                    continue;
                }
                other => {
                    return Err(self.refused(format!(
                        "the server asks for method {other}; SCRAM, md5 and (under TLS) password are spoken"
                    )));
                }
            }
            session.send(&out).await?;
        }
    }

    fn secret(&self) -> Result<&[u8], PostgresError> {
        self.password.as_deref().ok_or_else(|| self.refused("the server asks for a password, and none is set"))
    }
}

/// The bytes below the protocol.
pub(super) enum Stream {
    Plain(Socket),
    Tls(Box<TlsStream<Socket>>),
}

impl Stream {
    pub(super) fn is_encrypted(&self) -> bool {
        matches!(self, Stream::Tls(_))
    }

    /// What SCRAM binds to (RFC 5929, `tls-server-end-point`): the server certificate's hash, by its signature's own
    /// hash function; `None` where it has none (Ed25519).
    pub(super) fn end_point(&self) -> Option<Vec<u8>> {
        let Stream::Tls(stream) = self else { return None };
        let certificate = stream.get_ref().1.peer_certificates()?.first()?;
        let signed = Certificate::from_der(certificate).ok()?.signature_algorithm.oid;
        Some(match signed {
            SHA_1_WITH_RSA_ENCRYPTION | SHA_256_WITH_RSA_ENCRYPTION | ECDSA_WITH_SHA_256 => {
                Sha256::digest(certificate).to_vec()
            }
            SHA_384_WITH_RSA_ENCRYPTION | ECDSA_WITH_SHA_384 => Sha384::digest(certificate).to_vec(),
            SHA_512_WITH_RSA_ENCRYPTION | ECDSA_WITH_SHA_512 => Sha512::digest(certificate).to_vec(),
            _ => return None,
        })
    }

    /// See [`Socket::rest`].
    pub(super) fn rest(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(socket) => socket.rest(),
            Stream::Tls(stream) => stream.get_mut().0.rest(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}
