//! Iommufds themselves: opening, objects, options, and how their calls are read.

use crate::agent::Agent;
use crate::script::{Field, PAGE, Script, device, memory, u32_at, u64_at};
use std::os::fd::AsFd;
use vfio_broker::kernel::{Arg, Iommufd, request};

super::cases![
    opens,
    nodes_of_others,
    numbers_of_objects,
    destroy,
    destroy_of_what_is_used,
    destroy_takes_the_mappings,
    unknown_calls,
    calls_of_others,
    pointers_to_nowhere,
    sizes_too_small,
    sizes_too_large,
    tails,
    unknown_flags,
    options_that_are_none,
    rlimit_mode,
    rlimit_mode_of_one_in_use,
    rlimit_mode_wants_a_right,
    huge_pages,
    huge_pages_of_one_in_use,
    the_last_close_ends_all,
    another_process_has_it,
];

fn opens(t: &Script) {
    let first = t.ok("open", Iommufd::open(t.kernel()));
    let second = t.ok("open", Iommufd::open(t.kernel()));
    for iommufd in first.iter().chain(&second) {
        t.value("ioas", iommufd.ioas_alloc());
    }
}

fn nodes_of_others(t: &Script) {
    let agent = Agent::unprivileged(0);
    t.note("iommufd", agent.ask("open-iommufd", &[]));
    let number = t.cdev_number(device::EDU0).unwrap();
    t.note("cdev", agent.ask(&format!("open-cdev {number}"), &[]));
    t.note("no such cdev", agent.ask("open-cdev 9999", &[]));
}

fn numbers_of_objects(t: &Script) {
    let iommufd = t.iommufd();
    for _ in 0..4 {
        t.value("ioas", iommufd.ioas_alloc());
    }
    t.ok("destroy 2", iommufd.destroy(2));
    t.ok("destroy 4", iommufd.destroy(4));
    for _ in 0..3 {
        t.value("ioas", iommufd.ioas_alloc());
    }
    t.ok("destroy 1", iommufd.destroy(1));
    let device = t.cdev(device::EDU0);
    t.value("device", device.bind_iommufd(&iommufd));
    t.value("page table", device.attach_iommufd_pt(2));
    t.value("ioas", iommufd.ioas_alloc());
}

fn destroy(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    t.ok("one", iommufd.destroy(ioas));
    t.ok("twice", iommufd.destroy(ioas));
    t.ok("none", iommufd.destroy(0));
    t.ok("any", iommufd.destroy(u32::MAX));
}

fn destroy_of_what_is_used(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    for id in 1..5 {
        t.ok(&format!("attached, {id}"), iommufd.destroy(id));
    }
    t.ok("detach", device.detach_iommufd_pt());
    for id in [3, 2, 1] {
        t.ok(&format!("detached, {id}"), iommufd.destroy(id));
    }
    drop(device);
    t.ok("closed, 2", iommufd.destroy(2));
    t.ok("closed, 1", iommufd.destroy(ioas));
}

fn destroy_takes_the_mappings(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(4);
    t.ioas_map("map", &iommufd, ioas, (memory.vaddr(), 0, PAGE));
    t.ok("destroy", iommufd.destroy(ioas));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
    t.value("ioas", iommufd.ioas_alloc());
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
}

fn unknown_calls(t: &Script) {
    let (iommufd, _) = t.ioas();
    for arg in [Arg::Value(0), Arg::BadPointer] {
        t.ioctl("unknown", &iommufd, request::IOMMU_UNKNOWN, arg);
    }
    t.fields("unknown", &iommufd, request::IOMMU_UNKNOWN, &[Field::U32(8), Field::U32(0)]);
}

fn calls_of_others(t: &Script) {
    let (iommufd, _) = t.ioas();
    let container = t.container();
    let fields = [Field::U32(12), Field::U32(0), Field::U32(0)];
    t.fields("ioas of a container", &container, request::IOAS_ALLOC, &fields);
    let device = t.bound(device::EDU0, &iommufd);
    t.fields("ioas of a device", &device, request::IOAS_ALLOC, &fields);
    t.fields("status of an iommufd", &iommufd, request::GROUP_GET_STATUS, &fields);
}

fn pointers_to_nowhere(t: &Script) {
    let (iommufd, _) = t.ioas();
    for request in [
        request::IOMMU_DESTROY,
        request::IOMMU_OPTION,
        request::IOAS_ALLOC,
        request::IOAS_IOVA_RANGES,
        request::IOAS_ALLOW_IOVAS,
        request::IOAS_MAP,
        request::IOAS_COPY,
        request::IOAS_UNMAP,
        request::IOAS_MAP_FILE,
        request::IOAS_CHANGE_PROCESS,
    ] {
        t.ioctl(request.name, &iommufd, request, Arg::BadPointer);
    }
}

fn sizes_too_small(t: &Script) {
    let (iommufd, _) = t.ioas();
    for (request, whole) in [
        (request::IOMMU_DESTROY, 8),
        (request::IOMMU_OPTION, 24),
        (request::IOAS_ALLOC, 12),
        (request::IOAS_IOVA_RANGES, 32),
        (request::IOAS_ALLOW_IOVAS, 24),
        (request::IOAS_MAP, 40),
        (request::IOAS_COPY, 40),
        (request::IOAS_UNMAP, 24),
        (request::IOAS_MAP_FILE, 40),
        (request::IOAS_CHANGE_PROCESS, 8),
    ] {
        for size in [0, 4, whole - 1] {
            let mut bytes = vec![0; 40];
            bytes[..4].copy_from_slice(&u32::to_ne_bytes(size));
            let arg = Arg::Struct { bytes: &mut bytes, fds: &[], out: None };
            t.ioctl(&format!("{}, {size}", request.name), &iommufd, request, arg);
        }
    }
}

fn sizes_too_large(t: &Script) {
    let iommufd = t.iommufd();
    let zeros = [Field::U32(64), Field::U32(0), Field::U32(0), Field::U64(0), Field::U64(0)];
    let bytes = t.fields("zeros behind it", &iommufd, request::IOAS_ALLOC, &zeros);
    t.note("ioas", u32_at(&bytes, 8));
    let more = [Field::U32(16), Field::U32(0), Field::U32(0), Field::U32(1)];
    t.fields("something behind it", &iommufd, request::IOAS_ALLOC, &more);
    let short = [Field::U32(12), Field::U32(0), Field::U32(0), Field::U32(1)];
    t.fields("something behind its size", &iommufd, request::IOAS_ALLOC, &short);
    let ids = [Field::U32(12), Field::U32(1), Field::U32(9)];
    t.fields("destroy", &iommufd, request::IOMMU_DESTROY, &ids);
    t.ok("destroy", iommufd.destroy(1));
}

fn tails(t: &Script) {
    let iommufd = t.iommufd();
    // The tail is looked at before anything else.
    let fields = [Field::U32(20), Field::U32(7), Field::U32(0), Field::U64(1)];
    t.fields("flags and a tail", &iommufd, request::IOAS_ALLOC, &fields);
    t.fields("no object and a tail", &iommufd, request::IOMMU_DESTROY, &fields);
}

fn unknown_flags(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let alloc = [Field::U32(12), Field::U32(1), Field::U32(0)];
    t.fields("alloc", &iommufd, request::IOAS_ALLOC, &alloc);
    let ranges = [
        Field::U32(32),
        Field::U32(77),
        Field::U32(0),
        Field::U32(1),
        Field::U64(0),
        Field::U64(0),
    ];
    t.fields("ranges, reserved field", &iommufd, request::IOAS_IOVA_RANGES, &ranges);
    let allow = [Field::U32(24), Field::U32(77), Field::U32(0), Field::U32(1), Field::U64(0)];
    t.fields("allow, reserved field", &iommufd, request::IOAS_ALLOW_IOVAS, &allow);
    let map = |flags, ioas, reserved| {
        [
            Field::U32(40),
            Field::U32(flags),
            Field::U32(ioas),
            Field::U32(reserved),
            Field::U64(0),
            Field::U64(0),
            Field::U64(0),
        ]
    };
    t.fields("map, flags", &iommufd, request::IOAS_MAP, &map(0x17, 77, 0));
    t.fields("map, reserved field", &iommufd, request::IOAS_MAP, &map(7, 77, 1));
    t.fields("map, no flags", &iommufd, request::IOAS_MAP, &map(0, 77, 0));
    t.fields("map, fixed alone", &iommufd, request::IOAS_MAP, &map(1, 77, 0));
    t.fields("copy, flags", &iommufd, request::IOAS_COPY, &map(0x17, 77, 77));
    t.fields("copy, no flags", &iommufd, request::IOAS_COPY, &map(0, 77, 77));
    t.value("ranges", iommufd.ioas_iova_ranges(ioas));
}

/// `struct iommu_option`.
fn option(t: &Script, what: &str, iommufd: &Iommufd, fields: (u32, u16, u16, u32, u64)) {
    let (id, op, reserved, object, value) = fields;
    let fields = [
        Field::U32(24),
        Field::U32(id),
        Field::U16(op),
        Field::U16(reserved),
        Field::U32(object),
        Field::U64(value),
    ];
    let bytes = t.fields(what, iommufd, request::IOMMU_OPTION, &fields);
    t.note("value", u64_at(&bytes, 16));
}

fn options_that_are_none(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    option(t, "no such option", &iommufd, (2, 0, 0, 0, 0));
    option(t, "no such operation", &iommufd, (0, 2, 0, 0, 0));
    option(t, "reserved field", &iommufd, (0, 1, 1, 0, 0));
    option(t, "rlimit mode of an object", &iommufd, (0, 1, 0, ioas, 0));
    option(t, "huge pages of no object", &iommufd, (1, 1, 0, 0, 0));
    option(t, "no such operation", &iommufd, (1, 2, 0, ioas, 0));
    option(t, "no such value", &iommufd, (1, 0, 0, ioas, 2));
}

fn rlimit_mode(t: &Script) {
    let iommufd = t.iommufd();
    t.value("at first", iommufd.rlimit_mode());
    t.ok("set", iommufd.set_rlimit_mode(true));
    t.value("then", iommufd.rlimit_mode());
    t.ok("set back", iommufd.set_rlimit_mode(false));
    t.value("then", iommufd.rlimit_mode());
    option(t, "no such value", &iommufd, (0, 0, 0, 0, 2));
    t.value("then", iommufd.rlimit_mode());
}

fn rlimit_mode_of_one_in_use(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    t.ok("with an ioas", iommufd.set_rlimit_mode(true));
    option(t, "no such value", &iommufd, (0, 0, 0, 0, 2));
    t.ok("destroy", iommufd.destroy(ioas));
    let device = t.bound(device::EDU0, &iommufd);
    t.ok("with a device", iommufd.set_rlimit_mode(true));
    t.value("ask", iommufd.rlimit_mode());
    drop(device);
    t.ok("empty again", iommufd.set_rlimit_mode(true));
    t.value("ask", iommufd.rlimit_mode());
}

fn rlimit_mode_wants_a_right(t: &Script) {
    let iommufd = t.iommufd();
    let agent = Agent::unprivileged(PAGE);
    agent.ask("take-iommufd", &[iommufd.as_fd()]);
    t.note("agent", agent.ask("rlimit-mode", &[]));
    t.value("ioas", iommufd.ioas_alloc());
    t.note("agent, in use", agent.ask("rlimit-mode", &[]));
}

fn huge_pages(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    option(t, "at first", &iommufd, (1, 1, 0, ioas, 7));
    t.value("ranges", iommufd.ioas_iova_ranges(ioas));
    option(t, "off", &iommufd, (1, 0, 0, ioas, 0));
    option(t, "off again", &iommufd, (1, 0, 0, ioas, 0));
    option(t, "then", &iommufd, (1, 1, 0, ioas, 7));
    t.value("ranges", iommufd.ioas_iova_ranges(ioas));
    let memory = memory(1);
    t.ioas_map("not a whole page", &iommufd, ioas, (memory.vaddr(), 0, 64));
    option(t, "on", &iommufd, (1, 0, 0, ioas, 1));
    t.ioas_map("not a whole page", &iommufd, ioas, (memory.vaddr(), 0, 64));
    option(t, "off", &iommufd, (1, 0, 0, ioas, 0));
}

fn huge_pages_of_one_in_use(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    option(t, "off, attached", &iommufd, (1, 0, 0, ioas, 0));
    option(t, "on", &iommufd, (1, 0, 0, ioas, 1));
    let memory = memory(1);
    t.ioas_map("map", &iommufd, ioas, (memory.vaddr(), 0, PAGE));
    option(t, "off, mapped", &iommufd, (1, 0, 0, ioas, 0));
    t.ok("detach", device.detach_iommufd_pt());
    option(t, "off, detached", &iommufd, (1, 0, 0, ioas, 0));
}

fn the_last_close_ends_all(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    let memory = memory(4);
    t.ioas_map("map", &iommufd, ioas, (memory.vaddr(), 0, PAGE));
    drop(iommufd);
    // The device holds it.
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("ids", device.pci_ids());
    drop(device);
    let group = t.ok("group", vfio_broker::kernel::Group::open(t.kernel(), t.node(device::EDU0)));
    drop(group);
    let (iommufd, _) = t.ioas();
    t.value("a new one", iommufd.ioas_unmap_all(1));
}

fn another_process_has_it(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let agent = Agent::start();
    agent.ask("take-iommufd", &[iommufd.as_fd()]);
    t.note("agent maps", agent.ask(&format!("ioas-map {ioas} 16 4"), &[]));
    let memory = memory(4);
    t.ioas_map("over it", &iommufd, ioas, (memory.vaddr(), 16 * PAGE, PAGE));
    agent.kill();
    t.ioas_map("over it", &iommufd, ioas, (memory.vaddr(), 16 * PAGE, PAGE));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
}
