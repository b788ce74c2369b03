//! Devices on vfio-pci: what they say of themselves, and configuration space.

use crate::script::{DEVICE_FEATURE, Field, Ready, Script, device};
use vfio_broker::kernel::{Arg, Error, PCI_CONFIG_REGION, request};

super::cases![
    info,
    info_is_at_least_sixteen_bytes,
    bad_pointers,
    unknown_ioctl,
    requests_of_others,
    ids,
    config_ends,
    config_of_a_device_without_express,
    config_in_parts,
    ids_cannot_be_written,
    command_can_be_written,
    a_bar_tells_its_size,
    features_without_a_pf,
    features_with_wrong_flags,
    a_close_forgets,
];

fn info(t: &Script) {
    for bdf in [device::E1000E, device::EDU0, device::PAIR1, device::VF0] {
        t.value(bdf, t.device(bdf).device.info());
    }
}

fn info_is_at_least_sixteen_bytes(t: &Script) {
    let ready = t.device(device::EDU0);
    for argsz in [0, 8, 15, 16, 20, 24, 32] {
        let mut fields = vec![Field::U32(argsz)];
        fields.extend([Field::U32(0x5a5a_5a5a); 7]);
        let what = format!("argsz {argsz}");
        let bytes = t.fields(&what, &ready.device, request::DEVICE_GET_INFO, &fields);
        t.note("bytes", bytes);
    }
}

fn bad_pointers(t: &Script) {
    let ready = t.device(device::EDU0);
    for request in [
        request::DEVICE_GET_INFO,
        request::DEVICE_GET_REGION_INFO,
        request::DEVICE_GET_IRQ_INFO,
        request::DEVICE_SET_IRQS,
        request::DEVICE_GET_PCI_HOT_RESET_INFO,
        request::DEVICE_PCI_HOT_RESET,
        DEVICE_FEATURE,
    ] {
        t.ioctl(request.name, &ready.device, request, Arg::BadPointer);
    }
}

fn unknown_ioctl(t: &Script) {
    let ready = t.device(device::EDU0);
    t.ioctl("unknown", &ready.device, request::UNKNOWN, Arg::Value(0));
}

fn requests_of_others(t: &Script) {
    let ready = t.device(device::EDU0);
    for request in [
        request::GET_API_VERSION,
        request::SET_IOMMU,
        request::GROUP_GET_STATUS,
        request::GROUP_GET_DEVICE_FD,
        request::IOMMU_UNMAP_DMA,
    ] {
        t.ioctl(request.name, &ready.device, request, Arg::Value(0));
    }
}

fn ids(t: &Script) {
    for bdf in [device::E1000E, device::EDU0, device::VF0] {
        t.value(bdf, t.device(bdf).device.pci_ids());
    }
}

/// Reads configuration space and writes it down.
fn read(t: &Script, ready: &Ready, what: &str, at: u64, len: usize) {
    let Ok(config) = ready.device.region(PCI_CONFIG_REGION) else { return };
    let mut buf = vec![0x5a; len];
    t.value(what, ready.device.read_at(&mut buf, config.offset + at));
}

fn config_ends(t: &Script) {
    let ready = t.device(device::E1000E);
    read(t, &ready, "the last four bytes", 4092, 4);
    read(t, &ready, "over the end", 4092, 8);
    read(t, &ready, "at the end", 4096, 1);
    read(t, &ready, "far behind it", 1 << 30, 4);
    read(t, &ready, "all of it", 0, 4096);
    read(t, &ready, "nothing at the start", 0, 0);
    read(t, &ready, "nothing behind the end", 1 << 30, 0);
}

fn config_of_a_device_without_express(t: &Script) {
    let ready = t.device(device::EDU0);
    read(t, &ready, "the last four bytes", 252, 4);
    read(t, &ready, "over the end", 252, 8);
    read(t, &ready, "at the end", 256, 4);
    read(t, &ready, "all of it", 0, 256);
}

fn config_in_parts(t: &Script) {
    let ready = t.device(device::EDU0);
    let Ok(config) = ready.device.region(PCI_CONFIG_REGION) else { return };
    for (at, len) in [(0, 1), (1, 1), (1, 3), (0, 3), (2, 4), (8, 4), (0x2c, 4)] {
        let mut buf = vec![0; len];
        let read = ready.device.read_at(&mut buf, config.offset + at);
        t.value(&format!("{len} bytes at {at}"), read.map(|len| (len, buf)));
    }
}

fn write(t: &Script, ready: &Ready, what: &str, at: u64, bytes: &[u8]) {
    let Ok(config) = ready.device.region(PCI_CONFIG_REGION) else { return };
    t.value(what, ready.device.write_at(bytes, config.offset + at));
    let mut buf = vec![0; bytes.len()];
    let read = ready.device.read_at(&mut buf, config.offset + at);
    t.value("reads", read.map(|_| buf));
}

fn ids_cannot_be_written(t: &Script) {
    let ready = t.device(device::EDU0);
    write(t, &ready, "vendor", 0, &[0, 0]);
    write(t, &ready, "device", 2, &[0, 0]);
    write(t, &ready, "class", 9, &[1, 2, 3]);
}

fn command_can_be_written(t: &Script) {
    let ready = t.device(device::EDU0);
    let Ok(config) = ready.device.region(PCI_CONFIG_REGION) else { return };
    let mut command = [0; 2];
    let read = ready.device.read_at(&mut command, config.offset + 4);
    t.value("at first", read.map(|_| command));
    write(t, &ready, "master", 4, &[0x06, 0]);
    write(t, &ready, "nothing", 4, &[0, 0]);
    write(t, &ready, "memory", 4, &[0x02, 0]);
    write(t, &ready, "interrupts off", 4, &[0x02, 0x04]);
}

fn a_bar_tells_its_size(t: &Script) {
    let ready = t.device(device::EDU0);
    write(t, &ready, "ones", 0x10, &[0xff; 4]);
    write(t, &ready, "ones to no BAR", 0x14, &[0xff; 4]);
    write(t, &ready, "an address", 0x10, &[0, 0, 0x10, 0x12]);
}

fn features_without_a_pf(t: &Script) {
    let ready = t.device(device::EDU0);
    for feature in [0, 100] {
        let fields = [Field::U32(24), Field::U32(1 << 17 | feature), Field::U64(1), Field::U64(2)];
        t.fields(&format!("feature {feature}"), &ready.device, DEVICE_FEATURE, &fields);
    }
}

fn features_with_wrong_flags(t: &Script) {
    let ready = t.device(device::EDU0);
    for (argsz, flags) in [(4, 0), (7, 1 << 17), (8, 1 << 19), (8, 3 << 16), (8, 7 << 16), (8, 0)] {
        let fields = [Field::U32(argsz), Field::U32(flags), Field::U64(1), Field::U64(2)];
        let what = format!("argsz {argsz}, flags {flags:#x}");
        t.fields(&what, &ready.device, DEVICE_FEATURE, &fields);
    }
}

fn a_close_forgets(t: &Script) {
    let ready = t.device(device::E1000E);
    let Ok(config) = ready.device.region(PCI_CONFIG_REGION) else { return };
    let failed = |error: Error| error;
    t.value("write", ready.device.write_at(&[0x06, 0x04], config.offset + 4).map_err(failed));
    drop(ready.device);
    let again = ready.group.device(device::E1000E).unwrap();
    let mut command = [0; 2];
    t.value("read", again.read_at(&mut command, config.offset + 4).map(|_| command));
}
