//! The state machine alone: a caller made of plain values, and what the kernel says to it.

use super::*;
use crate::kernel::request;

/// A caller whose memory is everything below 2^47 except for page 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Someone {
    pub(super) pid: i32,
    pub(super) capable: bool,
    pub(super) memlock: u64,
}

impl Someone {
    pub(super) const ROOT: Someone = Someone { pid: 1, capable: true, memlock: 0 };
}

impl Caller for Someone {
    fn keep(&self) -> Arc<dyn Caller + Send + Sync> {
        Arc::new(*self)
    }

    fn mm(&self) -> Mm {
        Mm { pid: self.pid, started: 0 }
    }

    fn uid(&self) -> u32 {
        0
    }

    fn capable(&self, _: Capability) -> bool {
        self.capable
    }

    fn memlock(&self) -> u64 {
        self.memlock
    }

    fn accessible(&self, start: u64, len: u64, _: bool) -> u64 {
        if start < 4096 { 0 } else { len.min((1u64 << 47).saturating_sub(start)) }
    }
}

pub(super) fn machine(kernel: Profile) -> Machine {
    let text = r#"
        kernel = "6.12"
        cdev = true
        aperture = [0, 0x7fffffffff]
        dma_entry_limit = 5
        [[group]]
        id = 1
        repeat = 3
        step = "device"
        [[group.device]]
        bdf = "0000:01:00.0"
        vendor = 0x8086
        device = 0x10d3
        driver = "vfio-pci"
    "#;
    Machine::new(Topology::from_toml(text).unwrap().with_kernel(kernel), 0)
}

pub(super) fn words(fields: &[u64]) -> CallArg {
    // argsz and flags share the first of the fields that are 64 bits wide.
    CallArg::Struct(UserStruct::new(fields.iter().flat_map(|it| it.to_ne_bytes()).collect()))
}

pub(super) fn map_arg(flags: u64, vaddr: u64, iova: u64, size: u64) -> CallArg {
    words(&[32 | flags << 32, vaddr, iova, size])
}

pub(super) fn unmap_arg(flags: u64, iova: u64, size: u64) -> CallArg {
    words(&[24 | flags << 32, iova, size])
}

/// A container with group 1 in it and an IOMMU set.
fn ready(machine: &mut Machine, kind: u64) -> (FileId, FileId) {
    let root = &Someone::ROOT;
    let group = machine.open(&Node::Group(1), root).unwrap();
    let container = machine.open(&Node::Container, root).unwrap();
    let mut named = CallArg::File(Some(Named::File(container)));
    machine.ioctl(group, request::GROUP_SET_CONTAINER.number, &mut named, root).unwrap();
    let mut kind = CallArg::Value(kind);
    machine.ioctl(container, request::SET_IOMMU.number, &mut kind, root).unwrap();
    (group, container)
}

fn map(machine: &mut Machine, file: FileId, mut arg: CallArg, caller: &Someone) -> Errno {
    let done = machine.ioctl(file, request::IOMMU_MAP_DMA.number, &mut arg, caller);
    done.err().unwrap_or(Errno::UnknownErrno)
}

/// Returns the bytes that were unmapped.
fn unmap(machine: &mut Machine, file: FileId, mut arg: CallArg) -> Result<u64, Errno> {
    let number = request::IOMMU_UNMAP_DMA.number;
    machine.ioctl(file, number, &mut arg, &Someone::ROOT)?;
    let CallArg::Struct(user) = arg else { panic!() };
    Ok(user.u64(16))
}

const OK: Errno = Errno::UnknownErrno;
const PAGE: u64 = 4096;
const READ: u64 = 1;

#[test]
fn the_checks_of_map_come_in_order() {
    for kernel in Profile::ALL {
        let machine = &mut machine(kernel);
        let (_group, file) = ready(machine, 3);
        let root = &Someone::ROOT;
        let overflow = if kernel == Profile::V7_2 { Errno::EOVERFLOW } else { Errno::EINVAL };
        let top = u64::MAX - PAGE + 1;
        for (arg, expected) in [
            (map_arg(8, PAGE, 0, PAGE), Errno::EINVAL),
            (map_arg(READ, PAGE, 0, 0), Errno::EINVAL),
            (map_arg(READ, PAGE, top, 2 * PAGE), overflow),
            (map_arg(READ, top, 0, 2 * PAGE), overflow),
            (map_arg(0, PAGE, 0, PAGE), Errno::EINVAL),
            (map_arg(READ, PAGE + 1, 0, PAGE), Errno::EINVAL),
            (map_arg(READ, PAGE, 0, PAGE), OK),
            (map_arg(READ, PAGE, 0, PAGE), Errno::EEXIST),
            (map_arg(READ, PAGE, 0xfee0_0000, PAGE), Errno::EINVAL),
            (map_arg(READ, PAGE, 1 << 40, PAGE), Errno::EINVAL),
            (map_arg(READ, 0, 2 * PAGE, PAGE), Errno::EFAULT),
            (map_arg(4, PAGE, 2 * PAGE, PAGE), Errno::ENOENT),
            (map_arg(4, PAGE, 0, PAGE), Errno::EINVAL),
        ] {
            assert_eq!(map(machine, file, arg, root), expected);
        }
        for nth in 1..5 {
            assert_eq!(map(machine, file, map_arg(READ, PAGE, nth * PAGE, PAGE), root), OK);
        }
        let full = map_arg(READ, PAGE, 16 * PAGE, PAGE);
        assert_eq!(map(machine, file, full, root), Errno::ENOSPC);
    }
}

#[test]
fn version_one_and_two_unmap_differently() {
    let parts = |machine: &mut Machine, file| {
        assert_eq!(map(machine, file, map_arg(READ, PAGE, 0, 4 * PAGE), &Someone::ROOT), OK);
        let middle = unmap(machine, file, unmap_arg(0, PAGE, PAGE));
        let start = unmap(machine, file, unmap_arg(0, 0, PAGE));
        (middle, start)
    };
    let mut first = machine(Profile::V6_12);
    let (_group, file) = ready(&mut first, 1);
    assert_eq!(parts(&mut first, file), (Ok(0), Ok(4 * PAGE)));
    let mut second = machine(Profile::V6_12);
    let (_group, file) = ready(&mut second, 3);
    assert_eq!(parts(&mut second, file), (Err(Errno::EINVAL), Err(Errno::EINVAL)));
    assert_eq!(unmap(&mut second, file, unmap_arg(2, 0, 0)), Ok(4 * PAGE));
    assert_eq!(unmap(&mut second, file, unmap_arg(2, 0, 0)), Ok(0));
}

#[test]
fn a_limit_comes_before_a_hole() {
    let machine = &mut machine(Profile::V6_12);
    let (_group, file) = ready(machine, 3);
    let poor = &Someone { pid: 7, capable: false, memlock: 3 * PAGE };
    let end = (1 << 47) - 4 * PAGE;
    assert_eq!(map(machine, file, map_arg(READ, end, 0, 5 * PAGE), poor), Errno::ENOMEM);
    assert_eq!(map(machine, file, map_arg(READ, end + PAGE, 0, 5 * PAGE), poor), Errno::EFAULT);
    assert!(machine.stats().locked.is_empty());
    assert_eq!(map(machine, file, map_arg(READ, PAGE, 0, 3 * PAGE), poor), OK);
    assert_eq!(map(machine, file, map_arg(READ, PAGE, 1 << 20, PAGE), poor), Errno::ENOMEM);
    assert_eq!(map(machine, file, map_arg(READ, PAGE, 1 << 20, PAGE), &Someone::ROOT), OK);
    assert_eq!(machine.stats().locked, [(1, PAGE), (7, 3 * PAGE)].into());
}

#[test]
fn a_new_address_moves_the_charge() {
    let machine = &mut machine(Profile::V6_12);
    let (_group, file) = ready(machine, 3);
    let heir = &Someone { pid: 9, capable: false, memlock: PAGE };
    assert_eq!(map(machine, file, map_arg(READ, PAGE, 0, 2 * PAGE), &Someone::ROOT), OK);
    assert_eq!(unmap(machine, file, unmap_arg(4, 0, 2 * PAGE)), Ok(2 * PAGE));
    assert_eq!(unmap(machine, file, unmap_arg(4, 0, 2 * PAGE)), Err(Errno::EINVAL));
    assert_eq!(map(machine, file, map_arg(4, PAGE, 0, 2 * PAGE), heir), Errno::ENOMEM);
    let heir = &Someone { memlock: 2 * PAGE, ..*heir };
    assert_eq!(map(machine, file, map_arg(4, PAGE, 0, 2 * PAGE), heir), OK);
    assert_eq!(machine.stats().locked, [(9, 2 * PAGE)].into());
}

/// Opens a device by the text that is given to `VFIO_GROUP_GET_DEVICE_FD`.
fn get(machine: &mut Machine, group: FileId, text: &str) -> Result<FileId, Errno> {
    let mut arg = CallArg::Text(text.as_bytes().to_vec());
    let number = request::GROUP_GET_DEVICE_FD.number;
    let done = machine.ioctl(group, number, &mut arg, &Someone::ROOT)?;
    Ok(done.file.unwrap())
}

/// A machine whose PF (group 1) and VF (group 2) are both on VFIO, with their groups attached.
fn pf_and_vf() -> (Machine, FileId, FileId) {
    let text = r#"
        kernel = "6.12"
        [[group]]
        id = 1
        [[group.device]]
        bdf = "0000:81:00.0"
        vendor = 0x8086
        device = 0x10c9
        driver = "vfio-pci"
        total_vfs = 7
        vf_token = "00000000-0000-0000-0000-000000000001"
        [[group]]
        id = 2
        [[group.device]]
        bdf = "0000:81:10.0"
        vendor = 0x8086
        device = 0x10ca
        driver = "vfio-pci"
        physfn = "0000:81:00.0"
    "#;
    let mut machine = Machine::new(Topology::from_toml(text).unwrap(), 0);
    let root = &Someone::ROOT;
    let (pf, container) = ready(&mut machine, 3);
    let vf = machine.open(&Node::Group(2), root).unwrap();
    let mut named = CallArg::File(Some(Named::File(container)));
    machine.ioctl(vf, request::GROUP_SET_CONTAINER.number, &mut named, root).unwrap();
    (machine, pf, vf)
}

#[test]
fn a_vf_wants_the_token_of_its_pf() {
    const PF: &str = "0000:81:00.0";
    const VF: &str = "0000:81:10.0";
    const ONE: &str = "vf_token=00000000-0000-0000-0000-000000000001";
    const TWO: &str = "vf_token=00000000-0000-0000-0000-000000000002";
    let (machine, pf, vf) = &mut pf_and_vf();
    let with = |name: &str, token: &str| format!("{name} {token}");
    assert_eq!(get(machine, *vf, VF), Err(Errno::EACCES));
    assert_eq!(get(machine, *vf, &with(VF, TWO)), Err(Errno::EACCES));
    let open = get(machine, *vf, &with(VF, ONE)).unwrap();
    // While a VF is open its PF wants the token too; once none is, it sets it.
    assert_eq!(get(machine, *pf, PF), Err(Errno::EACCES));
    assert_eq!(get(machine, *pf, &with(PF, TWO)), Err(Errno::EACCES));
    let held = get(machine, *pf, &with(PF, ONE)).unwrap();
    machine.close(held);
    machine.close(open);
    let held = get(machine, *pf, &with(PF, TWO)).unwrap();
    machine.close(held);
    assert_eq!(get(machine, *vf, &with(VF, ONE)), Err(Errno::EACCES));
    assert!(get(machine, *vf, &with(VF, TWO)).is_ok());
}

#[test]
fn a_vf_by_its_own_node_wants_the_token_on_newer_kernels_only() {
    let root = &Someone::ROOT;
    let (wrong, right) = (Some(2), Some(1));
    for (kernel, expected) in [
        (Profile::V6_12, [Some(Errno::EINVAL), Some(Errno::EINVAL), None]),
        (Profile::V7_2, [Some(Errno::EACCES), None, Some(Errno::EINVAL)]),
    ] {
        let (older, ..) = pf_and_vf();
        let topology = Topology { cdev: Some(true), ..older.topology().clone() };
        let machine = &mut Machine::new(topology.with_kernel(kernel), 0);
        let iommufd = machine.open(&Node::Iommu, root).unwrap();
        let device = machine.open(&Node::Cdev(1), root).unwrap();
        let mut bind = |token: Option<u8>| {
            let mut bytes = vec![0; 24];
            bytes[0] = if token.is_some() { 24 } else { 16 };
            bytes[4] = u8::from(token.is_some());
            let token = token.map(|last| [&[0; 15][..], &[last]].concat());
            let fds = vec![(8, Some(Named::File(iommufd)))];
            let mut arg = CallArg::Struct(UserStruct { bytes, fds, out: token });
            machine.ioctl(device, request::DEVICE_BIND_IOMMUFD.number, &mut arg, root).err()
        };
        // 7.2 has it bound by the time of the last one; 6.12 wants no token and knows none.
        assert_eq!([bind(wrong), bind(right), bind(None)], expected, "{kernel:?}");
    }
}

#[test]
fn a_bus_reset_wants_every_group_it_hits() {
    let machine = &mut machine(Profile::V6_12);
    let root = &Someone::ROOT;
    let (group, container) = ready(machine, 3);
    let device = get(machine, group, "0000:01:00.0").unwrap();
    let second = machine.open(&Node::Group(2), root).unwrap();
    let third = machine.open(&Node::Group(3), root).unwrap();
    let mut reset = |files: &[FileId]| {
        let mut bytes = vec![0; 12 + 4 * files.len()];
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        bytes[8..12].copy_from_slice(&(files.len() as u32).to_ne_bytes());
        let named = files.iter().zip((12..).step_by(4));
        let fds = named.map(|(file, at)| (at, Some(Named::File(*file)))).collect();
        let mut arg = CallArg::Struct(UserStruct { bytes, fds, out: None });
        machine.ioctl(device, request::DEVICE_PCI_HOT_RESET.number, &mut arg, root).err()
    };
    assert_eq!(reset(&[group]), Some(Errno::EINVAL));
    assert_eq!(reset(&[group, second]), Some(Errno::EINVAL));
    assert_eq!(reset(&[group, second, container]), Some(Errno::EINVAL));
    assert_eq!(reset(&[group, second, third]), None);
}
