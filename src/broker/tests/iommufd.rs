//! Leases by iommufd: what is handed out, and who can have a device after one.

use super::*;
use crate::kernel::{Device, Group, IoasMap, Iommufd, MapFlags, Mapped, Node};
use crate::protocol::{Backend, GroupState};
use crate::sim::Fault;
use nix::errno::Errno;

const NIC: &str = "0000:02:00.0";

fn iommufd(world: &World, grant: &Grant) -> Iommufd {
    let at = grant.reply.fds.iter().position(|fd| fd.kind == FdKind::Iommufd).unwrap();
    Iommufd::from_fd(world.sim.kernel(), grant.fds[at].try_clone().unwrap())
}

fn cdev(world: &World, grant: &Grant, bdf: &str) -> Device {
    let named = |fd: &crate::protocol::Fd| fd.kind == FdKind::Cdev && fd.name == bdf;
    let at = grant.reply.fds.iter().position(named).unwrap();
    Device::from_fd(world.sim.kernel(), bdf, grant.fds[at].try_clone().unwrap())
}

fn by_iommufd(devices: &[&str]) -> Acquire {
    want_as(Handout::Iommufd, devices)
}

fn ended(world: &World, grant: Grant) {
    drop(grant);
    world.serve_hang_ups();
}

fn unproved(world: &World, uid: u32, id: u32) -> (GroupState, Option<crate::protocol::Unproved>) {
    let groups = world.broker.topology(&caller(uid)).unwrap().groups;
    let group = groups.into_iter().find(|group| group.id == id).unwrap();
    (group.state, group.unproved)
}

#[test]
fn an_iommufd_and_unbound_cdevs_come_and_work() {
    let world = World::new();
    let grant = world.acquire(1000, &by_iommufd(&["0000:01:00.0", NIC])).unwrap();
    let expected = [
        (FdKind::Iommufd, ""),
        (FdKind::Cdev, "0000:01:00.0"),
        (FdKind::Cdev, NIC),
        (FdKind::Lease, ""),
    ];
    assert_eq!(kinds(&grant), expected);
    let reply = &grant.reply;
    assert_eq!((reply.backend, reply.handout), (Backend::Iommufd, Handout::Iommufd));
    assert_eq!((&*reply.iommu, &*reply.container), ("none", ""));
    let stats = world.stats();
    assert_eq!((stats.groups, stats.containers, stats.cdevs, stats.open_iommufds), (0, 0, 2, 1));
    assert!(stats.iommufds[0].per_process, "pinned memory would be charged to the user");
    let (iommufd, device) = (iommufd(&world, &grant), cdev(&world, &grant, NIC));
    device.bind_iommufd(&iommufd).unwrap();
    let ioas = iommufd.ioas_alloc().unwrap();
    device.attach_iommufd_pt(ioas).unwrap();
    let (_, memory) = Mapped::memfd(1 << 16).unwrap();
    let flags = MapFlags::FIXED_IOVA | MapFlags::READ | MapFlags::WRITE;
    let map = IoasMap { flags, vaddr: memory.vaddr(), size: 1 << 16, iova: 0 };
    iommufd.ioas_map(ioas, &map).unwrap();
    assert_eq!(device.pci_ids().unwrap(), (0x8086, 0x10d3));
    let list = world.broker.leases(&caller(1000)).unwrap().leases;
    assert_eq!((list[0].backend, list[0].mapped_bytes), (Backend::Iommufd, None));
    drop((iommufd, device));
    ended(&world, grant);
    assert!(world.stats().is_idle(), "{:#?}", world.stats());
}

#[test]
fn further_devices_come_for_the_iommufd_that_the_holder_has() {
    let world = World::new();
    let first = world.acquire(1000, &by_iommufd(&["0000:01:00.0"])).unwrap();
    let (iommufd, device) = (iommufd(&world, &first), cdev(&world, &first, "0000:01:00.0"));
    device.bind_iommufd(&iommufd).unwrap();
    // One beside the first, which is bound, and one of another group.
    let add = more(&first.reply, &["0000:01:00.1", NIC]);
    let second = world.acquire(1000, &add).unwrap();
    let expected = [(FdKind::Cdev, "0000:01:00.1"), (FdKind::Cdev, NIC), (FdKind::Lease, "")];
    assert_eq!(kinds(&second), expected);
    assert_eq!(second.reply.backend, Backend::Iommufd);
    for bdf in ["0000:01:00.1", NIC] {
        cdev(&world, &second, bdf).bind_iommufd(&iommufd).unwrap();
    }
    for (field, other) in [
        ("backend", Acquire { backend: Some(Backend::Type1), ..add.clone() }),
        ("handout", Acquire { handout: Some(Handout::Container), ..add.clone() }),
    ] {
        let error = world.acquire(1000, &other).unwrap_err();
        let named = matches!(&error, Error::Conflict { what, .. } if what == field);
        assert!(named, "{error}");
    }
    let again = world.acquire(1000, &add).unwrap_err();
    assert!(matches!(&again, Error::Conflict { what, .. } if what == "0000:01:00.1"), "{again}");
    drop((iommufd, device));
    drop(first);
    ended(&world, second);
    assert!(world.stats().is_idle());
}

#[test]
fn what_does_not_go_together_is_said() {
    let world = World::new();
    let with = |backend, handout| Acquire { backend, handout, ..want(&[NIC]) };
    let field = |request: &Acquire| match world.acquire(1000, request).unwrap_err() {
        Error::BadRequest { field, .. } => field,
        error => panic!("{error}"),
    };
    let crossed = with(Some(Backend::Type1), Some(Handout::Iommufd));
    assert_eq!(field(&crossed), "handout");
    assert_eq!(field(&with(Some(Backend::Iommufd), Some(Handout::Group))), "handout");
    let shared = |request| Acquire { container: Some("pool".into()), ..request };
    assert_eq!(field(&shared(with(Some(Backend::Iommufd), None))), "container");
    assert_eq!(field(&shared(with(None, Some(Handout::Iommufd)))), "container");
    let token = Some("00112233-4455-6677-8899-aabbccddeeff".to_owned());
    assert_eq!(field(&Acquire { vf_token: token, ..by_iommufd(&["0000:05:00.0"]) }), "vf_token");
    let denied = world.acquire(1002, &by_iommufd(&[NIC])).unwrap_err();
    assert!(matches!(denied, Error::Denied { .. }), "{denied}");
    world.assert_idle();
}

#[test]
fn nothing_is_kept_so_nothing_is_mapped_or_given_again() {
    let world = World::new();
    let grant = world.acquire(1000, &by_iommufd(&[NIC])).unwrap();
    let unsupported = |error: &Error| matches!(error, Error::Unsupported { .. });
    let again = world.get_fds(1000, &get_fds(&grant.reply)).unwrap_err();
    assert!(unsupported(&again) && again.to_string().contains("keeps no copies"), "{again}");
    // What is named is opened anew.
    let ask = |kind, name: Option<&str>| {
        let name = name.map(str::to_owned);
        let kind = Some(kind);
        let one = GetFds { lifeline: Some(false), kind, name, ..get_fds(&grant.reply) };
        world.get_fds(1000, &one).unwrap()
    };
    let fresh = [ask(FdKind::Iommufd, None), ask(FdKind::Cdev, Some(NIC))];
    let stats = world.stats();
    assert_eq!((stats.cdevs, stats.open_iommufds), (2, 2));
    assert!(stats.iommufds.iter().all(|iommufd| iommufd.per_process));
    assert_eq!(ask(FdKind::Cdev, Some("0000:01:00.0")).1.len(), 0, "of another lease, or of none");
    drop(fresh);
    let map = world.map(1000, &grant.reply, 0, 4096).unwrap_err();
    assert!(unsupported(&map) && map.to_string().contains("IOMMU_IOAS_MAP"), "{map}");
    assert!(unsupported(&world.unmap(1000, &grant.reply, 0, 4096).unwrap_err()));
    ended(&world, grant);
}

#[test]
fn the_policys_first_backend_that_the_host_can_do_is_taken() {
    let world = |machine: &str, handouts: &str| {
        let policy = format!(
            "version = 1\n[[tenant]]\nname = \"a\"\nuser = 1000\ndevices = [\"8086:10d3\"]\n\
             handouts = [{handouts}]\n"
        );
        World::of(machine, &policy)
    };
    let without = MACHINE.replace("owner_rights", "cdev = false\nowner_rights");
    let both = "\"iommufd\", \"group\"";
    let handout = |world: &World, request: &Acquire| {
        world.acquire(1000, request).map(|grant| (grant.reply.backend, grant.reply.handout))
    };
    let any = want(&[NIC]);
    let first = handout(&world(MACHINE, both), &any);
    assert_eq!(first, Ok((Backend::Iommufd, Handout::Iommufd)));
    let first = handout(&world(&without, both), &any);
    assert_eq!(first, Ok((Backend::Type1, Handout::Group)));
    let first = handout(&world(MACHINE, "\"devices\", \"iommufd\""), &any);
    assert_eq!(first, Ok((Backend::Type1, Handout::Devices)));
    let first = handout(
        &world(MACHINE, "\"devices\", \"iommufd\""),
        &Acquire { backend: Some(Backend::Iommufd), ..any.clone() },
    );
    assert_eq!(first, Ok((Backend::Iommufd, Handout::Iommufd)));
    // What is asked for, or all there is, is not replaced.
    let asked = Acquire { backend: Some(Backend::Iommufd), ..any.clone() };
    for (handouts, request) in [(both, &asked), (both, &by_iommufd(&[NIC])), ("\"iommufd\"", &any)]
    {
        let error = handout(&world(&without, handouts), request).unwrap_err();
        let named = matches!(&error, Error::Unsupported { what, .. } if what == "backend iommufd");
        assert!(named && error.to_string().contains("/dev/iommu"), "{error}");
    }
}

#[test]
fn the_same_tenant_has_it_again_and_no_other() {
    let world = World::new();
    let grant = world.acquire(1000, &by_iommufd(&[NIC])).unwrap();
    let lease = grant.reply.lease.clone();
    let stale = cdev(&world, &grant, NIC);
    ended(&world, grant);
    assert!(!world.has_pending_reclaims());
    for request in [want(&[NIC]), by_iommufd(&[NIC]), want_as(Handout::Group, &[NIC])] {
        let error = world.acquire(1001, &request).unwrap_err();
        let advice = advice(&error).unwrap();
        assert!(advice.contains(&format!("{NIC}/driver/unbind")), "{advice}");
        assert!(advice.contains(&format!("`vfio-broker confirm {NIC}`")), "{advice}");
        let Error::Quarantined { until, device, unbind, holder, .. } = error else {
            panic!("{error}")
        };
        assert_eq!((until, &*device, unbind), (Until::Administrator, NIC, vec![NIC.to_owned()]));
        assert_eq!(holder.unwrap().lease, lease, "it observes");
    }
    let (vendor, device) = ("8086".into(), "10d3".into());
    let any = Acquire { devices: vec![DeviceSpec::Kind { vendor, device }], ..want(&[]) };
    let other = world.acquire(1001, &any).unwrap();
    assert_eq!(other.reply.devices, ["0000:08:00.0"]);
    // Who may know is told; it is free for its own tenant only.
    let (state, shown) = unproved(&world, 1000, 2);
    assert_eq!((state, shown.as_ref().map(|u| &*u.lease)), (GroupState::Free, Some(&*lease)));
    let (state, shown) = unproved(&world, 1001, 2);
    assert_eq!(state, GroupState::Quarantined);
    assert_eq!(shown.unwrap().devices, [NIC]);
    assert_eq!(unproved(&world, 1002, 2), (GroupState::Quarantined, None));
    let again = world.acquire(1000, &by_iommufd(&[NIC])).unwrap();
    ended(&world, again);
    ended(&world, world.acquire(1000, &want(&[NIC])).unwrap());
    assert!(world.acquire(1001, &want(&[NIC])).is_err());
    // The driver goes once nobody has the node open; then it is anybody's.
    assert_eq!(world.sim.set_driver(NIC, None), Err(Errno::EBUSY));
    drop(stale);
    world.rebind(NIC);
    drop(other);
    ended(&world, world.acquire(1001, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_device_on_another_driver_has_been_let_go_of_and_one_without_may_not() {
    let world = World::new();
    ended(&world, world.acquire(1000, &by_iommufd(&[NIC])).unwrap());
    // A driver that waits for the last file shows as none.
    world.sim.set_driver(NIC, None).unwrap();
    assert_eq!(unproved(&world, 1001, 2).0, GroupState::Quarantined);
    world.sim.set_driver(NIC, Some("e1000e")).unwrap();
    assert_eq!(unproved(&world, 1001, 2), (GroupState::Free, None));
    world.assert_idle();
}

#[test]
fn a_bound_device_is_quarantined_and_a_stale_one_is_named() {
    let world = World::new();
    let grant = world.acquire(1000, &by_iommufd(&[NIC])).unwrap();
    let lease = grant.reply.lease.clone();
    let (own, stale) = (iommufd(&world, &grant), cdev(&world, &grant, NIC));
    stale.bind_iommufd(&own).unwrap();
    ended(&world, grant);
    assert!(world.has_pending_reclaims());
    let error = world.acquire(1000, &by_iommufd(&[NIC])).unwrap_err();
    assert!(matches!(error, Error::Quarantined { .. }), "{error}");
    drop((own, stale));
    world.retry_reclaims();
    assert!(!world.has_pending_reclaims());
    // Somebody of the last VM still has the node, and binds it when nobody looks.
    let grant = world.acquire(1000, &by_iommufd(&[NIC])).unwrap();
    let stale = cdev(&world, &grant, NIC);
    let lease_again = grant.reply.lease.clone();
    ended(&world, grant);
    let own = Iommufd::open(world.sim.kernel()).unwrap();
    stale.bind_iommufd(&own).unwrap();
    for request in [by_iommufd(&[NIC]), want(&[NIC])] {
        let error = world.acquire(1000, &request).unwrap_err();
        let Error::Busy { holder: Some(holder), device, .. } = error else { panic!("{error}") };
        assert_eq!((holder.lease, device.as_str()), (lease_again.clone(), NIC));
    }
    assert_ne!(lease, lease_again);
    drop((own, stale));
    world.rebind(NIC);
    ended(&world, world.acquire(1001, &want(&[NIC])).unwrap());
    world.assert_idle();
}

#[test]
fn a_group_that_a_stranger_has_open_is_not_handed_out() {
    let world = World::new();
    let stranger = Group::open(world.sim.kernel(), Node::Group(2)).unwrap();
    let error = world.acquire(1000, &by_iommufd(&[NIC])).unwrap_err();
    assert!(advice(&error).unwrap().contains("fuser"), "{error}");
    let Error::Kernel { call, errno, .. } = error else { panic!("{error}") };
    assert_eq!((&*call, errno), ("open", Errno::EBUSY as i32));
    drop(stranger);
    let other = Iommufd::open(world.sim.kernel()).unwrap();
    let number = crate::host::cdev(&*world.sim.kernel(), NIC.parse().unwrap()).unwrap().unwrap();
    let stranger = Device::open_cdev(world.sim.kernel(), number, NIC).unwrap();
    stranger.bind_iommufd(&other).unwrap();
    assert!(world.acquire(1000, &by_iommufd(&[NIC])).is_err());
    drop((stranger, other));
    world.assert_idle();
}

#[test]
fn faults_while_reclaiming_are_tried_again() {
    let world = World::new();
    let grant = world.acquire(1000, &by_iommufd(&[NIC])).unwrap();
    drop(grant);
    world.sim.fault(Fault::fail("open", Errno::EIO)).unwrap();
    world.serve_hang_ups();
    assert!(world.has_pending_reclaims());
    world.sim.clear_faults().unwrap();
    world.retry_reclaims();
    assert!(!world.has_pending_reclaims());
    assert_eq!(unproved(&world, 1001, 2).0, GroupState::Quarantined);
}

#[test]
fn the_topology_shows_cdevs() {
    let shown = |machine: &str| {
        let world = World::of(machine, POLICY);
        let groups = world.broker.topology(&caller(1001)).unwrap().groups;
        groups[0].devices[0].cdev.clone()
    };
    assert_eq!(shown(MACHINE).as_deref(), Some("/dev/vfio/devices/vfio0"));
    assert_eq!(shown(&MACHINE.replace("owner_rights", "cdev = false\nowner_rights")), None);
}
