//! An address space of an iommufd (`struct io_pagetable`): which addresses are mapped, reserved and
//! free. What lies behind a mapping is not its business.

use super::memlock::PAGE;
use super::pages::merged;
use nix::errno::Errno;
use std::collections::BTreeMap;

/// Transparent huge pages: no address is aligned to more.
const HUGE_PAGE: u64 = 2 << 20;

/// Memory, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PagesId(pub(super) u64);

/// A mapping, by its first address: a slice of some memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) size: u64,
    pub(super) pages: PagesId,
    /// Where in the memory it begins, in bytes.
    pub(super) offset: u64,
}

impl Area {
    /// Its first and last page in the memory.
    pub(super) fn range(&self) -> (u64, u64) {
        (self.offset / PAGE, (self.offset + (self.size - 1)) / PAGE)
    }
}

/// Who reserves addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// A page table: what is outside of its aperture.
    Table(u32),
    /// An attached device: what it can't use.
    Device(u32),
}

/// An address space.
#[derive(Debug)]
pub(super) struct Ioas {
    pub(super) areas: BTreeMap<u64, Area>,
    reserved: Vec<(u64, u64, Owner)>,
    allowed: Vec<(u64, u64)>,
    /// Its page tables: objects of the iommufd.
    pub(super) tables: Vec<u32>,
    pub(super) large_pages: bool,
    /// The smallest page of the machine's page tables.
    page: u64,
}

impl Ioas {
    pub(super) fn new(page: u64) -> Self {
        Self {
            areas: BTreeMap::new(),
            reserved: Vec::new(),
            allowed: Vec::new(),
            tables: Vec::new(),
            large_pages: true,
            page,
        }
    }

    /// What addresses and lengths are multiples of.
    pub(super) fn alignment(&self) -> u64 {
        let without_table = if self.large_pages { 1 } else { PAGE };
        if self.tables.is_empty() { without_table } else { self.page.max(without_table) }
    }

    /// Whether everything that is mapped is a multiple of `alignment`.
    ///
    /// # Errors
    /// EADDRINUSE: it is not.
    pub(super) fn check_alignment(&self, alignment: u64) -> Result<(), Errno> {
        let fits =
            |(iova, area): (&u64, &Area)| (iova | area.size | area.offset) & (alignment - 1) == 0;
        if self.areas.iter().all(fits) { Ok(()) } else { Err(Errno::EADDRINUSE) }
    }

    /// Whether it would be with one more page table.
    pub(super) fn check_alignment_with_table(&self) -> Result<(), Errno> {
        self.check_alignment(self.page.max(self.alignment()))
    }

    /// The first area that touches `first..=last`, with its address.
    pub(super) fn first_in(&self, first: u64, last: u64) -> Option<(u64, Area)> {
        let before = self.areas.range(..=first).next_back();
        let reaches = |(iova, area): &(&u64, &Area)| *iova + (area.size - 1) >= first;
        let found = before.filter(reaches).or_else(|| self.areas.range(first..=last).next());
        found.map(|(iova, area)| (*iova, *area))
    }

    /// Whether an area can be at an address.
    ///
    /// # Errors
    /// EINVAL not aligned, or reserved; EOVERFLOW; EEXIST.
    pub(super) fn check(&self, iova: u64, size: u64) -> Result<(), Errno> {
        if iova & (self.alignment() - 1) != 0 {
            return Err(Errno::EINVAL);
        }
        let last = iova.checked_add(size - 1).ok_or(Errno::EOVERFLOW)?;
        if self.reserved.iter().any(|&(start, end, _)| start <= last && iova <= end) {
            return Err(Errno::EINVAL);
        }
        if self.first_in(iova, last).is_some() { Err(Errno::EEXIST) } else { Ok(()) }
    }

    /// A free address for `size` bytes of memory that begins at `start`: never 0.
    ///
    /// # Errors
    /// EOVERFLOW; EINVAL memory that is not aligned; ENOSPC.
    pub(super) fn choose(&self, start: u64, size: u64) -> Result<u64, Errno> {
        if size == 0 || size >= u64::MAX / 2 {
            return Err(Errno::EOVERFLOW);
        }
        let of_memory = if start == 0 { u64::MAX } else { 1 << start.trailing_zeros() };
        let alignment = size.next_power_of_two().min(of_memory).min(HUGE_PAGE);
        if alignment < self.alignment() {
            return Err(Errno::EINVAL);
        }
        let fit = |first: u64, last: u64| {
            let aligned = first.checked_add(alignment - 1)? & !(alignment - 1) | (start % PAGE);
            (aligned < last && last - aligned >= size - 1).then_some(aligned)
        };
        let all = (PAGE, u64::MAX - PAGE);
        let allowed = match self.allowed.as_slice() {
            [] => vec![all],
            ranges => merged(ranges),
        };
        let areas = self.areas.iter().map(|(iova, area)| (*iova, iova + (area.size - 1)));
        let used: Vec<_> =
            self.reserved.iter().map(|&(start, end, _)| (start, end)).chain(areas).collect();
        let holes = holes(&used);
        for (first, last) in allowed {
            let (first, last) = (first.max(all.0), last.min(all.1));
            let Some(first) = fit(first, last) else { continue };
            let inside = holes.iter().map(|&(start, end)| (start.max(first), end.min(last)));
            let found = inside.filter(|(start, end)| start <= end).find_map(|(s, e)| fit(s, e));
            if let Some(iova) = found {
                return Ok(iova);
            }
        }
        Err(Errno::ENOSPC)
    }

    /// What can be mapped, first and last address, ascending.
    pub(super) fn ranges(&self) -> Vec<(u64, u64)> {
        let reserved: Vec<_> = self.reserved.iter().map(|&(start, end, _)| (start, end)).collect();
        holes(&reserved)
    }

    /// Takes addresses away, unless they are used or promised.
    ///
    /// # Errors
    /// EADDRINUSE; what was reserved by this call stays until [`Ioas::unreserve`].
    pub(super) fn reserve(&mut self, ranges: &[(u64, u64)], owner: Owner) -> Result<(), Errno> {
        for &(first, last) in ranges {
            let promised = self.allowed.iter().any(|&(start, end)| start <= last && first <= end);
            if promised || self.first_in(first, last).is_some() {
                return Err(Errno::EADDRINUSE);
            }
            self.reserved.push((first, last, owner));
        }
        Ok(())
    }

    pub(super) fn unreserve(&mut self, owner: Owner) {
        self.reserved.retain(|(_, _, other)| *other != owner);
    }

    /// Promises addresses, in place of those promised before.
    ///
    /// # Errors
    /// EADDRINUSE: one is reserved.
    pub(super) fn allow(&mut self, ranges: Vec<(u64, u64)>) -> Result<(), Errno> {
        let taken = |&(first, last): &(u64, u64)| {
            self.reserved.iter().any(|&(start, end, _)| start <= last && first <= end)
        };
        if ranges.iter().any(taken) {
            return Err(Errno::EADDRINUSE);
        }
        self.allowed = ranges;
        Ok(())
    }

    /// The slices of memory that a range maps, without gaps.
    ///
    /// # Errors
    /// EINVAL nothing; EOVERFLOW; ENOENT a gap.
    pub(super) fn slices(&self, iova: u64, size: u64) -> Result<Vec<Area>, Errno> {
        if size == 0 {
            return Err(Errno::EINVAL);
        }
        let last = iova.checked_add(size - 1).ok_or(Errno::EOVERFLOW)?;
        let mut slices = Vec::new();
        let mut next = iova;
        loop {
            let (start, area) = self.first_in(next, last).ok_or(Errno::ENOENT)?;
            if start > next {
                return Err(Errno::ENOENT);
            }
            let end = (start + (area.size - 1)).min(last);
            let offset = area.offset + (next - start);
            slices.push(Area { size: end - next + 1, offset, ..area });
            if end == last {
                return Ok(slices);
            }
            next = end + 1;
        }
    }

    pub(super) fn mapped_bytes(&self) -> u64 {
        self.areas.values().map(|area| area.size).sum()
    }
}

/// What is between ranges, and before and after them.
fn holes(used: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut holes = Vec::new();
    let mut next = Some(0u64);
    for (first, last) in merged(used) {
        if let Some(free) = next.filter(|&free| free < first) {
            holes.push((free, first - 1));
        }
        next = next.and_then(|free| Some(free.max(last.checked_add(1)?)));
    }
    holes.extend(next.map(|free| (free, u64::MAX)));
    holes
}
