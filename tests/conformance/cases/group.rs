//! Groups: opening, status, attaching and detaching.

use crate::script::{Field, Script, device};
use nix::sys::eventfd::EventFd;
use std::os::fd::AsFd;
use vfio_broker::kernel::{Arg, Container, Error, Group, IommuType, Node, request};

super::cases![
    open_once,
    open_twice,
    open_after_close,
    open_without_a_vfio_device,
    open_a_number_that_is_none,
    open_as_no_iommu,
    status_of_a_free_group,
    status_of_a_group_that_is_not_viable,
    status_wants_eight_bytes,
    status_of_a_bad_pointer,
    status_while_attached,
    status_after_detaching,
    unknown_ioctl,
    requests_of_others,
    attach_wants_an_open_fd,
    attach_wants_a_container,
    attach_wants_a_pointer,
    attach_twice,
    attach_to_another,
    attach_a_group_that_is_not_viable,
    attach_two_groups,
    detach_what_is_not_attached,
    detach_twice,
    detach_with_an_open_device,
    detach_resets_the_container,
    detach_one_of_two,
    attach_again_elsewhere,
    two_devices_of_a_group,
    read_and_write_a_group,
    a_number_the_kernel_does_not_have,
];

fn open_once(t: &Script) {
    t.ok("open", Group::open(t.kernel(), t.node(device::EDU0)));
}

fn open_twice(t: &Script) {
    let _first = t.ok("first", Group::open(t.kernel(), t.node(device::EDU0)));
    t.ok("second", Group::open(t.kernel(), t.node(device::EDU0)));
    t.ok("another group", Group::open(t.kernel(), t.node(device::EDU1)));
}

fn open_after_close(t: &Script) {
    drop(t.group(device::EDU0));
    t.ok("open", Group::open(t.kernel(), t.node(device::EDU0)));
}

fn open_without_a_vfio_device(t: &Script) {
    t.ok("open", Group::open(t.kernel(), t.node(device::NVME)));
}

fn open_a_number_that_is_none(t: &Script) {
    t.ok("open", Group::open(t.kernel(), Node::Group(9999)));
}

fn open_as_no_iommu(t: &Script) {
    let Node::Group(id) = t.node(device::EDU0) else { return };
    t.ok("open", Group::open(t.kernel(), Node::NoIommuGroup(id)));
}

fn status_of_a_free_group(t: &Script) {
    t.value("status", t.group(device::EDU0).status());
}

fn status_of_a_group_that_is_not_viable(t: &Script) {
    t.value("status", t.group(device::MIXED_EDU).status());
}

fn status_wants_eight_bytes(t: &Script) {
    let group = t.group(device::EDU0);
    for argsz in [0, 4, 7, 8, 9, 16] {
        let fields = [Field::U32(argsz), Field::U32(77), Field::U64(0)];
        let bytes = t.fields(&format!("argsz {argsz}"), &group, request::GROUP_GET_STATUS, &fields);
        t.note("bytes", bytes);
    }
}

fn status_of_a_bad_pointer(t: &Script) {
    t.ioctl("status", t.group(device::EDU0), request::GROUP_GET_STATUS, Arg::BadPointer);
}

fn status_while_attached(t: &Script) {
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.ok("attach", group.set_container(&container));
    t.value("status", group.status());
}

fn status_after_detaching(t: &Script) {
    let (_container, group) = t.attached(device::EDU0, IommuType::Type1v2);
    t.ok("detach", group.unset_container());
    t.value("status", group.status());
}

fn unknown_ioctl(t: &Script) {
    let group = t.group(device::EDU0);
    t.ioctl("free", &group, request::UNKNOWN, Arg::Value(0));
    let container = t.container();
    t.ok("attach", group.set_container(&container));
    t.ioctl("attached", &group, request::UNKNOWN, Arg::Value(0));
}

fn requests_of_others(t: &Script) {
    let group = t.group(device::EDU0);
    for request in [
        request::GET_API_VERSION,
        request::CHECK_EXTENSION,
        request::SET_IOMMU,
        request::IOMMU_GET_INFO,
        request::DEVICE_GET_INFO,
        request::DEVICE_RESET,
    ] {
        t.ioctl(request.name, &group, request, Arg::Value(0));
    }
}

fn attach_wants_an_open_fd(t: &Script) {
    let group = t.group(device::EDU0);
    // Nothing is open under this number.
    t.fields("closed", &group, request::GROUP_SET_CONTAINER, &[Field::U32(200)]);
    let _container = t.container();
    t.ok("attach", group.set_container(&_container));
    t.fields("closed", &group, request::GROUP_SET_CONTAINER, &[Field::U32(200)]);
}

fn attach_wants_a_container(t: &Script) {
    let group = t.group(device::EDU0);
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    let event = EventFd::new().unwrap();
    let ready = t.device(device::E1000E);
    let foreign = [
        ("pipe", pipe.as_fd()),
        ("eventfd", event.as_fd()),
        ("itself", group.as_fd()),
        ("another group", ready.group.as_fd()),
        ("device", ready.device.as_fd()),
    ];
    for (what, fd) in foreign {
        t.ioctl(what, &group, request::GROUP_SET_CONTAINER, Arg::Fd(fd));
    }
    let container = t.container();
    t.ok("attach", group.set_container(&container));
    for (what, fd) in foreign {
        t.ioctl(what, &group, request::GROUP_SET_CONTAINER, Arg::Fd(fd));
    }
}

fn attach_wants_a_pointer(t: &Script) {
    let group = t.group(device::EDU0);
    t.ioctl("nowhere", &group, request::GROUP_SET_CONTAINER, Arg::BadPointer);
    t.ioctl("null", &group, request::GROUP_SET_CONTAINER, Arg::Value(0));
}

fn attach_twice(t: &Script) {
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.ok("first", group.set_container(&container));
    t.ok("second", group.set_container(&container));
}

fn attach_to_another(t: &Script) {
    let (first, second, group) = (t.container(), t.container(), t.group(device::EDU0));
    t.ok("first", group.set_container(&first));
    t.ok("second", group.set_container(&second));
    t.ok("detach", group.unset_container());
    t.ok("second", group.set_container(&second));
}

fn attach_a_group_that_is_not_viable(t: &Script) {
    let (container, group) = (t.container(), t.group(device::MIXED_EDU));
    t.ok("empty container", group.set_container(&container));
    t.ok("type", container.set_iommu(IommuType::Type1v2));
    let (container, _group) = t.space();
    t.ok("container in use", group.set_container(&container));
    t.value("status", group.status());
    t.ok("device", group.device(device::MIXED_EDU));
}

fn attach_two_groups(t: &Script) {
    let (container, _first) = t.space();
    let second = t.group(device::EDU1);
    t.ok("second", second.set_container(&container));
    t.value("status", second.status());
    t.ok("device", second.device(device::EDU1));
}

fn detach_what_is_not_attached(t: &Script) {
    t.ok("detach", t.group(device::EDU0).unset_container());
}

fn detach_twice(t: &Script) {
    let (_container, group) = t.space();
    t.ok("first", group.unset_container());
    t.ok("second", group.unset_container());
}

fn detach_with_an_open_device(t: &Script) {
    let (_container, group) = t.space();
    let open = t.ok("device", group.device(device::EDU0));
    t.ok("detach", group.unset_container());
    drop(open);
    t.ok("detach", group.unset_container());
}

fn detach_resets_the_container(t: &Script) {
    let (container, group) = t.space();
    t.ok("detach", group.unset_container());
    t.value("info", container.info().map(drop));
    t.ok("type", container.set_iommu(IommuType::Type1v2));
    t.ok("attach", group.set_container(&container));
    t.value("info", container.info().map(drop));
    t.ok("another type", container.set_iommu(IommuType::Type1));
    t.value("info", container.info().map(drop));
}

fn detach_one_of_two(t: &Script) {
    let (container, first) = t.space();
    let second = t.group(device::EDU1);
    t.ok("attach", second.set_container(&container));
    t.ok("detach the first", first.unset_container());
    t.value("info", container.info().map(drop));
    t.ok("detach the second", second.unset_container());
    t.value("info", container.info().map(drop));
}

fn attach_again_elsewhere(t: &Script) {
    let (first, group) = t.space();
    t.ok("detach", group.unset_container());
    let second = t.container();
    t.ok("attach", group.set_container(&second));
    t.ok("type", second.set_iommu(IommuType::Type1));
    t.ok("device", group.device(device::EDU0));
    t.value("the first", first.info().map(drop));
}

fn two_devices_of_a_group(t: &Script) {
    let (_container, group) = t.attached(device::PAIR0, IommuType::Type1v2);
    let first = t.ok("first", group.device(device::PAIR0));
    let second = t.ok("second", group.device(device::PAIR1));
    t.ok("both open", group.unset_container());
    drop(first);
    t.ok("one open", group.unset_container());
    drop(second);
    t.ok("none open", group.unset_container());
}

fn read_and_write_a_group(t: &Script) {
    let (container, group) = t.space();
    let failed = |errno| Error::new("", "", errno);
    for (what, fd) in [("group", group.as_fd()), ("container", container.as_fd())] {
        t.value(what, t.kernel().pread(fd, &mut [0; 4], 0).map_err(failed));
        t.value(what, t.kernel().pwrite(fd, &[0; 4], 0).map_err(failed));
    }
}

fn a_number_the_kernel_does_not_have(t: &Script) {
    // Container and group requests on the wrong file, with arguments that would be right.
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.fields(
        "status of a container",
        &container,
        request::GROUP_GET_STATUS,
        &[Field::U32(8), Field::U32(0)],
    );
    t.ioctl("attach a container", &container, request::GROUP_SET_CONTAINER, Arg::Value(0));
    t.ok("version of a group", Container::from_fd(t.kernel(), group.into()).api_version());
}
