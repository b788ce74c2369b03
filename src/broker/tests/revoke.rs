//! Leases that end against their holders' will.

use super::*;
use crate::protocol::{Drain, Revoke, Revoked};
use crate::sim::Fault;

const NIC: &str = "0000:02:00.0";
const OTHER_NIC: &str = "0000:08:00.0";
const ROOT: u32 = 0;
const HOUR: u64 = 3600;

impl World {
    fn revoke(&self, uid: u32, lease: &str, grace: u64) -> Result<Revoked, Error> {
        let request = Revoke { lease: lease.into(), grace };
        self.run(async {
            let begun = self.broker.revoke(&caller(uid), &client(), &request)?;
            Ok(self.broker.revoked(begun).await)
        })
    }

    /// Begins to revoke, and is gone.
    fn begin_to_revoke(&self, uid: u32, lease: &str, grace: u64) {
        let request = Revoke { lease: lease.into(), grace };
        self.run(async { drop(self.broker.revoke(&caller(uid), &client(), &request).unwrap()) });
    }

    fn kinds_of_events(&self) -> Vec<EventKind> {
        self.events().into_iter().map(|(kind, _)| kind).collect()
    }

    fn listed(&self, uid: u32) -> Vec<crate::protocol::Lease> {
        self.broker.leases(&caller(uid)).unwrap().leases
    }

    /// What the keepers have written down of leases that are being revoked.
    fn revoking(&self) -> usize {
        let all = self.keepers.saved();
        let leases = all.into_iter().filter_map(|(_, leases)| leases.ok()).flatten();
        leases.filter(|lease| lease.revoking.is_some()).count()
    }
}

pub(super) fn client() -> Rc<UnixStream> {
    Rc::new(connection().0)
}

fn restarted(world: World) -> World {
    let World { local, broker, keepers, sim, runtime, .. } = world;
    drop((local, broker, runtime));
    let kernel = sim.kernel();
    let world = World::on(sim, keepers, POLICY, Duration::ZERO, kernel);
    world.run(async { world.broker.adopt().await }).unwrap();
    world
}

#[test]
fn who_may_end_others_leases_is_the_policy_s_to_say() {
    let world = World::new();
    let of_a = world.acquire(1000, &want(&[NIC])).unwrap();
    let of_m = world.acquire(1002, &want(&[OTHER_NIC])).unwrap();
    let (a, m) = (&of_a.reply.lease, &of_m.reply.lease);
    // Who sees nothing of it learns nothing of it.
    for (uid, lease) in
        [(1002, a), (1003, a), (1000, m), (1004, a), (ROOT, &"0".repeat(16)), (ROOT, &"x".into())]
    {
        let error = world.revoke(uid, lease, 0).unwrap_err();
        assert!(matches!(error, Error::NoSuchLease { .. }), "{uid}: {error}");
    }
    // Its own holder, and one who observes.
    for (uid, lease) in [(1000, a), (1001, a), (1001, m)] {
        let error = world.revoke(uid, lease, 0).unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{uid}: {error}");
    }
    let error = world.revoke(ROOT, a, Revoke::MAX_GRACE + 1).unwrap_err();
    assert!(matches!(error, Error::BadRequest { .. }), "{error}");
    for (uid, is_tenant) in [(1000, true), (1001, true), (1004, false)] {
        let error = world.run(world.broker.drain(&caller(uid), &client(), 0)).unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{is_tenant}: {error}");
    }
    assert_eq!(world.ledger().leases().count(), 2);
    assert_eq!(world.kinds_of_events(), [EventKind::Acquired, EventKind::Acquired]);
    drop((of_a, of_m));
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn what_can_not_be_taken_is_said_and_nobody_else_gets_it() {
    for (uid, by) in [(1002, "a manager"), (ROOT, "root")] {
        let world = World::new();
        let grant = world.acquire(1002, &want_as(Handout::Devices, &[NIC])).unwrap();
        world.map(1002, &grant.reply, 0, 8192).unwrap();
        let lease = &grant.reply.lease;
        let revoked = world.revoke(uid, lease, 0).unwrap();
        assert!(revoked.forced && !revoked.proved, "{by}: {revoked:?}");
        assert_eq!((revoked.left.len(), &*revoked.left[0].device), (1, NIC));
        assert_eq!(revoked.left[0].until, Until::Holder);
        assert!(
            revoked.left[0].reason.contains("still has a device of /dev/vfio/2 open"),
            "{revoked:?}"
        );
        let events = world.kinds_of_events();
        let expected =
            [EventKind::Acquired, EventKind::Force, EventKind::Gone, EventKind::Quarantined];
        assert_eq!(events, expected);
        // The mappings that are ours are undone, and the key opens nothing.
        assert!(world.stats().spaces.iter().all(|space| space.mapped_bytes == 0));
        let refused = world.get_fds(1002, &get_fds(&grant.reply)).unwrap_err();
        assert!(matches!(refused, Error::NoSuchLease { .. }), "{refused}");
        let error = world.acquire(1000, &want(&[NIC])).unwrap_err();
        assert!(matches!(error, Error::Quarantined { .. }), "{error}");
        let shown = world.listed(uid).remove(0).revoked.unwrap();
        assert_eq!((shown.forced, &shown.left), (true, &revoked.left));
        // The next broker has to look again for who has it.
        let unseen = |left: Vec<crate::protocol::Left>| -> Vec<_> {
            left.into_iter().map(|it| crate::protocol::Left { open_in: None, ..it }).collect()
        };
        let kept = unseen(revoked.left.clone());
        // Once more it only waits.
        assert_eq!(world.revoke(uid, lease, HOUR).unwrap(), revoked);
        let world = restarted(world);
        world.until(|| {
            let mut list = world.listed(uid);
            list.len() == 1
                && list.remove(0).revoked.is_some_and(|shown| unseen(shown.left) == kept)
        });
        drop(grant);
        world.retry_reclaims();
        assert!(world.listed(uid).is_empty());
        drop(world.acquire(1000, &want(&[NIC])).unwrap());
        world.serve_hang_ups();
        world.assert_idle();
    }
}

#[test]
fn a_holder_that_gives_it_back_in_time_ends_it_early() {
    let world = World::new();
    for by_key in [true, false] {
        let grant = world.acquire(1002, &want(&[NIC])).unwrap();
        let held = grant.reply.clone();
        let (broker, lease) = (Rc::clone(&world.broker), held.lease.clone());
        let waits = world.local.spawn_local(async move {
            let begun = broker.revoke(&caller(ROOT), &client(), &Revoke { lease, grace: HOUR })?;
            Ok::<_, Error>(broker.revoked(begun).await)
        });
        world.until(|| {
            !world.witness.0.borrow().iter().all(|event| event.event != EventKind::Pause)
        });
        let pause = world.witness.0.borrow().last().cloned().unwrap();
        assert_eq!((pause.event, pause.lease.as_str()), (EventKind::Pause, held.lease.as_str()));
        assert_eq!(pause.until, Some(pause.at + HOUR));
        let shown = world.listed(1002).remove(0).revoked.unwrap();
        assert_eq!((shown.forced, shown.force), (false, shown.since + HOUR));
        // What it has goes on meanwhile; nothing is added.
        assert_eq!(world.get_fds(1002, &get_fds(&held)).unwrap().1.len(), 2);
        let error = world.acquire(1002, &more(&held, &[OTHER_NIC])).unwrap_err();
        assert!(matches!(error, Error::Conflict { .. }), "{error}");
        drop(grant);
        if by_key {
            let _ = world.release(1002, &held);
        } else {
            world.serve_hang_ups();
        }
        let revoked = world.run(waits).unwrap().unwrap();
        assert_eq!((revoked.forced, revoked.proved, revoked.left.len()), (false, true, 0));
        assert!(!world.kinds_of_events().contains(&EventKind::Force));
        world.assert_idle();
    }
}

#[test]
fn a_revocation_goes_on_without_whoever_asked_for_it() {
    let world = World::new();
    let grant = world.acquire(1002, &want(&[NIC])).unwrap();
    world.begin_to_revoke(1002, &grant.reply.lease, 1);
    world.until(|| world.ledger().leases().all(|lease| lease.phase != crate::ledger::Phase::Held));
    let events = world.kinds_of_events();
    assert_eq!(
        events[..4],
        [EventKind::Acquired, EventKind::Pause, EventKind::Force, EventKind::Gone]
    );
    drop(grant);
    world.retry_reclaims();
    world.assert_idle();
}

#[test]
fn the_earliest_end_stands() {
    let world = World::new();
    let grant = world.acquire(1002, &want(&[NIC])).unwrap();
    let lease = &grant.reply.lease;
    let force = || world.listed(ROOT).remove(0).revoked.unwrap().force;
    world.begin_to_revoke(ROOT, lease, HOUR);
    let first = force();
    world.begin_to_revoke(1002, lease, 2 * HOUR);
    assert_eq!(force(), first);
    world.begin_to_revoke(ROOT, lease, HOUR / 2);
    assert!(force() < first);
    drop(world.revoke(ROOT, lease, 0).unwrap());
    let events = world.kinds_of_events();
    assert_eq!(events.iter().filter(|kind| **kind == EventKind::Pause).count(), 2, "{events:?}");
    assert!(events.contains(&EventKind::Force));
    drop(grant);
    world.retry_reclaims();
    world.assert_idle();
}

#[test]
fn the_next_broker_goes_on_with_it() {
    let world = World::new();
    let grant = world.acquire(1002, &want(&[NIC])).unwrap();
    let other = world.acquire(1002, &want(&[OTHER_NIC])).unwrap();
    world.begin_to_revoke(ROOT, &grant.reply.lease, 1);
    world.begin_to_revoke(ROOT, &other.reply.lease, HOUR);
    world.until(|| world.revoking() == 2);
    let world = restarted(world);
    let shown = |lease: &str| {
        let mut list = world.listed(ROOT);
        list.retain(|listed| listed.lease == lease);
        list.remove(0).revoked.unwrap()
    };
    assert_eq!(shown(&other.reply.lease).force, shown(&other.reply.lease).since + HOUR);
    world.until(|| shown(&grant.reply.lease).forced);
    assert!(!shown(&other.reply.lease).forced);
    let revoked = world.revoke(ROOT, &other.reply.lease, 0).unwrap();
    assert!(revoked.forced, "what was begun before can be shortened after");
    drop((grant, other));
    world.retry_reclaims();
    world.assert_idle();
}

#[test]
fn a_keeper_that_hangs_holds_up_no_revocation() {
    let world = World::new();
    let grant = world.acquire(1002, &want(&[NIC])).unwrap();
    world.sim.fault(Fault::never("VFIO_IOMMU_UNMAP_DMA")).unwrap();
    let revoked = world.revoke(ROOT, &grant.reply.lease, 0).unwrap();
    assert!(revoked.forced && revoked.left[0].reason.contains("does not answer"), "{revoked:?}");
    world.sim.clear_faults().unwrap();
    drop(grant);
    world.until(|| !world.has_pending_reclaims());
    world.assert_idle();
}

#[test]
fn a_drain_ends_all_leases_that_are_one_s_own_to_end() {
    let world = World::new();
    let held = |world: &World| {
        let one = world.acquire(1000, &want_as(Handout::Iommufd, &[NIC])).unwrap();
        (one, world.acquire(1002, &want(&[OTHER_NIC])).unwrap())
    };
    let drained = |uid: u32| {
        let Drain { grace } = Drain { grace: 0 };
        world.run(async {
            let mut all = Vec::new();
            for begun in world.broker.drain(&caller(uid), &client(), grace).await.unwrap() {
                all.push(world.broker.revoked(begun).await);
            }
            all
        })
    };
    let (one, two) = held(&world);
    let of_m: Vec<_> = drained(1002).into_iter().map(|revoked| revoked.lease).collect();
    assert_eq!(of_m, [two.reply.lease.as_str()]);
    assert_eq!(
        world.ledger().leases().filter(|it| it.phase == crate::ledger::Phase::Held).count(),
        1
    );
    drop(two);
    world.retry_reclaims();
    let two = world.acquire(1002, &want(&[OTHER_NIC])).unwrap();
    let Grant { reply, fds } = one;
    // The nodes of its devices are closed: the kernel does not show it.
    let iommufd: Vec<_> = fds.into_iter().take(1).collect();
    let mut all = drained(ROOT);
    all.sort_by_key(|revoked| revoked.tenant.clone());
    assert_eq!(all.len(), 2);
    assert_eq!((&all[0].lease, all[0].left[0].until), (&reply.lease, Until::Administrator));
    assert_eq!((&*all[1].tenant, all[1].left[0].until), ("m", Until::Holder));
    drop((iommufd, two));
    world.retry_reclaims();
    assert!(drained(ROOT).is_empty());
    world.rebind(NIC);
    world.assert_idle();
}
