//! Devices that are proved free by their drivers, where the policy lets their keeper do that.

use super::*;
use crate::protocol::GroupState;

const NIC: &str = "0000:02:00.0";

fn world(allowed: &str) -> World {
    let allowed = format!("name = \"a\"\nuser = 1000\n{allowed}");
    World::of(MACHINE, &POLICY.replace("name = \"a\"\nuser = 1000", &allowed))
}

fn state(world: &World, uid: u32, group: u32) -> GroupState {
    let groups = world.broker.topology(&caller(uid)).unwrap().groups;
    groups.iter().find(|there| there.id == group).unwrap().state
}

fn registration(world: &World, bdf: &str) -> Option<u64> {
    crate::host::registration(&*world.sim.kernel(), bdf.parse().unwrap()).unwrap()
}

#[test]
fn a_device_that_was_bound_anew_is_anybodys() {
    for allowed in ["rebind = true", "managed = true"] {
        let world = world(allowed);
        let devices = ["0000:01:00.0", NIC];
        let mut grant = world.acquire(1000, &want_as(Handout::Iommufd, &devices)).unwrap();
        grant.fds.clear();
        assert_eq!(world.release(1000, &grant.reply), Ok(true));
        drop(world.acquire(1001, &want_as(Handout::Devices, &devices)).unwrap());
        world.serve_hang_ups();
        world.assert_idle();
    }
}

#[test]
fn what_somebody_has_open_is_quarantined_until_it_is_closed() {
    let world = world("rebind = true");
    let mut grant = world.acquire(1000, &want_as(Handout::Iommufd, &[NIC])).unwrap();
    let stale = grant.fds.remove(1);
    drop(grant);
    // Its keeper is in a call that waits for the last close: that it hangs is seen by its silence.
    world.until(|| state(&world, 1000, 2) == GroupState::Quarantined);
    for uid in [1000, 1001] {
        assert_eq!(state(&world, uid, 2), GroupState::Quarantined);
        let error = world.acquire(uid, &want(&[NIC])).unwrap_err();
        let Error::Quarantined { reason, until, .. } = error else { panic!("{error}") };
        assert!(reason.contains("waits for the last close"), "{reason}");
        assert_eq!(until, Until::Holder);
    }
    assert!(world.has_pending_reclaims());
    drop(stale);
    world.until(|| !world.has_pending_reclaims());
    drop(world.acquire(1001, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_group_that_somebody_keeps_without_a_device_is_ended() {
    for handout in [Handout::Container, Handout::Devices] {
        let world = world("rebind = true");
        // Both functions of group 1, so that the last one to leave its driver ends it.
        let pair = ["0000:01:00.0", "0000:01:00.1"];
        let mut grant = world.acquire(1000, &want_as(Handout::Container, &pair)).unwrap();
        let stale = grant.fds.remove(1);
        let before = pair.map(|bdf| registration(&world, bdf));
        assert_eq!(world.release(1000, &grant.reply), Ok(true));
        drop(grant);
        assert_ne!(pair.map(|bdf| registration(&world, bdf)), before);
        let next = world.acquire(1001, &want_as(handout, &pair)).unwrap();
        let node = crate::kernel::Node::Group(1);
        let status = crate::kernel::Group::from_fd(world.sim.kernel(), node, stale).status();
        assert_eq!(status.unwrap_err().errno, nix::errno::Errno::ENODEV, "it is good for nothing");
        drop(next);
        world.serve_hang_ups();
        world.assert_idle();
    }
}

#[test]
fn a_group_that_somebody_keeps_is_not_ended_without_the_right_or_where_devices_may_be_open() {
    let devices = ["0000:01:00.0", "0000:01:00.1"];
    let cases = [("rebind = false", Handout::Container), ("rebind = true", Handout::Group)];
    for (allowed, handout) in cases {
        let world = world(allowed);
        let mut grant = world.acquire(1000, &want_as(handout, &devices)).unwrap();
        let at = usize::from(handout == Handout::Container);
        let stale = grant.fds.remove(at);
        let before = registration(&world, devices[0]);
        drop(grant);
        world.serve_hang_ups();
        world.retry_reclaims();
        assert_eq!(state(&world, 1001, 1), GroupState::Quarantined);
        assert_eq!(registration(&world, devices[0]), before);
        drop(stale);
        world.retry_reclaims();
        world.assert_idle();
    }
}

#[test]
fn a_pf_with_vfs_stays_on_its_driver() {
    let world = world("rebind = true");
    let before = registration(&world, "0000:05:00.0");
    let pf = want_as(Handout::Iommufd, &["0000:05:00.0"]);
    let mut grant = world.acquire(1000, &pf).unwrap();
    grant.fds.clear();
    assert_eq!(world.release(1000, &grant.reply), Ok(false));
    assert_eq!(registration(&world, "0000:05:00.0"), before);
    assert_eq!(
        [1000, 1001].map(|uid| state(&world, uid, 5)),
        [GroupState::Free, GroupState::Quarantined]
    );
    drop(world.acquire(1000, &pf).unwrap());
}

#[test]
fn a_tenant_that_does_not_allow_it_keeps_its_drivers() {
    let world = world("rebind = false");
    let before = registration(&world, NIC);
    drop(world.acquire(1000, &want_as(Handout::Iommufd, &[NIC])).unwrap());
    world.serve_hang_ups();
    assert_eq!(registration(&world, NIC), before);
    assert_eq!(state(&world, 1001, 2), GroupState::Quarantined);
}

#[test]
fn a_device_that_is_proved_already_is_not_bound_again() {
    let world = world("rebind = true");
    let mut grant =
        world.acquire(1000, &want_as(Handout::Iommufd, &["0000:01:00.0", NIC])).unwrap();
    grant.fds.clear();
    // An administrator has bound it to the host's driver, which is none of the broker's business.
    world.sim.set_driver("0000:01:00.0", None).unwrap();
    world.sim.set_driver("0000:01:00.0", Some("nouveau")).unwrap();
    assert_eq!(world.release(1000, &grant.reply), Ok(true));
    assert_eq!(registration(&world, "0000:01:00.0"), None);
}

#[test]
fn a_restart_between_end_and_proof_changes_nothing() {
    let world = world("rebind = true");
    let mut grant = world.acquire(1000, &want_as(Handout::Iommufd, &[NIC])).unwrap();
    let stale = grant.fds.remove(1);
    drop(grant);
    world.until(|| world.has_pending_reclaims());
    let World { local, broker, keepers, sim, .. } = world;
    let policy = POLICY.replace("user = 1000\n", "user = 1000\nrebind = true\n");
    drop((local, broker));
    let kernel = sim.kernel();
    let world = World::on(sim, keepers, &policy, Duration::ZERO, kernel);
    world.run(async { world.broker.adopt().await }).unwrap();
    assert_eq!(state(&world, 1000, 2), GroupState::Reclaiming);
    drop(stale);
    world.until(|| !world.has_pending_reclaims());
    drop(world.acquire(1001, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
}
