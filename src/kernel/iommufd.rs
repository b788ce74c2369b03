//! An iommufd: address spaces (IOAS) for devices that are opened by their cdevs, `/dev/iommu`.

use super::container::memlock_note;
use super::open_file::OpenFile;
use super::parse::{Fields, u32_at, u64_at};
use super::{Arg, Error, FdSlot, IovaRange, Kernel, Node, Request, Result, request};
use iommufd_bindings::iommufd as uapi;
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// `IOMMU_IOAS_MAP_*`: what a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFlags;

impl MapFlags {
    /// At the address given; without it the kernel chooses one.
    pub const FIXED_IOVA: u32 = uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA;
    /// The device may write the memory.
    pub const WRITE: u32 = uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;
    /// The device may read the memory.
    pub const READ: u32 = uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE;
}

/// `struct iommu_ioas_map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoasMap {
    /// [`MapFlags`].
    pub flags: u32,
    /// Address in the calling process, in bytes. Devices will access this memory outside of what
    /// the compiler can see: it should be shared memory that nothing here holds a reference to.
    pub vaddr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address that the device uses, in bytes; nothing without [`MapFlags::FIXED_IOVA`].
    pub iova: u64,
}

/// `struct iommu_ioas_map_file`, without the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoasMapFile {
    /// [`MapFlags`].
    pub flags: u32,
    /// Where in the file the mapping begins, in bytes.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address that the device uses, in bytes; nothing without [`MapFlags::FIXED_IOVA`].
    pub iova: u64,
}

/// `struct iommu_ioas_copy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoasCopy {
    /// [`MapFlags`].
    pub flags: u32,
    /// The IOAS that the mappings go to.
    pub to: u32,
    /// The IOAS that has them.
    pub from: u32,
    /// Length in bytes.
    pub size: u64,
    /// Where they go, in bytes; nothing without [`MapFlags::FIXED_IOVA`].
    pub to_iova: u64,
    /// Where they are, in bytes.
    pub from_iova: u64,
}

/// What `IOMMU_IOAS_IOVA_RANGES` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoasRanges {
    /// Addresses that can be mapped.
    pub ranges: Vec<IovaRange>,
    /// What mappings are multiples of, in bytes.
    pub alignment: u64,
}

/// An open iommufd. Dropping it closes this copy of the open file; the last one to go, bound
/// devices' included, takes all address spaces and mappings with it.
///
/// Objects in it, address spaces as well as devices and page tables, are known by number.
#[derive(Debug)]
pub struct Iommufd(OpenFile);

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Iommufd> for OwnedFd {
    fn from(iommufd: Iommufd) -> OwnedFd {
        iommufd.0.into()
    }
}

const OBJECT: &str = "iommufd";

impl Iommufd {
    /// Opens `/dev/iommu`: a new, empty iommufd.
    ///
    /// # Errors
    /// ENOENT a kernel without iommufd, EACCES without rights to the node.
    pub fn open(kernel: Arc<dyn Kernel>) -> Result<Self> {
        OpenFile::open(kernel, &Node::Iommu, OBJECT).map(Self)
    }

    /// An iommufd that somebody handed over; takes the fd.
    pub fn from_fd(kernel: Arc<dyn Kernel>, fd: OwnedFd) -> Self {
        Self(OpenFile::new(kernel, fd, OBJECT))
    }

    /// `IOMMU_OPTION`, RLIMIT_MODE: pinned memory is charged to each process that maps it rather
    /// than to its user, whose processes share one count otherwise.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_RESOURCE; EBUSY the iommufd is not empty.
    pub fn set_rlimit_mode(&self, per_process: bool) -> Result<()> {
        self.option(uapi::iommufd_option_ops_IOMMU_OPTION_OP_SET, per_process.into()).map(drop)
    }

    /// Whether pinned memory is charged to each process; see [`Iommufd::set_rlimit_mode`].
    pub fn rlimit_mode(&self) -> Result<bool> {
        self.option(uapi::iommufd_option_ops_IOMMU_OPTION_OP_GET, 0).map(|value| value != 0)
    }

    fn option(&self, op: u32, value: u64) -> Result<u64> {
        // The operation has 16 bits, the next 16 are reserved.
        let mut bytes = Fields::with_argsz()
            .u32(uapi::iommufd_option_IOMMU_OPTION_RLIMIT_MODE)
            .bytes(&(op as u16).to_ne_bytes())
            .bytes(&[0; 2])
            .u32(0)
            .u64(value)
            .done();
        self.0.call_struct(request::IOMMU_OPTION, &mut bytes)?;
        Ok(u64_at(&bytes, 16))
    }

    /// `IOMMU_IOAS_ALLOC`: makes an empty address space; returns its id.
    pub fn ioas_alloc(&self) -> Result<u32> {
        let mut bytes = Fields::with_argsz().u32(0).u32(0).done();
        self.0.call_struct(request::IOAS_ALLOC, &mut bytes)?;
        Ok(u32_at(&bytes, 8))
    }

    /// `IOMMU_IOAS_IOVA_RANGES`: which addresses can be mapped, given the devices that are attached
    /// now.
    ///
    /// # Errors
    /// ENOENT no such IOAS.
    pub fn ioas_iova_ranges(&self, ioas: u32) -> Result<IoasRanges> {
        let mut room = 8;
        loop {
            let mut list = vec![0; 16 * room];
            let mut bytes =
                Fields::with_argsz().u32(ioas).u32(room as u32).u32(0).u64(0).u64(0).done();
            let arg = Arg::Struct { bytes: &mut bytes, fds: &[], out: Some((16, &mut list)) };
            let asked = self.0.call(request::IOAS_IOVA_RANGES, arg);
            let count = u32_at(&bytes, 8) as usize;
            match asked {
                Err(error) if error.errno == Errno::EMSGSIZE && count > room && count <= 4096 => {
                    room = count;
                }
                Err(error) => return Err(error),
                Ok(_) => {
                    let range = |i: usize| IovaRange {
                        start: u64_at(&list, 16 * i),
                        end: u64_at(&list, 16 * i + 8),
                    };
                    let ranges = (0..count.min(room)).map(range).collect();
                    return Ok(IoasRanges { ranges, alignment: u64_at(&bytes, 24) });
                }
            }
        }
    }

    /// `IOMMU_IOAS_ALLOW_IOVAS`: what must stay mappable, whatever is attached later, and what the
    /// kernel chooses addresses from; an empty list for no such promise.
    ///
    /// # Errors
    /// ENOENT no such IOAS; EINVAL ranges that overlap; EADDRINUSE one that can't be mapped now.
    pub fn ioas_allow_iovas(&self, ioas: u32, ranges: &[IovaRange]) -> Result<()> {
        let ends = ranges.iter().flat_map(|range| [range.start, range.end]);
        let mut list: Vec<u8> = ends.flat_map(u64::to_ne_bytes).collect();
        let mut bytes =
            Fields::with_argsz().u32(ioas).u32(ranges.len() as u32).u32(0).u64(0).done();
        let arg = Arg::Struct { bytes: &mut bytes, fds: &[], out: Some((16, &mut list)) };
        self.0.call(request::IOAS_ALLOW_IOVAS, arg).map(drop)
    }

    /// `IOMMU_IOAS_MAP`: lets devices reach this process's memory; returns the address. It is
    /// pinned, and charged, only while a device is attached.
    ///
    /// # Errors
    /// ENOENT no such IOAS; EINVAL neither read nor write, alignment, or addresses that can't be
    /// mapped; EOVERFLOW; EEXIST overlap; ENOSPC no such range is free; ENOMEM the caller's
    /// RLIMIT_MEMLOCK; EFAULT no such memory; EOPNOTSUPP unknown flags.
    pub fn ioas_map(&self, ioas: u32, map: &IoasMap) -> Result<u64> {
        let mut bytes = Fields::with_argsz()
            .u32(map.flags)
            .u32(ioas)
            .u32(0)
            .u64(map.vaddr)
            .u64(map.size)
            .u64(map.iova)
            .done();
        self.0
            .call_struct(request::IOAS_MAP, &mut bytes)
            .map_err(|error| noted(error, map.size))?;
        Ok(u64_at(&bytes, 32))
    }

    /// `IOMMU_IOAS_MAP_FILE`, Linux 6.13 and later: as [`Iommufd::ioas_map`] with a memfd's pages,
    /// whichever process has them mapped.
    ///
    /// # Errors
    /// As [`Iommufd::ioas_map`]; EBADF no file; EINVAL also for a file that is no memory, or is
    /// shorter; ENOTTY an older kernel.
    pub fn ioas_map_file(&self, ioas: u32, file: BorrowedFd<'_>, map: &IoasMapFile) -> Result<u64> {
        let mut bytes = Fields::with_argsz()
            .u32(map.flags)
            .u32(ioas)
            .u32(0)
            .u64(map.start)
            .u64(map.size)
            .u64(map.iova)
            .done();
        let fds = [FdSlot { offset: 12, fd: Some(file) }];
        let arg = Arg::Struct { bytes: &mut bytes, fds: &fds, out: None };
        self.0.call(request::IOAS_MAP_FILE, arg).map_err(|error| noted(error, map.size))?;
        Ok(u64_at(&bytes, 32))
    }

    /// `IOMMU_IOAS_UNMAP`: takes away the mappings within a range, which are at least one; returns
    /// the bytes that were unmapped.
    ///
    /// # Errors
    /// ENOENT no such IOAS, nothing there, or a mapping that lies in the range only in part: those
    /// before it are gone then; EINVAL an empty range; EOVERFLOW.
    pub fn ioas_unmap(&self, ioas: u32, iova: u64, size: u64) -> Result<u64> {
        let mut bytes = Fields::with_argsz().u32(ioas).u64(iova).u64(size).done();
        self.0.call_struct(request::IOAS_UNMAP, &mut bytes)?;
        Ok(u64_at(&bytes, 16))
    }

    /// `IOMMU_IOAS_UNMAP` of everything; returns the bytes that were unmapped, 0 where nothing was.
    ///
    /// # Errors
    /// ENOENT no such IOAS.
    pub fn ioas_unmap_all(&self, ioas: u32) -> Result<u64> {
        self.ioas_unmap(ioas, 0, u64::MAX)
    }

    /// `IOMMU_IOAS_COPY`: maps what is mapped elsewhere in this iommufd, without gaps, once more;
    /// returns the address. It is the same memory, pinned and charged once.
    ///
    /// # Errors
    /// ENOENT no such IOAS, or a gap; EPERM writing to what was mapped for reading; else as
    /// [`Iommufd::ioas_map`].
    pub fn ioas_copy(&self, copy: &IoasCopy) -> Result<u64> {
        let mut bytes = Fields::with_argsz()
            .u32(copy.flags)
            .u32(copy.to)
            .u32(copy.from)
            .u64(copy.size)
            .u64(copy.to_iova)
            .u64(copy.from_iova)
            .done();
        self.0
            .call_struct(request::IOAS_COPY, &mut bytes)
            .map_err(|error| noted(error, copy.size))?;
        Ok(u64_at(&bytes, 24))
    }

    /// `IOMMU_DESTROY`: ends an object, an IOAS with its mappings.
    ///
    /// # Errors
    /// ENOENT no such object; EBUSY a device is bound, or another object needs it.
    pub fn destroy(&self, id: u32) -> Result<()> {
        let mut bytes = Fields::with_argsz().u32(id).done();
        self.0.call_struct(request::IOMMU_DESTROY, &mut bytes).map(drop)
    }

    /// Any request with any argument, for tests of what the kernel says to odd ones.
    pub fn raw(&self, request: Request, arg: Arg<'_>) -> Result<i32> {
        self.0.call(request, arg)
    }
}

fn noted(mut error: Error, size: u64) -> Error {
    if error.errno == Errno::ENOMEM {
        error.note = Some(memlock_note(size).into());
    }
    error
}
