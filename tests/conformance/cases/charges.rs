//! Who is charged for what an iommufd pins.

use crate::agent::Agent;
use crate::script::{PAGE, Script, device, memory};
use std::os::fd::AsFd;
use vfio_broker::kernel::{IoasCopy, MapFlags};

super::cases![
    nothing_is_charged_before_a_device_is_attached,
    a_user_has_one_limit,
    each_process_has_its_own_limit,
    the_charge_goes_with_the_device,
    the_charge_is_given_back,
    the_charge_of_a_dead_process,
    a_copy_costs_nothing,
    a_page_costs_once_a_mapping,
    two_page_tables_cost_once,
    root_is_not_charged,
];

/// An agent that may lock 16 pages and has the iommufd.
fn agent(iommufd: impl AsFd) -> Agent {
    let agent = Agent::unprivileged(16 * PAGE);
    agent.ask("take-iommufd", &[iommufd.as_fd()]);
    agent
}

fn nothing_is_charged_before_a_device_is_attached(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let agent = agent(&iommufd);
    t.note("64 pages", agent.ask(&format!("ioas-map {ioas} 0 64"), &[]));
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.note("unmap", agent.ask(&format!("ioas-unmap-all {ioas}"), &[]));
    t.note("16 pages", agent.ask(&format!("ioas-map {ioas} 0 16"), &[]));
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.note("1 page", agent.ask(&format!("ioas-map {ioas} 16 1"), &[]));
}

fn a_user_has_one_limit(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let (first, second) = (agent(&iommufd), agent(&iommufd));
    t.note("first, 17 pages", first.ask(&format!("ioas-map {ioas} 0 17"), &[]));
    t.note("first, 10 pages", first.ask(&format!("ioas-map {ioas} 0 10"), &[]));
    t.note("second, 7 pages", second.ask(&format!("ioas-map {ioas} 32 7"), &[]));
    t.note("second, 6 pages", second.ask(&format!("ioas-map {ioas} 32 6"), &[]));
    t.note("first, 1 page", first.ask(&format!("ioas-map {ioas} 64 1"), &[]));
    let (other, space, _device) = t.attached_ioas(device::EDU1);
    let third = agent(&other);
    t.note("another iommufd", third.ask(&format!("ioas-map {space} 0 1"), &[]));
}

fn each_process_has_its_own_limit(t: &Script) {
    let iommufd = t.iommufd();
    t.ok("mode", iommufd.set_rlimit_mode(true));
    let ioas = iommufd.ioas_alloc().unwrap();
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas));
    let (first, second) = (agent(&iommufd), agent(&iommufd));
    t.note("first, 17 pages", first.ask(&format!("ioas-map {ioas} 0 17"), &[]));
    t.note("first, 16 pages", first.ask(&format!("ioas-map {ioas} 0 16"), &[]));
    t.note("second, 16 pages", second.ask(&format!("ioas-map {ioas} 32 16"), &[]));
    t.note("first, 1 page", first.ask(&format!("ioas-map {ioas} 64 1"), &[]));
    t.note("second, 1 page", second.ask(&format!("ioas-map {ioas} 64 1"), &[]));
    first.kill();
    t.value("unmap the first's", iommufd.ioas_unmap(ioas, 0, 16 * PAGE));
}

fn the_charge_goes_with_the_device(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    let agent = agent(&iommufd);
    t.note("16 pages", agent.ask(&format!("ioas-map {ioas} 0 16"), &[]));
    t.note("1 page", agent.ask(&format!("ioas-map {ioas} 16 1"), &[]));
    t.ok("detach", device.detach_iommufd_pt());
    t.note("1 page", agent.ask(&format!("ioas-map {ioas} 16 1"), &[]));
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap(ioas, 16 * PAGE, PAGE));
    t.value("attach", device.attach_iommufd_pt(ioas));
}

fn the_charge_is_given_back(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    let agent = agent(&iommufd);
    let map = || agent.ask(&format!("ioas-map {ioas} 0 16"), &[]);
    t.note("16 pages", map());
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
    t.note("16 pages", map());
    drop(device);
    t.ok("destroy", iommufd.destroy(ioas));
    drop(iommufd);
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    agent.ask("take-iommufd", &[iommufd.as_fd()]);
    t.note("16 pages", agent.ask(&format!("ioas-map {ioas} 0 16"), &[]));
}

fn the_charge_of_a_dead_process(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let (first, second) = (agent(&iommufd), agent(&iommufd));
    t.note("first, 16 pages", first.ask(&format!("ioas-map {ioas} 0 16"), &[]));
    first.kill();
    // The user is charged until somebody unmaps it.
    t.note("second, 1 page", second.ask(&format!("ioas-map {ioas} 32 1"), &[]));
    t.note("second unmaps", second.ask(&format!("ioas-unmap-all {ioas}"), &[]));
    t.note("second, 16 pages", second.ask(&format!("ioas-map {ioas} 32 16"), &[]));
}

fn a_copy_costs_nothing(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let agent = agent(&iommufd);
    t.note("16 pages", agent.ask(&format!("ioas-map {ioas} 0 16"), &[]));
    let flags = MapFlags::FIXED_IOVA | MapFlags::READ;
    let copy =
        |to_iova| IoasCopy { flags, to: ioas, from: ioas, size: 16 * PAGE, to_iova, from_iova: 0 };
    t.value("copy", iommufd.ioas_copy(&copy(64 * PAGE)));
    t.value("unmap the first", iommufd.ioas_unmap(ioas, 0, 16 * PAGE));
    t.note("1 page", agent.ask(&format!("ioas-map {ioas} 32 1"), &[]));
    t.value("unmap the copy", iommufd.ioas_unmap(ioas, 64 * PAGE, 16 * PAGE));
    t.note("16 pages", agent.ask(&format!("ioas-map {ioas} 0 16"), &[]));
}

fn a_page_costs_once_a_mapping(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let agent = agent(&iommufd);
    for page in [0, 16, 32] {
        t.note("8 pages", agent.ask(&format!("ioas-map {ioas} {page} 8"), &[]));
    }
}

fn two_page_tables_cost_once(t: &Script) {
    let (iommufd, first, _device) = t.attached_ioas(device::EDU0);
    let second = iommufd.ioas_alloc().unwrap();
    let other = t.bound(device::EDU1, &iommufd);
    t.value("attach", other.attach_iommufd_pt(second));
    let agent = agent(&iommufd);
    t.note("16 pages", agent.ask(&format!("ioas-map {first} 0 16"), &[]));
    let flags = MapFlags::FIXED_IOVA | MapFlags::READ | MapFlags::WRITE;
    let copy =
        IoasCopy { flags, to: second, from: first, size: 16 * PAGE, to_iova: 0, from_iova: 0 };
    t.value("copy", iommufd.ioas_copy(&copy));
    t.value("unmap", iommufd.ioas_unmap_all(first));
    t.note("1 page", agent.ask(&format!("ioas-map {first} 0 1"), &[]));
    drop(other);
    t.note("16 pages", agent.ask(&format!("ioas-map {first} 0 16"), &[]));
}

fn root_is_not_charged(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let memory = memory(4096);
    t.ioas_map("16 MiB", &iommufd, ioas, (memory.vaddr(), 0, 4096 * PAGE));
    let agent = agent(&iommufd);
    t.note("16 pages", agent.ask(&format!("ioas-map {ioas} 8192 16"), &[]));
}
