//! What is in this machine: PCI devices, their IOMMU groups and drivers, read from sysfs through
//! the kernel layer.

mod allow;
mod device;
mod group;
mod survey;

pub use allow::{NotAllowed, allows};
pub use device::{Device, cdev, has_let_go, has_vfs, registration};
pub use group::Group;
pub use survey::Survey;

use crate::kernel::{Error, Kernel, Result};
use crate::policy::Serials;
use crate::protocol::Bdf;
use nix::errno::Errno;
use std::collections::BTreeMap;

const GROUPS: &str = "kernel/iommu_groups";

/// The IOMMU groups of this machine, by number.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Every group with a PCI device in it.
    pub groups: BTreeMap<u32, Group>,
}

impl Host {
    /// Reads all groups. Devices that go while it reads are left out.
    ///
    /// # Errors
    /// What reading sysfs says; no groups at all is not an error.
    pub fn scan(kernel: &dyn Kernel) -> Result<Self> {
        let mut groups = BTreeMap::new();
        for id in group_ids(kernel)? {
            if let Some(group) = Group::scan(kernel, id)? {
                groups.insert(id, group);
            }
        }
        Ok(Self { groups })
    }

    /// The serial numbers of all devices that have one.
    ///
    /// # Errors
    /// What reading sysfs says.
    pub fn serials(&mut self, kernel: &dyn Kernel) -> Result<Serials> {
        let mut all = Serials::default();
        for group in self.groups.values_mut() {
            group.read_serials(kernel, &Serials::default())?;
            for device in &group.devices {
                let path = format!("bus/pci/devices/{}", device.bdf());
                if let (Some(serial), Ok(inode)) = (&device.facts.serial, kernel.sysfs_inode(&path))
                {
                    all.0.insert(device.bdf(), (inode, serial.clone()));
                }
            }
        }
        Ok(all)
    }

    /// All devices, in the order of their groups.
    pub fn devices(&self) -> impl Iterator<Item = (&Group, &Device)> {
        self.groups.values().flat_map(|group| group.devices.iter().map(move |d| (group, d)))
    }
}

/// The numbers of all groups, those without a PCI device among them, in order.
///
/// # Errors
/// What reading sysfs says; no groups at all is not an error.
pub fn group_ids(kernel: &dyn Kernel) -> Result<Vec<u32>> {
    let names = gone_is_none(list(kernel, GROUPS))?.unwrap_or_default();
    let mut ids: Vec<u32> = names.iter().filter_map(|name| name.parse().ok()).collect();
    ids.sort_unstable();
    Ok(ids)
}

/// Where a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In this group.
    Group(u32),
    /// There, but in no group: nothing isolates its DMA.
    NoGroup,
    /// No such device.
    Nowhere,
}

/// Looks a device up without reading the whole machine.
///
/// # Errors
/// What reading sysfs says, other than that the device is not there.
pub fn find(kernel: &dyn Kernel, bdf: Bdf) -> Result<Place> {
    let path = format!("bus/pci/devices/{bdf}");
    let Some(target) = gone_is_none(link(kernel, &format!("{path}/iommu_group")))? else {
        let there = gone_is_none(list(kernel, &path))?.is_some();
        return Ok(if there { Place::NoGroup } else { Place::Nowhere });
    };
    let id = target.rsplit('/').next().and_then(|name| name.parse().ok());
    Ok(id.map_or(Place::NoGroup, Place::Group))
}

/// Whether the host maps for devices without interrupt remapping, on which a guest can raise any
/// interrupt of the host: `allow_unsafe_interrupts` of either module that has it.
///
/// # Errors
/// What reading sysfs says, other than that a module is not loaded.
pub fn allows_unsafe_interrupts(kernel: &dyn Kernel) -> Result<bool> {
    for module in ["vfio_iommu_type1", "iommufd"] {
        let path = format!("module/{module}/parameters/allow_unsafe_interrupts");
        if gone_is_none(read(kernel, &path))?.is_some_and(|text| text.trim() == "Y") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn read(kernel: &dyn Kernel, path: &str) -> Result<String> {
    Ok(String::from_utf8_lossy(&read_bytes(kernel, path)?).into_owned())
}

fn read_bytes(kernel: &dyn Kernel, path: &str) -> Result<Vec<u8>> {
    kernel.sysfs_read(path).map_err(|errno| failed("read", path, errno))
}

fn list(kernel: &dyn Kernel, path: &str) -> Result<Vec<String>> {
    kernel.sysfs_list(path).map_err(|errno| failed("readdir", path, errno))
}

fn link(kernel: &dyn Kernel, path: &str) -> Result<String> {
    kernel.sysfs_link(path).map_err(|errno| failed("readlink", path, errno))
}

fn inode(kernel: &dyn Kernel, path: &str) -> Result<u64> {
    kernel.sysfs_inode(path).map_err(|errno| failed("stat", path, errno))
}

fn failed(call: &'static str, path: &str, errno: Errno) -> Error {
    Error::new(call, format!("/sys/{path}"), errno)
}

/// Devices and drivers come and go: what is not there is `None`, not a failure.
fn gone_is_none<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENODEV | Errno::ENOTDIR) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
