//! Address spaces: mapping, unmapping, and which addresses there are.

use crate::script::{Field, PAGE, Script, device, memory, u32_at};
use vfio_broker::kernel::{Arg, IoasMap, Iommufd, IovaRange, MapFlags, request};

super::cases![
    map_and_unmap,
    map_of_no_ioas,
    map_overlaps,
    map_overflows,
    map_of_nothing,
    map_unaligned,
    map_unaligned_and_attached,
    map_where_nothing_can_be,
    map_without_memory,
    map_read_only_memory,
    map_half_of_it_missing,
    the_kernel_chooses,
    the_kernel_chooses_from_what_is_allowed,
    the_kernel_finds_no_room,
    unmap_nothing,
    unmap_part,
    unmap_several,
    unmap_several_and_a_part,
    unmap_overflows,
    unmap_all,
    unmap_of_no_ioas,
    ranges,
    ranges_without_room,
    ranges_to_nowhere,
    ranges_of_no_ioas,
    allow,
    allow_what_is_reserved,
    allow_nonsense,
    allowed_before_attached,
    spaces_are_apart,
];

const ANY: u64 = 0x7700_0000;

/// `IOMMU_IOAS_MAP`, written down.
fn map(t: &Script, what: &str, iommufd: &Iommufd, ioas: u32, flags: u32, at: (u64, u64, u64)) {
    let (vaddr, iova, size) = at;
    t.value(what, iommufd.ioas_map(ioas, &IoasMap { flags, vaddr, size, iova }));
}

const FIXED: u32 = MapFlags::FIXED_IOVA;
const READ: u32 = MapFlags::READ;
const WRITE: u32 = MapFlags::WRITE;

fn map_and_unmap(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(8);
    for (what, flags) in [("both", READ | WRITE), ("read", READ), ("write", WRITE)] {
        map(t, what, &iommufd, ioas, FIXED | flags, (memory.vaddr(), 0, 8 * PAGE));
        t.value("unmap", iommufd.ioas_unmap(ioas, 0, 8 * PAGE));
        t.value("again", iommufd.ioas_unmap(ioas, 0, 8 * PAGE));
    }
}

fn map_of_no_ioas(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let device = t.bound(device::EDU0, &iommufd);
    let memory = memory(1);
    for id in [0, ioas + 1, 77] {
        t.ioas_map(&format!("in {id}"), &iommufd, id, (memory.vaddr(), 0, PAGE));
    }
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.ioas_map("in a page table", &iommufd, 3, (memory.vaddr(), 0, PAGE));
}

fn map_overlaps(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(16);
    let at = |page: u64, pages: u64| (memory.vaddr(), page * PAGE, pages * PAGE);
    t.ioas_map("first", &iommufd, ioas, at(4, 4));
    for (what, place) in [
        ("the same", at(4, 4)),
        ("its start", at(3, 2)),
        ("its end", at(7, 2)),
        ("inside", at(5, 1)),
        ("around", at(0, 16)),
        ("before it", at(3, 1)),
        ("behind it", at(8, 1)),
    ] {
        t.ioas_map(what, &iommufd, ioas, place);
    }
    t.value("all", iommufd.ioas_unmap_all(ioas));
}

fn map_overflows(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(1);
    let top = u64::MAX - PAGE + 1;
    let here = memory.vaddr();
    t.ioas_map("address", &iommufd, ioas, (here, u64::MAX, PAGE));
    t.ioas_map("length", &iommufd, ioas, (here, 0, u64::MAX));
    t.ioas_map("their sum", &iommufd, ioas, (here, top, 2 * PAGE));
    t.ioas_map("up to the end", &iommufd, ioas, (here, top, PAGE));
    t.ioas_map("memory", &iommufd, ioas, (top, 0, 2 * PAGE));
    t.ioas_map("memory up to the end", &iommufd, ioas, (top, 0, PAGE));
    t.ioas_map("memory to before the end", &iommufd, ioas, (top - PAGE, 0, PAGE));
    map(t, "no flags, address", &iommufd, 77, 0, (here, u64::MAX, PAGE));
    map(t, "no such ioas, address", &iommufd, 77, FIXED | READ, (here, u64::MAX, PAGE));
}

fn map_of_nothing(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(1);
    t.ioas_map("no length", &iommufd, ioas, (memory.vaddr(), 0, 0));
    t.ioas_map("no length, no ioas", &iommufd, 77, (memory.vaddr(), 0, 0));
    t.ioas_map("no length, no memory", &iommufd, ioas, (u64::MAX, 0, 0));
}

fn map_unaligned(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(4);
    t.ioas_map("length", &iommufd, ioas, (memory.vaddr(), 0, 100));
    t.ioas_map("address", &iommufd, ioas, (memory.vaddr(), 101, 100));
    t.ioas_map("memory", &iommufd, ioas, (memory.vaddr() + 1, 0x1000, 100));
    t.value("unmap", iommufd.ioas_unmap(ioas, 101, 100));
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
    t.value("attach", device.attach_iommufd_pt(ioas));
}

fn map_unaligned_and_attached(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    let memory = memory(4);
    t.ioas_map("length", &iommufd, ioas, (memory.vaddr(), 0, PAGE / 2));
    t.ioas_map("address", &iommufd, ioas, (memory.vaddr(), PAGE / 2, PAGE));
    t.ioas_map("memory", &iommufd, ioas, (memory.vaddr() + 8, 0, PAGE));
    t.ioas_map("all right", &iommufd, ioas, (memory.vaddr(), 0, PAGE));
    t.ioas_map("overlap and memory", &iommufd, ioas, (memory.vaddr() + 8, 0, PAGE));
    t.ok("detach", device.detach_iommufd_pt());
    t.ioas_map("length, detached", &iommufd, ioas, (memory.vaddr(), PAGE, PAGE / 2));
}

fn map_where_nothing_can_be(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(4);
    let places = [
        ("the MSI window", 0xfee0_0000),
        ("into it", 0xfee0_0000 - PAGE),
        ("behind it", 0xfef0_0000),
        ("beyond the aperture", 1 << 60),
    ];
    for (what, iova) in places {
        t.ioas_map(what, &iommufd, ioas, (memory.vaddr(), iova, 2 * PAGE));
        t.value("unmap", iommufd.ioas_unmap_all(ioas));
    }
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas));
    for (what, iova) in places {
        t.ioas_map(what, &iommufd, ioas, (memory.vaddr(), iova, 2 * PAGE));
    }
}

fn map_without_memory(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    t.ioas_map("nothing there", &iommufd, ioas, (8 * PAGE, 0, PAGE));
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.ioas_map("nothing there", &iommufd, ioas, (8 * PAGE, 0, PAGE));
    t.value("unmap", iommufd.ioas_unmap_all(ioas));
}

fn map_read_only_memory(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let (file, _) = vfio_broker::kernel::Mapped::memfd(PAGE as usize).unwrap();
    let fd = std::os::fd::AsFd::as_fd(&file);
    let memory = vfio_broker::kernel::Mapped::file(fd, 0, PAGE as usize, false).unwrap();
    map(t, "to be written", &iommufd, ioas, FIXED | READ | WRITE, (memory.vaddr(), 0, PAGE));
    map(t, "to be read", &iommufd, ioas, FIXED | READ, (memory.vaddr(), 0, PAGE));
}

fn map_half_of_it_missing(t: &Script) {
    let (iommufd, ioas, device) = t.attached_ioas(device::EDU0);
    let whole = memory(4);
    let at = whole.vaddr();
    t.ioas_map("one that stays", &iommufd, ioas, (at, 64 * PAGE, PAGE));
    t.ioas_map("the end is missing", &iommufd, ioas, (at, 0, 1 << 40));
    t.value("unmap", iommufd.ioas_unmap(ioas, 0, PAGE));
    t.value("unmap all", iommufd.ioas_unmap_all(ioas));
    t.ok("detach", device.detach_iommufd_pt());
}

fn the_kernel_chooses(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(4);
    for _ in 0..3 {
        map(t, "one page", &iommufd, ioas, READ, (memory.vaddr(), ANY, PAGE));
    }
    t.value("unmap the second", iommufd.ioas_unmap(ioas, 2 * PAGE, PAGE));
    map(t, "one page", &iommufd, ioas, READ, (memory.vaddr() + PAGE, ANY, PAGE));
    map(t, "not aligned", &iommufd, ioas, READ, (memory.vaddr() + 0x10, ANY, 0x10));
    map(t, "not aligned", &iommufd, ioas, READ, (memory.vaddr() + 0x208, ANY, 0x20));
    map(t, "nothing", &iommufd, ioas, READ, (memory.vaddr(), ANY, 0));
    map(t, "too much", &iommufd, ioas, READ, (0, ANY, 1 << 63));
    map(t, "far too much", &iommufd, ioas, READ, (0, ANY, u64::MAX - 1));
}

fn the_kernel_chooses_from_what_is_allowed(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(4);
    let range = |start: u64, end: u64| IovaRange { start, end };
    let allowed = [range(0x50_0000, 0x50_1fff), range(0x30_0000, 0x30_1fff)];
    t.ok("allow", iommufd.ioas_allow_iovas(ioas, &allowed));
    for _ in 0..5 {
        map(t, "one page", &iommufd, ioas, READ, (memory.vaddr(), ANY, PAGE));
    }
    t.ioas_map("elsewhere", &iommufd, ioas, (memory.vaddr(), 0x10_0000, PAGE));
    t.ok("allow all", iommufd.ioas_allow_iovas(ioas, &[]));
    map(t, "one page", &iommufd, ioas, READ, (memory.vaddr(), ANY, PAGE));
}

fn the_kernel_finds_no_room(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let memory = memory(1);
    map(t, "more than there is", &iommufd, ioas, READ, (0, ANY, 1 << 60));
    map(t, "one page", &iommufd, ioas, READ, (memory.vaddr(), ANY, PAGE));
    map(t, "not aligned", &iommufd, ioas, READ, (memory.vaddr() + 8, ANY, PAGE));
}

/// An IOAS with two pages at pages 0, 4 and 8.
fn three(t: &Script) -> (Iommufd, u32, vfio_broker::kernel::Mapped) {
    let (iommufd, ioas) = t.ioas();
    let memory = memory(16);
    for page in [0, 4, 8] {
        let at = (memory.vaddr() + page * PAGE, page * PAGE, 2 * PAGE);
        t.ioas_map(&format!("2 at {page}"), &iommufd, ioas, at);
    }
    (iommufd, ioas, memory)
}

fn unmap_nothing(t: &Script) {
    let (iommufd, ioas, _memory) = three(t);
    t.value("no length", iommufd.ioas_unmap(ioas, 0, 0));
    t.value("between", iommufd.ioas_unmap(ioas, 2 * PAGE, 2 * PAGE));
    t.value("behind", iommufd.ioas_unmap(ioas, 64 * PAGE, PAGE));
    t.value("all", iommufd.ioas_unmap_all(ioas));
}

fn unmap_part(t: &Script) {
    let (iommufd, ioas, _memory) = three(t);
    t.value("its start", iommufd.ioas_unmap(ioas, 4 * PAGE, PAGE));
    t.value("its end", iommufd.ioas_unmap(ioas, 5 * PAGE, PAGE));
    t.value("some bytes", iommufd.ioas_unmap(ioas, 4 * PAGE + 1, 1));
    t.value("all but a byte", iommufd.ioas_unmap(ioas, 4 * PAGE, 2 * PAGE - 1));
    t.value("a byte more", iommufd.ioas_unmap(ioas, 4 * PAGE, 2 * PAGE + 1));
    t.value("all", iommufd.ioas_unmap_all(ioas));
}

fn unmap_several(t: &Script) {
    let (iommufd, ioas, _memory) = three(t);
    t.value("two and the room between", iommufd.ioas_unmap(ioas, 2 * PAGE, 10 * PAGE));
    t.value("all", iommufd.ioas_unmap_all(ioas));
}

fn unmap_several_and_a_part(t: &Script) {
    let (iommufd, ioas, _memory) = three(t);
    t.value("two and a half", iommufd.ioas_unmap(ioas, 0, 9 * PAGE));
    t.value("the first", iommufd.ioas_unmap(ioas, 0, 2 * PAGE));
    t.value("the second", iommufd.ioas_unmap(ioas, 4 * PAGE, 2 * PAGE));
    t.value("the third", iommufd.ioas_unmap(ioas, 8 * PAGE, 2 * PAGE));
}

fn unmap_overflows(t: &Script) {
    let (iommufd, ioas, _memory) = three(t);
    t.value("address", iommufd.ioas_unmap(ioas, u64::MAX, PAGE));
    t.value("length", iommufd.ioas_unmap(ioas, PAGE, u64::MAX));
    t.value("their sum", iommufd.ioas_unmap(ioas, u64::MAX - 1, PAGE));
    t.value("almost all", iommufd.ioas_unmap(ioas, 0, u64::MAX - 1));
    t.value("all", iommufd.ioas_unmap_all(ioas));
}

fn unmap_all(t: &Script) {
    let (iommufd, ioas, _memory) = three(t);
    t.value("all", iommufd.ioas_unmap_all(ioas));
    t.value("all of nothing", iommufd.ioas_unmap_all(ioas));
}

fn unmap_of_no_ioas(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    for id in [0, ioas + 1] {
        t.value("all", iommufd.ioas_unmap_all(id));
        t.value("no length", iommufd.ioas_unmap(id, 0, 0));
        t.value("overflow", iommufd.ioas_unmap(id, u64::MAX, PAGE));
    }
}

fn ranges(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    t.value("alone", iommufd.ioas_iova_ranges(ioas));
    let device = t.bound(device::EDU0, &iommufd);
    t.value("bound", iommufd.ioas_iova_ranges(ioas));
    t.value("attach", device.attach_iommufd_pt(ioas));
    t.value("attached", iommufd.ioas_iova_ranges(ioas));
    let memory = memory(1);
    t.ioas_map("map", &iommufd, ioas, (memory.vaddr(), 0, PAGE));
    t.value("mapped", iommufd.ioas_iova_ranges(ioas));
    let second = t.bound(device::E1000E, &iommufd);
    t.value("attach", second.attach_iommufd_pt(ioas));
    t.value("two", iommufd.ioas_iova_ranges(ioas));
    t.ok("detach", device.detach_iommufd_pt());
    t.value("one", iommufd.ioas_iova_ranges(ioas));
    t.ok("detach", second.detach_iommufd_pt());
    t.value("none", iommufd.ioas_iova_ranges(ioas));
}

fn ranges_without_room(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    for room in 0..4u32 {
        let mut bytes = vec![0; 32];
        for (at, value) in [(0, 32), (4, ioas), (8, room)] {
            bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        let mut list = [0x55; 16 * 4];
        let arg = Arg::Struct { bytes: &mut bytes, fds: &[], out: Some((16, &mut list)) };
        t.ioctl(&format!("room for {room}"), &iommufd, request::IOAS_IOVA_RANGES, arg);
        t.note("count", u32_at(&bytes, 8));
        t.note("alignment", u32_at(&bytes, 24));
        t.note("written", list.iter().filter(|byte| **byte != 0x55).count().div_ceil(16));
    }
}

fn ranges_to_nowhere(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let fields = |room: u32| {
        let head = [Field::U32(32), Field::U32(ioas), Field::U32(room), Field::U32(0)];
        [head.as_slice(), &[Field::U64(8), Field::U64(0)]].concat()
    };
    let bytes = t.fields("no room", &iommufd, request::IOAS_IOVA_RANGES, &fields(0));
    t.note("count", u32_at(&bytes, 8));
    let bytes = t.fields("nowhere", &iommufd, request::IOAS_IOVA_RANGES, &fields(4));
    t.note("count", u32_at(&bytes, 8));
}

fn ranges_of_no_ioas(t: &Script) {
    let (iommufd, _, _device) = t.attached_ioas(device::EDU0);
    for id in [0, 2, 3, 77] {
        t.value(&format!("{id}"), iommufd.ioas_iova_ranges(id));
    }
}

fn allow(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let range = |start: u64, end: u64| IovaRange { start, end };
    t.ok("none", iommufd.ioas_allow_iovas(ioas, &[]));
    t.ok("one", iommufd.ioas_allow_iovas(ioas, &[range(0, 0xffff)]));
    t.ok("two", iommufd.ioas_allow_iovas(ioas, &[range(0, 0xfff), range(0x1000, 0x1fff)]));
    t.value("ranges", iommufd.ioas_iova_ranges(ioas));
    t.ok("no such ioas", iommufd.ioas_allow_iovas(77, &[range(0, 0xffff)]));
    t.ok("no such ioas, nonsense", iommufd.ioas_allow_iovas(77, &[range(1, 0)]));
}

fn allow_what_is_reserved(t: &Script) {
    let (iommufd, ioas, _device) = t.attached_ioas(device::EDU0);
    let range = |start: u64, end: u64| IovaRange { start, end };
    t.ok("the MSI window", iommufd.ioas_allow_iovas(ioas, &[range(0xfee0_0000, 0xfee0_0fff)]));
    t.ok("beyond it all", iommufd.ioas_allow_iovas(ioas, &[range(0, 1 << 60)]));
    t.ok("the rest", iommufd.ioas_allow_iovas(ioas, &[range(0, 0xfedf_ffff)]));
}

fn allow_nonsense(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let range = |start: u64, end: u64| IovaRange { start, end };
    t.ok("backwards", iommufd.ioas_allow_iovas(ioas, &[range(0x2000, 0x1000)]));
    t.ok("one byte", iommufd.ioas_allow_iovas(ioas, &[range(0x2000, 0x2000)]));
    let overlap = [range(0, 0x1fff), range(0x1fff, 0x2fff)];
    t.ok("overlap", iommufd.ioas_allow_iovas(ioas, &overlap));
    let fields = [Field::U32(24), Field::U32(ioas), Field::U32(1), Field::U32(0), Field::U64(8)];
    t.fields("nowhere", &iommufd, request::IOAS_ALLOW_IOVAS, &fields);
}

fn allowed_before_attached(t: &Script) {
    let (iommufd, ioas) = t.ioas();
    let device = t.bound(device::EDU0, &iommufd);
    let window = IovaRange { start: 0xfee0_0000, end: 0xfee0_ffff };
    t.ok("the MSI window", iommufd.ioas_allow_iovas(ioas, &[window]));
    t.value("attach", device.attach_iommufd_pt(ioas));
    let below = IovaRange { start: 0, end: 0xffff };
    t.ok("below it", iommufd.ioas_allow_iovas(ioas, &[below]));
    t.value("attach", device.attach_iommufd_pt(ioas));
}

fn spaces_are_apart(t: &Script) {
    let (iommufd, first) = t.ioas();
    let second = iommufd.ioas_alloc().unwrap();
    let memory = memory(2);
    t.ioas_map("first", &iommufd, first, (memory.vaddr(), 0, PAGE));
    t.ioas_map("second", &iommufd, second, (memory.vaddr(), 0, 2 * PAGE));
    t.value("unmap", iommufd.ioas_unmap_all(first));
    t.value("unmap", iommufd.ioas_unmap_all(second));
    let (other, _) = t.ioas();
    t.value("of another iommufd", other.ioas_unmap_all(second));
}
