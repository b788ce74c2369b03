//! Carries the ledger's decisions out on a kernel and puts back what failed half way. The only
//! writer of the ledger.

mod api;

pub use api::{Caller, Ended, Grant, LifelineId, Nobody, Observer};

use crate::kernel::Kernel;
use crate::policy::Policy;
use crate::protocol::{
    Acquire, Empty, Error, Fds, GetFds, Groups, LeaseList, MapDma, Release, Released, UnmapDma,
    Unmapped,
};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The broker. Every call may block in the kernel unless it says otherwise.
pub struct Broker {
    kernel: Arc<dyn Kernel>,
    policy: Arc<Policy>,
    observer: Arc<dyn Observer>,
}

fn not_yet(what: &str) -> Error {
    Error::Unsupported { what: what.into(), why: "this broker can't do it yet".into() }
}

impl Broker {
    /// A broker with no leases.
    pub fn new(
        kernel: Arc<dyn Kernel>,
        policy: Arc<Policy>,
        observer: Arc<dyn Observer>,
    ) -> Arc<Self> {
        Arc::new(Self { kernel, policy, observer })
    }

    /// The policy it goes by.
    pub fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// The kernel it works on.
    pub fn kernel(&self) -> &Arc<dyn Kernel> {
        &self.kernel
    }

    /// Gives devices to a new lease, or adds them to one; all or nothing.
    pub fn acquire(&self, _caller: &Caller, _request: &Acquire) -> Result<Grant, Error> {
        let _ = &self.observer;
        Err(not_yet("Acquire"))
    }

    /// The open files of a lease once more, and a further lifeline.
    pub fn get_fds(
        &self,
        _caller: &Caller,
        _request: &GetFds,
    ) -> Result<(Fds, Vec<OwnedFd>), Error> {
        Err(not_yet("GetFds"))
    }

    /// As [`get_fds`](Self::get_fds) where that takes no kernel call that can block, else `None`:
    /// then call that on a worker. Never blocks.
    pub fn try_get_fds(
        &self,
        _caller: &Caller,
        _request: &GetFds,
    ) -> Option<Result<(Fds, Vec<OwnedFd>), Error>> {
        None
    }

    /// Ends a lease and reclaims its devices.
    pub fn release(&self, _caller: &Caller, _request: &Release) -> Result<Released, Error> {
        Err(not_yet("Release"))
    }

    /// Maps memory for a lease. Closes `memory`, which can block too.
    pub fn map_dma(
        &self,
        _caller: &Caller,
        _request: &MapDma,
        _memory: OwnedFd,
    ) -> Result<Empty, Error> {
        Err(not_yet("MapDma"))
    }

    /// Takes a lease's mappings back.
    pub fn unmap_dma(&self, _caller: &Caller, _request: &UnmapDma) -> Result<Unmapped, Error> {
        Err(not_yet("UnmapDma"))
    }

    /// The leases the caller may see. Never blocks.
    pub fn leases(&self, _caller: &Caller) -> Result<LeaseList, Error> {
        Err(not_yet("Leases"))
    }

    /// The groups the caller may see; reads sysfs.
    pub fn topology(&self, _caller: &Caller) -> Result<Groups, Error> {
        Err(not_yet("Topology"))
    }

    /// Whether the caller may see what leases of `tenant` do. Never blocks.
    pub fn may_see(&self, _caller: &Caller, _tenant: &str) -> bool {
        false
    }

    /// A lifeline reported EPOLLERR. Never blocks; where it was the lease's last one, the lease has
    /// ended and [`reclaim`](Self::reclaim) is to be called on a worker. Checks for itself that the
    /// pipe has hung up, so calling it once too often does no harm.
    pub fn hung_up(&self, _lifeline: LifelineId) -> Option<Ended> {
        None
    }

    /// Takes back what an ended lease had.
    pub fn reclaim(&self, _ended: Ended) {}

    /// Whether some group waits for its last holder to let go. Never blocks.
    pub fn has_pending_reclaims(&self) -> bool {
        false
    }

    /// Tries once more to reclaim what could not be reclaimed yet.
    pub fn retry_reclaims(&self) {}
}
