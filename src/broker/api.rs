//! What the broker takes from and gives to the daemon.

use crate::kernel::{Container, Group, Kernel};
use crate::policy::Peer;
use crate::protocol::{Acquired, Event};
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Who calls: what the kernel says of the peer, never what it says of itself.
#[derive(Clone, Debug)]
pub struct Caller {
    /// From SO_PEERCRED and its kin.
    pub peer: Peer,
}

/// What an Acquire gave.
#[derive(Debug)]
pub struct Grant {
    /// The reply; its `fds` describe the open files beside it.
    pub reply: Acquired,
    /// The open files, in the reply's order. The lease's lifeline is among them: a grant that
    /// can't be delivered is undone by dropping it.
    pub fds: Vec<OwnedFd>,
}

/// An open file to be sent: the broker's own one, which it goes on keeping, or one made for this.
#[derive(Debug)]
pub enum SentFd {
    /// What the groups of the lease are attached to.
    Container(Arc<Container>),
    /// A group of the lease.
    Group(Arc<Group>),
    /// One made for this: a copy, or a lease pipe's read end.
    Made(OwnedFd),
}

impl AsFd for SentFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Container(container) => container.as_fd(),
            Self::Group(group) => group.as_fd(),
            Self::Made(fd) => fd.as_fd(),
        }
    }
}

impl From<OwnedFd> for SentFd {
    fn from(fd: OwnedFd) -> Self {
        Self::Made(fd)
    }
}

/// One lease pipe. A lease can have several; it ends when all have hung up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LifelineId(pub(crate) u64);

/// A lease whose last lifeline hung up: its devices are to be reclaimed.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "give it to Broker::reclaim on a worker"]
pub struct Ended(pub(crate) crate::ledger::LeaseId);

/// What the broker tells the daemon, on the thread that made the call. It must not block and must
/// not call the broker, which may hold the lease's lock.
pub trait Observer: Send + Sync {
    /// A lease pipe has been made: watch this write end for EPOLLERR, then call
    /// [`Broker::hung_up`](super::Broker::hung_up).
    ///
    /// # Errors
    /// It can't be watched, so the lease must not come about.
    fn lifeline_opened(&self, id: LifelineId, write_end: Arc<OwnedFd>) -> Result<(), Errno>;

    /// The broker is done with it. The holder sees the end of the lease only when the observer has
    /// dropped its reference to the write end, so it does that at once.
    fn lifeline_closed(&self, id: LifelineId);

    /// Something happened to a lease, for Watch. Who may know is what
    /// [`Broker::may_see`](super::Broker::may_see) says.
    fn event(&self, event: &Event);
}

/// Gives each lease a kernel for what its holder can have open too: a container that it was given, and
/// its groups.
///
/// A holder can keep a call on these from ever returning, and nothing can interrupt it. A kernel of
/// this kind makes the calls where that holds up nobody. It answers with ETIMEDOUT where one takes too
/// long, and to all that follow until that one has come to its end.
pub trait Contested: Send + Sync {
    /// The kernel of one more lease.
    fn kernel(&self) -> Arc<dyn Kernel>;
}

/// An observer that takes no interest; leases then end by Release alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Observer for Nobody {
    fn lifeline_opened(&self, _: LifelineId, _: Arc<OwnedFd>) -> Result<(), Errno> {
        Ok(())
    }
    fn lifeline_closed(&self, _: LifelineId) {}
    fn event(&self, _: &Event) {}
}
