//! A device by its own node, `/dev/vfio/devices/vfioN`: opened without its group, and of no use
//! until it is bound to an iommufd.

use super::open_file::OpenFile;
use super::parse::{Fields, u32_at};
use super::{Arg, Device, FdSlot, Iommufd, Kernel, Node, Result, request};
use std::os::fd::AsFd;
use std::sync::Arc;
use vfio_bindings::bindings::vfio as uapi;

impl Device {
    /// Opens a device's cdev; `name` is for messages only. Nothing but [`Device::bind_iommufd`] can
    /// be done with it before that.
    ///
    /// # Errors
    /// ENOENT no such node, or a kernel without cdevs; ENODEV its driver is about to go; EACCES no
    /// rights to the node.
    pub fn open_cdev(kernel: Arc<dyn Kernel>, number: u32, name: &str) -> Result<Self> {
        OpenFile::open(kernel, &Node::Cdev(number), name).map(Self)
    }

    /// `VFIO_DEVICE_BIND_IOMMUFD`: makes a cdev usable, as this open file alone; returns the
    /// device's id in the iommufd, which it keeps alive from now on. The last close undoes it.
    ///
    /// # Errors
    /// EINVAL bound already, by this or another open file, or not a cdev; EBUSY its group is open;
    /// EPERM its group is another iommufd's or the host's, or interrupts are not remapped; EBADFD
    /// no iommufd; EACCES it wants a vf_token.
    pub fn bind_iommufd(&self, iommufd: &Iommufd) -> Result<u32> {
        let bytes = Fields::with_argsz().u32(0).u32(0).u32(0).done();
        self.bind(bytes, iommufd, None)
    }

    /// [`Device::bind_iommufd`] with a VF token, Linux 6.17 and later: what a VF whose PF is on
    /// VFIO takes, and what sets a PF's.
    ///
    /// # Errors
    /// EACCES a wrong token; EINVAL a device that takes none, or a kernel that knows none.
    pub fn bind_iommufd_with_token(&self, iommufd: &Iommufd, token: &[u8; 16]) -> Result<u32> {
        let flags = uapi::VFIO_DEVICE_BIND_FLAG_TOKEN;
        let bytes = Fields::with_argsz().u32(flags).u32(0).u32(0).u64(0).done();
        let mut token = *token;
        self.bind(bytes, iommufd, Some((16, &mut token)))
    }

    fn bind(
        &self,
        mut bytes: Vec<u8>,
        iommufd: &Iommufd,
        out: Option<(usize, &mut [u8])>,
    ) -> Result<u32> {
        let fds = [FdSlot { offset: 8, fd: Some(iommufd.as_fd()) }];
        let arg = Arg::Struct { bytes: &mut bytes, fds: &fds, out };
        self.0.call(request::DEVICE_BIND_IOMMUFD, arg)?;
        Ok(u32_at(&bytes, 12))
    }

    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`: gives a bound cdev an IOAS or a page table of its iommufd,
    /// instead of the one it has, if any; returns the page table's id. What is mapped there is
    /// pinned now if no device had it yet.
    ///
    /// # Errors
    /// ENOENT no such id; EINVAL not something to attach to, another device of the group is
    /// attached elsewhere, or not a bound cdev; EADDRINUSE a mapping lies where the device can't
    /// reach; ENOMEM and EFAULT as [`Iommufd::ioas_map`].
    pub fn attach_iommufd_pt(&self, id: u32) -> Result<u32> {
        let mut bytes = Fields::with_argsz().u32(0).u32(id).done();
        self.0.call_struct(request::DEVICE_ATTACH_IOMMUFD_PT, &mut bytes)?;
        Ok(u32_at(&bytes, 8))
    }

    /// `VFIO_DEVICE_DETACH_IOMMUFD_PT`: takes it away again; success also where there is none.
    ///
    /// # Errors
    /// EINVAL not a bound cdev.
    pub fn detach_iommufd_pt(&self) -> Result<()> {
        let mut bytes = Fields::with_argsz().u32(0).done();
        self.0.call_struct(request::DEVICE_DETACH_IOMMUFD_PT, &mut bytes).map(drop)
    }
}
