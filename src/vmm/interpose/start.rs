//! The program's own side: a process becomes it, under the filter, and says what went wrong.

use super::super::{Error, Result};
use super::sys;
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::libc::{self, sock_filter};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::MsgFlags;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// What the new process says: the listener comes with `Ready`; the others are its last word.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Word {
    Ready = 1,
    NoFilter = 2,
    NotExecuted = 3,
}

/// Becomes the program. Its opens wait for an answer from the moment the filter is there, so nothing
/// between that and the program opens a file.
pub(super) fn start(
    mut command: Command,
    filter: &[sock_filter],
    signals: &SigSet,
    socket: &OwnedFd,
) -> ! {
    command.env("LISTEN_PID", std::process::id().to_string());
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(signals), None);
    let (word, errno) = match sys::install(filter) {
        Err(errno) => (Word::NoFilter, errno),
        Ok(listener) => {
            let ready = [Word::Ready as u8, 0, 0, 0, 0];
            let none = MsgFlags::empty();
            match fdpass::send(socket.as_fd(), &ready, &[listener.as_fd()], none) {
                Err(errno) => (Word::NoFilter, errno),
                Ok(_) => {
                    drop(listener);
                    let error = command.exec();
                    let errno = error.raw_os_error().unwrap_or(libc::ENOEXEC);
                    (Word::NotExecuted, Errno::from_raw(errno))
                }
            }
        }
    };
    let mut last = vec![word as u8];
    last.extend_from_slice(&(errno as i32).to_ne_bytes());
    let _ = fdpass::send(socket.as_fd(), &last, &[], MsgFlags::empty());
    sys::exit_now(127)
}

/// Takes the listener from the new process.
pub(super) fn listener(socket: &OwnedFd, child: Pid) -> Result<OwnedFd> {
    let mut bytes = [0; 5];
    let received = fdpass::receive(socket.as_fd(), &mut bytes, 1, MsgFlags::empty());
    let failed = match received {
        Ok(mut received) if received.len == bytes.len() => match received.fds.pop() {
            Some(listener) => return Ok(listener),
            None => failure(bytes, Path::new("")),
        },
        _ => Error::System { call: "fork", errno: Errno::ECHILD },
    };
    let _ = waitpid(child, None);
    Err(failed)
}

/// What the new process says after that: nothing, where it has become the program.
pub(super) fn outcome(socket: &OwnedFd, program: &Path) -> Result<()> {
    let mut bytes = [0; 5];
    match fdpass::receive(socket.as_fd(), &mut bytes, 0, MsgFlags::empty()) {
        Ok(received) if received.len == bytes.len() => Err(failure(bytes, program)),
        _ => Ok(()),
    }
}

fn failure(bytes: [u8; 5], program: &Path) -> Error {
    let [word, errno @ ..] = bytes;
    let errno = Errno::from_raw(i32::from_ne_bytes(errno));
    match errno {
        _ if word == Word::NotExecuted as u8 => {
            Error::Program { program: program.to_owned(), errno }
        }
        Errno::EBUSY => Error::Listener,
        errno => Error::NoSeccomp { errno },
    }
}
