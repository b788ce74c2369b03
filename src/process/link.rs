//! A link: Varlink over a connected stream socket, with open files beside the first byte of a message.
//! One call is under way at a time, so whatever files arrive before the end of a message are its own.

use crate::protocol::{Frames, MAX_MESSAGE};
use crate::sys::fdpass::{self, MAX_FDS, ReceiveError};
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A call that one process of this program makes on another.
pub trait Call: Serialize + DeserializeOwned {
    /// The method's full name.
    const NAME: &'static str;
    /// What it returns.
    type Reply: Serialize + DeserializeOwned + 'static;
}

/// The methods of an interface: its name with a dot behind it, and what each of them returns.
macro_rules! calls {
    ($interface:literal: $($name:ident -> $reply:ty),* $(,)?) => {
        $(impl $crate::process::link::Call for $name {
            const NAME: &'static str = concat!($interface, stringify!($name));
            type Reply = $reply;
        })*
    };
}
pub(super) use calls;

/// Why a link is of no more use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The other process has closed it, or ended.
    #[error("the other process has closed the link")]
    Closed,
    /// A system call failed.
    #[error("{call}: {} ({errno:?})", errno.desc())]
    Errno {
        /// Which.
        call: &'static str,
        /// What it said.
        errno: Errno,
    },
    /// The other process said what means nothing here.
    #[error("what came is no message of this link: {0}")]
    Malformed(String),
}

/// One message and the open files that came with it.
#[derive(Debug)]
pub struct Message {
    /// JSON, without the NUL.
    pub bytes: Vec<u8>,
    /// The open files, in the sender's order.
    pub fds: Vec<OwnedFd>,
}

/// Collects bytes and files until a message is whole.
#[derive(Debug, Default)]
struct Inbox {
    frames: Frames,
    fds: Vec<OwnedFd>,
}

impl Inbox {
    fn next(&mut self) -> Result<Option<Message>, Lost> {
        let message = self.frames.next_message().map_err(|e| Lost::Malformed(e.to_string()))?;
        let bytes = message.map(<[u8]>::to_vec);
        Ok(bytes.map(|bytes| Message { bytes, fds: std::mem::take(&mut self.fds) }))
    }

    /// Takes what there is, without waiting. False where there is nothing yet.
    fn fill(&mut self, socket: BorrowedFd<'_>) -> Result<bool, Lost> {
        let mut buffer = [0; 16 << 10];
        match fdpass::receive(socket, &mut buffer, MAX_FDS, MsgFlags::MSG_DONTWAIT) {
            Ok(got) if got.len == 0 => Err(Lost::Closed),
            Ok(got) => {
                self.frames.push(&buffer[..got.len]);
                self.fds.extend(got.fds);
                if self.fds.len() > MAX_FDS {
                    return Err(Lost::Malformed(format!("more than {MAX_FDS} files")));
                }
                Ok(true)
            }
            Err(ReceiveError::Errno(Errno::EAGAIN)) => Ok(false),
            Err(ReceiveError::Errno(Errno::ECONNRESET)) => Err(Lost::Closed),
            Err(ReceiveError::Errno(errno)) => Err(Lost::Errno { call: "recvmsg", errno }),
            Err(error) => Err(Lost::Malformed(error.to_string())),
        }
    }
}

#[derive(Serialize)]
struct CallFrame<'a, T> {
    method: &'a str,
    parameters: &'a T,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    more: bool,
}

/// Any frame, as far as it is to be read before its meaning is known.
#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(borrow, default)]
    method: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    error: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    parameters: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct ReplyFrame<'a, T> {
    parameters: &'a T,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    continues: bool,
}

#[derive(Serialize)]
struct ErrorFrame<'a, T> {
    error: &'a str,
    parameters: &'a T,
}

fn encode<T: Serialize>(frame: &T) -> Vec<u8> {
    // The types of a link have string keys and no floats: they can be written as JSON.
    let mut bytes = serde_json::to_vec(frame).unwrap_or_default();
    bytes.push(0);
    bytes
}

/// A call's bytes.
pub fn call<C: Call>(call: &C, more: bool) -> Vec<u8> {
    encode(&CallFrame { method: C::NAME, parameters: call, more })
}

/// A reply's bytes.
pub fn reply<T: Serialize>(parameters: &T, continues: bool) -> Vec<u8> {
    encode(&ReplyFrame { parameters, continues })
}

/// An error's bytes.
pub fn error<T: Serialize>(name: &str, parameters: &T) -> Vec<u8> {
    encode(&ErrorFrame { error: name, parameters })
}

/// A call's method and parameters.
///
/// # Errors
/// [`Lost::Malformed`].
pub fn parse_call(bytes: &[u8]) -> Result<(String, &str), Lost> {
    let frame: Frame<'_> = parse(bytes)?;
    let method = frame.method.ok_or_else(|| Lost::Malformed("no method".into()))?;
    Ok((method.into_owned(), frame.parameters.map_or("{}", RawValue::get)))
}

/// Parses what a frame holds.
///
/// # Errors
/// [`Lost::Malformed`].
pub fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Lost> {
    serde_json::from_slice(bytes).map_err(|error| Lost::Malformed(error.to_string()))
}

/// The end of a link that answers: it waits for nobody, its owner polls it.
#[derive(Debug)]
pub struct Answering {
    socket: OwnedFd,
    inbox: Inbox,
}

impl AsFd for Answering {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Answering {
    /// Takes a connected socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, inbox: Inbox::default() }
    }

    /// The next call that is there whole; `None` where it is not yet.
    ///
    /// # Errors
    /// The link is of no more use.
    pub fn next_call(&mut self) -> Result<Option<Message>, Lost> {
        loop {
            if let Some(message) = self.inbox.next()? {
                return Ok(Some(message));
            }
            if !self.inbox.fill(self.socket.as_fd())? {
                return Ok(None);
            }
        }
    }

    /// Sends a message whole or not at all: who does not read what it asked for has no more use of the
    /// link. Open files go beside its first byte.
    ///
    /// # Errors
    /// The link is of no more use.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Lost> {
        match fdpass::send(self.socket.as_fd(), bytes, fds, MsgFlags::MSG_DONTWAIT) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(_) => Err(Lost::Errno { call: "sendmsg", errno: Errno::EAGAIN }),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Err(Lost::Closed),
            Err(errno) => Err(Lost::Errno { call: "sendmsg", errno }),
        }
    }
}

/// The end of a link that asks, on the event loop.
#[derive(Debug)]
pub struct Asking {
    socket: AsyncFd<OwnedFd>,
    inbox: Inbox,
}

/// What came back: the parameters of a reply, or of an error, as text.
#[derive(Debug)]
pub enum Answer {
    /// A reply, and the open files that came with it.
    Reply(String, Vec<OwnedFd>),
    /// An error's name and its parameters.
    Error(String, String),
}

impl Asking {
    /// Takes a connected socket, which must be in non-blocking mode.
    ///
    /// # Errors
    /// What the event loop says.
    pub fn new(socket: OwnedFd) -> std::io::Result<Self> {
        let both = Interest::READABLE | Interest::WRITABLE;
        Ok(Self { socket: crate::sys::readiness::watch(socket, both)?, inbox: Inbox::default() })
    }

    /// Sends a message, with open files beside its first byte.
    ///
    /// # Errors
    /// The link is of no more use.
    pub async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Lost> {
        debug_assert!(bytes.len() <= MAX_MESSAGE);
        let mut sent = 0;
        while sent < bytes.len() {
            let ready = self.socket.writable().await;
            let mut ready =
                ready.map_err(|_| Lost::Errno { call: "epoll_wait", errno: Errno::EIO })?;
            let with = if sent == 0 { fds } else { &[] };
            let (socket, flags) = (self.socket.as_fd(), MsgFlags::MSG_DONTWAIT);
            match fdpass::send(socket, &bytes[sent..], with, flags) {
                Ok(count) => sent += count,
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(Lost::Closed),
                Err(errno) => return Err(Lost::Errno { call: "sendmsg", errno }),
            }
        }
        Ok(())
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// The link is of no more use.
    pub async fn next_answer(&mut self) -> Result<Answer, Lost> {
        loop {
            if let Some(message) = self.inbox.next()? {
                let frame: Frame<'_> = parse(&message.bytes)?;
                let parameters = frame.parameters.map_or("{}", RawValue::get).to_owned();
                return Ok(match frame.error {
                    None => Answer::Reply(parameters, message.fds),
                    Some(name) => Answer::Error(name.into_owned(), parameters),
                });
            }
            let ready = self.socket.readable().await;
            let mut ready =
                ready.map_err(|_| Lost::Errno { call: "epoll_wait", errno: Errno::EIO })?;
            if !self.inbox.fill(self.socket.as_fd())? {
                ready.clear_ready();
            }
        }
    }
}
