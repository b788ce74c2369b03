//! What a receiver and a closer do, each in its own process, which has no rights and no other file.

use crate::keeper::check_memory;
use crate::process::keeper::Failure;
use crate::process::queued_files;
use crate::protocol::MAX_MESSAGE;
use crate::sys::fdpass;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::socket::{MsgFlags, getsockopt, sockopt};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

/// A report and what it reports on, at most: 16 reasons and a message.
pub const MOST_BYTES: usize = MAX_MESSAGE + (16 << 10);

/// Of a reason, which quotes a path; each character can take six bytes in JSON.
const MOST_REASON: usize = 120;

/// Sockets that one receiver closes at a time.
const MOST_CLOSING: usize = 64;

/// The threads close a file each and use next to no stack.
const STACK: usize = 64 << 10;

/// What was received. A socket comes with it that has the files in its queue that can be memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// For each file of the message why it can't be memory, if so.
    pub refused: Vec<Option<String>>,
    /// There were more files than a message may have.
    pub too_many: bool,
    /// Not all of them could be opened: this process had no room, or a security module refused one.
    pub cut: bool,
    /// The message.
    #[serde(skip)]
    pub bytes: Vec<u8>,
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

    /// What the other end wrote; `None` where it did not.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let end = bytes.iter().position(|&byte| byte == b'\n')?;
        let report: Self = serde_json::from_slice(&bytes[..end]).ok()?;
        Some(Self { bytes: bytes[end + 1..].to_vec(), ..report })
    }
}

/// Receives one message on the socket that is given over the link, and reports on the link.
///
/// # Errors
/// What a call on the link or the socket says.
pub fn receive(link: &OwnedFd) -> nix::Result<()> {
    let given = fdpass::receive_all(link.as_fd(), &mut [0; 1], MsgFlags::empty())?.fds;
    if let Some(socket) = given.first() {
        take(socket, link.as_fd())?;
    }
    close(given);
    Ok(())
}

/// Closes what the daemon gives until it gives no more: as many at a time as there are threads, while
/// the others wait here. It says when its own copies are closed: before that, the last close could be
/// its own.
pub fn close_as_they_come(given: BorrowedFd<'_>) {
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

fn take(socket: &OwnedFd, link: BorrowedFd<'_>) -> nix::Result<()> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let got = fdpass::receive_all(socket.as_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
    buffer.truncate(got.len);
    let (cut, too_many) = (got.cut, got.fds.len() > fdpass::MAX_FDS);
    let (mut refused, mut good, mut bad) = (Vec::new(), Vec::new(), Vec::new());
    for (file, index) in got.fds.into_iter().zip(0..) {
        match check_memory(&file) {
            _ if cut || too_many => bad.push(file),
            Ok(()) => {
                refused.push(None);
                good.push((index, file));
            }
            Err(error) => {
                refused.push(Some(reason(error)));
                bad.push(file);
            }
        }
    }
    let sent = send(link, &Report { refused, too_many, cut, bytes: buffer }, &good);
    close(bad);
    sent
}

fn send(link: BorrowedFd<'_>, report: &Report, good: &[(u8, OwnedFd)]) -> nix::Result<()> {
    let good: Vec<_> = good.iter().map(|(index, file)| (*index, file.as_fd())).collect();
    let queue = if good.is_empty() { None } else { Some(queued_files::queue(&good)?) };
    let with: Vec<_> = queue.iter().map(AsFd::as_fd).collect();
    fdpass::send(link, &report.encode(), &with, MsgFlags::empty()).map(drop)
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
