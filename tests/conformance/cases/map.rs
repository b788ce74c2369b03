//! `VFIO_IOMMU_MAP_DMA`: its checks and their order.

use crate::script::{Field, PAGE, Script, device, memory};
use vfio_broker::kernel::{DmaMap, IommuType, Mapped, request};

super::cases![
    a_page,
    many_pages,
    flags_that_are_none,
    neither_read_nor_write,
    write_only,
    read_and_a_new_address,
    size_zero,
    misaligned,
    addresses_that_wrap,
    a_wrap_comes_before_the_flags,
    the_whole_address_space,
    overlap_exact,
    overlap_in_part,
    neighbours,
    outside_of_the_aperture,
    the_last_page,
    the_interrupt_window,
    as_many_as_the_limit,
    the_limit_comes_after_overlap,
    memory_that_is_not_there,
    memory_that_ends_too_early,
    memory_that_cannot_be_written,
    argsz_too_small,
    overlap_comes_before_the_aperture,
    alignment_comes_before_overlap,
    version_one_maps_the_same,
    the_same_memory_twice,
    a_failed_map_leaves_nothing,
    after_the_group_has_left,
];

const READ: u32 = DmaMap::READ;
const WRITE: u32 = DmaMap::WRITE;

fn a_page(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(1);
    t.map("map", &container, READ | WRITE, (memory.vaddr(), 0x10000, PAGE));
    t.unmap("unmap", &container, 0, 0x10000, PAGE);
}

fn many_pages(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(1024);
    t.map("map", &container, READ | WRITE, (memory.vaddr(), 0, 1024 * PAGE));
    t.unmap("unmap", &container, 0, 0, 1024 * PAGE);
}

fn flags_that_are_none(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(1);
    for flags in [8, 9, 0x10, 0x8000_0001] {
        t.map(&format!("flags {flags:#x}"), &container, flags, (memory.vaddr(), 0, PAGE));
    }
}

fn neither_read_nor_write(t: &Script) {
    let (container, _group) = t.space();
    t.map("map", &container, 0, (memory(1).vaddr(), 0, PAGE));
}

fn write_only(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(1);
    t.map("map", &container, WRITE, (memory.vaddr(), 0, PAGE));
}

fn read_and_a_new_address(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(1);
    for flags in [READ, WRITE, READ | WRITE] {
        let at = (memory.vaddr(), 0, PAGE);
        t.map(&format!("with {flags}"), &container, DmaMap::VADDR | flags, at);
    }
}

fn size_zero(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(1);
    t.map("size 0", &container, READ, (memory.vaddr(), 0, 0));
    t.map("size 0 without flags", &container, 0, (memory.vaddr(), 0, 0));
    t.map("size 0, new address", &container, DmaMap::VADDR, (memory.vaddr(), 0, 0));
}

fn misaligned(t: &Script) {
    let (container, _group) = t.space();
    let vaddr = memory(2).vaddr();
    for at in [
        (vaddr + 1, 0, PAGE),
        (vaddr, 1, PAGE),
        (vaddr, 0, PAGE + 1),
        (vaddr, 0, 1),
        (vaddr + 512, 512, PAGE),
    ] {
        let what = format!("vaddr +{}, iova {}, size {}", at.0 - vaddr, at.1, at.2);
        t.map(&what, &container, READ, at);
    }
}

fn addresses_that_wrap(t: &Script) {
    let (container, _group) = t.space();
    let vaddr = memory(1).vaddr();
    let top = u64::MAX - PAGE + 1;
    t.map("iova", &container, READ, (vaddr, top, 2 * PAGE));
    t.map("vaddr", &container, READ, (top, 0, 2 * PAGE));
    t.map("both", &container, READ, (top, top, 2 * PAGE));
    t.map("iova to the end", &container, READ, (vaddr, top, PAGE));
    t.map("size", &container, READ, (vaddr, PAGE, u64::MAX - PAGE + 1));
}

fn a_wrap_comes_before_the_flags(t: &Script) {
    let (container, _group) = t.space();
    let top = u64::MAX - PAGE + 1;
    t.map("wrap, no flags", &container, 0, (PAGE, top, 2 * PAGE));
    t.map("wrap, unknown flags", &container, 8, (PAGE, top, 2 * PAGE));
    t.map("wrap, misaligned", &container, READ, (PAGE, top + 1, 2 * PAGE));
    t.map("wrap, new address", &container, DmaMap::VADDR, (PAGE, top, 2 * PAGE));
}

fn the_whole_address_space(t: &Script) {
    let (container, _group) = t.space();
    t.map("all of it", &container, READ, (0, 0, !(PAGE - 1)));
}

fn overlap_exact(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(2);
    t.map("first", &container, READ, (memory.vaddr(), 0, PAGE));
    t.map("again", &container, READ, (memory.vaddr(), 0, PAGE));
    t.map("other memory", &container, READ, (memory.vaddr() + PAGE, 0, PAGE));
}

fn overlap_in_part(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(8);
    let vaddr = memory.vaddr();
    t.map("first", &container, READ, (vaddr, 4 * PAGE, 4 * PAGE));
    for (page, pages) in [(3, 2), (7, 2), (5, 1), (2, 8), (0, 5)] {
        let at = (vaddr, page * PAGE, pages * PAGE);
        t.map(&format!("{pages} pages from {page}"), &container, READ, at);
    }
}

fn neighbours(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(3);
    for page in [1, 0, 2] {
        let at = (memory.vaddr() + page * PAGE, page * PAGE, PAGE);
        t.map(&format!("page {page}"), &container, READ, at);
    }
    t.unmap("all", &container, 0, 0, 3 * PAGE);
}

fn outside_of_the_aperture(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(1);
    for iova in [1 << 39, 1 << 48, 1 << 57, 1 << 63] {
        t.map(&format!("iova {iova:#x}"), &container, READ, (memory.vaddr(), iova, PAGE));
    }
}

fn the_last_page(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(2);
    let Some(last) = container.info().ok().and_then(|info| info.iova_ranges.last().copied()) else {
        return;
    };
    let iova = last.end - (PAGE - 1);
    t.note("iova", iova);
    t.map("beyond", &container, READ, (memory.vaddr(), iova, 2 * PAGE));
    t.map("the last", &container, READ, (memory.vaddr(), iova, PAGE));
    t.unmap("unmap", &container, 0, iova, PAGE);
}

fn the_interrupt_window(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(2);
    for iova in [0xfede_f000, 0xfedf_f000, 0xfee0_0000, 0xfeef_f000] {
        let at = (memory.vaddr(), iova, 2 * PAGE);
        t.map(&format!("two pages at {iova:#x}"), &container, READ, at);
    }
    t.map("behind it", &container, READ, (memory.vaddr(), 0xfef0_0000, PAGE));
    t.map("across it", &container, READ, (memory.vaddr(), 0xfd00_0000, 0x400_0000));
}

fn as_many_as_the_limit(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(5);
    let map = |page: u64| {
        let at = (memory.vaddr() + page * PAGE, page * PAGE, PAGE);
        t.map(&format!("page {page}"), &container, READ, at);
    };
    (0..4).for_each(map);
    t.unmap("unmap", &container, 0, PAGE, PAGE);
    map(4);
    map(1);
}

fn the_limit_comes_after_overlap(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(5);
    for page in 0..3 {
        t.map("page", &container, READ, (memory.vaddr() + page * PAGE, page * PAGE, PAGE));
    }
    t.map("overlap", &container, READ, (memory.vaddr(), 0, PAGE));
    t.map("outside", &container, READ, (memory.vaddr(), 1 << 48, PAGE));
    t.map("misaligned", &container, READ, (memory.vaddr(), 1, PAGE));
}

fn memory_that_is_not_there(t: &Script) {
    let (container, _group) = t.space();
    let gone = memory(1);
    let vaddr = gone.vaddr();
    drop(gone);
    t.map("unmapped", &container, READ, (vaddr, 0, PAGE));
    t.map("page zero", &container, READ, (0, 0, PAGE));
    t.map("the kernel's", &container, READ, (0xffff_8000_0000_0000, 0, PAGE));
    t.unmap("unmap", &container, 2, 0, 0);
}

fn memory_that_ends_too_early(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(4);
    // What follows is far away: nothing else of this process is as large.
    t.map("64 GiB of it", &container, READ, (memory.vaddr(), 1 << 32, 1 << 36));
    t.value("left", container.info().map(|info| info.dma_avail));
}

fn memory_that_cannot_be_written(t: &Script) {
    let (container, _group) = t.space();
    let (file, _whole) = Mapped::memfd(4096).unwrap();
    let read_only = Mapped::file(std::os::fd::AsFd::as_fd(&file), 0, 4096, false).unwrap();
    t.map("write", &container, WRITE, (read_only.vaddr(), 0, PAGE));
    t.map("read and write", &container, READ | WRITE, (read_only.vaddr(), 0, PAGE));
    t.map("read", &container, READ, (read_only.vaddr(), 0, PAGE));
}

fn argsz_too_small(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(1);
    for argsz in [0, 8, 31, 32, 40] {
        let fields = [
            Field::U32(argsz),
            Field::U32(READ),
            Field::U64(memory.vaddr()),
            Field::U64(0),
            Field::U64(PAGE),
            Field::U64(0),
        ];
        t.fields(&format!("argsz {argsz}"), &container, request::IOMMU_MAP_DMA, &fields);
    }
}

fn overlap_comes_before_the_aperture(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(2);
    t.map("in front of the window", &container, READ, (memory.vaddr(), 0xfedf_f000, PAGE));
    t.map("into the window", &container, READ, (memory.vaddr(), 0xfedf_f000, 2 * PAGE));
    t.map("nowhere and overlapping", &container, READ, (0, 0xfedf_f000, PAGE));
}

fn alignment_comes_before_overlap(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(2);
    t.map("first", &container, READ, (memory.vaddr(), 0, PAGE));
    t.map("misaligned and overlapping", &container, READ, (memory.vaddr() + 1, 0, PAGE));
}

fn version_one_maps_the_same(t: &Script) {
    let (container, _group) = t.attached(device::EDU0, IommuType::Type1);
    let memory = memory(4);
    t.map("map", &container, READ, (memory.vaddr(), 0, 2 * PAGE));
    t.map("overlap", &container, READ, (memory.vaddr(), PAGE, 2 * PAGE));
    t.map("misaligned", &container, READ, (memory.vaddr(), 1, PAGE));
    t.map("the window", &container, READ, (memory.vaddr(), 0xfee0_0000, PAGE));
    t.map("neighbour", &container, READ, (memory.vaddr(), 2 * PAGE, 2 * PAGE));
}

fn the_same_memory_twice(t: &Script) {
    let (container, _group) = t.space();
    let memory = memory(1);
    t.map("here", &container, READ, (memory.vaddr(), 0, PAGE));
    t.map("and there", &container, READ, (memory.vaddr(), 0x10_0000, PAGE));
    t.unmap("unmap", &container, 2, 0, 0);
}

fn a_failed_map_leaves_nothing(t: &Script) {
    let (container, _group) = t.space();
    t.map("nowhere", &container, READ, (0, 0, PAGE));
    t.value("left", container.info().map(|info| info.dma_avail));
    let memory = memory(1);
    t.map("the same iova", &container, READ, (memory.vaddr(), 0, PAGE));
}

fn after_the_group_has_left(t: &Script) {
    let (container, group) = t.space();
    let memory = memory(1);
    drop(group);
    t.map("map", &container, READ, (memory.vaddr(), 0, PAGE));
    t.unmap("unmap", &container, 2, 0, 0);
}
