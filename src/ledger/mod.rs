//! Who has what: leases, groups, address spaces, mappings, and the rules of sharing them.
//!
//! A state machine with no I/O, no clock, no open file and no randomness. The broker applies a
//! [`Request`], carries out the [`Effect`]s it gets back on a kernel, and reports how that went with
//! further requests. What is asked for counts as taken from the moment it is asked for, so nobody
//! else can get it meanwhile; what fails is reported as undone and leaves no trace.
//!
//! A request that is refused changes nothing.

mod acquire;
mod adopt;
mod lease;
mod mapping;
mod reclaim;
mod refusal;
mod request;
mod unproved;

pub use lease::{
    Group, GroupState, Handed, Lease, LeaseId, Mapping, Member, NotALeaseId, NotFree, Phase, Space,
    Trust,
};
pub use refusal::{Bad, Conflict, IovaRange, Reclaimed, Refusal};
pub use request::{Acquire, Adopted, AdoptedGroup, Effect, Extend, Quota, Request, WantedGroup};
pub use unproved::Unproved;

use std::collections::BTreeMap;
use std::ops::Bound;

#[cfg(test)]
mod tests;

/// Everything that is held, is being acquired, or is not known to be free again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ledger {
    leases: BTreeMap<LeaseId, Lease>,
    groups: BTreeMap<u32, Group>,
    unproved: BTreeMap<u32, Unproved>,
}

impl Ledger {
    /// Applies one request; returns what is to be carried out, in order.
    ///
    /// # Errors
    /// A [`Refusal`]; the ledger is then as it was.
    pub fn apply(&mut self, request: Request) -> Result<Vec<Effect>, Refusal> {
        match request {
            Request::Acquire(acquire) => self.acquire(acquire),
            Request::Extend(extend) => self.extend(extend),
            Request::Commit { lease } => self.commit(lease),
            Request::Abort { lease } => self.abort(lease),
            Request::Map { lease, iova, size, quota } => self.map(lease, iova, size, quota),
            Request::MapDone { lease, iova, made } => self.map_done(lease, iova, made),
            Request::Unmap { lease, iova, size } => self.unmap(lease, iova, size),
            Request::UnmapDone { lease, iova, gone } => self.unmap_done(lease, iova, gone),
            Request::End { lease, at } => self.end(lease, at),
            Request::Adopt(adopted) => self.adopt(adopted),
            Request::Mapped { lease, mappings } => self.mapped(lease, mappings),
            Request::Rename { lease, tenant } => self.rename(lease, &tenant),
            Request::NothingMapped { lease } => self.nothing_mapped(lease),
            Request::Retract { lease, devices, groups } => self.retract(lease, &devices, &groups),
            Request::Detached { group } => self.detached(group),
            Request::Freed { group } => self.freed(group),
            Request::Unbound { group, at, left } => self.unbound(group, at, left),
            Request::Proved { group, device, registration } => {
                self.proved(group, device, registration)
            }
            Request::Stuck { group, why, at } => self.stuck(group, why, at),
        }
    }

    /// Every lease, ended ones that are not reclaimed yet among them.
    pub fn leases(&self) -> impl ExactSizeIterator<Item = &Lease> {
        self.leases.values()
    }

    /// The leases behind this one, in the order of their names; without one, all.
    pub fn leases_after(&self, id: Option<LeaseId>) -> impl Iterator<Item = &Lease> {
        let from = id.map_or(Bound::Unbounded, Bound::Excluded);
        self.leases.range((from, Bound::Unbounded)).map(|(_, lease)| lease)
    }

    /// A lease that can be used: granted, and not ended.
    pub fn live(&self, id: LeaseId) -> Option<&Lease> {
        self.leases.get(&id).filter(|lease| lease.phase == Phase::Held)
    }

    /// A lease in any phase.
    pub fn lease(&self, id: LeaseId) -> Option<&Lease> {
        self.leases.get(&id)
    }

    /// What is known of a group; `None` where it is free.
    pub fn group(&self, id: u32) -> Option<&Group> {
        self.groups.get(&id)
    }

    /// Every group that is not free, with its number.
    pub fn groups(&self) -> impl Iterator<Item = (u32, &Group)> {
        self.groups.iter().map(|(id, group)| (*id, group))
    }

    /// The groups of a lease.
    pub fn groups_of(&self, id: LeaseId) -> impl Iterator<Item = (u32, &Group)> {
        self.groups().filter(move |(_, group)| group.lease == id)
    }

    /// Leases that share an address space with `lease`, itself among them.
    fn members<'a>(&'a self, lease: &'a Lease) -> impl Iterator<Item = &'a Lease> {
        self.leases.values().filter(move |other| {
            other.id == lease.id
                || matches!(
                    (&other.space, &lease.space),
                    (Space::Shared { name: a, .. }, Space::Shared { name: b, .. }) if a == b
                )
        })
    }

    fn live_mut(&mut self, id: LeaseId) -> Result<&mut Lease, Refusal> {
        self.leases
            .get_mut(&id)
            .filter(|lease| lease.phase == Phase::Held)
            .ok_or(Refusal::NoSuchLease(id))
    }

    fn any_mut(&mut self, id: LeaseId) -> Result<&mut Lease, Refusal> {
        self.leases.get_mut(&id).ok_or(Refusal::NoSuchLease(id))
    }
}
