//! A client that sends exactly what it is told to.

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use serde_json::{Value, json};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use vfio_broker::sys::fdpass;

/// What came back.
#[derive(Debug)]
pub enum Reply {
    Ok(Value, Vec<OwnedFd>),
    Error(String, Value),
}

impl Reply {
    pub fn ok(self) -> (Value, Vec<OwnedFd>) {
        match self {
            Self::Ok(parameters, fds) => (parameters, fds),
            Self::Error(name, parameters) => panic!("{name}: {parameters}"),
        }
    }

    /// The parameters of the error of this name; without a dot it is one of the broker's own.
    pub fn error(self, expected: &str) -> Value {
        let expected = match expected.contains('.') {
            true => expected.to_owned(),
            false => format!("org.vfiobroker.Broker.{expected}"),
        };
        match self {
            Self::Error(name, parameters) if name == expected => parameters,
            other => panic!("not {expected}: {other:?}"),
        }
    }

    /// A BadRequest about this field.
    pub fn bad(self, field: &str) -> String {
        let parameters = self.error("BadRequest");
        assert_eq!(parameters["field"], field, "{parameters}");
        parameters["reason"].as_str().unwrap().to_owned()
    }
}

/// A call of the broker's interface, or with a dot in its name of any, as bytes.
pub fn call(method: &str, parameters: &Value) -> Vec<u8> {
    let method = match method.contains('.') {
        true => method.to_owned(),
        false => format!("org.vfiobroker.Broker.{method}"),
    };
    bytes(&json!({ "method": method, "parameters": parameters }))
}

/// A message as bytes.
pub fn bytes(message: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(message).unwrap();
    bytes.push(0);
    bytes
}

/// A connection.
pub struct Raw {
    pub stream: UnixStream,
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Raw {
    pub fn connect(socket: &Path) -> Self {
        Self::of(UnixStream::connect(socket).unwrap())
    }

    /// A connection that somebody has made.
    pub fn of(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(super::SOON)).unwrap();
        Self { stream, buffer: Vec::new(), fds: Vec::new() }
    }

    /// Sends all of it; a daemon that has hung up already is no failure.
    pub fn send(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match fdpass::send(self.stream.as_fd(), bytes, &[], MsgFlags::empty()) {
                Err(Errno::EPIPE | Errno::ECONNRESET) => return,
                sent => bytes = &bytes[sent.unwrap()..],
            }
        }
    }

    /// Sends it in one sendmsg(2) with fds.
    pub fn send_with(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        fdpass::send(self.stream.as_fd(), bytes, fds, MsgFlags::empty())
            .map(|sent| assert_eq!(sent, bytes.len()))
    }

    pub fn call(&mut self, method: &str, parameters: Value) -> Reply {
        self.send(&call(method, &parameters));
        self.reply()
    }

    pub fn call_with(&mut self, method: &str, parameters: Value, fds: &[BorrowedFd<'_>]) -> Reply {
        self.send_with(&call(method, &parameters), fds).unwrap();
        self.reply()
    }

    pub fn reply(&mut self) -> Reply {
        self.try_reply().expect("the daemon hung up")
    }

    /// The next reply, or `None` at the end.
    pub fn try_reply(&mut self) -> Option<Reply> {
        let mut chunk = [0; 65536];
        let end = loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == 0) {
                break end;
            }
            match fdpass::receive(self.stream.as_fd(), &mut chunk, 16, MsgFlags::empty()) {
                Err(fdpass::ReceiveError::Errno(Errno::ECONNRESET)) => return None,
                Ok(got) if got.len == 0 => return None,
                got => {
                    let got = got.unwrap();
                    self.buffer.extend_from_slice(&chunk[..got.len]);
                    self.fds.extend(got.fds);
                }
            }
        };
        let message: Vec<u8> = self.buffer.drain(..=end).collect();
        let mut reply: Value = serde_json::from_slice(&message[..end]).unwrap();
        let parameters = reply["parameters"].take();
        // One read can bring several replies; each says how many of the fds are its own.
        let count = parameters["fds"].as_array().map_or(0, Vec::len);
        Some(match reply["error"].as_str() {
            Some(name) => Reply::Error(name.to_owned(), parameters),
            None => Reply::Ok(parameters, self.fds.drain(..count).collect()),
        })
    }

    /// Waits for the daemon to hang up; replies before that are dropped.
    pub fn hangs_up(&mut self) {
        while self.try_reply().is_some() {}
    }
}
