//! The process that copies the log to standard error, and waits there in everybody's stead.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{read, write};
use std::os::fd::AsFd;

/// How much is read at a time.
const CHUNK: usize = 64 << 10;

/// Copies whole lines to standard error until nobody can write to the pipe any more. This process must
/// not have the pipe's other end, or it waits for itself.
///
/// # Errors
/// What read(2) says.
pub(super) fn copy(pipe: impl AsFd) -> nix::Result<()> {
    // Whoever ends the daemon by its process group or its terminal wants to read how it ended. With
    // SIGTTOU blocked, a terminal lets it write from the background too.
    let _ = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGTTOU]
        .into_iter()
        .collect::<SigSet>()
        .thread_block();
    let (mut lines, mut chunk) = (Vec::new(), vec![0; CHUNK]);
    loop {
        let len = match read(&pipe, &mut chunk) {
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
