//! Mappings that the broker makes: they have owners, and quotas.

use super::acquire::within;
use super::{Bad, Conflict, Effect, IovaRange, LeaseId, Ledger, Mapping, Quota, Refusal};

impl Ledger {
    pub(super) fn map(
        &mut self,
        id: LeaseId,
        iova: u64,
        size: u64,
        quota: Quota,
    ) -> Result<Vec<Effect>, Refusal> {
        check_range(iova, size)?;
        let lease = self.live(id).ok_or(Refusal::NoSuchLease(id))?;
        if !lease.broker_maps() || lease.noiommu {
            return Err(Conflict::NotMappedHere.into());
        }
        for member in self.members(lease) {
            let taken = member.mappings.iter().find(|(at, there)| there.overlaps(**at, iova, size));
            if let Some((at, there)) = taken {
                let asked = IovaRange { iova, size };
                let mapped = IovaRange { iova: *at, size: there.size };
                return Err(Conflict::Overlap { asked, mapped, is_foreign: member.id != id }.into());
            }
        }
        let theirs = self.leases.values().filter(|other| other.tenant == lease.tenant);
        let all: Vec<_> = theirs.flat_map(|other| other.mappings.values()).collect();
        within("mappings", all.len() as u64 + 1, quota.mappings)?;
        let bytes = all.iter().map(|mapping| mapping.size).fold(size, u64::saturating_add);
        within("mapped_bytes", bytes, quota.mapped_bytes)?;
        self.live_mut(id)?.mappings.insert(iova, Mapping { size, busy: true });
        Ok(vec![Effect::Map { iova, size }])
    }

    pub(super) fn map_done(
        &mut self,
        id: LeaseId,
        iova: u64,
        made: bool,
    ) -> Result<Vec<Effect>, Refusal> {
        self.settle(id, iova, made)
    }

    pub(super) fn unmap(
        &mut self,
        id: LeaseId,
        iova: u64,
        size: u64,
    ) -> Result<Vec<Effect>, Refusal> {
        check_range(iova, size)?;
        let last = iova + (size - 1);
        let lease = self.live_mut(id)?;
        let inside = |at: u64, there: &Mapping| iova <= at && at + (there.size - 1) <= last;
        let mut hit = Vec::new();
        for (at, there) in lease.mappings.range(..=last) {
            if !there.overlaps(*at, iova, size) {
                continue;
            }
            if !inside(*at, there) {
                let asked = IovaRange { iova, size };
                let mapped = IovaRange { iova: *at, size: there.size };
                return Err(Bad::CutsMapping { asked, mapped }.into());
            }
            if there.busy {
                return Err(Refusal::InFlight(id));
            }
            hit.push((*at, there.size));
        }
        for (at, _) in &hit {
            lease.mappings.entry(*at).and_modify(|mapping| mapping.busy = true);
        }
        Ok(hit.into_iter().map(|(iova, size)| Effect::Unmap { iova, size }).collect())
    }

    pub(super) fn unmap_done(
        &mut self,
        id: LeaseId,
        iova: u64,
        gone: bool,
    ) -> Result<Vec<Effect>, Refusal> {
        self.settle(id, iova, !gone)?;
        self.close(id);
        Ok(Vec::new())
    }

    /// A call on a mapping has ended.
    fn settle(&mut self, id: LeaseId, iova: u64, stays: bool) -> Result<Vec<Effect>, Refusal> {
        let mappings = &mut self.any_mut(id)?.mappings;
        match mappings.get_mut(&iova) {
            Some(mapping) if stays => mapping.busy = false,
            Some(_) => drop(mappings.remove(&iova)),
            None => {}
        }
        Ok(Vec::new())
    }
}

fn check_range(iova: u64, size: u64) -> Result<(), Bad> {
    match size.checked_sub(1).map(|more| iova.checked_add(more)) {
        None => Err(Bad::EmptyRange),
        Some(None) => Err(Bad::RangeTooLong),
        Some(Some(_)) => Ok(()),
    }
}
