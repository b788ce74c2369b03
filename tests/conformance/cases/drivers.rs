//! Drivers that come and go under open files. Every case leaves them as it found them.

use crate::script::{Mapped3, Script, device};
use vfio_broker::kernel::{Group, IommuType, UnmapFlags};

super::cases![
    a_free_group_does_not_hold_its_device,
    an_attached_group_does_not_hold_its_device,
    a_group_outlives_one_of_its_devices,
    a_group_becomes_viable,
    the_host_cannot_take_part_of_a_group_in_use,
    a_container_outlives_a_group_that_died,
];

const VFIO: Option<&str> = Some("vfio-pci");

fn a_free_group_does_not_hold_its_device(t: &Script) {
    let (node, container) = (t.node(device::EDU0), t.container());
    let group = t.group(device::EDU0);
    t.bind(device::EDU0, None);
    t.value("status", group.status());
    t.ok("attach", group.set_container(&container));
    t.ok("detach", group.unset_container());
    t.ok("device", group.device(device::EDU0));
    t.ok("open", Group::open(t.kernel(), node.clone()));
    t.bind(device::EDU0, VFIO);
    t.value("the old one's status", group.status());
    let again = t.ok("open", Group::open(t.kernel(), node.clone()));
    drop(group);
    t.ok("open", Group::open(t.kernel(), node));
    if let Some(again) = again {
        t.value("status", again.status());
    }
}

fn an_attached_group_does_not_hold_its_device(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    let node = t.node(device::EDU0);
    t.bind(device::EDU0, None);
    t.value("status", space.group.status());
    t.value("info", space.container.info().map(drop));
    t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
    t.ok("detach", space.group.unset_container());
    t.bind(device::EDU0, VFIO);
    let again = t.ok("open", Group::open(t.kernel(), node));
    if let Some(again) = again {
        t.ok("attach", again.set_container(&space.container));
        t.ok("type", space.container.set_iommu(IommuType::Type1v2));
        t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
    }
}

fn a_group_outlives_one_of_its_devices(t: &Script) {
    let (container, group) = t.attached(device::PAIR0, IommuType::Type1v2);
    t.bind(device::PAIR1, None);
    t.value("status", group.status());
    t.ok("the one that left", group.device(device::PAIR1));
    t.ok("the one that stayed", group.device(device::PAIR0));
    t.bind(device::PAIR1, VFIO);
    t.ok("the one that came back", group.device(device::PAIR1));
    t.value("info", container.info().map(drop));
}

fn a_group_becomes_viable(t: &Script) {
    let group = t.group(device::MIXED_EDU);
    let container = t.container();
    t.value("status", group.status());
    t.bind(device::MIXED_E1000, None);
    t.value("status", group.status());
    t.ok("attach", group.set_container(&container));
    t.ok("detach", group.unset_container());
    t.bind(device::MIXED_E1000, Some("e1000"));
    t.value("status", group.status());
    t.ok("attach", group.set_container(&container));
}

fn the_host_cannot_take_part_of_a_group_in_use(t: &Script) {
    t.bind(device::MIXED_E1000, None);
    let (container, group) = t.attached(device::MIXED_EDU, IommuType::Type1v2);
    let open = t.ok("device", group.device(device::MIXED_EDU));
    t.bind(device::MIXED_E1000, Some("e1000"));
    t.value("status", group.status());
    if let Some(open) = open {
        t.value("hot reset", open.hot_reset_info().map(|devices| devices.len()));
        t.ok("hot reset", open.hot_reset(&[std::os::fd::AsFd::as_fd(&group)]));
        t.ok("reset", open.reset());
    }
    drop(container);
    t.ok("detach", group.unset_container());
    t.bind(device::MIXED_E1000, Some("e1000"));
    t.value("status", group.status());
}

fn a_container_outlives_a_group_that_died(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    let second = t.group(device::EDU1);
    t.ok("attach", second.set_container(&space.container));
    t.bind(device::EDU0, None);
    t.unmap("one", &space.container, 0, 0, 2 * 4096);
    t.ok("device", second.device(device::EDU1));
    t.bind(device::EDU0, VFIO);
    t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
}
