//! Why a daemon does not start, or does not go on.

use std::path::PathBuf;

/// Why the daemon did not start or can't go on, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The policy can't be used.
    #[error("{0}")]
    Policy(String),
    /// The kernel has no VFIO.
    #[error("there is no /dev/vfio/vfio: load VFIO with \"modprobe vfio-pci\", or try --sim")]
    NoVfio,
    /// The simulated kernel could not be made.
    #[error("{0}")]
    Sim(String),
    /// Another daemon listens there.
    #[error("{0} is being served already: stop that vfio-brokerd first, or name another --socket")]
    Live(PathBuf),
    /// Something else is at the socket's path.
    #[error("{0} is there and is not a socket: remove it, or name another --socket")]
    NotASocket(PathBuf),
    /// Somebody else's socket is at the socket's path.
    #[error("{path} belongs to uid {uid}: remove it, or name another --socket")]
    OthersSocket {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
    },
    /// Others could put their own socket in place of the daemon's.
    #[error(
        "others can replace files in {0}: \"chown root {0}; chmod go-w {0}\", or name a --socket in \
         a directory of yours"
    )]
    UnsafeDirectory(PathBuf),
    /// Another daemon serves the same devices.
    #[error(
        "another vfio-brokerd serves this machine's devices, and only one can know who has which: stop \
         it first; \"fuser -v {0}\" shows which one it is"
    )]
    Another(PathBuf),
    /// Another daemon is starting there.
    #[error(
        "another vfio-brokerd that is starting holds {0}: try again once it is done; \"fuser -v {0}\" \
         shows which one it is"
    )]
    Locked(PathBuf),
    /// Others could hold up the start.
    #[error("{0} is not a file that only vfio-brokerd can open: remove it")]
    UnsafeLock(PathBuf),
    /// The lock file could not be made or locked.
    #[error("can't lock {path}: {source}; {}", next_step(.source, "if it is not vfio-brokerd's, remove it"))]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The socket could not be made.
    #[error("can't listen on {path}: {source}; {}", next_step(.source, "name another --socket"))]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The keepers' directory is of no use.
    #[error(
        "can't have keepers in {path}: {why}; it must be a directory that only vfio-brokerd can write to"
    )]
    Keepers {
        /// The directory.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Nobody knows who may have devices open.
    #[error(
        "can't tell who has devices that were handed out before: {0}; once no program runs any more \
         that was given a device, or when the machine has been started since, remove that keeper's \
         directory"
    )]
    Adopt(String),
    /// What the service manager passed is of no use.
    #[error("socket activation: {0}")]
    Activation(String),
    /// The sandbox that was asked for can't be had.
    #[error(
        "--sandbox=require, and this system lacks what that takes: {0}; with --sandbox=try it starts without that"
    )]
    Sandbox(String),
    /// A process can't give up what it must not have.
    #[error("can't confine the broker, which is not to begin with more rights than it needs: {0}")]
    Unconfined(crate::sys::Error),
    /// The broker says why.
    #[error("{0}")]
    Broker(String),
    /// What the daemon can't do without has ended: it ends too, rather than be deaf.
    #[error("can't go on: {what} has ended: {why}; start it again")]
    Ended {
        /// What has ended.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// The system lacks something basic.
    #[error("can't set up {what}: {source}")]
    SetUp {
        /// What it was needed for.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

/// What to do about a file that can't be made.
fn next_step(source: &std::io::Error, otherwise: &'static str) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::PermissionDenied => {
            "run it as root, or name a --socket in a directory of yours"
        }
        _ => otherwise,
    }
}

impl StartError {
    pub(crate) fn set_up<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::SetUp { what, source: error.into() }
    }
}
