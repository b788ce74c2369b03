//! The end of a lease: nothing is free before the kernel says so.

use super::*;
use crate::protocol::GroupState;
use crate::sim::Fault;
use nix::errno::Errno;

fn state(world: &World, group: u32) -> GroupState {
    let groups = world.broker.topology(&caller(1001)).unwrap().groups;
    groups.iter().find(|there| there.id == group).unwrap().state
}

/// Ends a lease of which somebody keeps the file `kept`; nobody can have its group until that is
/// closed.
fn keeps(world: &World, request: &Acquire, kept: usize) {
    let mut grant = world.acquire(1000, request).unwrap();
    let stale = grant.fds.remove(kept);
    let held = grant.reply.clone();
    drop(grant);
    assert_eq!(world.release(1000, &held), Ok(false));
    assert_eq!(state(world, 2), GroupState::Quarantined);
    let error = world.acquire(1001, &want(&["0000:02:00.0"])).unwrap_err();
    let Error::Quarantined { reason, since, .. } = error else { panic!("{error}") };
    assert!(reason.contains("/dev/vfio/2") && since > 0, "{reason}");
    assert!(world.has_pending_reclaims());
    world.retry_reclaims();
    assert_eq!(state(world, 2), GroupState::Quarantined);
    world.events();
    drop(stale);
    world.retry_reclaims();
    assert!(!world.has_pending_reclaims());
    assert_eq!(world.events(), [(EventKind::Reclaimed, vec!["0000:02:00.0".into()])]);
    world.assert_idle();
}

#[test]
fn a_file_that_somebody_keeps_quarantines_its_group() {
    let world = World::new();
    keeps(&world, &want(&["0000:02:00.0"]), 1);
    keeps(&world, &want_as(Handout::Group, &["0000:02:00.0"]), 0);
    keeps(&world, &want_as(Handout::Devices, &["0000:02:00.0"]), 0);
    keeps(&world, &want_in("pool", &["0000:02:00.0"]), 0);
    keeps(&world, &want_in("friends", &["0000:02:00.0"]), 1);
}

#[test]
fn a_container_that_somebody_keeps_is_power_over_nothing() {
    let world = World::new();
    let mut grant = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let stale = grant.fds.remove(0);
    drop(grant);
    world.serve_hang_ups();
    assert!(!world.has_pending_reclaims());
    let next = world.acquire(1001, &want(&["0000:02:00.0"])).unwrap();
    assert_eq!(world.stats().spaces.len(), 2);
    drop((stale, next));
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn one_stuck_group_does_not_hold_the_others() {
    let world = World::new();
    let request = want_as(Handout::Devices, &["0000:01:00.0", "0000:02:00.0"]);
    let mut grant = world.acquire(1000, &request).unwrap();
    let stale = grant.fds.remove(0);
    drop(grant);
    world.events();
    world.serve_hang_ups();
    let told = [
        (EventKind::Gone, vec!["0000:01:00.0".into(), "0000:02:00.0".into()]),
        (EventKind::Reclaimed, vec!["0000:02:00.0".into()]),
        (EventKind::Quarantined, vec!["0000:01:00.0".into()]),
    ];
    assert_eq!(world.events(), told);
    drop(world.acquire(1001, &want(&["0000:02:00.0"])).unwrap());
    drop(stale);
    world.serve_hang_ups();
    world.retry_reclaims();
    world.assert_idle();
}

#[test]
fn a_holder_may_have_taken_its_group_out_already() {
    let world = World::new();
    let mut grant = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let group = grant.fds.remove(1);
    let group =
        crate::kernel::Group::from_fd(world.sim.kernel(), crate::kernel::Node::Group(2), group);
    group.unset_container().unwrap();
    drop((group, grant));
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn devices_that_left_vfio_are_free() {
    let world = World::new();
    let mut grant = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let stale = grant.fds.remove(1);
    world.sim.set_driver("0000:02:00.0", None).unwrap();
    drop(grant);
    world.serve_hang_ups();
    assert!(!world.has_pending_reclaims());
    drop(stale);
    world.assert_idle();
}

#[test]
fn faults_while_reclaiming_are_tried_again() {
    let world = World::new();
    for request in [
        want(&["0000:02:00.0"]),
        want_as(Handout::Group, &["0000:02:00.0"]),
        want_as(Handout::Devices, &["0000:02:00.0"]),
        want_in("pool", &["0000:02:00.0"]),
    ] {
        for call in ["VFIO_IOMMU_UNMAP_DMA", "VFIO_GROUP_UNSET_CONTAINER", "open"] {
            let grant = world.acquire(1000, &request).unwrap();
            if grant.reply.handout == Handout::Devices {
                world.map(1000, &grant.reply, 0, 4096).unwrap();
            }
            drop(grant);
            world.sim.fault(Fault::fail(call, Errno::EIO)).unwrap();
            world.serve_hang_ups();
            world.sim.clear_faults().unwrap();
            world.retry_reclaims();
            world.assert_idle();
        }
    }
}

#[test]
fn a_member_whose_mapping_stays_keeps_its_range() {
    let world = World::new();
    let one = world.acquire(1000, &want_in("pool", &["0000:02:00.0"])).unwrap();
    let other = world.acquire(1001, &want_in("pool", &["0000:08:00.0"])).unwrap();
    world.map(1000, &one.reply, 0, 4096).unwrap();
    drop(one);
    let fault = Fault::fail("VFIO_IOMMU_UNMAP_DMA", Errno::EIO).times(u64::MAX);
    world.sim.fault(fault).unwrap();
    world.serve_hang_ups();
    // The group is free; the range is not, and it is still charged.
    drop(world.acquire(1001, &want(&["0000:02:00.0"])).unwrap());
    assert!(matches!(world.map(1001, &other.reply, 0, 4096), Err(Error::Conflict { .. })));
    world.sim.clear_faults().unwrap();
    world.retry_reclaims();
    world.map(1001, &other.reply, 0, 4096).unwrap();
    drop(other);
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_lifeline_that_has_not_hung_up_ends_nothing() {
    let world = World::new();
    let grant = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    world.serve_hang_ups();
    assert_eq!(world.broker.leases(&caller(1000)).unwrap().leases.len(), 1);
    // When the broker ends the lease, the holder reads the end.
    let lifeline = grant.fds.last().unwrap().try_clone().unwrap();
    let held = grant.reply.clone();
    drop(grant);
    assert_eq!(world.release(1000, &held), Ok(true));
    assert_eq!(nix::unistd::read(&lifeline, &mut [0; 1]), Ok(0));
}
