//! A device's configuration space: what is in it at power-on, and which bits can be written.

use crate::sim::topology::Device;
use nix::errno::Errno;

const COMMAND: usize = 0x04;
const IO: u8 = 1;
const MEMORY: u8 = 2;
const MASTER: u8 = 4;

/// Configuration space: bytes, which of their bits can be written, and how they were at the start.
#[derive(Debug)]
pub(super) struct Config {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    initial: Vec<u8>,
    decodes: u8,
}

impl Config {
    pub(super) fn new(device: &Device) -> Self {
        let len = if device.pcie { 4096 } else { 256 };
        let mut config =
            Self { bytes: vec![0; len], writable: vec![0; len], initial: Vec::new(), decodes: 0 };
        config.header(device);
        config.capabilities(device);
        for patch in &device.config {
            for (at, byte) in (usize::from(patch.at)..).zip(patch.bytes().unwrap_or_default()) {
                config.set(at, &[byte]);
            }
        }
        config.initial = config.bytes.clone();
        config
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + value.len()) {
            place.copy_from_slice(value);
        }
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        if let Some(place) = self.writable.get_mut(at..at + bits.len()) {
            place.copy_from_slice(bits);
        }
    }

    fn header(&mut self, device: &Device) {
        self.set(0x00, &device.vendor.to_le_bytes());
        self.set(0x02, &device.device.to_le_bytes());
        self.set(0x06, &[0x10]);
        self.set(0x08, &[device.revision]);
        self.set(0x09, &device.class.to_le_bytes()[..3]);
        self.set(0x2c, &device.subsystem_vendor.unwrap_or(device.vendor).to_le_bytes());
        self.set(0x2e, &device.subsystem_device.unwrap_or(device.device).to_le_bytes());
        self.set(0x3d, &[u8::from(device.intx)]);
        // I/O, memory and bus master; SERR on and INTx off.
        self.allow(COMMAND, &[IO | MEMORY | MASTER, 0x05]);
        self.allow(0x0c, &[0xff]);
        self.allow(0x3c, &[0xff]);
        for bar in &device.bars {
            self.decodes |= if bar.io { IO } else { MEMORY };
            let at = 0x10 + 4 * usize::from(bar.index);
            let kind = match (bar.io, bar.wide, bar.prefetch) {
                (true, ..) => 1,
                (false, wide, prefetch) => u8::from(wide) << 2 | u8::from(prefetch) << 3,
            };
            self.set(at, &[kind]);
            let address_bits = !(bar.size - 1);
            let low = (address_bits as u32) & if bar.io { !3 } else { !15 };
            self.allow(at, &low.to_le_bytes());
            if bar.wide {
                self.allow(at + 4, &((address_bits >> 32) as u32).to_le_bytes());
            }
        }
        if device.rom > 0 {
            let bits = (!(device.rom.next_power_of_two() - 1) as u32) | 1;
            self.allow(0x30, &bits.to_le_bytes());
        }
    }

    /// Power management, MSI, PCI Express and MSI-X, as far as the device has them.
    fn capabilities(&mut self, device: &Device) {
        let mut link = 0x34;
        let mut add = |config: &mut Self, at: usize, id: u8| {
            config.set(link, &[at as u8]);
            config.set(at, &[id]);
            link = at + 1;
        };
        add(self, 0x40, 0x01);
        self.set(0x42, &[0x03]);
        if device.msi > 0 {
            add(self, 0x48, 0x05);
            let count = device.msi.trailing_zeros() as u8;
            self.set(0x4a, &[count << 1 | 0x80]);
        }
        if device.pcie {
            add(self, 0x60, 0x10);
            self.set(0x62, &[0x02]);
            self.set(0x67, &[if device.reset { 0x10 } else { 0 }]);
        }
        if let Some(msix) = device.msix {
            add(self, 0xa0, 0x11);
            self.set(0xa2, &((msix.count - 1) as u16).to_le_bytes());
            let table = (msix.offset as u32 & !7) | u32::from(msix.bar);
            self.set(0xa4, &table.to_le_bytes());
        }
        if device.total_vfs > 0 && device.pcie {
            self.set(0x100, &[0x10, 0x00, 0x01, 0x00]);
            self.set(0x10e, &(device.total_vfs as u16).to_le_bytes());
        }
    }

    /// What vfio-pci does at the first open: the device decodes its BARs and is no bus master.
    pub(super) fn enable(&mut self) {
        self.bytes[COMMAND] = (self.bytes[COMMAND] & !MASTER) | self.decodes;
    }

    /// What it does at the last close.
    pub(super) fn disable(&mut self) {
        self.bytes[COMMAND] &= !MASTER;
    }

    pub(super) fn reset(&mut self) {
        self.bytes = self.initial.clone();
    }

    pub(super) fn memory_enabled(&self) -> bool {
        self.bytes[COMMAND] & MEMORY != 0
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn range(&self, at: u64, len: usize) -> Result<std::ops::Range<usize>, Errno> {
        let start = usize::try_from(at).map_err(|_| Errno::EFAULT)?;
        let end = start.checked_add(len).filter(|&end| end <= self.bytes.len());
        Ok(start..end.ok_or(Errno::EFAULT)?)
    }

    pub(super) fn read(&self, at: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let range = self.range(at, len)?;
        Ok(self.bytes[range].to_vec())
    }

    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) -> Result<usize, Errno> {
        let range = self.range(at, bytes.len())?;
        for (at, byte) in range.zip(bytes) {
            let mask = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !mask) | (byte & mask);
        }
        Ok(bytes.len())
    }
}
