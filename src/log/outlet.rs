//! Where lines leave this process: a pipe's end in non-blocking mode, and a queue for when it is full.

use super::LogFormat;
use super::queue::{Dropped, Kind, Queue};
use crate::sys::readiness;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::PIPE_BUF;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::borrow::Cow;
use std::io::{Result, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::sync::Notify;
use tracing::{Metadata, warn};
use tracing_subscriber::fmt::MakeWriter;

/// The most bytes of a line: of so many the kernel writes all to a pipe or none, so no line is ever
/// torn or has another process's in it.
pub(super) const LONGEST: usize = PIPE_BUF;

/// Writes lines to standard error, which is the log's pipe in this process and in those that it forks
/// or starts; never waits.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) format: LogFormat,
    state: Mutex<State>,
    /// Something waits in the queue.
    waits: Notify,
}

#[derive(Debug, Default)]
struct State {
    queue: Queue,
    /// The process whose lines wait.
    process: u32,
    /// The log has ended: what comes then is dropped.
    is_over: bool,
}

impl Outlet {
    pub(super) fn new(format: LogFormat) -> Self {
        Self { format, state: Mutex::default(), waits: Notify::new() }
    }

    /// Writes a line, or has it wait behind those that wait already.
    fn put(&self, kind: Kind, line: &[u8]) {
        let line = within(LONGEST, line, self.format);
        let mut state = self.state();
        if state.is_over || state.queue.drain(write_line) && write_line(&line) {
            return;
        }
        state.queue.push(kind, &line);
        self.waits.notify_one();
    }

    /// Writes what waits. False where the pipe has no more room.
    fn drain(&self) -> bool {
        self.state().queue.drain(write_line)
    }

    /// Logs how many lines were dropped, if any were and there is room again.
    fn tell_dropped(&self) {
        let dropped = self.state().queue.take_dropped();
        if let Some(Dropped { leases, others }) = dropped {
            warn!(others, leases, "nobody read the log for a while: lines are missing");
        }
    }

    /// Writes what waits whenever there is room. Ends only where the event loop can't wait for it.
    pub(super) async fn keep_draining(&self) -> Result<()> {
        let pipe = std::io::stderr().as_fd().try_clone_to_owned()?;
        let pipe = readiness::watch(pipe, Interest::WRITABLE)?;
        loop {
            self.waits.notified().await;
            while !self.drain() {
                let mut room = pipe.writable().await?;
                if !self.drain() {
                    room.clear_ready();
                }
                self.tell_dropped();
            }
            self.tell_dropped();
        }
    }

    /// Writes what waits as long as somebody makes room for it. False where the time was up before: then
    /// the pipe itself is given room for it.
    pub(super) fn flush(&self, until: Instant) -> bool {
        let is_read = self.drain_until(until);
        if !is_read {
            widen_pipe();
            self.drain();
        }
        self.tell_dropped();
        self.drain_until(until) && is_read
    }

    fn drain_until(&self, until: Instant) -> bool {
        while !self.drain() {
            if !has_room(until) {
                return false;
            }
        }
        true
    }

    /// Drops whatever comes from here on.
    pub(super) fn end(&self) {
        self.state().is_over = true;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let process = std::process::id();
        if state.process != process {
            // What waited when this process was forked is its parent's to write.
            *state = State { process, is_over: state.is_over, ..State::default() };
        }
        state
    }
}

/// Writes a line. False where there is no room for it: one that can't be written at all is done with.
fn write_line(line: &[u8]) -> bool {
    loop {
        match nix::unistd::write(std::io::stderr(), line) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return false,
            _ => return true,
        }
    }
}

/// Makes room in the pipe for all that can wait; without CAP_SYS_RESOURCE for as much as anybody may have,
/// pipe(7)'s pipe-max-size.
fn widen_pipe() {
    const ALL: i32 = 16 << 20;
    const ANYBODYS: i32 = 1 << 20;
    let widen = |size| fcntl(std::io::stderr(), FcntlArg::F_SETPIPE_SZ(size));
    let _ = widen(ALL).or_else(|_| widen(ANYBODYS));
}

/// Waits for room in the pipe. False when the time is up.
fn has_room(until: Instant) -> bool {
    let left = until.saturating_duration_since(Instant::now());
    if left == Duration::ZERO {
        return false;
    }
    let (stderr, left) =
        (std::io::stderr(), PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
    poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)], left) != Ok(0)
}

/// The line, or as much of it as may be of one that is too long.
fn within(most: usize, line: &[u8], format: LogFormat) -> Cow<'_, [u8]> {
    if line.len() <= most {
        return Cow::Borrowed(line);
    }
    // In JSON each byte of it can take two: its quotes and backslashes are escaped once more.
    const MARKS: usize = 64;
    let room = most - MARKS;
    let start = &line[..if format == LogFormat::Json { room / 2 } else { room }];
    let start = String::from_utf8_lossy(start);
    let start = start.trim_end_matches(char::REPLACEMENT_CHARACTER);
    let mut cut = match format {
        LogFormat::Text => format!("{start}... (line cut: too long)"),
        LogFormat::Json => serde_json::json!({ "too_long": start }).to_string(),
    };
    cut.push('\n');
    Cow::Owned(cut.into_bytes())
}

/// The outlet, as the subscriber has it.
pub(super) struct Lines(pub(super) &'static Outlet);

/// Where one line goes.
pub(super) struct Line<'a> {
    outlet: &'a Outlet,
    kind: Kind,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { outlet: self.0, kind: Kind::Other }
    }

    fn make_writer_for(&'a self, of: &Metadata<'_>) -> Line<'a> {
        let kind = if of.target() == super::LEASES { Kind::Lease } else { Kind::Other };
        Line { outlet: self.0, kind }
    }
}

impl Write for Line<'_> {
    /// What the subscriber gives is a whole line.
    fn write(&mut self, line: &[u8]) -> Result<usize> {
        self.outlet.put(self.kind, line);
        Ok(line.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_too_long_is_cut_with_a_mark_in_both_formats() {
        let text = format!("{}\n", "é\"\\".repeat(LONGEST));
        let cut = within(LONGEST, text.as_bytes(), LogFormat::Text);
        let cut = std::str::from_utf8(&cut).unwrap();
        assert!(cut.len() <= LONGEST && cut.ends_with("... (line cut: too long)\n"), "{cut}");
        let json = serde_json::json!({ "message": text }).to_string() + "\n";
        let cut = within(LONGEST, json.as_bytes(), LogFormat::Json);
        assert!(cut.len() <= LONGEST && cut.ends_with(b"\n"));
        let cut: serde_json::Value = serde_json::from_slice(&cut).unwrap();
        assert!(cut["too_long"].as_str().unwrap().starts_with("{\"message\":\"é"), "{cut}");
        let whole = format!("{}\n", "x".repeat(LONGEST - 1));
        assert_eq!(*within(LONGEST, whole.as_bytes(), LogFormat::Json), *whole.as_bytes());
    }
}
