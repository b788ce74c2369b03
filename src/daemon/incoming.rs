//! What a peer sends: bytes and open files, cut into messages.
//!
//! An fd belongs to the message it was sent with, if that message had a sendmsg(2) to itself: the
//! kernel ends a read with the bytes that fds came with, so they belong to the last message that
//! begins in that read. Fds that come in the midst of a message are a framing error.

use super::peer_socket::PeerSocket;
use crate::protocol::{Call, Error, Frames, Oversize, Request};
use std::os::fd::OwnedFd;

/// The open files that came with a message. Those that can be memory are in the queue of a socket: no
/// file of a client's is ever this process's.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// For each file, in the sender's order, what it is if it can't be memory.
    checked: Vec<Result<(), Error>>,
    queue: Option<PeerSocket<OwnedFd>>,
}

impl Sent {
    pub(super) fn new(checked: Vec<Result<(), Error>>, queue: Option<PeerSocket<OwnedFd>>) -> Self {
        Self { checked, queue }
    }

    pub(super) fn len(&self) -> usize {
        self.checked.len()
    }

    /// The socket that the file at `index` is in.
    ///
    /// # Errors
    /// [`Error::BadRequest`]: there is none, or it can't be memory.
    pub(super) fn queue_with(mut self, index: usize) -> Result<PeerSocket<OwnedFd>, Error> {
        let count = self.len();
        let not_there = || {
            let reason = format!("fd {index} is not there: {count} came with the call");
            Error::bad("memory", reason)
        };
        if index >= count {
            return Err(not_there());
        }
        self.checked.swap_remove(index)?;
        self.queue.ok_or_else(not_there)
    }
}

/// One message, parsed as far as it could be.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: Result<Request, Error>,
    pub(super) flags: Flags,
    pub(super) fds: Sent,
}

/// How the caller wants to be answered.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Flags {
    pub(super) more: bool,
    pub(super) oneway: bool,
    pub(super) upgrade: bool,
}

/// Fds came that belong to no message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("fds came in the midst of a message")]
pub(super) struct StrayFds;

/// What is no message: the connection ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoMessage {
    #[error("a message is longer than {0} bytes")]
    TooLong(usize),
    #[error("an empty message")]
    Empty,
}

/// What has come in and is not dealt with yet.
#[derive(Debug)]
pub(super) struct Incoming {
    /// The longest message that is taken, its NUL byte included.
    most_bytes: usize,
    frames: Frames,
    /// Fds, and how many messages come before the one they belong to. Two at most: one for a
    /// message of which a part is missing, one for a message after that.
    fds: Vec<(usize, Sent)>,
}

impl Incoming {
    pub(super) fn new(most_bytes: usize) -> Self {
        Self { most_bytes, frames: Frames::default(), fds: Vec::new() }
    }

    /// Takes messages of another length from here on.
    pub(super) fn limit(&mut self, most_bytes: usize) {
        self.most_bytes = most_bytes;
    }

    /// Adds what one read brought, at least a byte. Only when
    /// [`next_message`](Self::next_message) has nothing more.
    pub(super) fn push(&mut self, bytes: &[u8], fds: Sent) -> Result<(), StrayFds> {
        if fds.len() > 0 {
            let before = bytes.split_last().map_or(&[][..], |(_, before)| before);
            let ends = before.iter().filter(|&&byte| byte == 0).count();
            if ends == 0 && self.is_partial() {
                return Err(StrayFds);
            }
            self.fds.push((ends, fds));
        }
        self.frames.push(bytes);
        Ok(())
    }

    /// Whether part of a message is there.
    pub(super) fn is_partial(&self) -> bool {
        self.frames.has_partial()
    }

    /// The next message, if all of it is there.
    pub(super) fn next_message(&mut self) -> Result<Option<Message>, NoMessage> {
        let too_long = NoMessage::TooLong(self.most_bytes);
        let partial = self.frames.partial_len();
        let Some(bytes) = self.frames.next_message().map_err(|Oversize| too_long)? else {
            return if partial < self.most_bytes { Ok(None) } else { Err(too_long) };
        };
        match bytes.len() {
            // An answer to each would be a hundred times as long as what was sent.
            0 => return Err(NoMessage::Empty),
            len if len >= self.most_bytes => return Err(too_long),
            _ => {}
        }
        // serde would also take a struct's fields as a list.
        let object = bytes.trim_ascii_start().first() == Some(&b'{');
        let (request, flags) = match serde_json::from_slice::<Call<'_>>(bytes) {
            Ok(_) if !object => (Err(Error::bad("message", "not an object")), Flags::default()),
            Err(error) => (Err(Error::bad("message", error)), Flags::default()),
            Ok(call) => {
                let on = |flag: Option<bool>| flag.unwrap_or(false);
                let flags = Flags {
                    more: on(call.more),
                    oneway: on(call.oneway),
                    upgrade: on(call.upgrade),
                };
                (Request::parse(&call), flags)
            }
        };
        self.frames.shrink();
        let request = request.map_err(shorten);
        let fds = self.next_fds();
        Ok(Some(Message { request, flags, fds }))
    }

    fn next_fds(&mut self) -> Sent {
        let mut own = Sent::default();
        self.fds.retain_mut(|(before, fds)| match before.checked_sub(1) {
            Some(less) => {
                *before = less;
                true
            }
            None => {
                own = std::mem::take(fds);
                false
            }
        });
        own
    }
}

/// A parser's reason quotes what it was given: no more of it than is of use goes back.
fn shorten(error: Error) -> Error {
    const MOST: usize = 300;
    match error {
        Error::BadRequest { field, reason } if reason.chars().nth(MOST).is_some() => {
            let cut: String = reason.chars().take(MOST).collect();
            Error::BadRequest { field, reason: cut + "..." }
        }
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::MAX_MESSAGE;
    use crate::sys::fdpass;
    use nix::sys::socket::MsgFlags;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    const INFO: &[u8] = b"{\"method\":\"org.varlink.service.GetInfo\"}\0";

    /// Sends each part with that many fds, and gives the number of fds that each message got.
    fn counts(parts: &[(&[u8], usize)], buffer: usize) -> Result<Vec<usize>, StrayFds> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        for (bytes, fds) in parts {
            let fds = vec![ours.as_fd(); *fds];
            fdpass::send(ours.as_fd(), bytes, &fds, MsgFlags::empty()).unwrap();
        }
        drop(ours);
        let (mut incoming, mut counts) = (Incoming::new(MAX_MESSAGE), Vec::new());
        let mut buffer = vec![0; buffer];
        loop {
            let got = fdpass::receive_all(theirs.as_fd(), &mut buffer, MsgFlags::empty()).unwrap();
            if got.len == 0 {
                return Ok(counts);
            }
            let checked = got.fds.iter().map(|_| Ok(())).collect();
            incoming.push(&buffer[..got.len], Sent::new(checked, None))?;
            while let Some(message) = incoming.next_message().unwrap() {
                assert!(matches!(message.request, Ok(Request::GetInfo(_))));
                counts.push(message.fds.len());
            }
        }
    }

    #[test]
    fn fds_are_with_the_message_they_were_sent_with() {
        let two = [INFO, INFO].concat();
        for buffer in [1, 7, INFO.len(), INFO.len() + 3, 4096] {
            assert_eq!(
                counts(&[(INFO, 1), (INFO, 2), (INFO, 0), (INFO, 3)], buffer).unwrap(),
                [1, 2, 0, 3]
            );
            assert_eq!(counts(&[(INFO, 0), (INFO, 0), (INFO, 2)], buffer).unwrap(), [0, 0, 2]);
            assert_eq!(
                counts(&[(&two, 0), (INFO, 2), (&two, 0)], buffer).unwrap(),
                [0, 0, 2, 0, 0]
            );
            let (head, tail) = INFO.split_at(9);
            assert_eq!(counts(&[(head, 2), (tail, 0), (INFO, 1)], buffer).unwrap(), [2, 1]);
        }
    }

    #[test]
    fn fds_in_the_midst_of_a_message_are_an_error() {
        let (head, tail) = INFO.split_at(9);
        assert_eq!(counts(&[(head, 0), (tail, 2)], 9), Err(StrayFds));
    }

    #[test]
    fn a_reason_does_not_echo_a_long_request() {
        let mut incoming = Incoming::new(MAX_MESSAGE);
        let long = "x".repeat(60_000);
        let call = format!(
            "{{\"method\":\"org.vfiobroker.Broker.Leases\",\"parameters\":{{\"{long}\":1}}}}\0"
        );
        incoming.push(call.as_bytes(), Sent::default()).unwrap();
        let message = incoming.next_message().unwrap().unwrap();
        let Err(Error::BadRequest { reason, .. }) = message.request else { panic!() };
        assert!(reason.len() < 400);
    }
}
