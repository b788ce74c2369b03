//! Closes open files whose close can take long: guests' memory, whose pages are freed by it. Also, where no process can be had for them, peers' sockets; what is
//! in those can make it take for ever.
//!
//! Every owner has a lane: its files wait for each other and for nobody else's, and however many
//! of them hang, they hold up a few threads of their own.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The most threads that one lane can hold up.
const LANE_THREADS: usize = 4;

/// More threads than this are never started, for all lanes together.
const MOST_THREADS: usize = 1024;

/// The closer threads close one file at a time and use next to no stack.
const STACK: usize = 64 << 10;

/// Threads that close files, and the lanes they serve in turn.
#[derive(Clone, Debug)]
pub(super) struct Closer(Arc<Shared>);

/// One owner's files to be closed.
#[derive(Clone, Debug)]
pub(super) struct Lane(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    closer: Closer,
    number: u64,
    unclosed: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lanes: HashMap<u64, Waiting>,
    last_number: u64,
    /// One entry for each thread that a lane may take up next.
    turns: VecDeque<u64>,
    threads: usize,
    idle: usize,
}

/// What is in a lane.
#[derive(Debug, Default)]
struct Waiting {
    files: VecDeque<OwnedFd>,
    unclosed: Arc<AtomicUsize>,
    /// Threads that it takes up or has a turn for.
    claims: usize,
    /// Its owner is gone; it goes when it is empty.
    orphan: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Closer {
    pub(super) fn new() -> std::io::Result<Self> {
        let closer = Self(Arc::default());
        closer.0.state().threads = 1;
        closer.spawn()?;
        Ok(closer)
    }

    /// A lane for one more owner.
    pub(super) fn lane(&self) -> Lane {
        let mut state = self.0.state();
        state.last_number += 1;
        let (number, unclosed) = (state.last_number, Arc::<AtomicUsize>::default());
        let waiting = Waiting { unclosed: Arc::clone(&unclosed), ..Waiting::default() };
        state.lanes.insert(number, waiting);
        Lane(Arc::new(Handle { closer: self.clone(), number, unclosed }))
    }

    fn spawn(&self) -> std::io::Result<()> {
        let shared = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("closer".into()).stack_size(STACK);
        thread.spawn(move || close_each(&shared)).map(drop)
    }
}

impl Lane {
    /// Closes these, some time soon.
    pub(super) fn close(&self, fds: impl IntoIterator<Item = OwnedFd>) {
        let Handle { closer, number, unclosed } = &*self.0;
        let mut guard = closer.0.state();
        let state = &mut *guard;
        let Some(lane) = state.lanes.get_mut(number) else { return };
        let before = lane.files.len();
        lane.files.extend(fds);
        unclosed.fetch_add(lane.files.len() - before, Ordering::Relaxed);
        while lane.claims < LANE_THREADS.min(lane.files.len()) {
            lane.claims += 1;
            state.turns.push_back(*number);
        }
        // A thread for each turn, since each may hang.
        let more = state.turns.len().saturating_sub(state.idle).min(MOST_THREADS - state.threads);
        state.threads += more;
        drop(guard);
        for _ in 0..more {
            // Without it, the threads that are there close it later.
            if closer.spawn().is_err() {
                closer.0.state().threads -= 1;
            }
        }
        closer.0.changed.notify_all();
    }

    /// How many have been handed over and are not closed yet.
    pub(super) fn unclosed(&self) -> usize {
        self.0.unclosed.load(Ordering::Relaxed)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.closer.0.state();
        if let Some(lane) = state.lanes.get_mut(&self.number) {
            lane.orphan = true;
            if lane.claims == 0 {
                state.lanes.remove(&self.number);
            }
        }
    }
}

/// Closes one file a turn; ends when there is nothing left and another thread is idle already.
fn close_each(shared: &Shared) {
    let mut state = shared.state();
    loop {
        while let Some(number) = state.turns.pop_front() {
            let Some(lane) = state.lanes.get_mut(&number) else { continue };
            let (file, unclosed) = (lane.files.pop_front(), Arc::clone(&lane.unclosed));
            if let Some(file) = file {
                drop(state);
                drop(file);
                unclosed.fetch_sub(1, Ordering::Relaxed);
                state = shared.state();
            }
            end_of_turn(&mut state, number);
        }
        if state.idle > 0 {
            state.threads -= 1;
            return;
        }
        state.idle += 1;
        state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.idle -= 1;
    }
}

/// A lane that has more waits for its next turn behind the others.
fn end_of_turn(state: &mut State, number: u64) {
    let Some(lane) = state.lanes.get_mut(&number) else { return };
    if lane.files.is_empty() {
        lane.claims -= 1;
        if lane.claims == 0 && lane.orphan {
            state.lanes.remove(&number);
        }
    } else {
        state.turns.push_back(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_handed_over_gets_closed() {
        let lane = Closer::new().unwrap().lane();
        for _ in 0..100 {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            lane.close([ours.into()]);
            assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn what_an_owner_leaves_behind_gets_closed() {
        let closer = Closer::new().unwrap();
        let mut others = Vec::new();
        for _ in 0..20 {
            let (ours, theirs): (Vec<_>, Vec<_>) =
                (0..10).map(|_| UnixStream::pair().unwrap()).unzip();
            closer.lane().close(ours.into_iter().map(OwnedFd::from));
            others.extend(theirs);
        }
        for mut theirs in others {
            assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        }
        // The thread that closed the last one may not have tidied up yet.
        let lane = closer.lane();
        while closer.0.state().lanes.len() > 1 {
            std::thread::yield_now();
        }
        assert_eq!(lane.unclosed(), 0);
    }

    /// A TCP socket with unsent data, a peer that does not read and SO_LINGER: closing it takes
    /// `seconds`.
    fn lingering(seconds: i32) -> (OwnedFd, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (reader, _) = listener.accept().unwrap();
        sender.set_nonblocking(true).unwrap();
        while std::io::Write::write(&mut &sender, &[0; 1 << 16]).is_ok() {}
        let linger = nix::libc::linger { l_onoff: 1, l_linger: seconds };
        let option = nix::sys::socket::sockopt::Linger;
        nix::sys::socket::setsockopt(&sender.as_fd(), option, &linger).unwrap();
        sender.set_nonblocking(false).unwrap();
        (sender.into(), reader)
    }

    #[test]
    fn closes_that_hang_hold_up_nobody_else() {
        let closer = Closer::new().unwrap();
        let (hostile, other) = (closer.lane(), closer.lane());
        let mut readers = Vec::new();
        for _ in 0..3 * LANE_THREADS {
            let (sender, reader) = lingering(3600);
            hostile.close([sender]);
            readers.push(reader);
        }
        // Some that hang and one that does not, at once.
        let (first, second) = (lingering(3600), lingering(3600));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        other.close([first.0, second.0, ours.into()]);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        assert_eq!(hostile.unclosed(), 3 * LANE_THREADS);
        assert!(closer.0.state().threads <= 2 * LANE_THREADS);
    }
}
