//! Mappings of files, Linux 6.13 and later: memory that belongs to no process.

use crate::agent::Agent;
use crate::script::{Field, PAGE, Script, device, memory};
use std::os::fd::AsFd;
use vfio_broker::kernel::{IoasMapFile, Iommufd, MapFlags, Mapped, request};

super::cases![
    files,
    files_that_are_none,
    files_that_are_too_short,
    parts_of_files,
    files_overflow,
    files_outlive_their_process,
    another_process_takes_over,
    memory_cannot_be_taken_over,
];

const BOTH: u32 = MapFlags::FIXED_IOVA | MapFlags::READ | MapFlags::WRITE;

fn file(t: &Script, what: &str, to: (&Iommufd, u32), file: impl AsFd, at: (u64, u64, u64)) {
    let (start, iova, size) = at;
    let map = IoasMapFile { flags: BOTH, start, size, iova };
    t.value(what, to.0.ioas_map_file(to.1, file.as_fd(), &map));
}

fn memfd(pages: u64) -> std::os::fd::OwnedFd {
    Mapped::memfd((pages * PAGE) as usize).unwrap().0
}

fn files(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let to = (&iommufd, ioas);
    let four = memfd(4);
    file(t, "all", to, &four, (0, 0, 4 * PAGE));
    file(t, "over it", to, &four, (0, PAGE, PAGE));
    file(t, "again", to, &four, (0, 16 * PAGE, 4 * PAGE));
    drop(four);
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
}

fn files_that_are_none(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let to = (&iommufd, ioas);
    file(t, "an iommufd", to, &iommufd, (0, 0, PAGE));
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    file(t, "a pipe", to, &pipe, (0, 0, PAGE));
    let program = std::fs::File::open("/proc/self/exe").unwrap();
    file(t, "a file on a disk", to, &program, (0, 0, PAGE));
    file(t, "no such ioas", (&iommufd, 77), &pipe, (0, 0, PAGE));
    let fields = |flags: u32| {
        let head = [Field::U32(40), Field::U32(flags), Field::U32(ioas), Field::U32(u32::MAX)];
        [head.as_slice(), &[Field::U64(0), Field::U64(PAGE), Field::U64(0)]].concat()
    };
    t.fields("no file", &iommufd, request::IOAS_MAP_FILE, &fields(BOTH));
    t.fields("no access", &iommufd, request::IOAS_MAP_FILE, &fields(1));
    t.fields("flags", &iommufd, request::IOAS_MAP_FILE, &fields(0x17));
}

fn files_that_are_too_short(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let two = memfd(2);
    let to = (&iommufd, ioas);
    file(t, "too short", to, &two, (0, 0, 3 * PAGE));
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
    t.value("attach", device.attach_iommufd_pt(ioas));
    file(t, "too short", to, &two, (0, 0, 3 * PAGE));
    file(t, "behind its end", to, &two, (2 * PAGE, 0, PAGE));
    file(t, "its end", to, &two, (PAGE, 0, PAGE));
}

fn parts_of_files(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let to = (&iommufd, ioas);
    let four = memfd(4);
    file(t, "not aligned", to, &four, (0x10, 0, 0x20));
    file(t, "nothing", to, &four, (0, PAGE, 0));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
    let map = IoasMapFile { flags: MapFlags::READ, start: PAGE, size: PAGE, iova: 0 };
    t.value("the kernel chooses", iommufd.ioas_map_file(ioas, four.as_fd(), &map));
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas));
    file(t, "not aligned", to, &four, (0x10, 16 * PAGE, PAGE));
}

fn files_overflow(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let to = (&iommufd, ioas);
    let one = memfd(1);
    file(t, "address", to, &one, (0, u64::MAX, PAGE));
    file(t, "length", to, &one, (0, 0, u64::MAX));
    file(t, "their sum", to, &one, (0, u64::MAX - 1, PAGE));
    file(t, "start", to, &one, (u64::MAX - 1, 0, PAGE));
}

fn files_outlive_their_process(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let agent = Agent::unprivileged(4 * PAGE);
    agent.ask("take-iommufd", &[iommufd.as_fd()]);
    t.note("agent maps", agent.ask(&format!("ioas-map-file {ioas} 0 4"), &[]));
    t.note("and more", agent.ask(&format!("ioas-map-file {ioas} 16 1"), &[]));
    agent.kill();
    let device = t.bound(device::EDU0, &iommufd);
    // So does its limit.
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap one", iommufd.ioas_unmap(ioas, 16 * PAGE, PAGE));
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
}

/// `IOMMU_IOAS_CHANGE_PROCESS`, written down.
fn change_process(t: &Script, what: &str, iommufd: &Iommufd) {
    t.fields(what, iommufd, request::IOAS_CHANGE_PROCESS, &[Field::U32(8), Field::U32(0)]);
}

fn another_process_takes_over(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    change_process(t, "of nothing", &iommufd);
    let agent = Agent::unprivileged(16 * PAGE);
    agent.ask("take-iommufd", &[iommufd.as_fd()]);
    t.note("agent maps", agent.ask(&format!("ioas-map-file {ioas} 0 16"), &[]));
    t.note("more", agent.ask(&format!("ioas-map-file {ioas} 16 1"), &[]));
    change_process(t, "take over", &iommufd);
    let fields = [Field::U32(8), Field::U32(1)];
    t.fields("reserved field", &iommufd, request::IOAS_CHANGE_PROCESS, &fields);
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
}

fn memory_cannot_be_taken_over(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(1);
    file(t, "a file", (&iommufd, ioas), memfd(1), (0, 0, PAGE));
    change_process(t, "a file", &iommufd);
    t.ioas_map("memory", &iommufd, ioas, (memory.vaddr(), PAGE, PAGE));
    change_process(t, "both", &iommufd);
}
