//! Random calls on the machine: whatever they are, nothing overlaps, nothing leaks, nobody pays for
//! what is not mapped.

use super::tests::{Someone, machine, map_arg, unmap_arg};
use super::*;
use crate::kernel::request;
use proptest::prelude::*;

/// A step of a random run; numbers choose among what is open.
#[derive(Clone, Debug)]
enum Step {
    OpenContainer,
    OpenGroup(u32),
    Close(usize),
    SetContainer(usize, usize),
    Unset(usize),
    SetIommu(usize, u64),
    Device(usize, u32),
    Map(usize, i32, u64, u64),
    Unmap(usize, u64, u64, u64),
    NewAddress(usize, i32, u64, u64),
    Driver(u32, bool),
    Any(usize, u32, Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    let file = 0..12usize;
    let page = || (0..8u64).prop_map(|page| page * 4096);
    prop_oneof![
        Just(Step::OpenContainer),
        (1..4u32).prop_map(Step::OpenGroup),
        file.clone().prop_map(Step::Close),
        (file.clone(), file.clone()).prop_map(|(a, b)| Step::SetContainer(a, b)),
        file.clone().prop_map(Step::Unset),
        (file.clone(), prop_oneof![Just(1), Just(3)]).prop_map(|(a, b)| Step::SetIommu(a, b)),
        (file.clone(), 1..4u32).prop_map(|(a, b)| Step::Device(a, b)),
        (file.clone(), 1..4i32, page(), page()).prop_map(|(a, b, c, d)| Step::Map(a, b, c, d)),
        (file.clone(), page(), page(), prop_oneof![Just(0), Just(2), Just(4)])
            .prop_map(|(a, b, c, d)| Step::Unmap(a, b, c, d)),
        (file.clone(), 1..4i32, page(), page())
            .prop_map(|(a, b, c, d)| Step::NewAddress(a, b, c, d)),
        (1..4u32, any::<bool>()).prop_map(|(a, b)| Step::Driver(a, b)),
        (file, 0..20u32, proptest::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(a, b, c)| Step::Any(a, b, c)),
    ]
}

/// The machine and the files that are open, as a set of processes would hold them.
struct Run {
    machine: Machine,
    open: Vec<FileId>,
}

impl Run {
    fn nth(&self, nth: usize) -> Option<FileId> {
        (!self.open.is_empty()).then(|| self.open[nth % self.open.len()])
    }

    fn call(&mut self, nth: usize, number: u32, mut arg: CallArg, pid: i32) {
        let Some(file) = self.nth(nth) else { return };
        let caller = Someone { pid, capable: pid == 1, memlock: 6 * 4096 };
        if let Ok(done) = self.machine.ioctl(file, number, &mut arg, &caller) {
            self.open.extend(done.file);
        }
    }

    fn take(&mut self, step: Step) {
        let root = &Someone::ROOT;
        match step {
            Step::OpenContainer => {
                self.open.push(self.machine.open(&Node::Container, root).unwrap());
            }
            Step::OpenGroup(id) => self.open.extend(self.machine.open(&Node::Group(id), root)),
            Step::Close(nth) => {
                if let Some(file) = self.nth(nth) {
                    self.open.retain(|&open| open != file);
                    self.machine.close(file);
                }
            }
            Step::SetContainer(group, container) => {
                let named = self.nth(container).map(Named::File);
                self.call(group, request::GROUP_SET_CONTAINER.number, CallArg::File(named), 1);
            }
            Step::Unset(group) => {
                self.call(group, request::GROUP_UNSET_CONTAINER.number, CallArg::Value(0), 1);
            }
            Step::SetIommu(container, kind) => {
                self.call(container, request::SET_IOMMU.number, CallArg::Value(kind), 1);
            }
            Step::Device(group, id) => {
                let name = format!("0000:01:{:02x}.0", id - 1).into_bytes();
                self.call(group, request::GROUP_GET_DEVICE_FD.number, CallArg::Text(name), 1);
            }
            Step::Map(file, pid, iova, size) => {
                let arg = map_arg(1, 4096, iova, size);
                self.call(file, request::IOMMU_MAP_DMA.number, arg, pid);
            }
            Step::NewAddress(file, pid, iova, size) => {
                let arg = map_arg(4, 8192, iova, size);
                self.call(file, request::IOMMU_MAP_DMA.number, arg, pid);
            }
            Step::Unmap(file, iova, size, flags) => {
                let (iova, size) = if flags == 2 { (0, 0) } else { (iova, size) };
                let arg = unmap_arg(flags, iova, size);
                self.call(file, request::IOMMU_UNMAP_DMA.number, arg, 1);
            }
            Step::Driver(id, bound) => {
                let bdf = format!("0000:01:{:02x}.0", id - 1).parse().unwrap();
                let _ = self.machine.set_driver(bdf, bound.then_some("vfio-pci"));
            }
            Step::Any(file, number, bytes) => {
                let number = request::GET_API_VERSION.number + number;
                self.call(file, number, CallArg::Struct(UserStruct::new(bytes)), 1);
            }
        }
    }

    fn check(&self) {
        let stats = self.machine.stats();
        let pinned: u64 = stats.spaces.iter().map(|space| space.pinned_bytes).sum();
        assert_eq!(pinned, stats.locked.values().sum::<u64>(), "charge is not what is mapped");
        for space in &stats.spaces {
            assert!(space.open || !space.groups.is_empty(), "a container nobody has");
            assert!(space.iommu.is_none() || !space.groups.is_empty(), "an IOMMU without group");
            assert!(space.mappings <= 5);
            assert_eq!(space.mapped_bytes, space.pinned_bytes);
        }
        for (id, group) in &self.machine.groups {
            let open = |&index: &usize| self.machine.devices[index].opens;
            assert_eq!(group.open_devices, group.devices.iter().map(open).sum::<u32>());
            let inside = stats.spaces.iter().filter(|space| space.groups.contains(id)).count();
            assert_eq!(inside, usize::from(group.container.is_some()));
            assert!(group.container.is_none() || group.fd_open || group.open_devices > 0);
        }
        for container in self.machine.containers.values() {
            let Some(type1) = container.type1() else { continue };
            assert!(type1.no_overlap());
        }
    }
}

proptest! {
    #[test]
    fn nothing_overlaps_and_nothing_leaks(steps in proptest::collection::vec(step(), 0..120)) {
        let mut run = Run { machine: machine(Profile::V7_2), open: Vec::new() };
        for step in steps {
            run.take(step);
            run.check();
        }
        for file in std::mem::take(&mut run.open) {
            run.machine.close(file);
        }
        run.check();
        prop_assert!(run.machine.stats().is_idle());
        prop_assert!(run.machine.files.is_empty());
    }
}
