//! An administrator's word where the kernel can't show that a device is closed.

use super::*;
use crate::protocol::{Confirm, Confirmed};

const NIC: &str = "0000:02:00.0";
const PAIR: [&str; 2] = ["0000:01:00.0", "0000:01:00.1"];
const ROOT: u32 = 0;

impl World {
    fn confirm(&self, uid: u32, device: &str) -> Result<Confirmed, Error> {
        let (client, request) = (connection().0, Confirm { device: device.into() });
        self.run(self.broker.confirm(&caller(uid), client.as_fd(), &request))
    }

    fn has_left(&self, uid: u32, devices: &[&str]) {
        drop(self.acquire(uid, &want_as(Handout::Iommufd, devices)).unwrap());
        self.serve_hang_ups();
        self.until(|| self.broker.books().ledger.unproved().count() == 1);
    }
}

fn why(result: Result<Confirmed, Error>) -> String {
    match result {
        Err(Error::Conflict { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_confirmed_is_free_for_others_and_stays_so() {
    let world = World::new();
    world.has_left(1000, &[NIC]);
    let error = world.acquire(1001, &want(&[NIC])).unwrap_err();
    assert!(matches!(error, Error::Quarantined { until: Until::Administrator, .. }), "{error}");
    assert_eq!(world.confirm(ROOT, NIC), Ok(Confirmed { group: 2, left: Vec::new() }));
    // No keeper tells the next broker of it.
    world.assert_idle();
    drop(world.acquire(1001, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn each_device_of_a_group_is_confirmed_by_itself() {
    let world = World::new();
    world.has_left(1000, &PAIR);
    let left = |left: &[&str]| {
        Ok(Confirmed { group: 1, left: left.iter().map(ToString::to_string).collect() })
    };
    assert_eq!(world.confirm(ROOT, PAIR[0]), left(&PAIR[1..]));
    let error = world.acquire(1001, &want(&PAIR)).unwrap_err();
    assert!(matches!(error, Error::Quarantined { .. }), "{error}");
    assert_eq!(world.confirm(ROOT, PAIR[1]), left(&[]));
    world.assert_idle();
}

#[test]
fn nobody_but_an_administrator_has_such_a_word() {
    let world = World::new();
    world.has_left(1000, &[NIC]);
    // Its last tenant least of all; a manager's is no better.
    for uid in [1000, 1001, 1002, 1004] {
        let error = world.confirm(uid, NIC).unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{uid}: {error}");
    }
    assert_eq!(world.broker.books().ledger.unproved().count(), 1);
    world.confirm(ROOT, NIC).unwrap();
    world.assert_idle();
}

#[test]
fn the_kernel_s_own_word_is_better() {
    let world = World::new();
    assert!(why(world.confirm(ROOT, NIC)).contains("nothing to confirm"));
    assert!(matches!(world.confirm(ROOT, "web1"), Err(Error::BadRequest { .. })));
    let mut grant = world.acquire(1000, &want(&[NIC])).unwrap();
    assert!(why(world.confirm(ROOT, NIC)).contains("a lease has it"));
    let stale: Vec<_> = grant.fds.drain(..grant.fds.len() - 1).collect();
    drop(grant);
    world.serve_hang_ups();
    assert!(why(world.confirm(ROOT, NIC)).contains("some process still has"));
    drop(stale);
    world.retry_reclaims();
    world.assert_idle();
}

#[test]
fn what_is_held_again_is_asked_for_again() {
    let world = World::new();
    world.has_left(1000, &[NIC]);
    let again = world.acquire(1000, &want_as(Handout::Iommufd, &[NIC])).unwrap();
    // That an earlier one is closed says nothing of this one.
    world.confirm(ROOT, NIC).unwrap();
    drop(again);
    world.serve_hang_ups();
    world.until(|| world.broker.books().ledger.unproved().count() == 1);
    world.confirm(ROOT, NIC).unwrap();
    world.assert_idle();
}
