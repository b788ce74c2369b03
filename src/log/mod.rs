//! The log, on standard error. A healthy system writes one line as a lease begins and one as it
//! ends; what clients do wrong is for `debug`, what they are denied for `info`.
//!
//! Nobody who logs waits for whoever reads the log. Lines go into a pipe, from which a process of its
//! own copies them ([`process`]). What the pipe has no room for waits in a queue ([`queue`]), written by
//! the event loop when there is room again ([`outlet`]); what the queue has no room for is counted.

mod outlet;
mod process;
mod queue;

use crate::launcher::Sandbox;
use crate::process::role::Role;
use crate::sys::child;
use clap::ValueEnum;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use outlet::{Lines, Outlet};
use std::fs::File;
use std::io::{Result, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tokio::task::spawn_local;
use tracing::{error, warn};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt;

/// The target of the lines that say that a lease begins, or ends: they have a reserve of their own in
/// the queue, whatever else there is to log.
pub(crate) const LEASES: &str = "vfio_broker::leases";

/// How long the end waits for whoever reads the log.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long before a process that copies the log is replaced, so that one which can't live costs little.
const PAUSE: Duration = Duration::from_secs(1);

/// What the environment says of the log's level.
const LEVEL: &str = "RUST_LOG";

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text an event.
    Text,
    /// One JSON object a line.
    Json,
}

/// What this process writes lines to, once it has a log.
static OUTLET: OnceLock<Outlet> = OnceLock::new();

/// Who copies the log to what was standard error. The launcher's.
#[derive(Debug)]
pub(crate) struct Log {
    /// The pipe's other end. It is kept here too, so that what is in the pipe outlives who copies it.
    reader: OwnedFd,
    /// What was standard error before.
    stderr: OwnedFd,
    process: Pid,
    started: Instant,
    sandbox: Sandbox,
}

/// Starts logging, and puts the log's pipe in the place of standard error: whatever writes there, in this
/// process or a child, waits for nobody. `RUST_LOG` may be one of error, warn, info, debug and trace.
///
/// # Errors
/// What pipe(2), fcntl(2), dup2(2) or fork(2) says.
pub(crate) fn start(format: LogFormat, sandbox: Sandbox) -> Result<Log> {
    let (reader, pipe) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    // Of this end alone: the standard error that was given is others' too.
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let stderr = std::io::stderr().as_fd().try_clone_to_owned()?;
    let process = start_process(&reader, &stderr, &sandbox)?;
    nix::unistd::dup2_stderr(&pipe)?;
    subscribe(format);
    Ok(Log { reader, stderr, process, started: Instant::now(), sandbox })
}

fn start_process(reader: &OwnedFd, stderr: &OwnedFd, sandbox: &Sandbox) -> Result<Pid> {
    let files = [reader.try_clone()?, stderr.try_clone()?];
    let pid = child::fork(Role::Log.name(), files, |[pipe, stderr]| {
        // Standard error comes in place of the pipe's other end.
        let moved = nix::unistd::dup2_stderr(&stderr).and_then(|()| nix::unistd::dup2_stdin(&pipe));
        drop((pipe, stderr));
        if let Err(why) = sandbox.confine(Role::Log) {
            let _ = writeln!(std::io::stderr(), "nobody writes the log: {why}");
            return 1;
        }
        u8::from(moved.and_then(|()| process::copy(std::io::stdin())).is_err())
    })?;
    Ok(pid)
}

/// Has the event loop write what waits, whenever there is room for it: call it there, in each process
/// that has one. Others write it with their next line, and with [`flush`].
pub(crate) fn keep_draining() {
    let Some(outlet) = OUTLET.get() else { return };
    spawn_local(async {
        // What waits is tried again with each new line all the same.
        if let Err(error) = outlet.keep_draining().await {
            warn!(%error, "can't wait for room in the log's pipe");
        }
    });
}

/// Writes what waits, for a process that ends. False if nobody has read for some seconds: it is left in
/// the pipe then, for who copies that outlives this process.
pub(crate) fn flush() -> bool {
    OUTLET.get().is_none_or(|outlet| outlet.flush(Instant::now() + PATIENCE))
}

impl Log {
    /// Replaces the process where it has ended, which it does only if somebody kills it. Says when to
    /// try again where it is too early for that.
    pub(crate) fn keep_process(&mut self) -> Option<Instant> {
        if !self.has_lost_process() {
            return None;
        }
        let earliest = self.started + PAUSE;
        if Instant::now() < earliest {
            return Some(earliest);
        }
        self.started = Instant::now();
        match start_process(&self.reader, &self.stderr, &self.sandbox) {
            Ok(process) => {
                self.process = process;
                warn!("the process that writes the log was gone: there is another one");
                None
            }
            Err(error) => {
                warn!(%error, "can't start a process that writes the log");
                Some(self.started + PAUSE)
            }
        }
    }

    fn has_lost_process(&self) -> bool {
        !matches!(waitpid(self.process, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive))
    }

    /// Ends the log: what is logged from here on is dropped, and standard error is what it was. Waits
    /// until all is written, but not for ever; then standard error leads nowhere, for it would block.
    pub(crate) fn end(&self) {
        let is_flushed = flush();
        if let Some(outlet) = OUTLET.get() {
            outlet.end();
        }
        let null = File::options().write(true).open("/dev/null");
        if null.is_ok_and(|null| nix::unistd::dup2_stderr(null).is_ok())
            && is_flushed
            && self.is_written()
        {
            let _ = nix::unistd::dup2_stderr(&self.stderr);
        }
    }

    /// Whether all lines are on what was standard error. The process ends then, unless keepers can still
    /// log: in that case an empty pipe has to do.
    fn is_written(&self) -> bool {
        const EMPTY_FOR: Duration = Duration::from_millis(200);
        let until = Instant::now() + PATIENCE;
        let mut empty_since = None;
        let mut pause = Duration::from_micros(100);
        while Instant::now() < until {
            if self.has_lost_process() {
                return true;
            }
            let in_pipe = &mut [PollFd::new(self.reader.as_fd(), PollFlags::POLLIN)];
            let is_empty = poll(in_pipe, PollTimeout::ZERO) == Ok(0);
            let since = is_empty.then(|| empty_since.unwrap_or_else(Instant::now));
            if since.is_some_and(|since| since.elapsed() > EMPTY_FOR) {
                return true;
            }
            empty_since = since;
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
        false
    }
}

fn subscribe(format: LogFormat) {
    let outlet = OUTLET.get_or_init(|| Outlet::new(format));
    let asked = std::env::var(LEVEL).ok().and_then(|level| level.parse().ok());
    let level: LevelFilter = asked.unwrap_or(LevelFilter::INFO);
    let builder = fmt().with_max_level(level).with_writer(Lines(outlet)).with_target(false);
    let builder = builder.log_internal_errors(false);
    // A second subscriber in one process (a test) stays without effect, which is fine.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    // A panic's message is a line like others: the default one has several, and none in JSON.
    std::panic::set_hook(Box::new(|panic| error!(panic = panic.to_string(), "panicked")));
}

/// Text from a peer, for a log line: not longer than a line should be. What is no letter in it is
/// escaped by both formats as they write it.
pub(crate) fn excerpt(text: &str) -> String {
    const MOST: usize = 100;
    let cut: String = text.chars().take(MOST).collect();
    let more = if cut.len() < text.len() { "..." } else { "" };
    format!("{cut}{more}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_peer_says_is_escaped_once_in_both_formats() {
        for json in [false, true] {
            let lines = Lines::default();
            let writer = lines.clone();
            let builder = fmt().with_ansi(false).with_writer(move || writer.clone());
            let log = || {
                let reason = excerpt("tenant \"a\"\nINFO all is well\x1b[2J");
                tracing::info!(reason, "denied");
            };
            if json {
                tracing::subscriber::with_default(builder.json().flatten_event(true).finish(), log);
            } else {
                tracing::subscriber::with_default(builder.finish(), log);
            }
            let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            assert!(text.contains(r#"tenant \"a\"\nINFO all"#), "{text}");
            assert!(text.lines().count() == 1 && !text.contains('\x1b'), "{text}");
        }
    }
}
