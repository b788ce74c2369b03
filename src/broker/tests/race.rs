//! Threads that want the same things at the same time.

use super::*;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn one_of_many_gets_it() {
    let world = World::new();
    let requests = [
        want(&["0000:01:00.0"]),
        want_as(Handout::Group, &["0000:01:00.1"]),
        want_as(Handout::Devices, &["0000:02:00.0", "0000:01:00.0"]),
        want_in("pool", &["0000:01:00.1"]),
    ];
    for _ in 0..20 {
        let start = Barrier::new(8);
        let grants: Vec<_> = std::thread::scope(|scope| {
            let contend = |n: usize| {
                let (world, start, request) = (&world, &start, &requests[n % requests.len()]);
                scope.spawn(move || {
                    start.wait();
                    world.acquire(1000 + (n as u32 % 2), request)
                })
            };
            let all: Vec<_> = (0..8).map(contend).collect();
            all.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let won = grants.iter().filter(|grant| grant.is_ok()).count();
        assert_eq!(won, 1);
        for error in grants.iter().filter_map(|grant| grant.as_ref().err()) {
            assert!(matches!(error, Error::Busy { .. }), "{error}");
        }
        drop(grants);
        world.serve_hang_ups();
        world.assert_idle();
    }
}

#[test]
fn members_come_and_go_while_others_map() {
    let world = World::new();
    let failed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (uid, bdf) in [(1000, "0000:01:00.0"), (1001, "0000:02:00.0"), (1000, "0000:08:00.0")] {
            let (world, failed) = (&world, &failed);
            scope.spawn(move || {
                let base = u64::from(bdf.as_bytes()[6]) << 20;
                for round in 0..30 {
                    let container = if round % 2 == 0 {
                        want_in("pool", &[bdf])
                    } else {
                        want_as(Handout::Devices, &[bdf])
                    };
                    match world.acquire(uid, &container) {
                        Ok(mut grant) => {
                            world.map(uid, &grant.reply, base, 8192).unwrap();
                            world.map(uid, &grant.reply, base + 8192, 8192).unwrap();
                            let unmapped = world.unmap(uid, &grant.reply, base, 8192);
                            assert_eq!(unmapped, Ok(8192));
                            grant.fds.clear();
                            assert_eq!(world.release(uid, &grant.reply), Ok(true));
                        }
                        // The last member is just leaving.
                        Err(Error::Conflict { .. }) => drop(failed.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    world.serve_hang_ups();
    world.assert_idle();
    assert!(failed.into_inner() < 45, "hardly anybody got in");
}

#[test]
fn a_lease_that_ends_while_it_grows_leaves_nothing() {
    let world = World::new();
    for _ in 0..20 {
        let first = world.acquire(1000, &want_as(Handout::Devices, &["0000:01:00.0"])).unwrap();
        let held = first.reply.clone();
        drop(first.fds);
        let start = Barrier::new(2);
        let grown = std::thread::scope(|scope| {
            let grow = scope.spawn(|| {
                start.wait();
                world.acquire(1000, &more(&held, &["0000:02:00.0"]))
            });
            start.wait();
            world.serve_hang_ups();
            grow.join().unwrap()
        });
        if let Err(error) = &grown {
            assert!(matches!(error, Error::NoSuchLease { .. }), "{error}");
        }
        drop(grown);
        world.serve_hang_ups();
        world.broker.retry_reclaims();
        world.assert_idle();
    }
}
