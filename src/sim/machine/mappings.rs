//! The calls that map and unmap in an iommufd.

use super::ioas::{Area, PagesId};
use super::iommufd::{Context, Kind};
use super::memlock::{Accounts, PAGE};
use super::pages::{Pages, Source};
use super::{Caller, Named, UserStruct};
use crate::kernel::MapFlags;
use nix::errno::Errno;

/// What `IOMMU_IOAS_MAP` and its like have in common.
struct Order {
    flags: u32,
    ioas: u32,
    size: u64,
    iova: u64,
}

/// # Errors
/// EOPNOTSUPP flags; EOVERFLOW; EINVAL neither read nor write.
fn check_order(flags: u32, numbers: &[u64]) -> Result<(), Errno> {
    if flags & !(MapFlags::FIXED_IOVA | MapFlags::WRITE | MapFlags::READ) != 0 {
        return Err(Errno::EOPNOTSUPP);
    }
    if numbers.contains(&u64::MAX) {
        return Err(Errno::EOVERFLOW);
    }
    if flags & (MapFlags::WRITE | MapFlags::READ) == 0 {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

impl Context {
    pub(super) fn iova_ranges(&mut self, user: &mut UserStruct) -> Result<(), Errno> {
        if user.u32(12) != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        let ioas = self.ioas(user.u32(4))?;
        let (ranges, alignment) = (ioas.ranges(), ioas.alignment());
        let room = user.u32(8) as usize;
        for (i, (first, last)) in ranges.iter().take(room).enumerate() {
            let entry = [first.to_ne_bytes(), last.to_ne_bytes()].concat();
            let out = user.out.as_mut().ok_or(Errno::EFAULT)?;
            out.get_mut(16 * i..16 * (i + 1)).ok_or(Errno::EFAULT)?.copy_from_slice(&entry);
        }
        user.set_u32(8, ranges.len() as u32);
        user.set_u64(24, alignment);
        if ranges.len() > room { Err(Errno::EMSGSIZE) } else { Ok(()) }
    }

    pub(super) fn allow_iovas(&mut self, user: &UserStruct) -> Result<(), Errno> {
        if user.u32(12) != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        let ioas = self.ioas(user.u32(4))?;
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for i in 0..user.u32(8) as usize {
            let out = user.out.as_deref().unwrap_or_default();
            let entry = out.get(16 * i..16 * (i + 1)).ok_or(Errno::EFAULT)?;
            let entry = UserStruct::new(entry.to_vec());
            let (first, last) = (entry.u64(0), entry.u64(8));
            let overlaps = ranges.iter().any(|&(start, end)| start <= last && first <= end);
            if first >= last || overlaps {
                return Err(Errno::EINVAL);
            }
            ranges.push((first, last));
        }
        ioas.allow(ranges)
    }

    pub(super) fn map(
        &mut self,
        accounts: &mut Accounts,
        user: &mut UserStruct,
        caller: &dyn Caller,
    ) -> Result<(), Errno> {
        let (flags, vaddr) = (user.u32(4), user.u64(16));
        let order = Order { flags, ioas: user.u32(8), size: user.u64(24), iova: user.u64(32) };
        if user.u32(12) != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        check_order(flags, &[order.iova, order.size])?;
        self.ioas(order.ioas)?;
        if order.size == 0 || order.size > u64::MAX - PAGE {
            return Err(Errno::EINVAL);
        }
        vaddr.checked_add(order.size).ok_or(Errno::EOVERFLOW)?;
        let source = Source::Process(vaddr & !(PAGE - 1));
        let iova = self.map_new(accounts, &order, source, vaddr % PAGE, caller)?;
        user.set_u64(32, iova);
        Ok(())
    }

    pub(super) fn map_file(
        &mut self,
        accounts: &mut Accounts,
        user: &mut UserStruct,
        caller: &dyn Caller,
    ) -> Result<(), Errno> {
        let (flags, start) = (user.u32(4), user.u64(16));
        let order = Order { flags, ioas: user.u32(8), size: user.u64(24), iova: user.u64(32) };
        check_order(flags, &[order.iova, order.size])?;
        self.ioas(order.ioas)?;
        if order.size == 0 {
            return Err(Errno::EINVAL);
        }
        start.checked_add(order.size - 1).ok_or(Errno::EOVERFLOW)?;
        let length = match user.fd(12)?.ok_or(Errno::EBADF)? {
            Named::Memory(length) => Some(length),
            _ => None,
        };
        if order.size > u64::MAX - PAGE {
            return Err(Errno::EINVAL);
        }
        let source = Source::File(start & !(PAGE - 1), length);
        let iova = self.map_new(accounts, &order, source, start % PAGE, caller)?;
        user.set_u64(32, iova);
        Ok(())
    }

    fn map_new(
        &mut self,
        accounts: &mut Accounts,
        order: &Order,
        source: Source,
        offset: u64,
        caller: &dyn Caller,
    ) -> Result<u64, Errno> {
        let writable = order.flags & MapFlags::WRITE != 0;
        let pages = Pages::new(source, writable, self.per_process, accounts, caller);
        let pages = self.add_pages(pages);
        let area = Area { size: order.size, pages, offset };
        let result = self.map_areas(accounts, order, &[area]);
        self.drop_unused_pages(pages);
        result
    }

    pub(super) fn copy(
        &mut self,
        accounts: &mut Accounts,
        user: &mut UserStruct,
    ) -> Result<(), Errno> {
        let (flags, source_iova) = (user.u32(4), user.u64(32));
        let order = Order { flags, ioas: user.u32(8), size: user.u64(16), iova: user.u64(24) };
        check_order(flags, &[order.size, source_iova, order.iova])?;
        let areas = self.ioas(user.u32(12))?.slices(source_iova, order.size)?;
        self.ioas(order.ioas)?;
        let iova = self.map_areas(accounts, &order, &areas)?;
        user.set_u64(24, iova);
        Ok(())
    }

    /// Maps slices of memory one after the other; returns the first one's address.
    fn map_areas(
        &mut self,
        accounts: &mut Accounts,
        order: &Order,
        areas: &[Area],
    ) -> Result<u64, Errno> {
        let first = areas.first().ok_or(Errno::EINVAL)?;
        let hint = self.pages.get(&first.pages).map_or(0, Pages::hint) + first.offset;
        let ioas = self.ioas(order.ioas)?;
        let alignment = ioas.alignment();
        if order.size & (alignment - 1) != 0 || order.size == 0 {
            return Err(Errno::EINVAL);
        }
        let iova = if order.flags & MapFlags::FIXED_IOVA == 0 {
            ioas.choose(hint, order.size)?
        } else {
            ioas.check(order.iova, order.size)?;
            order.iova
        };
        let filled = !ioas.tables.is_empty();
        for area in areas {
            let writable = self.pages.get(&area.pages).is_some_and(|pages| pages.writable);
            if order.flags & MapFlags::WRITE != 0 && !writable {
                return Err(Errno::EPERM);
            }
            if area.offset & (PAGE - 1) & (alignment - 1) != 0 {
                return Err(Errno::EINVAL);
            }
        }
        if filled {
            self.fill(accounts, areas)?;
        }
        let mut at = iova;
        for area in areas {
            if let Some(pages) = self.pages.get_mut(&area.pages) {
                pages.areas += 1;
            }
            self.ioas(order.ioas)?.areas.insert(at, *area);
            at = at.wrapping_add(area.size);
        }
        Ok(iova)
    }

    /// Pins slices of memory, all or none.
    pub(super) fn fill(&mut self, accounts: &mut Accounts, areas: &[Area]) -> Result<(), Errno> {
        for (nth, area) in areas.iter().enumerate() {
            let Some(pages) = self.pages.get_mut(&area.pages) else { continue };
            if let Err(errno) = pages.fill(accounts, area.range()) {
                self.unfill(accounts, &areas[..nth]);
                return Err(errno);
            }
        }
        Ok(())
    }

    pub(super) fn unfill(&mut self, accounts: &mut Accounts, areas: &[Area]) {
        for area in areas {
            if let Some(pages) = self.pages.get_mut(&area.pages) {
                pages.unfill(accounts, area.range());
            }
        }
    }

    fn drop_unused_pages(&mut self, id: PagesId) {
        if self.pages.get(&id).is_some_and(|pages| pages.areas == 0) {
            self.pages.remove(&id);
        }
    }

    pub(super) fn unmap(
        &mut self,
        accounts: &mut Accounts,
        user: &mut UserStruct,
    ) -> Result<(), Errno> {
        let (id, iova, size) = (user.u32(4), user.u64(8), user.u64(16));
        self.ioas(id)?;
        let all = iova == 0 && size == u64::MAX;
        let last = if all {
            u64::MAX
        } else {
            if iova == u64::MAX || size == u64::MAX {
                return Err(Errno::EOVERFLOW);
            }
            if size == 0 {
                return Err(Errno::EINVAL);
            }
            iova.checked_add(size - 1).ok_or(Errno::EOVERFLOW)?
        };
        let unmapped = self.unmap_range(accounts, id, iova, last)?;
        if unmapped == 0 && !all {
            return Err(Errno::ENOENT);
        }
        user.set_u64(16, unmapped);
        Ok(())
    }

    /// Unmaps one area after the other, until one reaches out of the range.
    ///
    /// # Errors
    /// ENOENT: one does; those before it are gone.
    pub(super) fn unmap_range(
        &mut self,
        accounts: &mut Accounts,
        id: u32,
        first: u64,
        last: u64,
    ) -> Result<u64, Errno> {
        let mut unmapped = 0;
        while let Some((iova, area)) = self.ioas(id)?.first_in(first, last) {
            if iova < first || iova + (area.size - 1) > last {
                return Err(Errno::ENOENT);
            }
            let ioas = self.ioas(id)?;
            ioas.areas.remove(&iova);
            if !ioas.tables.is_empty() {
                self.unfill(accounts, &[area]);
            }
            if let Some(pages) = self.pages.get_mut(&area.pages) {
                pages.areas -= 1;
            }
            self.drop_unused_pages(area.pages);
            unmapped += area.size;
        }
        Ok(unmapped)
    }

    pub(super) fn change_process(
        &mut self,
        accounts: &mut Accounts,
        user: &UserStruct,
        caller: &dyn Caller,
    ) -> Result<(), Errno> {
        if user.u32(4) != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        if !self.pages.values().all(Pages::is_file) {
            return Err(Errno::EINVAL);
        }
        // Charged anew before the old charge goes: in between both count.
        let mut charged = Vec::new();
        for pages in self.pages.values() {
            let (payer, bytes) = pages.charge_of(caller);
            if let Err(errno) = accounts.charge(payer, accounts.limit(caller), bytes) {
                charged.iter().for_each(|&(payer, bytes)| accounts.uncharge(payer, bytes));
                return Err(errno);
            }
            charged.push((payer, bytes));
        }
        for (pages, (payer, _)) in self.pages.values_mut().zip(charged) {
            pages.move_to(accounts, payer, caller);
        }
        Ok(())
    }

    /// Every area of an IOAS.
    pub(super) fn areas(&self, ioas: u32) -> Vec<Area> {
        match self.objects.get(&ioas).map(|object| &object.kind) {
            Some(Kind::Ioas(ioas)) => ioas.areas.values().copied().collect(),
            _ => Vec::new(),
        }
    }
}
