//! Who is at the other end of a Unix socket, as the kernel tells it: the socket options that have
//! no safe wrapper elsewhere.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{UnixAddr, getpeername, getsockname};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
#[cfg(test)]
use std::os::unix::net::{SocketAddr, UnixStream};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

/// Linux 6.5 and later.
const SO_PEERPIDFD: libc::c_int = 77;
/// Linux 6.16 and later.
const SO_PASSRIGHTS: libc::c_int = 83;

/// The longest security label taken, in bytes.
const MAX_LABEL: usize = 4096;

/// The supplementary groups that the peer had when it connected.
///
/// # Errors
/// See getsockopt(2), SO_PEERGROUPS.
pub fn groups(socket: BorrowedFd<'_>) -> Result<Vec<u32>, Errno> {
    let mut room = 64;
    loop {
        let mut bytes = vec![0; room * size_of::<u32>()];
        match get(socket, libc::SO_PEERGROUPS, &mut bytes) {
            // NGROUPS_MAX is 65536: the kernel has room for no more.
            Err(Errno::ERANGE) if room < 65536 => room *= 32,
            Err(errno) => return Err(errno),
            Ok(len) => {
                let (groups, _) = bytes[..len].as_chunks();
                return Ok(groups.iter().map(|&id| u32::from_ne_bytes(id)).collect());
            }
        }
    }
}

/// The peer's security label; `None` where no security module gives one.
///
/// # Errors
/// See getsockopt(2), SO_PEERSEC; EILSEQ for a label that is not UTF-8.
pub fn label(socket: BorrowedFd<'_>) -> Result<Option<String>, Errno> {
    let mut bytes = vec![0; MAX_LABEL];
    match get(socket, libc::SO_PEERSEC, &mut bytes) {
        Err(Errno::ENOPROTOOPT) => Ok(None),
        Err(errno) => Err(errno),
        Ok(len) => {
            bytes.truncate(len);
            // SELinux counts the C string's end in, AppArmor does not.
            if bytes.last() == Some(&0) {
                bytes.pop();
            }
            String::from_utf8(bytes).map(Some).map_err(|_| Errno::EILSEQ)
        }
    }
}

/// A pidfd of the process that connected; `None` where the kernel has none to give: before Linux
/// 6.5, or once that process has been reaped.
///
/// # Errors
/// See getsockopt(2), SO_PEERPIDFD.
pub fn pidfd(socket: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let mut bytes = [0; size_of::<RawFd>()];
    match get(socket, SO_PEERPIDFD, &mut bytes) {
        Err(Errno::ENOPROTOOPT | Errno::ENODATA | Errno::ESRCH | Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno),
        // SAFETY: the kernel has just installed this fd for us (close-on-exec); nobody else owns
        // it.
        Ok(_) => Ok(Some(unsafe { OwnedFd::from_raw_fd(RawFd::from_ne_bytes(bytes)) })),
    }
}

/// What a Unix socket is bound to: a path, or a NUL and an abstract name; nothing where it is not bound. What
/// a listening socket has accepted is bound to the same.
///
/// # Errors
/// See getsockname(2); EINVAL for a socket that is no Unix socket.
pub fn address(socket: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    Ok(bytes(&getsockname(socket.as_raw_fd())?))
}

/// The same of the peer's socket.
///
/// # Errors
/// See getpeername(2).
pub fn peer_address(socket: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    Ok(bytes(&getpeername(socket.as_raw_fd())?))
}

fn bytes(address: &UnixAddr) -> Vec<u8> {
    let path = address.path().map(|path| path.as_os_str().as_bytes().to_vec());
    let name = || address.as_abstract().map(|name| [&[0], name].concat());
    path.or_else(name).unwrap_or_default()
}

/// How much of what was sent the peer has not read yet, in bytes of the kernel's memory, which the
/// sender is charged; 0 too once the peer has closed the socket everywhere.
///
/// # Errors
/// See unix(7), SIOCOUTQ.
pub fn unread(socket: BorrowedFd<'_>) -> Result<usize, Errno> {
    /// SIOCOUTQ of unix(7).
    const SIOCOUTQ: libc::c_ulong = libc::TIOCOUTQ;
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one int, which lives through the call.
    Errno::result(unsafe { ioctl_with_mut_ref(&socket, SIOCOUTQ, &mut bytes) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Whether a pidfd's process has not ended: the pidfd is readable once it has.
///
/// # Errors
/// See poll(2).
pub fn is_alive(pidfd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], PollTimeout::ZERO)? == 0)
}

/// Whether the kernel lets fds be sent to this socket; where not, their sender gets EPERM. What a
/// listening socket accepts begins with the listening socket's setting.
///
/// # Errors
/// ENOPROTOOPT before Linux 6.16.
pub fn pass_fds(socket: BorrowedFd<'_>, pass: bool) -> Result<(), Errno> {
    let pass = libc::c_int::from(pass);
    // SAFETY: the option is an int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const pass).cast(),
            size_of_val(&pass) as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// Whether nobody has the other end of a connection any more.
pub fn has_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut ask = [PollFd::new(socket, PollFlags::empty())];
    let _ = poll(&mut ask, PollTimeout::ZERO);
    ask[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP))
}

/// Reads a socket option into `bytes`; returns how many were written.
fn get(socket: BorrowedFd<'_>, option: libc::c_int, bytes: &mut [u8]) -> Result<usize, Errno> {
    let mut len = bytes.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to the buffer, which is that long, and to
    // `len` how many; both live through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            bytes.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    Errno::result(result)?;
    Ok((len as usize).min(bytes.len()))
}

/// A connection that another user makes; `None` where only root could make one.
#[cfg(test)]
pub fn connected_as(uid: u32, to: &SocketAddr) -> Option<UnixStream> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can be somebody else");
        return None;
    }
    let to = to.clone();
    let made = std::thread::spawn(move || {
        // SAFETY: the bare system call changes this thread alone, which ends soon; the C library's
        // function would change them all.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) };
        assert_eq!(result, 0);
        UnixStream::connect_addr(&to).unwrap()
    });
    Some(made.join().unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_peer_in_this_process_is_this_process() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut own: Vec<u32> =
            nix::unistd::getgroups().unwrap().into_iter().map(nix::unistd::Gid::as_raw).collect();
        own.sort_unstable();
        let mut got = groups(ours.as_fd()).unwrap();
        got.sort_unstable();
        assert_eq!(got, own);
        label(ours.as_fd()).unwrap();
        if let Some(pidfd) = pidfd(ours.as_fd()).unwrap() {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()));
            assert!(info.unwrap().contains(&format!("Pid:\t{}\n", std::process::id())));
        }
    }

    #[test]
    fn what_was_accepted_has_the_address_of_its_listening_socket_and_no_other_end_has() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let theirs = UnixStream::connect(&path).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let path = path.as_os_str().as_bytes();
        assert_eq!(address(listener.as_fd()).unwrap(), path);
        assert_eq!(address(ours.as_fd()).unwrap(), path);
        assert_eq!(address(theirs.as_fd()).unwrap(), b"");
        assert_eq!(peer_address(ours.as_fd()).unwrap(), b"");
        assert_eq!(peer_address(theirs.as_fd()).unwrap(), path);
        assert_eq!(address(UnixStream::pair().unwrap().0.as_fd()).unwrap(), b"");
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(address(file.as_fd()), Err(Errno::ENOTSOCK));
        let internet = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(address(internet.as_fd()), Err(Errno::EINVAL));
    }

    #[test]
    fn fds_are_refused_where_the_kernel_can_from_the_listening_socket_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        if let Err(errno) = pass_fds(listener.as_fd(), false) {
            return assert_eq!(errno, Errno::ENOPROTOOPT);
        }
        let ours = UnixStream::connect(&path).unwrap();
        let none = nix::sys::socket::MsgFlags::empty();
        let send = || crate::sys::fdpass::send(ours.as_fd(), b"x", &[ours.as_fd()], none);
        assert_eq!(send(), Err(Errno::EPERM));
        let (theirs, _) = listener.accept().unwrap();
        assert_eq!(send(), Err(Errno::EPERM));
        pass_fds(theirs.as_fd(), true).unwrap();
        assert_eq!(send(), Ok(1));
    }
}
