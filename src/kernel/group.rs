//! An IOMMU group: `/dev/vfio/N`, the unit that DMA isolation works by.

use super::open_file::OpenFile;
use super::parse::{Fields, u32_at};
use super::{Arg, Container, Device, Error, Ioctl, Kernel, Node, Request, Result, request};
use nix::errno::Errno;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use vfio_bindings::bindings::vfio as uapi;

/// `VFIO_GROUP_FLAGS_*` of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupStatus {
    /// Every device of the group is on a VFIO driver or on none.
    pub viable: bool,
    /// The group is attached to a container.
    pub attached: bool,
}

/// An open group. One process can have it open at a time; dropping the last copy detaches it.
#[derive(Debug)]
pub struct Group {
    file: OpenFile,
    node: Node,
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<Group> for OwnedFd {
    fn from(group: Group) -> OwnedFd {
        group.file.into()
    }
}

impl Group {
    /// Opens a group.
    ///
    /// # Errors
    /// EBUSY it is open already; ENOENT no device of it is on a VFIO driver; ENODEV its drivers
    /// are gone; EPERM a no-IOMMU group without CAP_SYS_RAWIO.
    pub fn open(kernel: Arc<dyn Kernel>, node: Node) -> Result<Self> {
        let file = OpenFile::open(kernel, &node, &node.to_string())?;
        Ok(Self { file, node })
    }

    /// A group that somebody handed over; takes the fd. `node` is for messages only.
    pub fn from_fd(kernel: Arc<dyn Kernel>, node: Node, fd: OwnedFd) -> Self {
        Self { file: OpenFile::new(kernel, fd, &node.to_string()), node }
    }

    /// Which node this is.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// `VFIO_GROUP_GET_STATUS`.
    ///
    /// # Errors
    /// ENODEV the group is gone.
    pub fn status(&self) -> Result<GroupStatus> {
        let mut bytes = Fields::with_argsz().u32(0).done();
        let arg = Arg::Struct { bytes: &mut bytes, fds: &[], out: None };
        self.file.ioctl(request::GROUP_GET_STATUS, arg)?;
        let flags = u32_at(&bytes, 4);
        Ok(GroupStatus {
            viable: flags & uapi::VFIO_GROUP_FLAGS_VIABLE != 0,
            attached: flags & uapi::VFIO_GROUP_FLAGS_CONTAINER_SET != 0,
        })
    }

    /// `VFIO_GROUP_SET_CONTAINER`: attaches the group.
    ///
    /// # Errors
    /// EPERM not viable, or no-IOMMU mixed with real; EINVAL attached already; ENODEV gone; EBADFD
    /// (EINVAL before Linux 6.2) not a container.
    pub fn set_container(&self, container: &Container) -> Result<()> {
        self.file.ioctl(request::GROUP_SET_CONTAINER, Arg::Fd(container.as_fd())).map(drop)
    }

    /// `VFIO_GROUP_UNSET_CONTAINER`: detaches it; the last group of a container takes all
    /// mappings with it.
    ///
    /// # Errors
    /// EINVAL not attached; EBUSY some process has a device of the group open.
    pub fn unset_container(&self) -> Result<()> {
        self.file.ioctl(request::GROUP_UNSET_CONTAINER, Arg::Value(0)).map(drop)
    }

    /// `VFIO_GROUP_GET_DEVICE_FD`: opens a device of an attached group. `name` is the BDF, for a
    /// VF with a token `BDF vf_token=UUID`.
    ///
    /// # Errors
    /// ENODEV no such device in the group; EINVAL not attached or no IOMMU type set; EACCES the
    /// vf_token is missing or wrong.
    pub fn device(&self, name: &str) -> Result<Device> {
        let call = request::GROUP_GET_DEVICE_FD;
        let failed = |errno| Error::new(call.name, name, errno);
        let text = CString::new(name).map_err(|_| failed(Errno::EINVAL))?;
        let call_on_it = Ioctl { request: call, arg: Arg::Text(&text) };
        let reply = self.file.kernel.ioctl(self.as_fd(), call_on_it).map_err(failed)?;
        let fd = reply.fd.ok_or_else(|| failed(Errno::EBADF))?;
        let bdf = name.split(' ').next().unwrap_or(name);
        Ok(Device::from_fd(Arc::clone(&self.file.kernel), bdf, fd))
    }

    /// Any request with any argument, for tests of what the kernel says to odd ones.
    pub fn raw(&self, request: Request, arg: Arg<'_>) -> Result<super::Reply> {
        self.file.ioctl(request, arg)
    }
}
