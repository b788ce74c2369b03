//! Closes open files whose close can block: what peers sent, and sockets that may still hold such
//! files. A FUSE file's close waits for its server, a lingering socket's for its peer; both can be
//! for ever.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// More threads than this are never started: one for each close that hangs.
const MOST_THREADS: usize = 64;

/// The closer threads close one file at a time and use next to no stack.
const STACK: usize = 64 << 10;

/// Hands open files to threads that close them.
#[derive(Clone, Debug)]
pub(super) struct Closer(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<OwnedFd>,
    threads: usize,
    idle: usize,
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

    /// Closes these, some time soon.
    pub(super) fn close(&self, fds: impl IntoIterator<Item = OwnedFd>) {
        let mut state = self.0.state();
        let before = state.waiting.len();
        state.waiting.extend(fds);
        if state.waiting.len() == before {
            return;
        }
        let more = state.waiting.len() > state.idle && state.threads < MOST_THREADS;
        if state.idle == 0 && more {
            state.threads += 1;
            drop(state);
            // Without a further thread the ones that are there close it later.
            if self.spawn().is_err() {
                self.0.state().threads -= 1;
            }
        } else {
            drop(state);
        }
        self.0.changed.notify_one();
    }

    fn spawn(&self) -> std::io::Result<()> {
        let shared = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("closer".into()).stack_size(STACK);
        thread.spawn(move || close_each(&shared)).map(drop)
    }
}

/// Closes one after the other; ends when there is nothing left and another thread is idle already.
fn close_each(shared: &Shared) {
    let mut state = shared.state();
    loop {
        while let Some(fd) = state.waiting.pop_front() {
            drop(state);
            drop(fd);
            state = shared.state();
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_handed_over_gets_closed() {
        let closer = Closer::new().unwrap();
        for _ in 0..100 {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            closer.close([ours.into()]);
            assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
        }
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
    fn a_close_that_hangs_holds_up_no_other() {
        let closer = Closer::new().unwrap();
        let hanging: Vec<_> = (0..4).map(|_| lingering(3600)).collect();
        let mut readers = Vec::new();
        for (sender, reader) in hanging {
            closer.close([sender]);
            readers.push(reader);
        }
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        closer.close([ours.into()]);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }
}
