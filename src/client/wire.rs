//! A call as bytes and a reply from bytes: what the blocking and the tokio client share. No I/O.

use super::{Error, Result};
use crate::protocol::{self, Frames, MAX_MESSAGE, Method};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::os::fd::OwnedFd;

/// A call, ready to be sent.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) method: &'static str,
    repeatable: bool,
    pub(super) bytes: Vec<u8>,
}

impl Outgoing {
    /// Encodes a call; with `more` it may be answered many times.
    pub(super) fn new<M: Method>(call: &M, more: bool) -> Result<Self> {
        let method = M::NAME;
        let mut bytes = protocol::encode(call, more)
            .map_err(|error| Error::Request { field: "parameters", reason: error.to_string() })?;
        bytes.push(0);
        if bytes.len() > MAX_MESSAGE {
            return Err(Error::TooLong { method, size: bytes.len() });
        }
        Ok(Self { method, repeatable: M::RULES.repeatable, bytes })
    }

    /// A call that changes nothing: once it is answered, the broker has let the connection in.
    pub(super) fn greeting() -> Self {
        const METHOD: &str = "org.varlink.service.GetInfo";
        Self {
            method: METHOD,
            repeatable: true,
            bytes: format!("{{\"method\":\"{METHOD}\"}}\0").into_bytes(),
        }
    }

    /// Whether the call can be made again on a new connection.
    pub(super) fn may_repeat_after(&self, lost: &Lost) -> bool {
        match lost {
            Lost::Unsent(_) => true,
            Lost::Unanswered(_) => self.repeatable,
            Lost::TimedOut | Lost::Bad(_) => false,
        }
    }

    /// The error for a call that is not repeated.
    pub(super) fn failed(&self, lost: Lost, timeout: Option<std::time::Duration>) -> Error {
        let method = self.method;
        match lost {
            Lost::Unsent(errno) => Error::Lost { method, errno: Some(errno) },
            Lost::Unanswered(errno) => Error::Lost { method, errno },
            Lost::TimedOut => Error::Timeout { method, after: timeout.unwrap_or_default() },
            Lost::Bad(error) => error,
        }
    }
}

/// How a connection failed under a call.
#[derive(Debug)]
pub(super) enum Lost {
    /// Before the broker had all of it: a message without its NUL byte is never acted on.
    Unsent(nix::errno::Errno),
    /// After it was sent and before it was answered; `None` where the broker closed.
    Unanswered(Option<nix::errno::Errno>),
    /// The deadline passed.
    TimedOut,
    /// What came is not a reply.
    Bad(Error),
}

impl Lost {
    /// Whether the kernel refuses the open files of a call. It does so for all clients (Linux 6.16 and
    /// later) until the broker has let the connection in, and sees that they may send some.
    pub(super) fn is_refusal_of_fds(&self) -> bool {
        matches!(self, Self::Unsent(nix::errno::Errno::EPERM))
    }

    /// What this is for the call that the greeting went before.
    pub(super) fn before_the_call(self) -> Self {
        match self {
            Self::Unanswered(errno) => Self::Unsent(errno.unwrap_or(nix::errno::Errno::ECONNRESET)),
            lost => lost,
        }
    }

    /// What a second refusal is: the broker's own.
    pub(super) fn if_refused_again(self) -> Self {
        if !self.is_refusal_of_fds() {
            return self;
        }
        let reason = "the broker takes no open files from this client: its tenant in the policy lacks \
                      the handout \"devices\"";
        Self::Bad(Error::Request { field: "memory", reason: reason.into() })
    }
}

/// One message and the open files that came with it.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) message: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// Collects bytes and fds until a message is whole. A connection has one call under way at a time,
/// so whatever fds arrive before its end belong to that message.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    frames: Frames,
    fds: Vec<OwnedFd>,
}

impl Inbox {
    pub(super) fn push(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.frames.push(bytes);
        self.fds.extend(fds);
    }

    pub(super) fn next(&mut self, method: &'static str) -> Result<Option<Incoming>> {
        if self.fds.len() > crate::sys::fdpass::MAX_FDS {
            let reason =
                format!("{} came, {} is the most", self.fds.len(), crate::sys::fdpass::MAX_FDS);
            return Err(Error::Fds { method, reason });
        }
        let message =
            self.frames.next_message().map_err(|oversize| Error::malformed(method, oversize))?;
        Ok(message.map(|message| Incoming {
            message: message.to_vec(),
            fds: std::mem::take(&mut self.fds),
        }))
    }

    /// Whether nothing is left over that nobody asked for.
    pub(super) fn is_empty(&self) -> bool {
        !self.frames.has_partial() && self.fds.is_empty()
    }
}

#[derive(Deserialize)]
struct ReplyFrame<'a> {
    #[serde(borrow)]
    error: Option<Cow<'a, str>>,
    #[serde(borrow)]
    parameters: Option<&'a RawValue>,
    #[serde(default)]
    continues: bool,
}

/// A reply to `M`, and whether more will follow.
///
/// # Errors
/// What the broker answered, or [`Error::Malformed`].
pub(super) fn decode<M: Method>(message: &[u8]) -> Result<(M::Reply, bool)> {
    let malformed = |error: serde_json::Error| Error::malformed(M::NAME, error);
    let frame: ReplyFrame<'_> = serde_json::from_slice(message).map_err(malformed)?;
    let parameters = frame.parameters.map_or("{}", RawValue::get);
    if let Some(name) = frame.error {
        let advice =
            |parameters| protocol::Error::advice_in(parameters).map(String::into_boxed_str);
        // Read by name: "parameters" may come first, or not at all.
        let error = serde_json::from_slice::<protocol::Error>(message);
        return Err(error.map_or_else(
            |_| Error::Unknown { name: name.into_owned(), parameters: parameters.to_owned() },
            |error| Error::Broker { error, advice: advice(parameters) },
        ));
    }
    let reply = serde_json::from_str(parameters).map_err(malformed)?;
    Ok((reply, frame.continues))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Fds, GetFds, Leases, Release, Topology, Watch};

    #[test]
    fn a_call_is_one_json_object_and_a_nul() {
        let call = GetFds { lease: "l1".into(), key: "k".into(), ..GetFds::default() };
        let bytes = Outgoing::new(&call, false).unwrap().bytes;
        let expected =
            br#"{"method":"org.vfiobroker.Broker.GetFds","parameters":{"lease":"l1","key":"k"}}"#;
        assert_eq!(bytes.split_last().unwrap(), (&0, &expected[..]));
        let watch = Outgoing::new(&Watch::default(), true).unwrap().bytes;
        assert!(watch.ends_with(b",\"more\":true}\0"));
    }

    #[test]
    fn a_call_over_64_kib_is_not_sent() {
        let call = GetFds { lease: "l".repeat(70_000), ..GetFds::default() };
        assert!(matches!(Outgoing::new(&call, false), Err(Error::TooLong { .. })));
    }

    #[test]
    fn only_calls_that_change_nothing_are_repeated_once_sent() {
        let gone = || Lost::Unanswered(None);
        let release = Release { lease: "l".into(), key: "k".into() };
        let release = Outgoing::new(&release, false).unwrap();
        assert!(!release.may_repeat_after(&gone()));
        assert!(release.may_repeat_after(&Lost::Unsent(nix::errno::Errno::EPIPE)));
        let list = Outgoing::new(&Leases {}, false).unwrap();
        assert!(list.may_repeat_after(&gone()) && !list.may_repeat_after(&Lost::TimedOut));
        assert!(Outgoing::new(&Topology {}, false).unwrap().may_repeat_after(&gone()));
    }

    #[test]
    fn replies_and_errors_are_told_apart() {
        let (reply, more) = decode::<GetFds>(br#"{"parameters":{"fds":[]}}"#).unwrap();
        assert_eq!((reply, more), (Fds { fds: Vec::new() }, false));
        let (_, more) =
            decode::<GetFds>(br#"{"continues":true,"parameters":{"fds":[],"new":1}}"#).unwrap();
        assert!(more);
        let denied =
            br#"{"parameters":{"rule":"r","new":1,"reason":"why","advice":"ask"},"error":"org.vfiobroker.Broker.Denied"}"#;
        let error = decode::<GetFds>(denied).unwrap_err();
        let Error::Broker { error: protocol::Error::Denied { device: None, .. }, .. } = &error
        else {
            panic!("{error}")
        };
        assert_eq!(error.advice().as_deref(), Some("ask"));
        for odd in [
            &br#"{"error":"org.varlink.service.PermissionDenied"}"#[..],
            br#"{"error":"org.vfiobroker.Broker.Denied","parameters":{}}"#,
        ] {
            let error = decode::<GetFds>(odd).unwrap_err();
            assert!(matches!(error, Error::Unknown { .. }), "{error}");
        }
        for odd in [&b""[..], b"[]", b"{}", b"\xff", br#"{"parameters":{"fds":1}}"#] {
            let error = decode::<GetFds>(odd).unwrap_err();
            assert!(matches!(error, Error::Malformed { .. }), "{error}");
        }
    }
}
