//! QEMU's `edu` device: a DMA engine simple enough to drive from a test. Its registers are in
//! BAR 0, its buffer of 4 KiB is at 0x40000 of its own address space (docs/specs/edu in QEMU).

use std::time::{Duration, Instant};
use vfio_broker::kernel::{Device, PCI_CONFIG_REGION, Result};

const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
const START: u32 = 1;
const TO_MEMORY: u32 = 2;
const BUFFER: u32 = 0x40000;

const PCI_COMMAND: u64 = 4;
const MEMORY_AND_BUS_MASTER: u16 = 6;

/// The device with its registers reachable and bus mastering on.
pub struct Edu<'a> {
    device: &'a Device,
    registers: u64,
}

impl<'a> Edu<'a> {
    pub fn start(device: &'a Device) -> Result<Self> {
        let config = device.region(PCI_CONFIG_REGION)?;
        device.write_at(&MEMORY_AND_BUS_MASTER.to_le_bytes(), config.offset + PCI_COMMAND)?;
        let registers = device.region(0)?.offset;
        Ok(Self { device, registers })
    }

    /// Copies `count` bytes (4096 at most) from one IO virtual address to another, through the
    /// device's own buffer: two transfers, each through the IOMMU.
    pub fn copy(&self, from: u32, to: u32, count: u32) -> Result<()> {
        self.transfer(from, BUFFER, count, START)?;
        self.transfer(BUFFER, to, count, START | TO_MEMORY)
    }

    fn transfer(&self, source: u32, destination: u32, count: u32, command: u32) -> Result<()> {
        self.write(SOURCE, source)?;
        self.write(DESTINATION, destination)?;
        self.write(COUNT, count)?;
        self.write(COMMAND, command)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.read(COMMAND)? & START != 0 {
            assert!(Instant::now() < deadline, "edu's DMA does not end");
            std::thread::yield_now();
        }
        Ok(())
    }

    fn write(&self, register: u64, value: u32) -> Result<()> {
        self.device.write_at(&value.to_le_bytes(), self.registers + register).map(drop)
    }

    fn read(&self, register: u64) -> Result<u32> {
        let mut value = [0; 4];
        self.device.read_at(&mut value, self.registers + register)?;
        Ok(u32::from_le_bytes(value))
    }
}
