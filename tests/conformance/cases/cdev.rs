//! Devices by their own nodes: opening, binding, and that a group is used in one way at a time.

use crate::agent::Agent;
use crate::script::{Field, Script, device, u32_at};
use std::os::fd::{AsFd, BorrowedFd};
use vfio_broker::kernel::{Arg, Device, FdSlot, Group, IommuType, request};

super::cases![
    nodes,
    opens_that_do_not_work,
    nothing_works_before_it_is_bound,
    bind,
    bind_twice,
    bind_by_another_file,
    a_second_open_waits_for_the_first,
    bind_of_no_iommufd,
    bind_of_odd_structs,
    bind_with_a_token,
    bind_while_the_group_is_open,
    open_of_a_group_whose_device_is_bound,
    open_of_a_group_whose_cdev_is_open,
    bind_of_a_group_in_a_container,
    bind_of_a_device_from_its_group,
    attach_of_a_device_from_its_group,
    bind_of_a_group_that_is_the_hosts,
    two_devices_of_one_group,
    a_second_iommufd_for_one_group,
    a_failed_bind_leaves_nothing,
    a_bound_device_works,
    a_bound_device_and_its_interrupts,
    a_bound_vf_can_be_reset,
    hot_reset_of_a_vf,
    hot_reset_of_a_pair_bound_in_part,
    a_killed_process_lets_go,
    another_process_has_the_device,
    another_process_has_an_unbound_one,
    no_rights_are_needed_with_fds_in_hand,
    bound_anew_to_its_driver,
    the_node_goes_with_the_driver,
    the_host_cannot_take_part_of_a_bound_group,
];

fn nodes(t: &Script) {
    for bdf in [device::E1000E, device::EDU0, device::PAIR0, device::VF0, device::NVME] {
        let path = format!("bus/pci/devices/{bdf}/vfio-dev");
        let names = t.kernel().sysfs_list(&path).unwrap_or_default();
        let dev = |name: &String| {
            let text = t.kernel().sysfs_read(&format!("{path}/{name}/dev")).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let minor = text.trim_end().rsplit(':').next().unwrap_or_default().to_owned();
            format!("vfio{minor}") == *name
        };
        t.note(bdf, names.iter().map(dev).collect::<Vec<_>>());
    }
}

fn opens_that_do_not_work(t: &Script) {
    for number in [9999, u32::MAX] {
        t.ok("no such number", Device::open_cdev(t.kernel(), number, "none"));
    }
}

fn nothing_works_before_it_is_bound(t: &Script) {
    let device = t.cdev(device::EDU0);
    t.value("info", device.info());
    t.value("region", device.region(7));
    t.value("irq", device.irq(0));
    t.ok("reset", device.reset());
    t.value("hot reset info", device.hot_reset_info());
    t.ok("hot reset", device.hot_reset(&[]));
    t.value("read", device.read_at(&mut [0; 4], 7 << 40));
    t.value("write", device.write_at(&[0; 4], 7 << 40));
    t.value("attach", device.attach_iommufd_pt(1));
    t.value("detach", device.detach_iommufd_pt());
    t.ioctl("unknown", &device, request::UNKNOWN, Arg::Value(0));
    t.ioctl("info, nowhere", &device, request::DEVICE_GET_INFO, Arg::BadPointer);
    t.ioctl("bind, nowhere", &device, request::DEVICE_BIND_IOMMUFD, Arg::BadPointer);
}

fn bind(t: &Script) {
    let iommufd = t.iommufd();
    let device = t.cdev(device::EDU0);
    t.value("bind", device.bind_iommufd(&iommufd));
    t.value("ids", device.pci_ids());
    drop(device);
    let device = t.cdev(device::EDU0);
    t.value("ids, opened anew", device.read_at(&mut [0; 4], 7 << 40));
    t.value("bind", device.bind_iommufd(&iommufd));
}

fn bind_twice(t: &Script) {
    let (first, second) = (t.iommufd(), t.iommufd());
    let device = t.bound(device::EDU0, &first);
    t.value("to the same", device.bind_iommufd(&first));
    t.value("to another", device.bind_iommufd(&second));
    t.ioctl("to nothing", &device, request::DEVICE_BIND_IOMMUFD, Arg::BadPointer);
    t.value("ids", device.pci_ids());
}

fn bind_by_another_file(t: &Script) {
    let (first, second) = (t.iommufd(), t.iommufd());
    let device = t.bound(device::EDU0, &first);
    let other = t.cdev(device::EDU0);
    t.value("to the same", other.bind_iommufd(&first));
    t.value("to another", other.bind_iommufd(&second));
    t.value("ids of the other", other.pci_ids());
    t.value("ids", device.pci_ids());
    drop(other);
    t.value("ids", device.pci_ids());
}

fn a_second_open_waits_for_the_first(t: &Script) {
    let (first, second) = (t.iommufd(), t.iommufd());
    let stale = t.cdev(device::EDU0);
    let device = t.bound(device::EDU0, &first);
    t.value("bind", stale.bind_iommufd(&second));
    t.value("bind by a device of it", device.bind_iommufd(&second));
    drop(device);
    t.value("bind", stale.bind_iommufd(&second));
    t.value("ids", stale.pci_ids());
}

/// `VFIO_DEVICE_BIND_IOMMUFD` with a struct of this size and these flags.
fn bind_raw(t: &Script, what: &str, device: &Device, head: (u32, u32), fd: Option<BorrowedFd<'_>>) {
    let mut bytes = vec![0; 32];
    bytes[..4].copy_from_slice(&head.0.to_ne_bytes());
    bytes[4..8].copy_from_slice(&head.1.to_ne_bytes());
    let fds = [FdSlot { offset: 8, fd }];
    let arg = Arg::Struct { bytes: &mut bytes, fds: &fds, out: None };
    t.ioctl(what, device, request::DEVICE_BIND_IOMMUFD, arg);
    t.note("id", u32_at(&bytes, 12));
}

fn bind_of_no_iommufd(t: &Script) {
    let device = t.cdev(device::EDU0);
    let container = t.container();
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    bind_raw(t, "none", &device, (16, 0), None);
    bind_raw(t, "a pipe", &device, (16, 0), Some(pipe.as_fd()));
    bind_raw(t, "a container", &device, (16, 0), Some(container.as_fd()));
    bind_raw(t, "itself", &device, (16, 0), Some(device.as_fd()));
    let fields = [Field::U32(16), Field::U32(0), Field::U32(9999), Field::U32(0)];
    t.fields("not open", &device, request::DEVICE_BIND_IOMMUFD, &fields);
}

fn bind_of_odd_structs(t: &Script) {
    let iommufd = t.iommufd();
    let fd = Some(iommufd.as_fd());
    let device = t.cdev(device::EDU0);
    for size in [0, 12, 15] {
        bind_raw(t, &format!("{size} bytes"), &device, (size, 0), fd);
    }
    for flags in [2, 1 << 31] {
        bind_raw(t, &format!("flags {flags:#x}"), &device, (16, flags), fd);
        bind_raw(t, &format!("flags {flags:#x}, none"), &device, (16, flags), None);
    }
    bind_raw(t, "20 bytes", &device, (20, 0), fd);
    drop(device);
    let device = t.cdev(device::EDU0);
    bind_raw(t, "32 bytes", &device, (32, 0), fd);
}

fn bind_with_a_token(t: &Script) {
    let iommufd = t.iommufd();
    for bdf in [device::EDU0, device::VF0] {
        let device = t.cdev(bdf);
        t.value(bdf, device.bind_iommufd_with_token(&iommufd, &[7; 16]));
        let fields = |size| [Field::U32(size), Field::U32(1), Field::U32(0), Field::U32(0)];
        t.fields("token missing", &device, request::DEVICE_BIND_IOMMUFD, &fields(16));
        t.value("without", device.bind_iommufd(&iommufd));
    }
}

fn bind_while_the_group_is_open(t: &Script) {
    let iommufd = t.iommufd();
    let device = t.cdev(device::EDU0);
    let group = t.group(device::EDU0);
    t.value("bind", device.bind_iommufd(&iommufd));
    bind_raw(t, "to nothing", &device, (16, 0), Some(device.as_fd()));
    bind_raw(t, "flags", &device, (16, 2), Some(device.as_fd()));
    drop(group);
    t.value("bind", device.bind_iommufd(&iommufd));
}

fn open_of_a_group_whose_device_is_bound(t: &Script) {
    let iommufd = t.iommufd();
    let device = t.bound(device::PAIR0, &iommufd);
    t.ok("group", Group::open(t.kernel(), t.node(device::PAIR1)));
    drop(iommufd);
    t.ok("group", Group::open(t.kernel(), t.node(device::PAIR1)));
    drop(device);
    t.ok("group", Group::open(t.kernel(), t.node(device::PAIR1)));
}

fn open_of_a_group_whose_cdev_is_open(t: &Script) {
    let device = t.cdev(device::EDU0);
    let ready = t.device(device::EDU0);
    t.value("ids", ready.device.pci_ids());
    t.value("bind", device.bind_iommufd(&t.iommufd()));
    drop(ready);
    t.value("bind", device.bind_iommufd(&t.iommufd()));
}

fn bind_of_a_group_in_a_container(t: &Script) {
    let (_container, group) = t.attached(device::PAIR0, IommuType::Type1v2);
    let device = t.cdev(device::PAIR1);
    t.value("bind", device.bind_iommufd(&t.iommufd()));
    t.ok("detach", group.unset_container());
    t.value("bind", device.bind_iommufd(&t.iommufd()));
    drop(group);
    t.value("bind", device.bind_iommufd(&t.iommufd()));
}

fn bind_of_a_device_from_its_group(t: &Script) {
    let iommufd = t.iommufd();
    let ready = t.device(device::EDU0);
    t.value("bind", ready.device.bind_iommufd(&iommufd));
    bind_raw(t, "flags", &ready.device, (16, 4), Some(iommufd.as_fd()));
    bind_raw(t, "a short one", &ready.device, (8, 0), Some(iommufd.as_fd()));
    bind_raw(t, "to itself", &ready.device, (16, 0), Some(ready.device.as_fd()));
    t.ioctl("nowhere", &ready.device, request::DEVICE_BIND_IOMMUFD, Arg::BadPointer);
}

fn attach_of_a_device_from_its_group(t: &Script) {
    let ready = t.device(device::EDU0);
    t.value("attach", ready.device.attach_iommufd_pt(1));
    t.value("detach", ready.device.detach_iommufd_pt());
}

fn bind_of_a_group_that_is_the_hosts(t: &Script) {
    let iommufd = t.iommufd();
    let device = t.cdev(device::MIXED_EDU);
    t.value("bind", device.bind_iommufd(&iommufd));
    t.bind(device::MIXED_E1000, None);
    t.value("bind", device.bind_iommufd(&iommufd));
    drop(device);
    t.bind(device::MIXED_E1000, Some("e1000"));
}

fn two_devices_of_one_group(t: &Script) {
    let iommufd = t.iommufd();
    let devices = [t.cdev(device::PAIR0), t.cdev(device::PAIR1)];
    for device in &devices {
        t.value("bind", device.bind_iommufd(&iommufd));
    }
    for device in &devices {
        t.value("ids", device.pci_ids());
    }
}

fn a_second_iommufd_for_one_group(t: &Script) {
    let (first, second) = (t.iommufd(), t.iommufd());
    let (one, other) = (t.cdev(device::PAIR0), t.cdev(device::PAIR1));
    t.value("one", one.bind_iommufd(&first));
    t.value("the other", other.bind_iommufd(&second));
    t.value("the other, the same", other.bind_iommufd(&first));
    drop(one);
    drop(other);
    let other = t.cdev(device::PAIR1);
    t.value("the other, alone", other.bind_iommufd(&second));
}

fn a_failed_bind_leaves_nothing(t: &Script) {
    let (first, second) = (t.iommufd(), t.iommufd());
    let (one, other) = (t.bound(device::PAIR0, &first), t.cdev(device::PAIR1));
    t.value("the other", other.bind_iommufd(&second));
    t.value("ioas", second.ioas_alloc());
    drop(one);
    t.ok("group", Group::open(t.kernel(), t.node(device::PAIR0)));
    t.value("the other", other.bind_iommufd(&second));
}

/// Everything that is asked of a device, on one from its group and on a bound one.
fn a_bound_device_works(t: &Script) {
    let ask = |device: &Device| {
        let irqs: Vec<_> = (0..6).map(|index| device.irq(index).map_err(|e| e.errno)).collect();
        let regions: Vec<_> =
            (0..10).map(|index| device.region(index).map_err(|e| e.errno)).collect();
        let mut config = [0; 64];
        let read = device.read_at(&mut config, 7 << 40).map_err(|e| e.errno);
        format!("{:?} {irqs:?} {regions:?} {read:?} {config:x?}", device.info())
    };
    for bdf in [device::EDU0, device::E1000E, device::VF0] {
        let from_group = ask(&t.device(bdf).device);
        let bound = ask(&t.bound(bdf, &t.iommufd()));
        t.note(bdf, from_group == bound);
    }
    let device = t.bound(device::EDU0, &t.iommufd());
    t.ok("reset", device.reset());
    t.ioctl("unknown", &device, request::UNKNOWN, Arg::Value(0));
    t.value("command", device.write_at(&[6, 0], (7 << 40) + 4));
}

fn a_bound_device_and_its_interrupts(t: &Script) {
    use vfio_broker::kernel::{IrqAction, IrqData};
    let device = t.bound(device::EDU0, &t.iommufd());
    let event = nix::sys::eventfd::EventFd::from_value_and_flags(
        0,
        nix::sys::eventfd::EfdFlags::EFD_NONBLOCK,
    );
    let event = event.unwrap();
    let list = [Some(event.as_fd())];
    t.ok("set", device.set_irqs(1, 0, IrqAction::Trigger, IrqData::Eventfd(&list)));
    t.ok("fire", device.set_irqs(1, 0, IrqAction::Trigger, IrqData::None { count: 1 }));
    t.note("fired", event.read());
    t.ok("off", device.set_irqs(1, 0, IrqAction::Trigger, IrqData::None { count: 0 }));
}

fn a_bound_vf_can_be_reset(t: &Script) {
    let device = t.bound(device::VF0, &t.iommufd());
    t.ok("reset", device.reset());
    t.value("ids", device.pci_ids());
}

fn hot_reset_of_a_vf(t: &Script) {
    let iommufd = t.iommufd();
    let device = t.bound(device::VF0, &iommufd);
    let info = device.hot_reset_info().map(|devices| {
        devices.into_iter().map(|it| (it.owner, it.bus, it.devfn)).collect::<Vec<_>>()
    });
    t.value("info", info);
    t.ok("with none", device.hot_reset(&[]));
    t.ok("with an iommufd", device.hot_reset(&[iommufd.as_fd()]));
    let fields = [Field::U32(12), Field::U32(0), Field::U32(0)];
    let request = request::DEVICE_GET_PCI_HOT_RESET_INFO;
    let bytes = t.fields("no room", &device, request, &fields);
    t.note("flags, count", (u32_at(&bytes, 4), u32_at(&bytes, 8)));
}

fn hot_reset_of_a_pair_bound_in_part(t: &Script) {
    t.bind(device::MIXED_E1000, None);
    let iommufd = t.iommufd();
    let device = t.bound(device::MIXED_EDU, &iommufd);
    let info = |what: &str| {
        let info = device.hot_reset_info();
        t.value(what, info.map(|all| all.into_iter().map(|it| it.owner).collect::<Vec<_>>()));
    };
    info("the other on no driver");
    t.ok("hot reset", device.hot_reset(&[]));
    t.bind(device::MIXED_E1000, Some("vfio-pci"));
    info("the other on vfio-pci");
    t.ok("hot reset", device.hot_reset(&[]));
    let other = t.bound(device::MIXED_E1000, &iommufd);
    info("both bound");
    t.ok("hot reset", device.hot_reset(&[]));
    drop((device, other));
    t.bind(device::MIXED_E1000, Some("e1000"));
}

/// A device that an agent has bound to an iommufd of its own.
fn with_agent(t: &Script, bdf: &str) -> Agent {
    let agent = Agent::start();
    t.note("iommufd", agent.ask("open-iommufd", &[]));
    let number = t.cdev_number(bdf).unwrap();
    t.note("cdev", agent.ask(&format!("open-cdev {number}"), &[]));
    t.note("bind", agent.ask("bind", &[]));
    agent
}

fn a_killed_process_lets_go(t: &Script) {
    let agent = with_agent(t, device::EDU0);
    let device = t.cdev(device::EDU0);
    let iommufd = t.iommufd();
    t.value("bind", device.bind_iommufd(&iommufd));
    t.ok("group", Group::open(t.kernel(), t.node(device::EDU0)));
    agent.kill();
    t.value("bind", device.bind_iommufd(&iommufd));
    drop(device);
    t.ok("group", Group::open(t.kernel(), t.node(device::EDU0)));
}

fn another_process_has_the_device(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    let agent = Agent::start();
    agent.ask("take-device", &[device.as_fd()]);
    drop((device, iommufd));
    t.note("agent reads", agent.ask("ids", &[]));
    t.note("agent attaches", agent.ask(&format!("attach {ioas}"), &[]));
    t.ok("group", Group::open(t.kernel(), t.node(device::EDU0)));
    agent.kill();
    t.ok("group", Group::open(t.kernel(), t.node(device::EDU0)));
}

fn another_process_has_an_unbound_one(t: &Script) {
    let device = t.cdev(device::EDU0);
    let agent = Agent::start();
    agent.ask("take-device", &[device.as_fd()]);
    drop(device);
    let group = t.ok("group", Group::open(t.kernel(), t.node(device::EDU0)));
    drop(group);
    let ours = t.bound(device::EDU0, &t.iommufd());
    t.note("agent opens", agent.ask("open-iommufd", &[]));
    t.note("agent binds", agent.ask("bind", &[]));
    drop(ours);
    t.note("agent binds", agent.ask("bind", &[]));
    t.ok("group", Group::open(t.kernel(), t.node(device::EDU0)));
}

fn no_rights_are_needed_with_fds_in_hand(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let device = t.cdev(device::EDU0);
    let agent = Agent::unprivileged(16 * 4096);
    agent.ask("take-iommufd", &[iommufd.as_fd()]);
    agent.ask("take-device", &[device.as_fd()]);
    t.note("bind", agent.ask("bind", &[]));
    t.note("attach", agent.ask(&format!("attach {ioas}"), &[]));
    t.note("map", agent.ask(&format!("ioas-map {ioas} 0 4"), &[]));
    t.note("ids", agent.ask("ids", &[]));
}

fn bound_anew_to_its_driver(t: &Script) {
    let before = t.cdev_number(device::EDU0);
    let iommufd = t.iommufd();
    drop(t.bound(device::EDU0, &iommufd));
    t.bind(device::EDU0, None);
    t.bind(device::EDU0, Some("vfio-pci"));
    t.note("the same number", t.cdev_number(device::EDU0) == before);
    t.value("bind", t.cdev(device::EDU0).bind_iommufd(&iommufd));
}

fn the_node_goes_with_the_driver(t: &Script) {
    let number = t.cdev_number(device::EDU0).unwrap();
    t.bind(device::EDU0, None);
    t.note("number", t.cdev_number(device::EDU0).is_some());
    t.ok("open", Device::open_cdev(t.kernel(), number, "gone"));
    t.bind(device::EDU0, Some("vfio-pci"));
    t.ok("open", Device::open_cdev(t.kernel(), t.cdev_number(device::EDU0).unwrap(), "back"));
}

fn the_host_cannot_take_part_of_a_bound_group(t: &Script) {
    t.bind(device::MIXED_E1000, None);
    let device = t.bound(device::MIXED_EDU, &t.iommufd());
    t.bind(device::MIXED_E1000, Some("e1000"));
    drop(device);
    t.bind(device::MIXED_E1000, Some("e1000"));
}
