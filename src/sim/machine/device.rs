//! Devices on vfio-pci: what is open, `VFIO_DEVICE_GET_INFO`, features and function reset.

use super::cdev::Bound;
use super::config::Config;
use super::irqs::Irqs;
use super::regions::Memory;
use super::{CallArg, Done, Machine, UserStruct, number};
use crate::kernel::request;
use crate::sim::topology;
use nix::errno::Errno;
use uuid::Uuid;
use vfio_bindings::bindings::vfio as uapi;

/// A PCI function and what its users have done to it.
#[derive(Debug)]
pub(super) struct DeviceState {
    pub(super) facts: topology::Device,
    pub(super) group: u32,
    pub(super) driver: Option<String>,
    pub(super) on_vfio: bool,
    /// The driver has been told to go, and waits for the last close.
    pub(super) leaving: bool,
    /// The one driver that may have it, by `driver_override`.
    pub(super) driver_override: Option<String>,
    /// The drivers that know its ids, in the order in which they are asked.
    pub(super) known_to: Vec<String>,
    /// Open files of it that are of use: from its group, or a bound cdev.
    pub(super) opens: u32,
    /// Open files of its own node, bound or not.
    pub(super) cdevs: u32,
    /// Where it is bound to.
    pub(super) bound: Option<Bound>,
    /// The N of its `vfioN`, the lowest that was free; only while it is on a VFIO driver.
    pub(super) number: Option<u32>,
    /// Which of its registrations with VFIO that is.
    pub(super) registration: u64,
    pub(super) config: Config,
    pub(super) memory: Memory,
    pub(super) irqs: Irqs,
    /// Resets of any kind since the start.
    pub(super) resets: u64,
    /// The VF token of a PF.
    pub(super) token: Uuid,
}

impl DeviceState {
    pub(super) fn new(facts: topology::Device, group: u32) -> Self {
        let driver = facts.driver.clone();
        let token = facts.vf_token.as_deref().and_then(|it| Uuid::try_parse(it).ok());
        Self {
            on_vfio: facts.on_vfio(driver.as_deref()),
            config: Config::new(&facts),
            memory: Memory::default(),
            irqs: Irqs::default(),
            // The kernel makes one up that nobody knows.
            token: token.unwrap_or(Uuid::from_bytes([0xa5; 16])),
            known_to: driver.iter().cloned().collect(),
            leaving: false,
            driver_override: None,
            facts,
            group,
            driver,
            opens: 0,
            cdevs: 0,
            bound: None,
            number: None,
            registration: 0,
            resets: 0,
        }
    }

    /// Whether it is bound to a driver that uses DMA for the host, so that its group is not viable.
    pub(super) fn claims_dma(&self) -> bool {
        let harmless = self.on_vfio || self.facts.bridge;
        self.driver.as_deref().is_some_and(|driver| !harmless && driver != "pci-stub")
    }

    /// Whether vfio-pci made it a VF token: it has the SR-IOV capability.
    pub(super) fn is_pf(&self) -> bool {
        self.facts.total_vfs > 0
    }

    /// Back to how it was at power-on.
    pub(super) fn reset(&mut self) {
        self.resets += 1;
        self.config.reset();
        self.memory = Memory::default();
    }
}

impl Machine {
    pub(super) fn first_or_next_open(&mut self, index: usize) {
        let Some(device) = self.devices.get_mut(index) else { return };
        device.opens += 1;
        if device.opens == 1 {
            if device.facts.reset {
                device.reset();
            }
            device.config.enable();
        }
    }

    pub(super) fn close_device(&mut self, index: usize) {
        self.one_close(index);
        let Some(id) = self.devices.get(index).map(|device| device.group) else { return };
        if let Some(group) = self.groups.get_mut(&id) {
            group.open_devices = group.open_devices.saturating_sub(1);
        }
        self.release_group(id);
    }

    /// One open less; the last one switches interrupts and bus mastering off.
    pub(super) fn one_close(&mut self, index: usize) {
        let Some(device) = self.devices.get_mut(index) else { return };
        device.opens = device.opens.saturating_sub(1);
        if device.opens == 0 {
            device.irqs = Irqs::default();
            if device.facts.reset {
                device.reset();
            }
            device.config.disable();
        }
    }

    pub(super) fn device_ioctl(
        &mut self,
        index: usize,
        number: u32,
        arg: &mut CallArg,
    ) -> Result<Done, Errno> {
        let result = match number {
            _ if number == request::DEVICE_GET_INFO.number => self.device_info(index, arg.user()?),
            _ if number == request::DEVICE_GET_REGION_INFO.number => {
                self.region_info(index, arg.user()?)
            }
            _ if number == request::DEVICE_GET_IRQ_INFO.number => self.irq_info(index, arg.user()?),
            _ if number == request::DEVICE_SET_IRQS.number => self.set_irqs(index, arg.user()?),
            _ if number == request::DEVICE_RESET.number => self.reset_function(index),
            _ if number == request::DEVICE_GET_PCI_HOT_RESET_INFO.number => {
                self.hot_reset_info(index, arg.user()?)
            }
            _ if number == request::DEVICE_PCI_HOT_RESET.number => {
                self.hot_reset(index, arg.user()?)
            }
            // Asked for on a device of a group.
            _ if number == request::DEVICE_BIND_IOMMUFD.number && self.topology.has_cdev() => {
                self.check_bind(arg.user()?).and(Err(Errno::EINVAL))
            }
            number::DEVICE_FEATURE => self.feature(index, arg.user()?),
            _ => Err(Errno::ENOTTY),
        };
        result.map(|()| Done::default())
    }

    pub(super) fn device(&mut self, index: usize) -> Result<&mut DeviceState, Errno> {
        self.devices.get_mut(index).ok_or(Errno::ENODEV)
    }

    fn device_info(&mut self, index: usize, user: &mut UserStruct) -> Result<(), Errno> {
        if user.argsz() < 16 {
            return Err(Errno::EINVAL);
        }
        let padded = self.profile().pads_capabilities();
        let device = self.device(index)?;
        let reset = if device.facts.reset { uapi::VFIO_DEVICE_FLAGS_RESET } else { 0 };
        user.set_u32(4, uapi::VFIO_DEVICE_FLAGS_PCI | reset);
        user.set_u32(8, uapi::VFIO_PCI_NUM_REGIONS + device.facts.regions.len() as u32);
        user.set_u32(12, uapi::VFIO_PCI_NUM_IRQS);
        // The offset of capabilities, and padding: there are none.
        if user.argsz() >= 20 {
            user.set_u32(16, 0);
        }
        if padded && user.argsz() >= 24 {
            user.set_u32(20, 0);
        }
        Ok(())
    }

    fn reset_function(&mut self, index: usize) -> Result<(), Errno> {
        let device = self.device(index)?;
        if !device.facts.reset {
            return Err(Errno::EINVAL);
        }
        device.reset();
        device.config.enable();
        Ok(())
    }

    /// `VFIO_DEVICE_FEATURE`: of its features only the VF token is simulated.
    fn feature(&mut self, index: usize, user: &mut UserStruct) -> Result<(), Errno> {
        const MASK: u32 = 0xffff;
        const GET: u32 = 1 << 16;
        const SET: u32 = 1 << 17;
        const PROBE: u32 = 1 << 18;
        const VF_TOKEN: u32 = 0;
        let (argsz, flags) = (user.argsz(), user.u32(4));
        if argsz < 8 || flags & !(MASK | GET | SET | PROBE) != 0 {
            return Err(Errno::EINVAL);
        }
        if flags & PROBE == 0 && flags & SET != 0 && flags & GET != 0 {
            return Err(Errno::EINVAL);
        }
        let device = self.device(index)?;
        if flags & MASK != VF_TOKEN || !device.is_pf() {
            return Err(Errno::ENOTTY);
        }
        if flags & GET != 0 {
            return Err(Errno::EINVAL);
        }
        if flags & PROBE != 0 {
            return Ok(());
        }
        if flags & SET == 0 || argsz - 8 < 16 {
            return Err(Errno::EINVAL);
        }
        device.token = Uuid::from_bytes(std::array::from_fn(|i| user.byte(8 + i)));
        Ok(())
    }
}
