//! The plain model: maps of who has what, and a toy kernel that the ledger's effects are carried
//! out on.

use super::*;
use std::collections::{BTreeMap, BTreeSet};

/// Groups 0 to 5 have two devices each. Group 1's first device is a VF of group 0's; group 5 has no
/// IOMMU.
pub(super) const GROUPS: u32 = 6;

pub(super) const QUOTA: Quota = Quota { leases: 3, devices: 6, mappings: 4, mapped_bytes: 8 << 12 };

/// What somebody who is gone left open in another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keeps {
    Nothing,
    Device,
    Group,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    InFlight,
    Live,
    Dead,
}

#[derive(Clone, Debug)]
pub(super) struct Holder {
    pub(super) tenant: u8,
    pub(super) handout: Handout,
    pub(super) space: Space,
    pub(super) noiommu: bool,
    pub(super) state: State,
    pub(super) devices: BTreeMap<Bdf, u32>,
}

/// An acquisition that the kernel has carried out and the ledger has not heard of.
pub(super) struct Pending {
    pub(super) lease: LeaseId,
    pub(super) opened: Vec<u32>,
    pub(super) devices: BTreeMap<Bdf, u32>,
}

/// One mapping in the toy kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapped {
    iova: u64,
    size: u64,
    lease: LeaseId,
    by_broker: bool,
    in_flight: Option<Going>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Going {
    In,
    Out,
}

#[derive(Default)]
pub(super) struct Model {
    ledger: Ledger,
    next: u64,
    pub(super) holders: BTreeMap<LeaseId, Holder>,
    pub(super) pending: Vec<Pending>,
    /// Who has which group, or had it and is not known to have let go.
    pub(super) owner: BTreeMap<u32, LeaseId>,
    /// The toy kernel: which groups are open, in which address space, what is mapped there, and
    /// what strangers keep.
    open: BTreeSet<u32>,
    attached: BTreeMap<u32, String>,
    mapped: BTreeMap<String, Vec<Mapped>>,
    kept: BTreeMap<u32, Keeps>,
}

pub(super) fn bdf(group: u32, device: u8) -> Bdf {
    Bdf { segment: 0, bus: group as u8, device: 0, function: device }
}

fn wanted_group((id, used, withheld): &(u32, u8, u8)) -> WantedGroup {
    let those = |bits: u8| (0..2).filter(|n| bits & 1 << n != 0).map(|n| bdf(*id, n)).collect();
    let physfn = |n| (*id == 1 && n == 0).then(|| bdf(0, 0));
    let members = (0..2).map(|n| Member { bdf: bdf(*id, n), physfn: physfn(n) }).collect();
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

fn space_key(id: LeaseId, space: &Space) -> String {
    match space {
        Space::Shared { name, .. } => name.clone(),
        _ => id.to_string(),
    }
}

impl Model {
    fn live(&self, which: usize) -> Option<LeaseId> {
        let live = self.holders.iter().filter(|(_, holder)| holder.state == State::Live);
        let live: Vec<_> = live.map(|(id, _)| *id).collect();
        (!live.is_empty()).then(|| live[which % live.len()])
    }

    /// Applies a request that may be refused; what is refused must change nothing.
    fn apply(&mut self, request: Request) -> Option<Vec<Effect>> {
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
    fn report(&mut self, request: Request) {
        assert!(self.apply(request.clone()).is_some(), "{request:?} was refused");
    }

    pub(super) fn acquire(&mut self, tenant: u8, wanted: &[(u32, u8, u8)], handout: u8, space: u8) {
        let handout = [Handout::Container, Handout::Group, Handout::Devices, Handout::Devices]
            [usize::from(handout)];
        let shared = |name: &str, trust| Space::Shared { name: name.into(), trust };
        let space = match space {
            0 => shared("enforced", Trust::Enforced),
            1 => shared("mutual", Trust::Mutual),
            2 => shared("enforced", Trust::Mutual),
            _ if handout == Handout::Group => Space::None,
            _ => Space::Own,
        };
        let groups = merged(wanted);
        self.next += 1;
        let lease = LeaseId(self.next);
        let noiommu = groups.iter().any(|group| group.noiommu);
        let devices = BTreeMap::new();
        let state = State::InFlight;
        let holder = Holder { tenant, handout, space: space.clone(), noiommu, state, devices };
        let leases = self.holders.values().filter(|other| other.tenant == tenant).count();
        let allowed = self.may_have(lease, &holder, &groups)
            && self.fits(&holder)
            && leases < QUOTA.leases as usize;
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
            quota: QUOTA,
        });
        let effects = self.apply(request);
        assert_eq!(effects.is_some(), allowed, "{holder:?} wants {groups:?}");
        if let Some(effects) = effects {
            self.holders.insert(lease, holder);
            self.carry_out(lease, &groups, &effects);
        }
    }

    pub(super) fn extend(&mut self, which: usize, wanted: &[(u32, u8, u8)]) {
        let Some(lease) = self.live(which) else { return };
        let holder = self.holders[&lease].clone();
        let groups = merged(wanted);
        let busy = self.pending.iter().any(|pending| pending.lease == lease);
        let allowed = !busy && self.may_have(lease, &holder, &groups);
        let request = Request::Extend(Extend { lease, groups: groups.clone(), quota: QUOTA });
        let effects = self.apply(request);
        assert_eq!(effects.is_some(), allowed, "{lease} {holder:?} wants {groups:?}");
        if let Some(effects) = effects {
            self.carry_out(lease, &groups, &effects);
        }
    }

    fn carry_out(&mut self, lease: LeaseId, groups: &[WantedGroup], effects: &[Effect]) {
        let key = space_key(lease, &self.holders[&lease].space);
        let mut opened = Vec::new();
        let mut devices = BTreeMap::new();
        for group in groups {
            devices.extend(group.devices.iter().map(|bdf| (*bdf, group.id)));
            devices.extend(group.withhold.iter().map(|bdf| (*bdf, group.id)));
        }
        for effect in effects {
            match effect {
                Effect::OpenGroup(id) => {
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
                Effect::OpenSpace => {}
                other => panic!("{other:?} while acquiring"),
            }
        }
        let lonely = groups.iter().find(|group| self.owner.get(&group.id) != Some(&lease));
        assert!(lonely.is_none(), "{lonely:?} was not opened");
        self.pending.push(Pending { lease, opened, devices });
    }

    pub(super) fn finish(&mut self, which: usize, ok: bool) {
        if self.pending.is_empty() {
            return;
        }
        let Pending { lease, opened, devices } = self.pending.remove(which % self.pending.len());
        if ok && self.holders[&lease].state != State::Dead {
            self.report(Request::Commit { lease });
            let holder = self.holders.get_mut(&lease).unwrap();
            holder.state = State::Live;
            holder.devices.extend(devices);
            return;
        }
        if ok {
            let commit = self.apply(Request::Commit { lease });
            assert_eq!(commit, None, "a lease that has ended was added to");
        }
        for id in opened.iter().rev() {
            self.open.remove(id);
            self.owner.remove(id);
            self.detach(*id);
        }
        self.report(Request::Abort { lease });
        if self.holders[&lease].state == State::InFlight {
            self.holders.remove(&lease);
        }
    }

    /// A group leaves its address space, the last one takes what is mapped with it.
    fn detach(&mut self, id: u32) {
        let Some(key) = self.attached.remove(&id) else { return };
        if !self.attached.values().any(|other| *other == key) {
            self.mapped.remove(&key);
        }
    }

    pub(super) fn map(&mut self, which: usize, page: u64, pages: u64, how: u8) {
        let Some(lease) = self.live(which) else { return };
        let (iova, size) = (page << 12, pages << 12);
        let holder = self.holders[&lease].clone();
        let key = space_key(lease, &holder.space);
        let here = self.mapped.get(&key).cloned().unwrap_or_default();
        let overlap =
            here.iter().any(|there| there.iova < iova + size && iova < there.iova + there.size);
        let theirs: Vec<_> = self
            .mapped
            .values()
            .flatten()
            .filter(|m| m.by_broker && self.holders[&m.lease].tenant == holder.tenant)
            .collect();
        let bytes: u64 = theirs.iter().map(|mapped| mapped.size).sum();
        let enforced = !matches!(holder.space, Space::Shared { trust: Trust::Mutual, .. });
        let allowed = size > 0
            && holder.handout == Handout::Devices
            && enforced
            && !holder.noiommu
            && !overlap
            && theirs.len() < QUOTA.mappings as usize
            && bytes + size <= QUOTA.mapped_bytes;
        let effects = self.apply(Request::Map { lease, iova, size, quota: QUOTA });
        assert_eq!(effects.is_some(), allowed, "{lease} maps {page}+{pages} beside {here:?}");
        if effects.is_none() {
            return;
        }
        assert_eq!(effects, Some(vec![Effect::Map { iova, size }]));
        let in_flight = (how == 3).then_some(Going::In);
        if how == 0 {
            self.report(Request::MapDone { lease, iova, made: false });
            return;
        }
        let mapped = Mapped { iova, size, lease, by_broker: true, in_flight };
        self.mapped.entry(key).or_default().push(mapped);
        if in_flight.is_none() {
            self.report(Request::MapDone { lease, iova, made: true });
        }
    }

    pub(super) fn unmap(&mut self, which: usize, page: u64, pages: u64, how: u8) {
        let Some(lease) = self.live(which) else { return };
        let (iova, size) = (page << 12, pages << 12);
        let key = space_key(lease, &self.holders[&lease].space);
        let own: Vec<_> = self
            .mapped
            .get(&key)
            .into_iter()
            .flatten()
            .filter(|m| m.by_broker && m.lease == lease)
            .filter(|m| m.iova < iova + size && iova < m.iova + m.size)
            .copied()
            .collect();
        let whole = own.iter().all(|m| iova <= m.iova && m.iova + m.size <= iova + size);
        let allowed = size > 0 && whole && own.iter().all(|m| m.in_flight.is_none());
        let effects = self.apply(Request::Unmap { lease, iova, size });
        assert_eq!(effects.is_some(), allowed, "{lease} unmaps {page}+{pages} of {own:?}");
        let Some(effects) = effects else { return };
        let mut expected: Vec<_> =
            own.iter().map(|m| Effect::Unmap { iova: m.iova, size: m.size }).collect();
        expected.sort_by_key(|effect| match effect {
            Effect::Unmap { iova, .. } => *iova,
            _ => 0,
        });
        assert_eq!(effects, expected);
        for one in own {
            let mapped = self.mapped.get_mut(&key).unwrap();
            let at = mapped.iter().position(|m| *m == one).unwrap();
            match how {
                0 => {}
                3 => mapped[at].in_flight = Some(Going::Out),
                _ => drop(mapped.remove(at)),
            }
            if how != 3 {
                self.report(Request::UnmapDone { lease, iova: one.iova, gone: how != 0 });
            }
        }
    }

    pub(super) fn settle(&mut self, which: usize, ok: bool) {
        let going = self.mapped.values_mut().flatten().filter(|m| m.in_flight.is_some());
        let mut going: Vec<_> = going.collect();
        if going.is_empty() {
            return;
        }
        let which = which % going.len();
        let mapped = &mut *going[which];
        let way = mapped.in_flight.take().unwrap();
        let (lease, iova) = (mapped.lease, mapped.iova);
        let stays = (way == Going::In) == ok;
        if !stays {
            let key = space_key(lease, &self.holders[&lease].space);
            let there = self.mapped.get_mut(&key).unwrap();
            there.retain(|m| (m.lease, m.iova, m.by_broker) != (lease, iova, true));
        }
        self.report(match way {
            Going::In => Request::MapDone { lease, iova, made: ok },
            Going::Out => Request::UnmapDone { lease, iova, gone: ok },
        });
        self.forget();
    }

    pub(super) fn own_map(&mut self, which: usize, page: u64) {
        let Some(lease) = self.live(which) else { return };
        let holder = &self.holders[&lease];
        let mutual = matches!(holder.space, Space::Shared { trust: Trust::Mutual, .. });
        if holder.handout == Handout::Container || mutual {
            let key = space_key(lease, &holder.space);
            let (iova, size) = (page << 12, 1 << 12);
            let mapped = Mapped { iova, size, lease, by_broker: false, in_flight: None };
            self.mapped.entry(key).or_default().push(mapped);
        }
    }

    pub(super) fn end(&mut self, which: usize, keeps: Keeps) {
        let Some(lease) = self.live(which) else { return };
        self.report(Request::End { lease, at: 1 });
        assert_eq!(self.apply(Request::End { lease, at: 1 }), None, "{lease} ended twice");
        self.holders.get_mut(&lease).unwrap().state = State::Dead;
        let fresh: Vec<_> = self.pending.iter().flat_map(|p| p.opened.clone()).collect();
        let theirs = self.owner.iter().find(|(id, l)| **l == lease && !fresh.contains(id));
        if let (Some((id, _)), true) = (theirs, keeps != Keeps::Nothing) {
            self.kept.insert(*id, keeps);
        }
    }

    pub(super) fn reclaim(&mut self, which: usize, faults: u16) {
        let dead: Vec<_> = self
            .holders
            .iter()
            .filter(|(_, holder)| holder.state == State::Dead)
            .map(|(id, _)| *id)
            .collect();
        if !dead.is_empty() {
            self.take_back(dead[which % dead.len()], faults);
        }
    }

    fn take_back(&mut self, lease: LeaseId, faults: u16) {
        let key = space_key(lease, &self.holders[&lease].space);
        let in_flight = self.pending.iter().any(|pending| pending.lease == lease)
            || self.mapped.values().flatten().any(|m| m.lease == lease && m.in_flight.is_some());
        let effects = self.apply(Request::Reclaim { lease });
        assert_eq!(effects.is_none(), in_flight);
        let mut inside = None;
        for (nth, effect) in effects.unwrap_or_default().into_iter().enumerate() {
            let fault = faults & 1 << (nth % 16) != 0;
            let mapped = self.mapped.entry(key.clone()).or_default();
            match effect {
                Effect::Unmap { iova, .. } => {
                    if !fault {
                        mapped.retain(|m| m.iova != iova || m.lease != lease);
                    }
                    self.report(Request::UnmapDone { lease, iova, gone: !fault });
                }
                Effect::UnmapAll => {
                    let holder = |m: &Mapped| self.holders.get(&m.lease);
                    let dead = |m: &&Mapped| holder(m).is_none_or(|h| h.state == State::Dead);
                    assert!(mapped.iter().all(|m| dead(&m)), "a live member's mappings");
                    if !fault {
                        mapped.clear();
                    }
                }
                Effect::Detach(id) if fault || self.kept.get(&id) == Some(&Keeps::Device) => {
                    inside = Some(id);
                    self.report(Request::Stuck { group: id, reason: "busy".into(), at: 1 });
                }
                Effect::Detach(id) => {
                    self.detach(id);
                    self.report(Request::Detached { group: id });
                }
                Effect::Prove(id) if inside == Some(id) => {}
                Effect::Prove(id) if fault || self.kept.contains_key(&id) => {
                    self.report(Request::Stuck { group: id, reason: "busy".into(), at: 1 });
                }
                Effect::Prove(id) => {
                    assert!(!self.attached.contains_key(&id), "{id} is still attached");
                    self.open.remove(&id);
                    self.owner.remove(&id);
                    let holder = self.holders.get_mut(&lease).unwrap();
                    holder.devices.retain(|_, group| *group != id);
                    self.report(Request::Freed { group: id });
                }
                other => panic!("{other:?} while reclaiming"),
            }
        }
        self.forget();
    }

    /// Ended leases of which nothing is left.
    fn forget(&mut self) {
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
    }

    /// The ledger knows what the model knows, no more and no less.
    pub(super) fn check(&self) {
        let owners: BTreeMap<_, _> = self.ledger.groups().map(|(id, g)| (id, g.lease)).collect();
        assert_eq!(owners, self.owner);
        assert_eq!(self.owner.keys().copied().collect::<BTreeSet<_>>(), self.open);
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
            self.finish(0, true);
        }
        while self.mapped.values().flatten().any(|m| m.in_flight.is_some()) {
            self.settle(0, true);
        }
        while self.live(0).is_some() {
            self.end(0, Keeps::Nothing);
        }
        self.kept.clear();
        for lease in self.holders.keys().copied().collect::<Vec<_>>() {
            if self.holders.contains_key(&lease) {
                self.take_back(lease, 0);
            }
        }
        self.check();
        assert_eq!(self.ledger, Ledger::default());
        assert!(self.attached.is_empty() && self.open.is_empty(), "{:?}", self.attached);
    }
}
