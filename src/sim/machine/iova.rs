//! Which addresses a container can map: the aperture without what its groups have reserved.

use super::Machine;
use super::container::ContainerId;

impl Machine {
    /// What no group in the list may be given: outside the aperture, and reserved.
    pub(super) fn unusable(&self, groups: &[u32]) -> Vec<(u64, u64)> {
        let (first, last) = self.topology.aperture;
        let mut unusable = Vec::new();
        unusable.extend(first.checked_sub(1).map(|end| (0, end)));
        unusable.extend(last.checked_add(1).map(|start| (start, u64::MAX)));
        let of_groups = groups.iter().filter_map(|id| self.groups.get(id));
        let reserved = of_groups.flat_map(|group| &group.facts.reserved);
        for region in self.topology.reserved.iter().chain(reserved) {
            // Relaxable regions may be given away.
            if region.kind != "direct-relaxable" {
                unusable.push((region.start, region.end));
            }
        }
        unusable.sort_unstable();
        unusable
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
