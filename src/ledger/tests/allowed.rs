//! What may be acquired, written down a second time in the simplest way there is.

use super::model::{Holder, Model, State};
use super::*;
use std::collections::BTreeSet;

impl Model {
    /// One group, one lease; everything else about devices and quotas.
    pub(super) fn may_have(&self, id: LeaseId, holder: &Holder, groups: &[WantedGroup]) -> bool {
        let mut named: Vec<Bdf> = Vec::new();
        for group in groups {
            let here: Vec<_> = group.devices.iter().chain(&group.withhold).copied().collect();
            match self.owner.get(&group.id) {
                Some(owner) if *owner != id => return false,
                Some(_) if here.is_empty() => return false,
                Some(_) => {}
                None if group.devices.is_empty() => return false,
                None if self.whose(group.id).is_some_and(|tenant| tenant != holder.tenant) => {
                    return false;
                }
                None => {}
            }
            if group.noiommu != holder.noiommu
                || here.iter().any(|bdf| named.contains(bdf) || holder.devices.contains_key(bdf))
            {
                return false;
            }
            named.extend(&here);
            let unique: BTreeSet<_> = here.iter().collect();
            if unique.len() != here.len() {
                return false;
            }
            // Group 0 is the PF's and group 1 its VF's.
            let family = [(0, 1), (1, 0)].into_iter().find(|(mine, _)| *mine == group.id);
            let relative = family.and_then(|(_, other)| self.owner.get(&other));
            let theirs = relative.map(|owner| self.holders.get(owner).map(|h| h.tenant));
            if theirs.is_some_and(|tenant| tenant != Some(holder.tenant)) {
                return false;
            }
            let left = family.and_then(|(_, other)| self.whose(other));
            if left.is_some_and(|tenant| tenant != holder.tenant) {
                return false;
            }
        }
        let wanted = named.len();
        let of_tenant: usize = self
            .holders
            .iter()
            .filter(|(_, other)| other.tenant == holder.tenant)
            .map(|(other, it)| {
                let pending = self.pending.iter().filter(|p| p.lease == *other);
                it.devices.len() + pending.map(|p| p.devices.len()).sum::<usize>()
            })
            .sum();
        let theirs = self.holders.values().filter(|other| other.tenant == holder.tenant);
        let pending = |id: &LeaseId| self.holders[id].tenant == holder.tenant;
        let pending = self.pending.iter().filter(|p| pending(&p.lease));
        named.extend(theirs.flat_map(|other| other.devices.keys()));
        named.extend(pending.flat_map(|pending| pending.devices.keys()));
        let kept_away = self.unproved.values().filter(|(tenant, _)| *tenant == holder.tenant);
        let kept_away = kept_away.flat_map(|(_, left)| left.keys());
        let kept_away = kept_away.filter(|bdf| !named.contains(bdf)).count();
        of_tenant + wanted + kept_away <= self.quota.devices as usize
    }

    /// The tenant that a group is for alone.
    fn whose(&self, group: u32) -> Option<u8> {
        self.unproved.get(&group).map(|(tenant, _)| *tenant)
    }

    /// Handout, address space and the other members go together.
    pub(super) fn fits(&self, holder: &Holder) -> bool {
        if holder.noiommu && holder.handout != Handout::Devices {
            return false;
        }
        let Space::Shared { name, trust } = &holder.space else { return true };
        if holder.handout != Handout::Devices {
            return false;
        }
        let members: Vec<_> = self
            .holders
            .values()
            .filter(|h| matches!(&h.space, Space::Shared { name: n, .. } if n == name))
            .collect();
        let same = members.iter().all(|member| {
            matches!(&member.space, Space::Shared { trust: t, .. } if t == trust)
                && member.noiommu == holder.noiommu
        });
        let left_alone = !members.is_empty() && members.iter().all(|m| m.state == State::Dead);
        same && !left_alone
    }
}
