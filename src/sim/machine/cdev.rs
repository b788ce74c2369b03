//! A device by its own node, `/dev/vfio/devices/vfioN`: several opens, one of which can be bound to
//! an iommufd.

use super::iommufd::{ContextId, Kind};
use super::tables::Candidate;
use super::{CallArg, Caller, Done, File, FileId, Machine, Named, UserStruct};
use crate::kernel::request;
use nix::errno::Errno;
use uuid::Uuid;
use vfio_bindings::bindings::vfio as uapi;

/// Where a device is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bound {
    /// By which open file; it is of use to no other.
    pub(super) file: FileId,
    pub(super) context: ContextId,
    /// Its object there.
    pub(super) id: u32,
}

impl Machine {
    pub(super) fn open_cdev(&mut self, number: u32, caller: &dyn Caller) -> Result<FileId, Errno> {
        let named = |index: &usize| self.cdev_number(*index) == Some(number);
        let index = (0..self.devices.len()).find(named).ok_or(Errno::ENOENT)?;
        self.may_open(caller)?;
        self.device(index)?.cdevs += 1;
        Ok(self.new_file(File::Cdev(index)))
    }

    /// The N of a device's node, where it has one.
    pub(crate) fn cdev_number(&self, index: usize) -> Option<u32> {
        let device = self.devices.get(index)?;
        let noiommu = self.groups.get(&device.group).is_some_and(|group| group.facts.noiommu);
        let registered = device.is_registered(self.profile());
        device.number.filter(|_| self.topology.has_cdev() && !noiommu && registered)
    }

    pub(super) fn close_cdev(&mut self, file: FileId, index: usize) {
        let Some(device) = self.devices.get_mut(index) else { return };
        device.cdevs = device.cdevs.saturating_sub(1);
        let Some(bound) = device.bound.take_if(|bound| bound.file == file) else { return };
        let group = device.group;
        self.one_close(index);
        if let Some(context) = self.contexts.get_mut(&bound.context) {
            context.detach_device(&mut self.accounts, bound.id, group);
            context.objects.remove(&bound.id);
        }
        self.drop_unused_context(bound.context);
    }

    pub(super) fn cdev_ioctl(
        &mut self,
        file: FileId,
        index: usize,
        number: u32,
        arg: &mut CallArg,
    ) -> Result<Done, Errno> {
        if number == request::DEVICE_BIND_IOMMUFD.number {
            return self.bind_iommufd(file, index, arg.user()?).map(|()| Done::default());
        }
        let bound = self.bound_by(file, index)?;
        match number {
            _ if number == request::DEVICE_ATTACH_IOMMUFD_PT.number => {
                self.attach_iommufd_pt(index, bound, arg.user()?).map(|()| Done::default())
            }
            _ if number == request::DEVICE_DETACH_IOMMUFD_PT.number => {
                self.detach_iommufd_pt(index, bound, arg.user()?).map(|()| Done::default())
            }
            _ => self.device_ioctl(index, number, arg),
        }
    }

    /// Where an open file has its device bound to.
    ///
    /// # Errors
    /// EINVAL: nowhere.
    pub(super) fn bound_by(&self, file: FileId, index: usize) -> Result<Bound, Errno> {
        let bound = self.devices.get(index).and_then(|device| device.bound);
        bound.filter(|bound| bound.file == file).ok_or(Errno::EINVAL)
    }

    fn bind_iommufd(
        &mut self,
        file: FileId,
        index: usize,
        user: &mut UserStruct,
    ) -> Result<(), Errno> {
        self.check_bind(user)?;
        let group = self.device(index)?.group;
        if self.groups.get(&group).is_some_and(super::group::GroupState::file_open) {
            return Err(Errno::EBUSY);
        }
        if self.bound_by(file, index).is_ok() {
            return Err(Errno::EINVAL);
        }
        if self.profile().binds_with_token() {
            self.check_bind_token(index, user)?;
        }
        let context = match user.fd(8)?.ok_or(Errno::EINVAL)? {
            Named::File(named) => match self.files.get(&named) {
                Some(File::Iommufd(context)) => *context,
                _ => return Err(Errno::EBADFD),
            },
            _ => return Err(Errno::EBADFD),
        };
        if self.device(index)?.opens > 0 {
            return Err(Errno::EINVAL);
        }
        // The module parameter is iommufd's own, the machine has one for both.
        if !self.interrupts_are_safe() || !self.may_own_dma(group, context) {
            return Err(Errno::EPERM);
        }
        let id = self.contexts.get_mut(&context).ok_or(Errno::EBADFD)?.add(Kind::Device);
        if let Some(context) = self.contexts.get_mut(&context) {
            context.use_object(id, 1);
        }
        self.first_or_next_open(index);
        self.device(index)?.bound = Some(Bound { file, context, id });
        user.set_u32(12, id);
        Ok(())
    }

    /// What `VFIO_DEVICE_BIND_IOMMUFD` finds wrong with its struct, whatever it is called on.
    pub(super) fn check_bind(&self, user: &UserStruct) -> Result<(), Errno> {
        const FIRST: usize = 16;
        const WHOLE: usize = 24;
        let knows_token = self.profile().binds_with_token();
        let size = user.argsz();
        if size < FIRST {
            return Err(Errno::EINVAL);
        }
        if knows_token && user.bytes.iter().take(size).skip(WHOLE).any(|&byte| byte != 0) {
            return Err(Errno::E2BIG);
        }
        let known = if knows_token { uapi::VFIO_DEVICE_BIND_FLAG_TOKEN } else { 0 };
        if user.u32(4) & !known != 0 || matches!(user.fd(8), Ok(None)) {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    fn check_bind_token(&mut self, index: usize, user: &UserStruct) -> Result<(), Errno> {
        let token = if user.u32(4) & uapi::VFIO_DEVICE_BIND_FLAG_TOKEN == 0 {
            None
        } else {
            let bytes = user.out.as_deref().and_then(|out| out.get(..16)).ok_or(Errno::EFAULT)?;
            Some(Uuid::from_slice(bytes).map_err(|_| Errno::EFAULT)?)
        };
        self.check_token(index, token)
    }

    /// Whether an iommufd can have a group: nobody else has, neither another iommufd nor the host.
    fn may_own_dma(&self, group: u32, context: ContextId) -> bool {
        let owner = self.dma_owner(group);
        let viable = self.groups.get(&group).is_some_and(|group| self.viable(group));
        owner.is_none_or(|owner| owner == context) && viable
    }

    /// The iommufd that devices of a group are bound to.
    pub(super) fn dma_owner(&self, group: u32) -> Option<ContextId> {
        let devices = &self.groups.get(&group)?.devices;
        devices.iter().find_map(|&index| Some(self.devices.get(index)?.bound?.context))
    }

    fn attach_iommufd_pt(
        &mut self,
        index: usize,
        bound: Bound,
        user: &mut UserStruct,
    ) -> Result<(), Errno> {
        if user.argsz() < 12 || user.u32(4) != 0 {
            return Err(Errno::EINVAL);
        }
        let group = self.device(index)?.group;
        let reserved = self.reserved_of(&[group]);
        let aperture = self.topology.aperture;
        let device = Candidate { id: bound.id, group, reserved, aperture };
        let context = self.contexts.get_mut(&bound.context).ok_or(Errno::EINVAL)?;
        let table = context.attach(&mut self.accounts, &device, user.u32(8))?;
        user.set_u32(8, table);
        Ok(())
    }

    fn detach_iommufd_pt(
        &mut self,
        index: usize,
        bound: Bound,
        user: &UserStruct,
    ) -> Result<(), Errno> {
        if user.argsz() < 8 || user.u32(4) != 0 {
            return Err(Errno::EINVAL);
        }
        let group = self.device(index)?.group;
        if let Some(context) = self.contexts.get_mut(&bound.context) {
            context.detach_device(&mut self.accounts, bound.id, group);
        }
        Ok(())
    }
}
