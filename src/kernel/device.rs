//! An open VFIO device: its regions, interrupts and resets.

use super::container::growing;
use super::open_file::OpenFile;
use super::parse::{self, Fields, u16_at, u32_at, u64_at};
use super::{Arg, FdSlot, Kernel, Request, Result, request};
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use vfio_bindings::bindings::vfio as uapi;

/// The index of a PCI device's configuration space among its regions.
pub const PCI_CONFIG_REGION: u32 = uapi::VFIO_PCI_CONFIG_REGION_INDEX;

/// `struct vfio_device_info`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`.
    pub flags: u32,
    /// Number of region indexes.
    pub regions: u32,
    /// Number of interrupt indexes.
    pub irqs: u32,
}

/// A part of a region that can be mapped, in bytes from the region's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseArea {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
}

/// A capability of a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegionCap {
    /// Only these areas can be mapped.
    SparseMmap(Vec<SparseArea>),
    /// A device-specific region: its type and subtype.
    Type(u32, u32),
    /// The area with the MSI-X table can be mapped.
    MsixMappable,
    /// Any other capability, by id.
    Other(u16),
}

/// `struct vfio_region_info` with its capability chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// The region's index.
    pub index: u32,
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub flags: u32,
    /// Length in bytes, 0 where there is no such region.
    pub size: u64,
    /// Where it starts in the device's fd, in bytes.
    pub offset: u64,
    /// Its capabilities.
    pub caps: Vec<RegionCap>,
}

/// `struct vfio_irq_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// The interrupt's index.
    pub index: u32,
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
    /// Number of vectors.
    pub count: u32,
}

/// What `VFIO_DEVICE_SET_IRQS` does to the interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Mask.
    Mask,
    /// Unmask.
    Unmask,
    /// Set up or fire.
    Trigger,
}

/// The data of `VFIO_DEVICE_SET_IRQS`.
#[derive(Debug)]
pub enum IrqData<'a> {
    /// None: act on `count` interrupts at once; 0 switches the index off.
    None {
        /// How many.
        count: u32,
    },
    /// One flag an interrupt.
    Bool(&'a [bool]),
    /// One eventfd an interrupt; `None` takes it away.
    Eventfd(&'a [Option<BorrowedFd<'a>>]),
}

/// Whose a device is that a hot reset would hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HotResetOwner {
    /// Asked on a device that came from a group: its IOMMU group.
    Group(u32),
    /// Asked on a cdev: bound to the same iommufd, under this id.
    Bound(u32),
    /// Asked on a cdev: not bound, but another device of its group is bound to the same iommufd.
    Owned,
    /// Asked on a cdev: not the iommufd's. The reset would be refused.
    NotOwned,
}

/// A device that a hot reset would hit (`struct vfio_pci_dependent_device`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotResetDevice {
    /// Whose it is.
    pub owner: HotResetOwner,
    /// PCI segment.
    pub segment: u16,
    /// Bus.
    pub bus: u8,
    /// Device and function.
    pub devfn: u8,
}

/// An open device: from its group, or its cdev (`cdev.rs` has what only those can do). The last
/// copy's close switches bus mastering and interrupts off.
#[derive(Debug)]
pub struct Device(pub(super) OpenFile);

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Device> for OwnedFd {
    fn from(device: Device) -> OwnedFd {
        device.0.into()
    }
}

impl Device {
    /// A device that somebody handed over; takes the fd. `name` is for messages only.
    pub fn from_fd(kernel: Arc<dyn Kernel>, name: &str, fd: OwnedFd) -> Self {
        Self(OpenFile::new(kernel, fd, name))
    }

    /// Its name: the BDF.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// `VFIO_DEVICE_GET_INFO`.
    pub fn info(&self) -> Result<DeviceInfo> {
        let bytes = growing(24, |bytes| self.0.call_struct(request::DEVICE_GET_INFO, bytes))?;
        Ok(DeviceInfo {
            flags: u32_at(&bytes, 4),
            regions: u32_at(&bytes, 8),
            irqs: u32_at(&bytes, 12),
        })
    }

    /// `VFIO_DEVICE_GET_REGION_INFO`.
    ///
    /// # Errors
    /// EINVAL no such index.
    pub fn region(&self, index: u32) -> Result<RegionInfo> {
        let bytes = growing(32, |bytes| {
            bytes[8..12].copy_from_slice(&index.to_ne_bytes());
            self.0.call_struct(request::DEVICE_GET_REGION_INFO, bytes)
        })?;
        Ok(RegionInfo::parse(&bytes))
    }

    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    ///
    /// # Errors
    /// EINVAL no such index.
    pub fn irq(&self, index: u32) -> Result<IrqInfo> {
        let mut bytes = Fields::with_argsz().u32(0).u32(index).u32(0).done();
        self.0.call_struct(request::DEVICE_GET_IRQ_INFO, &mut bytes)?;
        Ok(IrqInfo { index, flags: u32_at(&bytes, 4), count: u32_at(&bytes, 12) })
    }

    /// `VFIO_DEVICE_SET_IRQS`.
    ///
    /// # Errors
    /// EINVAL index, range or flags; ENOTTY the action is not supported.
    pub fn set_irqs(
        &self,
        index: u32,
        start: u32,
        action: IrqAction,
        data: IrqData<'_>,
    ) -> Result<()> {
        let action = match action {
            IrqAction::Mask => uapi::VFIO_IRQ_SET_ACTION_MASK,
            IrqAction::Unmask => uapi::VFIO_IRQ_SET_ACTION_UNMASK,
            IrqAction::Trigger => uapi::VFIO_IRQ_SET_ACTION_TRIGGER,
        };
        let (kind, count, payload, fds) = match data {
            IrqData::None { count } => (uapi::VFIO_IRQ_SET_DATA_NONE, count, Vec::new(), vec![]),
            IrqData::Bool(flags) => {
                let payload = flags.iter().map(|&on| u8::from(on)).collect();
                (uapi::VFIO_IRQ_SET_DATA_BOOL, flags.len() as u32, payload, vec![])
            }
            IrqData::Eventfd(list) => {
                let slots =
                    list.iter().enumerate().map(|(i, fd)| FdSlot { offset: 20 + 4 * i, fd: *fd });
                let payload = vec![0xff; list.len() * 4];
                (uapi::VFIO_IRQ_SET_DATA_EVENTFD, list.len() as u32, payload, slots.collect())
            }
        };
        let mut bytes = Fields::with_argsz()
            .u32(kind | action)
            .u32(index)
            .u32(start)
            .u32(count)
            .bytes(&payload)
            .done();
        let arg = Arg::Struct { bytes: &mut bytes, fds: &fds, out: None };
        self.0.call(request::DEVICE_SET_IRQS, arg).map(drop)
    }

    /// `VFIO_DEVICE_RESET`: may take as long as the device does.
    ///
    /// # Errors
    /// EINVAL the device can't be reset alone; EAGAIN another user is resetting it.
    pub fn reset(&self) -> Result<()> {
        self.0.call(request::DEVICE_RESET, Arg::Value(0)).map(drop)
    }

    /// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`: every device that a slot or bus reset would hit.
    ///
    /// # Errors
    /// ENODEV neither a slot nor a bus reset is possible.
    pub fn hot_reset_info(&self) -> Result<Vec<HotResetDevice>> {
        let request = request::DEVICE_GET_PCI_HOT_RESET_INFO;
        let mut room = 8;
        loop {
            let mut bytes = vec![0; 12 + 8 * room];
            parse::set_argsz(&mut bytes);
            let asked = self.0.call_struct(request, &mut bytes);
            let count = u32_at(&bytes, 8) as usize;
            match asked {
                Err(error) if error.errno == Errno::ENOSPC && count > room && count <= 4096 => {
                    room = count;
                }
                Err(error) => return Err(error),
                Ok(_) => {
                    let by_id = u32_at(&bytes, 4) & uapi::VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0;
                    let entry = |i: usize| HotResetDevice {
                        owner: hot_reset_owner(by_id, u32_at(&bytes, 12 + 8 * i)),
                        segment: u16_at(&bytes, 16 + 8 * i),
                        bus: bytes[18 + 8 * i],
                        devfn: bytes[19 + 8 * i],
                    };
                    return Ok((0..count.min(room)).map(entry).collect());
                }
            }
        }
    }

    /// `VFIO_DEVICE_PCI_HOT_RESET` with the groups that prove the right to it: none for a cdev, for
    /// which the iommufd that it is bound to does.
    ///
    /// # Errors
    /// EINVAL a device that would be hit is in no group given or is not the iommufd's, or an fd is
    /// not a group; EBUSY another reset is going on.
    pub fn hot_reset(&self, groups: &[BorrowedFd<'_>]) -> Result<()> {
        let slots: Vec<_> = groups
            .iter()
            .enumerate()
            .map(|(i, fd)| FdSlot { offset: 12 + 4 * i, fd: Some(*fd) })
            .collect();
        let mut bytes = Fields::with_argsz()
            .u32(0)
            .u32(groups.len() as u32)
            .bytes(&vec![0xff; groups.len() * 4])
            .done();
        let arg = Arg::Struct { bytes: &mut bytes, fds: &slots, out: None };
        self.0.call(request::DEVICE_PCI_HOT_RESET, arg).map(drop)
    }

    /// Reads from the device's fd at `offset` bytes; see [`RegionInfo::offset`].
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.0.kernel.pread(self.as_fd(), buf, offset).map_err(self.0.failed("pread"))
    }

    /// Writes to the device's fd at `offset` bytes.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<usize> {
        self.0.kernel.pwrite(self.as_fd(), buf, offset).map_err(self.0.failed("pwrite"))
    }

    /// Reads the first four bytes of the PCI configuration space: vendor and device id.
    pub fn pci_ids(&self) -> Result<(u16, u16)> {
        let config = self.region(PCI_CONFIG_REGION)?;
        let mut ids = [0; 4];
        if self.read_at(&mut ids, config.offset)? != ids.len() {
            return Err(self.0.failed("pread")(Errno::EIO));
        }
        Ok((u16::from_le_bytes([ids[0], ids[1]]), u16::from_le_bytes([ids[2], ids[3]])))
    }

    /// Any request with any argument, for tests of what the kernel says to odd ones.
    pub fn raw(&self, request: Request, arg: Arg<'_>) -> Result<i32> {
        self.0.call(request, arg)
    }
}

impl RegionInfo {
    /// Parses the struct that `VFIO_DEVICE_GET_REGION_INFO` filled.
    pub fn parse(bytes: &[u8]) -> Self {
        let flags = u32_at(bytes, 4);
        let mut caps = Vec::new();
        if flags & uapi::VFIO_REGION_INFO_FLAG_CAPS != 0 {
            caps = parse::capabilities(bytes, u32_at(bytes, 12)).map(region_cap).collect();
        }
        Self {
            index: u32_at(bytes, 8),
            flags,
            size: u64_at(bytes, 16),
            offset: u64_at(bytes, 24),
            caps,
        }
    }
}

fn hot_reset_owner(by_id: bool, number: u32) -> HotResetOwner {
    const NOT_OWNED: u32 = uapi::VFIO_PCI_DEVID_NOT_OWNED as u32;
    match number {
        group if !by_id => HotResetOwner::Group(group),
        uapi::VFIO_PCI_DEVID_OWNED => HotResetOwner::Owned,
        NOT_OWNED => HotResetOwner::NotOwned,
        id => HotResetOwner::Bound(id),
    }
}

fn region_cap(cap: parse::Capability<'_>) -> RegionCap {
    match u32::from(cap.id) {
        uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP => {
            let most = cap.bytes.len().saturating_sub(16) / 16;
            let count = (u32_at(cap.bytes, 8) as usize).min(most);
            let area = |i: usize| SparseArea {
                offset: u64_at(cap.bytes, 16 + 16 * i),
                size: u64_at(cap.bytes, 24 + 16 * i),
            };
            RegionCap::SparseMmap((0..count).map(area).collect())
        }
        uapi::VFIO_REGION_INFO_CAP_TYPE => {
            RegionCap::Type(u32_at(cap.bytes, 8), u32_at(cap.bytes, 12))
        }
        uapi::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE => RegionCap::MsixMappable,
        _ => RegionCap::Other(cap.id),
    }
}
