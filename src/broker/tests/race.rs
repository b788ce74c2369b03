//! Calls that want the same things at the same time.

use super::*;
use crate::ledger::GroupState;
use crate::sim::Fault;
use tokio::task::JoinHandle;

impl World {
    /// Begins an Acquire, which goes on whenever the world runs.
    pub(super) fn begin(&self, uid: u32, request: &Acquire) -> JoinHandle<Result<Grant, Error>> {
        let (broker, request) = (Rc::clone(&self.broker), request.clone());
        self.local.spawn_local(async move { acquire(&broker, uid, &request).await })
    }
}

fn is_reclaiming(world: &World) -> bool {
    let books = world.broker.books();
    books.ledger.groups().any(|(_, group)| matches!(group.state, GroupState::Reclaiming { .. }))
}

#[test]
fn one_of_many_gets_it() {
    let world = World::new();
    let requests = [
        withholding("0000:01:00.1", want(&["0000:01:00.0"])),
        withholding("0000:01:00.0", want_as(Handout::Group, &["0000:01:00.1"])),
        want_as(Handout::Devices, &["0000:02:00.0", "0000:01:00.0"]),
        want_in("pool", &["0000:01:00.1"]),
    ];
    for round in 0..20 {
        let begun: Vec<_> = (round..round + 8)
            .map(|n| world.begin(1000 + (n as u32 % 2), &requests[n % requests.len()]))
            .collect();
        let mut grants = Vec::new();
        for grant in begun {
            grants.push(world.run(grant).unwrap());
        }
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

async fn member(broker: Rc<Broker>, uid: u32, bdf: &'static str) {
    let base = u64::from(bdf.as_bytes()[6]) << 20;
    for round in 0..30 {
        let request = match round % 3 {
            0 => want_as(Handout::Devices, &[bdf]),
            _ => want_in("pool", &[bdf]),
        };
        let mut grant = acquire(&broker, uid, &request).await.unwrap();
        map(&broker, uid, &grant.reply, base, 8192).await.unwrap();
        map(&broker, uid, &grant.reply, base + 8192, 8192).await.unwrap();
        assert_eq!(unmap(&broker, uid, &grant.reply, base, 8192).await, Ok(8192));
        grant.fds.clear();
        assert_eq!(release(&broker, uid, &grant.reply).await, Ok(true));
    }
}

#[test]
fn members_come_and_go_while_others_map() {
    let world = World::patient();
    let members = [(1000, "0000:01:00.0"), (1001, "0000:02:00.0"), (1000, "0000:08:00.0")];
    let begin = |(uid, bdf)| world.local.spawn_local(member(Rc::clone(&world.broker), uid, bdf));
    let begun = members.map(begin);
    for member in begun {
        world.run(member).unwrap();
    }
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
        world.until(|| is_reclaiming(&world));
        let again = world.begin(1000, &request);
        // Neither gives up before the last file is closed.
        world.run(tokio::task::yield_now());
        assert!(!again.is_finished());
        drop(stale);
        drop(world.run(again).unwrap().unwrap());
        world.serve_hang_ups();
        world.assert_idle();
    }
}

#[test]
fn a_holder_that_is_gone_is_waited_for_even_before_the_broker_has_noticed() {
    let world = World::patient();
    drop(world.acquire(1000, &want(&["0000:02:00.0"])).unwrap());
    drop(world.acquire(1001, &want(&["0000:02:00.0"])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_lease_that_ends_while_it_grows_leaves_nothing() {
    let world = World::new();
    for held_call in [None, Some("open"), Some("VFIO_GROUP_GET_DEVICE_FD")] {
        let first = world.acquire(1000, &want_as(Handout::Devices, &["0000:01:00.0"])).unwrap();
        let held = first.reply.clone();
        if let Some(call) = held_call {
            world.sim.fault(Fault::never(call)).unwrap();
        }
        let grown = world.begin(1000, &more(&held, &["0000:02:00.0"]));
        if held_call.is_some() {
            world.until(|| world.stats().held > 0);
        }
        drop(first);
        world.sim.clear_faults().unwrap();
        let grown = world.run(grown).unwrap();
        if let Err(error) = &grown {
            // Whoever sees it first: the broker, or the keeper.
            let ended = matches!(error, Error::NoSuchLease { .. } | Error::Conflict { .. });
            assert!(ended, "{held_call:?}: {error}");
        }
        drop(grown);
        world.serve_hang_ups();
        world.assert_idle();
    }
}

/// The lease is ended by somebody else while its keeper is at it.
#[test]
fn a_lease_that_is_released_while_it_grows_is_not_added_to() {
    let world = World::new();
    let first = world.acquire(1000, &want_as(Handout::Devices, &["0000:01:00.0"])).unwrap();
    world.sim.fault(Fault::never("VFIO_GROUP_GET_DEVICE_FD")).unwrap();
    let grown = world.begin(1000, &more(&first.reply, &["0000:02:00.0"]));
    world.until(|| world.stats().held > 0);
    let (broker, held) = (Rc::clone(&world.broker), first.reply.clone());
    let released = world.local.spawn_local(async move { release(&broker, 1000, &held).await });
    world.until(|| world.broker.books().ledger.has_ending());
    world.sim.clear_faults().unwrap();
    let error = world.run(grown).unwrap().unwrap_err();
    assert!(matches!(error, Error::NoSuchLease { .. }), "{error}");
    drop(first);
    let _ = world.run(released).unwrap().unwrap();
    world.until(|| !world.has_pending_reclaims());
    world.assert_idle();
}

#[test]
fn what_is_opened_too_late_is_undone() {
    let world = World::new();
    let before = (world.stats(), world.ledger());
    world.sim.fault(Fault::never("VFIO_GROUP_GET_DEVICE_FD")).unwrap();
    let request = want_as(Handout::Devices, &["0000:02:00.0"]);
    let broker = Broker::new(Parts {
        kernel: world.sim.kernel(),
        policy: world.broker.policy(),
        observer: Rc::clone(&world.witness) as Rc<dyn Observer>,
        keepers: Box::new(Rc::clone(&world.keepers)),
        patience: Duration::ZERO,
        deadline: Duration::from_millis(1),
    });
    let error = world.run(acquire(&broker, 1000, &request)).unwrap_err();
    assert!(matches!(error, Error::Kernel { .. }), "{error}");
    // Nobody else can have it before it is known to be closed again.
    world.until(|| world.stats().held > 0);
    let busy = world.run(acquire(&broker, 1000, &request)).unwrap_err();
    assert!(matches!(busy, Error::Busy { .. }), "{busy}");
    world.sim.clear_faults().unwrap();
    world.until(|| broker.books().ledger == before.1);
    world.until(|| world.stats() == before.0);
    world.assert_idle();
}
