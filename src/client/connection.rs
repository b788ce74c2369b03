//! One connection to the broker, blocking, with a deadline for whatever is done on it. Its parts
//! serve QMP too.

use super::send::send;
use super::wire::{Inbox, Incoming, Lost, Outgoing};
use super::{Error, Result};
use crate::sys::fdpass::{self, MAX_FDS};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// When to give up; `None`: never.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    pub(crate) fn after(timeout: Option<Duration>) -> Self {
        Self(timeout.and_then(|timeout| Instant::now().checked_add(timeout)))
    }

    pub(crate) fn left(self) -> Option<Duration> {
        self.0.map(|at| at.saturating_duration_since(Instant::now()))
    }

    pub(crate) fn has_passed(self) -> bool {
        self.left() == Some(Duration::ZERO)
    }

    fn poll_timeout(self) -> PollTimeout {
        let Some(left) = self.left() else { return PollTimeout::NONE };
        // Rounded up: a poll that returns early would spin.
        let millis = left.as_micros().div_ceil(1000);
        PollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
    }
}

#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    inbox: Inbox,
}

impl Connection {
    pub(super) fn open(path: &Path, deadline: Deadline) -> Result<Self> {
        connect_socket(path, deadline)
            .map(|socket| Self { socket, inbox: Inbox::default() })
            .map_err(|errno| Error::Connect { path: path.to_owned(), errno })
    }

    /// Whether the broker has neither closed it nor said anything unasked.
    pub(super) fn is_usable(&self) -> bool {
        self.inbox.is_empty() && is_silent(self.socket.as_fd())
    }

    /// Sends a call. Where its open files are refused, it asks something first, so that the broker has
    /// let it in, and sends them once more.
    pub(super) fn send(
        &mut self,
        call: &Outgoing,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> std::result::Result<(), Lost> {
        match self.try_send(call, fds, deadline) {
            Err(lost) if lost.is_refusal_of_fds() => {}
            sent => return sent,
        }
        let greeting = Outgoing::greeting();
        self.try_send(&greeting, &[], deadline)
            .and_then(|()| self.receive(greeting.method, deadline))
            .map_err(Lost::before_the_call)?;
        self.try_send(call, fds, deadline).map_err(Lost::if_refused_again)
    }

    fn try_send(
        &self,
        call: &Outgoing,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> std::result::Result<(), Lost> {
        let (mut rest, mut fds) = (&call.bytes[..], fds);
        while !rest.is_empty() {
            match send(&self.socket, rest, fds) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    fds = &[];
                }
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, deadline)?,
                Err(errno) => return Err(Lost::Unsent(errno)),
            }
        }
        Ok(())
    }

    pub(super) fn receive(
        &mut self,
        method: &'static str,
        deadline: Deadline,
    ) -> std::result::Result<Incoming, Lost> {
        let mut buf = [0; 4096];
        loop {
            if let Some(incoming) = self.inbox.next(method).map_err(Lost::Bad)? {
                return Ok(incoming);
            }
            match fdpass::receive(self.socket.as_fd(), &mut buf, MAX_FDS, MsgFlags::MSG_DONTWAIT) {
                Ok(received) if received.len == 0 => return Err(Lost::Unanswered(None)),
                Ok(received) => {
                    self.inbox.push(buf.get(..received.len).unwrap_or_default(), received.fds);
                }
                Err(fdpass::ReceiveError::Errno(Errno::EAGAIN)) => {
                    self.wait(PollFlags::POLLIN, deadline)?;
                }
                Err(fdpass::ReceiveError::Errno(errno)) => {
                    return Err(Lost::Unanswered(Some(errno)));
                }
                Err(truncated) => return Err(Lost::Bad(Error::received(method, truncated))),
            }
        }
    }

    fn wait(&self, flags: PollFlags, deadline: Deadline) -> std::result::Result<(), Lost> {
        match ready(self.socket.as_fd(), flags, deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Lost::TimedOut),
            Err(errno) => Err(Lost::Unanswered(Some(errno))),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Waits until a socket is ready; false when the deadline came first.
pub(crate) fn ready(
    socket: BorrowedFd<'_>,
    flags: PollFlags,
    deadline: Deadline,
) -> std::result::Result<bool, Errno> {
    while !deadline.has_passed() {
        match poll(&mut [PollFd::new(socket, flags)], deadline.poll_timeout()) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno),
        }
    }
    Ok(false)
}

/// Whether the peer has neither closed nor sent anything that was not read.
pub(super) fn is_silent(socket: BorrowedFd<'_>) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(socket.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
}

/// A non-blocking socket that is connected to `path`.
pub(crate) fn connect_socket(
    path: &Path,
    deadline: Deadline,
) -> std::result::Result<UnixStream, Errno> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let address = UnixAddr::new(path)?;
    // connect(2) waits while the listener's queue is full, for as long as the send timeout says.
    if let Some(left) = deadline.left() {
        let millis = i64::try_from(left.as_millis()).unwrap_or(i64::MAX).max(1);
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::milliseconds(millis))?;
    }
    loop {
        match connect(socket.as_raw_fd(), &address) {
            Err(Errno::EINTR) if !deadline.has_passed() => {}
            other => break other?,
        }
    }
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(socket.into())
}
