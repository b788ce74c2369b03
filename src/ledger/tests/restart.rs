//! Deaths in the plain model: brokers that end and are followed by others, keepers that are killed, and
//! such as say nothing.

use super::model::{Keeps, Model, State, space_key};
use super::*;
use std::collections::BTreeMap;

/// When ledgers are told of leases that were there before.
const LATER: u64 = 9;

/// A lease as its keeper has it.
fn adopted(ledger: &Ledger, lease: &Lease) -> Adopted {
    let groups = ledger.groups_of(lease.id).map(|(id, group)| AdoptedGroup {
        id,
        attached: group.attached,
        members: group.members.clone(),
        unbound: None,
    });
    Adopted {
        lease: lease.id,
        tenant: lease.tenant.clone(),
        vm: lease.vm.clone(),
        uid: lease.uid,
        pid: lease.pid,
        since: lease.since,
        handout: lease.handout,
        space: lease.space.clone(),
        noiommu: lease.noiommu,
        held: lease.phase == Phase::Held,
        at: LATER,
        devices: lease.devices.iter().chain(lease.adding()).copied().collect(),
        groups: groups.collect(),
        is_mapped: !lease.mappings.is_empty(),
    }
}

/// A lease of which only open nodes are left.
fn forgotten(left: &Unproved) -> Adopted {
    Adopted {
        lease: left.lease,
        tenant: left.tenant.clone(),
        vm: left.vm.clone(),
        uid: left.uid,
        pid: left.pid,
        since: left.since,
        handout: Handout::Iommufd,
        space: Space::None,
        noiommu: false,
        held: false,
        at: LATER,
        devices: Vec::new(),
        groups: Vec::new(),
        is_mapped: false,
    }
}

/// What the next ledger knows of what this one knew: everything, but why and since when something is
/// not free.
fn as_adopted(mut ledger: Ledger) -> Ledger {
    for lease in ledger.leases.values_mut().filter(|lease| lease.phase == Phase::Acquiring) {
        lease.devices = lease.adding.take().map_or(Vec::new(), |adding| adding.devices);
        lease.phase = Phase::Ending;
    }
    for group in ledger.groups.values_mut().filter(|group| group.state != GroupState::Held) {
        group.state = GroupState::Reclaiming { since: LATER };
    }
    ledger.unproved.values_mut().for_each(|left| left.since = LATER);
    ledger
}

impl Model {
    /// Another ledger takes over, which is told of each lease as its keeper has it. What is under way
    /// comes to its end with the links; where keepers hang it does not, and what they were to open first
    /// is known as ended.
    pub(super) fn restart(&mut self, hangs: bool) {
        let opens = |model: &Self, lease: &LeaseId| model.holders[lease].state == State::InFlight;
        let ends = |model: &Self| {
            model.pending.iter().position(|pending| !hangs || !opens(model, &pending.lease))
        };
        while let Some(which) = ends(self) {
            self.finish(which, 0);
        }
        for pending in std::mem::take(&mut self.pending) {
            let holder = self.holders.get_mut(&pending.lease).unwrap();
            (holder.state, holder.devices) = (State::Dead, pending.devices);
        }
        while self.mapped.values().flatten().any(|m| m.in_flight.is_some()) {
            self.settle(0, true);
        }
        let old = std::mem::take(&mut self.ledger);
        let mut all: BTreeMap<LeaseId, Adopted> =
            old.leases.values().map(|lease| (lease.id, adopted(&old, lease))).collect();
        for (id, left) in &old.unproved {
            let group = AdoptedGroup {
                id: *id,
                attached: false,
                members: left.members.clone(),
                unbound: Some(left.left.clone()),
            };
            all.entry(left.lease).or_insert_with(|| forgotten(left)).groups.push(group);
        }
        for (lease, adopted) in all {
            self.report(Request::Adopt(adopted));
            let mappings = old.leases.get(&lease).map(|lease| lease.mappings.iter());
            let mappings = mappings.into_iter().flatten().map(|(at, m)| (*at, m.size));
            self.apply(Request::Mapped { lease, mappings: mappings.collect() });
        }
        let expected = as_adopted(old);
        assert_eq!(self.ledger, expected);
        self.forget();
    }
    /// A keeper is killed, and another one takes over what it had. Its calls have failed, its leases have
    /// ended, and the kernel has undone what they had mapped and attached.
    pub(super) fn keeper_dies(&mut self, which: usize, keeps: Keeps) {
        let all: Vec<_> = self.holders.keys().copied().collect();
        let Some(one) = all.get(which) else { return };
        let key = space_key(*one, &self.holders[one].space);
        let is_its = |id: &LeaseId, model: &Self| {
            model.holders.get(id).is_some_and(|holder| space_key(*id, &holder.space) == key)
        };
        while let Some(at) = self.pending.iter().position(|p| is_its(&p.lease, self)) {
            self.finish(at, 0);
        }
        let going = |model: &Self| {
            let mut going = model.mapped.values().flatten().filter(|m| m.in_flight.is_some());
            going.position(|m| is_its(&m.lease, model))
        };
        while let Some(at) = going(self) {
            self.settle(at, false);
        }
        for lease in all.into_iter().filter(|id| is_its(id, self)).collect::<Vec<_>>() {
            if self.holders[&lease].state == State::Live {
                self.end_lease(lease, keeps);
            }
        }
        self.mapped.remove(&key);
        for lease in self.holders.keys().copied().filter(|id| is_its(id, self)).collect::<Vec<_>>()
        {
            self.report(Request::NothingMapped { lease });
        }
        let attached = self.attached.iter().filter(|(_, space)| **space == key);
        for group in attached.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.detach(group);
            self.report(Request::Detached { group });
        }
        self.forget();
    }

    /// Of an ended lease's groups nothing has been told in time.
    pub(super) fn is_silent(&mut self, which: usize) {
        let Some(lease) = self.dead(which) else { return };
        let groups = self.ledger.groups_of(lease);
        let open = groups.filter(|(_, g)| matches!(g.state, GroupState::Reclaiming { .. }));
        for group in open.map(|(id, _)| id).collect::<Vec<_>>() {
            let why = NotFree::Unanswered { object: "lease".into() };
            self.report(Request::Stuck { group, why, at: 1 });
        }
    }
}
