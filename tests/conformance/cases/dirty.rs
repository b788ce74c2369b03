//! `VFIO_IOMMU_DIRTY_PAGES` and bitmaps at unmapping.

use crate::script::{Field, Mapped3, PAGE, Script};
use vfio_broker::kernel::{DirtyOp, IommuType, Unmap, request};

super::cases![
    version_one_has_none,
    flags_that_are_none,
    start_and_stop_twice,
    before_the_start,
    a_bitmap,
    a_bitmap_twice,
    a_bitmap_that_begins_inside_a_word,
    page_sizes_that_are_wrong,
    misaligned,
    a_bitmap_cuts_nothing,
    a_bitmap_too_small,
    a_range_too_large,
    a_range_that_wraps,
    argsz_too_small,
    unmap_with_a_bitmap,
    unmap_before_the_start,
    unmap_with_another_page_size,
    after_the_stop,
];

fn version_one_has_none(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1);
    t.ok("start", space.container.dirty_pages(DirtyOp::Start));
    t.ok("stop", space.container.dirty_pages(DirtyOp::Stop));
    t.ok("flags", space.container.dirty_pages(DirtyOp::Flags(77)));
}

fn flags_that_are_none(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    for flags in [3, 5, 6, 7, 8, 9, 0x8000_0000] {
        t.ok(&format!("flags {flags:#x}"), space.container.dirty_pages(DirtyOp::Flags(flags)));
    }
}

fn start_and_stop_twice(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.ok("stop", space.container.dirty_pages(DirtyOp::Stop));
    t.ok("start", space.container.dirty_pages(DirtyOp::Start));
    t.ok("start", space.container.dirty_pages(DirtyOp::Start));
    t.ok("stop", space.container.dirty_pages(DirtyOp::Stop));
    t.ok("stop", space.container.dirty_pages(DirtyOp::Stop));
}

/// Reads a bitmap and writes it down.
fn get(t: &Script, space: &Mapped3, what: &str, page: u64, pages: u64, pgsize: u64, len: usize) {
    let mut bitmap = vec![0x5a; len];
    let (iova, size) = (page * PAGE, pages * PAGE);
    let op = DirtyOp::Get { iova, size, pgsize, bitmap: &mut bitmap };
    t.ok(what, space.container.dirty_pages(op));
    t.note("bitmap", bitmap);
}

fn started(t: &Script) -> Mapped3 {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.ok("start", space.container.dirty_pages(DirtyOp::Start));
    space
}

fn before_the_start(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    get(t, &space, "get", 0, 16, PAGE, 8);
}

fn a_bitmap(t: &Script) {
    let space = started(t);
    get(t, &space, "all", 0, 16, PAGE, 8);
    get(t, &space, "the first", 0, 2, PAGE, 8);
    get(t, &space, "a hole", 2, 2, PAGE, 8);
    get(t, &space, "the second and holes", 3, 4, PAGE, 8);
    space.map(t, 12, 2);
    get(t, &space, "all", 0, 16, PAGE, 8);
}

fn a_bitmap_twice(t: &Script) {
    let space = started(t);
    get(t, &space, "once", 0, 16, PAGE, 8);
    get(t, &space, "twice", 0, 16, PAGE, 8);
}

fn a_bitmap_that_begins_inside_a_word(t: &Script) {
    let space = started(t);
    get(t, &space, "from page 3", 3, 13, PAGE, 8);
    get(t, &space, "two words", 0, 128, PAGE, 16);
    get(t, &space, "a word too many", 0, 64, PAGE, 16);
}

fn page_sizes_that_are_wrong(t: &Script) {
    let space = started(t);
    for pgsize in [1, 512, 2 * PAGE, 2 << 20, 3 * PAGE] {
        get(t, &space, &format!("{pgsize}"), 0, 16, pgsize, 1024);
        if pgsize < PAGE {
            continue;
        }
    }
}

fn misaligned(t: &Script) {
    let space = started(t);
    for (iova, size) in [(1, 16 * PAGE), (0, 16 * PAGE + 1), (512, 16 * PAGE), (0, 0), (0, 100)] {
        let mut bitmap = [0; 64];
        let op = DirtyOp::Get { iova, size, pgsize: PAGE, bitmap: &mut bitmap };
        t.ok(&format!("iova {iova}, size {size}"), space.container.dirty_pages(op));
    }
}

fn a_bitmap_cuts_nothing(t: &Script) {
    let space = started(t);
    get(t, &space, "from inside", 1, 15, PAGE, 8);
    get(t, &space, "to inside", 0, 5, PAGE, 8);
    get(t, &space, "inside", 1, 1, PAGE, 8);
}

fn a_bitmap_too_small(t: &Script) {
    let space = started(t);
    for len in [0, 1, 4, 7] {
        get(t, &space, &format!("{len} bytes"), 0, 16, PAGE, len);
    }
    get(t, &space, "8 bytes for 65 pages", 0, 65, PAGE, 8);
    get(t, &space, "16 bytes for 65 pages", 0, 65, PAGE, 16);
}

fn a_range_too_large(t: &Script) {
    let space = started(t);
    get(t, &space, "a tebibyte", 0, 1 << 28, PAGE, 8);
}

fn a_range_that_wraps(t: &Script) {
    let space = started(t);
    for (iova, size) in [(u64::MAX - PAGE + 1, 2 * PAGE), (u64::MAX - PAGE + 1, PAGE)] {
        let mut bitmap = [0; 64];
        let op = DirtyOp::Get { iova, size, pgsize: PAGE, bitmap: &mut bitmap };
        t.ok(&format!("iova {iova:#x}, size {size}"), space.container.dirty_pages(op));
    }
}

fn argsz_too_small(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    for argsz in [0, 4, 7, 8] {
        let fields = [Field::U32(argsz), Field::U32(1)];
        let what = format!("start, argsz {argsz}");
        t.fields(&what, &space.container, request::IOMMU_DIRTY_PAGES, &fields);
    }
    for argsz in [8, 9, 24, 47] {
        let mut fields = vec![Field::U32(argsz), Field::U32(4), Field::U64(0)];
        fields.extend([16 * PAGE, PAGE, 8, 0].map(Field::U64));
        let what = format!("get, argsz {argsz}");
        t.fields(&what, &space.container, request::IOMMU_DIRTY_PAGES, &fields);
    }
}

/// Unmaps with a bitmap and writes it down.
fn unmap(t: &Script, space: &Mapped3, what: &str, range: (u64, u64), pgsize: u64, len: usize) {
    let mut bitmap = vec![0x5a; len];
    let unmap = Unmap { flags: 0, iova: range.0 * PAGE, size: range.1 * PAGE };
    t.value(what, space.container.unmap_dirty(&unmap, pgsize, &mut bitmap));
    t.note("bitmap", bitmap);
}

fn unmap_with_a_bitmap(t: &Script) {
    let space = started(t);
    unmap(t, &space, "cutting", (0, 5), PAGE, 8);
    unmap(t, &space, "the first", (0, 2), PAGE, 8);
    unmap(t, &space, "too small", (0, 16), PAGE, 4);
    unmap(t, &space, "the rest", (0, 16), PAGE, 8);
    unmap(t, &space, "nothing", (0, 16), PAGE, 8);
}

fn unmap_before_the_start(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    unmap(t, &space, "unmap", (0, 2), PAGE, 8);
}

fn unmap_with_another_page_size(t: &Script) {
    let space = started(t);
    unmap(t, &space, "two pages", (0, 2), 2 * PAGE, 8);
    unmap(t, &space, "a larger page than there is", (0, 2), 1 << 21, 8);
}

fn after_the_stop(t: &Script) {
    let space = started(t);
    t.ok("stop", space.container.dirty_pages(DirtyOp::Stop));
    get(t, &space, "get", 0, 16, PAGE, 8);
    t.ok("start", space.container.dirty_pages(DirtyOp::Start));
    get(t, &space, "get", 0, 16, PAGE, 8);
}
