//! The type1 IOMMU driver: an address space and its mappings.

use super::container::{ContainerId, Iommu};
use super::dirty::{MOST_BITMAP, check_bitmap, dirty_pages, report_dirty};
use super::memlock::PAGE;
use super::{CallArg, Caller, Done, Machine, Mm, UserStruct};
use crate::kernel::request;
use crate::sim::topology::Topology;
use nix::errno::Errno;
use std::collections::BTreeMap;
use vfio_bindings::bindings::vfio as uapi;

/// One address space.
#[derive(Debug)]
pub(super) struct Type1 {
    pub(super) v2: bool,
    pub(super) mappings: BTreeMap<u64, Mapping>,
    page_sizes: u64,
    limit: u32,
    pub(super) tracking: bool,
    /// What can be mapped, first and last address, ascending.
    pub(super) ranges: Vec<(u64, u64)>,
}

/// A mapping, by its first address.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) size: u64,
    vaddr: u64,
    /// Whether its address has been taken away (`VFIO_DMA_UNMAP_FLAG_VADDR`).
    invalid: bool,
    /// Whose memory is pinned.
    pub(super) mm: Mm,
    /// How many bytes that address space is charged.
    pub(super) charged: u64,
    /// Its dirty pages, with a word to spare; empty while nothing is tracked.
    pub(super) dirty: Vec<u64>,
}

impl Mapping {
    pub(super) fn track(&mut self, page: u64) {
        self.dirty = vec![0; (self.size / page).div_ceil(64) as usize + 1];
    }
}

impl Type1 {
    pub(super) fn new(v2: bool, topology: &Topology) -> Self {
        Self {
            v2,
            mappings: BTreeMap::new(),
            page_sizes: topology.page_sizes.iter().fold(0, |bits, size| bits | size),
            limit: topology.dma_entry_limit,
            tracking: false,
            ranges: Vec::new(),
        }
    }

    pub(super) fn mapped_bytes(&self) -> u64 {
        self.mappings.values().map(|mapping| mapping.size).sum()
    }

    pub(super) fn charged_bytes(&self) -> u64 {
        self.mappings.values().map(|mapping| mapping.charged).sum()
    }

    pub(super) fn has_invalid(&self) -> bool {
        self.mappings.values().any(|mapping| mapping.invalid)
    }

    /// Whether a mapping lies where a group that is to be attached could not reach it.
    pub(super) fn conflicts(&self, unusable: &[(u64, u64)]) -> bool {
        unusable.iter().any(|&(start, end)| self.first_in(start, end).is_some())
    }

    pub(super) fn page(&self) -> u64 {
        1 << self.page_sizes.trailing_zeros().min(63)
    }

    fn available(&self) -> u32 {
        self.limit.saturating_sub(u32::try_from(self.mappings.len()).unwrap_or(u32::MAX))
    }

    /// The first mapping that touches `first..=last`, with its address.
    fn first_in(&self, first: u64, last: u64) -> Option<u64> {
        let before = self.mappings.range(..=first).next_back();
        let reaches = |(iova, mapping): &(&u64, &Mapping)| *iova + (mapping.size - 1) >= first;
        let found = before.filter(reaches).or_else(|| self.mappings.range(first..=last).next());
        found.map(|(iova, _)| *iova)
    }

    /// Whether every mapping ends before the next one begins.
    #[cfg(test)]
    pub(super) fn no_overlap(&self) -> bool {
        let ends = self.mappings.iter().map(|(iova, mapping)| iova + (mapping.size - 1));
        ends.zip(self.mappings.keys().skip(1)).all(|(end, next)| end < *next)
    }

    /// Whether a range would cut a mapping in two at either end.
    pub(super) fn bisects(&self, first: u64, last: u64) -> bool {
        let cut_at_start = self.first_in(first, first).is_some_and(|iova| iova != first);
        let ends_elsewhere = |iova: u64| {
            self.mappings.get(&iova).is_some_and(|mapping| iova + (mapping.size - 1) != last)
        };
        cut_at_start || self.first_in(last, last).is_some_and(ends_elsewhere)
    }
}

impl Machine {
    pub(super) fn type1_ioctl(
        &mut self,
        id: ContainerId,
        number: u32,
        arg: &mut CallArg,
        caller: &dyn Caller,
    ) -> Result<Done, Errno> {
        let result = match number {
            _ if number == request::IOMMU_GET_INFO.number => {
                let pads = self.profile().pads_capabilities();
                self.type1(id).and_then(|type1| get_info(type1, pads, arg.user()?))
            }
            _ if number == request::IOMMU_MAP_DMA.number => self.map_dma(id, arg, caller),
            _ if number == request::IOMMU_UNMAP_DMA.number => self.unmap_dma(id, arg),
            _ if number == request::IOMMU_DIRTY_PAGES.number => {
                let knows_overflow = self.profile().knows_overflow();
                self.type1(id).and_then(|type1| dirty_pages(type1, knows_overflow, arg))
            }
            _ => Err(Errno::ENOTTY),
        };
        result.map(|()| Done::default())
    }

    pub(super) fn type1(&mut self, id: ContainerId) -> Result<&mut Type1, Errno> {
        match self.containers.get_mut(&id).and_then(|container| container.iommu.as_mut()) {
            Some(Iommu::Type1(type1)) => Ok(type1),
            _ => Err(Errno::EINVAL),
        }
    }

    fn map_dma(
        &mut self,
        id: ContainerId,
        arg: &mut CallArg,
        caller: &dyn Caller,
    ) -> Result<(), Errno> {
        const READ: u32 = uapi::VFIO_DMA_MAP_FLAG_READ;
        const WRITE: u32 = uapi::VFIO_DMA_MAP_FLAG_WRITE;
        const VADDR: u32 = uapi::VFIO_DMA_MAP_FLAG_VADDR;
        let user = arg.user()?;
        let flags = user.u32(4);
        if user.argsz() < 32 || flags & !(READ | WRITE | VADDR) != 0 {
            return Err(Errno::EINVAL);
        }
        let (vaddr, iova, size) = (user.u64(8), user.u64(16), user.u64(24));
        let wraps = |start: u64| size != 0 && start.checked_add(size - 1).is_none();
        let overflow = wraps(iova) || wraps(vaddr);
        if self.profile().knows_overflow() {
            if size == 0 {
                return Err(Errno::EINVAL);
            }
            if overflow {
                return Err(Errno::EOVERFLOW);
            }
        }
        if (flags & (READ | WRITE) != 0) == (flags & VADDR != 0) {
            return Err(Errno::EINVAL);
        }
        let type1 = self.type1(id)?;
        if size == 0 || (size | iova | vaddr) & (type1.page() - 1) != 0 || overflow {
            return Err(Errno::EINVAL);
        }
        let last = iova + (size - 1);
        let found = type1.first_in(iova, last);
        if flags & VADDR != 0 {
            let found = found.ok_or(Errno::ENOENT)?;
            return self.new_vaddr(id, found, (iova, size, vaddr), caller);
        }
        if found.is_some() {
            return Err(Errno::EEXIST);
        }
        if type1.available() == 0 {
            return Err(Errno::ENOSPC);
        }
        let inside = |&(start, end): &(u64, u64)| iova >= start && last <= end;
        if !type1.ranges.iter().any(inside) {
            return Err(Errno::EINVAL);
        }
        // Pages are pinned one after the other: what comes first, the end of the limit or of the
        // memory, says which error it is.
        let accessible = caller.accessible(vaddr, size, flags & WRITE != 0) & !(PAGE - 1);
        self.charge(caller, accessible.min(size))?;
        if accessible < size {
            self.uncharge(caller.mm(), accessible);
            return Err(Errno::EFAULT);
        }
        let mm = caller.mm();
        let type1 = self.type1(id)?;
        let mut mapping =
            Mapping { size, vaddr, invalid: false, mm, charged: size, dirty: Vec::new() };
        if type1.tracking {
            mapping.track(type1.page());
        }
        type1.mappings.insert(iova, mapping);
        Ok(())
    }

    /// `VFIO_DMA_MAP_FLAG_VADDR`: a new address, and the charge goes to whoever gives it.
    fn new_vaddr(
        &mut self,
        id: ContainerId,
        found: u64,
        (iova, size, vaddr): (u64, u64, u64),
        caller: &dyn Caller,
    ) -> Result<(), Errno> {
        let mm = caller.mm();
        let mapping = self.type1(id)?.mappings.get(&found).ok_or(Errno::ENOENT)?;
        if !mapping.invalid || found != iova || mapping.size != size {
            return Err(Errno::EINVAL);
        }
        let (old, charged) = (mapping.mm, mapping.charged);
        if old != mm {
            self.charge(caller, charged)?;
            self.uncharge(old, charged);
        }
        if let Some(mapping) = self.type1(id)?.mappings.get_mut(&found) {
            (mapping.mm, mapping.vaddr, mapping.invalid) = (mm, vaddr, false);
        }
        Ok(())
    }

    fn unmap_dma(&mut self, id: ContainerId, arg: &mut CallArg) -> Result<(), Errno> {
        const BITMAP: u32 = uapi::VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
        const ALL: u32 = uapi::VFIO_DMA_UNMAP_FLAG_ALL;
        const VADDR: u32 = uapi::VFIO_DMA_UNMAP_FLAG_VADDR;
        let knows_overflow = self.profile().knows_overflow();
        let type1 = self.type1(id)?;
        let user = arg.user()?;
        let flags = user.u32(4);
        if user.argsz() < 24 || flags & !(BITMAP | ALL | VADDR) != 0 {
            return Err(Errno::EINVAL);
        }
        if flags & BITMAP != 0 && flags & (ALL | VADDR) != 0 {
            return Err(Errno::EINVAL);
        }
        let (iova, size) = (user.u64(8), user.u64(16));
        let page = type1.page();
        if flags & BITMAP != 0 {
            if user.argsz() < 48 {
                return Err(Errno::EINVAL);
            }
            check_bitmap(size, user.u64(24), user.u64(32))?;
        }
        if iova & (page - 1) != 0 {
            return Err(Errno::EINVAL);
        }
        let last = if flags & ALL != 0 {
            if iova != 0 || size != 0 {
                return Err(Errno::EINVAL);
            }
            u64::MAX
        } else {
            if size == 0 || size & (page - 1) != 0 {
                return Err(Errno::EINVAL);
            }
            let overflow = if knows_overflow { Errno::EOVERFLOW } else { Errno::EINVAL };
            iova.checked_add(size - 1).ok_or(overflow)?
        };
        if flags & BITMAP != 0 && (!type1.tracking || user.u64(24) != page) {
            return Err(Errno::EINVAL);
        }
        if type1.v2 && flags & ALL == 0 && type1.bisects(iova, last) {
            return Err(Errno::EINVAL);
        }
        // Version 1 takes whole mappings from their first address on, and none that the range
        // begins inside of.
        let hit: Vec<u64> = match type1.first_in(iova, last) {
            Some(first) if first >= iova => {
                type1.mappings.range(first..=last).map(|(iova, _)| *iova).collect()
            }
            _ => Vec::new(),
        };
        let sum = |type1: &Type1| -> u64 {
            hit.iter().filter_map(|iova| type1.mappings.get(iova)).map(|it| it.size).sum()
        };
        if flags & VADDR != 0 {
            let twice = hit.iter().any(|at| type1.mappings.get(at).is_some_and(|it| it.invalid));
            if twice {
                return Err(Errno::EINVAL);
            }
            let unmapped = sum(type1);
            for at in &hit {
                if let Some(mapping) = type1.mappings.get_mut(at) {
                    mapping.invalid = true;
                }
            }
            user.set_u64(16, unmapped);
            return Ok(());
        }
        let unmapped = sum(type1);
        let mut uncharged = Vec::new();
        let mut result = Ok(());
        for at in &hit {
            if flags & BITMAP != 0
                && let Some(mapping) = type1.mappings.get_mut(at)
            {
                result = report_dirty(user, mapping, (at - iova) / page, page);
                if result.is_err() {
                    break;
                }
            }
            uncharged.extend(type1.mappings.remove(at).map(|it| (it.mm, it.charged)));
        }
        if result.is_ok() {
            user.set_u64(16, unmapped);
        }
        for (mm, bytes) in uncharged {
            self.uncharge(mm, bytes);
        }
        result
    }
}

fn get_info(type1: &Type1, pads: bool, user: &mut UserStruct) -> Result<(), Errno> {
    // argsz, flags, page sizes; then the offset of the capabilities and padding.
    const FIRST: usize = 16;
    const WHOLE: usize = 24;
    let argsz = user.argsz();
    if argsz < FIRST {
        return Err(Errno::EINVAL);
    }
    let chain = capabilities(type1, pads);
    let mut info = [0u8; WHOLE];
    let mut wanted = argsz;
    let mut offset = 0;
    if argsz < WHOLE + chain.len() {
        wanted = WHOLE + chain.len();
    } else {
        offset = WHOLE;
        user.copy_out(WHOLE, &chain);
    }
    let flags = uapi::VFIO_IOMMU_INFO_PGSIZES | uapi::VFIO_IOMMU_INFO_CAPS;
    info[0..4].copy_from_slice(&(wanted as u32).to_ne_bytes());
    info[4..8].copy_from_slice(&flags.to_ne_bytes());
    info[8..16].copy_from_slice(&type1.page_sizes.to_ne_bytes());
    info[16..20].copy_from_slice(&(offset as u32).to_ne_bytes());
    user.copy_out(0, &info[..argsz.min(WHOLE)]);
    Ok(())
}

/// Migration, available mappings and IOVA ranges, in the kernel's order, offsets counted from the
/// start of the struct.
fn capabilities(type1: &Type1, pads: bool) -> Vec<u8> {
    let mut chain = Vec::new();
    let mut add = |id: u32, last: bool, body: &[u8]| {
        let end = 24 + chain.len() + 8 + body.len();
        let next = if last { 0 } else { end as u32 };
        chain.extend_from_slice(&(id as u16).to_ne_bytes());
        chain.extend_from_slice(&1u16.to_ne_bytes());
        chain.extend_from_slice(&next.to_ne_bytes());
        chain.extend_from_slice(body);
    };
    let no_ranges = type1.ranges.is_empty();
    let mut migration = vec![0; 8];
    migration.extend_from_slice(&type1.page().to_ne_bytes());
    migration.extend_from_slice(&MOST_BITMAP.to_ne_bytes());
    add(uapi::VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, false, &migration);
    let mut available = type1.available().to_ne_bytes().to_vec();
    if pads {
        available.extend_from_slice(&[0; 4]);
    }
    add(uapi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, no_ranges, &available);
    if !no_ranges {
        let mut ranges = (type1.ranges.len() as u64).to_ne_bytes().to_vec();
        for (start, end) in &type1.ranges {
            ranges.extend_from_slice(&start.to_ne_bytes());
            ranges.extend_from_slice(&end.to_ne_bytes());
        }
        add(uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, true, &ranges);
    }
    chain
}
