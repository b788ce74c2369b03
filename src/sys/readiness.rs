//! Open files on tokio's event loop.

#![allow(unsafe_code)]

use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the event loop of the running tokio runtime watch an open file, which must be in
/// non-blocking mode for what is done with it.
///
/// # Errors
/// What epoll says: EPERM for a file that is always ready.
pub fn watch(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, stays so until it is dropped, and always names the same file.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// The same, and gives the file back where that fails, for those to whom its close matters.
///
/// # Errors
/// As [`watch`], with the file.
pub fn try_watch(
    fd: OwnedFd,
    interest: Interest,
) -> Result<AsyncFd<OwnedFd>, (OwnedFd, std::io::Error)> {
    // SAFETY: an OwnedFd is open, stays so until it is dropped, and always names the same file.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|error| error.into_parts())
}
