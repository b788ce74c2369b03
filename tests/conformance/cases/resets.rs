//! Resets of a function, and of everything below a bus.

use crate::script::{Field, Script, device, u32_at};
use std::os::fd::AsFd;
use vfio_broker::kernel::{PCI_CONFIG_REGION, request};

super::cases![
    of_a_network_card,
    of_a_device_that_cannot,
    of_a_vf,
    a_reset_forgets,
    info_on_the_root_bus,
    info_of_a_vf,
    info_argsz_too_small,
    info_that_does_not_fit,
    hot_reset_on_the_root_bus,
    hot_reset_argsz_and_flags,
    hot_reset_without_groups,
    hot_reset_with_files_that_are_no_groups,
    hot_reset_of_devices_of_others,
];

fn of_a_network_card(t: &Script) {
    let ready = t.device(device::E1000E);
    t.ok("reset", ready.device.reset());
    t.ok("again", ready.device.reset());
    t.value("ids", ready.device.pci_ids());
}

fn of_a_device_that_cannot(t: &Script) {
    t.ok("reset", t.device(device::EDU0).device.reset());
}

fn of_a_vf(t: &Script) {
    t.ok("reset", t.device(device::VF0).device.reset());
}

fn a_reset_forgets(t: &Script) {
    let ready = t.device(device::E1000E);
    let Ok(config) = ready.device.region(PCI_CONFIG_REGION) else { return };
    let line = config.offset + 0x3c;
    t.value("write", ready.device.write_at(&[0x77], line));
    let mut byte = [0; 1];
    t.value("read", ready.device.read_at(&mut byte, line).map(|_| byte));
    t.ok("reset", ready.device.reset());
    t.value("memory", ready.device.read_at(&mut [0; 4], 0));
}

fn info_on_the_root_bus(t: &Script) {
    for bdf in [device::E1000E, device::EDU0, device::PAIR0] {
        t.value(bdf, t.device(bdf).device.hot_reset_info());
    }
}

fn info_of_a_vf(t: &Script) {
    let info = t.device(device::VF0).device.hot_reset_info();
    // Group numbers are the machine's own.
    let places = |devices: Vec<vfio_broker::kernel::HotResetDevice>| -> Vec<_> {
        devices.iter().map(|it| (it.segment, it.bus, it.devfn)).collect()
    };
    t.value("info", info.map(places));
}

fn info_argsz_too_small(t: &Script) {
    for bdf in [device::VF0, device::EDU0] {
        let ready = t.device(bdf);
        for argsz in [0, 8, 11] {
            let fields = [Field::U32(argsz), Field::U32(77), Field::U32(77)];
            let request = request::DEVICE_GET_PCI_HOT_RESET_INFO;
            t.fields(&format!("argsz {argsz}"), &ready.device, request, &fields);
        }
    }
}

fn info_that_does_not_fit(t: &Script) {
    let ready = t.device(device::VF0);
    for argsz in [12, 20, 28] {
        let mut fields = vec![Field::U32(argsz)];
        fields.extend([Field::U32(77); 10]);
        let request = request::DEVICE_GET_PCI_HOT_RESET_INFO;
        let what = format!("argsz {argsz}");
        let bytes = t.fields(&what, &ready.device, request, &fields);
        t.note("argsz, flags, count", [0, 4, 8].map(|at| u32_at(&bytes, at)));
    }
}

fn hot_reset_on_the_root_bus(t: &Script) {
    let ready = t.device(device::E1000E);
    t.ok("with its group", ready.device.hot_reset(&[ready.group.as_fd()]));
    t.ok("with none", ready.device.hot_reset(&[]));
}

fn hot_reset_argsz_and_flags(t: &Script) {
    for bdf in [device::VF0, device::EDU0] {
        let ready = t.device(bdf);
        for (argsz, flags) in [(0, 0), (11, 0), (12, 1), (12, 0)] {
            let fields = [argsz, flags, 0].map(Field::U32);
            let what = format!("argsz {argsz}, flags {flags}");
            t.fields(&what, &ready.device, request::DEVICE_PCI_HOT_RESET, &fields);
        }
    }
}

fn hot_reset_without_groups(t: &Script) {
    t.ok("reset", t.device(device::VF0).device.hot_reset(&[]));
}

fn hot_reset_with_files_that_are_no_groups(t: &Script) {
    let ready = t.device(device::VF0);
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    t.ok("pipe", ready.device.hot_reset(&[pipe.as_fd()]));
    t.ok("device", ready.device.hot_reset(&[ready.device.as_fd()]));
    t.ok("container", ready.device.hot_reset(&[ready.container.as_fd()]));
    let closed = [16, 0, 1, 200].map(Field::U32);
    t.fields("closed", &ready.device, request::DEVICE_PCI_HOT_RESET, &closed);
    let many = vec![ready.group.as_fd(); 20];
    t.ok("more groups than devices", ready.device.hot_reset(&many));
}

fn hot_reset_of_devices_of_others(t: &Script) {
    let ready = t.device(device::VF0);
    t.ok("its group alone", ready.device.hot_reset(&[ready.group.as_fd()]));
    let other = t.group(device::EDU0);
    t.ok("another group", ready.device.hot_reset(&[other.as_fd()]));
    t.ok("twice the same", ready.device.hot_reset(&[ready.group.as_fd(); 2]));
}
