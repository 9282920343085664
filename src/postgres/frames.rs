//! Messages of the PostgreSQL protocol, cut out of received bytes without copying them.
//!
//! A message is a tag, its length (with itself, without the tag), its body. Nothing here trusts a length: a message
//! longer than [`MAX_MESSAGE`] is an error, and every read of a body is checked.

use super::{PostgresError, ServerError};

/// PostgreSQL limits a value to 1 GiB; a row of several may be longer in theory, but not be sent.
pub const MAX_MESSAGE: usize = 1 << 30;

/// One message: where it starts and ends is decided by [`next_frame`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub tag: u8,
    pub body: &'a [u8],
}

/// The message that starts at the beginning of `bytes`, and its whole length; `None` until all of it is there.
pub fn next_frame(bytes: &[u8]) -> Result<Option<(Frame<'_>, usize)>, PostgresError> {
    let Some((head, rest)) = bytes.split_first_chunk::<5>() else { return Ok(None) };
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if !(4..=MAX_MESSAGE).contains(&length) {
        return Err(PostgresError::Protocol(format!("a message '{}' of {length} bytes", head[0].escape_ascii())));
    }
    Ok(rest.get(..length - 4).map(|body| (Frame { tag: head[0], body }, length + 1)))
}

/// Reads a body from front to back.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn short() -> PostgresError {
        PostgresError::Protocol("a message ends too early".into())
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], PostgresError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or_else(Self::short)?;
        self.rest = rest;
        Ok(*head)
    }

    #[inline]
    pub fn u8(&mut self) -> Result<u8, PostgresError> {
        Ok(self.array::<1>()?[0])
    }

    #[inline]
    pub fn u16(&mut self) -> Result<u16, PostgresError> {
        self.array().map(u16::from_be_bytes)
    }

    #[inline]
    pub fn u32(&mut self) -> Result<u32, PostgresError> {
        self.array().map(u32::from_be_bytes)
    }

    #[inline]
    pub fn i32(&mut self) -> Result<i32, PostgresError> {
        self.array().map(i32::from_be_bytes)
    }

    #[inline]
    pub fn u64(&mut self) -> Result<u64, PostgresError> {
        self.array().map(u64::from_be_bytes)
    }

    #[inline]
    pub fn i64(&mut self) -> Result<i64, PostgresError> {
        self.array().map(i64::from_be_bytes)
    }

    #[inline]
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], PostgresError> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or_else(Self::short)?;
        self.rest = rest;
        Ok(head)
    }

    /// Text up to a zero byte, which is left out.
    pub fn text(&mut self) -> Result<&'a str, PostgresError> {
        let end = self.rest.iter().position(|byte| *byte == 0).ok_or_else(Self::short)?;
        let text = std::str::from_utf8(&self.rest[..end])
            .map_err(|_| PostgresError::Protocol("a name that is not UTF-8".into()))?;
        self.rest = &self.rest[end + 1..];
        Ok(text)
    }
}

/// The body of an ErrorResponse or NoticeResponse.
pub fn server_error(body: &[u8], during: &str) -> ServerError {
    let mut error = ServerError { during: during.chars().take(120).collect(), ..ServerError::default() };
    let mut rest = body;
    while let Some((&field, after)) = rest.split_first() {
        if field == 0 {
            break;
        }
        let Some(end) = after.iter().position(|byte| *byte == 0) else { break };
        let text = String::from_utf8_lossy(&after[..end]).into_owned();
        match field {
            b'V' => error.severity = text,
            b'S' if error.severity.is_empty() => error.severity = text,
            b'C' => error.code = text,
            b'M' => error.message = text,
            b'D' => error.detail = Some(text),
            b'H' => error.hint = Some(text),
            _ => {}
        }
        rest = &after[end + 1..];
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_cut_only_when_whole_and_lengths_are_not_trusted() {
        let bytes = b"d\0\0\0\x06hiZ\0\0\0\x05I";
        let (frame, length) = next_frame(bytes).unwrap().unwrap();
        assert_eq!((frame.tag, frame.body, length), (b'd', b"hi".as_slice(), 7));
        let (frame, _) = next_frame(&bytes[length..]).unwrap().unwrap();
        assert_eq!((frame.tag, frame.body), (b'Z', b"I".as_slice()));
        assert_eq!(next_frame(&bytes[..6]).unwrap(), None);
        assert!(next_frame(b"d\0\0\0\x03").is_err());
        assert!(next_frame(b"d\xff\xff\xff\xff").is_err());
    }

    #[test]
    fn an_error_response_is_told_with_its_hint() {
        let error = server_error(b"SFATAL\0VFATAL\0C42704\0Mno slot\0Hmake one\0\0", "START_REPLICATION");
        assert_eq!((error.code.as_str(), error.hint.as_deref()), ("42704", Some("make one")));
        assert!(error.to_string().contains("START_REPLICATION"));
        server_error(b"S", "");
        server_error(b"Sabc", "");
    }
}
