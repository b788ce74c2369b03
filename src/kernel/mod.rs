//! The only place that talks to the kernel about VFIO.
//!
//! Two layers. [`Kernel`] is the ioctl layer: ten calls, made either on the real Linux
//! ([`Linux`]) or on the simulated one (`sim`). On top of it, written once for both, are typed
//! handles: [`Container`], [`Group`], [`Iommufd`] and [`Device`], which own their fd, parse what
//! the kernel answers and say in every [`Error`] which call failed on which object with which
//! errno.
//!
//! Because the lower layer is made of requests and bytes, a simulated ioctl carries the same
//! bytes as a real one, and the order in which a kernel checks its arguments can be compared.

mod call;
mod cdev;
mod container;
mod device;
mod group;
mod iommufd;
mod linux;
mod memory;
mod node;
mod open_file;
pub(crate) mod parse;
pub mod request;

pub use crate::sys::{Error, Result};
pub use call::{Arg, FdSlot, Ioctl, Reply};
pub use container::{
    Container, DirtyOp, DmaMap, Extension, IommuInfo, IommuType, IovaRange, Unmap, UnmapFlags,
};
pub use device::{
    Device, DeviceInfo, HotResetDevice, HotResetOwner, IrqAction, IrqData, IrqInfo,
    PCI_CONFIG_REGION, RegionCap, RegionInfo, SparseArea,
};
pub use group::{Group, GroupStatus};
pub use iommufd::{IoasCopy, IoasMap, IoasMapFile, IoasRanges, Iommufd, MapFlags};
pub use linux::Linux;
pub use memory::Mapped;
pub use node::Node;
pub use request::Request;

use nix::errno::Errno;
use std::fmt::Debug;
use std::os::fd::{BorrowedFd, OwnedFd};

/// The ioctl layer: everything the broker asks of a kernel, real or simulated.
///
/// Each call may block for as long as the kernel likes (a reset, an unbind, the pinning of
/// memory), so none belongs on an event loop. Errors are the kernel's own errno, nothing else;
/// the typed handles add the call and the object.
pub trait Kernel: Debug + Send + Sync {
    /// Opens a VFIO device node read-write, close-on-exec. The caller owns the fd.
    ///
    /// # Errors
    /// What open(2) says: ENOENT no such node, EBUSY a group that is in use already, EPERM a
    /// no-IOMMU group without CAP_SYS_RAWIO, ENODEV a group without drivers.
    fn open(&self, node: &Node) -> std::result::Result<OwnedFd, Errno>;

    /// Looks whether there is a VFIO device node, for which it takes no right to open it.
    ///
    /// # Errors
    /// What stat(2) says: ENOENT no such node.
    fn find(&self, node: &Node) -> std::result::Result<(), Errno>;

    /// Makes one ioctl on `fd`. See [`Ioctl`] for how arguments, fds and buffers travel.
    fn ioctl(&self, fd: BorrowedFd<'_>, call: Ioctl<'_>) -> std::result::Result<Reply, Errno>;

    /// Reads a device region; returns the bytes read. See pread(2).
    fn pread(
        &self,
        fd: BorrowedFd<'_>,
        buf: &mut [u8],
        offset: u64,
    ) -> std::result::Result<usize, Errno>;

    /// Writes a device region; returns the bytes written. See pwrite(2).
    fn pwrite(
        &self,
        fd: BorrowedFd<'_>,
        buf: &[u8],
        offset: u64,
    ) -> std::result::Result<usize, Errno>;

    /// Reads a file of sysfs, whole. `path` is relative to `/sys`, without a leading slash.
    fn sysfs_read(&self, path: &str) -> std::result::Result<Vec<u8>, Errno>;

    /// Writes a file of sysfs, with one write(2) as an administrator's `echo` would.
    ///
    /// # Errors
    /// What open(2) and write(2) say: ENOENT no such file, EACCES one that can't be written, and
    /// what the file's own meaning gives.
    fn sysfs_write(&self, path: &str, bytes: &[u8]) -> std::result::Result<(), Errno>;

    /// The names in a directory of sysfs, sorted.
    fn sysfs_list(&self, path: &str) -> std::result::Result<Vec<String>, Errno>;

    /// The target of a symbolic link of sysfs, as readlink(2) gives it.
    fn sysfs_link(&self, path: &str) -> std::result::Result<String, Errno>;

    /// Whether it is none of a machine's own, so that what is told of it is no advice for one.
    fn is_simulated(&self) -> bool {
        false
    }

    /// The number of a file or directory of sysfs, which is never used again for another one.
    fn sysfs_inode(&self, path: &str) -> std::result::Result<u64, Errno>;
}
