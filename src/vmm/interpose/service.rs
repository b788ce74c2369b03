//! Who answers: one thread takes questions, and is replaced where an answer takes long.
//!
//! An answer may need the broker, which can be away; and to read a path can mean to wait for a page of
//! the program's memory, which a FUSE file system delivers when it likes, and may first have to open a
//! file for, and wait for an answer itself. So nobody waits behind such a question but its asker, and
//! the main thread, which passes signals on, answers none. That a thread always waits while another
//! answers would do it too, and cost every open two switches more.

use super::super::{Error, Result};
use super::supervisor::Supervisor;
use super::sys::{self, Notification};
use crate::sys::event::EventFd;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// How long an answer may take before another thread takes the questions.
const PATIENCE: Duration = Duration::from_millis(50);
/// So many threads at most: with all of them stuck, further questions wait.
const MOST: usize = 32;
/// How long threads that are to end are waited for.
const END: Duration = Duration::from_secs(1);

/// Threads that answer until nobody is left to ask.
pub(super) struct Service {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    supervisor: Supervisor,
    /// Runs while a question is being answered.
    patience: TimerFd,
    stop: EventFd,
    /// Written when the thread that takes the questions has ended.
    ended: EventFd,
    state: Mutex<State>,
    left: Condvar,
}

struct State {
    /// The thread that takes the questions, by its number; those before it only finish an answer.
    turn: usize,
    running: usize,
    failed: Option<Errno>,
}

impl Service {
    /// Starts to answer.
    pub(super) fn start(supervisor: Supervisor) -> Result<Self> {
        let event = || EventFd::new().map_err(Error::system("eventfd"));
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let patience = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags);
        let shared = Shared {
            supervisor,
            patience: patience.map_err(Error::system("timerfd_create"))?,
            stop: event()?,
            ended: event()?,
            state: Mutex::new(State { turn: 0, running: 0, failed: None }),
            left: Condvar::new(),
        };
        let mut service = Self { shared: Arc::new(shared), threads: Vec::new() };
        service.hand_over().map_err(Error::system("clone"))?;
        Ok(service)
    }

    /// Readable when [`Service::look`] is to be called.
    pub(super) fn events(&self) -> [BorrowedFd<'_>; 2] {
        [self.shared.patience.as_fd(), self.shared.ended.as_fd()]
    }

    /// Replaces a thread whose answer takes long; says whether there are questions no more, because
    /// nobody is left to ask.
    ///
    /// # Errors
    /// Questions can't be taken any more.
    pub(super) fn look(&mut self) -> Result<bool> {
        // It may have run out for a question that has been answered since: one thread ends then, and
        // its successor goes on.
        if nix::unistd::read(&self.shared.patience, &mut [0; 8]).is_ok() {
            // Without a thread more they wait until this one has answered.
            let _ = self.hand_over();
        }
        if self.shared.ended.read().is_err() {
            return Ok(false);
        }
        match self.shared.state().failed {
            Some(errno) => Err(Error::System { call: "SECCOMP_IOCTL_NOTIF_RECV", errno }),
            None => Ok(true),
        }
    }

    /// Whether nobody is left to ask.
    pub(super) fn is_hung_up(&self) -> bool {
        is_hung_up(self.shared.supervisor.listener())
    }

    /// Ends all threads.
    ///
    /// # Errors
    /// Some are at an answer that takes too long: all goes on as before.
    pub(super) fn stop(self) -> std::result::Result<Supervisor, Self> {
        let Self { shared, threads } = self;
        let _ = shared.stop.write(1);
        let running = |state: &mut State| state.running > 0;
        let left = shared.left.wait_timeout_while(shared.state(), END, running);
        let (state, timeout) = left.unwrap_or_else(PoisonError::into_inner);
        drop(state);
        if timeout.timed_out() {
            return Err(Self { shared, threads }.resumed());
        }
        for thread in threads {
            let _ = thread.join();
        }
        Arc::try_unwrap(shared)
            .map(|shared| shared.supervisor)
            .map_err(|shared| Self { shared, threads: Vec::new() }.resumed())
    }

    fn resumed(mut self) -> Self {
        let _ = (self.shared.stop.read(), self.shared.ended.read(), self.hand_over());
        self
    }

    /// Has a new thread take the questions.
    fn hand_over(&mut self) -> std::result::Result<(), Errno> {
        self.threads.retain(|thread| !thread.is_finished());
        let mut state = self.shared.state();
        if state.running >= MOST {
            return Ok(());
        }
        let (shared, turn) = (Arc::clone(&self.shared), state.turn + 1);
        let thread = Builder::new().stack_size(256 << 10).spawn(move || shared.run(turn));
        let errno = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
        self.threads.push(thread.map_err(errno)?);
        (state.turn, state.running) = (turn, state.running + 1);
        Ok(())
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, turn: usize) {
        let outcome = self.take_questions(turn);
        let mut state = self.state();
        state.running -= 1;
        state.failed = state.failed.or(outcome.err());
        if state.turn == turn {
            let _ = self.ended.write(1);
        }
        self.left.notify_all();
    }

    fn take_questions(&self, turn: usize) -> std::result::Result<(), Errno> {
        while let Some(question) = self.next()? {
            let start = Expiration::OneShot(TimeSpec::from(PATIENCE));
            self.patience.set(start, TimerSetTimeFlags::empty())?;
            self.supervisor.answer(&question)?;
            let state = self.state();
            if state.turn != turn {
                break;
            }
            self.patience.unset()?;
        }
        Ok(())
    }

    /// The next question; none where nobody is left to ask, or when it is time to stop.
    fn next(&self) -> std::result::Result<Option<Notification>, Errno> {
        let listener = self.supervisor.listener();
        loop {
            let wanted = PollFlags::POLLIN;
            let mut fds = [PollFd::new(listener, wanted), PollFd::new(self.stop.as_fd(), wanted)];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            let [asked, stop] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
            if !stop.is_empty() {
                return Ok(None);
            }
            if asked.contains(PollFlags::POLLIN) {
                match sys::receive(listener) {
                    // Whoever asked is gone.
                    Err(Errno::ENOENT | Errno::EINTR) => {}
                    other => return other.map(Some),
                }
            } else if !asked.is_empty() {
                return Ok(None);
            }
        }
    }
}

fn is_hung_up(listener: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(listener, PollFlags::POLLIN)];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    let [listener] = fds;
    listener.revents().is_some_and(|e| e.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}
