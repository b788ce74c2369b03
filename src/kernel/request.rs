//! The ioctl requests of `linux/vfio.h` and `linux/iommufd.h`, with the names the headers give
//! them.
//!
//! Requests are constants, so that the simulation can match on them. vmm-sys-util's macros make functions
//! that are not const, so the numbers are made by what those macros call, `ioctl_expr`.

use iommufd_bindings::iommufd;
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

/// A request that no version of iommufd knows.
pub const IOMMU_UNKNOWN: Request = iommu("IOMMU unknown request", 255);

const fn vfio(name: &'static str, nr: u32) -> Request {
    let number: c_ulong = ioctl_expr(_IOC_NONE, VFIO_TYPE as u32, VFIO_BASE + nr, 0);
    Request { number: number as u32, name, returns_fd: false }
}

const fn iommu(name: &'static str, nr: u32) -> Request {
    let number: c_ulong = ioctl_expr(_IOC_NONE, iommufd::IOMMUFD_TYPE as u32, nr, 0);
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
/// `VFIO_DEVICE_BIND_IOMMUFD`: cdev.
pub const DEVICE_BIND_IOMMUFD: Request = vfio("VFIO_DEVICE_BIND_IOMMUFD", 18);
/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`: cdev.
pub const DEVICE_ATTACH_IOMMUFD_PT: Request = vfio("VFIO_DEVICE_ATTACH_IOMMUFD_PT", 19);
/// `VFIO_DEVICE_DETACH_IOMMUFD_PT`: cdev.
pub const DEVICE_DETACH_IOMMUFD_PT: Request = vfio("VFIO_DEVICE_DETACH_IOMMUFD_PT", 20);
/// `IOMMU_DESTROY`: iommufd.
pub const IOMMU_DESTROY: Request = iommu("IOMMU_DESTROY", iommufd::IOMMUFD_CMD_DESTROY);
/// `IOMMU_IOAS_ALLOC`: iommufd.
pub const IOAS_ALLOC: Request = iommu("IOMMU_IOAS_ALLOC", iommufd::IOMMUFD_CMD_IOAS_ALLOC);
/// `IOMMU_IOAS_ALLOW_IOVAS`: iommufd.
pub const IOAS_ALLOW_IOVAS: Request =
    iommu("IOMMU_IOAS_ALLOW_IOVAS", iommufd::IOMMUFD_CMD_IOAS_ALLOW_IOVAS);
/// `IOMMU_IOAS_COPY`: iommufd.
pub const IOAS_COPY: Request = iommu("IOMMU_IOAS_COPY", iommufd::IOMMUFD_CMD_IOAS_COPY);
/// `IOMMU_IOAS_IOVA_RANGES`: iommufd.
pub const IOAS_IOVA_RANGES: Request =
    iommu("IOMMU_IOAS_IOVA_RANGES", iommufd::IOMMUFD_CMD_IOAS_IOVA_RANGES);
/// `IOMMU_IOAS_MAP`: iommufd.
pub const IOAS_MAP: Request = iommu("IOMMU_IOAS_MAP", iommufd::IOMMUFD_CMD_IOAS_MAP);
/// `IOMMU_IOAS_UNMAP`: iommufd.
pub const IOAS_UNMAP: Request = iommu("IOMMU_IOAS_UNMAP", iommufd::IOMMUFD_CMD_IOAS_UNMAP);
/// `IOMMU_OPTION`: iommufd.
pub const IOMMU_OPTION: Request = iommu("IOMMU_OPTION", iommufd::IOMMUFD_CMD_OPTION);
/// `IOMMU_IOAS_MAP_FILE`: iommufd, Linux 6.13 and later.
pub const IOAS_MAP_FILE: Request = iommu("IOMMU_IOAS_MAP_FILE", iommufd::IOMMUFD_CMD_IOAS_MAP_FILE);
/// `IOMMU_IOAS_CHANGE_PROCESS`: iommufd, Linux 6.14 and later.
pub const IOAS_CHANGE_PROCESS: Request =
    iommu("IOMMU_IOAS_CHANGE_PROCESS", iommufd::IOMMUFD_CMD_IOAS_CHANGE_PROCESS);
