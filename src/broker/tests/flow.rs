//! What each handout gives, and who can do what with a lease.

use super::*;
use crate::kernel::{Container, Device, DmaMap, Group, Mapped, Node};

/// The nth file of a grant, which must be of this kind.
fn file(world: &World, grant: &Grant, index: usize, kind: FdKind) -> (Arc<dyn Kernel>, OwnedFd) {
    assert_eq!(grant.reply.fds[index].kind, kind);
    (world.sim.kernel(), grant.fds[index].try_clone().unwrap())
}

#[test]
fn a_container_comes_attached_and_works() {
    let world = World::new();
    let grant = world.acquire(1000, &withholding("0000:01:00.1", want(&["0000:01:00.0"]))).unwrap();
    let expected =
        [(FdKind::Container, &*grant.reply.lease), (FdKind::Group, "1"), (FdKind::Lease, "")];
    assert_eq!(kinds(&grant), expected);
    assert_eq!((grant.reply.handout, &*grant.reply.iommu), (Handout::Container, "type1v2"));
    let (kernel, fd) = file(&world, &grant, 0, FdKind::Container);
    let container = Container::from_fd(kernel, fd);
    let (_, memory) = Mapped::memfd(1 << 16).unwrap();
    let flags = DmaMap::READ | DmaMap::WRITE;
    let map = DmaMap { flags, vaddr: memory.vaddr(), iova: 0x10000, size: 1 << 16 };
    container.map(&map).unwrap();
    let (kernel, fd) = file(&world, &grant, 1, FdKind::Group);
    let device = Group::from_fd(kernel, Node::Group(1), fd).device("0000:01:00.0").unwrap();
    assert_eq!(device.pci_ids().unwrap(), (0x10de, 0x2684));
    // What the holder mapped is undone too.
    drop((device, container));
    let held = grant.reply.clone();
    drop(grant);
    assert_eq!(world.stats().spaces[0].mapped_bytes, 1 << 16);
    world.serve_hang_ups();
    assert_eq!(world.release(1000, &held), Err(Error::NoSuchLease { lease: held.lease }));
    world.assert_idle();
}

#[test]
fn a_group_comes_unattached_and_nothing_is_kept() {
    let world = World::new();
    let request = want_as(Handout::Group, &["0000:01:00.0", "0000:01:00.1", "0000:02:00.0"]);
    let grant = world.acquire(1000, &request).unwrap();
    let expected = [(FdKind::Group, "1"), (FdKind::Group, "2"), (FdKind::Lease, "")];
    assert_eq!(kinds(&grant), expected);
    assert_eq!((&*grant.reply.iommu, &*grant.reply.container), ("none", ""));
    let held = grant.reply.clone();
    let busy = world.get_fds(1000, &get_fds(&held));
    assert!(matches!(busy, Err(Error::Kernel { errno, .. }) if errno == libc_ebusy()), "{busy:?}");
    drop(grant);
    assert_eq!(world.stats().groups, 0);
    world.serve_hang_ups();
    world.assert_idle();
}

fn libc_ebusy() -> i32 {
    nix::Error::EBUSY as i32
}

#[test]
fn devices_come_alone_and_the_companions_stay_out_of_reach() {
    let world = World::new();
    let withhold = Some(specs(&["0000:01:00.1"]));
    let request = Acquire { withhold, ..want_as(Handout::Devices, &["0000:01:00.0"]) };
    let grant = world.acquire(1000, &request).unwrap();
    assert_eq!(kinds(&grant), [(FdKind::Device, "0000:01:00.0"), (FdKind::Lease, "")]);
    let (kernel, fd) = file(&world, &grant, 0, FdKind::Device);
    let device = Device::from_fd(kernel, "0000:01:00.0", fd);
    assert_eq!(device.pci_ids().unwrap(), (0x10de, 0x2684));
    let list = world.broker.leases(&caller(1000)).unwrap().leases;
    assert_eq!(list[0].withheld, ["0000:01:00.1"]);
    let busy = world.acquire(1000, &want_as(Handout::Devices, &["0000:01:00.1"])).unwrap_err();
    assert!(matches!(busy, Error::Busy { holder: Some(_), .. }), "{busy}");
    drop(device);
    let held = grant.reply.clone();
    drop(grant.fds);
    assert_eq!(world.release(1000, &held), Ok(true));
    world.assert_idle();
}

#[test]
fn further_devices_join_the_lease_and_its_group_is_opened_once() {
    let world = World::new();
    let first = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let unnamed = world.acquire(1000, &more(&first.reply, &["0000:01:00.1"])).unwrap_err();
    assert!(matches!(unnamed, Error::Unnamed { group: 1, .. }), "{unnamed}");
    let both = more(&first.reply, &["0000:01:00.0", "0000:01:00.1"]);
    let second = world.acquire(1000, &both).unwrap();
    assert_eq!((&second.reply.lease, &second.reply.key), (&first.reply.lease, &first.reply.key));
    assert_eq!(kinds(&second), [(FdKind::Group, "1"), (FdKind::Lease, "")]);
    let third = world.acquire(1000, &more(&first.reply, &["0000:08:00.0"])).unwrap();
    assert_eq!(kinds(&third), [(FdKind::Group, "8"), (FdKind::Lease, "")]);
    let stats = world.stats();
    assert_eq!((stats.groups, stats.containers), (3, 1));
    assert_eq!(stats.spaces[0].groups, [2, 1, 8]);
    let list = world.broker.leases(&caller(1000)).unwrap().leases;
    let devices = ["0000:02:00.0", "0000:01:00.0", "0000:01:00.1", "0000:08:00.0"];
    assert_eq!(list[0].devices, devices);
    // It lives as long as any of its lifelines.
    let held = first.reply.clone();
    drop((first, third));
    world.serve_hang_ups();
    assert_eq!(world.broker.leases(&caller(1000)).unwrap().leases.len(), 1);
    drop(second);
    world.serve_hang_ups();
    assert_eq!(world.get_fds(1000, &get_fds(&held)).unwrap_err(), gone(&held));
    world.assert_idle();
    use EventKind::{Acquired, Extended, Gone, Reclaimed};
    let kinds: Vec<_> = world.events().into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, [Acquired, Extended, Extended, Gone, Reclaimed]);
}

fn gone(held: &Acquired) -> Error {
    Error::NoSuchLease { lease: held.lease.clone() }
}

#[test]
fn get_fds_gives_one_file_alone_while_others_are_in_use() {
    let world = World::new();
    let two = want_as(Handout::Group, &["0000:01:00.0", "0000:01:00.1", "0000:02:00.0"]);
    let mut grant = world.acquire(1000, &two).unwrap();
    let ask = |kind, name: Option<&str>| {
        let name = name.map(str::to_owned);
        let one = GetFds { lifeline: Some(false), kind: Some(kind), name, ..get_fds(&grant.reply) };
        world.get_fds(1000, &one)
    };
    let busy = |result: Result<_, Error>| matches!(result, Err(Error::Kernel { errno: 16, .. }));
    assert!(busy(ask(FdKind::Group, Some("2"))), "the holder has it open");
    assert!(busy(ask(FdKind::Group, None)));
    let second = grant.reply.fds.iter().find(|fd| fd.name == "2").unwrap().index;
    drop(grant.fds.remove(second));
    let (fds, files) = ask(FdKind::Group, Some("2")).unwrap();
    assert_eq!((fds.fds.len(), &*fds.fds[0].name, files.len()), (1, "2", 1));
    assert!(busy(ask(FdKind::Group, Some("2"))), "it was given as an open file of its own");
    // A container is nobody's until groups are attached to it.
    let (fds, files) = ask(FdKind::Container, None).unwrap();
    assert_eq!((fds.fds[0].kind, files.len()), (FdKind::Container, 1));
    assert_eq!(ask(FdKind::Group, Some("7")).unwrap().1.len(), 0);
    assert_eq!(world.stats().containers, 1);
}

#[test]
fn get_fds_gives_the_same_files_again() {
    let world = World::new();
    let grant = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let before = world.stats();
    let (fds, files) = world.get_fds(1000, &get_fds(&grant.reply)).unwrap();
    let kinds: Vec<_> = fds.fds.iter().map(|fd| fd.kind).collect();
    assert_eq!(kinds, [FdKind::Container, FdKind::Group, FdKind::Lease]);
    assert_eq!(world.stats(), before);
    let alone = GetFds { lifeline: Some(false), ..get_fds(&grant.reply) };
    let (fds, without) = world.get_fds(1000, &alone).unwrap();
    let kinds: Vec<_> = fds.fds.iter().map(|fd| fd.kind).collect();
    assert_eq!(kinds, [FdKind::Container, FdKind::Group]);
    let group = GetFds { kind: Some(FdKind::Group), ..alone };
    let (fds, _) = world.get_fds(1000, &group).unwrap();
    assert_eq!((fds.fds.len(), fds.fds[0].kind), (1, FdKind::Group));
    drop(without);
    let held = grant.reply.clone();
    drop(grant);
    world.serve_hang_ups();
    assert_eq!(world.broker.leases(&caller(1000)).unwrap().leases.len(), 1);
    drop(files);
    world.serve_hang_ups();
    assert_eq!(world.get_fds(1000, &get_fds(&held)).unwrap_err(), gone(&held));
    let grant = world.acquire(1000, &want_as(Handout::Devices, &["0000:02:00.0"])).unwrap();
    let (fds, files) = world.get_fds(1000, &get_fds(&grant.reply)).unwrap();
    assert_eq!(fds.fds[0].name, "0000:02:00.0");
    drop((grant, files));
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_wrong_key_and_no_lease_are_the_same() {
    let world = World::new();
    let held = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let Acquired { lease, key, .. } = held.reply.clone();
    for (name, key) in [
        (lease.clone(), "0".repeat(32)),
        (lease.clone(), String::new()),
        ("0123456789abcdef".into(), key.clone()),
        (lease.to_uppercase() + "x", key.clone()),
        (format!("+{}", &lease[1..]), key.clone()),
    ] {
        for uid in [1000, 1001, 1002] {
            let release = Release { lease: name.clone(), key: key.clone() };
            let error = world.ask_release(uid, &release).unwrap_err();
            assert_eq!(error, Error::NoSuchLease { lease: name.clone() });
        }
    }
    // The key is authority for whoever could have acquired the lease.
    for uid in [1003, 1004] {
        let error = world.release(uid, &held.reply).unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{error}");
    }
    assert_eq!(world.release(1001, &held.reply), Ok(false));
    drop(held);
    world.retry_reclaims();
    world.assert_idle();
}

#[test]
fn a_manager_needs_no_key_for_its_own_tenant() {
    let world = World::new();
    let own = world.acquire(1002, &want(&["0000:02:00.0"])).unwrap();
    let other = world.acquire(1000, &want(&["0000:08:00.0"])).unwrap();
    let mut held = other.reply.clone();
    held.key.clear();
    assert_eq!(world.release(1002, &held), Err(gone(&held)));
    let mut held = own.reply.clone();
    held.key.clear();
    drop(own.fds);
    assert_eq!(world.release(1002, &held), Ok(true));
    drop(other);
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_manager_with_a_wrong_key_is_no_better_than_others() {
    let world = World::new();
    let own = world.acquire(1002, &want(&["0000:02:00.0"])).unwrap();
    let mut forged = own.reply.clone();
    forged.key = "0".repeat(32);
    assert_eq!(world.release(1002, &forged), Err(gone(&forged)));
    let mut joining = want(&["0000:08:00.0"]);
    (joining.lease, joining.key) = (Some(forged.lease.clone()), Some(forged.key.clone()));
    assert_eq!(world.acquire(1002, &joining).unwrap_err(), gone(&forged));
    drop(own);
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn busy_names_the_holder_to_those_who_may_know() {
    let world = World::new();
    let held = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let Error::Busy { holder: Some(holder), since: Some(_), .. } =
        world.acquire(1001, &want(&["0000:02:00.0"])).unwrap_err()
    else {
        panic!("an observer is told")
    };
    assert_eq!((holder.lease, holder.uid, holder.pid), (held.reply.lease.clone(), 1000, 11_000));
    let stranger = world.acquire(1002, &want(&["0000:02:00.0"])).unwrap_err();
    let device = "0000:02:00.0".to_owned();
    assert_eq!(stranger, Error::Busy { device, holder: None, since: None, open_in: None });
    let own = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap_err();
    assert!(matches!(own, Error::Busy { holder: Some(_), .. }));
    let seen = |uid| world.broker.leases(&caller(uid)).unwrap().leases.len();
    assert_eq!([seen(1000), seen(1001), seen(1002)], [1, 1, 0]);
    assert!(matches!(world.broker.leases(&caller(1004)), Err(Error::Denied { .. })));
}

#[test]
fn the_topology_shows_what_one_may_have() {
    let world = World::new();
    let held = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let ids = |uid| -> Vec<_> {
        let groups = world.broker.topology(&caller(uid)).unwrap().groups;
        groups.iter().map(|group| group.id).collect()
    };
    assert_eq!(ids(1001), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(ids(1002), [2, 8]);
    let groups = world.broker.topology(&caller(1001)).unwrap().groups;
    assert_eq!(groups[1].devices[0].lease.as_ref(), Some(&held.reply.lease));
    assert_eq!(groups[1].state, crate::protocol::GroupState::Held);
    assert!(!groups[3].viable && groups[3].blockers[0].bdf == "0000:04:00.1");
    assert_eq!(groups[3].blockers[0].fix, None, "who only looks is not told how to take it");
    assert!(groups[2].devices[0].vfio && !groups[2].devices[1].vfio);
    let theirs = world.broker.topology(&caller(1000)).unwrap().groups;
    let blocker = theirs.iter().find_map(|group| group.blockers.first()).unwrap();
    assert!(blocker.fix.as_ref().unwrap().starts_with("simulated:"));
    let hidden = world.broker.topology(&caller(1002)).unwrap().groups;
    assert_eq!(hidden[0].devices[0].lease, None);
}

#[test]
fn an_administrator_sees_all_groups_without_being_a_tenant_and_gets_none() {
    let world = World::new();
    let held = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let groups = world.broker.topology(&caller(0)).unwrap().groups;
    assert_eq!(groups.iter().map(|group| group.id).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(groups[1].devices[0].lease.as_ref(), Some(&held.reply.lease));
    assert!(groups[3].blockers[0].fix.is_some(), "whose host it is, is told how to take it");
    let denied = world.acquire(0, &want(&["0000:03:00.0"])).unwrap_err();
    assert!(matches!(denied, Error::Denied { .. }), "{denied}");
    assert!(world.broker.topology(&caller(4242)).is_err(), "nobody's tenant, and no administrator");
}

#[test]
fn a_lifeline_that_is_refused_leaves_nothing() {
    let policy = "version = 1\n[[tenant]]\nname = \"a\"\nuser = 1000\ndevices = [\"8086:10d3\"]\n\
                  limits = { fds = 4 }\n";
    let world = World::of(MACHINE, policy);
    // A container, a group and a lifeline are three.
    let grant = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let again = || world.get_fds(1000, &get_fds(&grant.reply));
    let fourth = again().unwrap();
    let before = world.stats();
    let limit = "fds".to_owned();
    assert_eq!(again().unwrap_err(), Error::OverLimit { limit, most: 4, asked: 5 });
    assert_eq!((world.stats(), world.lifelines()), (before, 2));
    drop((grant, fourth));
    world.serve_hang_ups();
    world.assert_idle();
}
