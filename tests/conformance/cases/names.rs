//! `VFIO_GROUP_GET_DEVICE_FD`: names, tokens, and when it works at all.

use crate::script::{Script, device};
use nix::fcntl::{FcntlArg, fcntl};
use std::ffi::CString;
use std::os::fd::AsFd;
use vfio_broker::kernel::{Arg, IommuType, request};

super::cases![
    without_a_container,
    without_a_type,
    by_its_name,
    several_opens,
    close_on_exec,
    a_name_that_is_none,
    a_device_of_another_group,
    characters_after_the_name,
    options_after_the_name,
    a_superfluous_token,
    a_token_that_is_no_uuid,
    a_vf_whose_pf_is_the_hosts,
    a_bad_pointer,
    a_very_long_name,
    a_device_holds_its_group,
    a_second_open_without_a_container,
];

const TOKEN: &str = "2ab74924-c335-45f4-9b16-8569e5b08258";

fn without_a_container(t: &Script) {
    let group = t.group(device::EDU0);
    t.ok("device", group.device(device::EDU0));
    t.ok("unknown", group.device("0000:99:00.0"));
}

fn without_a_type(t: &Script) {
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.ok("attach", group.set_container(&container));
    t.ok("device", group.device(device::EDU0));
    t.ok("unknown", group.device("0000:99:00.0"));
    t.ok("type", container.set_iommu(IommuType::Type1v2));
    t.ok("device", group.device(device::EDU0));
}

fn by_its_name(t: &Script) {
    for bdf in [device::E1000E, device::EDU0, device::PAIR1, device::VF0] {
        let (_container, group) = t.attached(bdf, IommuType::Type1v2);
        t.ok(bdf, group.device(bdf));
    }
}

fn several_opens(t: &Script) {
    let (_container, group) = t.space();
    let first = t.ok("first", group.device(device::EDU0));
    let second = t.ok("second", group.device(device::EDU0));
    drop(first);
    t.ok("detach", group.unset_container());
    if let Some(second) = second {
        t.value("ids", second.pci_ids());
    }
    t.ok("detach", group.unset_container());
}

fn close_on_exec(t: &Script) {
    let ready = t.device(device::EDU0);
    t.note("flags", fcntl(ready.device.as_fd(), FcntlArg::F_GETFD));
}

fn a_name_that_is_none(t: &Script) {
    let (_container, group) = t.space();
    for name in ["", " ", "0000:99:00.0", "vfio0", "0000:00:03", "0000:00:03.", "00:03.0"] {
        t.ok(&format!("{name:?}"), group.device(name));
    }
}

fn a_device_of_another_group(t: &Script) {
    let (_container, group) = t.space();
    t.ok("its own", group.device(device::EDU0));
    t.ok("another's", group.device(device::EDU1));
    t.ok("the host's", group.device(device::NVME));
}

fn characters_after_the_name(t: &Script) {
    let (_container, group) = t.space();
    for rest in ["0", "x", "\t", ",", " ", "   "] {
        t.ok(&format!("{rest:?}"), group.device(&format!("{}{rest}", device::EDU0)));
    }
}

fn options_after_the_name(t: &Script) {
    let (_container, group) = t.space();
    for rest in [" x", " vf_token", " vf_token=", " token=1", "  vf_toke=1"] {
        t.ok(&format!("{rest:?}"), group.device(&format!("{}{rest}", device::EDU0)));
    }
}

fn a_superfluous_token(t: &Script) {
    let (_container, group) = t.space();
    t.ok("once", group.device(&format!("{} vf_token={TOKEN}", device::EDU0)));
    let twice = format!("{} vf_token={TOKEN} vf_token={TOKEN}", device::EDU0);
    t.ok("twice", group.device(&twice));
    t.ok("and more", group.device(&format!("{} vf_token={TOKEN} x", device::EDU0)));
}

fn a_token_that_is_no_uuid(t: &Script) {
    let (_container, group) = t.attached(device::VF0, IommuType::Type1v2);
    let wrong = [
        "1",
        "2ab74924-c335-45f4-9b16-8569e5b0825",
        "2ab74924xc335-45f4-9b16-8569e5b08258",
        "2ab74924-c335-45f4-9b16-8569e5b0825g",
        "2ab74924c33545f49b168569e5b08258000000",
    ];
    for token in wrong {
        t.ok(token, group.device(&format!("{} vf_token={token}", device::VF0)));
    }
}

fn a_vf_whose_pf_is_the_hosts(t: &Script) {
    let (_container, group) = t.attached(device::VF0, IommuType::Type1v2);
    t.ok("no token", group.device(device::VF0));
    t.ok("a token", group.device(&format!("{} vf_token={TOKEN}", device::VF0)));
}

fn a_bad_pointer(t: &Script) {
    let (_container, group) = t.space();
    t.ioctl("nowhere", &group, request::GROUP_GET_DEVICE_FD, Arg::BadPointer);
    let free = t.group(device::EDU1);
    t.ioctl("free group", &free, request::GROUP_GET_DEVICE_FD, Arg::BadPointer);
}

fn a_very_long_name(t: &Script) {
    let (_container, group) = t.space();
    for len in [4000, 4095, 4096, 5000] {
        let name = CString::new(vec![b'x'; len]).unwrap();
        let arg = Arg::Text(&name);
        t.ioctl(&format!("{len} bytes"), &group, request::GROUP_GET_DEVICE_FD, arg);
    }
}

fn a_device_holds_its_group(t: &Script) {
    let ready = t.device(device::EDU0);
    let node = t.node(device::EDU0);
    let open = || vfio_broker::kernel::Group::open(t.kernel(), node.clone());
    drop(ready.group);
    t.ok("group, its fd closed", open());
    drop(ready.container);
    t.ok("group, the container's too", open());
    t.value("ids", ready.device.pci_ids());
    drop(ready.device);
    t.ok("group, the device's too", open());
}

fn a_second_open_without_a_container(t: &Script) {
    let ready = t.device(device::EDU0);
    drop(ready.container);
    t.ok("again", ready.group.device(device::EDU0));
    drop(ready.device);
    t.ok("after the last close", ready.group.device(device::EDU0));
}
