//! Mappings in the plain model.

use super::model::{Going, Mapped, Model, space_key};
use super::*;

impl Model {
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
            && theirs.len() < self.quota.mappings as usize
            && bytes + size <= self.quota.mapped_bytes;
        let effects = self.apply(Request::Map { lease, iova, size, quota: self.quota });
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
}
