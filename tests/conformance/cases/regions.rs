//! Regions: what they are, and reading and writing them.

use crate::script::{Field, Ready, Script, device, u32_at, u64_at};
use vfio_broker::kernel::{PCI_CONFIG_REGION, request};

super::cases![
    of_a_network_card,
    of_a_device_without_express,
    of_a_vf,
    indexes_that_are_none,
    argsz_too_small,
    capabilities_that_do_not_fit,
    bar_from_start_to_end,
    bar_that_is_not_there,
    bar_with_memory_off,
    io_ports,
    interrupt_table,
    rom,
    vga,
    offsets_that_are_none,
];

fn all(t: &Script, bdf: &str) {
    let ready = t.device(bdf);
    for index in 0..10 {
        t.value(&format!("region {index}"), ready.device.region(index));
    }
}

fn of_a_network_card(t: &Script) {
    all(t, device::E1000E);
}

fn of_a_device_without_express(t: &Script) {
    all(t, device::EDU0);
}

fn of_a_vf(t: &Script) {
    all(t, device::VF0);
}

fn indexes_that_are_none(t: &Script) {
    let ready = t.device(device::EDU0);
    for index in [9, 10, 100, u32::MAX] {
        t.value(&format!("region {index}"), ready.device.region(index));
    }
}

fn info(t: &Script, ready: &Ready, argsz: u32, index: u32) {
    let mut fields = vec![Field::U32(argsz), Field::U32(0x5a5a_5a5a), Field::U32(index)];
    fields.extend([Field::U32(0x5a5a_5a5a); 13]);
    let what = format!("argsz {argsz}, region {index}");
    let bytes = t.fields(&what, &ready.device, request::DEVICE_GET_REGION_INFO, &fields);
    t.note("argsz, flags", (u32_at(&bytes, 0), u32_at(&bytes, 4)));
    t.note("offset of capabilities", u32_at(&bytes, 12));
    t.note("size, offset", (u64_at(&bytes, 16), u64_at(&bytes, 24)));
    t.note("rest", &bytes[32..]);
}

fn argsz_too_small(t: &Script) {
    let ready = t.device(device::EDU0);
    for argsz in [0, 8, 31, 32, 64] {
        info(t, &ready, argsz, 0);
    }
    info(t, &ready, 8, 100);
}

fn capabilities_that_do_not_fit(t: &Script) {
    let ready = t.device(device::E1000E);
    for argsz in [32, 36, 39, 40, 64] {
        info(t, &ready, argsz, 3);
    }
}

/// Reads from a region and writes down how many bytes came.
fn read(t: &Script, ready: &Ready, what: &str, index: u64, at: u64, len: usize) {
    let mut buf = vec![0; len];
    t.value(what, ready.device.read_at(&mut buf, (index << 40) + at));
}

fn write(t: &Script, ready: &Ready, what: &str, index: u64, at: u64, len: usize) {
    t.value(what, ready.device.write_at(&vec![0; len], (index << 40) + at));
}

fn bar_from_start_to_end(t: &Script) {
    let ready = t.device(device::VF0);
    let size = ready.device.region(0).map_or(0, |region| region.size);
    read(t, &ready, "four bytes", 0, 0, 4);
    read(t, &ready, "the last four", 0, size - 4, 4);
    read(t, &ready, "over the end", 0, size - 4, 8);
    read(t, &ready, "at the end", 0, size, 4);
    read(t, &ready, "far behind it", 0, 1 << 39, 4);
    read(t, &ready, "nothing behind it", 0, 1 << 39, 0);
}

fn bar_that_is_not_there(t: &Script) {
    let ready = t.device(device::EDU0);
    for index in 1..6 {
        read(t, &ready, &format!("read BAR {index}"), index, 0, 4);
        write(t, &ready, &format!("write BAR {index}"), index, 0, 4);
    }
}

fn bar_with_memory_off(t: &Script) {
    let ready = t.device(device::E1000E);
    let Ok(config) = ready.device.region(PCI_CONFIG_REGION) else { return };
    read(t, &ready, "on", 0, 0, 4);
    t.value("switch off", ready.device.write_at(&[0, 0], config.offset + 4));
    read(t, &ready, "read", 0, 0, 4);
    write(t, &ready, "write", 0, 0, 4);
    t.value("switch on", ready.device.write_at(&[2, 0], config.offset + 4));
    read(t, &ready, "on", 0, 0, 4);
}

fn io_ports(t: &Script) {
    let ready = t.device(device::E1000E);
    let Ok(config) = ready.device.region(PCI_CONFIG_REGION) else { return };
    read(t, &ready, "four bytes", 2, 0, 4);
    read(t, &ready, "over the end", 2, 28, 8);
    t.value("switch off", ready.device.write_at(&[0, 0], config.offset + 4));
    read(t, &ready, "four bytes", 2, 0, 4);
}

fn interrupt_table(t: &Script) {
    let ready = t.device(device::E1000E);
    let mut buf = [0; 16];
    let read = ready.device.read_at(&mut buf, 3 << 40);
    t.value("the first vector", read.map(|len| (len, buf)));
    write(t, &ready, "write to it", 3, 0, 16);
    let read = ready.device.read_at(&mut buf, 3 << 40);
    t.value("the first vector", read.map(|len| (len, buf)));
}

fn rom(t: &Script) {
    let ready = t.device(device::E1000E);
    read(t, &ready, "read", 6, 0, 4);
    write(t, &ready, "write", 6, 0, 4);
}

fn vga(t: &Script) {
    let ready = t.device(device::E1000E);
    read(t, &ready, "read", 8, 0xa0000, 4);
    write(t, &ready, "write", 8, 0xa0000, 4);
}

fn offsets_that_are_none(t: &Script) {
    let ready = t.device(device::EDU0);
    for index in [9, 10, 1000] {
        read(t, &ready, &format!("read {index}"), index, 0, 4);
        write(t, &ready, &format!("write {index}"), index, 0, 4);
    }
}
