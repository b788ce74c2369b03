//! `VFIO_IOMMU_UNMAP_DMA`: versions one and two, all at once, and its checks.

use crate::script::{Field, Mapped3, PAGE, Script, device, u64_at};
use vfio_broker::kernel::{IommuType, UnmapFlags, request};

super::cases![
    exactly,
    nothing_there,
    several_at_once,
    across_holes,
    version_two_cuts_nothing,
    version_one_in_the_middle,
    version_one_from_the_start,
    version_one_from_before,
    version_one_several,
    misaligned,
    size_zero,
    addresses_that_wrap,
    all,
    all_wants_zeros,
    all_of_nothing,
    flags_that_are_none,
    flags_that_exclude_each_other,
    argsz_too_small,
    says_how_much,
    mappings_stay_while_a_group_does,
    mappings_go_with_the_last_group,
];

fn exactly(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("the middle one", &space.container, 0, 4 * PAGE, 2 * PAGE);
    t.unmap("again", &space.container, 0, 4 * PAGE, 2 * PAGE);
    space.map(t, 4, 2);
}

fn nothing_there(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("a hole", &space.container, 0, 2 * PAGE, 2 * PAGE);
    t.unmap("far away", &space.container, 0, 1 << 60, PAGE);
    t.unmap("the interrupt window", &space.container, 0, 0xfee0_0000, PAGE);
}

fn several_at_once(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("the first two", &space.container, 0, 0, 6 * PAGE);
    t.unmap("the rest", &space.container, 0, 0, 1 << 30);
}

fn across_holes(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("from a hole to a hole", &space.container, 0, 3 * PAGE, 4 * PAGE);
    t.unmap("from the start to a hole", &space.container, 0, 0, 3 * PAGE);
}

fn version_two_cuts_nothing(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    for (page, pages) in [(0, 1), (1, 1), (1, 2), (3, 2), (0, 5), (5, 4), (1, 8)] {
        let what = format!("{pages} pages from {page}");
        t.unmap(&what, &space.container, 0, page * PAGE, pages * PAGE);
    }
    t.unmap("all are still there", &space.container, UnmapFlags::ALL, 0, 0);
}

fn version_one_in_the_middle(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1);
    t.unmap("its second page", &space.container, 0, PAGE, PAGE);
    t.unmap("from there over the next", &space.container, 0, PAGE, 8 * PAGE);
    t.unmap("all are still there", &space.container, UnmapFlags::ALL, 0, 0);
}

fn version_one_from_the_start(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1);
    t.unmap("its first page", &space.container, 0, 0, PAGE);
    t.unmap("the rest", &space.container, UnmapFlags::ALL, 0, 0);
}

fn version_one_from_before(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1);
    t.unmap("from the hole into the second", &space.container, 0, 3 * PAGE, 2 * PAGE);
    t.unmap("the rest", &space.container, UnmapFlags::ALL, 0, 0);
}

fn version_one_several(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1);
    t.unmap("into the third", &space.container, 0, 0, 9 * PAGE);
    t.unmap("the rest", &space.container, UnmapFlags::ALL, 0, 0);
}

fn misaligned(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    for (iova, size) in [(1, PAGE), (0, PAGE + 1), (0, 1), (512, 512)] {
        t.unmap(&format!("iova {iova}, size {size}"), &space.container, 0, iova, size);
    }
}

fn size_zero(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("size 0", &space.container, 0, 0, 0);
    t.unmap("size 0 in a hole", &space.container, 0, 2 * PAGE, 0);
}

fn addresses_that_wrap(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    let top = u64::MAX - PAGE + 1;
    t.unmap("over the end", &space.container, 0, top, 2 * PAGE);
    t.unmap("to the end", &space.container, 0, top, PAGE);
    t.unmap("all but a page", &space.container, 0, PAGE, top);
    t.unmap("nearly all", &space.container, 0, 0, top);
    t.unmap("misaligned over the end", &space.container, 0, top + 1, 2 * PAGE);
}

fn all(t: &Script) {
    for kind in [IommuType::Type1, IommuType::Type1v2] {
        let space = Mapped3::new(t, kind);
        t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
        t.unmap("again", &space.container, UnmapFlags::ALL, 0, 0);
    }
}

fn all_wants_zeros(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("iova", &space.container, UnmapFlags::ALL, PAGE, 0);
    t.unmap("size", &space.container, UnmapFlags::ALL, 0, PAGE);
    t.unmap("misaligned iova", &space.container, UnmapFlags::ALL, 1, 0);
    t.unmap("all are still there", &space.container, UnmapFlags::ALL, 0, 0);
}

fn all_of_nothing(t: &Script) {
    let (container, _group) = t.space();
    t.unmap("all", &container, UnmapFlags::ALL, 0, 0);
}

fn flags_that_are_none(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    for flags in [8, 0x10, 0x8000_0000, 10] {
        t.unmap(&format!("flags {flags:#x}"), &space.container, flags, 0, 2 * PAGE);
    }
}

fn flags_that_exclude_each_other(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("bitmap and all", &space.container, 3, 0, 0);
    t.unmap("bitmap and address", &space.container, 5, 0, 2 * PAGE);
    t.unmap("bitmap without one", &space.container, 1, 0, 2 * PAGE);
}

fn argsz_too_small(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    for argsz in [0, 8, 23, 24] {
        let fields = [Field::U32(argsz), Field::U32(0), Field::U64(0), Field::U64(2 * PAGE)];
        t.fields(&format!("argsz {argsz}"), &space.container, request::IOMMU_UNMAP_DMA, &fields);
    }
}

fn says_how_much(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    for (iova, size) in [(PAGE, PAGE), (0, 1 << 20), (0, 1 << 20)] {
        let fields = [Field::U32(24), Field::U32(0), Field::U64(iova), Field::U64(size)];
        let bytes = t.fields("unmap", &space.container, request::IOMMU_UNMAP_DMA, &fields);
        t.note("iova and size afterwards", (u64_at(&bytes, 8), u64_at(&bytes, 16)));
    }
}

fn mappings_stay_while_a_group_does(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    let second = t.group(device::EDU1);
    t.ok("attach", second.set_container(&space.container));
    t.ok("detach the first", space.group.unset_container());
    t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
}

fn mappings_go_with_the_last_group(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.ok("detach", space.group.unset_container());
    t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
    t.ok("attach", space.group.set_container(&space.container));
    t.ok("type", space.container.set_iommu(IommuType::Type1v2));
    t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
}
