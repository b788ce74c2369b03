//! Machines of another make: without interrupt remapping, without an IOMMU.

use crate::agent::Agent;
use crate::script::{PAGE, Script, device, memory};
use std::os::fd::AsFd;
use vfio_broker::kernel::{Arg, Device, DmaMap, Group, IommuType, Iommufd, request};

super::cases![
    no_intremap_type,
    no_intremap_again,
    no_intremap_cdev,
    no_iommu_open,
    no_iommu_types,
    no_iommu_device,
    no_iommu_without_rights,
    no_iommu_cdev,
];

fn no_intremap_type(t: &Script) {
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.value("status", group.status());
    t.ok("attach", group.set_container(&container));
    for number in [1, 3, 8, 77] {
        t.ok(&format!("type {number}"), container.set_iommu(IommuType::Other(number)));
    }
    t.ok("device", group.device(device::EDU0));
    t.value("info", container.info().map(drop));
}

fn no_intremap_again(t: &Script) {
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.ok("attach", group.set_container(&container));
    t.ok("type", container.set_iommu(IommuType::Type1v2));
    t.ok("detach", group.unset_container());
    t.ok("type", container.set_iommu(IommuType::Type1v2));
}

fn no_intremap_cdev(t: &Script) {
    let iommufd = t.iommufd();
    let device = t.cdev(device::EDU0);
    t.value("bind", device.bind_iommufd(&iommufd));
    t.value("ioas", iommufd.ioas_alloc());
    t.value("ids", device.pci_ids());
    t.ok("group", Group::open(t.kernel(), t.node(device::EDU0)));
}

fn no_iommu_open(t: &Script) {
    let group = t.ok("open", Group::open(t.kernel(), t.node(device::E1000E)));
    t.ok("twice", Group::open(t.kernel(), t.node(device::E1000E)));
    if let Some(group) = group {
        t.value("status", group.status());
    }
}

fn no_iommu_types(t: &Script) {
    let (container, group) = (t.container(), t.group(device::E1000E));
    for number in 0..11 {
        let what = format!("extension {number}");
        t.ioctl(&what, &container, request::CHECK_EXTENSION, Arg::Value(number));
    }
    t.ok("attach", group.set_container(&container));
    for number in 0..11 {
        let what = format!("extension {number}");
        t.ioctl(&what, &container, request::CHECK_EXTENSION, Arg::Value(number));
    }
    for number in [1, 3, 77, 8, 8] {
        t.ok(&format!("type {number}"), container.set_iommu(IommuType::Other(number)));
    }
    for number in 0..11 {
        let what = format!("extension {number}");
        t.ioctl(&what, &container, request::CHECK_EXTENSION, Arg::Value(number));
    }
    t.value("info", container.info().map(drop));
    let memory = memory(1);
    t.map("map", &container, DmaMap::READ, (memory.vaddr(), 0, PAGE));
}

fn no_iommu_device(t: &Script) {
    let (container, group) = (t.container(), t.group(device::E1000E));
    t.ok("attach", group.set_container(&container));
    t.ok("device, no type", group.device(device::E1000E));
    t.ok("type", container.set_iommu(IommuType::NoIommu));
    let device = t.ok("device", group.device(device::E1000E));
    if let Some(device) = device {
        t.value("ids", device.pci_ids());
        t.ok("detach", group.unset_container());
    }
    t.ok("detach", group.unset_container());
}

fn no_iommu_without_rights(t: &Script) {
    let (container, group) = (t.container(), t.group(device::E1000E));
    t.ok("attach", group.set_container(&container));
    t.ok("type", container.set_iommu(IommuType::NoIommu));
    let agent = Agent::unprivileged(PAGE);
    agent.ask("take-group", &[group.as_fd()]);
    t.note("device", agent.ask(&format!("open-device {}", device::E1000E), &[]));
    let open = t.ok("device", group.device(device::E1000E));
    t.note("device", agent.ask(&format!("open-device {}", device::E1000E), &[]));
    drop(open);
}

fn no_iommu_cdev(t: &Script) {
    t.ok("iommufd", Iommufd::open(t.kernel()));
    let number = t.cdev_number(device::E1000E);
    t.note("name", number.is_some());
    let path =
        format!("bus/pci/devices/{}/vfio-dev/vfio{}/dev", device::E1000E, number.unwrap_or(0));
    t.note("node in sysfs", t.kernel().sysfs_read(&path).map(|_| ()));
    if let Some(number) = number {
        t.ok("open", Device::open_cdev(t.kernel(), number, "e1000e"));
    }
}
