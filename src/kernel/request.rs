//! The ioctl requests of `linux/vfio.h`, with the names the header gives them.

use std::fmt;
use std::os::raw::c_ulong;
use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl_expr};

/// An ioctl request: its number and its name in the header.
///
/// Containers and devices use some numbers for different things (`VFIO_IOMMU_GET_INFO` and
/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO` are one number), so the name is part of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Request {
    /// The second argument of ioctl(2).
    pub number: u32,
    /// The name in the header.
    pub name: &'static str,
    /// Whether the return value is a new fd.
    pub returns_fd: bool,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A request that no version of the kernel knows, for the errno of unknown ones.
pub const UNKNOWN: Request = vfio("VFIO unknown request", 99);

const fn vfio(name: &'static str, nr: u32) -> Request {
    let number: c_ulong = ioctl_expr(_IOC_NONE, VFIO_TYPE as u32, VFIO_BASE + nr, 0);
    Request { number: number as u32, name, returns_fd: false }
}

/// `VFIO_GET_API_VERSION`: container.
pub const GET_API_VERSION: Request = vfio("VFIO_GET_API_VERSION", 0);
/// `VFIO_CHECK_EXTENSION`: container.
pub const CHECK_EXTENSION: Request = vfio("VFIO_CHECK_EXTENSION", 1);
/// `VFIO_SET_IOMMU`: container.
pub const SET_IOMMU: Request = vfio("VFIO_SET_IOMMU", 2);
/// `VFIO_GROUP_GET_STATUS`: group.
pub const GROUP_GET_STATUS: Request = vfio("VFIO_GROUP_GET_STATUS", 3);
/// `VFIO_GROUP_SET_CONTAINER`: group.
pub const GROUP_SET_CONTAINER: Request = vfio("VFIO_GROUP_SET_CONTAINER", 4);
/// `VFIO_GROUP_UNSET_CONTAINER`: group.
pub const GROUP_UNSET_CONTAINER: Request = vfio("VFIO_GROUP_UNSET_CONTAINER", 5);
/// `VFIO_GROUP_GET_DEVICE_FD`: group; the value is a new device fd.
pub const GROUP_GET_DEVICE_FD: Request =
    Request { returns_fd: true, ..vfio("VFIO_GROUP_GET_DEVICE_FD", 6) };
/// `VFIO_DEVICE_GET_INFO`: device.
pub const DEVICE_GET_INFO: Request = vfio("VFIO_DEVICE_GET_INFO", 7);
/// `VFIO_DEVICE_GET_REGION_INFO`: device.
pub const DEVICE_GET_REGION_INFO: Request = vfio("VFIO_DEVICE_GET_REGION_INFO", 8);
/// `VFIO_DEVICE_GET_IRQ_INFO`: device.
pub const DEVICE_GET_IRQ_INFO: Request = vfio("VFIO_DEVICE_GET_IRQ_INFO", 9);
/// `VFIO_DEVICE_SET_IRQS`: device.
pub const DEVICE_SET_IRQS: Request = vfio("VFIO_DEVICE_SET_IRQS", 10);
/// `VFIO_DEVICE_RESET`: device.
pub const DEVICE_RESET: Request = vfio("VFIO_DEVICE_RESET", 11);
/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`: device.
pub const DEVICE_GET_PCI_HOT_RESET_INFO: Request = vfio("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", 12);
/// `VFIO_DEVICE_PCI_HOT_RESET`: device.
pub const DEVICE_PCI_HOT_RESET: Request = vfio("VFIO_DEVICE_PCI_HOT_RESET", 13);
/// `VFIO_IOMMU_GET_INFO`: container.
pub const IOMMU_GET_INFO: Request = vfio("VFIO_IOMMU_GET_INFO", 12);
/// `VFIO_IOMMU_MAP_DMA`: container.
pub const IOMMU_MAP_DMA: Request = vfio("VFIO_IOMMU_MAP_DMA", 13);
/// `VFIO_IOMMU_UNMAP_DMA`: container.
pub const IOMMU_UNMAP_DMA: Request = vfio("VFIO_IOMMU_UNMAP_DMA", 14);
/// `VFIO_IOMMU_DIRTY_PAGES`: container.
pub const IOMMU_DIRTY_PAGES: Request = vfio("VFIO_IOMMU_DIRTY_PAGES", 17);
