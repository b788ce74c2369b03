//! What goes back: a reply or an error.

use crate::broker::advice;
use crate::protocol::{Error, MAX_MESSAGE, Reply};
use crate::sys::fdpass;
use crate::sys::readiness::room;
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use serde::Serialize;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use tokio::time::timeout;

/// A message to be sent. None of them has open files: those are sent by the keeper that has them.
#[derive(Debug)]
pub(super) struct Answer(Vec<u8>);

impl Answer {
    /// A reply.
    pub(super) fn reply<T: Serialize>(parameters: T) -> Self {
        Self(encode(&Reply { parameters, continues: false }))
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
        Ok(Self(bytes))
    }

    /// One reply of several.
    pub(super) fn one_of_many<T: Serialize>(parameters: T) -> Self {
        Self(encode(&Reply { parameters, continues: true }))
    }

    /// An error, and beside it what to do about it.
    pub(super) fn error(error: &Error) -> Self {
        Self(encode(&error.to_json(advice(error).as_deref())))
    }

    /// Sends what can be sent at once; whatever is missing then is lost.
    pub(super) fn send_what_fits(&self, socket: BorrowedFd<'_>) {
        let _ = self.send_part(socket, 0);
    }

    /// Sends all of it. A peer that does not read has `deadline` to do so; what it does not take
    /// is dropped.
    pub(super) async fn send(
        self,
        socket: BorrowedFd<'_>,
        deadline: Duration,
    ) -> Result<(), SendError> {
        let sent = self.send_part(socket, 0)?;
        if sent == self.0.len() {
            return Ok(());
        }
        // Boxed, because nearly every answer goes out at once and a connection's task should be
        // small.
        let rest = Box::pin(timeout(deadline, self.send_rest(socket, sent)));
        rest.await.unwrap_or(Err(SendError::NotRead))
    }

    async fn send_rest(&self, socket: BorrowedFd<'_>, mut sent: usize) -> Result<(), SendError> {
        while sent < self.0.len() {
            room(socket).await.map_err(SendError::Errno)?;
            sent += self.send_part(socket, sent)?;
        }
        Ok(())
    }

    /// Sends from `start` on. 0 says that the peer's queue is full.
    fn send_part(&self, socket: BorrowedFd<'_>, start: usize) -> Result<usize, SendError> {
        match fdpass::send(socket, &self.0[start..], &[], MsgFlags::MSG_DONTWAIT) {
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

/// Waits until a peer has read so much that a short reply surely fits: who else has the same container
/// must not wait while a keeper sends it.
///
/// # Errors
/// [`SendError::NotRead`]: it has not by then.
pub(super) async fn has_room(socket: BorrowedFd<'_>, deadline: Duration) -> Result<(), SendError> {
    let found = timeout(deadline, room(socket)).await.map_err(|_| SendError::NotRead)?;
    found.map_err(SendError::Errno)
}

fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // The types of the protocol have string keys and no floats: they can be written as JSON.
    let mut bytes = serde_json::to_vec(message).unwrap_or_default();
    bytes.push(0);
    bytes
}
