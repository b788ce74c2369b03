//! All or nothing: each kernel call of an Acquire is made to fail in turn, and afterwards kernel and
//! books are as they were.

use super::*;
use failing::{Failing, failing};

/// Makes call 1, 2, 3… of the request fail until none is left to fail; returns how many there were.
fn every_failure_is_undone(world: &World, kernel: &Failing, uid: u32, request: &Acquire) -> i64 {
    let before = (world.stats(), world.broker.books().ledger.clone());
    let lifelines = world.witness.lifelines.lock().unwrap().len();
    for nth in 1.. {
        kernel.left.store(nth, Ordering::SeqCst);
        let done = world.acquire(uid, request);
        let reached = kernel.left.swap(0, Ordering::SeqCst) <= 0;
        if done.is_ok() {
            assert!(!reached, "call {nth} failed and nobody minded");
            drop(done);
            world.serve_hang_ups();
            return nth;
        }
        let error = done.err();
        assert!(reached, "{error:?} without a fault");
        let after = (world.stats(), world.broker.books().ledger.clone());
        assert_eq!(after, before, "after call {nth} failed: {error:?}");
        assert_eq!(world.witness.lifelines.lock().unwrap().len(), lifelines);
    }
    0
}

#[test]
fn each_handout_is_all_or_nothing() {
    let (world, kernel) = failing();
    let two = ["0000:01:00.0", "0000:02:00.0"];
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
        want_as(Handout::Container, &["0000:01:00.0"]),
        want_as(Handout::Group, &["0000:01:00.0"]),
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
        let add = more(&held.reply, &["0000:01:00.1", "0000:08:00.0"]);
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

#[test]
fn a_lease_whose_pipe_can_not_be_watched_is_refused() {
    let world = World::new();
    let before = (world.stats(), world.broker.books().ledger.clone());
    world.witness.watches_no_more.store(true, Ordering::SeqCst);
    for handout in [Handout::Container, Handout::Group, Handout::Devices] {
        let refused = world.acquire(1001, &want_as(handout, &["0000:01:00.0", "0000:02:00.0"]));
        let Err(Error::Kernel { call, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(call, "epoll_ctl");
        assert_eq!((world.stats(), world.broker.books().ledger.clone()), before);
    }
}
