//! Open files over Unix sockets: the daemon's and the simulated kernel's sender, and the one receiver. The
//! client and the QMP monitor send through `sendfd` (`client/send.rs`).
//!
//! The receiver takes a fixed maximum of fds, makes them close-on-exec as they arrive, owns them
//! from the moment they exist, and treats a truncated list as an error.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, UnixCredentials, sendmsg};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The most fds that one message may carry on the broker's socket, and the sim's.
pub const MAX_FDS: usize = 16;

/// Why nothing was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// recvmsg(2) failed; EAGAIN on a socket that has nothing yet.
    #[error("recvmsg: {} ({_0:?})", _0.desc())]
    Errno(Errno),
    /// The list of fds was cut short; what had arrived has been closed.
    #[error(
        "the peer's fds were cut short: it sent more than {limit}, or a security module refused \
         one of them"
    )]
    Truncated {
        /// How many are taken here.
        limit: usize,
    },
}

/// What one recvmsg(2) brought.
#[derive(Debug, Default)]
pub struct Received {
    /// Bytes written to the buffer; 0 at the end of a stream.
    pub len: usize,
    /// The fds, close-on-exec, in the sender's order.
    pub fds: Vec<OwnedFd>,
    /// Whether fds were lost: there was no room, or a security module refused one of them.
    pub cut: bool,
    /// The sender's credentials, where the socket has SO_PASSCRED.
    pub sender: Option<UnixCredentials>,
}

/// Sends bytes with fds attached to the first of them; returns how many bytes went. The fds stay
/// the caller's. A peer that is gone is EPIPE, never a signal.
pub fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: MsgFlags,
) -> Result<usize, Errno> {
    let slices = [IoSlice::new(bytes)];
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<UnixAddr>(socket.as_raw_fd(), &slices, control, flags, None) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// What the next read of a stream would bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// How many bytes; 0 at the end.
    pub len: usize,
    /// Whether fds come with them.
    pub fds: bool,
}

/// Says what there is to be read, at most as much as fits into `buf`, and takes nothing. Does not
/// wait, and installs no fd. The socket must have SO_OOBINLINE: what was sent as urgent is passed
/// over otherwise, and closed with its fds by the next read, in whichever thread makes it.
///
/// # Errors
/// The errno of recvmsg(2); EAGAIN where there is nothing yet.
pub fn peek(socket: BorrowedFd<'_>, buf: &mut [u8]) -> Result<Next, Errno> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let Received { len, cut, .. } = receive_into(socket, buf, &mut [], flags)?;
    Ok(Next { len, fds: cut })
}

/// Receives bytes and at most `limit` fds, [`MAX_FDS`] at most. With a limit of 0 there is no room
/// for any: the kernel drops what was sent without installing it, and the answer is
/// [`ReceiveError::Truncated`].
///
/// # Errors
/// [`ReceiveError`]; after `Truncated` the bytes are lost too, so the connection is of no more use.
pub fn receive(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    limit: usize,
    flags: MsgFlags,
) -> Result<Received, ReceiveError> {
    let mut control = Control([0; MAX_FDS_WORDS]);
    let room: &mut [u64] = if limit > 0 { &mut control.0 } else { &mut [] };
    let received = receive_into(socket, buf, room, flags).map_err(ReceiveError::Errno)?;
    let cut = received.cut || received.fds.len() > limit;
    if cut { Err(ReceiveError::Truncated { limit }) } else { Ok(received) }
}

/// Receives bytes and as many fds as the kernel lets one message carry, so that closing them is
/// the caller's choice of thread: what there is no room for, the kernel closes in whichever thread
/// receives, and the last close of a hostile file can block.
///
/// # Errors
/// The errno of recvmsg(2).
pub fn receive_all(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    flags: MsgFlags,
) -> Result<Received, Errno> {
    receive_into(socket, buf, &mut Control([0; ANY_FDS_WORDS]).0, flags)
}

fn receive_into(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    control: &mut [u64],
    flags: MsgFlags,
) -> Result<Received, Errno> {
    // nix's recvmsg hides the fds of a truncated list, which are installed all the same and would
    // leak; hence the bare system call.
    let mut slice = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: all zeros is a valid msghdr: no name, no buffers.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut slice;
    message.msg_iovlen = 1;
    if !control.is_empty() {
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(control);
    }
    let flags = (flags | MsgFlags::MSG_CMSG_CLOEXEC).bits();
    let len = loop {
        // SAFETY: `message` points to one buffer and one control area, both alive and as long as
        // it says.
        let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
        match Errno::result(len) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
            Ok(len) => break len as usize,
        }
    };
    let cut = message.msg_flags & libc::MSG_CTRUNC != 0;
    let mut received = Received { len, cut, ..Received::default() };
    take_control(&message, &mut received);
    Ok(received)
}

/// The most fds that the kernel lets one message carry.
pub const SCM_MAX_FD: usize = 253;

/// Room for fds and the sender's credentials, aligned as `cmsghdr` must be.
#[repr(align(8))]
struct Control<const WORDS: usize>([u64; WORDS]);

const MAX_FDS_WORDS: usize = control_words(MAX_FDS);
const ANY_FDS_WORDS: usize = control_words(SCM_MAX_FD);

const fn control_words(fds: usize) -> usize {
    // SAFETY: CMSG_SPACE only computes.
    let fds = unsafe { libc::CMSG_SPACE((fds * size_of::<RawFd>()) as u32) } as usize;
    // SAFETY: as above.
    let sender = unsafe { libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) } as usize;
    (fds + sender).div_ceil(8)
}

/// Takes ownership of everything that arrived beside the bytes, truncated or not.
fn take_control(message: &libc::msghdr, received: &mut Received) {
    // SAFETY: the kernel has filled the control area and said in msg_controllen how far.
    let mut entry = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !entry.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give whole headers within the area, or null.
        let header = unsafe { entry.read() };
        // SAFETY: as above; the data follows the header.
        let data = unsafe { libc::CMSG_DATA(entry) };
        // SAFETY: CMSG_LEN only computes.
        let data_len = header.cmsg_len - unsafe { libc::CMSG_LEN(0) } as usize;
        match (header.cmsg_level, header.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                for i in 0..data_len / size_of::<RawFd>() {
                    // SAFETY: the kernel wrote `data_len` bytes of fds from `data` on.
                    let fd = unsafe { data.cast::<RawFd>().wrapping_add(i).read_unaligned() };
                    // SAFETY: it has just installed this one for us; nobody else owns it.
                    received.fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if data_len >= size_of::<libc::ucred>() => {
                // SAFETY: the kernel wrote one ucred here, checked for its length.
                let sender = unsafe { data.cast::<libc::ucred>().read_unaligned() };
                received.sender = Some(sender.into());
            }
            _ => {}
        }
        // SAFETY: `entry` is a header within the message's control area.
        entry = unsafe { libc::CMSG_NXTHDR(message, entry) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    /// Whether a pipe's read ends are all closed: its write end says so.
    fn all_closed(write_end: &OwnedFd) -> bool {
        nix::unistd::write(write_end, b"x") == Err(Errno::EPIPE)
    }

    #[test]
    fn fds_arrive_in_order_and_close_on_exec() {
        let (ours, theirs) = pair();
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        let sent = [read_end.as_fd(), write_end.as_fd()];
        send(ours.as_fd(), b"hello", &sent, MsgFlags::empty()).unwrap();
        let mut buf = [0; 16];
        let got = receive(theirs.as_fd(), &mut buf, 2, MsgFlags::empty()).unwrap();
        assert_eq!((&buf[..got.len], got.fds.len()), (&b"hello"[..], 2));
        for fd in &got.fds {
            let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        }
    }

    #[test]
    fn a_list_over_the_limit_is_refused_and_closed() {
        for (limit, count) in [(0, 1), (1, 2), (3, 16), (16, 17), (16, 40), (16, 200)] {
            let (ours, theirs) = pair();
            let (read_end, write_end) = nix::unistd::pipe().unwrap();
            let sent = vec![read_end.as_fd(); count];
            send(ours.as_fd(), b"x", &sent, MsgFlags::empty()).unwrap();
            let got = receive(theirs.as_fd(), &mut [0; 16], limit, MsgFlags::empty());
            assert_eq!(got.unwrap_err(), ReceiveError::Truncated { limit });
            drop(read_end);
            assert!(all_closed(&write_end), "{count} fds with a limit of {limit} left one open");
        }
    }

    #[test]
    fn everything_is_taken_where_the_caller_closes() {
        let (ours, theirs) = pair();
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        send(ours.as_fd(), b"x", &vec![read_end.as_fd(); SCM_MAX_FD], MsgFlags::empty()).unwrap();
        let got = receive_all(theirs.as_fd(), &mut [0; 16], MsgFlags::empty()).unwrap();
        assert_eq!((got.len, got.fds.len(), got.cut), (1, SCM_MAX_FD, false));
        drop(read_end);
        assert!(!all_closed(&write_end));
        drop(got);
        assert!(all_closed(&write_end));
    }
}
