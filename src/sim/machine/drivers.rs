//! Drivers of devices: binding and unbinding, and what that does to groups.

use super::Machine;
use crate::bdf::Bdf;
use nix::errno::Errno;
use std::collections::BTreeSet;

impl Machine {
    /// Binds a device to a driver, or to none.
    ///
    /// # Errors
    /// ENODEV no such device; EBUSY it is open, an unbound cdev included, or a VF of it exists: the
    /// kernel would wait, or destroy the VFs; EINVAL a bridge and a VFIO driver; EPERM its group is
    /// in a container or an iommufd and the driver wants DMA for the host.
    pub fn set_driver(&mut self, bdf: Bdf, driver: Option<&str>) -> Result<(), Errno> {
        let index = self.devices.iter().position(|device| device.facts.bdf == bdf);
        let index = index.ok_or(Errno::ENODEV)?;
        let device = self.devices.get(index).ok_or(Errno::ENODEV)?;
        if device.opens > 0 || device.cdevs > 0 {
            device.irqs.ask_back();
            return Err(Errno::EBUSY);
        }
        let (id, to_vfio) = (device.group, device.facts.on_vfio(driver));
        let (had_node, bridge) = (self.has_node(id), device.facts.bridge);
        let is_pf = self.devices.iter().any(|vf| vf.facts.physfn == Some(bdf));
        if is_pf && (to_vfio || device.on_vfio) {
            return Err(Errno::EBUSY);
        }
        if bridge && to_vfio {
            return Err(Errno::EINVAL);
        }
        let harmless = to_vfio || bridge || driver.is_none_or(|name| name == "pci-stub");
        let attached = self.groups.get(&id).is_some_and(|group| group.container.is_some());
        let owned = attached || self.dma_owner(id).is_some();
        if owned && !harmless {
            return Err(Errno::EPERM);
        }
        let number = to_vfio.then(|| self.free_number(index));
        self.next += 1;
        let registration = self.next;
        if let Some(device) = self.devices.get_mut(index) {
            device.registration = registration;
            device.driver = driver.map(str::to_owned);
            device.on_vfio = to_vfio;
            device.number = number;
        }
        if had_node && !self.has_node(id) {
            self.end_group(id);
        }
        Ok(())
    }

    /// The lowest N that no other device's `vfioN` has.
    fn free_number(&self, index: usize) -> u32 {
        let others = self.devices.iter().enumerate().filter(|(other, _)| *other != index);
        let taken: BTreeSet<u32> = others.filter_map(|(_, device)| device.number).collect();
        (0..).find(|number| !taken.contains(number)).unwrap_or(u32::MAX)
    }

    /// The last device has left VFIO: the group dies, and its open file finds nothing any more.
    fn end_group(&mut self, id: u32) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.life += 1;
        group.fd_open = false;
        if let Some(container) = group.container.take() {
            self.detach(container, id);
        }
    }
}
