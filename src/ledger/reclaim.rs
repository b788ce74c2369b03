//! The end of a lease: its mappings undone, its groups shown to be free, one by one.

use super::{Effect, GroupState, LeaseId, Ledger, NotFree, Phase, Refusal, Space};

impl Ledger {
    pub(super) fn end(&mut self, id: LeaseId, at: u64) -> Result<Vec<Effect>, Refusal> {
        self.live_mut(id)?.phase = Phase::Ending;
        let adding = self.leases.get(&id).and_then(|lease| lease.adding.clone());
        let fresh = adding.map_or(Vec::new(), |adding| adding.groups);
        for (number, group) in &mut self.groups {
            if group.lease == id && !fresh.contains(number) {
                group.state = GroupState::Reclaiming { since: at };
            }
        }
        Ok(Vec::new())
    }

    pub(super) fn detached(&mut self, number: u32) -> Result<Vec<Effect>, Refusal> {
        if let Some(group) = self.groups.get_mut(&number) {
            group.attached = false;
            let id = group.lease;
            self.emptied(id);
            self.close(id);
        }
        Ok(Vec::new())
    }

    pub(super) fn freed(&mut self, number: u32) -> Result<Vec<Effect>, Refusal> {
        let reclaimed = |id| self.leases.get(&id).is_some_and(|l| l.phase == Phase::Ending);
        let Some(id) = self.groups.get(&number).map(|g| g.lease).filter(|id| reclaimed(*id)) else {
            return Ok(Vec::new());
        };
        self.groups.remove(&number);
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.devices.retain(|handed| handed.group != number);
        }
        self.emptied(id);
        self.close(id);
        Ok(Vec::new())
    }

    pub(super) fn stuck(
        &mut self,
        number: u32,
        why: NotFree,
        at: u64,
    ) -> Result<Vec<Effect>, Refusal> {
        if let Some(group) = self.groups.get_mut(&number) {
            match &mut group.state {
                // It is quarantined since the first time.
                GroupState::Quarantined { why: was, .. } => *was = why,
                state @ GroupState::Reclaiming { .. } => {
                    *state = GroupState::Quarantined { why, since: at };
                }
                GroupState::Acquiring | GroupState::Held => {}
            }
        }
        Ok(Vec::new())
    }

    /// When the last group leaves an address space, the kernel forgets all mappings in it, those
    /// that could not be undone one by one among them.
    pub(super) fn emptied(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.get(&id) else { return };
        let members: Vec<_> = self.members(lease).map(|member| member.id).collect();
        let attached = self.groups.values().any(|g| g.attached && members.contains(&g.lease));
        if attached {
            return;
        }
        for member in members {
            if let Some(lease) = self.leases.get_mut(&member) {
                lease.mappings.clear();
            }
            self.close(member);
        }
    }

    /// An ended lease of which nothing is left is forgotten.
    pub(super) fn close(&mut self, id: LeaseId) {
        let over = self.leases.get(&id).is_some_and(|lease| {
            let nothing = lease.mappings.is_empty() && lease.adding.is_none();
            lease.phase == Phase::Ending && nothing
        });
        if over && self.groups_of(id).next().is_none() {
            self.leases.remove(&id);
        }
    }

    /// Whether some ended lease is not reclaimed yet.
    pub fn has_ending(&self) -> bool {
        self.ending().next().is_some()
    }

    /// Leases that have ended and are not reclaimed yet.
    pub fn ending(&self) -> impl Iterator<Item = LeaseId> {
        self.leases.values().filter(|lease| lease.phase == Phase::Ending).map(|lease| lease.id)
    }

    /// Whether a shared container of this name has members; with a member in any phase it does.
    pub fn has_members(&self, name: &str) -> bool {
        self.leases
            .values()
            .any(|lease| matches!(&lease.space, Space::Shared { name: n, .. } if n == name))
    }
}
