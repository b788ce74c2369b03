//! What a host can't do, and what would make it able to.

use crate::protocol::{Bdf, Error};
use nix::errno::Errno;

/// A failed open of a backend's node, where that says that this host has no such backend.
pub(super) fn node(object: &str, errno: Errno) -> Option<Error> {
    let (backend, why) = match object {
        "/dev/vfio/vfio" => (
            "backend type1",
            "this host has no /dev/vfio/vfio: modprobe vfio_iommu_type1, or run a kernel with \
             CONFIG_VFIO_GROUP",
        ),
        "/dev/iommu" => (
            "backend iommufd",
            "this host has no /dev/iommu: modprobe iommufd, or run a kernel with CONFIG_IOMMUFD and \
             CONFIG_VFIO_DEVICE_CDEV, Linux 6.6 or later",
        ),
        _ => return None,
    };
    let lacks = matches!(errno, Errno::ENOENT | Errno::ENODEV | Errno::ENXIO);
    lacks.then(|| Error::Unsupported { what: backend.into(), why: why.into() })
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
