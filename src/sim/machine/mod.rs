//! VFIO as a state machine: open files in, errnos and new open files out. No I/O.
//!
//! One machine is one simulated kernel. Each call is decoded from the bytes a real one would have
//! got, and its checks are made in the order in which the kernel makes them.

mod call;
mod caller;
mod cdev;
mod config;
mod container;
mod device;
mod dirty;
mod drivers;
mod group;
mod hot_reset;
mod ioas;
mod iommufd;
mod iova;
mod irqs;
mod locks;
mod mappings;
mod memlock;
mod pages;
mod regions;
mod tables;
mod token;
mod type1;
mod view;

#[cfg(test)]
mod iommufd_properties;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

pub use call::{CallArg, Done, Event, FileId, Named, UserStruct};
pub use caller::{Caller, Capability, Mm};
pub(crate) use drivers::{DriverFile, Written};
pub(crate) use locks::Locks;
pub(crate) use view::DeviceView;

use super::profile::Profile;
use super::stats::{IommufdState, Space, Stats};
use super::topology::Topology;
use crate::bdf::Bdf;
use crate::kernel::Node;
use container::{Container, ContainerId};
use device::DeviceState;
use group::GroupState;
use iommufd::{Context, ContextId};
use memlock::Accounts;
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What an open file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum File {
    Container(ContainerId),
    /// The group, and which of its lives: a group dies with its last device on VFIO.
    Group(u32, u32),
    /// A device that came from its group.
    Device(usize),
    /// A device by its own node, bound or not.
    Cdev(usize),
    Iommufd(ContextId),
}

/// A simulated kernel.
#[derive(Debug)]
pub struct Machine {
    topology: Arc<Topology>,
    owner: u32,
    files: BTreeMap<FileId, File>,
    containers: BTreeMap<ContainerId, Container>,
    contexts: BTreeMap<ContextId, Context>,
    groups: BTreeMap<u32, GroupState>,
    devices: Vec<DeviceState>,
    accounts: Accounts,
    next: u64,
    /// The drivers that are loaded.
    drivers: BTreeSet<String>,
    /// The devices whose drivers were told to go, and have gone since this was asked last.
    left: Vec<Bdf>,
}

impl Machine {
    /// A machine just booted. `owner` is the uid that the group nodes belong to.
    pub fn new(topology: Topology, owner: u32) -> Self {
        let topology = Arc::new(topology);
        let mut devices: Vec<_> = topology
            .devices()
            .map(|(group, device)| DeviceState::new(device.clone(), group))
            .collect();
        for (device, number) in devices.iter_mut().filter(|device| device.on_vfio).zip(0..) {
            device.number = Some(number);
        }
        let mut groups: BTreeMap<u32, GroupState> = topology
            .groups
            .iter()
            .map(|group| (group.id, GroupState::new(group.clone())))
            .collect();
        for (index, device) in devices.iter().enumerate() {
            if let Some(group) = groups.get_mut(&device.group) {
                group.devices.push(index);
            }
        }
        Self {
            owner,
            files: BTreeMap::new(),
            containers: BTreeMap::new(),
            contexts: BTreeMap::new(),
            groups,
            devices,
            accounts: Accounts::new(topology.memlock),
            drivers: topology
                .devices()
                .filter_map(|(_, device)| device.driver.clone())
                .chain(["vfio-pci".to_owned()])
                .collect(),
            left: Vec::new(),
            topology,
            next: 1,
        }
    }

    /// The machine's description.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    fn profile(&self) -> Profile {
        self.topology.kernel
    }

    fn new_file(&mut self, file: File) -> FileId {
        let id = FileId(self.next);
        self.next += 1;
        self.files.insert(id, file);
        id
    }

    /// open(2) on a node.
    ///
    /// # Errors
    /// ENOENT no such node; EACCES not the nodes' owner; ENXIO nothing behind it any more; then
    /// what the group says.
    pub fn open(&mut self, node: &Node, caller: &dyn Caller) -> Result<FileId, Errno> {
        match *node {
            Node::Container => Ok(self.open_container()),
            Node::Group(id) => self.open_group(id, false, caller),
            Node::NoIommuGroup(id) => self.open_group(id, true, caller),
            Node::Iommu => self.open_iommufd(caller),
            Node::Cdev(number) => self.open_cdev(number, caller),
        }
    }

    /// # Errors
    /// EACCES: the nodes are another user's.
    fn may_open(&self, caller: &dyn Caller) -> Result<(), Errno> {
        let may = caller.uid() == self.owner || caller.capable(Capability::DacOverride);
        if may { Ok(()) } else { Err(Errno::EACCES) }
    }

    /// Whether a caller has a capability that using a device takes.
    fn has_right(&self, caller: &dyn Caller, right: Capability) -> bool {
        let as_owner = self.topology.owner_rights && caller.uid() == self.owner;
        as_owner || caller.capable(right)
    }

    /// ioctl(2) on an open file.
    ///
    /// # Errors
    /// What the kernel says; EBADF for a file that is not open.
    pub fn ioctl(
        &mut self,
        file: FileId,
        number: u32,
        arg: &mut CallArg,
        caller: &dyn Caller,
    ) -> Result<Done, Errno> {
        match *self.files.get(&file).ok_or(Errno::EBADF)? {
            File::Container(id) => self.container_ioctl(id, number, arg, caller),
            File::Group(id, life) => self.group_ioctl(id, life, number, arg, caller),
            File::Device(index) => self.device_ioctl(index, number, arg),
            File::Cdev(index) => self.cdev_ioctl(file, index, number, arg),
            File::Iommufd(id) => self.iommufd_ioctl(id, number, arg, caller),
        }
    }

    /// pread(2) on an open file.
    ///
    /// # Errors
    /// EINVAL not a device, no such region, outside of it; EIO memory decoding is off.
    pub fn read(&mut self, file: FileId, len: usize, offset: u64) -> Result<Vec<u8>, Errno> {
        match *self.files.get(&file).ok_or(Errno::EBADF)? {
            File::Device(index) => self.device_read(index, len, offset),
            File::Cdev(index) => {
                self.bound_by(file, index)?;
                self.device_read(index, len, offset)
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// pwrite(2) on an open file.
    ///
    /// # Errors
    /// As [`Machine::read`].
    pub fn write(&mut self, file: FileId, bytes: &[u8], offset: u64) -> Result<usize, Errno> {
        match *self.files.get(&file).ok_or(Errno::EBADF)? {
            File::Device(index) => self.device_write(index, bytes, offset),
            File::Cdev(index) => {
                self.bound_by(file, index)?;
                self.device_write(index, bytes, offset)
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// The last close of an open file, in whichever process.
    pub fn close(&mut self, file: FileId) {
        match self.files.remove(&file) {
            Some(File::Container(id)) => self.close_container(id),
            Some(File::Group(id, life)) => self.close_group(id, life),
            Some(File::Device(index)) => {
                self.close_device(index);
                self.leave_if_closed(index);
            }
            Some(File::Cdev(index)) => {
                self.close_cdev(file, index);
                self.leave_if_closed(index);
            }
            Some(File::Iommufd(id)) => self.close_iommufd(id),
            None => {}
        }
    }

    /// The path that an open file was opened by, or a device's address: for messages and faults.
    pub fn name(&self, file: FileId) -> String {
        match self.files.get(&file) {
            Some(File::Container(_)) => Node::Container.to_string(),
            Some(File::Group(id, _)) => self.node(*id).to_string(),
            Some(File::Iommufd(_)) => Node::Iommu.to_string(),
            Some(File::Device(index) | File::Cdev(index)) => self
                .devices
                .get(*index)
                .map(|device| device.facts.bdf.to_string())
                .unwrap_or_default(),
            None => String::new(),
        }
    }

    /// What is open and mapped.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        for file in self.files.values() {
            match file {
                File::Container(_) => stats.containers += 1,
                File::Group(..) => stats.groups += 1,
                File::Device(_) => stats.devices += 1,
                File::Cdev(_) => stats.cdevs += 1,
                File::Iommufd(_) => stats.open_iommufds += 1,
            }
        }
        for (id, container) in &self.containers {
            let iommu = container.type1();
            stats.spaces.push(Space {
                id: id.0,
                open: container.open,
                groups: container.groups.clone(),
                iommu: container.iommu_name(),
                mappings: iommu.map_or(0, |iommu| iommu.mappings.len() as u64),
                mapped_bytes: iommu.map_or(0, type1::Type1::mapped_bytes),
                pinned_bytes: iommu.map_or(0, type1::Type1::charged_bytes),
            });
        }
        for (id, context) in &self.contexts {
            let is_device = |kind: &iommufd::Kind| matches!(kind, iommufd::Kind::Device);
            let objects = context.objects.values();
            stats.iommufds.push(IommufdState {
                id: id.0,
                open: context.open,
                per_process: context.per_process,
                spaces: context.all_ioas().count() as u64,
                devices: objects.filter(|object| is_device(&object.kind)).count() as u64,
                mappings: context.all_ioas().map(|ioas| ioas.areas.len() as u64).sum(),
                mapped_bytes: context.all_ioas().map(ioas::Ioas::mapped_bytes).sum(),
                pinned_bytes: context.pages.values().map(pages::Pages::pinned_bytes).sum(),
            });
        }
        let processes = self.accounts.processes.iter();
        stats.locked = processes.map(|(mm, bytes)| (mm.pid, *bytes)).collect();
        stats.locked_users = self.accounts.users.clone();
        stats
    }
}

/// The numbers of requests that need no name of their own in the kernel layer.
mod number {
    /// `VFIO_DEVICE_FEATURE`: the number of `VFIO_IOMMU_DIRTY_PAGES`, on a device.
    pub(super) const DEVICE_FEATURE: u32 = crate::kernel::request::IOMMU_DIRTY_PAGES.number;
}
