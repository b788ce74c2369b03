//! One PCI device as sysfs shows it.

use super::{gone_is_none, inode, link, list, read, read_bytes};
use crate::kernel::{Kernel, Result};
use crate::pci::DeviceFacts;
use crate::policy::Serials;
use crate::protocol::{Bdf, Blocker};

/// A PCI device.
#[derive(Clone, Debug)]
pub struct Device {
    /// What a policy can ask about.
    pub facts: DeviceFacts,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// Whether that is a VFIO driver, vfio-pci or any variant.
    pub on_vfio: bool,
    /// The N of its own node, `/dev/vfio/devices/vfioN`; see [`cdev`].
    pub cdev: Option<u32>,
    /// Whether it can have VFs.
    pub sriov: bool,
    /// Whether it is the display that the firmware started on: the host's console is there.
    pub console: bool,
    /// It is on a simulated kernel.
    pub(super) simulated: bool,
}

/// Drivers under which a device leaves its group viable although they are not VFIO's: they never
/// touch DMA.
const HARMLESS: [&str; 2] = ["pcieport", "pci-stub"];

/// The class of displays.
const DISPLAY: u32 = 3;

impl Device {
    /// Reads one device; `None` where it is gone.
    ///
    /// # Errors
    /// What reading sysfs says.
    pub fn scan(kernel: &dyn Kernel, bdf: Bdf) -> Result<Option<Self>> {
        let path = format!("bus/pci/devices/{bdf}");
        let number = |name: &str| -> Result<Option<u32>> {
            let text = gone_is_none(read(kernel, &format!("{path}/{name}")))?;
            Ok(text.and_then(|text| hex(&text)))
        };
        let Some(vendor) = number("vendor")? else { return Ok(None) };
        let id = |name: &str| number(name).map(|id| id.unwrap_or(0) as u16);
        let facts = DeviceFacts {
            bdf,
            vendor: vendor as u16,
            device: id("device")?,
            subsystem_vendor: id("subsystem_vendor")?,
            subsystem_device: id("subsystem_device")?,
            class: number("class")?.unwrap_or(0),
            physfn: name_of_link(kernel, &format!("{path}/physfn"))?
                .and_then(|name| name.parse().ok()),
            serial: None,
        };
        let driver = name_of_link(kernel, &format!("{path}/driver"))?;
        let on_vfio = match &driver {
            None => false,
            // Linux before 6.1 has no vfio-dev; there only the name tells.
            Some(driver) if is_named_vfio(driver) => true,
            Some(_) => gone_is_none(list(kernel, &format!("{path}/vfio-dev")))?
                .is_some_and(|names| !names.is_empty()),
        };
        let cdev = if on_vfio { cdev(kernel, bdf)? } else { None };
        let total = gone_is_none(read(kernel, &format!("{path}/sriov_totalvfs")))?;
        let sriov = total.is_some_and(|text| text.trim().parse().is_ok_and(|count: u32| count > 0));
        let console = facts.class >> 16 == DISPLAY
            && gone_is_none(read(kernel, &format!("{path}/boot_vga")))?
                .is_some_and(|text| text.trim() == "1");
        let simulated = kernel.is_simulated();
        Ok(Some(Self { facts, driver, on_vfio, cdev, sriov, console, simulated }))
    }

    /// Reads its serial number, which costs accesses to the device itself: only where a policy asks for
    /// it. Linux shows that to CAP_SYS_ADMIN alone: others go by what is `known`.
    pub(super) fn read_serial(&mut self, kernel: &dyn Kernel, known: &Serials) -> Result<()> {
        let path = format!("bus/pci/devices/{}", self.bdf());
        let config = gone_is_none(read_bytes(kernel, &format!("{path}/config")))?;
        self.facts.serial = serial(&config.unwrap_or_default());
        if self.facts.serial.is_none()
            && let Ok(inode) = kernel.sysfs_inode(&path)
        {
            self.facts.serial = known.of(self.bdf(), inode).map(str::to_owned);
        }
        Ok(())
    }

    /// Its address.
    pub fn bdf(&self) -> Bdf {
        self.facts.bdf
    }

    /// A PCI-to-PCI bridge, which never leaves its driver.
    pub fn is_bridge(&self) -> bool {
        self.facts.class >> 8 == 0x0604
    }

    /// Whether it keeps its group from being viable.
    pub(super) fn blocks(&self) -> bool {
        let harmful = |driver: &str| !self.is_bridge() && !HARMLESS.contains(&driver);
        !self.on_vfio && self.driver.as_deref().is_some_and(harmful)
    }

    /// The device as something that stands in the way. How it gets onto vfio-pci is only for those
    /// who may have it.
    pub fn blocker(&self, may_have: bool) -> Blocker {
        Blocker {
            bdf: self.bdf().to_string(),
            driver: self.driver.clone(),
            fix: self.fix().filter(|_| may_have),
        }
    }

    /// How it gets onto vfio-pci; none where it is there already, and for what the host can't spare:
    /// a bridge, and the display that its console is on.
    pub fn fix(&self) -> Option<String> {
        if self.on_vfio || self.is_bridge() || self.console {
            return None;
        }
        if self.simulated {
            return Some("simulated: give it driver = \"vfio-pci\" in the topology's file".into());
        }
        let bdf = self.bdf();
        let device = format!("/sys/bus/pci/devices/{bdf}");
        let unbind = self
            .driver
            .as_ref()
            .map_or(String::new(), |_| format!(" && echo {bdf} > {device}/driver/unbind"));
        Some(format!(
            "modprobe vfio-pci && echo vfio-pci > {device}/driver_override{unbind} && \
             echo {bdf} > /sys/bus/pci/drivers_probe"
        ))
    }
}

/// The N of a device's own node, `/dev/vfio/devices/vfioN`; `None` for a device that has none: it is
/// on no VFIO driver, has no IOMMU, or the kernel was built without cdevs.
///
/// It is the device's only until it is bound to a driver anew.
///
/// # Errors
/// What reading sysfs says.
pub fn cdev(kernel: &dyn Kernel, bdf: Bdf) -> Result<Option<u32>> {
    let path = format!("bus/pci/devices/{bdf}/vfio-dev");
    let names = gone_is_none(list(kernel, &path))?.unwrap_or_default();
    for name in names {
        let number = name.strip_prefix("vfio").and_then(|number| number.parse().ok());
        if number.is_some() && gone_is_none(read(kernel, &format!("{path}/{name}/dev")))?.is_some()
        {
            return Ok(number);
        }
    }
    Ok(None)
}

/// Which registration of the device with VFIO is there now: the kernel makes a directory for each,
/// and never numbers two the same. `None` while there is none.
///
/// # Errors
/// What reading sysfs says.
pub fn registration(kernel: &dyn Kernel, bdf: Bdf) -> Result<Option<u64>> {
    let path = format!("bus/pci/devices/{bdf}/vfio-dev");
    let names = gone_is_none(list(kernel, &path))?.unwrap_or_default();
    let Some(name) = names.first() else { return Ok(None) };
    gone_is_none(inode(kernel, &format!("{path}/{name}")))
}

/// Whether all files of a registration of the device with VFIO are closed, as far as that shows: the
/// driver goes only when they are, and until it has gone there is no other driver, and no further
/// registration.
///
/// While the driver waits for that, the device looks as if it had none: that shows nothing. Nor does a
/// VFIO driver without a registration: it is only just binding the device, which nobody can have until
/// that is done.
///
/// # Errors
/// What reading sysfs says.
pub fn has_let_go(kernel: &dyn Kernel, bdf: Bdf, since: u64) -> Result<bool> {
    // In this order: a driver that is read first could be the one that goes.
    match registration(kernel, bdf)? {
        Some(now) => Ok(now != since),
        None => {
            let path = format!("bus/pci/devices/{bdf}");
            let gone = gone_is_none(list(kernel, &path))?.is_none();
            let driver = name_of_link(kernel, &format!("{path}/driver"))?;
            Ok(gone || driver.is_some_and(|driver| !is_named_vfio(&driver)))
        }
    }
}

/// Whether a device has VFs now. Read from what no lock of the device is needed for: its driver may
/// be waiting with that.
///
/// # Errors
/// What reading sysfs says.
pub fn has_vfs(kernel: &dyn Kernel, bdf: Bdf) -> Result<bool> {
    Ok(name_of_link(kernel, &format!("bus/pci/devices/{bdf}/virtfn0"))?.is_some())
}

fn name_of_link(kernel: &dyn Kernel, path: &str) -> Result<Option<String>> {
    let target = gone_is_none(link(kernel, path))?;
    Ok(target.map(|target| target.rsplit('/').next().unwrap_or_default().to_owned()))
}

fn is_named_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

/// The device serial number of a PCI Express function, from its extended capabilities.
fn serial(config: &[u8]) -> Option<String> {
    const SERIAL: u32 = 3;
    let word = |at: usize| {
        let bytes = config.get(at..at.checked_add(4)?)?;
        bytes.try_into().ok().map(u32::from_le_bytes)
    };
    let mut at = 0x100;
    // A chain that is broken ends, at the latest when it has been everywhere.
    for _ in 0..(4096 - 0x100) / 8 {
        let header = word(at)?;
        if header & 0xffff == SERIAL {
            let (low, high) = (word(at + 4)?, word(at + 8)?);
            let bytes = high.to_be_bytes().into_iter().chain(low.to_be_bytes());
            return Some(bytes.map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join("-"));
        }
        at = (header >> 20) as usize & !3;
        if at < 0x100 {
            return None;
        }
    }
    None
}

/// A number as sysfs writes ids: `0x8086\n`.
fn hex(text: &str) -> Option<u32> {
    let text = text.trim();
    u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(chain: &[(usize, u32)]) -> Vec<u8> {
        let mut config = vec![0; 4096];
        for (at, word) in chain {
            config[*at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        config
    }

    #[test]
    fn a_serial_number_is_written_as_lspci_does() {
        let there = [(0x100, 0x140 << 20 | 1 << 16 | 1), (0x140, 1 << 16 | 3)];
        let number = [(0x144, 0xffa0_c301), (0x148, 0x001b_21ff)];
        let found = serial(&config(&[there, number].concat()));
        assert_eq!(found.as_deref(), Some("00-1b-21-ff-ff-a0-c3-01"));
        // No such capability, a chain that goes round, one that leads out, and conventional PCI.
        assert_eq!(serial(&config(&there[..1])), None);
        assert_eq!(serial(&config(&[(0x100, 0x100 << 20 | 1)])), None);
        assert_eq!(serial(&config(&[(0x100, 0xffc << 20 | 1), (0xffc, 1 << 16 | 3)])), None);
        assert_eq!(serial(&[0; 256]), None);
    }
}
