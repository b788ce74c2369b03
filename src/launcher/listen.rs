//! The listening socket: the service manager's, or one of our own.

use super::file_mode;
use super::start_error::StartError;
use crate::sys::inherited;
use crate::sys::peer::pass_fds;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen,
    socket, sockopt,
};
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tracing::info;

/// The first fd that a service manager passes.
const FIRST_PASSED: i32 = 3;

/// How long another daemon may take to start at the same path.
const LOCK_DEADLINE: Duration = Duration::from_secs(5);
/// How long a broker may take to notice that its launcher was killed.
const LIVE_DEADLINE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(10);

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
}

impl Drop for Listening {
    /// Takes the socket's file away, if it is still ours.
    fn drop(&mut self) {
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
    let_no_fds_pass(&fd);
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

/// Has the kernel refuse fds from whoever connects: a connection begins with what its listening socket
/// says. Fds that came before the daemon has seen who sends them would be in nobody's account. A kernel
/// before Linux 6.16 can't refuse them.
fn let_no_fds_pass(listener: &OwnedFd) {
    let _ = pass_fds(listener.as_fd(), false);
}

/// Makes a socket at `path`, in place of one that nobody listens on any more.
fn create(path: &Path) -> Result<Listening, StartError> {
    let at = |source| StartError::Socket { path: path.to_owned(), source };
    make_directory(path)?;
    // Of two that start at a time, one looks after the other has begun to listen.
    let _lock = lock(path, LOCK_DEADLINE)?;
    remove_left(path)?;
    let listener = bound(path).map_err(|errno| at(errno.into()))?;
    let inode = open_to_all(path).map_err(at)?;
    let_no_fds_pass(&listener);
    listen(&listener, Backlog::MAXALLOWABLE).map_err(|errno| at(errno.into()))?;
    Ok(Listening { listener: listener.into(), file: Some((path.to_owned(), inode)) })
}

/// Makes the directory of the socket, which has the daemon's other files too, if there is none; whose
/// files others could replace is no good.
pub(super) fn make_directory(socket: &Path) -> Result<(), StartError> {
    let at = |source| StartError::Socket { path: socket.to_owned(), source };
    let directory = socket.parent().filter(|dir| !dir.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    if !directory.exists() {
        info!(directory = %directory.display(), "making the socket's directory");
    }
    DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(at)?;
    // Who can replace one above it can replace it.
    for above in std::fs::canonicalize(directory).map_err(at)?.ancestors() {
        if !file_mode::is_directory_safe(&std::fs::metadata(above).map_err(at)?) {
            return Err(StartError::UnsafeDirectory(above.to_owned()));
        }
    }
    Ok(())
}

/// The path of a file that goes with another one.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// Keeps other launchers from serving the same kernel for as long as it is open: only the one that has handed
/// a device out knows who may have it. The lock is a record lock: a process loses it when it begins to end,
/// whatever keeps it from ending.
pub(super) fn be_the_only_one(keepers: &Path) -> Result<File, StartError> {
    let (path, file) = lock_file(keepers)?;
    let until = Instant::now() + LOCK_DEADLINE;
    loop {
        match set_lock(file.as_fd()) {
            Ok(()) => return Ok(file),
            Err(Errno::EAGAIN | Errno::EACCES | Errno::EINTR) if Instant::now() < until => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(StartError::Another(path)),
            Err(errno) => return Err(StartError::Lock { path, source: errno.into() }),
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

fn set_lock(file: BorrowedFd<'_>) -> Result<(), Errno> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_SETLK(&lock)).map(drop)
}

/// Keeps other daemons from starting at this path.
fn lock(socket: &Path, deadline: Duration) -> Result<Flock<File>, StartError> {
    let (path, mut file) = lock_file(socket)?;
    let until = Instant::now() + deadline;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EAGAIN | Errno::EINTR)) if Instant::now() < until => file = back,
            Err((_, Errno::EAGAIN)) => return Err(StartError::Locked(path)),
            Err((_, errno)) => return Err(StartError::Lock { path, source: errno.into() }),
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

/// Opens the file to be locked that goes with another one. Only who can open a file can lock it, for
/// which it takes no right to write: so it is a file that only root and we can open. It stays, since
/// somebody may wait for the lock of the one that would be removed.
fn lock_file(of: &Path) -> Result<(PathBuf, File), StartError> {
    let path = beside(of, ".lock");
    let at = |source| StartError::Lock { path: path.clone(), source };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    // The file may be somebody's trap: neither follow a link nor wait for a pipe's other end.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = options.custom_flags(flags).open(&path).map_err(at)?;
    let found = file.metadata().map_err(at)?;
    if !found.is_file() || !file_mode::is_owned(&found) || found.mode() & 0o077 != 0 {
        return Err(StartError::UnsafeLock(path));
    }
    Ok((path, file))
}

/// Removes a socket that nobody listens on, or will soon: the broker of a launcher that was killed serves
/// it until it has noticed.
fn remove_left(path: &Path) -> Result<(), StartError> {
    let until = Instant::now() + LIVE_DEADLINE;
    loop {
        match remove_stale(path) {
            Err(StartError::Live(_)) if Instant::now() < until => std::thread::sleep(LOCK_RETRY),
            removed => return removed,
        }
    }
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), StartError> {
    let at = |source| StartError::Socket { path: path.to_owned(), source };
    let found = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(at)?,
    };
    if !found.file_type().is_socket() {
        return Err(StartError::NotASocket(path.to_owned()));
    }
    if !file_mode::is_owned(&found) {
        return Err(StartError::OthersSocket { path: path.to_owned(), uid: found.uid() });
    }
    let probe = || {
        let socket = unconnected()?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)
    };
    match probe() {
        // A full queue is a live one; not to be waited for, since it may never get shorter.
        Ok(()) | Err(Errno::EAGAIN) => Err(StartError::Live(path.to_owned())),
        Err(Errno::ENOENT) => Ok(()),
        Err(Errno::ECONNREFUSED) => std::fs::remove_file(path).map_err(at),
        Err(errno) => Err(at(errno.into())),
    }
}

fn bound(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = unconnected()?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

fn unconnected() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

/// Lets anybody knock: the policy is the gate, by what the kernel says of the peer. Returns the
/// socket file's inode.
fn open_to_all(path: &Path) -> std::io::Result<u64> {
    // chmod(2) on the path would follow a link put there since. The mode that fchmod(2) gives the
    // socket before bind(2) is cut by the umask, which is all threads'.
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let found = file.metadata()?;
    if !found.file_type().is_socket() || !file_mode::is_owned(&found) {
        return Err(std::io::Error::other("somebody has replaced the socket"));
    }
    let pinned = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::set_permissions(pinned, Permissions::from_mode(0o666))?;
    Ok(found.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_is_held_is_not_waited_for_without_end() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let held = lock(&socket, Duration::ZERO).unwrap();
        let refused = lock(&socket, Duration::ZERO).unwrap_err();
        assert!(matches!(refused, StartError::Locked(_)), "{refused}");
        drop(held);
        lock(&socket, Duration::ZERO).unwrap();
    }

    #[test]
    fn a_lock_that_others_can_open_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let file = directory.path().join("socket.lock");
        let refused = || lock(&socket, Duration::ZERO).unwrap_err();
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(refused(), StartError::UnsafeLock(_)));
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("elsewhere", &file).unwrap();
        assert!(matches!(refused(), StartError::Lock { .. }));
        assert!(!directory.path().join("elsewhere").exists());
    }

    #[test]
    fn a_link_in_place_of_the_socket_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        let _listener = UnixListener::bind(&file).unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        open_to_all(&link).unwrap_err();
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        open_to_all(&file).unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o666);
    }
}
