//! Mappings that a keeper makes for its leases, pinned from its own memory.

use super::Keeper;
use super::memory::{Memory, page_size};
use super::permit::Client;
use crate::kernel::{self, DmaMap, IommuInfo, Mapped};
use crate::process::keeper::{
    Changed, Failure, Map, Mappings, MappingsPage, Phase, Unmap, Unmapped,
};
use std::os::fd::{AsFd, OwnedFd};

/// How many mappings are told in one go.
const PAGE: usize = 1000;

impl Keeper {
    /// Maps a peer's memory, which is in the queue of a socket, for a client that may have it mapped. On an
    /// error nothing is mapped.
    pub(super) fn map(&mut self, call: &Map, queue: &OwnedFd) -> Result<Changed, Failure> {
        let name = &call.lease;
        let memory = Memory::take(queue, call.memory)?;
        memory.check_range(call.offset, call.size)?;
        let container = self.container.as_mut().ok_or(Failure::NoSuchLease)?;
        check_iommu(call, container.info()?)?;
        self.begin(name, "VFIO_IOMMU_MAP_DMA", format!("0x{:x}", call.iova));
        let _ = self.save();
        let done = self.pin(call, &memory);
        if done.is_ok() {
            self.lease_mut(name)?.mappings.insert(call.iova, call.size);
        }
        self.done(name);
        let _ = self.save();
        done?;
        self.told(name)
    }

    /// The keeper's own mapping of the memory is needed only while the kernel pins it.
    fn pin(&self, call: &Map, memory: &Memory) -> Result<(), Failure> {
        let Map { iova, size, read, write, offset, .. } = *call;
        let too_large = |_| Failure::Bad { field: "size".into(), reason: "is too large".into() };
        let len = usize::try_from(size).map_err(too_large)?;
        let mapped = Mapped::file(memory.fd.as_fd(), offset, len, write)
            .map_err(|errno| kernel::Error::new("mmap", "memory", errno))?;
        let flags = [(read, DmaMap::READ), (write, DmaMap::WRITE)];
        let flags = flags.iter().filter(|(on, _)| *on).fold(0, |sum, (_, flag)| sum | flag);
        let container = self.container.as_ref().ok_or(Failure::NoSuchLease)?;
        container.file.map(&DmaMap { flags, vaddr: mapped.vaddr(), iova, size })?;
        Ok(())
    }

    /// Unmaps one mapping.
    pub(super) fn unmap(&mut self, call: &Unmap, client: &Client) -> Result<Unmapped, Failure> {
        let name = &call.lease;
        self.check_holder(name, client)?;
        self.begin(name, "VFIO_IOMMU_UNMAP_DMA", format!("0x{:x}", call.iova));
        let _ = self.save();
        let container = self.container.as_ref().ok_or(Failure::NoSuchLease)?;
        let unmap = kernel::Unmap { flags: 0, iova: call.iova, size: call.size };
        let done = container.file.unmap(&unmap);
        if done.is_ok() {
            self.lease_mut(name)?.mappings.remove(&call.iova);
        }
        self.done(name);
        let _ = self.save();
        Ok(Unmapped { unmapped: done?, state: self.told(name)?.state })
    }

    /// The mappings of a lease, from an address on.
    pub(super) fn mappings(&self, call: &Mappings) -> Result<MappingsPage, Failure> {
        let mappings = self.lease(&call.lease)?.mappings.range(call.from..).take(PAGE);
        Ok(MappingsPage { mappings: mappings.map(|(iova, size)| (*iova, *size)).collect() })
    }

    /// Whether a client may map and unmap for a lease.
    pub(super) fn check_holder(&self, name: &str, client: &Client) -> Result<(), Failure> {
        let state = &self.lease(name)?.state;
        match state.phase == Phase::Held && state.record.keeper_maps() {
            true => self.permit_holder(&state.record, client),
            false => Err(Failure::NoSuchLease),
        }
    }
}

/// Against what the IOMMU says of itself, so that the answer can be better than EINVAL.
fn check_iommu(call: &Map, info: &IommuInfo) -> Result<(), Failure> {
    let bad = |field: &str, reason: String| Failure::Bad { field: field.into(), reason };
    let Map { iova, size, .. } = *call;
    let smallest = 1u64.checked_shl(info.pgsizes.trailing_zeros()).unwrap_or_else(page_size);
    for (field, value) in [("iova", iova), ("size", size)] {
        if value % smallest != 0 {
            let reason = format!("0x{value:x} is no multiple of the IOMMU's page, 0x{smallest:x}");
            return Err(bad(field, reason));
        }
    }
    let last = size.checked_sub(1).and_then(|more| iova.checked_add(more));
    let last = last.ok_or_else(|| bad("size", "is 0, or passes 2^64".into()))?;
    let ranges = &info.iova_ranges;
    if !ranges.is_empty() && !ranges.iter().any(|r| r.start <= iova && last <= r.end) {
        let each = ranges.iter().map(|r| format!("0x{:x}-0x{:x}", r.start, r.end));
        let each = each.collect::<Vec<_>>().join(", ");
        let reason = format!("0x{iova:x}-0x{last:x} is not within what can be mapped: {each}");
        return Err(bad("iova", reason));
    }
    Ok(())
}
