//! The launcher's loop: the broker's calls, signals, and children that end.

use super::StartError;
use super::broker::{Beginning, Broker};
use super::earlier_broker;
use super::listen::Listening;
use super::policy_file;
use super::simulation::Simulation;
use crate::keeper::Place;
use crate::log::Log;
use crate::policy::Policy;
use crate::process::link::keep_open;
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::MsgFlags;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use sd_notify::NotifyState;
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use tracing::{error, warn};

/// How long a broker may take to end.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// So many brokers that ended in so long a time are too many.
const MOST_ENDS: usize = 5;
const ENDS_COUNT_FOR: Duration = Duration::from_secs(30);

/// All that the launcher has.
#[derive(Debug)]
pub(super) struct Launcher {
    pub(super) beginning: Beginning,
    pub(super) place: Place,
    /// The processes that only have what a peer sent, and were not waited for.
    pub(super) helpers: HashSet<Pid>,
    pub(super) broker: Broker,
    /// Why it is to end, and when it does so at the latest.
    pub(super) stop: Option<Stop>,
    /// A policy was read while no broker listened; the compiled one, if it was not refused.
    missed: Option<Option<File>>,
    /// When brokers have ended that were not to.
    ends: Vec<Instant>,
    signals: SignalFd,
    simulation: Option<Simulation>,
    /// Keeps other launchers from serving the same machine.
    _lock: File,
    listening: Listening,
}

#[derive(Debug)]
pub(super) struct Stop {
    pub(super) signal: &'static str,
    until: Instant,
}

/// The signals that the launcher reads instead of being interrupted by them.
pub(super) fn take_signals() -> Result<SignalFd, StartError> {
    let failed = StartError::set_up::<Errno>;
    let signals: SigSet =
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD].into_iter().collect();
    signals.thread_block().map_err(failed("signals"))?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    SignalFd::with_flags(&signals, flags).map_err(failed("signals"))
}

impl Launcher {
    pub(super) fn new(
        beginning: Beginning,
        place: Place,
        signals: SignalFd,
        simulation: Option<Simulation>,
        lock: File,
        listening: Listening,
    ) -> Result<Self, StartError> {
        let broker = Broker::start(&beginning, &listening.listener)?;
        earlier_broker::note(place.path(), broker.pid);
        let (helpers, ends) = (HashSet::new(), Vec::new());
        let (stop, missed) = (None, None);
        Ok(Self {
            beginning,
            place,
            helpers,
            broker,
            stop,
            missed,
            ends,
            signals,
            simulation,
            _lock: lock,
            listening,
        })
    }

    /// Serves until a signal ends it.
    ///
    /// # Errors
    /// The broker can't begin, or ends again and again.
    pub(super) fn serve(mut self, log: &mut Log) -> Result<(), StartError> {
        let served = self.serve_brokers(log);
        let closer = self.start_closer();
        close_elsewhere(closer, self.broker.into_links());
        served
    }

    fn serve_brokers(&mut self, log: &mut Log) -> Result<(), StartError> {
        loop {
            self.wait(log.keep_process());
            self.read_signals();
            self.take_policy();
            // Before the broker is answered: what it said before it ended is still to be read.
            self.reap()?;
            if self.answer_broker().is_err() || self.broker.ended.is_some() {
                let ended = self.reap_broker();
                if self.stop.is_some() {
                    return Ok(());
                }
                self.replace_broker(&ended)?;
            }
            if self.stop.as_ref().is_some_and(|stop| Instant::now() >= stop.until) {
                warn!("the broker does not end, and is killed");
                self.broker.kill();
                return Ok(());
            }
        }
    }

    /// Waits for something to do, or until then.
    fn wait(&self, again: Option<Instant>) {
        let readable = PollFlags::POLLIN;
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), readable),
            PollFd::new(self.broker.asks.as_fd(), readable),
        ];
        fds.extend(self.broker.tells.as_ref().map(|link| PollFd::new(link.as_fd(), readable)));
        let reading = self.beginning.policy_file.waits_for();
        let (reading, late) = reading.unzip();
        fds.extend(reading);
        let until =
            self.stop.as_ref().map(|stop| stop.until).into_iter().chain(again).chain(late).min();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.map(|left| left + Duration::from_millis(1));
        let left = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        // Whatever poll says: what there is to do is looked for.
        let _ = poll(&mut fds, left);
    }

    fn read_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            let signal = match Signal::try_from(signal.ssi_signo.cast_signed()) {
                Ok(Signal::SIGTERM) => "SIGTERM",
                Ok(Signal::SIGINT) => "SIGINT",
                Ok(Signal::SIGHUP) => {
                    self.reload();
                    continue;
                }
                // Whatever has ended is waited for anyway.
                _ => continue,
            };
            if self.stop.is_none() {
                // It may have gone before us, and knows by its own signal.
                let _ = sd_notify::notify(&[NotifyState::Stopping]);
                self.stop = Some(Stop { signal, until: Instant::now() + STOP_PATIENCE });
                self.broker.tell_to_stop(signal);
            }
        }
    }

    /// Has the policy read again.
    fn reload(&mut self) {
        let since = NotifyState::monotonic_usec_now().ok();
        notify(&[Some(NotifyState::Reloading), since].into_iter().flatten().collect::<Vec<_>>());
        self.beginning.policy_file.begin(&self.beginning.sandbox);
    }

    /// Takes what came of reading the policy again. One that can't be used leaves the one that is in force,
    /// and brokers to come begin with that.
    fn take_policy(&mut self) {
        let Some(read) = self.beginning.policy_file.take() else { return };
        let compiled = read.policy.ok().and_then(|policy| self.put_in_force(policy));
        let read = self.beginning.policy_file.status();
        if !self.broker.tell_policy(read, compiled.as_ref()) {
            self.missed = Some(compiled);
        }
    }

    /// Tells a broker that begins to listen what it has missed.
    pub(super) fn tell_missed(&mut self) {
        if let Some(compiled) = self.missed.take() {
            self.broker.tell_policy(self.beginning.policy_file.status(), compiled.as_ref());
        }
        if let Some(stop) = &self.stop {
            self.broker.tell_to_stop(stop.signal);
        }
    }

    /// Has a policy apply from here on; gives it as a file, where it could be written.
    fn put_in_force(&mut self, policy: Policy) -> Option<File> {
        match policy_file::put_in_force(policy, &self.place, &self.listening.listener) {
            Ok((policy, file)) => {
                self.beginning.policy = policy;
                self.beginning.policy_file.in_force();
                Some(file)
            }
            Err(error) => {
                let place = self.place.path().display();
                let why = format!("it can't be written to {place}, for keepers: {error}");
                self.beginning.policy_file.refused(why);
                None
            }
        }
    }

    /// Lets the kernel forget children that have ended.
    fn reap(&mut self) -> Result<(), StartError> {
        loop {
            let (pid, how) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, format!("it ended with code {code}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("it got {signal}")),
                Err(Errno::EINTR) => continue,
                _ => return Ok(()),
            };
            if pid == self.broker.pid {
                self.broker.ended = Some(how);
            }
            self.helpers.remove(&pid);
            self.beginning.policy_file.reaped(pid);
            if self.simulation.as_ref().is_some_and(|simulation| simulation.pid == pid) {
                let why = "its process has died".into();
                return Err(StartError::Ended { what: "the simulation", why });
            }
        }
    }

    /// How the broker has ended, whose links have; one that has not is killed. It is waited for only as
    /// far as it has ended: what clients have sent may keep it from that, and nobody else.
    fn reap_broker(&mut self) -> String {
        let until = Instant::now() + Duration::from_secs(1);
        loop {
            if let Some(how) = self.broker.ended.take() {
                return how;
            }
            match waitpid(self.broker.pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, code)) => return format!("it ended with code {code}"),
                Ok(WaitStatus::Signaled(_, signal, _)) => return format!("it got {signal}"),
                Ok(_) if Instant::now() < until => {}
                _ => {
                    self.broker.kill();
                    return "it closed its link".into();
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Starts another broker in place of one that has ended. Leases go on meanwhile, and who connects
    /// waits.
    fn replace_broker(&mut self, ended: &str) -> Result<(), StartError> {
        let now = Instant::now();
        if let Some(why) = self.broker.gave_up.take() {
            return Err(StartError::Broker(why));
        }
        self.ends.retain(|end| now.duration_since(*end) < ENDS_COUNT_FOR);
        self.ends.push(now);
        // The first one that does not get ready won't the next time; one in place of another may have been
        // killed before it was.
        let never_ready = !self.broker.is_ready && self.ends.len() == 1;
        if never_ready || self.ends.len() > MOST_ENDS {
            return Err(StartError::Ended { what: "the broker", why: ended.to_owned() });
        }
        error!(why = ended, "the broker has ended, and is started again; leases go on");
        let next = Broker::start(&self.beginning, &self.listening.listener)?;
        earlier_broker::note(self.place.path(), next.pid);
        let links = std::mem::replace(&mut self.broker, next).into_links();
        close_elsewhere(self.start_closer(), links);
        // It begins with the policy of now.
        if self.missed.take().is_some() {
            notify(&[NotifyState::Ready]);
        }
        Ok(())
    }
}

/// Has a closer close links: with them ends what was sent there and nobody has read, and that can hang. A link
/// that nobody can close stays open.
fn close_elsewhere(closer: Option<OwnedFd>, links: Vec<OwnedFd>) {
    let Some(closer) = closer else { return keep_open(links) };
    let borrowed: Vec<_> = links.iter().map(AsFd::as_fd).collect();
    let given = fdpass::send(closer.as_fd(), &[0], &borrowed, MsgFlags::MSG_DONTWAIT);
    match given {
        Ok(_) => drop(links),
        Err(_) => keep_open(links),
    }
    // Now that they are closed here.
    let _ = fdpass::send(closer.as_fd(), &[0], &[], MsgFlags::MSG_DONTWAIT);
}

/// Tells the service manager, if there is one.
pub(super) fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "can't tell the service manager");
    }
}
