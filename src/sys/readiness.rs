//! Open files on tokio's event loop.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

/// How long it is before a socket without room is looked at again, at first and at most.
const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(100)];

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

/// Waits until a socket has so much room that a short message surely fits: the kernel says so while three
/// quarters of it are free. It is looked at now and again, and not watched: nearly every message finds
/// room, and who watches for room is woken whenever the peer reads.
///
/// # Errors
/// See poll(2).
pub async fn room(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let [mut pause, longest] = PAUSES;
    while poll(&mut [PollFd::new(socket, PollFlags::POLLOUT)], PollTimeout::ZERO)? == 0 {
        sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
    Ok(())
}
