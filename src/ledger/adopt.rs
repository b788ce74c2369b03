//! Leases that were there before this ledger, and what was granted and not delivered.

use super::{
    Adopted, AdoptedGroup, Conflict, Effect, Group, GroupState, Lease, LeaseId, Ledger, Mapping,
    Phase, Refusal, Unproved,
};
use crate::protocol::Bdf;

impl Ledger {
    /// Enters a lease as its keeper has it. What is known already of another lease stays.
    pub(super) fn adopt(&mut self, adopted: Adopted) -> Result<Vec<Effect>, Refusal> {
        let Adopted { lease: id, held, at, groups, mut devices, is_mapped, .. } = adopted;
        if self.leases.contains_key(&id) {
            return Err(Conflict::LeaseInUse(id).into());
        }
        let (unbound, kept): (Vec<_>, Vec<_>) =
            groups.into_iter().partition(|group| group.unbound.is_some() && !held);
        if let Some(taken) = kept.iter().find(|group| self.groups.contains_key(&group.id)) {
            return Err(Conflict::GroupInUse(taken.id).into());
        }
        devices.retain(|device| unbound.iter().all(|group| group.id != device.group));
        let lease = Lease {
            id,
            tenant: adopted.tenant,
            vm: adopted.vm,
            uid: adopted.uid,
            pid: adopted.pid,
            since: adopted.since,
            handout: adopted.handout,
            space: adopted.space,
            noiommu: adopted.noiommu,
            phase: if held { Phase::Held } else { Phase::Ending },
            devices,
            mappings: Default::default(),
            adding: None,
        };
        for group in unbound {
            self.adopt_unbound(&lease, at, group);
        }
        for AdoptedGroup { id: number, attached, members, .. } in kept {
            let state = match held {
                true => GroupState::Held,
                false => GroupState::Reclaiming { since: at },
            };
            self.groups.insert(number, Group { lease: id, state, attached, members });
        }
        self.leases.insert(id, lease);
        // What could not be undone in a shared container keeps its range when the groups are free.
        if !is_mapped {
            self.close(id);
        }
        Ok(Vec::new())
    }

    /// A group that was its last tenant's alone, and may be in a lease of that tenant again.
    fn adopt_unbound(&mut self, lease: &Lease, at: u64, group: AdoptedGroup) {
        let left = group.unbound.unwrap_or_default();
        if left.is_empty() {
            return;
        }
        let fresh = || Unproved {
            tenant: lease.tenant.clone(),
            lease: lease.id,
            vm: lease.vm.clone(),
            uid: lease.uid,
            pid: lease.pid,
            since: at,
            left: Default::default(),
            members: group.members,
        };
        self.unproved.entry(group.id).or_insert_with(fresh).left.extend(left);
    }

    /// Enters what is mapped for a lease that was adopted.
    pub(super) fn mapped(
        &mut self,
        id: LeaseId,
        mappings: Vec<(u64, u64)>,
    ) -> Result<Vec<Effect>, Refusal> {
        let lease = self.any_mut(id)?;
        for (iova, size) in mappings {
            lease.mappings.entry(iova).or_insert(Mapping { size, busy: false });
        }
        Ok(Vec::new())
    }

    /// Has a lease, and the nodes that it may have left open, belong to another tenant.
    pub(super) fn rename(&mut self, id: LeaseId, tenant: &str) -> Result<Vec<Effect>, Refusal> {
        if let Some(lease) = self.leases.get_mut(&id) {
            tenant.clone_into(&mut lease.tenant);
        }
        for unproved in self.unproved.values_mut().filter(|unproved| unproved.lease == id) {
            tenant.clone_into(&mut unproved.tenant);
        }
        Ok(Vec::new())
    }

    /// Forgets what was mapped for an ended lease, and the lease where that was the last of it.
    pub(super) fn nothing_mapped(&mut self, id: LeaseId) -> Result<Vec<Effect>, Refusal> {
        let lease = self.any_mut(id)?;
        if lease.phase == Phase::Ending {
            lease.mappings.clear();
            self.close(id);
        }
        Ok(Vec::new())
    }

    /// Takes back what was committed and never reached its holder.
    pub(super) fn retract(
        &mut self,
        id: LeaseId,
        devices: &[Bdf],
        groups: &[u32],
    ) -> Result<Vec<Effect>, Refusal> {
        let lease = self.any_mut(id)?;
        lease.devices.retain(|handed| !devices.contains(&handed.bdf));
        let is_empty = lease.devices.is_empty();
        self.groups.retain(|number, group| group.lease != id || !groups.contains(number));
        self.emptied(id);
        if is_empty && self.groups_of(id).next().is_none() {
            self.leases.remove(&id);
        }
        Ok(Vec::new())
    }
}
