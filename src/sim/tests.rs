//! The simulation from outside: fds, processes, ordering, faults, and clients that misbehave.

use super::*;
use crate::kernel::{
    Arg, Container, Device, DirtyOp, DmaMap, Error, Extension, Group, IoasMap, IommuType, Iommufd,
    IrqAction, IrqData, Kernel, MapFlags, Mapped, Node, Unmap, UnmapFlags, request,
};
use crate::sys::event::EventFd;
use crate::sys::fdpass;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, socket, socketpair,
};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn topology(name: &str) -> Topology {
    let path = format!("{}/tests/topologies/{name}.toml", env!("CARGO_MANIFEST_DIR"));
    Topology::from_toml(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn start(name: &str) -> Sim {
    Sim::start(topology(name)).unwrap()
}

/// The network card of the workstation, ready for use.
struct Ready {
    group: Group,
    container: Container,
    device: Device,
}

fn ready(sim: &Sim) -> Ready {
    let group = Group::open(sim.kernel(), Node::Group(15)).unwrap();
    let container = Container::open(sim.kernel()).unwrap();
    group.set_container(&container).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    let device = group.device("0000:03:00.0").unwrap();
    Ready { group, container, device }
}

fn errno<T: std::fmt::Debug>(result: Result<T, Error>) -> Errno {
    result.unwrap_err().errno
}

#[test]
fn all_topologies_start() {
    for name in ["workstation", "sriov", "noiommu", "large"] {
        let sim = start(name);
        let groups = sim.kernel().sysfs_list("kernel/iommu_groups").unwrap();
        assert_eq!(groups.len(), topology(name).groups.len());
        for (group, device) in topology(name).devices() {
            let path = format!("bus/pci/devices/{}", device.bdf);
            let link = sim.kernel().sysfs_link(&format!("{path}/iommu_group")).unwrap();
            assert!(link.ends_with(&format!("/{group}")), "{link}");
        }
    }
    assert_eq!(topology("large").groups.len(), 512);
}

#[test]
fn a_connection_says_who_sends_from_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = server::listen_at(&path).unwrap();
    let flags = SockFlag::SOCK_CLOEXEC;
    let ours = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    connect(ours.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    let none = MsgFlags::empty();
    fdpass::send(ours.as_fd(), b"early", &[], none).unwrap();
    let got = fdpass::receive(theirs.as_fd(), &mut [0; 8], 1, none).unwrap();
    assert_eq!(got.sender.unwrap().pid(), std::process::id() as i32);
}

#[test]
fn a_device_is_reached_through_its_group() {
    let sim = start("workstation");
    let Ready { group, container, device } = ready(&sim);
    assert_eq!(device.pci_ids().unwrap(), (0x8086, 0x15f3));
    let info = device.info().unwrap();
    assert_eq!((info.regions, info.irqs), (9, 5));
    assert_eq!(device.region(0).unwrap().size, 0x100000);
    assert!(container.check_extension(Extension::Iommu(IommuType::Type1v2)).unwrap());
    let (_fd, memory) = Mapped::memfd(8192).unwrap();
    let map = DmaMap { flags: DmaMap::READ, vaddr: memory.vaddr(), iova: 0x10000, size: 8192 };
    container.map(&map).unwrap();
    assert_eq!(errno(container.map(&map)), Errno::EEXIST);
    assert_eq!(sim.stats().unwrap().spaces[0].pinned_bytes, 8192);
    assert_eq!(errno(group.unset_container()), Errno::EBUSY);
    drop(device);
    group.unset_container().unwrap();
    assert_eq!(sim.stats().unwrap().spaces[0].mappings, 0);
}

#[test]
fn a_close_is_seen_by_the_next_call() {
    let sim = start("workstation");
    for _ in 0..200 {
        let Ready { group, container, device } = ready(&sim);
        drop(device);
        group.unset_container().unwrap();
        drop((group, container));
        assert!(sim.stats().unwrap().is_idle());
    }
}

#[test]
fn a_device_holds_its_group_and_the_group_its_mappings() {
    let sim = start("workstation");
    let Ready { group, container, device } = ready(&sim);
    let (_fd, memory) = Mapped::memfd(4096).unwrap();
    let map = DmaMap { flags: DmaMap::READ, vaddr: memory.vaddr(), iova: 0, size: 4096 };
    container.map(&map).unwrap();
    drop((group, container));
    let busy = Group::open(sim.kernel(), Node::Group(15));
    assert_eq!(errno(busy), Errno::EBUSY);
    assert_eq!(sim.stats().unwrap().spaces[0].mappings, 1);
    drop(device);
    assert!(sim.stats().unwrap().is_idle());
}

#[test]
fn irqs_are_signalled() {
    let sim = start("workstation");
    let Ready { device, .. } = ready(&sim);
    let event = EventFd::new().unwrap();
    let data = IrqData::Eventfd(&[None, Some(event.as_fd())]);
    device.set_irqs(2, 0, IrqAction::Trigger, data).unwrap();
    device.set_irqs(2, 1, IrqAction::Trigger, IrqData::None { count: 1 }).unwrap();
    assert_eq!(event.read().unwrap(), 1);
    let wrong = IrqData::Eventfd(&[Some(device.as_fd())]);
    assert_eq!(errno(device.set_irqs(2, 0, IrqAction::Trigger, wrong)), Errno::EINVAL);
}

#[test]
fn more_fds_than_one_message_takes() {
    let sim = start("sriov");
    let group = Group::open(sim.kernel(), Node::Group(100)).unwrap();
    let container = Container::open(sim.kernel()).unwrap();
    group.set_container(&container).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    let device = group.device("0000:65:01.0").unwrap();
    let events: Vec<_> = (0..17).map(|_| EventFd::new().unwrap()).collect();
    let data: Vec<_> = events.iter().map(|event| Some(event.as_fd())).collect();
    device.set_irqs(2, 0, IrqAction::Trigger, IrqData::Eventfd(&data)).unwrap();
    device.set_irqs(2, 0, IrqAction::Trigger, IrqData::None { count: 17 }).unwrap();
    for event in &events {
        assert_eq!(event.read().unwrap(), 1);
    }
}

#[test]
fn a_dirty_bitmap_comes_back() {
    let sim = start("workstation");
    let Ready { container, group: _group, device: _device } = ready(&sim);
    let (_fd, memory) = Mapped::memfd(3 * 4096).unwrap();
    let map = DmaMap { flags: DmaMap::WRITE, vaddr: memory.vaddr(), iova: 0x1000, size: 3 * 4096 };
    container.map(&map).unwrap();
    container.dirty_pages(DirtyOp::Start).unwrap();
    let mut bitmap = [0; 8];
    let get = DirtyOp::Get { iova: 0, size: 16 * 4096, pgsize: 4096, bitmap: &mut bitmap };
    container.dirty_pages(get).unwrap();
    assert_eq!(bitmap, [0b1110, 0, 0, 0, 0, 0, 0, 0]);
    let all = Unmap { flags: UnmapFlags::ALL, ..Unmap::default() };
    assert_eq!(container.unmap(&all).unwrap(), 3 * 4096);
}

#[test]
fn drivers_come_and_go() {
    let sim = start("workstation");
    let bare = Group::open(sim.kernel(), Node::Group(15)).unwrap();
    assert!(bare.status().unwrap().viable);
    sim.set_driver("0000:03:00.0", None).unwrap();
    assert_eq!(errno(bare.status()), Errno::ENODEV);
    assert_eq!(errno(Group::open(sim.kernel(), Node::Group(15))), Errno::ENOENT);
    sim.set_driver("0000:03:00.0", Some("vfio-pci")).unwrap();
    let Ready { device, .. } = ready(&sim);
    assert_eq!(errno(bare.status()), Errno::ENODEV);
    assert_eq!(sim.set_driver("0000:03:00.0", None), Err(Errno::EBUSY));
    drop(device);
    sim.set_driver("0000:05:00.1", Some("vfio-pci")).unwrap();
    let group = Group::open(sim.kernel(), Node::Group(17)).unwrap();
    assert!(!group.status().unwrap().viable);
    let container = Container::open(sim.kernel()).unwrap();
    assert_eq!(errno(group.set_container(&container)), Errno::EPERM);
}

#[test]
fn fds_work_in_a_process_that_has_nothing_else() {
    let sim = start("workstation");
    let Ready { group, container, device } = ready(&sim);
    let (here, there) = socketpair(
        nix::sys::socket::AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::empty(),
    )
    .unwrap();
    let fds = [container.as_fd(), device.as_fd()];
    fdpass::send(here.as_fd(), b"x", &fds, MsgFlags::empty()).unwrap();
    let mut got = fdpass::receive(there.as_fd(), &mut [0; 1], 2, MsgFlags::empty()).unwrap();
    let wire: Arc<dyn Kernel> = Arc::new(Wire::detached());
    let passed = Device::from_fd(Arc::clone(&wire), "passed", got.fds.pop().unwrap());
    drop((device, container));
    assert_eq!(passed.pci_ids().unwrap(), (0x8086, 0x15f3));
    assert_eq!(wire.open(&Node::Container).unwrap_err(), Errno::ENOSYS);
    drop(passed);
    // A process that another test starts just now has all files until it becomes another program.
    let unset = loop {
        match group.unset_container() {
            Err(error) if error.errno == Errno::EBUSY => std::thread::yield_now(),
            done => break done,
        }
    };
    unset.unwrap();
}

#[test]
fn faults_hit_and_are_cleared() {
    let sim = start("workstation");
    let open = || Group::open(sim.kernel(), Node::Group(15));
    sim.fault(Fault::fail("open", Errno::EIO).on("/dev/vfio/15")).unwrap();
    assert_eq!(errno(open()), Errno::EIO);
    sim.fault(Fault::slow("open", Duration::from_millis(80))).unwrap();
    let before = Instant::now();
    drop(open().unwrap());
    assert!(before.elapsed() >= Duration::from_millis(80));
    sim.fault(Fault::never("VFIO_GROUP_GET_STATUS")).unwrap();
    let group = open().unwrap();
    std::thread::scope(|scope| {
        let stuck = scope.spawn(|| group.status().unwrap());
        while sim.stats().unwrap().held == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
        sim.clear_faults().unwrap();
        assert!(stuck.join().unwrap().viable);
    });
}

#[test]
fn garbage_does_no_harm() {
    let sim = start("workstation");
    let group = Group::open(sim.kernel(), Node::Group(15)).unwrap();
    let (mine, theirs) = socketpair(
        nix::sys::socket::AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    for len in [0, 1, 39, 40, 41, 5000] {
        let message = vec![b'V'; len];
        for fds in [&[][..], &[theirs.as_fd()], &[pipe.as_fd()], &[theirs.as_fd(); 16]] {
            fdpass::send(group.as_fd(), &message, fds, MsgFlags::empty()).unwrap();
        }
    }
    // A flood whose answers nobody reads: the reply socket is full long before the end.
    let call = wire::Request {
        number: request::GROUP_GET_STATUS.number,
        ..wire::Request::new(wire::Op::Ioctl)
    };
    for _ in 0..5000 {
        fdpass::send(group.as_fd(), &call.encode(), &[theirs.as_fd()], MsgFlags::empty()).unwrap();
    }
    assert!(group.status().unwrap().viable);
    drop(mine);
    // Shutting a shared fd down for writing keeps it open; for both it is closed.
    use nix::sys::socket::{Shutdown, shutdown};
    shutdown(group.as_fd().as_raw_fd(), Shutdown::Write).unwrap();
    assert_eq!(errno(group.status()), Errno::EIO);
    assert_eq!(sim.stats().unwrap().groups, 1);
    shutdown(group.as_fd().as_raw_fd(), Shutdown::Both).unwrap();
    assert_eq!(sim.stats().unwrap().groups, 0);
}

#[test]
fn a_file_that_is_no_simulated_one_is_told_apart() {
    let sim = start("workstation");
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    let group = Group::open(sim.kernel(), Node::Group(15)).unwrap();
    let foreign = Container::from_fd(sim.kernel(), pipe);
    assert_eq!(errno(foreign.api_version()), Errno::ENOTTY);
    assert_eq!(errno(group.set_container(&foreign)), Errno::EBADFD);
    let bad = group.raw(request::GROUP_SET_CONTAINER, Arg::BadPointer);
    assert_eq!(errno(bad), Errno::EFAULT);
}

#[test]
fn thousands_of_open_files() {
    let sim = start("large");
    let containers: Vec<_> = (0..3000).map(|_| Container::open(sim.kernel()).unwrap()).collect();
    assert_eq!(sim.stats().unwrap().spaces.len(), 3000);
    drop(containers);
    assert!(sim.stats().unwrap().is_idle());
}

/// Where a process that is another test's body finds the simulation.
const PLACE: &str = "VFIO_SIM_PLACE";

/// A process with the body of a test of this binary.
fn body(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("sim::tests::{test}")]).stdout(Stdio::null());
    command
}

/// The body of another process of [`forks_hold_nothing_open`].
#[test]
fn opener() {
    let Some(path) = std::env::var_os(PLACE) else { return };
    let wire: Arc<dyn Kernel> = Arc::new(Wire::connect(Path::new(&path)).unwrap());
    for _ in 0..500 {
        Group::open(Arc::clone(&wire), Node::Group(15)).unwrap();
    }
}

#[test]
fn forks_hold_nothing_open() {
    let sim = start("workstation");
    let mut opener = body("opener").env(PLACE, sim.control_path()).spawn().unwrap();
    let status = loop {
        Command::new("true").status().unwrap();
        if let Some(status) = opener.try_wait().unwrap() {
            break status;
        }
    };
    assert!(status.success(), "a group that was closed was still open");
}

/// A handler that ran on the simulation's thread would write into files that it does not mean.
#[test]
fn its_threads_take_no_signals() {
    let _sim = start("workstation");
    let mut seen = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        // Threads of other tests come and go.
        let status = std::fs::read_to_string(task.unwrap().path().join("status"));
        let status = status.unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        if field("Name:").is_some_and(|name| name.trim() == "vfio-sim") {
            let blocked = u64::from_str_radix(field("SigBlk:").unwrap().trim(), 16).unwrap();
            assert_ne!(blocked & 1 << (nix::libc::SIGTERM - 1), 0);
            seen += 1;
        }
    }
    assert!(seen > 0);
}

/// The body of another process of [`a_killed_process_lets_go`].
#[test]
fn holder() {
    let Some(path) = std::env::var_os(PLACE) else { return };
    let wire: Arc<dyn Kernel> = Arc::new(Wire::connect(Path::new(&path)).unwrap());
    let group = Group::open(Arc::clone(&wire), Node::Group(15)).unwrap();
    let container = Container::open(wire).unwrap();
    group.set_container(&container).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    let _device = group.device("0000:03:00.0").unwrap();
    let (_fd, memory) = Mapped::memfd(8192).unwrap();
    let map = DmaMap { flags: DmaMap::READ, vaddr: memory.vaddr(), iova: 0, size: 8192 };
    container.map(&map).unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_process_lets_go() {
    let sim = start("workstation");
    let mut child = body("holder").env(PLACE, sim.control_path()).spawn().unwrap();
    let wait = |done: &dyn Fn(&Stats) -> bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(&sim.stats().unwrap()) {
            assert!(Instant::now() < deadline, "{:?}", sim.stats());
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    wait(&|stats| stats.spaces.first().is_some_and(|space| space.mappings == 1));
    let pid = i32::try_from(child.id()).unwrap();
    assert_eq!(sim.stats().unwrap().locked, [(pid, 8192)].into());
    assert_eq!(errno(Group::open(sim.kernel(), Node::Group(15))), Errno::EBUSY);
    child.kill().unwrap();
    child.wait().unwrap();
    wait(&Stats::is_idle);
    Group::open(sim.kernel(), Node::Group(15)).unwrap();
}

#[test]
fn the_python_example_of_the_docs_works() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/sim.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    let (_, example) = docs.split_once("```python\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    let sim = start("workstation");
    let mut python = Command::new("python3");
    python.arg("-c").arg(example).arg(sim.control_path());
    match python.output() {
        Err(error) => eprintln!("skipped: python3: {error}"),
        Ok(output) => {
            let (out, errors) = (output.stdout, String::from_utf8_lossy(&output.stderr));
            assert_eq!(String::from_utf8_lossy(&out), "regions, irqs: (9, 5)\n", "{errors}");
        }
    }
}

/// A card's own node, open and not yet bound.
fn cdev(sim: &Sim) -> Device {
    let path = "bus/pci/devices/0000:03:00.0/vfio-dev";
    let names = sim.kernel().sysfs_list(path).unwrap();
    let number = names[0].strip_prefix("vfio").unwrap().parse().unwrap();
    Device::open_cdev(sim.kernel(), number, "0000:03:00.0").unwrap()
}

#[test]
fn an_open_cdev_holds_its_driver_and_is_asked_back() {
    let sim = start("workstation");
    let iommufd = Iommufd::open(sim.kernel()).unwrap();
    let (device, stale) = (cdev(&sim), cdev(&sim));
    device.bind_iommufd(&iommufd).unwrap();
    let event = EventFd::new().unwrap();
    let request = [Some(event.as_fd())];
    device.set_irqs(4, 0, IrqAction::Trigger, IrqData::Eventfd(&request)).unwrap();
    assert_eq!(sim.set_driver("0000:03:00.0", None), Err(Errno::EBUSY));
    assert_eq!(event.read(), Ok(1));
    drop(device);
    // The other open file holds it too, bound or not.
    assert_eq!(sim.set_driver("0000:03:00.0", None), Err(Errno::EBUSY));
    drop(stale);
    sim.set_driver("0000:03:00.0", None).unwrap();
    drop(iommufd);
    assert!(sim.stats().unwrap().is_idle());
}

#[test]
fn iommufds_are_counted_and_faulted_by_name() {
    let sim = start("workstation");
    sim.fault(Fault::fail("open", Errno::EMFILE).on("/dev/iommu")).unwrap();
    assert_eq!(errno(Iommufd::open(sim.kernel())), Errno::EMFILE);
    let iommufd = Iommufd::open(sim.kernel()).unwrap();
    sim.fault(Fault::fail("VFIO_DEVICE_BIND_IOMMUFD", Errno::EIO).on("0000:03:00.0")).unwrap();
    sim.fault(Fault::fail("IOMMU_IOAS_ALLOC", Errno::EIO).on("/dev/iommu")).unwrap();
    let device = cdev(&sim);
    let failed = device.bind_iommufd(&iommufd).unwrap_err();
    assert_eq!((failed.call, &*failed.object), ("VFIO_DEVICE_BIND_IOMMUFD", "0000:03:00.0"));
    assert_eq!(errno(iommufd.ioas_alloc()), Errno::EIO);
    device.bind_iommufd(&iommufd).unwrap();
    let ioas = iommufd.ioas_alloc().unwrap();
    device.attach_iommufd_pt(ioas).unwrap();
    drop(iommufd);
    // More of them than one answer to a request for counts has room for.
    let more: Vec<_> = (0..300).map(|_| Iommufd::open(sim.kernel()).unwrap()).collect();
    let stats = sim.stats().unwrap();
    assert_eq!((stats.open_iommufds, stats.cdevs, stats.iommufds.len()), (300, 1, 301));
    let first = &stats.iommufds[0];
    assert_eq!((first.open, first.spaces, first.devices), (false, 1, 1));
    drop((more, device));
    assert!(sim.stats().unwrap().is_idle());
}

#[test]
fn nobody_else_reaches_the_control_socket() {
    use std::os::unix::fs::PermissionsExt;
    let sim = start("workstation");
    let directory = std::fs::metadata(sim.control_path().parent().unwrap()).unwrap();
    assert_eq!(directory.permissions().mode() & 0o777, 0o700);
}

/// A page that does not come, of one iommufd, holds up who has a neighbouring function.
#[test]
fn functions_of_a_bus_wait_for_each_other() {
    const SHARED: &str = r#"
kernel = "6.12"
owner_rights = true
memlock = "unlimited"
[[group]]
id = 1
device = [{ bdf = "0000:01:00.0", vendor = 0x8086, device = 0x10c9, driver = "vfio-pci" }]
[[group]]
id = 2
device = [{ bdf = "0000:01:00.1", vendor = 0x8086, device = 0x10c9, driver = "vfio-pci" }]
[[group]]
id = 3
device = [{ bdf = "0000:02:00.0", vendor = 0x8086, device = 0x10c9, driver = "vfio-pci" }]
"#;
    let sim = Sim::start(Topology::from_toml(SHARED).unwrap()).unwrap();
    let attached = |id: u32| {
        let group = Group::open(sim.kernel(), Node::Group(id)).unwrap();
        let container = Container::open(sim.kernel()).unwrap();
        group.set_container(&container).unwrap();
        container.set_iommu(IommuType::Type1v2).unwrap();
        (group, container)
    };
    let (neighbour, elsewhere) = (attached(2), attached(3));
    let held_before = neighbour.0.device("0000:01:00.1").unwrap();
    let iommufd = Iommufd::open(sim.kernel()).unwrap();
    let device = Device::open_cdev(sim.kernel(), 0, "0000:01:00.0").unwrap();
    device.bind_iommufd(&iommufd).unwrap();
    let ioas = iommufd.ioas_alloc().unwrap();
    device.attach_iommufd_pt(ioas).unwrap();
    let (_, memory) = Mapped::memfd(4096).unwrap();
    let flags = MapFlags::FIXED_IOVA | MapFlags::READ;
    let map = IoasMap { flags, vaddr: memory.vaddr(), size: 4096, iova: 0 };
    let holds = |count: u64| {
        let began = Instant::now();
        while sim.stats().unwrap().held != count {
            assert!(began.elapsed() < Duration::from_secs(50), "{:?}", sim.stats());
            std::thread::yield_now();
        }
    };
    std::thread::scope(|threads| {
        sim.fault(Fault::never("IOMMU_IOAS_MAP")).unwrap();
        threads.spawn(|| iommufd.ioas_map(ioas, &map).unwrap());
        holds(1);
        // What needs that iommufd alone, or another bus, is not held up yet, and neither is this one.
        drop(neighbour.0.device("0000:01:00.1").unwrap());
        threads.spawn(|| device.detach_iommufd_pt().unwrap());
        holds(2);
        let got = threads.spawn(|| neighbour.0.device("0000:01:00.1").unwrap());
        holds(3);
        drop(held_before);
        holds(4);
        assert_eq!(sim.stats().unwrap().devices, 1, "its close waits too");
        drop(elsewhere.0.device("0000:02:00.0").unwrap());
        sim.clear_faults().unwrap();
        drop(got.join().unwrap());
    });
    holds(0);
    assert_eq!(sim.stats().unwrap().devices, 0);
}
