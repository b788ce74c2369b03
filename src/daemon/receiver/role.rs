//! What a receiver does, in its own process: one role, and then it ends.

use super::{NotTaken, Taken};
use crate::keeper::check_memory;
use crate::process::keeper::Failure;
use crate::protocol::{Error, MAX_MESSAGE};
use crate::sys::{fdpass, nobody};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{MsgFlags, getsockopt, sockopt};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

/// What it is called in the list of processes; a program that is started under this name is one.
pub(super) const NAME: &str = "vfio-broker-receiver";

/// A report and what it reports on, at most: 16 reasons and a message.
pub(super) const MOST_BYTES: usize = MAX_MESSAGE + (16 << 10);

/// Of a reason, which quotes a path; each character can take six bytes in JSON.
const MOST_REASON: usize = 120;

/// Whom it runs as: the user that has no rights, in a range that nobody gives out (systemd's
/// UIDS-GIDS.md) where that can be had, because who runs as the same user could stop it.
const NOBODIES: [u32; 2] = [0xfffe_4653, 65534];

/// Sockets that one receiver closes at a time.
const MOST_CLOSING: usize = 64;

/// The threads close a file each and use next to no stack.
const STACK: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Receive one message of the socket that is given, and report.
    Take,
    /// Close all sockets that are given, until no more are.
    Close,
}

impl Role {
    const ALL: [Self; 2] = [Self::Take, Self::Close];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Take => "take",
            Self::Close => "close",
        }
    }
}

/// What was received. The files that can be memory come with it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    /// For each file of the message why it can't be memory, if so.
    refused: Vec<Option<String>>,
    /// There were more files than a message may have.
    too_many: bool,
    #[serde(skip)]
    bytes: Vec<u8>,
}

impl Report {
    /// A line of JSON and then the message.
    fn encode(&self) -> Vec<u8> {
        // It has no maps and no floats: it can be written.
        let mut bytes = serde_json::to_vec(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes.extend(&self.bytes);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let end = bytes.iter().position(|&byte| byte == b'\n')?;
        let report: Self = serde_json::from_slice(&bytes[..end]).ok()?;
        Some(Self { bytes: bytes[end + 1..].to_vec(), ..report })
    }

    pub(super) fn into_taken(self, files: Vec<OwnedFd>) -> Result<Taken, NotTaken> {
        if self.too_many {
            return Err(NotTaken::TooMany);
        }
        let mut good = files.into_iter();
        let each = self.refused.into_iter().map(|refused| match refused {
            Some(reason) => Ok(Err(Error::bad("memory", reason))),
            None => good.next().map(Ok).ok_or(()),
        });
        let files = each.collect::<Result<_, ()>>();
        let files = files.map_err(|()| NotTaken::Failed(Errno::EPROTO.into()))?;
        Ok(Taken { bytes: self.bytes, files })
    }
}

/// Plays a role if this program was started as a receiver: call it first of all in `main`.
pub(in super::super) fn be_one_if_asked() -> Option<ExitCode> {
    let mut args = super::super::started_as(NAME)?;
    let role = args.next()?;
    let role = Role::ALL.into_iter().find(|it| role == it.name())?;
    Some(match do_it(role) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

fn do_it(role: Role) -> nix::Result<()> {
    nix::sys::prctl::set_no_new_privs()?;
    // A user namespace may not have the first.
    nobody::become_one_of(&NOBODIES)?;
    let stdin = std::io::stdin();
    match role {
        Role::Take => {
            let given = fdpass::receive_all(stdin.as_fd(), &mut [0; 1], MsgFlags::empty())?.fds;
            if let Some(socket) = given.first() {
                take(socket)?;
            }
            close(given);
        }
        Role::Close => close_as_they_come(stdin.as_fd()),
    }
    Ok(())
}

/// Closes what the daemon gives until it gives no more: as many at a time as there are threads, while
/// the others wait here. It says when its own copies are closed: before that, the last close could be
/// its own.
fn close_as_they_come(given: BorrowedFd<'_>) {
    let (sockets, to_close) = mpsc::channel::<OwnedFd>();
    let to_close = Arc::new(Mutex::new(to_close));
    let mut closers = Vec::new();
    let start_one = || {
        let to_close = Arc::clone(&to_close);
        let close = move || {
            loop {
                let next = to_close.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(socket) = next else { return };
                drop(socket);
            }
        };
        // With fewer, or with none at the end, it goes on as well.
        std::thread::Builder::new().stack_size(STACK).spawn(close)
    };
    let mut held = Vec::new();
    while let Ok(got) = fdpass::receive_all(given, &mut [0; 1], MsgFlags::empty()) {
        if got.len == 0 {
            break;
        }
        if got.fds.is_empty() {
            for socket in held.drain(..) {
                if closers.len() < MOST_CLOSING {
                    closers.extend(start_one());
                }
                // There is a receiver as long as `to_close` is here.
                let _ = sockets.send(socket);
            }
        }
        held.extend(got.fds);
    }
    drop(sockets);
    for closer in closers {
        let _ = closer.join();
    }
}

fn take(socket: &OwnedFd) -> nix::Result<()> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let got = fdpass::receive_all(socket.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
    buffer.truncate(got.len);
    let too_many = got.cut || got.fds.len() > fdpass::MAX_FDS;
    let (mut refused, mut good, mut bad) = (Vec::new(), Vec::new(), Vec::new());
    for file in got.fds {
        match check_memory(&file) {
            _ if too_many => bad.push(file),
            Ok(()) => {
                refused.push(None);
                good.push(file);
            }
            Err(error) => {
                refused.push(Some(reason(error)));
                bad.push(file);
            }
        }
    }
    let report = Report { refused, too_many, bytes: buffer };
    let files: Vec<_> = good.iter().map(AsFd::as_fd).collect();
    let sent = fdpass::send(std::io::stdin().as_fd(), &report.encode(), &files, MsgFlags::empty());
    close(bad);
    sent.map(drop)
}

fn reason(failure: Failure) -> String {
    let mut reason = match failure {
        Failure::Bad { reason, .. } => reason,
        other => format!("it can't be looked at: {other:?}"),
    };
    // Its end says what is wrong.
    if let Some((from, _)) = reason.char_indices().rev().nth(MOST_REASON) {
        reason.replace_range(..from, "...");
    }
    reason
}

/// Closes all, and nothing has to wait for what hangs: a lease pipe may be among them, or in the
/// queue of a socket among them. None of what is asked here asks a file system.
fn close(files: Vec<OwnedFd>) {
    let is_pipe = |file: &OwnedFd| fcntl(file, FcntlArg::F_GETPIPE_SZ).is_ok();
    let is_socket = |file: &OwnedFd| getsockopt(file, sockopt::SockType).is_ok();
    let (pipes, rest): (Vec<_>, Vec<_>) = files.into_iter().partition(is_pipe);
    drop(pipes);
    let (sockets, rest): (Vec<_>, Vec<_>) = rest.into_iter().partition(is_socket);
    std::thread::scope(|threads| {
        for socket in sockets {
            threads.spawn(move || drop(socket));
        }
    });
    drop(rest);
}
