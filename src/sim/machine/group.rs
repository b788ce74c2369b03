//! Groups: `/dev/vfio/N`, viability, and the way from a group to its devices.

use super::container::ContainerId;
use super::{CallArg, Caller, Capability, Done, File, FileId, Machine, Named};
use crate::kernel::{Node, request};
use crate::sim::topology;
use nix::errno::Errno;
use vfio_bindings::bindings::vfio as uapi;

/// A group. Its open file lives while its fd or a device of it is open.
#[derive(Debug)]
pub(super) struct GroupState {
    pub(super) facts: topology::Group,
    /// Indexes of its devices.
    pub(super) devices: Vec<usize>,
    /// Counts how often the group has died; files of an earlier life find nothing.
    pub(super) life: u32,
    pub(super) fd_open: bool,
    pub(super) open_devices: u32,
    pub(super) container: Option<ContainerId>,
}

impl GroupState {
    pub(super) fn new(facts: topology::Group) -> Self {
        Self {
            facts,
            devices: Vec::new(),
            life: 0,
            fd_open: false,
            open_devices: 0,
            container: None,
        }
    }

    /// Whether its file is open: by an fd of its own, or held by a device's.
    pub(super) fn file_open(&self) -> bool {
        self.fd_open || self.open_devices > 0
    }
}

impl Machine {
    pub(super) fn node(&self, group: u32) -> Node {
        let noiommu = self.groups.get(&group).is_some_and(|group| group.facts.noiommu);
        if noiommu { Node::NoIommuGroup(group) } else { Node::Group(group) }
    }

    /// Whether any device of the group is on a VFIO driver, so that it has a node.
    pub(crate) fn has_node(&self, group: u32) -> bool {
        let on_vfio = |&index: &usize| self.devices.get(index).is_some_and(|device| device.on_vfio);
        self.groups.get(&group).is_some_and(|group| group.devices.iter().any(on_vfio))
    }

    /// Whether no driver of the group uses DMA for the host.
    pub(super) fn viable(&self, group: &GroupState) -> bool {
        let claims = |&index: &usize| self.devices.get(index).is_some_and(|it| it.claims_dma());
        !group.devices.iter().any(claims)
    }

    pub(super) fn open_group(
        &mut self,
        id: u32,
        noiommu: bool,
        caller: &dyn Caller,
    ) -> Result<FileId, Errno> {
        let group = self.groups.get(&id).ok_or(Errno::ENOENT)?;
        if group.facts.noiommu != noiommu || !self.has_node(id) {
            return Err(Errno::ENOENT);
        }
        self.may_open(caller)?;
        if noiommu && !self.has_right(caller, Capability::SysRawio) {
            return Err(Errno::EPERM);
        }
        // Used by its cdevs, or open already.
        if self.dma_owner(id).is_some() || group.file_open() {
            return Err(Errno::EBUSY);
        }
        let group = self.groups.get_mut(&id).ok_or(Errno::ENOENT)?;
        group.fd_open = true;
        let life = group.life;
        Ok(self.new_file(File::Group(id, life)))
    }

    pub(super) fn close_group(&mut self, id: u32, life: u32) {
        if let Some(group) = self.groups.get_mut(&id).filter(|group| group.life == life) {
            group.fd_open = false;
        }
        self.release_group(id);
    }

    /// What the last reference to a group's file takes with it.
    pub(super) fn release_group(&mut self, id: u32) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        if !group.file_open()
            && let Some(container) = group.container.take()
        {
            self.detach(container, id);
        }
    }

    pub(super) fn group_ioctl(
        &mut self,
        id: u32,
        life: u32,
        number: u32,
        arg: &mut CallArg,
        caller: &dyn Caller,
    ) -> Result<Done, Errno> {
        let alive = self.groups.get(&id).is_some_and(|group| group.life == life);
        match number {
            _ if number == request::GROUP_GET_DEVICE_FD.number => {
                self.get_device_fd(id, alive, arg, caller)
            }
            _ if number == request::GROUP_GET_STATUS.number => {
                self.group_status(id, alive, arg).map(|()| Done::default())
            }
            _ if number == request::GROUP_SET_CONTAINER.number => {
                self.set_container(id, alive, arg, caller).map(|()| Done::default())
            }
            _ if number == request::GROUP_UNSET_CONTAINER.number => {
                self.unset_container(id, alive).map(|()| Done::default())
            }
            _ => Err(Errno::ENOTTY),
        }
    }

    fn group_status(&self, id: u32, alive: bool, arg: &mut CallArg) -> Result<(), Errno> {
        let user = arg.user()?;
        if user.argsz() < 8 {
            return Err(Errno::EINVAL);
        }
        let group = self.groups.get(&id).filter(|_| alive).ok_or(Errno::ENODEV)?;
        let flags = if group.container.is_some() {
            uapi::VFIO_GROUP_FLAGS_CONTAINER_SET | uapi::VFIO_GROUP_FLAGS_VIABLE
        } else if self.viable(group) {
            uapi::VFIO_GROUP_FLAGS_VIABLE
        } else {
            0
        };
        user.set_u32(4, flags);
        Ok(())
    }

    fn set_container(
        &mut self,
        id: u32,
        alive: bool,
        arg: &CallArg,
        caller: &dyn Caller,
    ) -> Result<(), Errno> {
        let named = match arg {
            CallArg::File(named) => named.as_ref().ok_or(Errno::EBADF)?,
            // Some number of the caller's that it did not send: nothing is open under it.
            CallArg::Struct(_) => return Err(Errno::EBADF),
            _ => return Err(Errno::EFAULT),
        };
        let container = match named {
            Named::File(file) => match self.files.get(file) {
                Some(File::Container(container)) => Some(*container),
                _ => None,
            },
            _ => None,
        };
        let group = self.groups.get(&id).filter(|_| alive).ok_or(Errno::ENODEV)?;
        if group.container.is_some() {
            return Err(Errno::EINVAL);
        }
        let container = container.ok_or(self.profile().foreign_container())?;
        let (noiommu, viable) = (group.facts.noiommu, self.viable(group));
        self.attach(container, id, noiommu, viable, caller)?;
        if let Some(group) = self.groups.get_mut(&id) {
            group.container = Some(container);
        }
        Ok(())
    }

    fn unset_container(&mut self, id: u32, alive: bool) -> Result<(), Errno> {
        let group = self.groups.get_mut(&id).filter(|_| alive).ok_or(Errno::EINVAL)?;
        let container = group.container.ok_or(Errno::EINVAL)?;
        if group.open_devices > 0 {
            return Err(Errno::EBUSY);
        }
        group.container = None;
        self.detach(container, id);
        Ok(())
    }

    fn get_device_fd(
        &mut self,
        id: u32,
        alive: bool,
        arg: &CallArg,
        caller: &dyn Caller,
    ) -> Result<Done, Errno> {
        let CallArg::Text(text) = arg else { return Err(Errno::EFAULT) };
        // strndup_user takes at most a page, its NUL included.
        if text.len() >= 4096 {
            return Err(Errno::EINVAL);
        }
        let group = self.groups.get(&id).filter(|_| alive).ok_or(Errno::ENODEV)?;
        let candidates = group.devices.clone();
        // The latest to be bound is the first to be asked.
        let mut found = Err(Errno::ENODEV);
        for index in candidates.into_iter().rev() {
            if self.matches(index, text)? {
                found = Ok(index);
                break;
            }
        }
        let index = found?;
        self.open_device(id, index, caller)?;
        let file = self.new_file(File::Device(index));
        Ok(Done { value: 0, file: Some(file) })
    }

    fn open_device(&mut self, id: u32, index: usize, caller: &dyn Caller) -> Result<(), Errno> {
        let group = self.groups.get(&id).ok_or(Errno::ENODEV)?;
        let container = group.container.ok_or(Errno::EINVAL)?;
        let ready = self.containers.get(&container).is_some_and(|it| it.iommu.is_some());
        let first = self.devices.get(index).is_some_and(|device| device.opens == 0);
        if first && !ready {
            return Err(Errno::EINVAL);
        }
        if first && group.facts.noiommu && !self.has_right(caller, Capability::SysRawio) {
            return Err(Errno::EPERM);
        }
        self.first_or_next_open(index);
        if let Some(group) = self.groups.get_mut(&id) {
            group.open_devices += 1;
        }
        Ok(())
    }
}
