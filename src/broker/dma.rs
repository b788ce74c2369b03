//! MapDma and UnmapDma: mappings that the broker makes for a lease.

use super::access::quota;
use super::books::Entry;
use super::error::system;
use super::memory::{Memory, page_size};
use super::space::Space;
use super::{Broker, Caller, no_such_lease};
use crate::kernel::{Container, DmaMap, IommuInfo, Mapped, Unmap};
use crate::ledger::{Effect, Lease, Request, Space as Kind};
use crate::protocol::{Empty, Error, Handout, MapDma, UnmapDma, Unmapped};
use std::os::fd::{AsFd, OwnedFd};

impl Broker {
    /// Maps memory for a lease. Closes `memory`, which can block too.
    ///
    /// # Errors
    /// Nothing is mapped then.
    pub fn map_dma(
        &self,
        caller: &Caller,
        request: &MapDma,
        memory: OwnedFd,
    ) -> Result<Empty, Error> {
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        check_numbers(request)?;
        let memory = Memory::check(memory)?;
        memory.check_range(request.offset, request.size)?;
        let _files = entry.files();
        let space = self.own_space(&entry)?;
        let (Some(container), Some(info)) = (space.container(), space.info()?) else {
            return Err(no_such_lease(entry.id));
        };
        check_iommu(request, &info)?;
        let MapDma { iova, size, .. } = *request;
        self.enter_mapping(
            caller,
            Request::Map {
                lease: entry.id,
                iova,
                size,
                quota: quota(&self.limits_of(&entry.tenant)),
            },
        )?;
        let done = map(&container, request, &memory);
        let report = Request::MapDone { lease: entry.id, iova, made: done.is_ok() };
        // A report on what is in the ledger; it can't refuse.
        let _ = self.books().ledger.apply(report);
        done.map(|()| Empty {})
    }

    /// Takes a lease's mappings back, whole ones only.
    ///
    /// # Errors
    /// Where the kernel fails on one of several, the others are gone all the same.
    pub fn unmap_dma(&self, caller: &Caller, request: &UnmapDma) -> Result<Unmapped, Error> {
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        let _files = entry.files();
        let container = self.own_space(&entry)?.container();
        let container = container.ok_or_else(|| no_such_lease(entry.id))?;
        let UnmapDma { iova, size, .. } = *request;
        let request = Request::Unmap { lease: entry.id, iova, size };
        let effects = self.enter_mapping(caller, request)?;
        let (mut unmapped, mut failed) = (0, None);
        for effect in effects {
            let Effect::Unmap { iova, size } = effect else { continue };
            let done = container.unmap(&Unmap { flags: 0, iova, size });
            let report = Request::UnmapDone { lease: entry.id, iova, gone: done.is_ok() };
            let _ = self.books().ledger.apply(report);
            match done {
                Ok(bytes) => unmapped += bytes,
                Err(error) => drop(failed.get_or_insert(error)),
            }
        }
        failed.map_or(Ok(Unmapped { unmapped }), |error| Err(error.into()))
    }

    fn enter_mapping(&self, caller: &Caller, request: Request) -> Result<Vec<Effect>, Error> {
        let mut books = self.books();
        books.ledger.apply(request).map_err(|refusal| self.refused(caller, &books, refusal))
    }

    /// The address space of a lease, if the broker maps in it.
    fn own_space<'a>(&self, entry: &'a Entry) -> Result<&'a Space, Error> {
        let lease = self.books().ledger.live(entry.id).cloned();
        let lease = lease.ok_or_else(|| no_such_lease(entry.id))?;
        if let Some(error) = holder_maps(&lease) {
            return Err(error);
        }
        entry.space.as_deref().ok_or_else(|| no_such_lease(entry.id))
    }
}

/// Where the holder has the container itself, it maps for itself; why.
fn holder_maps(lease: &Lease) -> Option<Error> {
    let why = match (lease.handout, &lease.space) {
        _ if lease.noiommu => "there is no IOMMU: devices use physical addresses",
        (Handout::Devices, Kind::Shared { .. }) if !lease.broker_maps() => {
            "members of a mutual container map by themselves, with the container they were given: \
             the broker could not tell whose mappings are whose"
        }
        (Handout::Devices, _) => return None,
        (Handout::Iommufd, _) => {
            "the holder has the iommufd and maps by itself, with IOMMU_IOAS_MAP; the broker keeps no \
             copy of it"
        }
        _ => "with this handout the holder maps by itself; acquire with handout devices",
    };
    Some(Error::Unsupported { what: "MapDma".into(), why: why.into() })
}

fn check_numbers(request: &MapDma) -> Result<(), Error> {
    let MapDma { iova, size, read, write, .. } = *request;
    if !read && !write {
        return Err(Error::bad("read", "one of read and write is needed"));
    }
    if size == 0 {
        return Err(Error::bad("size", "is 0"));
    }
    if iova.checked_add(size - 1).is_none() {
        return Err(Error::bad("iova", "iova and size together pass 2^64"));
    }
    Ok(())
}

/// Against what the IOMMU says of itself, so that the answer can be better than EINVAL.
fn check_iommu(request: &MapDma, info: &IommuInfo) -> Result<(), Error> {
    let MapDma { iova, size, .. } = *request;
    let smallest = 1u64.checked_shl(info.pgsizes.trailing_zeros()).unwrap_or_else(page_size);
    for (field, value) in [("iova", iova), ("size", size)] {
        if value % smallest != 0 {
            let reason = format!("0x{value:x} is no multiple of the IOMMU's page, 0x{smallest:x}");
            return Err(Error::bad(field, reason));
        }
    }
    let last = iova + (size - 1);
    let ranges = &info.iova_ranges;
    if !ranges.is_empty() && !ranges.iter().any(|r| r.start <= iova && last <= r.end) {
        let each = ranges.iter().map(|r| format!("0x{:x}-0x{:x}", r.start, r.end));
        let each = each.collect::<Vec<_>>().join(", ");
        let reason = format!("0x{iova:x}-0x{last:x} is not within what can be mapped: {each}");
        return Err(Error::bad("iova", reason));
    }
    Ok(())
}

/// Pins the memory. The broker's own mapping of it is needed only while the kernel does that.
fn map(container: &Container, request: &MapDma, memory: &Memory) -> Result<(), Error> {
    let MapDma { iova, size, read, write, offset, .. } = *request;
    let len = usize::try_from(size).map_err(|_| Error::bad("size", "is too large"))?;
    let mapped = Mapped::file(memory.fd.as_fd(), offset, len, write)
        .map_err(|errno| system("mmap", "memory", errno))?;
    let flags = [(read, DmaMap::READ), (write, DmaMap::WRITE)];
    let flags = flags.iter().filter(|(on, _)| *on).fold(0, |sum, (_, flag)| sum | flag);
    container.map(&DmaMap { flags, vaddr: mapped.vaddr(), iova, size })?;
    Ok(())
}
