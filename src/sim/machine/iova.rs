//! Which addresses devices can be given: the aperture without what their groups have reserved.

use super::Machine;
use super::container::ContainerId;

impl Machine {
    /// What no group in the list may be given: outside the aperture, and reserved.
    pub(super) fn unusable(&self, groups: &[u32]) -> Vec<(u64, u64)> {
        let (first, last) = self.topology.aperture;
        let mut unusable = Vec::new();
        unusable.extend(first.checked_sub(1).map(|end| (0, end)));
        unusable.extend(last.checked_add(1).map(|start| (start, u64::MAX)));
        unusable.extend(self.reserved_of(groups));
        unusable.sort_unstable();
        unusable
    }

    /// What no device of these groups may be given within the aperture.
    pub(super) fn reserved_of(&self, groups: &[u32]) -> Vec<(u64, u64)> {
        let of_groups = groups.iter().filter_map(|id| self.groups.get(id));
        let own = of_groups.flat_map(|group| &group.facts.reserved);
        let all = self.topology.reserved.iter().chain(own);
        // Relaxable regions may be given away.
        let hard = all.filter(|region| region.kind != "direct-relaxable");
        hard.map(|region| (region.start, region.end)).collect()
    }

    /// The smallest page of the IOMMU.
    pub(super) fn page(&self) -> u64 {
        self.topology.page_sizes.iter().copied().min().unwrap_or(super::memlock::PAGE)
    }

    /// Works out anew what can be mapped, after groups have come or gone.
    pub(super) fn refresh_ranges(&mut self, id: ContainerId) {
        let Some(container) = self.containers.get(&id) else { return };
        let unusable = self.unusable(&container.groups);
        let mut ranges = Vec::new();
        let mut next = Some(0u64);
        for (start, end) in unusable {
            if let Some(free) = next.filter(|&free| free < start) {
                ranges.push((free, start - 1));
            }
            next = next.and_then(|free| Some(free.max(end.checked_add(1)?)));
        }
        ranges.extend(next.map(|free| (free, u64::MAX)));
        if let Ok(type1) = self.type1(id) {
            type1.ranges = ranges;
        }
    }
}
