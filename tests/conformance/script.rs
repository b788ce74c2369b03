//! What a case writes its transcript with: calls and what became of them, one a line.

use std::cell::RefCell;
use std::fmt::{Debug, Write as _};
use std::os::fd::AsFd;
use std::sync::Arc;
use vfio_broker::kernel::{
    Arg, Container, Device, DmaMap, Error, Group, IoasMap, Ioctl, IommuType, Iommufd, Kernel,
    MapFlags, Mapped, Node, Request, request,
};
use vfio_broker::sim::Wire;

/// The lab's devices: see `tests/lab/topology.sh`.
pub(crate) mod device {
    pub(crate) const E1000E: &str = "0000:00:02.0";
    pub(crate) const EDU0: &str = "0000:00:03.0";
    pub(crate) const EDU1: &str = "0000:00:04.0";
    pub(crate) const NVME: &str = "0000:00:05.0";
    pub(crate) const PAIR0: &str = "0000:00:07.0";
    pub(crate) const PAIR1: &str = "0000:00:07.1";
    pub(crate) const MIXED_E1000: &str = "0000:01:02.0";
    pub(crate) const MIXED_EDU: &str = "0000:01:01.0";
    pub(crate) const VF0: &str = "0000:02:10.0";
}

pub(crate) const PAGE: u64 = 4096;

/// A kernel and the transcript of what it is asked.
pub(crate) struct Script {
    kernel: Arc<dyn Kernel>,
    /// The simulation, where it is one: binding drivers is no call of the kernel layer.
    simulated: Option<Arc<Wire>>,
    lines: RefCell<String>,
}

impl Script {
    pub(crate) fn new(kernel: Arc<dyn Kernel>, simulated: Option<Arc<Wire>>) -> Self {
        Self { kernel, simulated, lines: RefCell::new(String::new()) }
    }

    /// Binds a device to a driver, or to none, and writes down which one it then has.
    pub(crate) fn bind(&self, bdf: &str, driver: Option<&str>) {
        match &self.simulated {
            Some(wire) => drop(wire.set_driver(bdf, driver)),
            None => bind_for_real(bdf, driver),
        }
        let link = self.kernel.sysfs_link(&format!("bus/pci/devices/{bdf}/driver"));
        let name = link.map(|link| link.rsplit('/').next().unwrap_or_default().to_owned());
        self.note(&format!("driver of {bdf}"), name);
    }

    pub(crate) fn kernel(&self) -> Arc<dyn Kernel> {
        Arc::clone(&self.kernel)
    }

    pub(crate) fn transcript(&self) -> String {
        self.lines.borrow().clone()
    }

    /// Writes a line: what was done, and what came of it.
    pub(crate) fn note(&self, what: &str, result: impl Debug) {
        let _ = writeln!(self.lines.borrow_mut(), "{what}: {result:?}");
    }

    /// Writes down the errno, or that it worked; hands on what it gave.
    pub(crate) fn ok<T>(&self, what: &str, result: Result<T, Error>) -> Option<T> {
        match result {
            Ok(value) => {
                let _ = writeln!(self.lines.borrow_mut(), "{what}: ok");
                Some(value)
            }
            Err(error) => {
                let _ = writeln!(self.lines.borrow_mut(), "{what}: {:?}", error.errno);
                None
            }
        }
    }

    /// Writes down the errno, or the value.
    pub(crate) fn value<T: Debug>(&self, what: &str, result: Result<T, Error>) {
        match result {
            Ok(value) => self.note(what, value),
            Err(error) => {
                let _ = writeln!(self.lines.borrow_mut(), "{what}: {:?}", error.errno);
            }
        }
    }

    /// Makes an ioctl and writes down its return value or errno.
    pub(crate) fn ioctl(&self, what: &str, fd: impl AsFd, request: Request, arg: Arg<'_>) {
        match self.kernel.ioctl(fd.as_fd(), Ioctl { request, arg }) {
            Ok(reply) => self.note(what, reply.value),
            Err(errno) => self.note(what, errno),
        }
    }

    /// Makes an ioctl with a struct of these fields and writes it down; returns the struct as the
    /// kernel left it.
    pub(crate) fn fields(
        &self,
        what: &str,
        fd: impl AsFd,
        request: Request,
        fields: &[Field],
    ) -> Vec<u8> {
        let mut bytes = encode(fields);
        let arg = Arg::Struct { bytes: &mut bytes, fds: &[], out: None };
        self.ioctl(what, fd, request, arg);
        bytes
    }

    /// The node of a device's group.
    pub(crate) fn node(&self, bdf: &str) -> Node {
        let path = format!("bus/pci/devices/{bdf}/iommu_group");
        let link = self.kernel.sysfs_link(&path).unwrap_or_else(|errno| panic!("{path}: {errno}"));
        let id = link.rsplit('/').next().unwrap().parse().unwrap();
        let name = self.kernel.sysfs_read(&format!("kernel/iommu_groups/{id}/name"));
        if name.is_ok_and(|name| name == b"vfio-noiommu\n") {
            Node::NoIommuGroup(id)
        } else {
            Node::Group(id)
        }
    }

    /// Opens the group of a device, which has to work.
    pub(crate) fn group(&self, bdf: &str) -> Group {
        Group::open(self.kernel(), self.node(bdf)).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Opens a container, which has to work.
    pub(crate) fn container(&self) -> Container {
        Container::open(self.kernel()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A container with the group of a device in it and an IOMMU of a type.
    pub(crate) fn attached(&self, bdf: &str, kind: IommuType) -> (Container, Group) {
        let (container, group) = (self.container(), self.group(bdf));
        group.set_container(&container).unwrap_or_else(|error| panic!("{error}"));
        container.set_iommu(kind).unwrap_or_else(|error| panic!("{error}"));
        (container, group)
    }

    /// A container with type1v2, and the group that keeps it alive.
    pub(crate) fn space(&self) -> (Container, Group) {
        self.attached(device::EDU0, IommuType::Type1v2)
    }

    /// A device, ready for use.
    pub(crate) fn device(&self, bdf: &str) -> Ready {
        let (container, group) = self.attached(bdf, IommuType::Type1v2);
        let device = group.device(bdf).unwrap_or_else(|error| panic!("{error}"));
        Ready { container, group, device }
    }

    /// Opens an iommufd, which has to work.
    pub(crate) fn iommufd(&self) -> Iommufd {
        Iommufd::open(self.kernel()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The N of a device's own node.
    pub(crate) fn cdev_number(&self, bdf: &str) -> Option<u32> {
        let path = format!("bus/pci/devices/{bdf}/vfio-dev");
        let names = self.kernel.sysfs_list(&path).ok()?;
        names.first()?.strip_prefix("vfio")?.parse().ok()
    }

    /// Opens a device by its own node, which has to work.
    pub(crate) fn cdev(&self, bdf: &str) -> Device {
        let number = self.cdev_number(bdf).unwrap_or_else(|| panic!("{bdf} has no node"));
        Device::open_cdev(self.kernel(), number, bdf).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A device bound to an iommufd.
    pub(crate) fn bound(&self, bdf: &str, iommufd: &Iommufd) -> Device {
        let device = self.cdev(bdf);
        device.bind_iommufd(iommufd).unwrap_or_else(|error| panic!("{error}"));
        device
    }

    /// An iommufd with one IOAS.
    pub(crate) fn ioas(&self) -> (Iommufd, u32) {
        let iommufd = self.iommufd();
        let ioas = iommufd.ioas_alloc().unwrap_or_else(|error| panic!("{error}"));
        (iommufd, ioas)
    }

    /// An iommufd with one IOAS and a device attached to it.
    pub(crate) fn attached_ioas(&self, bdf: &str) -> (Iommufd, u32, Device) {
        let (iommufd, ioas) = self.ioas();
        let device = self.bound(bdf, &iommufd);
        device.attach_iommufd_pt(ioas).unwrap_or_else(|error| panic!("{error}"));
        (iommufd, ioas, device)
    }

    /// `IOMMU_IOAS_MAP` at a fixed address for reading and writing, written down.
    pub(crate) fn ioas_map(&self, what: &str, iommufd: &Iommufd, ioas: u32, at: (u64, u64, u64)) {
        let flags = MapFlags::FIXED_IOVA | MapFlags::READ | MapFlags::WRITE;
        let (vaddr, iova, size) = at;
        self.value(what, iommufd.ioas_map(ioas, &IoasMap { flags, vaddr, size, iova }));
    }

    /// `VFIO_IOMMU_MAP_DMA`, written down.
    pub(crate) fn map(&self, what: &str, container: &Container, flags: u32, at: (u64, u64, u64)) {
        let (vaddr, iova, size) = at;
        self.ok(what, container.map(&DmaMap { flags, vaddr, iova, size }));
    }

    /// `VFIO_IOMMU_UNMAP_DMA`, written down with the bytes that were unmapped.
    pub(crate) fn unmap(
        &self,
        what: &str,
        container: &Container,
        flags: u32,
        iova: u64,
        size: u64,
    ) {
        let unmap = vfio_broker::kernel::Unmap { flags, iova, size };
        self.value(what, container.unmap(&unmap));
    }
}

/// Through sysfs, as root. What becomes of it is seen afterwards.
fn bind_for_real(bdf: &str, driver: Option<&str>) {
    let device = format!("/sys/bus/pci/devices/{bdf}");
    let _ = std::fs::write(format!("{device}/driver/unbind"), bdf);
    if let Some(driver) = driver {
        let _ = std::fs::write(format!("{device}/driver_override"), driver);
        let _ = std::fs::write("/sys/bus/pci/drivers_probe", bdf);
    }
}

/// A device and what it was reached through.
pub(crate) struct Ready {
    pub(crate) container: Container,
    pub(crate) group: Group,
    pub(crate) device: Device,
}

/// A field of a struct.
#[derive(Clone, Copy)]
pub(crate) enum Field {
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
}

fn encode(fields: &[Field]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in fields {
        match field {
            Field::U8(value) => bytes.push(*value),
            Field::U16(value) => bytes.extend_from_slice(&value.to_ne_bytes()),
            Field::U32(value) => bytes.extend_from_slice(&value.to_ne_bytes()),
            Field::U64(value) => bytes.extend_from_slice(&value.to_ne_bytes()),
        }
    }
    bytes
}

/// So many pages of shared memory.
pub(crate) fn memory(pages: u64) -> Mapped {
    Mapped::memfd((pages * PAGE) as usize).unwrap().1
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// `VFIO_DEVICE_FEATURE`, whose number a container knows as `VFIO_IOMMU_DIRTY_PAGES`.
pub(crate) const DEVICE_FEATURE: Request = Request {
    number: request::IOMMU_DIRTY_PAGES.number,
    name: "VFIO_DEVICE_FEATURE",
    returns_fd: false,
};

/// A container with three mappings of two pages each, at pages 0, 4 and 8.
pub(crate) struct Mapped3 {
    pub(crate) container: Container,
    pub(crate) group: Group,
    memory: Mapped,
}

impl Mapped3 {
    pub(crate) fn new(t: &Script, kind: IommuType) -> Self {
        let (container, group) = t.attached(device::EDU0, kind);
        let space = Self { container, group, memory: memory(16) };
        for page in [0, 4, 8] {
            space.map(t, page, 2);
        }
        space
    }

    /// Maps so many pages at a page.
    pub(crate) fn map(&self, t: &Script, page: u64, pages: u64) {
        let at = (self.vaddr() + page * PAGE, page * PAGE, pages * PAGE);
        t.map(&format!("map {pages} at {page}"), &self.container, DmaMap::READ | DmaMap::WRITE, at);
    }

    /// Where its memory is.
    pub(crate) fn vaddr(&self) -> u64 {
        self.memory.vaddr()
    }
}
