//! One connection: simple queries, COPY out, replication commands; and the bytes of a stream.
//!
//! A session belongs to one task. A call that is dropped in its middle leaves the answer unread; the session knows
//! ([`Session::is_idle`]) and refuses further commands, and is then to be replaced.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::PostgresError;
use super::connection::Stream;
use super::frames::{Frame, Reader, next_frame, server_error};

/// What one read may bring, and the size of a chunk.
const READ: usize = 256 << 10;

pub struct Session {
    stream: Stream,
    address: String,
    received: BytesMut,
    /// A command is under way, or was given up in its middle.
    busy: bool,
}

/// Rows of a simple query, as text.
pub type Rows = Vec<Vec<Option<String>>>;

impl Session {
    pub(super) fn new(stream: Stream, address: String) -> Self {
        Session { stream, address, received: BytesMut::with_capacity(READ), busy: true }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// True when a command may be given.
    pub fn is_idle(&self) -> bool {
        !self.busy
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.stream.is_encrypted()
    }

    /// See [`Stream::end_point`].
    pub(super) fn end_point(&self) -> Option<Vec<u8>> {
        self.stream.end_point()
    }

    fn broken(&self, reason: impl Into<String>) -> PostgresError {
        PostgresError::Connection { address: self.address.clone(), reason: reason.into() }
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), PostgresError> {
        let sent = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        sent.await.map_err(|error| self.broken(error.to_string()))
    }

    /// Reads more bytes; safe to drop at its await.
    pub(super) async fn read_more(&mut self) -> Result<usize, PostgresError> {
        self.received.reserve(READ / 4);
        match self.stream.read_buf(&mut self.received).await {
            Ok(0) => Err(self.broken("the server closed the connection")),
            Ok(count) => Ok(count),
            Err(error) => Err(self.broken(error.to_string())),
        }
    }

    /// Lets bytes gather: until the next read or write their arrival wakes nobody.
    pub(super) fn rest(&mut self) -> Result<(), PostgresError> {
        self.stream.rest().map_err(|error| self.broken(error.to_string()))
    }

    pub(super) fn received(&mut self) -> &mut BytesMut {
        &mut self.received
    }

    /// The next message of interest: parameters and notices are passed over.
    async fn message(&mut self) -> Result<(u8, Bytes), PostgresError> {
        loop {
            let found = next_frame(&self.received)?.map(|(Frame { tag, .. }, length)| (tag, length));
            let Some((tag, length)) = found else {
                self.read_more().await?;
                continue;
            };
            let mut body = self.received.split_to(length).freeze();
            if matches!(tag, b'S' | b'N' | b'A' | b'K') {
                continue;
            }
            return Ok((tag, body.split_off(5)));
        }
    }

    pub(super) async fn expect(&mut self, wanted: u8, during: &str) -> Result<Bytes, PostgresError> {
        let (tag, body) = self.message().await?;
        match tag {
            b'E' => Err(PostgresError::Server(Box::new(server_error(&body, during)))),
            tag if tag == wanted => Ok(body),
            tag => Err(PostgresError::Protocol(format!("'{}' during {during}", tag.escape_ascii()))),
        }
    }

    pub(super) async fn ready(&mut self, during: &str) -> Result<(), PostgresError> {
        self.expect(b'Z', during).await?;
        self.busy = false;
        Ok(())
    }

    async fn command(&mut self, sql: &str) -> Result<(), PostgresError> {
        if self.busy {
            return Err(self.broken("an earlier command on this connection was given up"));
        }
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out).map_err(|error| self.broken(error.to_string()))?;
        self.busy = true;
        self.send(&out).await
    }

    /// Runs statements by the simple protocol, with a deadline; gives the rows of all of them.
    pub async fn query(&mut self, sql: &str, deadline: Duration) -> Result<Rows, PostgresError> {
        timeout(deadline, self.query_unbounded(sql))
            .await
            .unwrap_or_else(|_| Err(PostgresError::Timeout { what: sql.chars().take(120).collect(), after: deadline }))
    }

    async fn query_unbounded(&mut self, sql: &str) -> Result<Rows, PostgresError> {
        self.command(sql).await?;
        let mut rows = Vec::new();
        let mut failed = None;
        loop {
            let (tag, body) = self.message().await?;
            match tag {
                b'T' | b'C' | b'I' => {}
                b'D' => rows.push(data_row(&body)?),
                b'E' => failed = Some(server_error(&body, sql)),
                b'Z' => break,
                tag => return Err(PostgresError::Protocol(format!("'{}' in answer to SQL", tag.escape_ascii()))),
            }
            if let Some(error) = failed.take_if(|error| error.severity == "FATAL" || error.severity == "PANIC") {
                return Err(PostgresError::Server(Box::new(error)));
            }
        }
        self.busy = false;
        match failed {
            None => Ok(rows),
            Some(error) => Err(PostgresError::Server(Box::new(error))),
        }
    }

    /// Begins `COPY … TO STDOUT`; then [`Session::copy_chunk`] until it says `None`.
    pub async fn copy_out(&mut self, sql: &str) -> Result<(), PostgresError> {
        self.command(sql).await?;
        let (tag, body) = self.message().await?;
        match tag {
            b'H' => Ok(()),
            b'E' => {
                let error = server_error(&body, sql);
                self.ready(sql).await?;
                Err(PostgresError::Server(Box::new(error)))
            }
            tag => Err(PostgresError::Protocol(format!("'{}' in answer to COPY", tag.escape_ascii()))),
        }
    }

    /// Whole messages of a COPY, many at once, as they were received (each still with tag and length; only `d`).
    /// `None` when the COPY is over. Safe to drop at its await.
    pub async fn copy_chunk(&mut self, sql: &str) -> Result<Option<BytesMut>, PostgresError> {
        loop {
            let mut end = 0;
            let mut other = None;
            while let Some((frame, length)) = next_frame(&self.received[end..])? {
                if frame.tag != b'd' {
                    other = Some((frame.tag, length));
                    break;
                }
                end += length;
            }
            if end > 0 {
                return Ok(Some(self.received.split_to(end)));
            }
            match other {
                None => {
                    self.read_more().await?;
                }
                Some((b'E', _)) => {
                    let (_, body) = self.message().await?;
                    return Err(PostgresError::Server(Box::new(server_error(&body, sql))));
                }
                Some((b'Z', _)) => {
                    self.message().await?;
                    self.busy = false;
                    return Ok(None);
                }
                Some((b'c' | b'C' | b'S' | b'N' | b'A', length)) => {
                    let _ = self.received.split_to(length);
                }
                Some((tag, _)) => {
                    return Err(PostgresError::Protocol(format!("'{}' in a COPY", tag.escape_ascii())));
                }
            }
        }
    }

    /// Begins CopyBoth: from here on the bytes are the replication stream's.
    pub(super) async fn copy_both(&mut self, command: &str) -> Result<(), PostgresError> {
        self.command(command).await?;
        self.expect(b'W', command).await.map(drop)
    }

    /// Says goodbye; errors do not matter any more.
    pub async fn close(mut self) {
        let mut out = BytesMut::new();
        frontend::terminate(&mut out);
        let goodbye = async {
            self.send(&out).await?;
            self.stream.shutdown().await.map_err(|error| self.broken(error.to_string()))
        };
        let _ = timeout(Duration::from_secs(2), goodbye).await;
    }
}

fn data_row(body: &[u8]) -> Result<Vec<Option<String>>, PostgresError> {
    let mut reader = Reader::new(body);
    let count = reader.u16()?;
    let mut row = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let length = reader.i32()?;
        row.push(match usize::try_from(length) {
            Err(_) => None,
            Ok(length) => Some(String::from_utf8_lossy(reader.bytes(length)?).into_owned()),
        });
    }
    Ok(row)
}

/// Text as an SQL literal.
pub fn literal(text: &str) -> String {
    postgres_protocol::escape::escape_literal(text)
}

/// A name as an SQL identifier.
pub fn identifier(name: &str) -> String {
    postgres_protocol::escape::escape_identifier(name)
}

/// `"schema"."name"`
pub fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", identifier(schema), identifier(name))
}
