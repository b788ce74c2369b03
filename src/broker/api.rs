//! What the broker takes from and gives to the daemon.

use crate::policy::Peer;
use crate::process::keeper::Saved;
use crate::protocol::Event;
use std::os::fd::OwnedFd;

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

/// The processes that have address spaces open. None of these calls waits for one of them.
pub trait Keepers {
    /// Starts one under a name of its own; returns the link to ask it on, and the one to watch it on.
    ///
    /// # Errors
    /// What the start says: EAGAIN no more processes, EMFILE no more files.
    fn start(&self, name: &str) -> std::io::Result<[OwnedFd; 2]>;

    /// Two new links to one that is there. That they are made proves no life.
    ///
    /// # Errors
    /// ENOENT, ECONNREFUSED where nobody listens.
    fn connect(&self, name: &str) -> std::io::Result<[OwnedFd; 2]>;

    /// Whether one of this name has something to be known, living or dead.
    fn exists(&self, name: &str) -> bool;

    /// The names of all that are there.
    ///
    /// # Errors
    /// What reading their directory says.
    fn names(&self) -> std::io::Result<Vec<String>>;

    /// What one has written down last, where that can be read.
    fn saved(&self, name: &str) -> Option<Saved>;

    /// Whether its process has its files still, whatever state it is in.
    fn has_files(&self, name: &str) -> bool;

    /// Starts one that takes back what a dead one of this name has left.
    ///
    /// # Errors
    /// What the start says.
    fn salvage(&self, name: &str) -> std::io::Result<()>;

    /// The names of all that are there, each with what it last wrote down; what can't be relied on
    /// with the reason.
    ///
    /// # Errors
    /// What reading their directory says.
    fn all(&self) -> std::io::Result<Vec<(String, Result<Saved, String>)>>;
}
