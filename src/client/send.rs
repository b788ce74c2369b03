//! What the client and the QMP monitor send, with its open files, through `sendfd`.
//!
//! `sendfd` calls sendmsg(2) without flags, so what its callers of the daemon get by flags is done here
//! by other means: sockets are in non-blocking mode, and no SIGPIPE comes of a peer that is gone. Rust's
//! runtime ignores that signal, but a VMM need not have been started by it.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sendfd::SendWithFd;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// Sends bytes with open files attached to the first of them; returns how many bytes went.
///
/// # Errors
/// EAGAIN the socket has no room; EPIPE the peer is gone, and others of sendmsg(2).
pub(crate) fn send(
    socket: &impl SendWithFd,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
) -> Result<usize, Errno> {
    let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    without_sigpipe(|| {
        loop {
            return match socket.send_with_fd(bytes, &raw) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // tokio's own has no errno.
                Err(error) if error.kind() == ErrorKind::WouldBlock => Err(Errno::EAGAIN),
                Err(error) => Err(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)),
                Ok(sent) => Ok(sent),
            };
        }
    })
}

/// Blocks SIGPIPE in this thread meanwhile, and takes back the one that came of an EPIPE.
fn without_sigpipe(something: impl FnOnce() -> Result<usize, Errno>) -> Result<usize, Errno> {
    let pipe: SigSet = [Signal::SIGPIPE].into_iter().collect();
    let before = pipe.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let result = something();
    if result == Err(Errno::EPIPE) {
        // A program that ignores it has none to be read.
        let taken = SignalFd::with_flags(&pipe, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
        let _ = taken.and_then(|taken| taken.read_signal());
    }
    before.thread_set_mask()?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{SigHandler, signal};
    use std::os::unix::net::UnixStream;
    use std::process::{Command, Stdio};

    #[test]
    fn a_peer_that_is_gone_is_an_error_and_no_signal() {
        const NAME: &str = "client::send::tests::a_peer_that_is_gone_is_an_error_and_no_signal";
        const ALONE: &str = "VFIO_BROKER_TEST_OF_SIGPIPE";
        if std::env::var_os(ALONE).is_some() {
            return gone_under_sigpipe_s_default();
        }
        // A process of its own, as the signal's default would be the other tests' too.
        let mut alone = Command::new(std::env::current_exe().unwrap());
        alone.args([NAME, "--exact"]).env(ALONE, "1").stdout(Stdio::null());
        assert!(alone.status().unwrap().success());
    }

    fn gone_under_sigpipe_s_default() {
        #[allow(unsafe_code)]
        // SAFETY: no function is made a handler.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }.unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(send(&ours, b"x", &[]), Err(Errno::EPIPE));
        let blocked = SigSet::thread_get_mask().unwrap();
        assert!(!blocked.contains(Signal::SIGPIPE), "it stays blocked");
    }
}
