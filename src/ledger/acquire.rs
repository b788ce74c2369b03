//! Acquiring: new leases, more devices for one, and what of it fails.

use super::lease::Adding;
use super::{
    Acquire, Effect, Extend, Group, GroupState, Handed, Lease, LeaseId, Ledger, Phase, Quota,
    Refusal, Space, WantedGroup,
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
            return Err(Refusal::Conflict { what: id.to_string(), why: "is in use".into() });
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
            return Err(bad("devices", "at least one is needed".into()));
        }
        let mut named = BTreeSet::new();
        for group in wanted {
            for bdf in group.devices.iter().chain(&group.withhold) {
                if !named.insert(*bdf) {
                    return Err(bad("devices", format!("{bdf} is named twice")));
                }
                self.check_free(lease, group.id, *bdf)?;
            }
            if group.noiommu != lease.noiommu {
                return Err(Refusal::Conflict {
                    what: format!("group {}", group.id),
                    why: "groups with and without an IOMMU can't be in one lease".into(),
                });
            }
            // Withholding more of a group that one has is fine, taking one to use nothing of it is
            // not.
            let has = self.groups.contains_key(&group.id) && !group.withhold.is_empty();
            if group.devices.is_empty() && !has {
                let why = format!(
                    "of group {} all is withheld: a device of it to be used must be named too",
                    group.id
                );
                return Err(bad("withhold", why));
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
                Err(Refusal::NotYet { what: device.to_string(), since: *since })
            }
            _ if group.lease != lease.id => {
                Err(Refusal::Busy { device, group: id, holder: group.lease })
            }
            _ => match lease.devices.iter().find(|handed| handed.bdf == device) {
                None => Ok(()),
                Some(handed) => {
                    let how = if handed.withheld { "withheld for" } else { "in" };
                    let why = format!("is {how} this lease already");
                    Err(Refusal::Conflict { what: device.to_string(), why })
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
                    let why = format!("another tenant has {}, its PF", theirs.bdf);
                    return Err(Refusal::Conflict { what: vf.bdf.to_string(), why });
                }
                if let Some(pf) = theirs.physfn.filter(|pf| mine(*pf)) {
                    let why = format!("another tenant has {}, a VF of it", theirs.bdf);
                    return Err(Refusal::Conflict { what: pf.to_string(), why });
                }
            }
        }
        Ok(())
    }

    /// Members of a shared container fit together.
    fn check_space(&self, lease: &Lease) -> Result<(), Refusal> {
        let Space::Shared { name, trust } = &lease.space else { return Ok(()) };
        let conflict = |why: &str| {
            let what = format!("container {name:?}");
            Err(Refusal::Conflict { what, why: why.into() })
        };
        let mut live = false;
        let mut ending = false;
        for member in self.members(lease) {
            match &member.space {
                Space::Shared { trust: theirs, .. } if theirs != trust => {
                    return conflict("its members have another kind of trust");
                }
                _ if member.noiommu != lease.noiommu => {
                    return conflict("groups with and without an IOMMU can't be in one container");
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
            Some(since) => Err(Refusal::NotYet { what: format!("container {name:?}"), since }),
            None => conflict("its last member has ended and can't be reclaimed yet"),
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
fn check_form(lease: &Lease) -> Result<(), Refusal> {
    let conflict =
        |what: &str, why: &str| Err(Refusal::Conflict { what: what.into(), why: why.into() });
    match (&lease.space, lease.handout) {
        (Space::None, Handout::Iommufd) => no_iommu_form(lease),
        (_, Handout::Iommufd) => conflict("handout iommufd", "it has no type1 container"),
        (Space::Shared { .. }, Handout::Container | Handout::Group) => conflict(
            "container",
            "members of a shared container get handout devices: with its group a member could \
             leave it",
        ),
        (Space::None, Handout::Group) | (Space::Own, Handout::Container | Handout::Devices) => {
            no_iommu_form(lease)
        }
        (Space::Shared { .. }, Handout::Devices) => no_iommu_form(lease),
        _ => conflict("handout", "it does not go with this address space"),
    }
}

fn no_iommu_form(lease: &Lease) -> Result<(), Refusal> {
    if lease.noiommu && lease.handout != Handout::Devices {
        return Err(Refusal::Conflict {
            what: "handout".into(),
            why: "a group without an IOMMU is handed out as devices only: the kernel lets nobody \
                  without CAP_SYS_RAWIO use its group"
                .into(),
        });
    }
    Ok(())
}

fn bad(field: &'static str, reason: String) -> Refusal {
    Refusal::Bad { field, reason }
}

/// Whether `asked` is within `most`.
pub(super) fn within(limit: &'static str, asked: u64, most: u64) -> Result<(), Refusal> {
    if asked <= most { Ok(()) } else { Err(Refusal::OverLimit { limit, most, asked }) }
}
