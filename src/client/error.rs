//! What can go wrong between a program and the broker.

use crate::kernel;
use crate::protocol::{self, FdKind};
use crate::sys::fdpass;
use nix::errno::Errno;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The result of a call to the broker.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call brought nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The broker answered: it will not, or can't.
    #[error("{error}")]
    Broker {
        /// What it says.
        error: protocol::Error,
        /// What to do about it, as the broker says.
        advice: Option<Box<str>>,
    },
    /// The broker answered with an error that this version of the client does not know.
    #[error("the broker answered {name} {parameters}")]
    Unknown {
        /// The error's name.
        name: String,
        /// What went with it, as JSON.
        parameters: String,
    },
    /// There is no talking to the broker.
    #[error("can't connect to {}: {} ({errno:?})", path.display(), errno.desc())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What connect(2) said.
        errno: Errno,
    },
    /// The connection ended while a call was under way that may not be made twice.
    #[error("the connection was lost during {method}, so nobody knows whether it was done")]
    Lost {
        /// The method.
        method: &'static str,
        /// What the socket said; `None` where the broker had closed it.
        errno: Option<Errno>,
    },
    /// The broker took too long. The connection has been closed, so nothing that it still answers
    /// is taken for the answer to another call.
    #[error("no answer to {method} within {after:?}")]
    Timeout {
        /// The method.
        method: &'static str,
        /// The time it was given.
        after: Duration,
    },
    /// The request is longer than one message may be.
    #[error("{method} would be {size} bytes long, a message is at most {most}", most = protocol::MAX_MESSAGE)]
    TooLong {
        /// The method.
        method: &'static str,
        /// Its length in bytes.
        size: usize,
    },
    /// The request can't be sent as it is.
    #[error("bad request: {field}: {reason}")]
    Request {
        /// What is wrong.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// What came is not what a broker sends.
    #[error("the answer to {method} makes no sense: {reason}")]
    Malformed {
        /// The method.
        method: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The open files that came were cut short, or are not those that the answer lists.
    #[error("open files were lost with the answer to {method}: {reason}")]
    Fds {
        /// The method.
        method: &'static str,
        /// What is wrong with them.
        reason: String,
    },
    /// The lease has no such open file.
    #[error("lease {lease} came without {}: {hint}", missing(*.kind, .name))]
    Missing {
        /// The lease.
        lease: String,
        /// What was looked for.
        kind: FdKind,
        /// Its name; empty for any.
        name: String,
        /// Why it is not there, or where it is.
        hint: String,
    },
    /// The kernel refused a call on one of the lease's open files.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The open files are a simulated kernel's, and this program is built without it.
    #[error("{object} of lease {lease} is a simulated one, as of vfio-brokerd --sim")]
    Simulated {
        /// The lease.
        lease: String,
        /// Which open file.
        object: String,
    },
    /// A system call of the client's own failed.
    #[error("{call}: {} ({errno:?})", errno.desc())]
    System {
        /// Which call.
        call: &'static str,
        /// What it said.
        errno: Errno,
    },
}

impl From<protocol::Error> for Error {
    fn from(error: protocol::Error) -> Self {
        Error::Broker { error, advice: None }
    }
}

impl Error {
    /// What to do about it; `None` where the error's own words say all.
    pub fn advice(&self) -> Option<String> {
        let advice = match self {
            Error::Broker { advice, .. } => advice.as_deref()?,
            Error::Unknown { parameters, .. } => return protocol::Error::advice_in(parameters),
            Error::Connect { path, errno } => to_connect(path, *errno),
            Error::Lost { method, .. } => after_loss(method),
            Error::Timeout { .. } => "a device may be slow to reset: see Client::set_timeout",
            Error::Malformed { .. } => "is the socket the broker's?",
            Error::Simulated { .. } => "build with feature \"sim\" to use it",
            Error::TooLong { .. }
            | Error::Request { .. }
            | Error::Fds { .. }
            | Error::Missing { .. }
            | Error::Kernel(_)
            | Error::System { .. } => return None,
        };
        Some(advice.to_owned())
    }

    pub(super) fn malformed(method: &'static str, reason: impl ToString) -> Self {
        Error::Malformed { method, reason: reason.to_string() }
    }

    pub(super) fn received(method: &'static str, error: fdpass::ReceiveError) -> Self {
        match error {
            fdpass::ReceiveError::Errno(errno) => Error::Lost { method, errno: Some(errno) },
            truncated => Error::Fds { method, reason: truncated.to_string() },
        }
    }
}

fn to_connect(path: &Path, errno: Errno) -> &'static str {
    let is_socket = |found: std::fs::Metadata| found.file_type().is_socket();
    match errno {
        Errno::ECONNREFUSED if !std::fs::metadata(path).is_ok_and(is_socket) => {
            "that is not a socket: is the path right?"
        }
        Errno::ENOENT => "is vfio-brokerd running, and is this its socket?",
        Errno::ECONNREFUSED => "the socket is there but nobody listens: is vfio-brokerd running?",
        Errno::EACCES | Errno::EPERM => {
            "this user may not write to the socket: see its mode and that of its directory"
        }
        Errno::EAGAIN | Errno::ETIMEDOUT => "vfio-brokerd takes no connections at the moment",
        Errno::EPROTOTYPE => "that is a socket of another kind, not the broker's",
        Errno::ENAMETOOLONG | Errno::EINVAL => {
            "the path is too long for a socket: 107 bytes at most"
        }
        _ => "is vfio-brokerd running?",
    }
}

fn after_loss(method: &str) -> &'static str {
    match method.rsplit('.').next() {
        Some("Acquire") => {
            "what it gave has gone back to the broker by itself, so it can be asked again"
        }
        Some("Release") => "close the lease's fds: that ends it too",
        _ => "vfio-brokerd may have been restarted; see `vfio-broker leases`",
    }
}

fn missing(kind: FdKind, name: &str) -> String {
    let kind = match kind {
        FdKind::Container => "a container",
        FdKind::Group => "a group",
        FdKind::Device => "a device",
        FdKind::Iommufd => "an iommufd",
        FdKind::Cdev => "a device node",
        FdKind::Lease => "a lease fd",
    };
    if name.is_empty() { kind.to_owned() } else { format!("{kind} {name}") }
}
