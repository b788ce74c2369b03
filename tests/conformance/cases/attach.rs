//! Attaching bound devices to address spaces, and what that pins and keeps.

use crate::agent::Agent;
use crate::script::{Field, PAGE, Script, device, memory, u32_at};
use std::os::fd::AsFd;
use vfio_broker::kernel::{Arg, Device, Iommufd, request};

super::cases![
    attach_and_detach,
    attach_to_what_is_none,
    attach_of_odd_structs,
    attach_again,
    attach_to_another,
    attach_to_a_page_table,
    two_devices_in_one,
    two_devices_apart,
    a_group_has_one_page_table,
    a_group_moves_as_one,
    the_second_device_of_a_group_is_not_attached,
    closing_detaches,
    mapped_before_attached,
    a_failed_attach_leaves_nothing,
    a_failed_move_leaves_it_where_it_was,
    what_is_mapped_stays,
    memory_of_a_dead_process,
    memory_of_a_dead_process_that_is_pinned,
    memory_of_another_process,
];

fn attach_and_detach(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let device = t.bound(device::EDU0, &iommufd);
    t.ok("detach", device.detach_iommufd_pt());
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.ok("detach", device.detach_iommufd_pt());
    t.ok("detach", device.detach_iommufd_pt());
    t.value("attach", device.attach_iommufd_pt(ioas));
}

fn attach_to_what_is_none(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let device = t.cdev(device::EDU0);
    let own = device.bind_iommufd(&iommufd).unwrap();
    for id in [0, 77, u32::MAX] {
        t.value(&format!("{id}"), device.attach_iommufd_pt(id));
    }
    t.value("itself", device.attach_iommufd_pt(own));
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("itself, attached", device.attach_iommufd_pt(own));
    t.value("none, attached", device.attach_iommufd_pt(77));
    t.value("attached", iommufd.ioas_iova_ranges(ioas));
}

fn attach_of_odd_structs(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let device = t.bound(device::EDU0, &iommufd);
    let attach = request::DEVICE_ATTACH_IOMMUFD_PT;
    let detach = request::DEVICE_DETACH_IOMMUFD_PT;
    for size in [0, 8, 11, 12, 64] {
        let fields = [Field::U32(size), Field::U32(0), Field::U32(ioas), Field::U32(9)];
        let bytes = t.fields(&format!("attach, {size} bytes"), &device, attach, &fields);
        t.note("id", u32_at(&bytes, 8));
    }
    for size in [0, 7, 8, 64] {
        let fields = [Field::U32(size), Field::U32(0), Field::U32(9)];
        t.fields(&format!("detach, {size} bytes"), &device, detach, &fields);
    }
    for flags in [2, 1 << 31] {
        let fields = [Field::U32(12), Field::U32(flags), Field::U32(ioas)];
        t.fields(&format!("attach, flags {flags:#x}"), &device, attach, &fields);
        t.fields(&format!("detach, flags {flags:#x}"), &device, detach, &fields);
    }
    t.ioctl("attach, nowhere", &device, attach, Arg::BadPointer);
    t.ioctl("detach, nowhere", &device, detach, Arg::BadPointer);
}

fn attach_again(t: &Script) {
    let (_iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    t.value("again", device.attach_iommufd_pt(ioas));
    t.value("again", device.attach_iommufd_pt(ioas));
    t.ok("detach", device.detach_iommufd_pt());
}

fn attach_to_another(t: &Script) {
    let (iommufd, first, device) = t.attached_ioas(device::EDU0);
    let second = iommufd.ioas_alloc().unwrap();
    t.value("another", device.attach_iommufd_pt(second));
    t.ok("destroy the first", iommufd.destroy(first));
    t.ok("destroy the second", iommufd.destroy(second));
    t.value("the first", device.attach_iommufd_pt(first));
    t.value("ranges", iommufd.ioas_iova_ranges(second));
    t.value("objects", iommufd.ioas_alloc());
}

fn attach_to_a_page_table(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let (one, other) = (t.bound(device::EDU0, &iommufd), t.bound(device::EDU1, &iommufd));
    let table = t.ok("attach", one.attach_iommufd_pt(ioas)).unwrap_or_default();
    t.note("table", table);
    t.value("the other", other.attach_iommufd_pt(table));
    t.ok("destroy", iommufd.destroy(table));
    t.ok("detach", one.detach_iommufd_pt());
    t.ok("destroy", iommufd.destroy(table));
    t.value("back", one.attach_iommufd_pt(table));
    t.ok("detach", one.detach_iommufd_pt());
    t.ok("detach", other.detach_iommufd_pt());
    t.value("gone", one.attach_iommufd_pt(table));
}

fn two_devices_in_one(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let (one, other) = (t.bound(device::EDU0, &iommufd), t.bound(device::EDU1, &iommufd));
    t.value("one", one.attach_iommufd_pt(ioas));
    t.value("the other", other.attach_iommufd_pt(ioas));
    let memory = memory(4);
    t.ioas_map("map", &iommufd, ioas, (memory.vaddr(), 0, 4 * PAGE));
    drop(one);
    t.ok("destroy", iommufd.destroy(ioas));
    drop(other);
    t.ok("destroy", iommufd.destroy(ioas));
}

fn two_devices_apart(t: &Script) {
    let (iommufd, first) = t.ioas();
    let second = iommufd.ioas_alloc().unwrap();
    let (one, other) = (t.bound(device::EDU0, &iommufd), t.bound(device::EDU1, &iommufd));
    t.value("one", one.attach_iommufd_pt(first));
    t.value("the other", other.attach_iommufd_pt(second));
    let memory = memory(4);
    t.ioas_map("map", &iommufd, first, (memory.vaddr(), 0, PAGE));
    t.ioas_map("map", &iommufd, second, (memory.vaddr(), 0, PAGE));
    t.value("together", one.attach_iommufd_pt(second));
    t.ok("destroy", iommufd.destroy(first));
}

/// Both devices of one group, bound.
fn pair(t: &Script, iommufd: &Iommufd) -> (Device, Device) {
    (t.bound(device::PAIR0, iommufd), t.bound(device::PAIR1, iommufd))
}

fn a_group_has_one_page_table(t: &Script) {
    let (iommufd, first) = t.ioas();
    let second = iommufd.ioas_alloc().unwrap();
    let (one, other) = pair(t, &iommufd);
    t.value("one", one.attach_iommufd_pt(first));
    t.value("the other, elsewhere", other.attach_iommufd_pt(second));
    t.value("objects", iommufd.ioas_alloc());
    t.value("the other, there", other.attach_iommufd_pt(first));
    t.ok("one goes", one.detach_iommufd_pt());
    t.value("one, elsewhere", one.attach_iommufd_pt(second));
    t.ok("the other goes", other.detach_iommufd_pt());
    t.value("one, elsewhere", one.attach_iommufd_pt(second));
}

fn a_group_moves_as_one(t: &Script) {
    let (iommufd, first) = t.ioas();
    let second = iommufd.ioas_alloc().unwrap();
    let (one, other) = pair(t, &iommufd);
    t.value("one", one.attach_iommufd_pt(first));
    t.value("the other", other.attach_iommufd_pt(first));
    t.value("one moves", one.attach_iommufd_pt(second));
    t.ok("destroy the first", iommufd.destroy(first));
    t.value("the other moves", other.attach_iommufd_pt(second));
    t.ok("one goes", one.detach_iommufd_pt());
    t.ok("destroy the second", iommufd.destroy(second));
    t.ok("the other goes", other.detach_iommufd_pt());
    t.ok("destroy the second", iommufd.destroy(second));
}

fn the_second_device_of_a_group_is_not_attached(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let (one, other) = pair(t, &iommufd);
    t.value("one", one.attach_iommufd_pt(ioas));
    t.ok("the other goes", other.detach_iommufd_pt());
    t.ok("destroy", iommufd.destroy(ioas));
    drop(one);
    t.ok("destroy", iommufd.destroy(ioas));
    t.value("ids", other.pci_ids());
}

fn closing_detaches(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    drop(device);
    t.value("ranges", iommufd.ioas_iova_ranges(ioas));
    t.ok("destroy", iommufd.destroy(ioas));
    t.value("objects", iommufd.ioas_alloc());
}

fn mapped_before_attached(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(4);
    t.ioas_map("map", &iommufd, ioas, (memory.vaddr(), 0, 4 * PAGE));
    t.ioas_map("map", &iommufd, ioas, (memory.vaddr(), 0xfee0_0000, PAGE));
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap(ioas, 0xfee0_0000, PAGE));
    t.ioas_map("map", &iommufd, ioas, (memory.vaddr(), 1 << 60, PAGE));
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap(ioas, 1 << 60, PAGE));
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
}

fn a_failed_attach_leaves_nothing(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let device = t.bound(device::EDU0, &iommufd);
    t.ioas_map("no memory", &iommufd, ioas, (8 * PAGE, 0, PAGE));
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("ranges", iommufd.ioas_iova_ranges(ioas));
    t.value("next object", iommufd.ioas_alloc());
    t.ok("destroy", iommufd.destroy(ioas));
    t.ok("detach", device.detach_iommufd_pt());
}

fn a_failed_move_leaves_it_where_it_was(t: &Script) {
    let (iommufd, first, device) = t.attached_ioas(device::EDU0);
    let second = iommufd.ioas_alloc().unwrap();
    t.ioas_map("no memory", &iommufd, second, (8 * PAGE, 0, PAGE));
    t.value("move", device.attach_iommufd_pt(second));
    t.ok("destroy the first", iommufd.destroy(first));
    t.value("unmap", iommufd.ioas_unmap_all(second));
    let memory = memory(1);
    t.ioas_map("in the way", &iommufd, second, (memory.vaddr(), 0xfee0_0000, PAGE));
    t.value("move", device.attach_iommufd_pt(second));
    t.ok("destroy the first", iommufd.destroy(first));
    t.ok("destroy the second", iommufd.destroy(second));
}

fn what_is_mapped_stays(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    let memory = memory(4);
    t.ioas_map("map", &iommufd, ioas, (memory.vaddr(), 0, 4 * PAGE));
    t.ok("detach", device.detach_iommufd_pt());
    t.value("attach", device.attach_iommufd_pt(ioas));
    drop(device);
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
}

fn memory_of_a_dead_process(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let agent = Agent::start();
    agent.ask("take-iommufd", &[iommufd.as_fd()]);
    t.note("agent maps", agent.ask(&format!("ioas-map {ioas} 0 4"), &[]));
    agent.kill();
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
    t.value("attach", device.attach_iommufd_pt(ioas));
}

fn memory_of_a_dead_process_that_is_pinned(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    let agent = Agent::start();
    agent.ask("take-iommufd", &[iommufd.as_fd()]);
    t.note("agent maps", agent.ask(&format!("ioas-map {ioas} 0 4"), &[]));
    agent.kill();
    let other = t.bound(device::EDU1, &iommufd);
    t.value("another device", other.attach_iommufd_pt(ioas));
    t.ok("detach", other.detach_iommufd_pt());
    t.ok("detach", device.detach_iommufd_pt());
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
}

fn memory_of_another_process(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let agent = Agent::unprivileged(4 * PAGE);
    agent.ask("take-iommufd", &[iommufd.as_fd()]);
    t.note("agent maps", agent.ask(&format!("ioas-map {ioas} 0 4"), &[]));
    t.note("agent maps", agent.ask(&format!("ioas-map {ioas} 16 1"), &[]));
    let device = t.bound(device::EDU0, &iommufd);
    // Pinned only now, and charged to the agent.
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap(ioas, 16 * PAGE, PAGE));
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.note("agent maps", agent.ask(&format!("ioas-map {ioas} 16 1"), &[]));
    t.note("agent unmaps", agent.ask(&format!("ioas-unmap-all {ioas}"), &[]));
}
