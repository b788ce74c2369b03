//! Random calls on the machine: whatever they are, nothing overlaps, nothing leaks, nobody pays for
//! what is not mapped.

use super::tests::{Someone, machine, map_arg, unmap_arg, words};
use super::*;
use crate::kernel::request;
use proptest::prelude::*;

/// A step of a random run; numbers choose among what is open.
#[derive(Clone, Debug)]
pub(super) enum Step {
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
    OpenIommufd,
    OpenCdev(u32),
    Bind(usize, usize),
    Attach(usize, u32),
    Detach(usize),
    Alloc(usize),
    Destroy(usize, u32),
    IoasMap(usize, i32, u32, u64, u64),
    IoasCopy(usize, [u32; 2], [u64; 3]),
    IoasUnmap(usize, u32, u64, u64),
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
        super::iommufd_properties::step(),
        (file, 0..40u32, proptest::collection::vec(any::<u8>(), 0..64))
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

    /// The nth open file of a kind.
    fn nth_of(&self, kind: fn(&File) -> bool, nth: usize) -> Option<FileId> {
        let fits = |file: &&FileId| self.machine.files.get(file).is_some_and(kind);
        let open: Vec<_> = self.open.iter().filter(fits).copied().collect();
        (!open.is_empty()).then(|| open[nth % open.len()])
    }

    fn iommufd(&self, nth: usize) -> Option<FileId> {
        self.nth_of(|file| matches!(file, File::Iommufd(_)), nth)
    }

    fn cdev(&self, nth: usize) -> Option<FileId> {
        self.nth_of(|file| matches!(file, File::Cdev(_)), nth)
    }

    fn call(&mut self, nth: usize, number: u32, arg: CallArg, pid: i32) {
        self.call_on(self.nth(nth), number, arg, pid);
    }

    fn call_on(&mut self, file: Option<FileId>, number: u32, mut arg: CallArg, pid: i32) {
        let Some(file) = file else { return };
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
            Step::OpenIommufd => {
                self.open.push(self.machine.open(&Node::Iommu, root).unwrap());
            }
            Step::OpenCdev(number) => {
                self.open.extend(self.machine.open(&Node::Cdev(number), root));
            }
            Step::Bind(device, iommufd) => {
                let Some(iommufd) = self.iommufd(iommufd) else { return };
                let fds = vec![(8, Some(Named::File(iommufd)))];
                let CallArg::Struct(user) = words(&[16, 0]) else { return };
                let arg = CallArg::Struct(UserStruct { fds, ..user });
                self.call_on(self.cdev(device), request::DEVICE_BIND_IOMMUFD.number, arg, 1);
            }
            Step::Attach(device, id) => {
                let number = request::DEVICE_ATTACH_IOMMUFD_PT.number;
                self.call_on(self.cdev(device), number, words(&[12, id.into()]), 1);
            }
            Step::Detach(device) => {
                let number = request::DEVICE_DETACH_IOMMUFD_PT.number;
                self.call_on(self.cdev(device), number, words(&[8]), 1);
            }
            Step::Alloc(file) => {
                self.call_on(self.iommufd(file), request::IOAS_ALLOC.number, words(&[12, 0]), 1);
            }
            Step::Destroy(file, id) => {
                let arg = words(&[8 | u64::from(id) << 32]);
                self.call_on(self.iommufd(file), request::IOMMU_DESTROY.number, arg, 1);
            }
            Step::IoasMap(file, pid, id, iova, size) => {
                let arg = words(&[40 | 7 << 32, id.into(), 8192, size, iova]);
                self.call_on(self.iommufd(file), request::IOAS_MAP.number, arg, pid);
            }
            Step::IoasCopy(file, [to, from], [size, to_iova, from_iova]) => {
                let ids = u64::from(to) | u64::from(from) << 32;
                let arg = words(&[40 | 7 << 32, ids, size, to_iova, from_iova]);
                self.call_on(self.iommufd(file), request::IOAS_COPY.number, arg, 1);
            }
            Step::IoasUnmap(file, id, iova, size) => {
                let arg = words(&[24 | u64::from(id) << 32, iova, size]);
                self.call_on(self.iommufd(file), request::IOAS_UNMAP.number, arg, 1);
            }
            Step::Any(file, number, bytes) => {
                let number = request::GET_API_VERSION.number + number;
                self.call(file, number, CallArg::Struct(UserStruct::new(bytes)), 1);
            }
        }
    }

    fn check(&self) {
        let stats = self.machine.stats();
        let type1: u64 = stats.spaces.iter().map(|space| space.pinned_bytes).sum();
        let contexts = self.machine.contexts.values();
        let of_iommufds =
            contexts.flat_map(|context| context.pages.values()).map(|pages| pages.charged_bytes());
        let charged: u64 = stats.locked.values().chain(stats.locked_users.values()).sum();
        assert_eq!(type1 + of_iommufds.sum::<u64>(), charged, "charge is not what is mapped");
        for space in &stats.spaces {
            assert!(space.open || !space.groups.is_empty(), "a container nobody has");
            assert!(space.iommu.is_none() || !space.groups.is_empty(), "an IOMMU without group");
            assert!(space.mappings <= 5);
            assert_eq!(space.mapped_bytes, space.pinned_bytes);
        }
        for (id, group) in &self.machine.groups {
            let devices = || group.devices.iter().map(|&index| &self.machine.devices[index]);
            let from_group = devices().map(|it| it.opens - u32::from(it.bound.is_some()));
            assert_eq!(group.open_devices, from_group.sum::<u32>());
            let bound = devices().any(|device| device.bound.is_some());
            assert!(!bound || !group.file_open(), "a group is used in two ways");
            let inside = stats.spaces.iter().filter(|space| space.groups.contains(id)).count();
            assert_eq!(inside, usize::from(group.container.is_some()));
            assert!(group.container.is_none() || group.fd_open || group.open_devices > 0);
        }
        for (id, context) in &self.machine.contexts {
            super::iommufd_properties::check(&self.machine, *id, context);
        }
        for container in self.machine.containers.values() {
            let Some(type1) = container.type1() else { continue };
            assert!(type1.no_overlap());
        }
    }
}

/// Whatever the steps are: after each all is as it should be, and after the last close nothing is
/// left.
pub(super) fn run(machine: Machine, steps: Vec<Step>) {
    let mut run = Run { machine, open: Vec::new() };
    for step in steps {
        run.take(step);
        run.check();
    }
    for file in std::mem::take(&mut run.open) {
        run.machine.close(file);
        run.check();
    }
    assert!(run.machine.stats().is_idle());
    assert!(run.machine.files.is_empty());
}

proptest! {
    #[test]
    fn nothing_overlaps_and_nothing_leaks(steps in proptest::collection::vec(step(), 0..120)) {
        run(machine(Profile::V7_2), steps);
    }
}
