//! Threads that want the same things at the same time.

use super::*;
use std::sync::Barrier;

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
    let world = World::patient();
    std::thread::scope(|scope| {
        for (uid, bdf) in [(1000, "0000:01:00.0"), (1001, "0000:02:00.0"), (1000, "0000:08:00.0")] {
            let world = &world;
            scope.spawn(move || {
                let base = u64::from(bdf.as_bytes()[6]) << 20;
                for round in 0..30 {
                    let request = match round % 3 {
                        0 => want_as(Handout::Devices, &[bdf]),
                        _ => want_in("pool", &[bdf]),
                    };
                    let mut grant = world.acquire(uid, &request).unwrap();
                    world.map(uid, &grant.reply, base, 8192).unwrap();
                    world.map(uid, &grant.reply, base + 8192, 8192).unwrap();
                    assert_eq!(world.unmap(uid, &grant.reply, base, 8192), Ok(8192));
                    grant.fds.clear();
                    assert_eq!(world.release(uid, &grant.reply), Ok(true));
                }
            });
        }
    });
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_vm_that_is_started_again_waits_for_its_last_run() {
    let world = World::patient();
    for request in [want(&["0000:02:00.0"]), want_in("pool", &["0000:02:00.0"])] {
        let mut last = world.acquire(1000, &request).unwrap();
        let stale: Vec<_> = last.fds.drain(..last.fds.len() - 1).collect();
        drop(last);
        std::thread::scope(|scope| {
            scope.spawn(|| world.serve_hang_ups());
            let reclaiming = || {
                let books = world.broker.books();
                books
                    .ledger
                    .groups()
                    .any(|(_, g)| matches!(g.state, crate::ledger::GroupState::Reclaiming { .. }))
            };
            while !reclaiming() {
                std::thread::yield_now();
            }
            let again = scope.spawn(|| world.acquire(1000, &request));
            // Neither gives up before the last file is closed.
            drop(stale);
            drop(again.join().unwrap().unwrap());
        });
        world.serve_hang_ups();
        world.assert_idle();
    }
}

#[test]
fn a_holder_that_is_gone_is_waited_for_even_before_the_broker_has_noticed() {
    let world = World::patient();
    drop(world.acquire(1000, &want(&["0000:02:00.0"])).unwrap());
    std::thread::scope(|scope| {
        let again = scope.spawn(|| world.acquire(1001, &want(&["0000:02:00.0"])));
        world.serve_hang_ups();
        drop(again.join().unwrap().unwrap());
    });
    world.serve_hang_ups();
    world.assert_idle();
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
