//! One IOMMU group as sysfs shows it.

use super::{Device, GROUPS, gone_is_none, list, read};
use crate::kernel::{Kernel, Node, Result};
use crate::policy::Serials;
use crate::protocol::{Bdf, Blocker};

/// An IOMMU group: what DMA isolation can tell apart.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its number.
    pub id: u32,
    /// No IOMMU is behind it: a device in it reaches all memory.
    pub noiommu: bool,
    /// Its PCI devices, by address.
    pub devices: Vec<Device>,
}

impl Group {
    /// Reads one group; `None` where there is none of that number, or no PCI device in it.
    ///
    /// # Errors
    /// What reading sysfs says.
    pub fn scan(kernel: &dyn Kernel, id: u32) -> Result<Option<Self>> {
        let path = format!("{GROUPS}/{id}");
        let names = gone_is_none(list(kernel, &format!("{path}/devices")))?.unwrap_or_default();
        let mut devices = Vec::new();
        for bdf in names.iter().filter_map(|name| name.parse::<Bdf>().ok()) {
            devices.extend(Device::scan(kernel, bdf)?);
        }
        if devices.is_empty() {
            return Ok(None);
        }
        devices.sort_by_key(Device::bdf);
        // Only groups that VFIO made for want of an IOMMU have this name.
        let name = gone_is_none(read(kernel, &format!("{path}/name")))?;
        let noiommu = name.is_some_and(|name| name.trim() == "vfio-noiommu");
        Ok(Some(Self { id, noiommu, devices }))
    }

    /// Reads its devices' serial numbers; those that can't be read are taken as known.
    ///
    /// # Errors
    /// What reading sysfs says.
    pub fn read_serials(&mut self, kernel: &dyn Kernel, known: &Serials) -> Result<()> {
        self.devices.iter_mut().try_for_each(|device| device.read_serial(kernel, known))
    }

    /// The node it is opened by.
    pub fn node(&self) -> Node {
        if self.noiommu { Node::NoIommuGroup(self.id) } else { Node::Group(self.id) }
    }

    /// One of its devices.
    pub fn device(&self, bdf: Bdf) -> Option<&Device> {
        self.devices.iter().find(|device| device.bdf() == bdf)
    }

    /// What keeps it from being viable: devices on drivers of the host that do DMA. A device
    /// without a driver, a bridge and a port of one do not. `may_have` says of which one the asker
    /// may be told how to take it from the host.
    pub fn blockers(&self, may_have: impl Fn(&Device) -> bool) -> Vec<Blocker> {
        let blocking = self.devices.iter().filter(|device| device.blocks());
        blocking.map(|device| device.blocker(may_have(device))).collect()
    }

    /// Whether nothing keeps it from being opened.
    pub fn is_viable(&self) -> bool {
        !self.devices.iter().any(Device::blocks)
    }
}
