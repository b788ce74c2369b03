//! The listening socket: the service manager's, or one of our own.

use super::start::StartError;
use crate::kernel::inherited;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt, listen, socket, sockopt,
};
use std::fs::{DirBuilder, File, Permissions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The first fd that a service manager passes.
const FIRST_PASSED: i32 = 3;

/// A socket that clients connect to.
#[derive(Debug)]
pub(super) struct Listening {
    pub(super) listener: UnixListener,
    /// The socket's file, if we made it: its path and inode.
    file: Option<(PathBuf, u64)>,
}

impl Listening {
    /// Takes the socket that the service manager passed, or makes one at `path`.
    pub(super) fn new(passed: Option<UnixListener>, path: &Path) -> Result<Self, StartError> {
        match passed {
            Some(listener) => Ok(Self { listener, file: None }),
            None => create(path),
        }
    }

    /// Takes the socket's file away, if it is still ours.
    pub(super) fn remove_file(&self) {
        let Some((path, inode)) = &self.file else { return };
        if std::fs::symlink_metadata(path).is_ok_and(|now| now.ino() == *inode) {
            // If it can't be removed, the next start finds it stale and replaces it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The socket of sd_listen_fds(3), if there is one. To be called before anything opens a file,
/// which could get the number of one that should have been passed and was not.
pub(super) fn passed() -> Result<Option<UnixListener>, StartError> {
    let count = sd_notify::listen_fds().map_err(|error| {
        StartError::Activation(format!("what LISTEN_FDS names can't be used: {error}"))
    })?;
    let count = count.len();
    if count == 0 {
        return Ok(None);
    }
    if count > 1 {
        return Err(StartError::Activation(format!("{count} sockets were passed, one is needed")));
    }
    let failed = |what: &str, errno: Errno| {
        StartError::Activation(format!("fd {FIRST_PASSED}: {what}: {}", errno.desc()))
    };
    let mut fds = inherited::take(FIRST_PASSED, count).map_err(|e| failed("not open", e))?;
    let Some(fd) = fds.pop() else { return Ok(None) };
    check(&fd)?;
    let listener = UnixListener::from(fd);
    let blocking = |error: std::io::Error| StartError::Activation(error.to_string());
    listener.set_nonblocking(true).map_err(blocking)?;
    Ok(Some(listener))
}

/// Whether it is a listening stream socket of AF_UNIX.
fn check(fd: &OwnedFd) -> Result<(), StartError> {
    let not = |what: &str| StartError::Activation(format!("fd {FIRST_PASSED} is not {what}"));
    let kind = getsockopt(fd, sockopt::SockType).map_err(|_| not("a socket"))?;
    if kind != SockType::Stream {
        return Err(not("a stream socket (ListenStream=)"));
    }
    nix::sys::socket::getsockname::<UnixAddr>(fd.as_raw_fd()).map_err(|_| not("of AF_UNIX"))?;
    match getsockopt(fd, sockopt::AcceptConn) {
        Ok(true) => Ok(()),
        _ => Err(not("listening (Accept=no is needed)")),
    }
}

/// Makes a socket at `path`, in place of one that nobody listens on any more.
fn create(path: &Path) -> Result<Listening, StartError> {
    let at = |source| StartError::Socket { path: path.to_owned(), source };
    let directory = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(at)?;
    // Of two that start at a time, one looks after the other has begun to listen.
    let lock = Flock::lock(File::open(directory).map_err(at)?, FlockArg::LockExclusive);
    let _lock = lock.map_err(|(_, errno)| at(errno.into()))?;
    remove_stale(path)?;
    let listener = bound(path).map_err(|errno| at(errno.into()))?;
    // The policy is the gate, by what the kernel says of the peer; anybody may knock.
    std::fs::set_permissions(path, Permissions::from_mode(0o666)).map_err(at)?;
    listen(&listener, Backlog::MAXALLOWABLE).map_err(|errno| at(errno.into()))?;
    let inode = std::fs::symlink_metadata(path).map_err(at)?.ino();
    Ok(Listening { listener: listener.into(), file: Some((path.to_owned(), inode)) })
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), StartError> {
    let at = |source| StartError::Socket { path: path.to_owned(), source };
    match UnixStream::connect(path) {
        Ok(_) => Err(StartError::Live(path.to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() == Some(Errno::ECONNREFUSED as i32) => {
            let kind = std::fs::symlink_metadata(path).map_err(at)?.file_type();
            if !std::os::unix::fs::FileTypeExt::is_socket(&kind) {
                return Err(StartError::NotASocket(path.to_owned()));
            }
            std::fs::remove_file(path).map_err(at)
        }
        // A full queue is a live one.
        Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => {
            Err(StartError::Live(path.to_owned()))
        }
        Err(error) => Err(at(error)),
    }
}

fn bound(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    bind(socket.as_fd().as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}
