//! Drivers of devices: binding and unbinding, and what that does to groups.

use super::Machine;
use super::device::DeviceState;
use crate::bdf::Bdf;
use crate::sim::profile::Profile;
use nix::errno::Errno;
use std::collections::BTreeSet;

/// A write to a file of sysfs takes no more.
const PAGE: usize = 4096;

/// A file of sysfs that drivers are bound by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DriverFile {
    /// A driver's `bind`.
    Bind(String),
    /// A driver's `unbind`.
    Unbind(String),
    /// `drivers_probe`.
    Probe,
    /// A device's `driver_override`.
    Override(Bdf),
}

/// What has come of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    Done,
    /// The driver of this device goes when the last file of it is closed, and so does the write.
    Leaving(Bdf),
    /// The device's lock is held until then, and the write has not begun.
    Locked(Bdf),
}

impl Machine {
    /// The names of the drivers that are loaded.
    pub(crate) fn drivers(&self) -> impl Iterator<Item = &str> {
        self.drivers.iter().map(String::as_str)
    }

    /// write(2) on a file of sysfs that drivers are bound by.
    ///
    /// # Errors
    /// ENODEV no such device, one that the driver is not on, or that it does not match; EBUSY a
    /// device with a driver, or with VFs; EINVAL a name that is too long, or a probe that finds a
    /// host driver for a device whose group is in use; and what the driver says.
    pub(crate) fn write_driver_file(
        &mut self,
        file: &DriverFile,
        bytes: &[u8],
    ) -> Result<Written, Errno> {
        // The kernel does not even look at the file.
        if bytes.is_empty() {
            return Ok(Written::Done);
        }
        let text = String::from_utf8_lossy(bytes);
        let text = text.split('\0').next().unwrap_or_default();
        let named = || device_named(text.strip_suffix('\n').unwrap_or(text));
        match file {
            // What follows a zero counts too.
            DriverFile::Override(_) if bytes.len() >= PAGE - 1 => Err(Errno::EINVAL),
            DriverFile::Override(bdf) => self.set_override(*bdf, text),
            DriverFile::Unbind(driver) => self.unbind(named()?, driver),
            DriverFile::Bind(driver) => self.bind(named()?, driver),
            DriverFile::Probe => self.probe(named()?),
        }
    }

    fn set_override(&mut self, bdf: Bdf, text: &str) -> Result<Written, Errno> {
        let device = self.named_device(bdf)?;
        if device.leaving {
            return Ok(Written::Locked(bdf));
        }
        let name = text.split('\n').next().unwrap_or_default();
        device.driver_override = (!name.is_empty()).then(|| name.to_owned());
        Ok(Written::Done)
    }

    fn unbind(&mut self, bdf: Bdf, driver: &str) -> Result<Written, Errno> {
        let device = self.named_device(bdf)?;
        if device.driver.as_deref() != Some(driver) {
            return Err(Errno::ENODEV);
        }
        if device.leaving {
            return Ok(Written::Leaving(bdf));
        }
        if device.opens > 0 || device.cdevs > 0 {
            device.irqs.ask_back();
            device.leaving = true;
            return Ok(Written::Leaving(bdf));
        }
        self.set_driver(bdf, None).map(|()| Written::Done)
    }

    fn bind(&mut self, bdf: Bdf, driver: &str) -> Result<Written, Errno> {
        let device = self.named_device(bdf)?;
        if !device.matches(driver) {
            return Err(Errno::ENODEV);
        }
        if device.leaving {
            return Ok(Written::Locked(bdf));
        }
        if device.driver.is_some() {
            return Err(Errno::EBUSY);
        }
        self.set_driver(bdf, Some(driver)).map(|()| Written::Done)
    }

    fn probe(&mut self, bdf: Bdf) -> Result<Written, Errno> {
        let device = self.named_device(bdf)?;
        // A driver that waits to go is still one, and the kernel says nothing.
        if device.driver.is_some() {
            return Ok(Written::Done);
        }
        let wanted = device.driver_override.iter().chain(&device.known_to).cloned();
        let matching: Vec<_> = wanted.filter(|driver| device.matches(driver)).collect();
        let found = matching.into_iter().find(|driver| self.drivers.contains(driver));
        if let Some(driver) = found {
            if self.keeps_out(bdf, Some(&driver)) {
                return Err(Errno::EINVAL);
            }
            // A driver that refuses is passed over in silence.
            let _ = self.set_driver(bdf, Some(&driver));
        }
        Ok(Written::Done)
    }

    /// Lets a driver go that waits for the last close, if this was it.
    pub(super) fn leave_if_closed(&mut self, index: usize) {
        let Some(device) = self.devices.get_mut(index) else { return };
        if device.leaving && device.opens == 0 && device.cdevs == 0 {
            device.leaving = false;
            let bdf = device.facts.bdf;
            let _ = self.set_driver(bdf, None);
            self.left.push(bdf);
        }
    }

    /// The devices whose drivers have gone since this was called last.
    pub(crate) fn take_left(&mut self) -> Vec<Bdf> {
        std::mem::take(&mut self.left)
    }

    fn named_device(&mut self, bdf: Bdf) -> Result<&mut DeviceState, Errno> {
        self.devices.iter_mut().find(|device| device.facts.bdf == bdf).ok_or(Errno::ENODEV)
    }

    /// Binds a device to a driver, or to none.
    ///
    /// # Errors
    /// ENODEV no such device; EBUSY it is open, an unbound cdev included, or a VF of it exists: the
    /// kernel would wait, or destroy the VFs; EBUSY too where its group is in a container or an
    /// iommufd and the driver wants DMA for the host; EINVAL a bridge and a VFIO driver.
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
        if self.keeps_out(bdf, driver) {
            return Err(Errno::EBUSY);
        }
        let number = to_vfio.then(|| self.free_number(index));
        self.next += 1;
        let registration = self.next;
        self.drivers.extend(driver.map(str::to_owned));
        if let Some(device) = self.devices.get_mut(index) {
            device.learn(driver);
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

    /// Whether a driver wants DMA for the host from a device whose group is in use.
    fn keeps_out(&self, bdf: Bdf, driver: Option<&str>) -> bool {
        let device = self.devices.iter().find(|device| device.facts.bdf == bdf);
        let Some(device) = device else { return false };
        let harmless = device.facts.on_vfio(driver)
            || device.facts.bridge
            || driver.is_none_or(|name| name == "pci-stub");
        let group = self.groups.get(&device.group);
        let attached = group.is_some_and(|group| group.container.is_some());
        !harmless && (attached || self.dma_owner(device.group).is_some())
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

/// The device that the kernel knows by this very name.
fn device_named(name: &str) -> Result<Bdf, Errno> {
    let device = name.parse().ok().filter(|bdf: &Bdf| bdf.to_string() == name);
    device.ok_or(Errno::ENODEV)
}

impl DeviceState {
    /// Whether VFIO shows the device and opens it. Newer kernels hide it before they wait for the
    /// last close.
    pub(super) fn is_registered(&self, profile: Profile) -> bool {
        self.on_vfio && !(self.leaving && profile.hides_before_waiting())
    }

    /// Whether the kernel offers it to this driver.
    fn matches(&self, driver: &str) -> bool {
        match &self.driver_override {
            Some(only) => only == driver,
            None => self.known_to.iter().any(|known| known == driver),
        }
    }

    /// Remembers that a driver has taken it, as one does whose `new_id` was written.
    fn learn(&mut self, driver: Option<&str>) {
        let Some(driver) = driver.filter(|_| self.driver_override.is_none()) else { return };
        if !self.matches(driver) {
            self.known_to.push(driver.to_owned());
        }
    }
}
