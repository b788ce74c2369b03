//! What can go wrong between a program and QEMU's monitor.

use nix::errno::Errno;
use std::path::PathBuf;
use std::time::Duration;

/// The result of something asked of a monitor.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a monitor gave no answer, or which.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// QEMU has done the command, and it failed. The monitor can be used on.
    #[error("QEMU's {command} failed: {desc} ({class})")]
    Command {
        /// The command.
        command: String,
        /// QEMU's class of errors; `GenericError` for nearly all.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// There is no monitor to talk to.
    #[error("can't connect to the monitor {}: {} ({errno:?})", path.display(), errno.desc())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What connect(2) said.
        errno: Errno,
    },
    /// No answer in time. The connection is of no more use, and what was asked may still be done.
    #[error("no answer from QEMU to {during} within {after:?}")]
    Timeout {
        /// The command, or `the greeting`.
        during: String,
        /// The time it was given.
        after: Duration,
    },
    /// The monitor has closed the connection, or the system has.
    #[error(
        "QEMU closed its monitor during {during}{}",
        errno.map_or(String::new(), |errno| format!(" ({errno:?})"))
    )]
    Closed {
        /// The command, or `the greeting`.
        during: String,
        /// What the socket said; `None` at its end.
        errno: Option<Errno>,
    },
    /// What came is not QMP.
    #[error("what came during {during} is not QMP: {reason}")]
    Malformed {
        /// The command, or `the greeting`.
        during: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An earlier command got no answer, so nothing can be said to this connection any more.
    #[error("{command} was not sent: an earlier command got no answer")]
    Broken {
        /// The command.
        command: String,
    },
}

impl Error {
    /// What to do about it; QEMU's own refusals are its own words.
    pub fn advice(&self) -> Option<&'static str> {
        match self {
            Error::Command { .. } => None,
            Error::Connect { errno, .. } => Some(to_connect(*errno)),
            Error::Timeout { during, .. } => Some(silence(during)),
            Error::Closed { .. } => Some("has it ended?"),
            Error::Malformed { .. } => Some("is the socket a QMP monitor's?"),
            Error::Broken { .. } => Some("connect again"),
        }
    }

    /// Whether the connection can still be used: the command failed, not the conversation.
    pub fn is_answer(&self) -> bool {
        matches!(self, Error::Command { .. })
    }
}

fn to_connect(errno: Errno) -> &'static str {
    match errno {
        Errno::EACCES | Errno::EPERM => {
            "this user may not write to the socket: see its mode and that of its directory"
        }
        _ => "is QEMU running, and with -qmp unix:PATH,server=on,wait=off?",
    }
}

fn silence(during: &str) -> &'static str {
    match during {
        // QEMU accepts a second client only when the first has gone.
        "the greeting" => {
            "is another client connected, as a monitor serves one at a time, or is this no QMP monitor?"
        }
        _ => "QEMU may be busy, or stopped",
    }
}
