//! Taking addresses away and giving new ones (`VFIO_UPDATE_VADDR`).

use crate::script::{Mapped3, PAGE, Script, device};
use vfio_broker::kernel::{DmaMap, IommuType, UnmapFlags};

super::cases![
    away_and_back,
    back_at_another_address,
    never_taken_away,
    where_nothing_is,
    not_exactly,
    taken_away_twice,
    taken_away_in_part,
    all_taken_away,
    a_group_is_refused_meanwhile,
    unmapped_meanwhile,
    mapped_meanwhile,
    misaligned,
    version_one,
];

const VADDR: u32 = UnmapFlags::VADDR;

fn away_and_back(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("away", &space.container, VADDR, 0, 2 * PAGE);
    t.map("back", &space.container, DmaMap::VADDR, (space.vaddr(), 0, 2 * PAGE));
    t.map("back again", &space.container, DmaMap::VADDR, (space.vaddr(), 0, 2 * PAGE));
    t.unmap("unmap", &space.container, 0, 0, 2 * PAGE);
}

fn back_at_another_address(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("away", &space.container, VADDR, 4 * PAGE, 2 * PAGE);
    let at = (space.vaddr() + 12 * PAGE, 4 * PAGE, 2 * PAGE);
    t.map("elsewhere", &space.container, DmaMap::VADDR, at);
    t.unmap("away", &space.container, VADDR, 4 * PAGE, 2 * PAGE);
    // The memory is not looked at: what is pinned stays pinned.
    t.map("nowhere", &space.container, DmaMap::VADDR, (0x7000, 4 * PAGE, 2 * PAGE));
}

fn never_taken_away(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.map("back", &space.container, DmaMap::VADDR, (space.vaddr(), 0, 2 * PAGE));
}

fn where_nothing_is(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.map("a hole", &space.container, DmaMap::VADDR, (space.vaddr(), 2 * PAGE, 2 * PAGE));
    t.unmap("a hole", &space.container, VADDR, 2 * PAGE, 2 * PAGE);
}

fn not_exactly(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("away", &space.container, VADDR, 0, 2 * PAGE);
    for (page, pages) in [(0, 1), (1, 1), (0, 3), (0, 6)] {
        let at = (space.vaddr(), page * PAGE, pages * PAGE);
        t.map(&format!("{pages} pages at {page}"), &space.container, DmaMap::VADDR, at);
    }
    t.map("exactly", &space.container, DmaMap::VADDR, (space.vaddr(), 0, 2 * PAGE));
}

fn taken_away_twice(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("away", &space.container, VADDR, 4 * PAGE, 2 * PAGE);
    t.unmap("away again", &space.container, VADDR, 4 * PAGE, 2 * PAGE);
    t.unmap("with others", &space.container, VADDR, 0, 16 * PAGE);
    t.map("the first was left alone", &space.container, DmaMap::VADDR, (0, 0, 2 * PAGE));
    t.map("the second", &space.container, DmaMap::VADDR, (0, 4 * PAGE, 2 * PAGE));
    t.unmap("with others", &space.container, VADDR, 0, 16 * PAGE);
}

fn taken_away_in_part(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("its first page", &space.container, VADDR, 0, PAGE);
    t.unmap("its second page", &space.container, VADDR, PAGE, PAGE);
    t.map("back", &space.container, DmaMap::VADDR, (space.vaddr(), 0, 2 * PAGE));
}

fn all_taken_away(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("all", &space.container, VADDR | UnmapFlags::ALL, 0, 0);
    for page in [0, 4, 8] {
        let at = (space.vaddr(), page * PAGE, 2 * PAGE);
        t.map(&format!("page {page}"), &space.container, DmaMap::VADDR, at);
    }
    t.unmap("unmap", &space.container, UnmapFlags::ALL, 0, 0);
}

fn a_group_is_refused_meanwhile(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("away", &space.container, VADDR, 0, 2 * PAGE);
    let second = t.group(device::EDU1);
    t.ok("attach", second.set_container(&space.container));
    t.map("back", &space.container, DmaMap::VADDR, (space.vaddr(), 0, 2 * PAGE));
    t.ok("attach", second.set_container(&space.container));
}

fn unmapped_meanwhile(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("away", &space.container, VADDR, 0, 2 * PAGE);
    t.unmap("unmap", &space.container, 0, 0, 2 * PAGE);
    t.map("back", &space.container, DmaMap::VADDR, (space.vaddr(), 0, 2 * PAGE));
    let second = t.group(device::EDU1);
    t.ok("attach", second.set_container(&space.container));
}

fn mapped_meanwhile(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("away", &space.container, VADDR, 0, 2 * PAGE);
    space.map(t, 12, 2);
    space.map(t, 0, 2);
    t.ok("device", space.group.device(device::EDU0));
}

fn misaligned(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    t.unmap("away", &space.container, VADDR, 1, 2 * PAGE);
    t.unmap("away", &space.container, VADDR, 0, 2 * PAGE);
    t.map("back", &space.container, DmaMap::VADDR, (space.vaddr() + 1, 0, 2 * PAGE));
    t.map("size 0", &space.container, DmaMap::VADDR, (space.vaddr(), 0, 0));
    t.map("back", &space.container, DmaMap::VADDR, (space.vaddr(), 0, 2 * PAGE));
}

fn version_one(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1);
    t.unmap("from the middle", &space.container, VADDR, PAGE, PAGE);
    t.unmap("its first page", &space.container, VADDR, 0, PAGE);
    t.map("back", &space.container, DmaMap::VADDR, (space.vaddr(), 0, 2 * PAGE));
}
