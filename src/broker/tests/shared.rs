//! Shared containers of both kinds.

use super::*;

#[test]
fn an_enforced_container_keeps_its_members_apart() {
    let world = World::new();
    let one = world.acquire(1000, &want_in("pool", &["0000:02:00.0"])).unwrap();
    let other = world.acquire(1001, &want_in("pool", &["0000:08:00.0"])).unwrap();
    assert_eq!(kinds(&one), [(FdKind::Device, "0000:02:00.0"), (FdKind::Lease, "")]);
    assert_eq!(one.reply.container, "pool");
    assert_eq!((world.stats().containers, world.stats().spaces[0].groups.len()), (1, 2));
    world.map(1000, &one.reply, 0, 8192).unwrap();
    world.map(1001, &other.reply, 8192, 4096).unwrap();
    let overlap = world.map(1001, &other.reply, 4096, 4096).unwrap_err();
    assert!(matches!(&overlap, Error::Conflict { why, .. } if why.contains("another member")));
    // One dies: its mappings are gone, the other's stay, and its group can be had again.
    drop(one);
    world.serve_hang_ups();
    let space = &world.stats().spaces[0];
    assert_eq!((space.mapped_bytes, &space.groups), (4096, &vec![8]));
    world.map(1001, &other.reply, 0, 8192).unwrap();
    let again = world.acquire(1000, &want_in("pool", &["0000:02:00.0"])).unwrap();
    assert_eq!(world.stats().spaces.len(), 1);
    drop((other, again));
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn members_of_a_mutual_container_have_it_too() {
    let world = World::new();
    let one = world.acquire(1000, &want_in("friends", &["0000:02:00.0"])).unwrap();
    let other = world.acquire(1001, &want_in("friends", &["0000:08:00.0"])).unwrap();
    let expected =
        [(FdKind::Container, "friends"), (FdKind::Device, "0000:08:00.0"), (FdKind::Lease, "")];
    assert_eq!(kinds(&other), expected);
    let list = world.broker.leases(&caller(1001)).unwrap().leases;
    assert!(list.iter().all(|lease| (lease.mappings, lease.mapped_bytes) == (None, None)));
    let container = one.fds[0].try_clone().unwrap();
    let container = crate::kernel::Container::from_fd(world.sim.kernel(), container);
    let (_, memory) = crate::kernel::Mapped::memfd(8192).unwrap();
    let flags = crate::kernel::DmaMap::READ;
    let map = crate::kernel::DmaMap { flags, vaddr: memory.vaddr(), iova: 0, size: 8192 };
    container.map(&map).unwrap();
    drop((one, container));
    world.serve_hang_ups();
    // Nobody knows whose it was; the survivor may need it.
    assert_eq!(world.stats().spaces[0].mapped_bytes, 8192);
    drop(other);
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_shared_container_has_its_own_handout() {
    let world = World::new();
    for handout in [Handout::Container, Handout::Group] {
        let request =
            Acquire { container: Some("pool".into()), ..want_as(handout, &["0000:02:00.0"]) };
        let error = world.acquire(1000, &request).unwrap_err();
        assert!(matches!(error, Error::Conflict { .. }), "{error}");
    }
    world.assert_idle();
}

#[test]
fn a_stale_device_of_the_last_member_keeps_newcomers_out() {
    let world = World::new();
    let mut one = world.acquire(1000, &want_in("pool", &["0000:02:00.0"])).unwrap();
    world.map(1000, &one.reply, 0, 8192).unwrap();
    let stale = one.fds.remove(0);
    drop(one);
    world.serve_hang_ups();
    // Its mappings went at once, whatever it kept.
    assert_eq!(world.stats().spaces[0].mapped_bytes, 0);
    let error = world.acquire(1001, &want_in("pool", &["0000:08:00.0"])).unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error}");
    drop(stale);
    world.retry_reclaims();
    world.assert_idle();
    drop(world.acquire(1001, &want_in("pool", &["0000:08:00.0"])).unwrap());
}
