//! What a host can't do, and what would make it able to.

use crate::kernel;
use crate::protocol::{Bdf, Error};
use nix::errno::Errno;

/// A failed open of `/dev/vfio/vfio`: a host without type1 is named as such.
pub(super) fn type1(error: kernel::Error) -> Error {
    let why = "this host has no /dev/vfio/vfio: modprobe vfio_iommu_type1, or run a kernel with \
               CONFIG_VFIO_GROUP";
    backend("backend type1", error, why)
}

/// A failed open of `/dev/iommu`: a host without iommufd is named as such.
pub(super) fn iommufd(error: kernel::Error) -> Error {
    let why = "this host has no /dev/iommu: modprobe iommufd, or run a kernel with CONFIG_IOMMUFD \
               and CONFIG_VFIO_DEVICE_CDEV, Linux 6.6 or later";
    backend("backend iommufd", error, why)
}

fn backend(what: &str, error: kernel::Error, why: &str) -> Error {
    match error.errno {
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
            Error::Unsupported { what: what.into(), why: why.into() }
        }
        _ => error.into(),
    }
}

/// That a device can't be opened without its group.
pub(super) fn cdev(bdf: Bdf) -> Error {
    Error::Unsupported {
        what: "backend iommufd".into(),
        why: format!(
            "{bdf} has no node of its own under /dev/vfio/devices: the kernel is built without \
             CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or later), or no IOMMU is behind the device"
        ),
    }
}
