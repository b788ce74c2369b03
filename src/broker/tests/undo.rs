//! All or nothing: each kernel call of an Acquire is made to fail in turn, and afterwards kernel and
//! books are as they were.

use super::*;
use failing::{Failing, failing};

/// Makes call 1, 2, 3… of the request fail until none is left to fail; returns how many there were.
fn every_failure_is_undone(world: &World, kernel: &Failing, uid: u32, request: &Acquire) -> i64 {
    let before = (world.stats(), world.ledger(), world.lifelines());
    for nth in 1.. {
        kernel.arm(world, nth);
        let done = world.acquire(uid, request);
        let reached = kernel.disarm();
        if done.is_ok() {
            assert!(!reached, "call {nth} failed and nobody minded");
            drop(done);
            world.serve_hang_ups();
            return nth;
        }
        let error = done.err();
        assert!(reached, "{error:?} without a fault");
        let after = (world.stats(), world.ledger(), world.lifelines());
        assert_eq!(after, before, "after call {nth} failed: {error:?}");
    }
    0
}

#[test]
fn each_handout_is_all_or_nothing() {
    let (world, kernel) = failing();
    let two = ["0000:08:00.0", "0000:02:00.0"];
    for request in [
        want_as(Handout::Container, &two),
        want_as(Handout::Group, &two),
        want_as(Handout::Devices, &two),
        want_in("pool", &two),
        want_in("friends", &two),
        want_as(Handout::Iommufd, &two),
    ] {
        let calls = every_failure_is_undone(&world, &kernel, 1000, &request);
        assert!(calls > 20, "only {calls} calls");
        two.iter().for_each(|bdf| world.rebind(bdf));
        world.assert_idle();
    }
}

#[test]
fn joining_and_adding_are_all_or_nothing() {
    let (world, kernel) = failing();
    for first in [
        want_as(Handout::Container, &["0000:08:00.0"]),
        want_as(Handout::Group, &["0000:08:00.0"]),
        want_as(Handout::Devices, &["0000:01:00.0"]),
        want_in("pool", &["0000:01:00.0"]),
        want_in("friends", &["0000:01:00.0"]),
        want_as(Handout::Iommufd, &["0000:01:00.0"]),
    ] {
        let held = world.acquire(1000, &first).unwrap();
        if first.container.is_some() {
            let join = Acquire { devices: specs(&["0000:02:00.0"]), ..first.clone() };
            every_failure_is_undone(&world, &kernel, 1001, &join);
        }
        let more_devices = match first.devices == specs(&["0000:08:00.0"]) {
            true => ["0000:01:00.0", "0000:01:00.1"],
            false => ["0000:01:00.1", "0000:08:00.0"],
        };
        let add = more(&held.reply, &more_devices);
        // The last one succeeds, and stays with the lease.
        every_failure_is_undone(&world, &kernel, 1000, &add);
        drop(held);
        world.serve_hang_ups();
        for bdf in ["0000:01:00.0", "0000:01:00.1", "0000:08:00.0"] {
            world.rebind(bdf);
        }
        world.assert_idle();
    }
}
