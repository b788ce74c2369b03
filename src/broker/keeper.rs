//! Asking a keeper: one call after the other, with a deadline for whoever waits. A call that has begun
//! comes to its end without being waited for, and what comes of it too late is undone.

use super::error::{keeper_lost, no_answer};
use super::{Broker, Delivery};
use crate::ledger::LeaseId;
use crate::process::keeper::{FAILED, Failed, Failure};
use crate::process::link::{self, Answer, Asking, Call, Lost};
use crate::protocol::Error;
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::future::Future;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::{Mutex, Notify, OwnedMutexGuard, oneshot};
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout_at};

/// A keeper, as far as the broker has to do with it.
#[derive(Debug)]
pub(super) struct KeeperHandle {
    pub(super) name: String,
    /// The link to ask it on; none while there is no way to it.
    link: RefCell<Option<Arc<Mutex<Asking>>>>,
    /// Told when there is a way to it again, or never will be.
    linked: Notify,
    /// There is nothing of it any more.
    is_gone: Cell<bool>,
    /// All that it has is known here, mappings too.
    is_known: Cell<bool>,
    /// Told when a link to it has been lost, so that others are looked for.
    pub(super) broken: Rc<Notify>,
    /// Told when nothing here needs it any more.
    pub(super) over: Rc<Notify>,
    /// The leases of it that are known or were; what is told of these too late is old news.
    seen: RefCell<HashSet<LeaseId>>,
}

impl Drop for KeeperHandle {
    fn drop(&mut self) {
        self.over.notify_one();
    }
}

/// The right to ask a keeper; whoever else wants to waits.
#[derive(Debug)]
pub(super) struct Turn {
    link: OwnedMutexGuard<Asking>,
    broken: Rc<Notify>,
}

/// Why a keeper did not do it.
#[derive(Debug)]
pub(super) enum NotDone {
    /// It says why.
    Failed(Failure),
    /// It is gone, and with it all that it had.
    Lost(Lost),
}

impl KeeperHandle {
    /// One that is new, and has nothing.
    pub(super) fn new(name: String) -> Self {
        let new = Self::found(name);
        new.is_known.set(true);
        new
    }

    /// One from before a restart, which has yet to tell what it has.
    pub(super) fn found(name: String) -> Self {
        Self {
            name,
            link: RefCell::default(),
            linked: Notify::new(),
            is_gone: Cell::default(),
            is_known: Cell::default(),
            broken: Rc::default(),
            over: Rc::default(),
            seen: RefCell::default(),
        }
    }

    /// Notes that a lease of it is known; whether it was before.
    pub(super) fn has_seen(&self, lease: LeaseId) -> bool {
        !self.seen.borrow_mut().insert(lease)
    }

    /// The leases of it that are known or were.
    pub(super) fn seen(&self) -> Vec<LeaseId> {
        self.seen.borrow().iter().copied().collect()
    }

    /// Has it asked on this link from now on; on none where it is lost.
    pub(super) fn set_link(&self, link: Option<Asking>) {
        *self.link.borrow_mut() = link.map(|link| Arc::new(Mutex::new(link)));
        self.linked.notify_waiters();
    }

    /// There is nothing of it any more: nobody waits for a way to it.
    pub(super) fn set_gone(&self) {
        self.is_gone.set(true);
        self.linked.notify_waiters();
    }

    /// It has told all that it has: those who wait to change that can go on.
    pub(super) fn set_known(&self) {
        self.is_known.set(true);
        self.linked.notify_waiters();
    }

    /// Waits for one's turn, however long that takes. `None` where there is no way to it just now.
    pub(super) async fn turn(&self) -> Option<Turn> {
        let link = self.link.borrow().clone()?;
        Some(Turn { link: link.lock_owned().await, broken: Rc::clone(&self.broken) })
    }

    /// The same; after a restart, and after a keeper's death, the way to it may come later, and what it has
    /// is known later still. `None` where there is nothing of it any more.
    pub(super) async fn turn_once_linked(&self) -> Option<Turn> {
        loop {
            let linked = self.linked.notified();
            let may_ask = self.is_known.get() || self.is_gone.get();
            match if may_ask { self.turn().await } else { None } {
                None if !self.is_gone.get() => linked.await,
                turn => return turn,
            }
        }
    }

    /// The same, until then.
    pub(super) async fn turn_until(&self, call: &str, until: Instant) -> Result<Turn, Error> {
        let turn = timeout_at(until, self.turn_once_linked()).await;
        turn.ok().flatten().ok_or_else(|| no_answer(call, &self.name))
    }
}

impl Turn {
    pub(super) async fn ask<C: Call>(
        &mut self,
        call: &C,
        fds: &[BorrowedFd<'_>],
    ) -> Result<C::Reply, NotDone> {
        let done = self.exchange(call, fds).await;
        if let Err(NotDone::Lost(_)) = done {
            // What answers later on this link would be taken for the answer to another call.
            self.broken.notify_one();
        }
        done
    }

    async fn exchange<C: Call>(
        &mut self,
        call: &C,
        fds: &[BorrowedFd<'_>],
    ) -> Result<C::Reply, NotDone> {
        // One that could not begin has said why before it was asked.
        match self.link.send(&link::call(call, false), fds).await {
            Ok(()) | Err(Lost::Closed) => {}
            Err(lost) => return Err(NotDone::Lost(lost)),
        }
        let malformed = |error: serde_json::Error| {
            NotDone::Lost(Lost::Malformed(format!("{}: {error}", C::NAME)))
        };
        match self.link.next_answer().await.map_err(NotDone::Lost)? {
            Answer::Reply(parameters, _) => serde_json::from_str(&parameters).map_err(malformed),
            Answer::Error(name, parameters) if name == FAILED => {
                let Failed { failure } = serde_json::from_str(&parameters).map_err(malformed)?;
                Err(NotDone::Failed(failure))
            }
            Answer::Error(name, _) => Err(NotDone::Lost(Lost::Malformed(name))),
        }
    }
}

impl Broker {
    /// Does `work` to its end, and gives what came of it if that is there in time; else it goes to
    /// `late`.
    pub(super) async fn in_time<T: 'static, Late: Future<Output = ()>>(
        &self,
        (call, object): (&str, &str),
        until: Instant,
        work: impl Future<Output = Result<T, Error>> + 'static,
        late: impl FnOnce(T) -> Late + 'static,
    ) -> Result<T, Error> {
        let (sender, mut receiver) = oneshot::channel();
        spawn_local(async move {
            if let Err(Ok(done)) = sender.send(work.await) {
                late(done).await;
            }
        });
        let mut result = timeout_at(until, &mut receiver).await;
        if result.is_err() {
            // It may have come just now; from here on it can't.
            receiver.close();
            result = receiver.try_recv().map_or(result, |done| Ok(Ok(done)));
        }
        match result {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(keeper_lost(object)),
            Err(_) => Err(no_answer(call, object)),
        }
    }
}

impl From<bool> for Delivery {
    fn from(whole: bool) -> Self {
        if whole { Self::Whole } else { Self::Part }
    }
}
