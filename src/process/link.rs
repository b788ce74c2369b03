//! A link: Varlink over a connected stream socket, with open files beside the first byte of a message.
//! One call is under way at a time, so whatever files arrive before the end of a message are its own.

use crate::protocol::{Frames, MAX_MESSAGE};
use crate::sys::fdpass::{self, MAX_FDS, Next};
use crate::sys::readiness::{room, watch};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, setsockopt, shutdown, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
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

    /// Takes what there is, without waiting. Whether there may be more: as long as it fills all the room
    /// for it, or ends with bytes that files came with.
    fn fill(&mut self, socket: BorrowedFd<'_>) -> Result<bool, Lost> {
        let mut buffer = [0; 4 << 10];
        match fdpass::receive_all(socket, &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(got) if got.len == 0 => Err(Lost::Closed),
            Ok(got) => {
                let more = got.len == buffer.len() || !got.fds.is_empty();
                self.frames.push(&buffer[..got.len]);
                self.fds.extend(got.fds);
                if got.cut {
                    return Err(Lost::Malformed("files for which there was no room".into()));
                }
                if self.fds.len() > MAX_FDS {
                    return Err(Lost::Malformed(format!("more than {MAX_FDS} files")));
                }
                Ok(more)
            }
            Err(errno) => not_received(errno),
        }
    }

    /// The same, and no file: bytes with files beside them stay where they are.
    fn fill_without_files(&mut self, socket: BorrowedFd<'_>) -> Result<bool, Lost> {
        let mut buffer = [0; 4 << 10];
        match fdpass::peek(socket, &mut buffer) {
            Ok(Next { len: 0, .. }) => Err(Lost::Closed),
            Ok(Next { fds: true, .. }) => Err(Lost::Malformed("files".into())),
            Ok(Next { len, .. }) => {
                let flags = MsgFlags::MSG_DONTWAIT;
                let got = fdpass::receive(socket, &mut buffer[..len], 0, flags);
                let got = got.map_err(|error| Lost::Malformed(error.to_string()))?;
                self.frames.push(&buffer[..got.len]);
                Ok(len == buffer.len())
            }
            Err(errno) => not_received(errno),
        }
    }
}

fn not_received(errno: Errno) -> Result<bool, Lost> {
    match errno {
        Errno::EAGAIN => Ok(false),
        Errno::ECONNRESET => Err(Lost::Closed),
        errno => Err(Lost::Errno { call: "recvmsg", errno }),
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

/// The end of a link that answers: it waits for nobody, its owner polls it. Whoever is at the other end may
/// have been taken over, and send files whose last close never returns.
#[derive(Debug)]
pub struct Answering {
    socket: OwnedFd,
    inbox: Inbox,
    takes_files: bool,
}

impl From<Answering> for OwnedFd {
    fn from(link: Answering) -> Self {
        link.socket
    }
}

impl AsFd for Answering {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Answering {
    /// Takes a connected socket.
    pub fn new(socket: OwnedFd) -> Self {
        // Urgent bytes would be passed over by a read otherwise, and their files closed by it. A kernel
        // without such has no option for it.
        let _ = setsockopt(&socket, sockopt::OobInline, &true);
        Self { socket, inbox: Inbox::default(), takes_files: true }
    }

    /// The same, for calls that come without files. Any that comes with one is malformed, and stays unread.
    pub fn without_files(socket: OwnedFd) -> Self {
        Self { takes_files: false, ..Self::new(socket) }
    }

    /// Ends a link that is lost. Where the other process has not just closed it, its files, and those that
    /// nobody has read, stay open for as long as this process is there: to close them could hang.
    pub fn end(self, why: &Lost) {
        if *why == Lost::Closed {
            return;
        }
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        keep_open(self.inbox.fds);
        keep_open([self.socket]);
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
            let socket = self.socket.as_fd();
            let is_more = match self.takes_files {
                true => self.inbox.fill(socket)?,
                false => self.inbox.fill_without_files(socket)?,
            };
            if !is_more {
                return self.inbox.next();
            }
        }
    }

    /// The next of the calls that have been read already.
    ///
    /// # Errors
    /// The link is of no more use.
    pub fn next_read_call(&mut self) -> Result<Option<Message>, Lost> {
        self.inbox.next()
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

/// Never closes these, not before this process ends.
pub fn keep_open(files: impl IntoIterator<Item = OwnedFd>) {
    for file in files {
        let _ = file.into_raw_fd();
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
        Ok(Self { socket: watch(socket, Interest::READABLE)?, inbox: Inbox::default() })
    }

    /// Sends a message, with open files beside its first byte.
    ///
    /// # Errors
    /// The link is of no more use.
    pub async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Lost> {
        debug_assert!(bytes.len() <= MAX_MESSAGE);
        let mut sent = 0;
        while sent < bytes.len() {
            let with = if sent == 0 { fds } else { &[] };
            let (socket, flags) = (self.socket.as_fd(), MsgFlags::MSG_DONTWAIT);
            match fdpass::send(socket, &bytes[sent..], with, flags) {
                Ok(count) => sent += count,
                Err(Errno::EAGAIN) => {
                    room(socket).await.map_err(|errno| Lost::Errno { call: "poll", errno })?;
                }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::keeper::Watch;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    /// Whether somebody has the other end of this pipe.
    fn is_open(read_end: &OwnedFd) -> bool {
        let mut ask = [nix::poll::PollFd::new(read_end.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut ask, nix::poll::PollTimeout::ZERO).unwrap() == 0
    }

    fn send(to: &UnixStream, bytes: &[u8], file: OwnedFd, flags: MsgFlags) {
        let sent = fdpass::send(to.as_fd(), bytes, &[file.as_fd()], flags);
        assert_eq!(sent, Ok(bytes.len()));
    }

    #[test]
    fn a_link_without_files_installs_and_closes_none_however_they_come() {
        for flags in [MsgFlags::empty(), MsgFlags::MSG_OOB] {
            let (theirs, ours) = UnixStream::pair().unwrap();
            let mut link = Answering::without_files(ours.into());
            fdpass::send(theirs.as_fd(), b"{\"method\":\"a\"}\0", &[], MsgFlags::empty()).unwrap();
            let (read_end, write_end) = nix::unistd::pipe().unwrap();
            send(&theirs, b"x", write_end, flags);
            // What came before is a call like any other.
            let first = link.next_call();
            assert!(
                matches!(&first, Ok(Some(message)) if message.fds.is_empty()) || first.is_err()
            );
            let lost = link.next_call().unwrap_err();
            assert!(matches!(lost, Lost::Malformed(_)), "{lost}");
            assert!(is_open(&read_end), "it was closed here");
            link.end(&lost);
            assert!(is_open(&read_end), "it was closed with the link");
            // Whoever is at the other end knows.
            let end = fdpass::send(theirs.as_fd(), b"x", &[], MsgFlags::empty());
            assert_eq!(end, Err(Errno::EPIPE));
        }
    }

    #[test]
    fn of_a_message_with_more_files_than_it_may_have_none_is_closed() {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let mut link = Answering::new(ours.into());
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        let many = vec![write_end.as_fd(); 200];
        fdpass::send(theirs.as_fd(), b"x", &many, MsgFlags::empty()).unwrap();
        drop(many);
        drop(write_end);
        let lost = link.next_call().unwrap_err();
        assert!(matches!(lost, Lost::Malformed(_)), "{lost}");
        link.end(&lost);
        assert!(is_open(&read_end));
    }

    #[test]
    fn calls_that_came_together_are_read_one_after_the_other() {
        let (mut asks, answers) = UnixStream::pair().unwrap();
        let mut answering = Answering::new(answers.into());
        asks.write_all(&[call(&Watch {}, true), call(&Watch {}, true)].concat()).unwrap();
        assert!(answering.next_call().unwrap().is_some());
        assert!(answering.next_read_call().unwrap().is_some());
        assert!(answering.next_read_call().unwrap().is_none());
        assert!(answering.next_call().unwrap().is_none());
        drop(asks);
        assert_eq!(answering.next_call().unwrap_err(), Lost::Closed);
    }

    #[test]
    fn answers_of_any_length_come_whole_and_their_end_is_seen() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (asks, mut answers) = UnixStream::pair().unwrap();
        asks.set_nonblocking(true).unwrap();
        runtime.block_on(async {
            let mut asking = Asking::new(asks.into()).unwrap();
            // Beside the length of one read, and of several.
            for length in 4096..4096 + 40 {
                for length in [length - 40, 3 * length] {
                    let text = "x".repeat(length);
                    answers.write_all(&reply(&text, false)).unwrap();
                    let Answer::Reply(got, _) = asking.next_answer().await.unwrap() else {
                        panic!()
                    };
                    assert_eq!(got, format!("\"{text}\""));
                }
            }
            drop(answers);
            assert_eq!(asking.next_answer().await.unwrap_err(), Lost::Closed);
        });
    }
}
