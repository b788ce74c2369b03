//! What the broker takes from and gives to the daemon.

use crate::policy::Peer;
use crate::process::holders::{Report, Search};
use crate::process::kept::KeptKeeper;
use crate::process::launcher::Standing;
use crate::protocol::Event;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;

/// Who calls: what the kernel says of the peer, never what it says of itself.
#[derive(Clone, Debug)]
pub struct Caller {
    /// From SO_PEERCRED and its kin.
    pub peer: Peer,
}

/// What became of a reply that a keeper sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a connection that was sent half a reply is of no more use"]
pub enum Delivery {
    /// All of it went.
    Whole,
    /// Its first part did, with the open files.
    Part,
}

/// What the broker tells the daemon. It must not call the broker.
pub trait Observer {
    /// Something happened to a lease, for Watch. Who may know is what
    /// [`Broker::may_see`](super::Broker::may_see) says.
    fn event(&self, event: &Event);
}

impl Observer for () {
    fn event(&self, _: &Event) {}
}

/// An answer of the launcher's, which is waited for.
pub type Waiting<'a, T> = Pin<Box<dyn Future<Output = std::io::Result<T>> + 'a>>;

/// The processes that have address spaces open. None of these calls waits for one of them.
pub trait Keepers {
    /// Starts one under a name of its own; returns the link to ask it on, and the one to watch it on.
    ///
    /// # Errors
    /// What the start says: EAGAIN no more processes, EMFILE no more files.
    fn start<'a>(&'a self, name: &'a str) -> Waiting<'a, [OwnedFd; 2]>;

    /// How one is, and two new links to it where one that is alive takes them.
    ///
    /// # Errors
    /// It can't be told.
    fn find<'a>(&'a self, name: &'a str) -> Waiting<'a, (Standing, Option<[OwnedFd; 2]>)>;

    /// Starts one that takes back what a dead one of this name has left.
    ///
    /// # Errors
    /// What the start says.
    fn salvage<'a>(&'a self, name: &'a str) -> Waiting<'a, ()>;

    /// What some of them last wrote down, those behind this name in the order of names; none at the end.
    ///
    /// # Errors
    /// It can't be told.
    fn kept<'a>(&'a self, after: &'a str) -> Waiting<'a, Vec<KeptKeeper>>;

    /// Looks for processes that have something open, for a few seconds at most.
    ///
    /// # Errors
    /// What starting a process for it says, or that it has not answered.
    fn look<'a>(&'a self, search: &'a Search) -> Waiting<'a, Report>;
}
