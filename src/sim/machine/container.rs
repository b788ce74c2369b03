//! Containers: `/dev/vfio/vfio`, the groups in it, and which IOMMU driver it has.

use super::type1::Type1;
use super::{CallArg, Caller, Capability, Done, File, FileId, Machine};
use crate::kernel::request;
use nix::errno::Errno;
use vfio_bindings::bindings::vfio as uapi;

/// `VFIO_TYPE1_NESTING_IOMMU`, which newer headers no longer have.
const TYPE1_NESTING: u32 = 6;

/// A container's number, never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ContainerId(pub(super) u64);

/// A container. It lives while its file is open or a group is in it.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) open: bool,
    pub(super) groups: Vec<u32>,
    /// Whether the groups in it, or the last that were, have no IOMMU.
    pub(super) noiommu: bool,
    pub(super) iommu: Option<Iommu>,
}

#[derive(Debug)]
pub(super) enum Iommu {
    Type1(Box<Type1>),
    NoIommu,
}

impl Container {
    pub(super) fn type1(&self) -> Option<&Type1> {
        match &self.iommu {
            Some(Iommu::Type1(type1)) => Some(type1),
            _ => None,
        }
    }

    pub(super) fn iommu_name(&self) -> Option<String> {
        let name = match self.iommu.as_ref()? {
            Iommu::Type1(type1) if type1.v2 => "type1v2",
            Iommu::Type1(_) => "type1",
            Iommu::NoIommu => "noiommu",
        };
        Some(name.into())
    }
}

impl Machine {
    pub(super) fn open_container(&mut self) -> FileId {
        let id = ContainerId(self.next);
        let container = Container { open: true, groups: Vec::new(), noiommu: false, iommu: None };
        self.containers.insert(id, container);
        self.new_file(File::Container(id))
    }

    pub(super) fn close_container(&mut self, id: ContainerId) {
        if let Some(container) = self.containers.get_mut(&id) {
            container.open = false;
        }
        self.drop_unused_container(id);
    }

    fn drop_unused_container(&mut self, id: ContainerId) {
        let unused = |container: &Container| !container.open && container.groups.is_empty();
        if self.containers.get(&id).is_some_and(unused) {
            self.containers.remove(&id);
        }
    }

    pub(super) fn container_ioctl(
        &mut self,
        id: ContainerId,
        number: u32,
        arg: &mut CallArg,
        caller: &dyn Caller,
    ) -> Result<Done, Errno> {
        if number == request::GET_API_VERSION.number {
            return Ok(Done::value(uapi::VFIO_API_VERSION as i32));
        }
        if number == request::CHECK_EXTENSION.number {
            return self.check_extension(id, arg.value()).map(Done::value);
        }
        if number == request::SET_IOMMU.number {
            return self.set_iommu(id, arg.value(), caller).map(|()| Done::default());
        }
        let container = self.containers.get(&id).ok_or(Errno::EBADF)?;
        match &container.iommu {
            None => Err(Errno::EINVAL),
            Some(Iommu::NoIommu) => Err(Errno::ENOTTY),
            Some(Iommu::Type1(_)) => self.type1_ioctl(id, number, arg, caller),
        }
    }

    /// Before a driver is set all that may be are asked; after, only that one.
    fn check_extension(&self, id: ContainerId, extension: u64) -> Result<i32, Errno> {
        let container = self.containers.get(&id).ok_or(Errno::EBADF)?;
        let empty = container.groups.is_empty();
        let type1 = match &container.iommu {
            Some(Iommu::NoIommu) => false,
            Some(Iommu::Type1(_)) => true,
            None => empty || !container.noiommu,
        };
        let noiommu = match &container.iommu {
            Some(Iommu::NoIommu) => true,
            Some(Iommu::Type1(_)) => false,
            None => empty || container.noiommu,
        };
        let set = container.iommu.is_some();
        let answer = (type1 && self.type1_extension(extension, set))
            || (noiommu && self.noiommu_extension(extension));
        Ok(i32::from(answer))
    }

    fn type1_extension(&self, extension: u64, set: bool) -> bool {
        let Ok(extension) = u32::try_from(extension) else { return false };
        match extension {
            uapi::VFIO_TYPE1_IOMMU => self.topology.type1.contains(&1),
            uapi::VFIO_TYPE1v2_IOMMU => self.topology.type1.contains(&2),
            TYPE1_NESTING => self.profile().has_nesting() && self.topology.type1.contains(&2),
            uapi::VFIO_UNMAP_ALL => true,
            uapi::VFIO_UPDATE_VADDR => set,
            uapi::VFIO_DMA_CC_IOMMU => set && self.topology.dma_coherent,
            _ => false,
        }
    }

    fn noiommu_extension(&self, extension: u64) -> bool {
        self.topology.noiommu && extension == u64::from(uapi::VFIO_NOIOMMU_IOMMU)
    }

    fn set_iommu(&mut self, id: ContainerId, kind: u64, caller: &dyn Caller) -> Result<(), Errno> {
        let container = self.containers.get(&id).ok_or(Errno::EBADF)?;
        if container.groups.is_empty() || container.iommu.is_some() {
            return Err(Errno::EINVAL);
        }
        let iommu = if container.noiommu {
            if !self.noiommu_extension(kind) {
                return Err(Errno::ENODEV);
            }
            if !self.has_right(caller, Capability::SysRawio) {
                return Err(Errno::EPERM);
            }
            Iommu::NoIommu
        } else {
            if !self.type1_extension(kind, false) {
                return Err(Errno::ENODEV);
            }
            let v2 = match u32::try_from(kind) {
                Ok(uapi::VFIO_TYPE1_IOMMU) => false,
                Ok(uapi::VFIO_TYPE1v2_IOMMU) => true,
                // The other extensions of the driver are no types, and the IOMMU does not nest.
                _ => return Err(Errno::EINVAL),
            };
            if !self.interrupts_are_safe() {
                return Err(Errno::EPERM);
            }
            Iommu::Type1(Box::new(Type1::new(v2, &self.topology)))
        };
        if let Some(container) = self.containers.get_mut(&id) {
            container.iommu = Some(iommu);
        }
        self.refresh_ranges(id);
        Ok(())
    }

    pub(super) fn interrupts_are_safe(&self) -> bool {
        self.topology.interrupt_remapping || self.topology.allow_unsafe_interrupts
    }

    /// Attaches a group that is in no container and has been found viable.
    pub(super) fn attach(
        &mut self,
        id: ContainerId,
        group: u32,
        noiommu: bool,
        viable: bool,
        caller: &dyn Caller,
    ) -> Result<(), Errno> {
        if noiommu && !self.has_right(caller, Capability::SysRawio) {
            return Err(Errno::EPERM);
        }
        let container = self.containers.get(&id).ok_or(Errno::EBADF)?;
        if !container.groups.is_empty() && container.noiommu != noiommu {
            return Err(Errno::EPERM);
        }
        if !noiommu && !viable {
            return Err(Errno::EPERM);
        }
        if let Some(type1) = container.type1() {
            if type1.has_invalid() {
                return Err(Errno::EBUSY);
            }
            if type1.conflicts(&self.unusable(&[group])) {
                return Err(Errno::EINVAL);
            }
            if !self.interrupts_are_safe() {
                return Err(Errno::EPERM);
            }
        }
        if let Some(container) = self.containers.get_mut(&id) {
            container.noiommu = noiommu;
            container.groups.push(group);
        }
        self.refresh_ranges(id);
        Ok(())
    }

    /// Takes a group out. The last one takes the IOMMU and all mappings with it.
    pub(super) fn detach(&mut self, id: ContainerId, group: u32) {
        let Some(container) = self.containers.get_mut(&id) else { return };
        container.groups.retain(|&other| other != group);
        if container.groups.is_empty() {
            if let Some(Iommu::Type1(type1)) = container.iommu.take() {
                for mapping in type1.mappings.into_values() {
                    self.uncharge(mapping.mm, mapping.charged);
                }
            }
        } else {
            self.refresh_ranges(id);
        }
        self.drop_unused_container(id);
    }
}
