//! One connection to a monitor, blocking, with a deadline for whatever is asked.

use super::lines::Lines;
use super::message::{self, Event, Message, Version};
use super::{Error, Result};
use crate::client::connection::{Deadline, connect_socket, ready};
use crate::client::send::send;
use crate::sys::fdpass::{self, ReceiveError};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::MsgFlags;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long an answer may take, unless told otherwise. Plugging in a device pins the guest's memory.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How many events wait to be asked for; of more, the oldest are forgotten.
const MOST_EVENTS: usize = 1024;

/// How many bytes they may have come in: what a line becomes takes many times its size.
const MOST_EVENT_BYTES: usize = 1 << 20;

/// A connection to a QEMU's monitor.
///
/// Names of open files that QEMU was given by [`Monitor::getfd`] belong to the monitor: they outlive
/// the connection, and QEMU's other monitors do not know them.
#[derive(Debug)]
pub struct Monitor {
    socket: UnixStream,
    lines: Lines,
    /// Each with the length of its line.
    events: VecDeque<(usize, Event)>,
    timeout: Duration,
    version: Version,
    calls: u64,
    /// A command got no answer: what comes now may be its.
    broken: bool,
}

impl Monitor {
    /// Connects to the monitor at `path` and gets it ready for commands.
    ///
    /// # Errors
    /// [`Error::Connect`]; [`Error::Timeout`] where it is silent, as one is that has a client.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::connect_within(path, TIMEOUT)
    }

    /// The same, with another time for this and each further answer.
    ///
    /// # Errors
    /// As [`Monitor::connect`].
    pub fn connect_within(path: impl AsRef<Path>, timeout: Duration) -> Result<Self> {
        let path = path.as_ref();
        let socket = connect_socket(path, Deadline::after(Some(timeout)))
            .map_err(|errno| Error::Connect { path: path.to_owned(), errno })?;
        let mut monitor = Self {
            socket,
            lines: Lines::default(),
            events: VecDeque::new(),
            timeout,
            version: Version { major: 0, minor: 0, micro: 0 },
            calls: 0,
            broken: false,
        };
        monitor.version = monitor.greeting()?;
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// How long an answer may take, 30 s unless set.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Has QEMU do a command; returns what it returns. Events that come meanwhile wait for
    /// [`Monitor::event`].
    ///
    /// # Errors
    /// [`Error::Command`] where QEMU did it and it failed; with all others the connection is of no
    /// more use.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.call(command, arguments, &[])
    }

    /// Gives QEMU a copy of an open file, to be named in a later command on this monitor. A file that
    /// already has the name is closed.
    ///
    /// # Errors
    /// As [`Monitor::execute`].
    pub fn getfd(&mut self, name: &str, file: impl AsFd) -> Result<()> {
        self.call("getfd", json!({ "fdname": name }), &[file.as_fd()]).map(drop)
    }

    /// The next event, waited for at most this long.
    ///
    /// # Errors
    /// All but [`Error::Command`] and [`Error::Timeout`].
    pub fn event(&mut self, within: Duration) -> Result<Option<Event>> {
        const DURING: &str = "the wait for an event";
        if self.broken {
            return Err(Error::Broken { command: DURING.into() });
        }
        let deadline = Deadline::after(Some(within));
        while self.events.is_empty() {
            match self.message(DURING, deadline) {
                Ok(Some((len, Message::Event(event)))) => self.keep(len, event),
                // The answer to somebody who has gone.
                Ok(Some(_)) if !deadline.has_passed() => {}
                Ok(_) => return Ok(None),
                Err(error) => return Err(self.broke(error)),
            }
        }
        Ok(self.events.pop_front().map(|(_, event)| event))
    }

    /// Forgets the events that wait to be asked for.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    fn greeting(&mut self) -> Result<Version> {
        const DURING: &str = "the greeting";
        let deadline = Deadline::after(Some(self.timeout));
        loop {
            match self.message(DURING, deadline)? {
                Some((_, Message::Greeting(version))) => return Ok(version),
                // What QEMU still had to say to the last client.
                Some(_) if !deadline.has_passed() => {}
                _ => return Err(self.late(DURING)),
            }
        }
    }

    fn call(&mut self, command: &str, arguments: Value, files: &[BorrowedFd<'_>]) -> Result<Value> {
        if self.broken {
            return Err(Error::Broken { command: command.to_owned() });
        }
        let result = self.ask(command, arguments, files);
        match result {
            Err(error) if !error.is_answer() => Err(self.broke(error)),
            answer => answer,
        }
    }

    fn ask(&mut self, command: &str, arguments: Value, files: &[BorrowedFd<'_>]) -> Result<Value> {
        let deadline = Deadline::after(Some(self.timeout));
        // QEMU may still answer a client that has gone, to whoever connects next.
        self.calls += 1;
        let ours = json!(format!("vfio-broker-{}-{}", std::process::id(), self.calls));
        let call = json!({ "execute": command, "arguments": arguments, "id": ours });
        self.send(command, &format!("{call}\n"), files, deadline)?;
        loop {
            let Some((len, message)) = self.message(command, deadline)? else {
                return Err(self.late(command));
            };
            match message {
                Message::Event(event) => self.keep(len, event),
                Message::Return { id, value } if id == ours => return Ok(value),
                // What QEMU could not even read has no id.
                Message::Error { id, class, desc } if id == ours || id.is_null() => {
                    return Err(Error::Command { command: command.to_owned(), class, desc });
                }
                _ => {}
            }
            // Who says other things all the time has not answered either.
            if deadline.has_passed() {
                return Err(self.late(command));
            }
        }
    }

    fn send(
        &self,
        command: &str,
        text: &str,
        mut files: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<()> {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match send(&self.socket, rest, files) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    files = &[];
                }
                Err(Errno::EAGAIN) => {
                    if !self.ready(command, PollFlags::POLLOUT, deadline)? {
                        return Err(self.late(command));
                    }
                }
                Err(errno) => return Err(closed(command, Some(errno))),
            }
        }
        Ok(())
    }

    /// The next message, with the length of its line; `None` when the deadline comes first.
    fn message(&mut self, during: &str, deadline: Deadline) -> Result<Option<(usize, Message)>> {
        let malformed = |reason| Error::Malformed { during: during.to_owned(), reason };
        let mut buf = [0; 4096];
        let mut looked = false;
        loop {
            let line = self.lines.next_line().map_err(|error| malformed(error.to_string()))?;
            if let Some(line) = line {
                let message = message::parse(&line).map_err(malformed)?;
                return Ok(Some((line.len(), message)));
            }
            // What comes all the time need not be a line.
            if looked && deadline.has_passed() {
                return Ok(None);
            }
            looked = true;
            match fdpass::receive(self.socket.as_fd(), &mut buf, 0, MsgFlags::MSG_DONTWAIT) {
                Ok(received) if received.len == 0 => return Err(closed(during, None)),
                Ok(received) => self.lines.push(buf.get(..received.len).unwrap_or_default()),
                Err(ReceiveError::Errno(Errno::EAGAIN)) => {
                    if !self.ready(during, PollFlags::POLLIN, deadline)? {
                        return Ok(None);
                    }
                }
                Err(ReceiveError::Errno(errno)) => return Err(closed(during, Some(errno))),
                Err(ReceiveError::Truncated { .. }) => {
                    return Err(malformed("open files came with it".into()));
                }
            }
        }
    }

    fn ready(&self, during: &str, flags: PollFlags, deadline: Deadline) -> Result<bool> {
        ready(self.socket.as_fd(), flags, deadline).map_err(|errno| closed(during, Some(errno)))
    }

    fn keep(&mut self, len: usize, event: Event) {
        self.events.push_back((len, event));
        let mut bytes: usize = self.events.iter().map(|(len, _)| len).sum();
        while self.events.len() > MOST_EVENTS || bytes > MOST_EVENT_BYTES {
            let Some((len, _)) = self.events.pop_front() else { break };
            bytes -= len;
        }
    }

    fn late(&self, during: &str) -> Error {
        Error::Timeout { during: during.to_owned(), after: self.timeout }
    }

    fn broke(&mut self, error: Error) -> Error {
        self.broken = true;
        error
    }
}

fn closed(during: &str, errno: Option<Errno>) -> Error {
    Error::Closed { during: during.to_owned(), errno }
}
