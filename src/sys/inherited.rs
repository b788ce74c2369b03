//! Open files that the program was started with.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes ownership of the open files `first..first + count` that the service manager passed, and
/// makes them close-on-exec. They can be taken once: later calls give none.
///
/// # Errors
/// EBADF where one of them is not open.
pub fn take(first: RawFd, count: usize) -> Result<Vec<OwnedFd>, Errno> {
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let mut fds = Vec::new();
    for number in (first..).take(count) {
        if !std::fs::exists(format!("/proc/self/fd/{number}")).unwrap_or(false) {
            return Err(Errno::EBADF);
        }
        // SAFETY: it is open, it was so before this program ran, which therefore has no owner for
        // it, and it is taken once.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        fds.push(fd);
    }
    Ok(fds)
}

/// Closes everything but standard input, output and error. To be called first of all: nobody may own
/// any of it yet. On a kernel before 5.9 it stays open.
pub fn close_all() {
    let (first, last, flags) = (3 as libc::c_uint, libc::c_uint::MAX, 0);
    // SAFETY: it touches no memory, and nothing in this program owns what it closes.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
}
