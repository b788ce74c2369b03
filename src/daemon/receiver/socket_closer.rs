//! Where connections end. What nobody has read goes with a socket, and closing it can take for ever:
//! so a socket that holds anything goes to a receiver, which closes each in a thread of its own.
//!
//! One owner has one such receiver, for as long as sockets come. It has them as soon as they are sent
//! to it, so that nothing waits here; one that takes no more is ended and replaced. Of those that
//! can't be ended an owner has a few, and the last one is kept, to hold what comes. None of this is
//! ever closed here: rather than that, nobody is let in.

use super::super::account::ConnectionCharge;
use super::role::Role;
use super::{Helper, MOST_UNKILLABLE, fdpass};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, shutdown};
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Child;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::{spawn_blocking, spawn_local};
use tokio::time::{sleep, timeout};

/// How long a receiver is kept for sockets that may come, and then has for what it still closes.
const PAUSE: Duration = Duration::from_millis(200);

/// How long after that is tried again what could not be.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// While more sockets than this wait for receivers, nobody is let in.
const MOST_WAITING: usize = 1024;

/// The sockets of all owners that wait.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Waiting(Rc<Cell<usize>>);

impl Waiting {
    /// Whether no more should come.
    pub(in super::super) fn are_too_many(&self) -> bool {
        self.0.get() >= MOST_WAITING
    }
}

/// The end of one owner's connections. Lives on the event loop.
#[derive(Debug)]
pub(in super::super) struct SocketCloser {
    of_all: Waiting,
    /// With the places that they keep until they are handed over.
    waiting: RefCell<Vec<(OwnedFd, Option<ConnectionCharge>)>>,
    runs: Cell<bool>,
    more: Notify,
    unkillable: RefCell<Vec<Child>>,
    /// The last one, with what it may not be able to close.
    kept: RefCell<Option<Helper>>,
}

impl SocketCloser {
    pub(in super::super) fn new(of_all: Waiting) -> Rc<Self> {
        Rc::new(Self {
            of_all,
            waiting: RefCell::default(),
            runs: Cell::new(false),
            more: Notify::new(),
            unkillable: RefCell::default(),
            kept: RefCell::default(),
        })
    }

    /// Closes a peer's socket: here if no file is in it, else by a receiver.
    pub(in super::super) fn close(
        self: &Rc<Self>,
        socket: OwnedFd,
        charge: Option<ConnectionCharge>,
    ) {
        // From here on nothing more gets into its queue.
        let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        if is_emptied(&socket) {
            return;
        }
        self.of_all.0.update(|count| count + 1);
        self.waiting.borrow_mut().push((socket, charge));
        self.more.notify_one();
        if !self.runs.replace(true) {
            spawn_local(Rc::clone(self).run());
        }
    }

    async fn run(self: Rc<Self>) {
        let mut receiver = self.kept.take();
        while self.is_wanted().await {
            let fresh = receiver.is_none();
            let Some(at_work) = self.receiver(receiver.take()).await else { continue };
            match self.hand_over(&at_work.socket) {
                Ok(()) => receiver = Some(at_work),
                Err(errno) => {
                    // It is full of what does not end, or it was ended.
                    self.end(at_work, Duration::ZERO).await;
                    if fresh && errno != Errno::EAGAIN {
                        sleep(RETRY_PAUSE).await;
                    }
                }
            }
        }
        // What comes from now on starts another.
        self.runs.set(false);
        match receiver {
            Some(last) if self.still_unkillable() + 1 >= MOST_UNKILLABLE => {
                self.kept.replace(Some(last));
            }
            Some(receiver) => self.end(receiver, PAUSE).await,
            None => {}
        }
    }

    /// Waits until there is something to close; false when nothing comes.
    async fn is_wanted(&self) -> bool {
        while self.waiting.borrow().is_empty() {
            if timeout(PAUSE, self.more.notified()).await.is_err() {
                return !self.waiting.borrow().is_empty();
            }
        }
        true
    }

    /// The one that is there, or another; none for now where none can be had.
    async fn receiver(&self, there: Option<Helper>) -> Option<Helper> {
        if there.is_some() {
            return there;
        }
        if self.still_unkillable() < MOST_UNKILLABLE
            && let Ok(Ok(receiver)) = spawn_blocking(|| Helper::start(Role::Close)).await
        {
            return Some(receiver);
        }
        sleep(RETRY_PAUSE).await;
        None
    }

    fn still_unkillable(&self) -> usize {
        let mut unkillable = self.unkillable.borrow_mut();
        unkillable.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        unkillable.len()
    }

    /// Sends a receiver all that waits; it never waits itself.
    fn hand_over(&self, receiver: &OwnedFd) -> Result<(), Errno> {
        let mut waiting = self.waiting.borrow_mut();
        while !waiting.is_empty() {
            let some = waiting.len().min(fdpass::SCM_MAX_FD);
            let sockets: Vec<_> =
                waiting[..some].iter().map(|(socket, _)| socket.as_fd()).collect();
            fdpass::send(receiver.as_fd(), b"f", &sockets, MsgFlags::MSG_DONTWAIT)?;
            // It has copies and closes them at the next word, so ours are not the last ones.
            waiting.drain(..some);
            self.of_all.0.update(|count| count - some);
            fdpass::send(receiver.as_fd(), b"c", &[], MsgFlags::MSG_DONTWAIT)?;
        }
        Ok(())
    }

    async fn end(&self, mut receiver: Helper, patience: Duration) {
        let _ = shutdown(receiver.socket.as_raw_fd(), Shutdown::Write);
        let ended = spawn_blocking(move || {
            let ended = receiver.ends_within(patience);
            (!ended).then_some(receiver.child)
        });
        if let Ok(Some(unkillable)) = ended.await {
            self.unkillable.borrow_mut().push(unkillable);
        }
    }
}

/// Reads what no files come with, so that most sockets need no receiver. False where there is more. It
/// is not much: what one peer could send before nobody read it.
fn is_emptied(socket: &OwnedFd) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match fdpass::peek(socket.as_fd(), &mut buffer) {
            Ok(next) if next.len == 0 => return true,
            Ok(next) if !next.fds => {
                let bytes = &mut buffer[..next.len];
                if fdpass::receive(socket.as_fd(), bytes, 0, MsgFlags::MSG_DONTWAIT).is_err() {
                    return false;
                }
            }
            _ => return false,
        }
    }
}
