//! The supervisor's side: answers, passes signals on, and ends as the program ends.

use super::super::{Error, Result};
use super::start;
use super::supervisor::Supervisor;
use super::sys;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this status.
    Exited(i32),
    /// By this signal.
    Killed(Signal),
}

impl Ended {
    /// Ends this process in the same way: returns the exit status, or does not return.
    pub fn as_own(self) -> ExitCode {
        match self {
            Self::Exited(status) => ExitCode::from(status as u8),
            Self::Killed(signal) => {
                sys::die_by(signal);
                // A signal that could not be had: what shells make of it.
                ExitCode::from(128 + signal as u8)
            }
        }
    }
}

/// The signals that are passed on, and the one that tells of the program's end. Those by which a
/// terminal stops and continues processes are left to it: it sends them to both.
pub(super) fn signals() -> SigSet {
    use Signal::{SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
    let all = [SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH];
    all.into_iter().collect()
}

pub(super) struct Watch {
    supervisor: Supervisor,
    program: Pid,
    path: PathBuf,
    signals: SignalFd,
    /// Where the new process says that it could not become the program; closed when it has.
    starting: Option<OwnedFd>,
}

impl Watch {
    pub(super) fn new(
        supervisor: Supervisor,
        program: Pid,
        path: PathBuf,
        starting: OwnedFd,
    ) -> Result<Self> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&signals(), flags).map_err(Error::system("signalfd"))?;
        Ok(Self { supervisor, program, path, signals, starting: Some(starting) })
    }

    /// Serves until the program has ended.
    pub(super) fn run(mut self) -> Result<Ended> {
        drop_what_is_not_needed()?;
        loop {
            let [asked, told, started] = self.wait()?;
            if asked {
                self.supervisor.serve().map_err(Error::system("SECCOMP_IOCTL_NOTIF_RECV"))?;
            }
            if let Some(socket) = self.starting.take_if(|_| started) {
                let outcome = start::outcome(&socket, &self.path);
                if outcome.is_err() {
                    let _ = waitpid(self.program, None);
                }
                outcome?;
            }
            if told && let Some(ended) = self.signals()? {
                self.leave_to_background();
                return Ok(ended);
            }
        }
    }

    /// Waits for a question, a signal, and the start of the program.
    fn wait(&self) -> Result<[bool; 3]> {
        let mut fds = vec![
            PollFd::new(self.supervisor.listener(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.starting.as_ref().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                other => break other.map(drop).map_err(Error::system("poll"))?,
            }
        }
        let has = |at: usize, wanted: PollFlags| {
            let events = fds.get(at).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
            events.intersects(wanted)
        };
        let any = PollFlags::all();
        Ok([has(0, PollFlags::POLLIN), has(1, any), has(2, any)])
    }

    /// Passes signals on; the program's end, if that is among them.
    fn signals(&self) -> Result<Option<Ended>> {
        while let Some(signal) =
            self.signals.read_signal().map_err(Error::system("read signalfd"))?
        {
            match Signal::try_from(signal.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) => {
                    if let Some(ended) = self.ended()? {
                        return Ok(Some(ended));
                    }
                }
                Ok(number) if !is_for_all(&signal) => {
                    // It can have ended: SIGCHLD is about to say so.
                    let _ = kill(self.program, number);
                }
                _ => {}
            }
        }
        Ok(None)
    }

    fn ended(&self) -> Result<Option<Ended>> {
        match waitpid(self.program, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, status)) => Ok(Some(Ended::Exited(status))),
            Ok(WaitStatus::Signaled(_, signal, _)) => Ok(Some(Ended::Killed(signal))),
            Ok(_) | Err(Errno::EINTR) => Ok(None),
            Err(errno) => Err(Error::System { call: "waitpid", errno }),
        }
    }

    /// Where the program has left others under its filter, a copy of this process serves them on:
    /// without it all their opens would fail.
    fn leave_to_background(mut self) {
        if self.is_hung_up() {
            return;
        }
        match sys::fork() {
            Ok(ForkResult::Child) => {
                let _ = nix::unistd::setsid();
                if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
                    let _ = nix::unistd::dup2_stderr(&null);
                }
                self.supervisor.be_silent();
                sys::exit_now(self.serve_the_rest())
            }
            Ok(ForkResult::Parent { .. }) => {}
            Err(_) => drop(self.serve_the_rest()),
        }
    }

    fn serve_the_rest(&mut self) -> i32 {
        while !self.is_hung_up() {
            let mut fds = [PollFd::new(self.supervisor.listener(), PollFlags::POLLIN)];
            let woken = poll(&mut fds, PollTimeout::NONE);
            let [listener] = fds;
            let asked = listener.revents().is_some_and(|e| e.contains(PollFlags::POLLIN));
            if woken.is_ok() && asked && self.supervisor.serve().is_err() {
                return 1;
            }
        }
        0
    }

    fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.supervisor.listener(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::ZERO);
        let [listener] = fds;
        listener.revents().is_some_and(|e| e.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
    }
}

/// Whether a terminal sent it, which it then did to the program as well.
fn is_for_all(signal: &siginfo) -> bool {
    signal.ssi_code == libc::SI_KERNEL
}

/// The supervisor needs a way to say something, and no more: no input, no output that somebody may
/// wait for the end of, no directory that could not be unmounted.
fn drop_what_is_not_needed() -> Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(|_| Error::System { call: "open /dev/null", errno: Errno::ENOENT })?;
    nix::unistd::dup2_stdin(&null).map_err(Error::system("dup2"))?;
    nix::unistd::dup2_stdout(&null).map_err(Error::system("dup2"))?;
    nix::unistd::chdir("/").map_err(Error::system("chdir"))?;
    nix::sys::prctl::set_no_new_privs().map_err(Error::system("prctl PR_SET_NO_NEW_PRIVS"))
}
