//! Who still has what a lease has left open is shown to who may know it, and not looked for all the time.

use super::*;
use crate::process::holders::Report;
use crate::protocol::{Known, OpenFile, OpenKind, Process, Processes, Revoke};

const NIC: &str = "0000:02:00.0";

/// What is found of each group: one process that has it for certain, or may have it.
fn report(name: Option<&str>, hidden: usize) -> Report {
    let files = vec![OpenFile { kind: OpenKind::Group, name: name.map(str::to_owned) }];
    let process = Process { pid: 7, uid: 1000, command: "qemu".into(), files };
    Report { found: vec![vec![process]], hidden, is_whole: true, ..Report::default() }
}

/// A world in which somebody keeps the group of a lease that has ended.
fn quarantined() -> (World, OwnedFd) {
    let world = World::new();
    let mut grant = world.acquire(1000, &want(&[NIC])).unwrap();
    let stale = grant.fds.remove(1);
    drop(grant);
    world.serve_hang_ups();
    (world, stale)
}

fn refused(world: &World, uid: u32) -> Option<Processes> {
    let error = world.acquire(uid, &want(&[NIC])).unwrap_err();
    let Error::Quarantined { open_in, .. } = error else { panic!("{error}") };
    open_in.map(|open_in| *open_in)
}

#[test]
fn who_may_know_the_holder_is_told_who_has_it_still() {
    let (world, stale) = quarantined();
    world.keepers.report.replace(report(Some("2"), 0));
    let open_in = refused(&world, 1001).unwrap();
    assert_eq!((open_in.known, open_in.why), (Known::Whole, None));
    assert_eq!(open_in.processes[0].pid, 7);
    assert_eq!(refused(&world, 1002), None, "another tenant");
    let searches = world.keepers.searches.take();
    assert_eq!(searches.len(), 1, "what was just found is not looked for again");
    let group = &searches[0].groups[0];
    assert_eq!((group.id, group.node.as_str()), (2, "/dev/vfio/2"));
    assert_eq!(group.devices[0].bdf.to_string(), NIC);
    assert_eq!(searches[0].keepers, [std::process::id()], "the keeper is no holder");
    let shown = |uid| {
        let groups = world.broker.topology(&caller(uid)).unwrap().groups;
        groups.into_iter().find(|group| group.id == 2).and_then(|group| group.open_in)
    };
    assert_eq!(shown(1001).unwrap().processes[0].command, "qemu");
    assert_eq!(shown(1002), None, "another tenant");
    drop(stale);
    world.retry_reclaims();
    assert_eq!(shown(1001), None, "it is free");
    world.assert_idle();
}

#[test]
fn what_is_not_seen_is_said() {
    let cases = [
        (report(Some("2"), 3), Known::Partial, "3 processes could not be looked into"),
        (report(None, 0), Known::Partial, "no open file says for certain"),
        (
            Report { why: Some("simulated".into()), ..Report::default() },
            Known::Unknown,
            "simulated",
        ),
    ];
    for (report, known, why) in cases {
        let (world, stale) = quarantined();
        world.keepers.report.replace(report);
        let open_in = refused(&world, 1000).unwrap();
        assert_eq!(open_in.known, known);
        assert!(open_in.why.as_deref().unwrap().contains(why), "{open_in:?}");
        drop(stale);
    }
}

#[test]
fn nobody_looks_where_nothing_is_left_open() {
    let world = World::new();
    let grant = world.acquire(1000, &want(&[NIC])).unwrap();
    world.run(world.broker.look_for_holders(&caller(1001)));
    drop(grant);
    world.serve_hang_ups();
    world.run(world.broker.look_for_holders(&caller(1001)));
    assert!(world.keepers.searches.take().is_empty());
    // Nor for whom it is nobody's business.
    let (world, stale) = quarantined();
    world.run(world.broker.look_for_holders(&caller(1002)));
    assert!(world.keepers.searches.take().is_empty());
    drop(stale);
}

#[test]
fn many_who_ask_at_once_wait_for_one_look() {
    let (world, stale) = quarantined();
    world.keepers.report.replace(report(Some("2"), 0));
    let caller = caller(1001);
    let look = || world.broker.look_for_holders(&caller);
    world.run(async { tokio::join!(look(), look(), look()) });
    assert_eq!(world.keepers.searches.take().len(), 1);
    drop(stale);
}

#[test]
fn a_group_that_no_lease_has_is_busy_with_who_has_it() {
    let world = World::new();
    world.keepers.report.replace(report(Some("2"), 0));
    let group = crate::kernel::Group::open(world.sim.kernel(), crate::kernel::Node::Group(2));
    let group = group.unwrap();
    let error = world.acquire(1001, &want(&[NIC])).unwrap_err();
    let Error::Busy { device, holder: None, since: None, open_in: Some(open_in) } = error else {
        panic!("{error}")
    };
    assert_eq!((device.as_str(), open_in.processes[0].pid), (NIC, 7));
    let error = world.acquire(1000, &want(&[NIC])).unwrap_err();
    assert!(matches!(error, Error::Kernel { .. }), "it does not observe: {error}");
    drop(group);
    drop(world.acquire(1000, &want(&[NIC])).unwrap());
}

#[test]
fn a_revocation_ends_with_who_has_what_is_left() {
    let world = World::new();
    world.keepers.report.replace(report(Some("2"), 0));
    let grant = world.acquire(1000, &want(&[NIC])).unwrap();
    let request = Revoke { lease: grant.reply.lease.clone(), grace: 0 };
    let revoked = world.run(async {
        let begun = world.broker.revoke(&caller(0), &super::revoke::client(), &request).unwrap();
        world.broker.revoked(begun).await
    });
    assert_eq!(revoked.left[0].open_in.as_ref().unwrap().processes[0].pid, 7);
    let leases = world.broker.leases(&caller(1001)).unwrap().leases;
    let left = &leases[0].revoked.as_ref().unwrap().left;
    assert_eq!(left[0].open_in.as_ref().unwrap().known, Known::Whole);
}
