//! Lease pipes: the holder has the read end, the broker the only write end.

use super::error::system;
use crate::protocol::Error;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, OwnedFd};

/// The holder's end and ours, in this order.
pub(super) fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| system("pipe2", "lease pipe", errno))
}

/// Whether all copies of the read end are closed, in whichever process.
pub(super) fn has_hung_up(write_end: &OwnedFd) -> bool {
    let mut ask = [PollFd::new(write_end.as_fd(), PollFlags::empty())];
    let answered = poll(&mut ask, PollTimeout::ZERO);
    let events = ask[0].revents().unwrap_or(PollFlags::empty());
    answered.is_ok() && events.contains(PollFlags::POLLERR)
}

/// Another copy of an open file, close-on-exec.
pub(super) fn copy(fd: impl AsFd) -> Result<OwnedFd, Error> {
    let copied = fd.as_fd().try_clone_to_owned();
    copied.map_err(|error| {
        let errno = error.raw_os_error().map_or(nix::Error::EMFILE, nix::Error::from_raw);
        system("fcntl(F_DUPFD_CLOEXEC)", "an open file of the lease", errno)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_hangs_up_with_its_last_copy() {
        let (theirs, ours) = pipe().unwrap();
        let second = copy(&theirs).unwrap();
        drop(theirs);
        assert!(!has_hung_up(&ours));
        drop(second);
        assert!(has_hung_up(&ours));
    }
}
