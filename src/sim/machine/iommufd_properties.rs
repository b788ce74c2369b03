//! Random calls on iommufds and cdevs: every object is used by whom it should be, and pinned is what
//! attached address spaces map.

use super::iommufd::{ContextId, Kind};
use super::properties::{Step, run};
use super::*;
use proptest::prelude::*;

/// Mostly of two address spaces and few pages, so that much of it works and meets.
pub(super) fn step() -> impl Strategy<Value = Step> {
    let nth = || 0..3usize;
    let ioas = || prop_oneof![8 => 1..3u32, 1 => 3..9u32];
    let page = || (0..4u64).prop_map(|page| page * 4096);
    let size = || (0..3u64).prop_map(|pages| pages * 4096);
    let range = prop_oneof![3 => (page(), size()), 1 => Just((0u64, u64::MAX))];
    prop_oneof![
        1 => Just(Step::OpenIommufd),
        2 => (0..3u32).prop_map(Step::OpenCdev),
        1 => nth().prop_map(Step::Close),
        3 => (nth(), nth()).prop_map(|(a, b)| Step::Bind(a, b)),
        8 => (nth(), ioas()).prop_map(|(a, b)| Step::Attach(a, b)),
        3 => nth().prop_map(Step::Detach),
        2 => nth().prop_map(Step::Alloc),
        1 => (nth(), ioas()).prop_map(|(a, b)| Step::Destroy(a, b)),
        8 => (nth(), 1..4i32, ioas(), page(), size())
            .prop_map(|(a, b, c, d, e)| Step::IoasMap(a, b, c, d, e)),
        8 => (nth(), [ioas(), ioas()], [page(), page(), page()])
            .prop_map(|(a, b, c)| Step::IoasCopy(a, b, c)),
        4 => (nth(), ioas(), range).prop_map(|(a, b, (c, d))| Step::IoasUnmap(a, b, c, d)),
    ]
}

/// Users are who they should be, and pinned is what an attached IOAS maps, no more and no less.
pub(super) fn check(machine: &Machine, id: ContextId, context: &Context) {
    let bound = machine.devices.iter().filter_map(|device| device.bound);
    let bound: Vec<_> = bound.filter(|bound| bound.context == id).collect();
    assert!(context.open || !bound.is_empty(), "an iommufd nobody has");
    let attached = || context.groups.values();
    for (id, object) in &context.objects {
        let users = match &object.kind {
            Kind::Ioas(ioas) => ioas.tables.len(),
            Kind::Table(_) => {
                attached().filter(|group| group.table == *id).map(|group| group.devices.len()).sum()
            }
            Kind::Device => {
                assert!(bound.iter().any(|bound| bound.id == *id));
                1 + attached().filter(|group| group.devices.contains(id)).count()
            }
        };
        assert_eq!(object.users as usize, 1 + users, "{id} of {context:?}");
        let unused_table = matches!(object.kind, Kind::Table(_)) && users == 0;
        assert!(!unused_table, "a page table without device");
    }
    let all = || context.all_ioas().flat_map(|ioas| ioas.areas.values().map(move |it| (ioas, it)));
    for (id, pages) in &context.pages {
        let areas = || all().filter(|(_, area)| area.pages == *id);
        assert_eq!(pages.areas as usize, areas().count());
        let pinned = areas().filter(|(ioas, _)| !ioas.tables.is_empty());
        let mut pinned: Vec<_> = pinned.map(|(_, area)| area.range()).collect();
        pinned.sort_unstable();
        assert_eq!(pages.filled(), pinned);
    }
    assert!(all().all(|(_, area)| context.pages.contains_key(&area.pages)));
}

/// Two devices in one group and one in another.
fn machine() -> Machine {
    let text = r#"
        kernel = "7.2"
        cdev = true
        [[group]]
        id = 1
        device = [
            { bdf = "0000:01:00.0", vendor = 1, device = 1, driver = "vfio-pci" },
            { bdf = "0000:01:01.0", vendor = 1, device = 1, driver = "vfio-pci" },
        ]
        [[group]]
        id = 2
        device = [{ bdf = "0000:01:02.0", vendor = 1, device = 1, driver = "vfio-pci" }]
    "#;
    Machine::new(Topology::from_toml(text).unwrap(), 0)
}

/// An iommufd with two address spaces and all devices bound to it.
fn scene() -> Vec<Step> {
    let mut steps = vec![Step::OpenIommufd, Step::Alloc(0), Step::Alloc(0)];
    for nth in 0..3 {
        steps.extend([Step::OpenCdev(nth), Step::Bind(nth as usize, 0)]);
    }
    steps
}

proptest! {
    #[test]
    fn users_and_pins_are_counted(steps in proptest::collection::vec(step(), 0..80)) {
        run(machine(), [scene(), steps].concat());
    }
}
