//! Open files that pass through a process without being its own: they wait in the queue of a socket,
//! and that process hands the socket on unread. The kernel gives them to whoever reads it.

use crate::sys::fdpass::{self, MAX_FDS, ReceiveError};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Puts files, [`MAX_FDS`] at most, into the queue of a new socket, each with its index in the message
/// that it came with. Nothing more can get in there.
///
/// # Errors
/// What socketpair(2) or sendmsg(2) says.
pub fn queue(files: &[(u8, BorrowedFd<'_>)]) -> Result<OwnedFd, Errno> {
    let (ours, socket) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let (indexes, files): (Vec<u8>, Vec<_>) = files.iter().copied().unzip();
    fdpass::send(ours.as_fd(), &indexes, &files, MsgFlags::MSG_DONTWAIT)?;
    Ok(socket)
}

/// Takes all files out of a socket's queue and gives the one of that index, if there is one. Closes the
/// others. Never waits.
///
/// # Errors
/// [`ReceiveError`]: it is no such socket, or a security module refuses one of the files.
pub fn take(socket: BorrowedFd<'_>, index: usize) -> Result<Option<OwnedFd>, ReceiveError> {
    let mut indexes = [0; MAX_FDS];
    let got = match fdpass::receive(socket, &mut indexes, MAX_FDS, MsgFlags::MSG_DONTWAIT) {
        Err(ReceiveError::Errno(Errno::EAGAIN)) => return Ok(None),
        got => got?,
    };
    let mut files = indexes[..got.len].iter().zip(got.fds);
    Ok(files.find(|(each, _)| usize::from(**each) == index).map(|(_, file)| file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    #[test]
    fn one_of_them_is_taken_and_the_others_are_closed() {
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let socket = queue(&[(1, read_end.as_fd()), (15, null.as_fd())]).unwrap();
        drop(read_end);
        assert_eq!(nix::unistd::write(&write_end, b"x"), Ok(1), "it is in the queue");
        let taken = File::from(take(socket.as_fd(), 15).unwrap().unwrap());
        assert!(std::os::unix::fs::FileTypeExt::is_char_device(
            &taken.metadata().unwrap().file_type()
        ));
        assert_eq!(nix::unistd::write(&write_end, b"x"), Err(Errno::EPIPE));
        assert!(take(socket.as_fd(), 1).unwrap().is_none(), "all have been taken out");
    }

    #[test]
    fn an_index_that_is_not_there_takes_none() {
        let null = File::open("/dev/null").unwrap();
        for index in [0, 2, 257, usize::MAX] {
            let socket = queue(&[(1, null.as_fd())]).unwrap();
            assert!(take(socket.as_fd(), index).unwrap().is_none());
        }
    }

    #[test]
    fn nothing_is_waited_for() {
        let (socket, _other) = UnixStream::pair().unwrap();
        assert!(take(socket.as_fd(), 0).unwrap().is_none());
        let null = File::open("/dev/null").unwrap();
        assert_eq!(take(null.as_fd(), 0).unwrap_err(), ReceiveError::Errno(Errno::ENOTSOCK));
    }
}
