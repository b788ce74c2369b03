//! What a VMM made of rust-vmm's crates does with VFIO, with the broker's open files:
//!
//!     rust_vmm DEVICE...
//!
//! `docs/rust-vmm.md` goes through it. With `--groups` or `--cdevs` before the devices the crate opens
//! all nodes by their paths, as VMMs do that know nothing of the broker, and `vfio-broker exec` runs
//! that. There is no guest: it maps memory, asks each device who it is, and resets it.

use std::error::Error;
use std::fs::File;
use std::iter::successors;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iommufd_ioctls::IommuFd;
use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vfio_broker::client::{Acquire, Client, Lease};
use vfio_broker::protocol::{Backend, FdKind};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioIommufd, VfioOps};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

type Done<T = ()> = Result<T, Box<dyn Error>>;
/// A device and its name.
type Named = (String, VfioDevice);

/// The guest's memory, at IO virtual addresses equal to its own.
const MEMORY: [(GuestAddress, usize); 2] =
    [(GuestAddress(0), 640 << 10), (GuestAddress(1 << 20), 4 << 20)];

pub(crate) fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.split_first() {
        Some((way, names)) if way == "--groups" => by_groups(names),
        Some((way, names)) if way == "--cdevs" => by_cdevs(names),
        Some(_) => from_the_broker(&words),
        None => Err("usage: rust_vmm [--groups|--cdevs] DEVICE...".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let causes = successors(error.source(), |&error| error.source());
            eprintln!(
                "rust_vmm: {error}{}",
                causes.map(|why| format!(": {why}")).collect::<String>()
            );
            ExitCode::FAILURE
        }
    }
}

/// The broker's open files, all of one lease. No path is opened.
fn from_the_broker(names: &[String]) -> Done {
    let mut broker = Client::connect()?;
    let request = Acquire::new("rust-vmm").backend(Backend::Iommufd);
    let mut lease = broker.acquire(names.iter().fold(request, |all, name| all.device(name)))?;
    let iommufd = IommuFd::new_from_fd(take(&mut lease, FdKind::Iommufd, "")?);
    let space = Arc::new(VfioIommufd::new(Arc::new(iommufd), None, None)?);
    let mut devices = Vec::new();
    for name in lease.devices().to_vec() {
        let cdev = take(&mut lease, FdKind::Cdev, &name)?;
        // Binds the device to the iommufd and attaches it to the address space.
        devices.push((name, VfioDevice::new_from_fd(cdev, space.clone(), true)?));
    }
    run(&*space, devices)
} // The lease ends with its last open file, which is the lease fd.

fn take(lease: &mut Lease, kind: FdKind, name: &str) -> Done<File> {
    let file = lease.files_mut().take(kind, Some(name));
    Ok(file.ok_or_else(|| format!("the lease has no {kind:?} {name}"))?.fd.into())
}

fn by_groups(names: &[String]) -> Done {
    let space = Arc::new(VfioContainer::new(None)?);
    run(&*space, open(names, space.clone())?)
}

fn by_cdevs(names: &[String]) -> Done {
    let space = Arc::new(VfioIommufd::new(Arc::new(IommuFd::new()?), None, None)?);
    run(&*space, open(names, space.clone())?)
}

fn open(names: &[String], space: Arc<dyn VfioOps>) -> Done<Vec<Named>> {
    let open = |name: &String| {
        let path = Path::new("/sys/bus/pci/devices").join(name);
        Ok((name.clone(), VfioDevice::new(&path, space.clone(), true)?))
    };
    names.iter().map(open).collect()
}

fn run(space: &dyn VfioOps, devices: Vec<Named>) -> Done {
    let memory = GuestMemoryMmap::from_ranges(&MEMORY)?;
    map(space, &memory)?;
    for (name, device) in &devices {
        let mut ids = [0; 4];
        device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut ids, 0);
        let [vendor, id] = [[ids[0], ids[1]], [ids[2], ids[3]]].map(u16::from_le_bytes);
        let interrupts = device.max_interrupts();
        device.reset();
        println!("{name} is {vendor:04x}:{id:04x}, has {interrupts} interrupts, and was reset");
        if (vendor, id) == EDU {
            copy(device, &memory)?;
            println!("{name} has copied memory");
        }
    }
    // Before the memory goes. What is left when the devices are closed, the kernel unmaps.
    for region in memory.iter() {
        space.vfio_dma_unmap(region.start_addr().raw_value(), region.size())?;
    }
    Ok(())
}

#[allow(unsafe_code)] // the crate leaves the rules for mapped memory to its caller
fn map(space: &dyn VfioOps, memory: &GuestMemoryMmap) -> Done {
    for region in memory.iter() {
        let (start, size) = (region.start_addr().raw_value(), region.size());
        // SAFETY: this is a mapping of the guest's memory, which is read and written through
        // vm-memory's volatile accesses alone, and unmapped before it goes.
        unsafe { space.vfio_dma_map(start, size, region.as_ptr()) }?;
        println!("mapped {} KiB at {start:#x}", size >> 10);
    }
    Ok(())
}

/// QEMU's device for teaching, which can copy memory.
const EDU: (u16, u16) = (0x1234, 0x11e8);

/// Has it copy 4 KiB from the guest's lower memory to the upper, through its buffer.
fn copy(device: &VfioDevice, memory: &GuestMemoryMmap) -> Done {
    const BUFFER: u64 = 0x40000;
    let (from, to) = (GuestAddress(0x8000), GuestAddress(2 << 20));
    let page: Vec<u8> = (0..4096).map(|at| (at * 7 % 251) as u8).collect();
    memory.write_slice(&page, from)?;
    // Its memory is reached, and it may reach ours.
    device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &[6, 0], 4);
    let write = |register, value: u64| device.region_write(0, &value.to_le_bytes(), register);
    for (source, destination, command) in [(from.0, BUFFER, 1), (BUFFER, to.0, 3)] {
        write(0x80, source);
        write(0x88, destination);
        write(0x90, page.len() as u64);
        write(0x98, command);
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut status = [1; 4];
        while status[0] & 1 != 0 {
            if Instant::now() > deadline {
                return Err("edu's DMA does not end".into());
            }
            device.region_read(0, &mut status, 0x98);
        }
    }
    let mut copied = vec![0; page.len()];
    memory.read_slice(&mut copied, to)?;
    if copied == page { Ok(()) } else { Err("edu has copied something else".into()) }
}
