//! The process that copies the log to standard error, and waits there in everybody's stead.

use crate::sys::{inherited, nobody};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{read, write};
use std::io::Result;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};

/// What it is called in the list of processes; a program that is started under this name is one.
const NAME: &str = "vfio-broker-log";

/// How much is read at a time.
const CHUNK: usize = 64 << 10;

/// Whom it runs as: not as the receivers' user, for whoever broke into one could stop it. The journal
/// puts this one's lines with those of the system; a uid that nobody knows gets a journal of its own.
const NOBODIES: [u32; 1] = [65534];

/// Starts it: this program again, with the pipe as its input and nothing else open but `stderr`.
pub(super) fn start(pipe: &OwnedFd, stderr: &OwnedFd) -> Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).env_clear().current_dir("/");
    command.stdin(pipe.try_clone()?).stdout(Stdio::null()).stderr(stderr.try_clone()?).spawn()
}

/// Copies, if this program was started for that: call it first of all in `main`.
pub(crate) fn be_one_if_asked() -> Option<ExitCode> {
    if std::env::args_os().next()? != NAME {
        return None;
    }
    inherited::close_all();
    Some(match copy(std::io::stdin().as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

/// Copies whole lines to standard error until nobody can write to the pipe any more. A process that was
/// forked for it can call this too; it must not have the pipe's other end, or it waits for itself.
///
/// # Errors
/// What prctl(2) or read(2) says.
pub(crate) fn copy(pipe: BorrowedFd<'_>) -> nix::Result<()> {
    // Whoever ends the daemon by its process group or its terminal wants to read how it ended. With
    // SIGTTOU blocked, a terminal lets it write from the background too.
    let _ = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGTTOU]
        .into_iter()
        .collect::<SigSet>()
        .thread_block();
    nix::sys::prctl::set_no_new_privs()?;
    // In a user namespace without such a user root is a plain user outside.
    let _ = nobody::become_one_of(&NOBODIES);
    let (mut lines, mut chunk) = (Vec::new(), vec![0; CHUNK]);
    loop {
        let len = match read(pipe, &mut chunk) {
            Err(Errno::EINTR) => continue,
            read => read?,
        };
        if len == 0 {
            write_all(&lines);
            return Ok(());
        }
        lines.extend_from_slice(&chunk[..len]);
        // What is no whole line yet waits for its end, so that nobody else's output gets into it.
        let whole = match lines.iter().rposition(|&byte| byte == b'\n') {
            Some(end) => end + 1,
            None if lines.len() < CHUNK => 0,
            None => lines.len(),
        };
        write_all(&lines[..whole]);
        lines.drain(..whole);
    }
}

/// Writes it to standard error, however long that takes. What can't be written is lost: whoever reads
/// the log has gone, or the disk is full.
fn write_all(mut bytes: &[u8]) {
    let stderr = std::io::stderr();
    while !bytes.is_empty() {
        match write(&stderr, bytes) {
            Ok(len) => bytes = &bytes[len..],
            Err(Errno::EINTR) => {}
            // Others that share it may have put it into non-blocking mode.
            Err(Errno::EAGAIN) => {
                let room = PollFd::new(stderr.as_fd(), PollFlags::POLLOUT);
                let _ = poll(&mut [room], PollTimeout::NONE);
            }
            Err(_) => return,
        }
    }
}
