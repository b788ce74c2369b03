//! A container: one type1 IOMMU address space, `/dev/vfio/vfio`.

use super::open_file::OpenFile;
use super::parse::{self, Fields, u32_at, u64_at};
use super::{Arg, Kernel, Node, Request, Result, request};
use nix::errno::Errno;
use nix::libc::RLIM_INFINITY;
use nix::sys::resource::{Resource, getrlimit};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use vfio_bindings::bindings::vfio as uapi;

/// An IOMMU driver for a container, and what `VFIO_SET_IOMMU` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IommuType {
    /// `VFIO_TYPE1_IOMMU`: unmapping part of a mapping is allowed by rounding; legacy.
    Type1,
    /// `VFIO_TYPE1v2_IOMMU`: a mapping is unmapped whole or not at all.
    Type1v2,
    /// `VFIO_NOIOMMU_IOMMU`: no translation and no protection.
    NoIommu,
    /// Any other number.
    Other(u32),
}

impl IommuType {
    /// The number in the header.
    pub fn number(self) -> u32 {
        match self {
            IommuType::Type1 => uapi::VFIO_TYPE1_IOMMU,
            IommuType::Type1v2 => uapi::VFIO_TYPE1v2_IOMMU,
            IommuType::NoIommu => uapi::VFIO_NOIOMMU_IOMMU,
            IommuType::Other(number) => number,
        }
    }
}

/// What `VFIO_CHECK_EXTENSION` can be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Extension {
    /// Whether this IOMMU type can be set.
    Iommu(IommuType),
    /// `VFIO_DMA_CC_IOMMU`: the IOMMU enforces cache coherence.
    DmaCc,
    /// `VFIO_UNMAP_ALL`.
    UnmapAll,
    /// `VFIO_UPDATE_VADDR`.
    UpdateVaddr,
    /// Any other number.
    Other(u32),
}

impl Extension {
    /// The number in the header.
    pub fn number(self) -> u32 {
        match self {
            Extension::Iommu(kind) => kind.number(),
            Extension::DmaCc => uapi::VFIO_DMA_CC_IOMMU,
            Extension::UnmapAll => uapi::VFIO_UNMAP_ALL,
            Extension::UpdateVaddr => uapi::VFIO_UPDATE_VADDR,
            Extension::Other(number) => number,
        }
    }
}

/// A range of IO virtual addresses, both ends included, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IovaRange {
    /// First address.
    pub start: u64,
    /// Last address.
    pub end: u64,
}

/// `struct vfio_iommu_type1_info` with its capability chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IommuInfo {
    /// The flags word.
    pub flags: u32,
    /// Page sizes that can be mapped: one bit each.
    pub pgsizes: u64,
    /// The capability ids, in the order of the chain.
    pub caps: Vec<u16>,
    /// Addresses that can be mapped (capability 1).
    pub iova_ranges: Vec<IovaRange>,
    /// Mappings that can still be made (capability 3).
    pub dma_avail: Option<u32>,
    /// Page sizes of the dirty bitmap and its largest size in bytes (capability 2).
    pub migration: Option<(u64, u64)>,
}

/// `struct vfio_iommu_type1_dma_map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// `VFIO_DMA_MAP_FLAG_*`.
    pub flags: u32,
    /// Address in the calling process, in bytes. Devices will access this memory outside of what
    /// the compiler can see: it should be shared memory that nothing here holds a reference to.
    pub vaddr: u64,
    /// Address that the device uses, in bytes.
    pub iova: u64,
    /// Length in bytes.
    pub size: u64,
}

impl DmaMap {
    /// The device may read the memory.
    pub const READ: u32 = uapi::VFIO_DMA_MAP_FLAG_READ;
    /// The device may write the memory.
    pub const WRITE: u32 = uapi::VFIO_DMA_MAP_FLAG_WRITE;
    /// Give an invalidated mapping its new address.
    pub const VADDR: u32 = uapi::VFIO_DMA_MAP_FLAG_VADDR;
}

/// `VFIO_DMA_UNMAP_FLAG_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnmapFlags;

impl UnmapFlags {
    /// Fill a dirty bitmap.
    pub const GET_DIRTY_BITMAP: u32 = uapi::VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
    /// Everything; iova and size must be 0.
    pub const ALL: u32 = uapi::VFIO_DMA_UNMAP_FLAG_ALL;
    /// Keep the mapping, forget the address.
    pub const VADDR: u32 = uapi::VFIO_DMA_UNMAP_FLAG_VADDR;
}

/// `struct vfio_iommu_type1_dma_unmap`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmap {
    /// [`UnmapFlags`].
    pub flags: u32,
    /// First address, in bytes.
    pub iova: u64,
    /// Length in bytes.
    pub size: u64,
}

/// What `VFIO_IOMMU_DIRTY_PAGES` can be asked to do.
#[derive(Debug)]
pub enum DirtyOp<'a> {
    /// Start tracking.
    Start,
    /// Stop tracking.
    Stop,
    /// Read the bitmap of a range: one bit a page of `pgsize` bytes.
    Get {
        /// First address, in bytes.
        iova: u64,
        /// Length in bytes.
        size: u64,
        /// Page size in bytes.
        pgsize: u64,
        /// Where the bits go.
        bitmap: &'a mut [u8],
    },
    /// Any flags, for what the kernel says to them.
    Flags(u32),
}

/// An open container. Dropping it closes this copy of the open file, nothing more: mappings stay
/// while a group is attached.
#[derive(Debug)]
pub struct Container(OpenFile);

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Container> for OwnedFd {
    fn from(container: Container) -> OwnedFd {
        container.0.into()
    }
}

const OBJECT: &str = "container";

impl Container {
    /// Opens `/dev/vfio/vfio`: a new, empty container.
    ///
    /// # Errors
    /// ENOENT where VFIO is not loaded, EACCES without rights to the node.
    pub fn open(kernel: Arc<dyn Kernel>) -> Result<Self> {
        OpenFile::open(kernel, &Node::Container, OBJECT).map(Self)
    }

    /// A container that somebody handed over; takes the fd.
    pub fn from_fd(kernel: Arc<dyn Kernel>, fd: OwnedFd) -> Self {
        Self(OpenFile::new(kernel, fd, OBJECT))
    }

    /// `VFIO_GET_API_VERSION`: 0 on every kernel so far.
    pub fn api_version(&self) -> Result<i32> {
        self.0.call(request::GET_API_VERSION, Arg::Value(0))
    }

    /// `VFIO_CHECK_EXTENSION`: before an IOMMU type is set, whether any driver can; after, whether
    /// this one can.
    pub fn check_extension(&self, extension: Extension) -> Result<bool> {
        let arg = Arg::Value(extension.number().into());
        self.0.call(request::CHECK_EXTENSION, arg).map(|value| value > 0)
    }

    /// `VFIO_SET_IOMMU`.
    ///
    /// # Errors
    /// EINVAL no group attached, or a type is set already; EPERM no interrupt remapping and
    /// `allow_unsafe_interrupts` off; ENODEV no driver of that type.
    pub fn set_iommu(&self, kind: IommuType) -> Result<()> {
        self.0.call(request::SET_IOMMU, Arg::Value(kind.number().into())).map(drop)
    }

    /// `VFIO_IOMMU_GET_INFO`, asked again with the size the kernel wants.
    pub fn info(&self) -> Result<IommuInfo> {
        let bytes = growing(24, |bytes| self.0.call_struct(request::IOMMU_GET_INFO, bytes))?;
        Ok(IommuInfo::parse(&bytes))
    }

    /// `VFIO_IOMMU_MAP_DMA`: pins this process's memory and lets devices reach it.
    ///
    /// # Errors
    /// EINVAL flags, alignment, or outside the IOVA ranges; EOVERFLOW; EEXIST overlap; ENOSPC too
    /// many mappings; ENOMEM the caller's RLIMIT_MEMLOCK; EFAULT no such memory.
    pub fn map(&self, map: &DmaMap) -> Result<()> {
        let mut bytes =
            Fields::with_argsz().u32(map.flags).u64(map.vaddr).u64(map.iova).u64(map.size).done();
        self.0.call_struct(request::IOMMU_MAP_DMA, &mut bytes).map(drop).map_err(|mut error| {
            if error.errno == Errno::ENOMEM {
                error.note = Some(memlock_note(map.size).into());
            }
            error
        })
    }

    /// `VFIO_IOMMU_UNMAP_DMA`: returns the bytes that were unmapped, 0 where nothing was.
    pub fn unmap(&self, unmap: &Unmap) -> Result<u64> {
        let mut bytes =
            Fields::with_argsz().u32(unmap.flags).u64(unmap.iova).u64(unmap.size).done();
        self.0.call_struct(request::IOMMU_UNMAP_DMA, &mut bytes)?;
        Ok(u64_at(&bytes, 16))
    }

    /// `VFIO_IOMMU_UNMAP_DMA` that also reads which pages were written; returns the bytes.
    pub fn unmap_dirty(&self, unmap: &Unmap, pgsize: u64, bitmap: &mut [u8]) -> Result<u64> {
        let mut bytes = Fields::with_argsz()
            .u32(unmap.flags | UnmapFlags::GET_DIRTY_BITMAP)
            .u64(unmap.iova)
            .u64(unmap.size)
            .u64(pgsize)
            .u64(bitmap.len() as u64)
            .u64(0)
            .done();
        let arg = Arg::Struct { bytes: &mut bytes, fds: &[], out: Some((40, bitmap)) };
        self.0.call(request::IOMMU_UNMAP_DMA, arg)?;
        Ok(u64_at(&bytes, 16))
    }

    /// `VFIO_IOMMU_DIRTY_PAGES`.
    pub fn dirty_pages(&self, op: DirtyOp<'_>) -> Result<()> {
        let (flags, range) = match op {
            DirtyOp::Start => (uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_START, None),
            DirtyOp::Stop => (uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, None),
            DirtyOp::Flags(flags) => (flags, None),
            DirtyOp::Get { iova, size, pgsize, bitmap } => {
                let flag = uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
                (flag, Some((iova, size, pgsize, bitmap)))
            }
        };
        let head = Fields::with_argsz().u32(flags);
        let request = request::IOMMU_DIRTY_PAGES;
        match range {
            None => self.0.call_struct(request, &mut head.done()).map(drop),
            Some((iova, size, pgsize, bitmap)) => {
                let len = bitmap.len() as u64;
                let mut bytes = head.u64(iova).u64(size).u64(pgsize).u64(len).u64(0).done();
                let arg = Arg::Struct { bytes: &mut bytes, fds: &[], out: Some((40, bitmap)) };
                self.0.call(request, arg).map(drop)
            }
        }
    }

    /// Any request with any struct, for tests of what the kernel says to odd ones. The kernel's
    /// answer replaces `bytes`.
    pub fn raw(&self, request: Request, arg: Arg<'_>) -> Result<i32> {
        self.0.call(request, arg)
    }
}

/// Pinned memory counts against RLIMIT_MEMLOCK, and ENOMEM is all that the kernel says about it.
pub(super) fn memlock_note(size: u64) -> String {
    let needed = format!("{size} bytes more were to be pinned");
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((RLIM_INFINITY, _)) | Err(_) => needed,
        Ok((soft, _)) => format!(
            "{needed} and this process's RLIMIT_MEMLOCK allows {soft} in all: raise it \
             (ulimit -l, prlimit --memlock, or LimitMEMLOCK= of its unit)"
        ),
    }
}

/// Calls `ask` with a struct of `size` bytes, and once more if the kernel answers in `argsz` that
/// it has more to say. 64 KiB is more than any kernel has.
pub(super) fn growing(
    size: usize,
    mut ask: impl FnMut(&mut [u8]) -> Result<i32>,
) -> Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    parse::set_argsz(&mut bytes);
    ask(&mut bytes)?;
    let wanted = u32_at(&bytes, 0) as usize;
    if wanted > size && wanted <= 64 << 10 {
        bytes = vec![0; wanted];
        parse::set_argsz(&mut bytes);
        ask(&mut bytes)?;
    }
    Ok(bytes)
}

impl IommuInfo {
    /// Parses the struct that `VFIO_IOMMU_GET_INFO` filled.
    pub fn parse(bytes: &[u8]) -> Self {
        let flags = u32_at(bytes, 4);
        let mut info = Self { flags, pgsizes: u64_at(bytes, 8), ..Self::default() };
        if flags & uapi::VFIO_IOMMU_INFO_CAPS == 0 {
            return info;
        }
        for cap in parse::capabilities(bytes, u32_at(bytes, 16)) {
            info.caps.push(cap.id);
            match u32::from(cap.id) {
                uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                    let most = cap.bytes.len().saturating_sub(16) / 16;
                    let count = (u32_at(cap.bytes, 8) as usize).min(most);
                    info.iova_ranges = (0..count)
                        .map(|i| IovaRange {
                            start: u64_at(cap.bytes, 16 + i * 16),
                            end: u64_at(cap.bytes, 24 + i * 16),
                        })
                        .collect();
                }
                uapi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                    info.dma_avail = Some(u32_at(cap.bytes, 8));
                }
                uapi::VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => {
                    info.migration = Some((u64_at(cap.bytes, 16), u64_at(cap.bytes, 24)));
                }
                _ => {}
            }
        }
        info
    }
}
