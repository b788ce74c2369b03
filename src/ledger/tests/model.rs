//! The plain model: maps of who has what, and a toy kernel that the ledger's effects are carried
//! out on.

use super::*;
use std::collections::{BTreeMap, BTreeSet};

/// Groups 0 to 5 have two devices each, group 6 has one. Group 1's first device is a VF of group 0's;
/// group 5 has no IOMMU.
pub(super) const GROUPS: u32 = 7;

pub(super) const QUOTA: Quota = Quota { leases: 3, devices: 6, mappings: 4, mapped_bytes: 8 << 12 };

/// What somebody who is gone left open in another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Keeps {
    Nothing,
    Device,
    Group,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum State {
    InFlight,
    Live,
    Dead,
}

#[derive(Clone, Debug, Hash)]
pub(super) struct Holder {
    pub(super) tenant: u8,
    pub(super) handout: Handout,
    pub(super) space: Space,
    pub(super) noiommu: bool,
    pub(super) state: State,
    pub(super) devices: BTreeMap<Bdf, u32>,
    /// What was handed out by its own node, with the registration of that time.
    pub(super) cdevs: BTreeMap<Bdf, u64>,
}

/// An acquisition that the kernel has carried out and the ledger has not heard of.
#[derive(Clone, Debug, Hash)]
pub(super) struct Pending {
    pub(super) lease: LeaseId,
    pub(super) opened: Vec<u32>,
    pub(super) devices: BTreeMap<Bdf, u32>,
    pub(super) cdevs: BTreeMap<Bdf, u64>,
}

/// One mapping in the toy kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Mapped {
    pub(super) iova: u64,
    pub(super) size: u64,
    pub(super) lease: LeaseId,
    pub(super) by_broker: bool,
    pub(super) in_flight: Option<Going>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Going {
    In,
    Out,
}

#[derive(Clone, Hash)]
pub(super) struct Model {
    pub(super) ledger: Ledger,
    pub(super) quota: Quota,
    pub(super) holders: BTreeMap<LeaseId, Holder>,
    pub(super) pending: Vec<Pending>,
    /// Who has which group, or had it and is not known to have let go.
    pub(super) owner: BTreeMap<u32, LeaseId>,
    /// The toy kernel: which groups are open, in which address space, what is mapped there, and
    /// what strangers keep.
    pub(super) open: BTreeSet<u32>,
    pub(super) attached: BTreeMap<u32, String>,
    pub(super) mapped: BTreeMap<String, Vec<Mapped>>,
    pub(super) kept: BTreeMap<u32, Keeps>,
    /// Whose devices somebody has open by their own nodes, unbound, where nothing shows it.
    pub(super) stale: BTreeMap<u32, u8>,
    /// How often each group's devices were bound to their driver anew.
    pub(super) registrations: BTreeMap<u32, u64>,
    /// Groups that are for one tenant alone, with what somebody may have open.
    pub(super) unproved: BTreeMap<u32, (u8, BTreeMap<Bdf, u64>)>,
}

pub(super) fn bdf(group: u32, device: u8) -> Bdf {
    Bdf { segment: 0, bus: group as u8, device: 0, function: device }
}

fn wanted_group((id, used, withheld): &(u32, u8, u8)) -> WantedGroup {
    let count = if *id == 6 { 1 } else { 2 };
    let those = |bits: u8| (0..count).filter(|n| bits & 1 << n != 0).map(|n| bdf(*id, n)).collect();
    let physfn = |n| (*id == 1 && n == 0).then(|| bdf(0, 0));
    let members = (0..count).map(|n| Member { bdf: bdf(*id, n), physfn: physfn(n) }).collect();
    let (devices, withhold) = (those(*used), those(*withheld));
    WantedGroup { id: *id, noiommu: *id == 5, members, devices, withhold }
}

fn merged(wanted: &[(u32, u8, u8)]) -> Vec<WantedGroup> {
    let mut groups = BTreeMap::new();
    for one in wanted {
        groups.entry(one.0).or_insert_with(|| wanted_group(one));
    }
    groups.into_values().collect()
}

pub(super) fn space_key(id: LeaseId, space: &Space) -> String {
    match space {
        Space::Shared { name, .. } => name.clone(),
        _ => id.to_string(),
    }
}

impl Default for Model {
    fn default() -> Self {
        Self::new(QUOTA)
    }
}

impl Model {
    pub(super) fn new(quota: Quota) -> Self {
        Self {
            ledger: Ledger::default(),
            quota,
            holders: BTreeMap::new(),
            pending: Vec::new(),
            owner: BTreeMap::new(),
            open: BTreeSet::new(),
            attached: BTreeMap::new(),
            mapped: BTreeMap::new(),
            kept: BTreeMap::new(),
            stale: BTreeMap::new(),
            registrations: BTreeMap::new(),
            unproved: BTreeMap::new(),
        }
    }

    /// The lowest name of a lease that nobody knows any more: what has been and is over leaves no trace.
    fn unused_name(&self) -> LeaseId {
        let known = |id: &LeaseId| {
            self.holders.contains_key(id)
                || self.ledger.unproved().any(|(_, left)| left.lease == *id)
        };
        (1..).map(LeaseId).find(|id| !known(id)).unwrap()
    }

    pub(super) fn live(&self, which: usize) -> Option<LeaseId> {
        let live = self.holders.iter().filter(|(_, holder)| holder.state == State::Live);
        let live: Vec<_> = live.map(|(id, _)| *id).collect();
        (!live.is_empty()).then(|| live[which % live.len()])
    }

    /// Applies a request that may be refused; what is refused must change nothing.
    pub(super) fn apply(&mut self, request: Request) -> Option<Vec<Effect>> {
        let before = self.ledger.clone();
        let done = self.ledger.apply(request.clone());
        match done {
            Ok(effects) => Some(effects),
            Err(refusal) => {
                assert_eq!(self.ledger, before, "{request:?} was refused ({refusal}) and changed");
                None
            }
        }
    }

    /// Applies a report, which is never refused.
    pub(super) fn report(&mut self, request: Request) {
        assert!(self.apply(request.clone()).is_some(), "{request:?} was refused");
    }

    /// Whether it was not refused.
    pub(super) fn acquire(
        &mut self,
        tenant: u8,
        wanted: &[(u32, u8, u8)],
        handout: u8,
        space: u8,
    ) -> bool {
        use Handout::{Container, Devices, Group, Iommufd};
        let handout = [Container, Group, Devices, Devices, Iommufd, Iommufd][usize::from(handout)];
        let shared = |name: &str, trust| Space::Shared { name: name.into(), trust };
        let space = match space {
            0 => shared("enforced", Trust::Enforced),
            1 => shared("mutual", Trust::Mutual),
            2 => shared("enforced", Trust::Mutual),
            _ if matches!(handout, Group | Iommufd) => Space::None,
            _ => Space::Own,
        };
        let groups = merged(wanted);
        let lease = self.unused_name();
        let noiommu = groups.iter().any(|group| group.noiommu);
        let (devices, cdevs, state) = (BTreeMap::new(), BTreeMap::new(), State::InFlight);
        let space_of = space.clone();
        let holder = Holder { tenant, handout, space: space_of, noiommu, state, devices, cdevs };
        let leases = self.holders.values().filter(|other| other.tenant == tenant).count();
        let allowed = self.may_have(lease, &holder, &groups)
            && self.fits(&holder)
            && leases < self.quota.leases as usize;
        let request = Request::Acquire(super::super::Acquire {
            lease,
            tenant: tenant.to_string(),
            vm: "vm".into(),
            uid: 0,
            pid: 0,
            at: 0,
            handout,
            space,
            groups: groups.clone(),
            quota: self.quota,
        });
        let effects = self.apply(request);
        assert_eq!(effects.is_some(), allowed, "{holder:?} wants {groups:?}");
        let Some(effects) = effects else { return false };
        self.holders.insert(lease, holder);
        self.carry_out(lease, &groups, &effects);
        true
    }

    /// Whether it was not refused.
    pub(super) fn extend(&mut self, which: usize, wanted: &[(u32, u8, u8)]) -> bool {
        let Some(lease) = self.live(which) else { return false };
        let holder = self.holders[&lease].clone();
        let groups = merged(wanted);
        let busy = self.pending.iter().any(|pending| pending.lease == lease);
        let allowed = !busy && self.may_have(lease, &holder, &groups);
        let request = Request::Extend(Extend { lease, groups: groups.clone(), quota: self.quota });
        let effects = self.apply(request);
        assert_eq!(effects.is_some(), allowed, "{lease} {holder:?} wants {groups:?}");
        let Some(effects) = effects else { return false };
        self.carry_out(lease, &groups, &effects);
        true
    }

    fn carry_out(&mut self, lease: LeaseId, groups: &[WantedGroup], effects: &[Effect]) {
        let key = space_key(lease, &self.holders[&lease].space);
        let mut opened = Vec::new();
        let (mut devices, mut cdevs) = (BTreeMap::new(), BTreeMap::new());
        let tenant = self.holders[&lease].tenant;
        for group in groups {
            devices.extend(group.devices.iter().map(|bdf| (*bdf, group.id)));
            devices.extend(group.withhold.iter().map(|bdf| (*bdf, group.id)));
        }
        for effect in effects {
            match effect {
                Effect::OpenGroup(id) | Effect::CheckGroup(id) => {
                    let stranger = self.stale.get(id).filter(|whose| **whose != tenant);
                    assert_eq!(stranger, None, "another tenant can take over {id}");
                    assert!(!self.kept.contains_key(id), "somebody still has something of {id}");
                    assert!(self.open.insert(*id), "{id} is opened twice");
                    self.owner.insert(*id, lease);
                    opened.push(*id);
                }
                Effect::Attach(id) => {
                    assert_eq!(self.attached.insert(*id, key.clone()), None);
                }
                Effect::OpenDevice(id, bdf) => {
                    assert_eq!(self.owner.get(id), Some(&lease), "{bdf} is another's");
                    let used = groups.iter().any(|group| group.devices.contains(bdf));
                    assert!(used, "{bdf} was not asked for");
                }
                Effect::OpenCdev(id, bdf) => {
                    assert_eq!(self.owner.get(id), Some(&lease), "{bdf} is another's");
                    cdevs.insert(*bdf, self.registrations.get(id).copied().unwrap_or_default());
                }
                Effect::OpenSpace | Effect::OpenIommufd => {}
                other => panic!("{other:?} while acquiring"),
            }
        }
        let lonely = groups.iter().find(|group| self.owner.get(&group.id) != Some(&lease));
        assert!(lonely.is_none(), "{lonely:?} was not opened");
        self.pending.push(Pending { lease, opened, devices, cdevs });
    }

    /// `how` is 0 where the kernel fails, 1 where the client does not take it, else it goes well.
    pub(super) fn finish(&mut self, which: usize, how: u8) {
        if self.pending.is_empty() {
            return;
        }
        let Pending { lease, opened, devices, cdevs } =
            self.pending.remove(which % self.pending.len());
        let dead = self.holders[&lease].state == State::Dead;
        if how > 1 && !dead {
            self.report(Request::Commit { lease });
            let holder = self.holders.get_mut(&lease).unwrap();
            holder.state = State::Live;
            holder.devices.extend(devices);
            holder.cdevs.extend(cdevs);
            return;
        }
        if how > 0 && dead {
            let commit = self.apply(Request::Commit { lease });
            assert_eq!(commit, None, "a lease that has ended was added to");
        }
        for id in opened.iter().rev() {
            self.open.remove(id);
            self.owner.remove(id);
            self.detach(*id);
        }
        if how == 1 && !dead {
            // It is as if it had never been committed.
            let mut aborted = self.ledger.clone();
            aborted.apply(Request::Abort { lease }).unwrap();
            self.report(Request::Commit { lease });
            let devices = devices.into_keys().collect();
            self.report(Request::Retract { lease, devices, groups: opened });
            assert_eq!(self.ledger, aborted);
        } else {
            self.report(Request::Abort { lease });
        }
        if self.holders[&lease].state == State::InFlight {
            self.holders.remove(&lease);
        }
        self.forget();
    }

    /// A group leaves its address space, the last one takes what is mapped with it.
    pub(super) fn detach(&mut self, id: u32) {
        let Some(key) = self.attached.remove(&id) else { return };
        if !self.attached.values().any(|other| *other == key) {
            self.mapped.remove(&key);
        }
    }

    pub(super) fn end(&mut self, which: usize, keeps: Keeps) {
        if let Some(lease) = self.live(which) {
            self.end_lease(lease, keeps);
        }
    }

    pub(super) fn end_lease(&mut self, lease: LeaseId, keeps: Keeps) {
        self.report(Request::End { lease, at: 1 });
        assert_eq!(self.apply(Request::End { lease, at: 1 }), None, "{lease} ended twice");
        self.holders.get_mut(&lease).unwrap().state = State::Dead;
        let fresh: Vec<_> = self.pending.iter().flat_map(|p| p.opened.clone()).collect();
        let theirs = self.owner.iter().find(|(id, l)| **l == lease && !fresh.contains(id));
        let Some(id) = theirs.map(|(id, _)| *id) else { return };
        let holder = &self.holders[&lease];
        let given = holder.devices.iter().any(|(b, g)| *g == id && holder.cdevs.contains_key(b));
        match keeps {
            Keeps::Nothing => {}
            // By iommufd there is no group to keep: a device that is not bound.
            Keeps::Group if holder.handout == Handout::Iommufd => {
                if given {
                    self.stale.insert(id, holder.tenant);
                }
            }
            _ => drop(self.kept.insert(id, keeps)),
        }
    }

    /// One of the leases that have ended.
    pub(super) fn dead(&self, which: usize) -> Option<LeaseId> {
        let dead = self.holders.iter().filter(|(_, holder)| holder.state == State::Dead);
        let dead: Vec<_> = dead.map(|(id, _)| *id).collect();
        (!dead.is_empty()).then(|| dead[which % dead.len()])
    }

    pub(super) fn reclaim(&mut self, which: usize, faults: u16) {
        if let Some(lease) = self.dead(which) {
            self.take_back(lease, faults);
        }
    }

    /// What a keeper does for a lease that has ended, and tells. Each bit is a kernel call that fails.
    fn take_back(&mut self, lease: LeaseId, faults: u16) {
        let mut mapped = self.mapped.values().flatten();
        if mapped.any(|m| m.lease == lease && m.in_flight.is_some()) {
            return;
        }
        let mut nth = 0;
        let mut fails = || {
            nth += 1;
            faults & 1 << (nth % 16) != 0
        };
        let stuck = |id| Request::Stuck { group: id, why: busy(), at: 1 };
        self.undo_mappings(lease, &mut fails);
        let fresh: Vec<_> = self.pending.iter().flat_map(|p| p.opened.clone()).collect();
        let groups = self.owner.iter().filter(|(_, owner)| **owner == lease);
        let groups = groups.filter(|(id, _)| !fresh.contains(id));
        for id in groups.map(|(id, _)| *id).collect::<Vec<_>>() {
            if self.attached.contains_key(&id) {
                if fails() || self.kept.get(&id) == Some(&Keeps::Device) {
                    self.report(stuck(id));
                    continue;
                }
                self.detach(id);
                self.report(Request::Detached { group: id });
            }
            if fails() || self.kept.contains_key(&id) {
                self.report(stuck(id));
                continue;
            }
            let left = self.free(lease, id);
            let holder = &self.holders[&lease];
            if holder.handout != Handout::Iommufd {
                self.report(Request::Freed { group: id });
                continue;
            }
            if !left.is_empty() {
                let unproved = self.unproved.entry(id).or_default();
                unproved.0 = holder.tenant;
                unproved.1.extend(left.clone());
            }
            self.report(Request::Unbound { group: id, at: 1, left });
        }
        self.forget();
    }

    fn undo_mappings(&mut self, lease: LeaseId, fails: &mut dyn FnMut() -> bool) {
        let key = space_key(lease, &self.holders[&lease].space);
        let mapped = self.mapped.entry(key).or_default();
        let own = mapped.iter().filter(|m| m.lease == lease && m.by_broker);
        for iova in own.map(|m| m.iova).collect::<Vec<_>>() {
            let gone = !fails();
            let mapped = self.mapped.values_mut();
            mapped.for_each(|there| {
                there.retain(|m| !(gone && m.iova == iova && m.lease == lease));
            });
            self.report(Request::UnmapDone { lease, iova, gone });
        }
    }

    /// A group that nobody has in use any more; its devices that were handed out by their nodes.
    fn free(&mut self, lease: LeaseId, id: u32) -> BTreeMap<Bdf, u64> {
        self.open.remove(&id);
        self.owner.remove(&id);
        let holder = self.holders.get_mut(&lease).unwrap();
        let here: Vec<_> =
            holder.devices.extract_if(.., |_, group| *group == id).map(|(bdf, _)| bdf).collect();
        let cdevs = &holder.cdevs;
        here.iter().filter_map(|bdf| cdevs.get_key_value(bdf)).map(|(b, r)| (*b, *r)).collect()
    }

    /// Somebody has a group's devices bound anew: the driver waits until nobody has them open.
    pub(super) fn rebind(&mut self, group: u32) {
        if self.owner.contains_key(&group) || self.stale.contains_key(&group) {
            return;
        }
        *self.registrations.entry(group).or_default() += 1;
        for (device, registration) in self.unproved.remove(&group).map_or(BTreeMap::new(), |u| u.1)
        {
            // Another registration's end shows nothing.
            let other = Request::Proved { group, device, registration: registration + 1 };
            let before = self.ledger.clone();
            self.report(other);
            assert_eq!(self.ledger, before);
            self.report(Request::Proved { group, device, registration });
        }
    }

    /// Ended leases of which nothing is left.
    pub(super) fn forget(&mut self) {
        let Self { holders, owner, mapped, pending, .. } = self;
        mapped.retain(|_, those| !those.is_empty());
        holders.retain(|id, holder| {
            holder.state != State::Dead
                || owner.values().any(|lease| lease == id)
                || pending.iter().any(|pending| pending.lease == *id)
                || mapped.values().flatten().any(|m| m.lease == *id && m.by_broker)
        });
    }

    pub(super) fn let_go(&mut self, group: u32) {
        self.kept.remove(&group);
        self.stale.remove(&group);
    }

    /// The ledger knows what the model knows, no more and no less.
    pub(super) fn check(&self) {
        let owners: BTreeMap<_, _> = self.ledger.groups().map(|(id, g)| (id, g.lease)).collect();
        assert_eq!(owners, self.owner);
        assert_eq!(self.owner.keys().copied().collect::<BTreeSet<_>>(), self.open);
        let unproved = self.ledger.unproved();
        let unproved: BTreeMap<_, _> = unproved
            .map(|(id, left)| (id, (left.tenant.parse().unwrap(), left.left.clone())))
            .collect();
        assert_eq!(unproved, self.unproved);
        let ids: Vec<_> = self.ledger.leases().map(|lease| lease.id).collect();
        assert_eq!(ids, self.holders.keys().copied().collect::<Vec<_>>());
        for lease in self.ledger.leases() {
            let holder = &self.holders[&lease.id];
            let state = match lease.phase {
                Phase::Acquiring => State::InFlight,
                Phase::Held => State::Live,
                Phase::Ending => State::Dead,
            };
            assert_eq!(state, holder.state);
            let devices: BTreeMap<_, _> = lease.devices.iter().map(|d| (d.bdf, d.group)).collect();
            assert_eq!(devices, holder.devices);
            let own = self.mapped.values().flatten();
            let own = own.filter(|m| m.by_broker && m.lease == lease.id);
            let own: BTreeMap<_, _> = own.map(|m| (m.iova, m.size)).collect();
            let known: BTreeMap<_, _> =
                lease.mappings.iter().map(|(at, m)| (*at, m.size)).collect();
            assert_eq!(known, own, "mappings of {}", lease.id);
        }
        let quarantined = |id: &u32| {
            let state = self.ledger.group(*id).map(|group| &group.state);
            matches!(state, Some(GroupState::Reclaiming { .. } | GroupState::Quarantined { .. }))
        };
        for id in self.kept.keys().filter(|id| self.owner.contains_key(id)) {
            assert!(quarantined(id), "{id} has a stranger and is not quarantined");
        }
    }

    /// When everybody has gone and let go, nothing is left.
    pub(super) fn end_of_the_world(mut self) {
        while !self.pending.is_empty() {
            self.finish(0, 2);
        }
        while self.mapped.values().flatten().any(|m| m.in_flight.is_some()) {
            self.settle(0, true);
        }
        while self.live(0).is_some() {
            self.end(0, Keeps::Nothing);
        }
        self.kept.clear();
        self.stale.clear();
        for lease in self.holders.keys().copied().collect::<Vec<_>>() {
            if self.holders.contains_key(&lease) {
                self.take_back(lease, 0);
            }
        }
        self.check();
        (0..GROUPS).for_each(|group| self.rebind(group));
        assert_eq!(self.ledger, Ledger::default());
        assert!(self.attached.is_empty() && self.open.is_empty(), "{:?}", self.attached);
    }
}
