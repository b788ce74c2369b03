//! Where connections end. What nobody has read goes with a socket, and closing it can take for ever:
//! so a socket that holds anything goes to a porter, which closes each in a thread of its own.
//!
//! One owner has one such porter, for as long as sockets come. It has them as soon as they are sent
//! to it, so that nothing waits here; one that takes no more is ended and replaced.

use super::super::account::Seat;
use super::super::closer::Lane;
use super::errand::{Errand, MOST_STUCK};
use super::{Porter, fdpass};
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

/// How long a porter is kept for sockets that may come, and then has for what it still closes.
const PAUSE: Duration = Duration::from_millis(200);

/// How often is looked whether one that could not be ended has ended.
const STUCK_PAUSE: Duration = Duration::from_secs(1);

/// More sockets than this don't wait for a porter.
const MOST_WAITING: usize = 1024;

/// The end of one owner's connections. Lives on the event loop.
#[derive(Debug)]
pub(in super::super) struct Sink {
    /// Where sockets go for which no porter can be had.
    lane: Lane,
    /// With the places that they keep until they are handed over.
    waiting: RefCell<Vec<(OwnedFd, Option<Seat>)>>,
    runs: Cell<bool>,
    more: Notify,
    stuck: RefCell<Vec<Child>>,
}

impl Sink {
    pub(in super::super) fn new(lane: Lane) -> Rc<Self> {
        Rc::new(Self {
            lane,
            waiting: RefCell::default(),
            runs: Cell::new(false),
            more: Notify::new(),
            stuck: RefCell::default(),
        })
    }

    /// Closes a peer's socket: here if there is nothing in it, else by a porter.
    pub(in super::super) fn close(self: &Rc<Self>, socket: OwnedFd, seat: Option<Seat>) {
        // From here on nothing more gets into its queue.
        let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        if fdpass::peek(socket.as_fd(), &mut [0]).is_ok_and(|next| next.len == 0) {
            return;
        }
        self.waiting.borrow_mut().push((socket, seat));
        self.more.notify_one();
        if !self.runs.replace(true) {
            spawn_local(Rc::clone(self).run());
        }
    }

    async fn run(self: Rc<Self>) {
        let mut porter = None;
        while self.is_wanted().await {
            let fresh = porter.is_none();
            let Some(at_work) = self.porter(porter.take()).await else { continue };
            match self.hand_over(&at_work.socket) {
                Ok(()) => porter = Some(at_work),
                Err(errno) => {
                    // It is full of what does not end, or it was ended.
                    self.end(at_work, Duration::ZERO).await;
                    if fresh && errno != Errno::EAGAIN {
                        self.give_up(0);
                    }
                }
            }
        }
        // What comes from now on starts another.
        self.runs.set(false);
        if let Some(porter) = porter {
            self.end(porter, PAUSE).await;
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

    /// The one that is there, or another; none for now where too many could not be ended.
    async fn porter(&self, there: Option<Porter>) -> Option<Porter> {
        if there.is_some() {
            return there;
        }
        self.stuck.borrow_mut().retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        if self.stuck.borrow().len() >= MOST_STUCK {
            self.give_up(MOST_WAITING);
            sleep(STUCK_PAUSE).await;
            return None;
        }
        match spawn_blocking(|| Porter::start(Errand::Close)).await {
            Ok(Ok(porter)) => Some(porter),
            _ => {
                self.give_up(0);
                None
            }
        }
    }

    /// Sends a porter all that waits; it never waits itself.
    fn hand_over(&self, porter: &OwnedFd) -> Result<(), Errno> {
        let mut waiting = self.waiting.borrow_mut();
        while !waiting.is_empty() {
            let some = waiting.len().min(fdpass::SCM_MAX_FD);
            let sockets: Vec<_> =
                waiting[..some].iter().map(|(socket, _)| socket.as_fd()).collect();
            fdpass::send(porter.as_fd(), b"f", &sockets, MsgFlags::MSG_DONTWAIT)?;
            // It has copies and closes them at the next word, so ours are not the last ones.
            waiting.drain(..some);
            fdpass::send(porter.as_fd(), b"c", &[], MsgFlags::MSG_DONTWAIT)?;
        }
        Ok(())
    }

    /// Has a thread of ours close them, but for the last so many.
    fn give_up(&self, but: usize) {
        let mut waiting = self.waiting.borrow_mut();
        let many = waiting.len().saturating_sub(but);
        self.lane.close(waiting.drain(..many).map(|(socket, _)| socket));
    }

    async fn end(&self, mut porter: Porter, patience: Duration) {
        let _ = shutdown(porter.socket.as_raw_fd(), Shutdown::Write);
        let ended = spawn_blocking(move || {
            let ended = porter.ends_within(patience);
            (!ended).then_some(porter.child)
        });
        if let Ok(Some(stuck)) = ended.await {
            self.stuck.borrow_mut().push(stuck);
        }
    }
}
