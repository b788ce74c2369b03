//! The supervisor's own side: passes signals on, and ends as the program ends.

use super::super::{Error, Result};
use super::service::Service;
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

pub(super) struct Wait {
    program: Pid,
    path: PathBuf,
    signals: SignalFd,
    /// Where the new process says that it could not become the program; closed when it has.
    starting: Option<OwnedFd>,
}

impl Wait {
    pub(super) fn new(program: Pid, path: PathBuf, starting: OwnedFd) -> Result<Self> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&signals(), flags).map_err(Error::system("signalfd"))?;
        Ok(Self { program, path, signals, starting: Some(starting) })
    }

    /// Has the program's questions answered until it has ended.
    pub(super) fn run(mut self, supervisor: Supervisor) -> Result<Ended> {
        // The threads that answer are to be without it too.
        drop_what_is_not_needed()?;
        let mut service = Service::start(supervisor)?;
        loop {
            let [told, served, started] = self.wait(&service)?;
            if served {
                // That nobody is left to ask is seen a moment before the program's end.
                service.look()?;
            }
            if let Some(socket) = self.starting.take_if(|_| started) {
                let outcome = start::outcome(&socket, &self.path);
                if outcome.is_err() {
                    let _ = waitpid(self.program, None);
                }
                outcome?;
            }
            if told && let Some(ended) = self.signals()? {
                leave_to_background(service);
                return Ok(ended);
            }
        }
    }

    /// Waits for a signal, for what the service has to say, and for the start of the program.
    fn wait(&self, service: &Service) -> Result<[bool; 3]> {
        let [slow, over] = service.events();
        let mut fds: Vec<_> = [self.signals.as_fd(), slow, over]
            .into_iter()
            .chain(self.starting.as_ref().map(AsFd::as_fd))
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        ready(&mut fds)?;
        let has = |at: usize| fds.get(at).is_some_and(|fd| fd.any() == Some(true));
        Ok([has(0), has(1) || has(2), has(3)])
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
}

/// Waits until something has happened to any of these.
fn ready(fds: &mut [PollFd<'_>]) -> Result<()> {
    loop {
        match poll(fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            other => return other.map(drop).map_err(Error::system("poll")),
        }
    }
}

/// Where the program has left others under its filter, a copy of this process serves them on: without
/// it all their opens would fail.
fn leave_to_background(service: Service) {
    if service.is_hung_up() {
        return;
    }
    let supervisor = match service.stop() {
        Ok(supervisor) => supervisor,
        // A thread in the middle of an answer can't be copied.
        Err(service) => return drop(serve_the_rest(service)),
    };
    match sys::fork() {
        Ok(ForkResult::Child) => {
            let _ = nix::unistd::setsid();
            if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
                let _ = nix::unistd::dup2_stderr(&null);
            }
            let outcome = Service::start(supervisor.silent()).and_then(serve_the_rest);
            sys::exit_now(i32::from(outcome.is_err()))
        }
        Ok(ForkResult::Parent { .. }) => {}
        Err(_) => drop(Service::start(supervisor).and_then(serve_the_rest)),
    }
}

/// Returns when nobody is left to ask.
fn serve_the_rest(mut service: Service) -> Result<()> {
    // There is nobody left to pass them on to.
    let _ = signals().thread_unblock();
    loop {
        let mut fds = service.events().map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        ready(&mut fds)?;
        if service.look()? {
            return Ok(());
        }
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
