//! The closer threads: they close guests' memory, whose pages are freed by that, which can take long.
//! Peers' sockets are closed by processes ([`super::receiver`]).
//!
//! Every owner has a close queue of its own. Its files wait for each other and for no other owner's;
//! however many of them hang, they hold up at most [`QUEUE_THREADS`] threads.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The most threads that one close queue can hold up.
const QUEUE_THREADS: usize = 4;

/// More threads than this are never started, for all queues together.
const MOST_THREADS: usize = 1024;

/// The closer threads close one file at a time and use next to no stack.
const STACK: usize = 64 << 10;

/// Threads that close files, and the queues they serve in turn.
#[derive(Clone, Debug)]
pub(super) struct Closer(Arc<Shared>);

/// One owner's files to be closed.
#[derive(Clone, Debug)]
pub(super) struct CloseQueue(Arc<Handle>);

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
    queues: HashMap<u64, Waiting>,
    last_number: u64,
    /// Queues with work, once for each further thread that they may take up.
    turns: VecDeque<u64>,
    threads: usize,
    idle: usize,
}

/// The files of a queue.
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

    /// A queue for one more owner.
    pub(super) fn queue(&self) -> CloseQueue {
        let mut state = self.0.state();
        state.last_number += 1;
        let (number, unclosed) = (state.last_number, Arc::<AtomicUsize>::default());
        let waiting = Waiting { unclosed: Arc::clone(&unclosed), ..Waiting::default() };
        state.queues.insert(number, waiting);
        CloseQueue(Arc::new(Handle { closer: self.clone(), number, unclosed }))
    }

    fn spawn(&self) -> std::io::Result<()> {
        let shared = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("closer".into()).stack_size(STACK);
        thread.spawn(move || close_each(&shared)).map(drop)
    }
}

impl CloseQueue {
    /// Closes these, some time soon.
    pub(super) fn close(&self, fds: impl IntoIterator<Item = OwnedFd>) {
        let Handle { closer, number, unclosed } = &*self.0;
        let mut guard = closer.0.state();
        let state = &mut *guard;
        let Some(queue) = state.queues.get_mut(number) else { return };
        let before = queue.files.len();
        queue.files.extend(fds);
        unclosed.fetch_add(queue.files.len() - before, Ordering::Relaxed);
        while queue.claims < QUEUE_THREADS.min(queue.files.len()) {
            queue.claims += 1;
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
        if let Some(queue) = state.queues.get_mut(&self.number) {
            queue.orphan = true;
            if queue.claims == 0 {
                state.queues.remove(&self.number);
            }
        }
    }
}

/// Closes one file a turn; ends when there is nothing left and another thread is idle already.
fn close_each(shared: &Shared) {
    let mut state = shared.state();
    loop {
        while let Some(number) = state.turns.pop_front() {
            let Some(queue) = state.queues.get_mut(&number) else { continue };
            let (file, unclosed) = (queue.files.pop_front(), Arc::clone(&queue.unclosed));
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

/// A queue that has more waits for its next turn behind the others.
fn end_of_turn(state: &mut State, number: u64) {
    let Some(queue) = state.queues.get_mut(&number) else { return };
    if queue.files.is_empty() {
        queue.claims -= 1;
        if queue.claims == 0 && queue.orphan {
            state.queues.remove(&number);
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
        let queue = Closer::new().unwrap().queue();
        for _ in 0..100 {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            queue.close([ours.into()]);
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
            closer.queue().close(ours.into_iter().map(OwnedFd::from));
            others.extend(theirs);
        }
        for mut theirs in others {
            assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        }
        // The thread that closed the last one may not have tidied up yet.
        let queue = closer.queue();
        while closer.0.state().queues.len() > 1 {
            std::thread::yield_now();
        }
        assert_eq!(queue.unclosed(), 0);
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
        let (hostile, other) = (closer.queue(), closer.queue());
        let mut readers = Vec::new();
        for _ in 0..3 * QUEUE_THREADS {
            let (sender, reader) = lingering(3600);
            hostile.close([sender]);
            readers.push(reader);
        }
        // Some that hang and one that does not, at once.
        let (first, second) = (lingering(3600), lingering(3600));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        other.close([first.0, second.0, ours.into()]);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        assert_eq!(hostile.unclosed(), 3 * QUEUE_THREADS);
        assert!(closer.0.state().threads <= 2 * QUEUE_THREADS);
    }
}
