//! A socket that can be taken off the reactor for a while.
//!
//! A walsender sends row by row, and the reactor wakes a thread for every arrival, whether or not anyone waits for it.
//! Who means to let bytes gather says [`Socket::rest`]: until the next read or write nothing wakes anyone.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    RestingTcp(std::net::TcpStream),
    RestingUnix(std::os::unix::net::UnixStream),
    /// It could not be registered again.
    Lost,
}

impl Socket {
    /// Off the reactor until it is next read or written.
    pub fn rest(&mut self) -> io::Result<()> {
        *self = match std::mem::replace(self, Socket::Lost) {
            Socket::Tcp(stream) => Socket::RestingTcp(stream.into_std()?),
            Socket::Unix(stream) => Socket::RestingUnix(stream.into_std()?),
            resting => resting,
        };
        Ok(())
    }

    fn awake(&mut self) -> io::Result<&mut Self> {
        if let Socket::RestingTcp(_) | Socket::RestingUnix(_) | Socket::Lost = self {
            *self = match std::mem::replace(self, Socket::Lost) {
                Socket::RestingTcp(stream) => Socket::Tcp(TcpStream::from_std(stream)?),
                Socket::RestingUnix(stream) => Socket::Unix(UnixStream::from_std(stream)?),
                _ => return Err(io::ErrorKind::NotConnected.into()),
            };
        }
        Ok(self)
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut().awake()? {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            _ => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut().awake()? {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            _ => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut().awake()? {
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_flush(cx),
            _ => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut().awake()? {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            _ => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}
