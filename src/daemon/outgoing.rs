//! What goes back: a reply or an error, with its fds beside the first byte.

use super::incoming::Deferred;
use crate::broker::SentFd;
use crate::protocol::{Error, MAX_MESSAGE, Reply};
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use serde::Serialize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

/// A message to be sent.
#[derive(Debug)]
pub(super) struct Answer {
    bytes: Vec<u8>,
    fds: Enclosed,
}

/// The open files that go with an answer.
#[derive(Debug)]
enum Enclosed {
    /// Its own.
    Own(Deferred),
    /// The broker's, which it goes on keeping, and a lease pipe: dropping them here can't block.
    Kept(Vec<SentFd>),
}

impl Enclosed {
    fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Own(fds) => fds.fds().iter().map(AsFd::as_fd).collect(),
            Self::Kept(fds) => fds.iter().map(AsFd::as_fd).collect(),
        }
    }
}

impl Answer {
    /// A reply without fds.
    pub(super) fn reply<T: Serialize>(parameters: T) -> Self {
        Self::with_fds(parameters, Deferred::default())
    }

    /// A reply with fds.
    pub(super) fn with_fds<T: Serialize>(parameters: T, fds: Deferred) -> Self {
        Self { bytes: encode(&Reply { parameters, continues: false }), fds: Enclosed::Own(fds) }
    }

    /// A reply with what the broker keeps.
    pub(super) fn with_kept<T: Serialize>(parameters: T, fds: Vec<SentFd>) -> Self {
        Self { bytes: encode(&Reply { parameters, continues: false }), fds: Enclosed::Kept(fds) }
    }

    /// A reply that may be longer than a message can be.
    ///
    /// # Errors
    /// How long it would be.
    pub(super) fn if_it_fits<T: Serialize>(parameters: T, continues: bool) -> Result<Self, usize> {
        let bytes = encode(&Reply { parameters, continues });
        if bytes.len() > MAX_MESSAGE {
            return Err(bytes.len());
        }
        Ok(Self { bytes, fds: Enclosed::Kept(Vec::new()) })
    }

    /// One reply of several.
    pub(super) fn one_of_many<T: Serialize>(parameters: T) -> Self {
        let bytes = encode(&Reply { parameters, continues: true });
        Self { bytes, fds: Enclosed::Kept(Vec::new()) }
    }

    pub(super) fn error(error: &Error) -> Self {
        Self { bytes: encode(error), fds: Enclosed::Kept(Vec::new()) }
    }

    /// Sends what can be sent at once; whatever is missing then is lost.
    pub(super) fn send_what_fits(&self, socket: BorrowedFd<'_>) {
        let _ = self.send_part(socket, 0);
    }

    /// Sends all of it. A peer that does not read has `deadline` to do so; what it does not take
    /// is dropped, fds and all.
    pub(super) async fn send(
        self,
        socket: &AsyncFd<OwnedFd>,
        deadline: Duration,
    ) -> Result<(), SendError> {
        let sent = self.send_part(socket.as_fd(), 0)?;
        if sent == self.bytes.len() {
            return Ok(());
        }
        // Boxed, because nearly every answer goes out at once and a connection's task should be
        // small.
        let rest = Box::pin(timeout(deadline, self.send_rest(socket, sent)));
        rest.await.unwrap_or(Err(SendError::NotRead))
    }

    async fn send_rest(&self, socket: &AsyncFd<OwnedFd>, mut sent: usize) -> Result<(), SendError> {
        while sent < self.bytes.len() {
            let mut writable = socket.writable().await.map_err(|_| SendError::NotRead)?;
            let count = self.send_part(socket.as_fd(), sent)?;
            if count == 0 {
                writable.clear_ready();
            }
            sent += count;
        }
        Ok(())
    }

    /// Sends from `start` on; the fds go with the first byte. 0 says that the peer's queue is full.
    fn send_part(&self, socket: BorrowedFd<'_>, start: usize) -> Result<usize, SendError> {
        let fds: Vec<_> = match start {
            0 => self.fds.borrowed(),
            _ => Vec::new(),
        };
        match fdpass::send(socket, &self.bytes[start..], &fds, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => Ok(0),
            Err(errno) => Err(SendError::Errno(errno)),
            Ok(count) => Ok(count),
        }
    }
}

/// Why an answer did not go out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SendError {
    #[error("the peer does not read what it asked for")]
    NotRead,
    #[error("sendmsg: {} ({_0:?})", _0.desc())]
    Errno(Errno),
}

fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // The types of the protocol have string keys and no floats: they can be written as JSON.
    let mut bytes = serde_json::to_vec(message).unwrap_or_default();
    bytes.push(0);
    bytes
}
