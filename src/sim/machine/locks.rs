//! What calls lock that others wait for: `dev_set->lock`, which the functions of a bus have in common whoever
//! has them, and the page tables of an iommufd (`domains_rwsem`).
//!
//! On the kernel, in drivers/vfio: `vfio_df_ioctl_bind_iommufd`, `vfio_df_ioctl_attach_pt`,
//! `vfio_df_ioctl_detach_pt` and the close of a bound cdev (device_cdev.c), `vfio_df_group_open` and
//! `vfio_df_group_close` (group.c) and a bus reset take the first, without being interruptible; which functions
//! it is of says `vfio_pci_core_register_device`. In drivers/iommu/iommufd an attach and a detach take the
//! second (io_pagetable.c, `iopt_table_add_domain`), which a map holds while it faults pages in.

use super::{File, FileId, Machine};
use crate::kernel::request;

/// What a call locks, the first before the second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Locks {
    /// The functions of a bus, by segment and bus.
    pub(crate) bus: Option<(u32, u8)>,
    /// The page tables of this iommufd.
    pub(crate) tables: Option<u64>,
}

impl Machine {
    /// What an ioctl locks; `text` is its argument, where that is a name.
    pub(crate) fn locks_of(&self, file: FileId, number: u32, text: &[u8]) -> Locks {
        match self.files.get(&file) {
            Some(File::Group(..)) if number == request::GROUP_GET_DEVICE_FD.number => {
                let name = text.split(|&byte| byte == b' ').next().unwrap_or_default();
                let named =
                    |device: &super::DeviceState| device.facts.bdf.to_string().as_bytes() == name;
                let index = self.devices.iter().position(named);
                Locks { bus: index.and_then(|index| self.shared_bus(index)), tables: None }
            }
            Some(File::Cdev(index)) if number == request::DEVICE_BIND_IOMMUFD.number => {
                Locks { bus: self.shared_bus(*index), tables: None }
            }
            Some(File::Cdev(index))
                if number == request::DEVICE_ATTACH_IOMMUFD_PT.number
                    || number == request::DEVICE_DETACH_IOMMUFD_PT.number =>
            {
                self.locks_of_bound(file, *index)
            }
            Some(File::Device(index) | File::Cdev(index))
                if number == request::DEVICE_PCI_HOT_RESET.number =>
            {
                Locks { bus: self.shared_bus(*index), tables: None }
            }
            _ => Locks::default(),
        }
    }

    /// What the last close of a file locks.
    pub(crate) fn locks_of_close(&self, file: FileId) -> Locks {
        match self.files.get(&file) {
            Some(File::Device(index)) => Locks { bus: self.shared_bus(*index), tables: None },
            Some(File::Cdev(index)) => self.locks_of_bound(file, *index),
            _ => Locks::default(),
        }
    }

    /// The iommufd whose page tables a call holds while it faults pages in.
    pub(crate) fn faults_in(&self, file: FileId, number: u32) -> Option<u64> {
        match self.files.get(&file) {
            Some(File::Iommufd(context)) if number == request::IOAS_MAP.number => Some(context.0),
            _ => None,
        }
    }

    fn locks_of_bound(&self, file: FileId, index: usize) -> Locks {
        match self.bound_by(file, index) {
            Ok(bound) => Locks { bus: self.shared_bus(index), tables: Some(bound.context.0) },
            Err(_) => Locks::default(),
        }
    }

    /// The bus whose functions a device shares a lock with; a VF, and a device on a root bus, has its own.
    fn shared_bus(&self, index: usize) -> Option<(u32, u8)> {
        let facts = &self.devices.get(index)?.facts;
        let is_alone = facts.physfn.is_some() || facts.bdf.bus == 0;
        (!is_alone).then_some((facts.bdf.segment, facts.bdf.bus))
    }
}
