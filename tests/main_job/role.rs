//! What a client process does. It says each thing it did in one line, and waits for a line where
//! the story has to happen in an order.

use crate::edu::Edu;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::error::Error;
use std::fs;
use std::io::stdin;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, ExitCode, Stdio};
use vfio_broker::client::{self, Acquire, Client, DmaRange, Lease};
use vfio_broker::kernel::{Device, DmaMap, IoasMap, MapFlags, Mapped, Unmap};
use vfio_broker::protocol::{Backend, FdKind, Handout};

pub const FLAG: &str = "--role";

#[derive(Clone, Copy)]
pub enum Role {
    /// `vmm BDF BYTES`: gets container and group, and does what a VMM does with them.
    Vmm,
    /// `ask BDF`: acquires and says what came of it.
    Ask,
    /// `member CONTAINER BDF IOVA FOREIGN-IOVA`: joins a shared container, has its own range and
    /// tries somebody else's.
    Member,
    /// `iommufd BDF MORE…`: gets an iommufd and a cdev, does what a VMM does with them, and adds one
    /// device after the other.
    Iommufd,
    /// `stale BDF`: gets a device by iommufd and starts a process that keeps it open.
    Stale,
    /// `leaves BDF FILE PLACE`: gets a device and leaves a file of it with somebody else.
    Leaves,
    /// `mapping`: keeps a mapping of the device that is its standard input.
    Mapping,
    /// `busy BDF FILE`: gets container and group, has a page of that file pinned, and closes all it has.
    Busy,
    /// `huge CONTAINER BDF`: joins an enforced container with memory of huge pages.
    Huge,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::Vmm => "vmm",
            Role::Ask => "ask",
            Role::Member => "member",
            Role::Iommufd => "iommufd",
            Role::Stale => "stale",
            Role::Huge => "huge",
            Role::Busy => "busy",
            Role::Leaves => "leaves",
            Role::Mapping => "mapping",
        }
    }
}

type Done = Result<(), Box<dyn Error>>;

pub fn play(words: Vec<String>) -> ExitCode {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["vmm", bdf, bytes] => vmm(bdf, bytes.parse().unwrap()),
        ["ask", bdf] => ask(bdf),
        ["member", container, bdf, iova, foreign] => {
            member(container, bdf, iova.parse().unwrap(), foreign.parse().unwrap())
        }
        ["iommufd", bdf, ref more @ ..] => iommufd(bdf, more),
        ["stale", bdf] => stale(bdf),
        ["huge", container, bdf] => huge(container, bdf),
        ["busy", bdf, file] => busy(bdf, file),
        ["leaves", bdf, what, at] => crate::former::leaves(bdf, what, at),
        ["mapping"] => crate::former::maps(),
        _ => panic!("no such role: {words:?}"),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Waits until the story wants to go on.
pub fn wait() {
    let mut line = String::new();
    stdin().read_line(&mut line).unwrap();
}

fn ask(bdf: &str) -> Done {
    match Client::connect()?.acquire(Acquire::new("other").device(bdf)) {
        Ok(lease) => println!("got lease {}", lease.id()),
        Err(error) => println!("refused: {error}"),
    }
    Ok(())
}

fn vmm(bdf: &str, bytes: usize) -> Done {
    println!("uid {}, {}, /dev/vfio: {}", nix::unistd::geteuid(), capabilities(), own_open());
    let mut broker = Client::connect()?;
    let lease = broker.acquire(Acquire::new("web1").device(bdf))?;
    let (container, group) = (lease.container()?, lease.group()?);
    println!("got lease {}: container and {}", lease.id(), group.node());
    let status = group.status()?;
    println!("group viable {}, attached {}", status.viable, status.attached);

    let (_fd, memory) = Mapped::memfd(bytes)?;
    let (vaddr, size) = (memory.vaddr(), memory.size() as u64);
    let flags = DmaMap::READ | DmaMap::WRITE;
    if let Err(error) = container.map(&DmaMap { flags, vaddr, iova: 0x1000_0000, size }) {
        println!("not mapped: {error}");
        return Ok(());
    }
    println!("mapped {} MiB at 0x10000000", size >> 20);
    let device = lease.device(bdf)?;
    let (vendor, id) = device.pci_ids()?;
    println!("device {bdf} is {vendor:04x}:{id:04x} by its configuration space");
    device.reset()?;
    println!("reset {bdf}");
    wait();
    let unmapped = container.unmap(&Unmap { flags: 0, iova: 0x1000_0000, size })?;
    println!("unmapped {} MiB", unmapped >> 20);
    // All copies are closed before the lease is given back, so that it is proved at once.
    drop((device, group, container));
    println!("released, proved: {}", broker.release(lease)?);
    Ok(())
}

fn iommufd(bdf: &str, more: &[&str]) -> Done {
    println!("uid {}, {}, /dev/iommu: {}", nix::unistd::geteuid(), capabilities(), open_iommu());
    let mut broker = Client::connect()?;
    let order = Acquire::new("erin1").device(bdf).backend(Backend::Iommufd);
    let mut lease = match broker.acquire(order) {
        Ok(lease) => lease,
        Err(error) => {
            println!("refused: {error}");
            let lease = broker.acquire(Acquire::new("erin1").device(bdf))?;
            println!("got lease {} by {}", lease.id(), lease.backend().name());
            return Ok(());
        }
    };
    let kinds: Vec<_> = lease.files().iter().map(|file| format!("{:?}", file.kind)).collect();
    println!("got lease {} by {}: {}", lease.id(), lease.backend().name(), kinds.join(" "));
    let (iommufd, device) = (lease.iommufd()?, lease.cdev(bdf)?);
    println!("charged by process: {}", iommufd.rlimit_mode()?);
    device.bind_iommufd(&iommufd)?;
    let ioas = iommufd.ioas_alloc()?;
    device.attach_iommufd_pt(ioas)?;
    let (memory_fd, memory) = Mapped::memfd(RANGE as usize)?;
    let flags = MapFlags::FIXED_IOVA | MapFlags::READ | MapFlags::WRITE;
    let iova = 16 << 20;
    iommufd.ioas_map(ioas, &IoasMap { flags, vaddr: memory.vaddr(), size: RANGE, iova })?;
    println!("bound, attached, mapped {RANGE} bytes at {iova:#x}");
    device.reset()?;
    let (vendor, id) = device.pci_ids()?;
    println!("device {bdf} is {vendor:04x}:{id:04x}, reset");
    for bdf in more {
        broker.add(&mut lease, Acquire::new("").device(bdf))?;
        let device = lease.cdev(bdf)?;
        device.bind_iommufd(&iommufd)?;
        device.attach_iommufd_pt(ioas)?;
        println!("added {bdf} to the address space: {}", dma(&memory, &device, iova)?);
    }
    wait();
    drop((device, iommufd, memory_fd));
    println!("released, proved: {}", broker.release(lease)?);
    Ok(())
}

fn stale(bdf: &str) -> Done {
    let lease = Client::connect()?.acquire(Acquire::new("gina1").device(bdf))?;
    let cdev = lease.copy(FdKind::Cdev, Some(bdf))?;
    let keeper = Command::new("sleep").arg("600").stdin(cdev).stdout(Stdio::null()).spawn()?;
    println!("kept by {}", keeper.id());
    wait();
    Ok(())
}

fn busy(bdf: &str, file: &str) -> Done {
    let mut broker = Client::connect()?;
    let lease = broker.acquire(Acquire::new("busy").device(bdf).handout(Handout::Container))?;
    let container = lease.container()?;
    let page = Mapped::file(fs::File::open(file)?.as_fd(), 0, 4096, false)?;
    println!("got lease");
    wait();
    let map = DmaMap { flags: DmaMap::READ, vaddr: page.vaddr(), iova: 0x10_0000, size: 4096 };
    let mapping = std::thread::spawn(move || container.map(&map).map_err(|error| error.errno));
    wait();
    // The group too: then who takes it back has it alone.
    drop(lease);
    println!("closed all");
    println!("mapping: {:?}", mapping.join());
    wait();
    Ok(())
}

fn open_iommu() -> String {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/iommu") {
        Ok(_) => "OPEN TO ALL".to_owned(),
        Err(error) => format!("{:?}", Errno::from_raw(error.raw_os_error().unwrap_or(0))),
    }
}

fn capabilities() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("CapEff")).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What happens when this process opens VFIO by itself.
fn own_open() -> String {
    let Some(group) = fs::read_dir("/dev/vfio").ok().and_then(|mut dir| {
        dir.find_map(|entry| entry.ok().filter(|entry| entry.file_name() != "vfio"))
    }) else {
        return "not there".to_owned();
    };
    let open = fs::OpenOptions::new().read(true).write(true).open(group.path());
    match open {
        Ok(_) => "OPEN TO ALL".to_owned(),
        Err(error) => format!("{:?}", Errno::from_raw(error.raw_os_error().unwrap_or(0))),
    }
}

const RANGE: u64 = 1 << 20;

fn member(container: &str, bdf: &str, iova: u64, foreign: u64) -> Done {
    let mut broker = Client::connect()?;
    let order = Acquire::new(format!("member-{iova:x}")).device(bdf).handout(Handout::Devices);
    let lease = broker.acquire(order.container(container))?;
    println!("joined {container:?} with {bdf}, lease {}", lease.id());
    let (memory_fd, memory) = Mapped::memfd(RANGE as usize)?;
    let mut space = Space { broker, lease, mutual: container == "mutual", memory, memory_fd };
    space.map(iova)?;
    println!("mapped {RANGE} bytes at {iova:#x}");
    let device = space.lease.device(bdf)?;
    wait();
    loop {
        let dma = space.dma(&device, iova)?;
        match space.map(foreign) {
            Ok(()) => println!("{dma}; mapped the foreign range {foreign:#x} too"),
            Err(error) => println!("{dma}; the foreign range {foreign:#x}: {error}"),
        }
        wait();
    }
}

const HUGE_PAGE: u64 = 2 << 20;

fn huge(container: &str, bdf: &str) -> Done {
    let mut broker = Client::connect()?;
    let order = Acquire::new("huge").device(bdf).handout(Handout::Devices);
    let lease = broker.acquire(order.container(container))?;
    println!("joined {container:?} with {bdf}, lease {}", lease.id());
    let memory_fd = huge_pages(2)?;
    let memory = Mapped::file(memory_fd.as_fd(), 0, 2 * HUGE_PAGE as usize, true)?;
    let iova = 16 << 20;
    match broker.map_dma(&lease, &memory_fd, DmaRange::new(iova, RANGE)) {
        Ok(()) => println!("mapped half a page"),
        Err(error) => println!("half a page: {error}"),
    }
    let more = huge_pages(1 << 10)?;
    match broker.map_dma(&lease, &more, DmaRange::new(1 << 32, HUGE_PAGE << 10)) {
        Ok(()) => println!("mapped pages that the kernel does not have"),
        Err(error) => println!("more than the kernel has: {error}"),
    }
    broker.map_dma(&lease, &memory_fd, DmaRange::new(iova, 2 * HUGE_PAGE))?;
    let leases = broker.leases()?;
    println!("mapped {:?} bytes at {iova:#x}", leases.first().and_then(|own| own.mapped_bytes));
    let device = lease.device(bdf)?;
    let mut space = Space { broker, lease, mutual: false, memory, memory_fd };
    println!("{}", space.dma(&device, iova)?);
    // The device keeps the pages that it was given; the file has others from now on.
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&space.memory_fd, hole, 0, HUGE_PAGE as i64)?;
    Edu::start(&device)?.copy(iova as u32, iova as u32 + 8192, 4096)?;
    space.broker.unmap_dma(&space.lease, iova, 2 * HUGE_PAGE)?;
    println!("DMA goes on after a hole was punched, and the range is unmapped");
    drop(device);
    println!("released, proved: {}", space.broker.release(space.lease)?);
    Ok(())
}

fn huge_pages(count: u64) -> Result<OwnedFd, Errno> {
    let fd = memfd_create(c"huge", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB)?;
    nix::unistd::ftruncate(&fd, (count * HUGE_PAGE) as i64)?;
    Ok(fd)
}

/// A member's view of the shared address space.
struct Space {
    broker: Client,
    lease: Lease,
    /// Whether the member maps by itself, with the container's fd.
    mutual: bool,
    memory: Mapped,
    memory_fd: OwnedFd,
}

impl Space {
    fn map(&mut self, iova: u64) -> Result<(), client::Error> {
        if !self.mutual {
            return self.broker.map_dma(&self.lease, &self.memory_fd, DmaRange::new(iova, RANGE));
        }
        let vaddr = self.memory.vaddr();
        let flags = DmaMap::READ | DmaMap::WRITE;
        Ok(self.lease.container()?.map(&DmaMap { flags, vaddr, iova, size: RANGE })?)
    }

    fn dma(&self, device: &Device, iova: u64) -> Result<&'static str, Box<dyn Error>> {
        dma(&self.memory, device, iova)
    }
}

/// Has the device copy a page of memory that is mapped at `iova` to another page of it. A simulated
/// device does no DMA; there it is only asked who it is.
fn dma(memory: &Mapped, device: &Device, iova: u64) -> Result<&'static str, Box<dyn Error>> {
    if std::env::var_os("LAB_KERNEL").is_none() {
        device.pci_ids()?;
        return Ok("device answers");
    }
    let pattern: Vec<u8> = (0..4096u32).map(|i| (i * 7 + iova as u32 / 4096) as u8).collect();
    memory.write(0, &pattern).ok_or("outside")?;
    memory.write(8192, &[0; 4096]).ok_or("outside")?;
    Edu::start(device)?.copy(iova as u32, iova as u32 + 8192, 4096)?;
    let mut copied = vec![0; 4096];
    memory.read(8192, &mut copied).ok_or("outside")?;
    if copied != pattern {
        return Err("what the device wrote is not what it read".into());
    }
    Ok("DMA done")
}
