//! A lease whose memory its keeper has mapped, and whose device copies that memory.

use crate::edu::Edu;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs;
use std::os::unix::fs::FileExt;
use vfio_broker::client::{Acquire, Client, DmaRange, Lease};
use vfio_broker::protocol::Handout;

pub struct Copies {
    pub lease: Lease,
    device: String,
    memory: fs::File,
}

impl Copies {
    const IOVA: u32 = 0x10_0000;
    const SIZE: u64 = 1 << 20;

    /// `device` is an `edu`.
    pub fn acquire(broker: &mut Client, device: &str) -> Self {
        let order = Acquire::new("copies").device(device).handout(Handout::Devices);
        let lease = broker.acquire(order).unwrap();
        let memory = fs::File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(Self::SIZE).unwrap();
        let range = DmaRange::new(Self::IOVA.into(), Self::SIZE);
        broker.map_dma(&lease, &memory, range).unwrap();
        Self { lease, device: device.to_owned(), memory }
    }

    /// Has the device copy memory, through the IOMMU, that the keeper has mapped.
    pub fn copy(&self) {
        let pattern: Vec<u8> = (0..4096_u32).map(|i| (i * 7) as u8).collect();
        self.memory.write_all_at(&pattern, 0).unwrap();
        self.memory.write_all_at(&[0; 4096], 8192).unwrap();
        let device = self.lease.device(&self.device).unwrap();
        Edu::start(&device).unwrap().copy(Self::IOVA, Self::IOVA + 8192, 4096).unwrap();
        let mut copied = vec![0; 4096];
        self.memory.read_exact_at(&mut copied, 8192).unwrap();
        assert!(copied == pattern, "the device's DMA does not arrive");
    }
}
