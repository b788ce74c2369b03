//! Bus resets: `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO` and `VFIO_DEVICE_PCI_HOT_RESET`.

use super::iommufd::ContextId;
use super::{File, Machine, Named, UserStruct};
use nix::errno::Errno;
use vfio_bindings::bindings::vfio as uapi;

const BY_ID: u32 = uapi::VFIO_PCI_HOT_RESET_FLAG_DEV_ID;
const ALL_OWNED: u32 = uapi::VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED;
/// Not bound itself, but of a group that is the iommufd's.
const OWNED: u32 = uapi::VFIO_PCI_DEVID_OWNED;
const NOT_OWNED: u32 = uapi::VFIO_PCI_DEVID_NOT_OWNED as u32;

impl Machine {
    /// The indexes of the devices that a bus reset of this one hits; none where its bus can't be
    /// reset.
    fn reset_set(&self, index: usize) -> Vec<usize> {
        let Some(device) = self.devices.get(index) else { return Vec::new() };
        let bdf = device.facts.bdf;
        let hit = |other: &super::device::DeviceState| match &device.facts.hot_reset {
            Some(list) => list.contains(&other.facts.bdf),
            // Bus 0 has no bridge above it that could reset it; a VF has no bus of its own.
            None if bdf.bus == 0 || device.facts.physfn.is_some() => false,
            None => {
                let there = other.facts.bdf;
                there.segment == bdf.segment && there.bus == bdf.bus
            }
        };
        let all = self.devices.iter().enumerate();
        all.filter(|(_, other)| hit(other)).map(|(index, _)| index).collect()
    }

    pub(super) fn hot_reset_info(
        &mut self,
        index: usize,
        user: &mut UserStruct,
    ) -> Result<(), Errno> {
        if user.argsz() < 12 {
            return Err(Errno::EINVAL);
        }
        let set = self.reset_set(index);
        if set.is_empty() {
            return Err(Errno::ENODEV);
        }
        let room = (user.argsz() - 12) / 8;
        user.set_u32(4, 0);
        user.set_u32(8, set.len() as u32);
        if set.len() > room {
            return Err(Errno::ENOSPC);
        }
        let context = self.device(index)?.bound.map(|bound| bound.context);
        if context.is_some() {
            let all = set.iter().all(|index| self.id_in(*index, context) != NOT_OWNED);
            user.set_u32(4, BY_ID | if all { ALL_OWNED } else { 0 });
        }
        for (i, index) in set.iter().enumerate() {
            let Some(device) = self.devices.get(*index) else { continue };
            let bdf = device.facts.bdf;
            let owner = if context.is_some() { self.id_in(*index, context) } else { device.group };
            user.set_u32(12 + 8 * i, owner);
            user.copy_out(16 + 8 * i, &(bdf.segment as u16).to_ne_bytes());
            user.copy_out(18 + 8 * i, &[bdf.bus, bdf.devfn()]);
        }
        Ok(())
    }

    /// A device's id in an iommufd, as a hot reset sees it.
    fn id_in(&self, index: usize, context: Option<ContextId>) -> u32 {
        let Some(device) = self.devices.get(index).filter(|device| device.on_vfio) else {
            return NOT_OWNED;
        };
        match device.bound {
            Some(bound) if Some(bound.context) == context => bound.id,
            _ if context.is_some() && self.dma_owner(device.group) == context => OWNED,
            _ => NOT_OWNED,
        }
    }

    pub(super) fn hot_reset(&mut self, index: usize, user: &UserStruct) -> Result<(), Errno> {
        let count = user.u32(8) as usize;
        if user.argsz() < 12 || user.u32(4) != 0 {
            return Err(Errno::EINVAL);
        }
        let set = self.reset_set(index);
        if let Some(bound) = self.device(index)?.bound {
            return self.hot_reset_by_id(&set, count, bound.context);
        }
        if count == 0 && self.profile().counts_groups_first() {
            return Err(Errno::EINVAL);
        }
        if set.is_empty() {
            return Err(Errno::ENODEV);
        }
        if count == 0 || count > set.len() {
            return Err(Errno::EINVAL);
        }
        let mut groups = Vec::new();
        for i in 0..count {
            match user.fd(12 + 4 * i)? {
                None => return Err(Errno::EBADF),
                Some(Named::File(file)) => match self.files.get(&file) {
                    Some(File::Group(id, _)) => groups.push(*id),
                    _ => return Err(Errno::EINVAL),
                },
                Some(_) => return Err(Errno::EINVAL),
            }
        }
        let owned = |index: &usize| {
            let device = self.devices.get(*index);
            device.is_some_and(|device| device.on_vfio && groups.contains(&device.group))
        };
        if !set.iter().all(owned) {
            return Err(Errno::EINVAL);
        }
        self.reset_all(&set);
        Ok(())
    }

    /// A cdev's: no groups are given, all that is hit has to be its iommufd's.
    fn hot_reset_by_id(
        &mut self,
        set: &[usize],
        count: usize,
        context: ContextId,
    ) -> Result<(), Errno> {
        if count != 0 {
            return Err(Errno::EINVAL);
        }
        if set.is_empty() {
            return Err(Errno::ENODEV);
        }
        if set.iter().any(|index| self.id_in(*index, Some(context)) == NOT_OWNED) {
            return Err(Errno::EINVAL);
        }
        self.reset_all(set);
        Ok(())
    }

    fn reset_all(&mut self, set: &[usize]) {
        for &index in set {
            if let Some(device) = self.devices.get_mut(index) {
                device.reset();
                if device.opens > 0 {
                    device.config.enable();
                }
            }
        }
    }
}
