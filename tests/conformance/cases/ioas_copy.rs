//! Copies of mappings: the same memory at another address or in another IOAS.

use crate::script::{PAGE, Script, device, memory};
use vfio_broker::kernel::{IoasCopy, IoasMap, Iommufd, MapFlags, Mapped};

super::cases![
    copies,
    copies_of_parts,
    copies_across_mappings,
    copies_of_gaps,
    copies_of_nothing,
    copies_of_no_ioas,
    copies_over_others,
    copies_that_may_write,
    copies_outlive_what_they_copy,
    the_kernel_chooses,
    copies_into_one_in_use,
];

const BOTH: u32 = MapFlags::FIXED_IOVA | MapFlags::READ | MapFlags::WRITE;

/// Two IOAS, the first with two pages at pages 0 and 2, and one at page 8.
fn spaces(t: &Script) -> (Iommufd, [u32; 2], Mapped) {
    let (iommufd, from) = t.ioas();
    let to = iommufd.ioas_alloc().unwrap();
    let memory = memory(16);
    for (page, pages) in [(0, 2), (2, 2), (8, 1)] {
        let at = (memory.vaddr() + page * PAGE, page * PAGE, pages * PAGE);
        t.ioas_map(&format!("{pages} at {page}"), &iommufd, from, at);
    }
    (iommufd, [from, to], memory)
}

/// Copies pages from one address to another.
fn copy(
    t: &Script,
    what: &str,
    iommufd: &Iommufd,
    ioas: [u32; 2],
    flags: u32,
    at: (u64, u64, u64),
) {
    let ([from, to], (source, target, pages)) = (ioas, at);
    let (from_iova, to_iova, size) = (source * PAGE, target * PAGE, pages * PAGE);
    t.value(what, iommufd.ioas_copy(&IoasCopy { flags, to, from, size, to_iova, from_iova }));
}

fn copies(t: &Script) {
    let (iommufd, ioas, _memory) = spaces(t);
    copy(t, "one", &iommufd, ioas, BOTH, (0, 0, 2));
    copy(t, "elsewhere", &iommufd, ioas, BOTH, (0, 16, 2));
    copy(t, "in the same", &iommufd, [ioas[0]; 2], BOTH, (0, 16, 2));
    for id in ioas {
        t.value("unmap", iommufd.ioas_unmap_all(id));
    }
}

fn copies_of_parts(t: &Script) {
    let (iommufd, ioas, _memory) = spaces(t);
    copy(t, "the start", &iommufd, ioas, BOTH, (0, 0, 1));
    copy(t, "the end", &iommufd, ioas, BOTH, (1, 1, 1));
    t.value("unmap one", iommufd.ioas_unmap(ioas[1], PAGE, PAGE));
    t.value("unmap", iommufd.ioas_unmap_all(ioas[1]));
}

fn copies_across_mappings(t: &Script) {
    let (iommufd, ioas, _memory) = spaces(t);
    copy(t, "two", &iommufd, ioas, BOTH, (0, 0, 4));
    t.value("unmap the first", iommufd.ioas_unmap(ioas[1], 0, 2 * PAGE));
    copy(t, "halves", &iommufd, ioas, BOTH, (1, 16, 2));
    t.value("unmap a half", iommufd.ioas_unmap(ioas[1], 16 * PAGE, PAGE));
    t.value("unmap", iommufd.ioas_unmap_all(ioas[1]));
}

fn copies_of_gaps(t: &Script) {
    let (iommufd, ioas, _memory) = spaces(t);
    copy(t, "nothing there", &iommufd, ioas, BOTH, (5, 0, 1));
    copy(t, "a gap at the end", &iommufd, ioas, BOTH, (2, 0, 4));
    copy(t, "a gap at the start", &iommufd, ioas, BOTH, (7, 0, 2));
    copy(t, "a gap between", &iommufd, ioas, BOTH, (0, 0, 9));
    t.value("unmap", iommufd.ioas_unmap_all(ioas[1]));
}

fn copies_of_nothing(t: &Script) {
    let (iommufd, ioas, _memory) = spaces(t);
    copy(t, "no length", &iommufd, ioas, BOTH, (0, 0, 0));
    copy(t, "no access", &iommufd, ioas, MapFlags::FIXED_IOVA, (0, 0, 1));
    let odd = |size, to_iova, from_iova| IoasCopy {
        flags: BOTH,
        to: ioas[1],
        from: ioas[0],
        size,
        to_iova,
        from_iova,
    };
    t.value("length", iommufd.ioas_copy(&odd(u64::MAX, 0, 0)));
    t.value("to", iommufd.ioas_copy(&odd(PAGE, u64::MAX, 0)));
    t.value("from", iommufd.ioas_copy(&odd(PAGE, 0, u64::MAX)));
    t.value("length and from", iommufd.ioas_copy(&odd(u64::MAX - 1, 0, PAGE)));
    t.value("length and to", iommufd.ioas_copy(&odd(2 * PAGE, u64::MAX - 5, 0)));
}

fn copies_of_no_ioas(t: &Script) {
    let (iommufd, [from, to], _memory) = spaces(t);
    copy(t, "from none", &iommufd, [77, to], BOTH, (0, 0, 1));
    copy(t, "to none", &iommufd, [from, 77], BOTH, (0, 0, 1));
    copy(t, "a gap to none", &iommufd, [from, 77], BOTH, (5, 0, 1));
}

fn copies_over_others(t: &Script) {
    let (iommufd, ioas, _memory) = spaces(t);
    copy(t, "one", &iommufd, ioas, BOTH, (0, 4, 2));
    copy(t, "over it", &iommufd, ioas, BOTH, (0, 5, 2));
    copy(t, "over what is copied", &iommufd, [ioas[0]; 2], BOTH, (0, 1, 2));
}

fn copies_that_may_write(t: &Script) {
    let (iommufd, [from, to], memory) = spaces(t);
    let flags = MapFlags::FIXED_IOVA | MapFlags::READ;
    let map = IoasMap { flags, vaddr: memory.vaddr(), size: PAGE, iova: 32 * PAGE };
    t.value("read only", iommufd.ioas_map(from, &map));
    copy(t, "to be written", &iommufd, [from, to], BOTH, (32, 32, 1));
    copy(t, "to be read", &iommufd, [from, to], flags, (32, 32, 1));
    copy(t, "of what may be written", &iommufd, [from, to], flags, (0, 0, 1));
    copy(t, "of that, to be written", &iommufd, [to, to], BOTH, (0, 4, 1));
}

fn copies_outlive_what_they_copy(t: &Script) {
    let (iommufd, ioas, _memory) = spaces(t);
    copy(t, "copy", &iommufd, ioas, BOTH, (0, 0, 2));
    t.ok("destroy", iommufd.destroy(ioas[0]));
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(ioas[1]));
    copy(t, "copy of the copy", &iommufd, [ioas[1]; 2], BOTH, (0, 64, 2));
    t.value("unmap", iommufd.ioas_unmap_all(ioas[1]));
}

fn the_kernel_chooses(t: &Script) {
    let (iommufd, ioas, _memory) = spaces(t);
    let flags = MapFlags::READ;
    copy(t, "one", &iommufd, ioas, flags, (8, 99, 1));
    copy(t, "another", &iommufd, ioas, flags, (8, 99, 1));
}

fn copies_into_one_in_use(t: &Script) {
    let (iommufd, [from, to], _memory) = spaces(t);
    let device = t.bound(device::EDU0, &iommufd);
    t.value("attach", device.attach_iommufd_pt(to));
    copy(t, "copy", &iommufd, [from, to], BOTH, (0, 0, 2));
    copy(t, "into the MSI window", &iommufd, [from, to], BOTH, (0, 0xfee00, 2));
    t.ioas_map("without memory", &iommufd, from, (8 * PAGE, 64 * PAGE, PAGE));
    copy(t, "of no memory", &iommufd, [from, to], BOTH, (64, 64, 1));
    t.value("unmap", iommufd.ioas_unmap_all(to));
}
