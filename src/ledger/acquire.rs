//! Acquiring: new leases, more devices for one, and what of it fails.

use super::lease::Adding;
use super::{
    Acquire, Bad, Conflict, Effect, Extend, Group, GroupState, Handed, Lease, LeaseId, Ledger,
    Phase, Quota, Reclaimed, Refusal, Space, WantedGroup,
};
use crate::protocol::{Bdf, Handout, MAX_DEVICES};
use std::collections::{BTreeMap, BTreeSet};

impl Ledger {
    pub(super) fn acquire(&mut self, request: Acquire) -> Result<Vec<Effect>, Refusal> {
        let Acquire { lease: id, tenant, vm, uid, pid, at, handout, space, groups, quota } =
            request;
        let noiommu = groups.iter().any(|group| group.noiommu);
        let phase = Phase::Acquiring;
        let (devices, mappings, adding) = (Vec::new(), BTreeMap::new(), None);
        let lease = Lease {
            id,
            tenant,
            vm,
            uid,
            pid,
            since: at,
            handout,
            space,
            noiommu,
            phase,
            devices,
            mappings,
            adding,
        };
        if self.leases.contains_key(&id) {
            return Err(Conflict::LeaseInUse(id).into());
        }
        check_form(&lease)?;
        self.check_groups(&lease, &groups)?;
        self.check_space(&lease)?;
        self.check_quota(&lease, &groups, &quota, 1)?;
        self.leases.insert(id, lease);
        let mut effects = Vec::new();
        match handout {
            Handout::Container | Handout::Devices => effects.push(Effect::OpenSpace),
            Handout::Iommufd => effects.push(Effect::OpenIommufd),
            Handout::Group => {}
        }
        effects.extend(self.add(id, groups));
        Ok(effects)
    }

    pub(super) fn extend(&mut self, request: Extend) -> Result<Vec<Effect>, Refusal> {
        let Extend { lease: id, groups, quota } = request;
        let lease = self.live(id).ok_or(Refusal::NoSuchLease(id))?;
        if lease.adding.is_some() {
            return Err(Refusal::InFlight(id));
        }
        self.check_groups(lease, &groups)?;
        self.check_quota(lease, &groups, &quota, 0)?;
        Ok(self.add(id, groups))
    }

    /// Enters what passed all checks; from now on nobody else can get it.
    fn add(&mut self, id: LeaseId, wanted: Vec<WantedGroup>) -> Vec<Effect> {
        let Some(lease) = self.leases.get_mut(&id) else { return Vec::new() };
        let attach = matches!(lease.handout, Handout::Container | Handout::Devices);
        let (mut devices, mut fresh) = (Vec::new(), Vec::new());
        let (mut open_groups, mut open_devices) = (Vec::new(), Vec::new());
        for group in wanted {
            let handed = |withheld| move |bdf| Handed { bdf, group: group.id, withheld };
            devices.extend(group.devices.iter().copied().map(handed(false)));
            devices.extend(group.withhold.iter().copied().map(handed(true)));
            let used = group.devices.iter().copied();
            match lease.handout {
                Handout::Devices => {
                    open_devices.extend(used.map(|bdf| Effect::OpenDevice(group.id, bdf)));
                }
                Handout::Iommufd => {
                    open_devices.extend(used.map(|bdf| Effect::OpenCdev(group.id, bdf)));
                }
                Handout::Container | Handout::Group => {}
            }
            if self.groups.contains_key(&group.id) {
                continue;
            }
            fresh.push(group.id);
            // An open group keeps its devices from being bound to an iommufd.
            open_groups.push(match lease.handout {
                Handout::Iommufd => Effect::CheckGroup(group.id),
                _ => Effect::OpenGroup(group.id),
            });
            if attach {
                open_groups.push(Effect::Attach(group.id));
            }
            let (state, members) = (GroupState::Acquiring, group.members);
            self.groups.insert(group.id, Group { lease: id, state, attached: attach, members });
        }
        lease.adding = Some(Adding { devices, groups: fresh });
        open_groups.into_iter().chain(open_devices).collect()
    }

    pub(super) fn commit(&mut self, id: LeaseId) -> Result<Vec<Effect>, Refusal> {
        let lease = self.any_mut(id)?;
        // A holder may go while more is being added: then it is not wanted any more.
        if lease.phase == Phase::Ending {
            return Err(Refusal::NoSuchLease(id));
        }
        let adding = lease.adding.take().ok_or(Refusal::NoSuchLease(id))?;
        lease.phase = Phase::Held;
        lease.devices.extend(adding.devices);
        for group in adding.groups {
            if let Some(group) = self.groups.get_mut(&group) {
                group.state = GroupState::Held;
            }
        }
        Ok(Vec::new())
    }

    pub(super) fn abort(&mut self, id: LeaseId) -> Result<Vec<Effect>, Refusal> {
        let lease = self.any_mut(id)?;
        let adding = lease.adding.take().ok_or(Refusal::NoSuchLease(id))?;
        let is_new = lease.phase == Phase::Acquiring;
        for group in adding.groups {
            self.groups.remove(&group);
        }
        self.emptied(id);
        if is_new {
            self.leases.remove(&id);
        }
        // It may have ended meanwhile, and only this was left of it.
        self.close(id);
        Ok(Vec::new())
    }

    fn check_groups(&self, lease: &Lease, wanted: &[WantedGroup]) -> Result<(), Refusal> {
        if wanted.is_empty() {
            return Err(Bad::NoDevice.into());
        }
        let mut named = BTreeSet::new();
        for group in wanted {
            for bdf in group.devices.iter().chain(&group.withhold) {
                if !named.insert(*bdf) {
                    return Err(Bad::NamedTwice(*bdf).into());
                }
                self.check_free(lease, group.id, *bdf)?;
            }
            if group.noiommu != lease.noiommu {
                return Err(Conflict::MixedLease { group: group.id }.into());
            }
            // Withholding more of a group that one has is fine, taking one to use nothing of it is
            // not.
            let has = self.groups.contains_key(&group.id) && !group.withhold.is_empty();
            if group.devices.is_empty() && !has {
                return Err(Bad::AllWithheld { group: group.id }.into());
            }
            self.check_functions(lease, group)?;
        }
        Ok(())
    }

    /// One group, one lease.
    fn check_free(&self, lease: &Lease, id: u32, device: Bdf) -> Result<(), Refusal> {
        let Some(group) = self.groups.get(&id) else {
            return self.check_unproved(lease, id, device);
        };
        match &group.state {
            GroupState::Quarantined { why, since } => {
                let (since, why) = (*since, why.clone());
                Err(Refusal::Quarantined { device, group: id, since, why })
            }
            GroupState::Reclaiming { since } => {
                Err(Refusal::NotYet { what: Reclaimed::Device(device), since: *since })
            }
            _ if group.lease != lease.id => {
                Err(Refusal::Busy { device, group: id, holder: group.lease })
            }
            _ => match lease.devices.iter().find(|handed| handed.bdf == device) {
                None => Ok(()),
                Some(handed) => {
                    Err(Conflict::AlreadyIn { device, withheld: handed.withheld }.into())
                }
            },
        }
    }

    /// A PF on a VFIO driver and its VFs are one tenant's: whoever has the PF can take the VFs away
    /// and see into them.
    fn check_functions(&self, lease: &Lease, wanted: &WantedGroup) -> Result<(), Refusal> {
        let held = self.groups.values().filter_map(|group| {
            self.leases.get(&group.lease).map(|holder| (&holder.tenant, &group.members))
        });
        let unproved = self.unproved.values().map(|left| (&left.tenant, &left.members));
        for (tenant, members) in held.chain(unproved) {
            let mine = |bdf| wanted.members.iter().any(|member| member.bdf == bdf);
            for theirs in members.iter().filter(|_| *tenant != lease.tenant) {
                let above = wanted.members.iter().find(|mine| mine.physfn == Some(theirs.bdf));
                if let Some(vf) = above {
                    return Err(Conflict::PfElsewhere { vf: vf.bdf, pf: theirs.bdf }.into());
                }
                if let Some(pf) = theirs.physfn.filter(|pf| mine(*pf)) {
                    return Err(Conflict::VfElsewhere { pf, vf: theirs.bdf }.into());
                }
            }
        }
        Ok(())
    }

    /// Members of a shared container fit together.
    fn check_space(&self, lease: &Lease) -> Result<(), Refusal> {
        let Space::Shared { name, trust } = &lease.space else { return Ok(()) };
        let container = || name.clone();
        let mut live = false;
        let mut ending = false;
        for member in self.members(lease) {
            match &member.space {
                Space::Shared { trust: theirs, .. } if theirs != trust => {
                    return Err(Conflict::OtherTrust { container: container() }.into());
                }
                _ if member.noiommu != lease.noiommu => {
                    return Err(Conflict::MixedContainer { container: container() }.into());
                }
                _ => {}
            }
            match member.phase {
                Phase::Ending => ending = true,
                _ => live = true,
            }
        }
        // Whatever a dead member left may still reach all of the container: nobody moves in alone
        // with that.
        if !ending || live {
            return Ok(());
        }
        let groups = self.members(lease).flat_map(|member| self.groups_of(member.id));
        let soon = groups.filter_map(|(_, group)| match group.state {
            GroupState::Reclaiming { since } => Some(since),
            _ => None,
        });
        match soon.min() {
            Some(since) => Err(Refusal::NotYet { what: Reclaimed::Container(container()), since }),
            None => Err(Conflict::LeftAlone { container: container() }.into()),
        }
    }

    fn check_quota(
        &self,
        lease: &Lease,
        wanted: &[WantedGroup],
        quota: &Quota,
        leases: u64,
    ) -> Result<(), Refusal> {
        let more: usize = wanted.iter().map(|g| g.devices.len() + g.withhold.len()).sum();
        let here = lease.devices.len() + more;
        within("devices of one lease", here as u64, MAX_DEVICES as u64)?;
        let theirs = || self.leases.values().filter(|other| other.tenant == lease.tenant);
        within("leases", theirs().count() as u64 + leases, quota.leases)?;
        let devices: usize = theirs()
            .map(|other| {
                other.devices.len() + other.adding.as_ref().map_or(0, |adding| adding.devices.len())
            })
            .sum();
        let unproved = self.unproved_devices(&lease.tenant, wanted);
        within("devices", (devices + more + unproved) as u64, quota.devices)
    }
}

/// Handouts and address spaces that go together.
fn check_form(lease: &Lease) -> Result<(), Conflict> {
    match (&lease.space, lease.handout) {
        (Space::None, Handout::Iommufd | Handout::Group)
        | (Space::Own, Handout::Container | Handout::Devices)
        | (Space::Shared { .. }, Handout::Devices) => {}
        (_, Handout::Iommufd) => return Err(Conflict::IommufdInContainer),
        (Space::Shared { .. }, Handout::Container | Handout::Group) => {
            return Err(Conflict::GroupOfSharedContainer);
        }
        _ => return Err(Conflict::OtherSpace),
    }
    match lease.noiommu && lease.handout != Handout::Devices {
        true => Err(Conflict::NoIommuAsGroup),
        false => Ok(()),
    }
}

/// Whether `asked` is within `most`.
pub(super) fn within(limit: &'static str, asked: u64, most: u64) -> Result<(), Refusal> {
    if asked <= most { Ok(()) } else { Err(Refusal::OverLimit { limit, most, asked }) }
}
