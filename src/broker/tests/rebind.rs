//! Devices that are proved free by their drivers, where the policy lets the broker do that.

use super::*;
use crate::protocol::{Bdf, GroupState};
use crate::sim::{Fault, Wire};
use nix::errno::Errno;
use std::sync::Barrier;

const NIC: &str = "0000:02:00.0";

/// Binds anew what nobody has open, at once; what somebody has open waits for the next attempt.
#[derive(Debug)]
struct AtOnce {
    sim: Arc<Wire>,
    begun: Mutex<Vec<Bdf>>,
}

impl Rebinder for AtOnce {
    fn begin(&self, device: Bdf, _registration: u64, driver: Option<&str>) {
        self.begun.lock().unwrap().push(device);
        let name = device.to_string();
        match self.sim.set_driver(&name, None) {
            Ok(()) => self.sim.set_driver(&name, driver).unwrap(),
            Err(errno) => assert_eq!(errno, Errno::EBUSY),
        }
    }
}

fn world(allowed: &str) -> (World, Arc<AtOnce>) {
    let allowed = format!("name = \"a\"\nuser = 1000\n{allowed}");
    let world = World::of(MACHINE, &POLICY.replace("name = \"a\"\nuser = 1000", &allowed));
    let rebinder = Arc::new(AtOnce { sim: world.sim.wire(), begun: Mutex::default() });
    world.broker.set_rebinder(Arc::clone(&rebinder) as Arc<dyn Rebinder>);
    (world, rebinder)
}

fn state(world: &World, uid: u32, group: u32) -> GroupState {
    let groups = world.broker.topology(&caller(uid)).unwrap().groups;
    groups.iter().find(|there| there.id == group).unwrap().state
}

#[test]
fn a_device_that_was_bound_anew_is_anybodys() {
    for allowed in ["rebind = true", "managed = true"] {
        let (world, _) = world(allowed);
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
    let (world, rebinder) = world("rebind = true");
    let mut grant = world.acquire(1000, &want_as(Handout::Iommufd, &[NIC])).unwrap();
    let stale = grant.fds.remove(1);
    drop(grant);
    world.serve_hang_ups();
    assert!(world.broker.has_pending_reclaims());
    for uid in [1000, 1001] {
        assert_eq!(state(&world, uid, 2), GroupState::Quarantined);
        let error = world.acquire(uid, &want(&[NIC])).unwrap_err();
        let Error::Quarantined { reason, until, .. } = error else { panic!("{error}") };
        assert!(reason.contains("waits for the last close"), "{reason}");
        assert_eq!(until, Until::Holder);
    }
    world.broker.retry_reclaims();
    assert!(world.broker.has_pending_reclaims());
    drop(stale);
    world.broker.retry_reclaims();
    assert!(!world.broker.has_pending_reclaims());
    drop(world.acquire(1001, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
    assert_eq!(rebinder.begun.lock().unwrap().len(), 3);
}

/// Takes devices off their drivers, and leaves the rest to others.
struct Unbinds {
    sim: Arc<Wire>,
    done: Arc<Barrier>,
}

impl Rebinder for Unbinds {
    fn begin(&self, device: Bdf, _registration: u64, driver: Option<&str>) {
        if driver.is_some() {
            self.sim.set_driver(&device.to_string(), None).unwrap();
            self.done.wait();
        }
    }
}

#[test]
fn a_device_without_a_driver_is_waited_for_while_it_is_taken_back() {
    let policy = POLICY.replace("user = 1000", "user = 1000\nrebind = true");
    let world = World::of(MACHINE, &policy).made_patient();
    let done = Arc::new(Barrier::new(2));
    let rebinder = Unbinds { sim: world.sim.wire(), done: Arc::clone(&done) };
    world.broker.set_rebinder(Arc::new(rebinder));
    let mut grant = world.acquire(1000, &want_as(Handout::Iommufd, &[NIC])).unwrap();
    grant.fds.clear();
    std::thread::scope(|scope| {
        let release = scope.spawn(|| world.release(1000, &grant.reply));
        done.wait();
        // From here on it has no driver.
        let again = scope.spawn(|| world.acquire(1000, &want(&[NIC])));
        world.sim.set_driver(NIC, Some("vfio-pci")).unwrap();
        assert_eq!(release.join().unwrap(), Ok(true));
        drop(again.join().unwrap().unwrap());
    });
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_device_whose_driver_waits_is_not_said_to_lack_one() {
    let policy = POLICY.replace("user = 1000", "user = 1000\nrebind = true");
    let world = World::of(MACHINE, &policy);
    let rebinder = Unbinds { sim: world.sim.wire(), done: Arc::new(Barrier::new(1)) };
    world.broker.set_rebinder(Arc::new(rebinder));
    drop(world.acquire(1000, &want_as(Handout::Iommufd, &[NIC])).unwrap());
    world.serve_hang_ups();
    for uid in [1000, 1001] {
        let error = world.acquire(uid, &want(&[NIC])).unwrap_err();
        let Error::Quarantined { reason, until, .. } = error else { panic!("{error}") };
        assert!(reason.contains("waits for the last close"), "{reason}");
        assert_eq!(until, Until::Holder);
    }
    world.sim.set_driver(NIC, Some("vfio-pci")).unwrap();
    world.broker.retry_reclaims();
    drop(world.acquire(1001, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_pf_with_vfs_stays_on_its_driver() {
    let (world, rebinder) = world("rebind = true");
    let pf = want_as(Handout::Iommufd, &["0000:05:00.0"]);
    let mut grant = world.acquire(1000, &pf).unwrap();
    grant.fds.clear();
    assert_eq!(world.release(1000, &grant.reply), Ok(false));
    assert!(rebinder.begun.lock().unwrap().is_empty());
    assert_eq!(
        [1000, 1001].map(|uid| state(&world, uid, 5)),
        [GroupState::Free, GroupState::Quarantined]
    );
    drop(world.acquire(1000, &pf).unwrap());
}

#[test]
fn a_tenant_that_does_not_allow_it_keeps_its_drivers() {
    let (world, rebinder) = world("rebind = false");
    drop(world.acquire(1000, &want_as(Handout::Iommufd, &[NIC])).unwrap());
    world.serve_hang_ups();
    assert!(rebinder.begun.lock().unwrap().is_empty());
    assert_eq!(state(&world, 1001, 2), GroupState::Quarantined);
}

#[test]
fn what_earlier_leases_left_is_proved_too() {
    let (world, _) = world("rebind = true");
    // As after a lease of another time, when that was not allowed.
    let grant = world.acquire(1000, &want_as(Handout::Iommufd, &["0000:01:00.0"])).unwrap();
    let id = grant.reply.lease.parse().unwrap();
    let left = [("0000:01:00.0".parse().unwrap(), 0)].into();
    let mut books = world.broker.books();
    books.ledger.apply(crate::ledger::Request::End { lease: id, at: 1 }).unwrap();
    books.ledger.apply(crate::ledger::Request::Unbound { group: 1, at: 1, left }).unwrap();
    drop(books);
    drop(grant);
    assert_eq!(state(&world, 1001, 1), GroupState::Quarantined);
    let mut grant = world.acquire(1000, &want_as(Handout::Iommufd, &["0000:01:00.1"])).unwrap();
    grant.fds.clear();
    assert_eq!(world.release(1000, &grant.reply), Ok(true));
    assert_eq!(state(&world, 1001, 1), GroupState::Free);
}

/// Takes devices off their drivers; from then on their driver has them and has not registered them.
struct Slow {
    sim: Arc<Wire>,
    done: Arc<Barrier>,
}

/// A VFIO driver by its name, which registers nothing.
const BINDING: &str = "slowvfio";

impl Rebinder for Slow {
    fn begin(&self, device: Bdf, _registration: u64, driver: Option<&str>) {
        if driver == Some("vfio-pci") {
            self.sim.set_driver(&device.to_string(), None).unwrap();
            self.sim.set_driver(&device.to_string(), Some(BINDING)).unwrap();
            self.done.wait();
        }
    }
}

fn bound(world: &World) {
    world.sim.set_driver(NIC, None).unwrap();
    world.sim.set_driver(NIC, Some("vfio-pci")).unwrap();
}

/// Uid 1000 takes what the host can do, iommufd first.
fn by_iommufd_first() -> String {
    let policy = POLICY.replace("user = 1000", "user = 1000\nrebind = true");
    policy.replacen(
        "handouts = [\"container\", \"group\", \"devices\", \"iommufd\"]",
        "handouts = [\"iommufd\", \"group\", \"devices\"]",
        1,
    )
}

#[test]
fn a_device_that_is_being_bound_again_is_not_free_yet() {
    let world = World::of(MACHINE, &by_iommufd_first());
    let done = Arc::new(Barrier::new(1));
    world.broker.set_rebinder(Arc::new(Slow { sim: world.sim.wire(), done }));
    drop(world.acquire(1000, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    assert!(world.broker.has_pending_reclaims());
    let error = world.acquire(1000, &want(&[NIC])).unwrap_err();
    let Error::Quarantined { reason, until, .. } = error else { panic!("{error}") };
    assert!(reason.contains("still binding it again"), "{reason}");
    assert_eq!(until, Until::Kernel);
    bound(&world);
    world.broker.retry_reclaims();
    assert!(!world.broker.has_pending_reclaims());
    let grant = world.acquire(1000, &want(&[NIC])).unwrap();
    assert_eq!(grant.reply.handout, Handout::Iommufd);
}

#[test]
fn a_device_that_is_being_bound_again_is_waited_for() {
    let world = World::of(MACHINE, &by_iommufd_first()).made_patient();
    let done = Arc::new(Barrier::new(2));
    let rebinder = Slow { sim: world.sim.wire(), done: Arc::clone(&done) };
    world.broker.set_rebinder(Arc::new(rebinder));
    let mut grant = world.acquire(1000, &want(&[NIC])).unwrap();
    grant.fds.clear();
    std::thread::scope(|scope| {
        let release = scope.spawn(|| world.release(1000, &grant.reply));
        done.wait();
        // From here on it has a driver and no node of its own. That is what the other call sees: it is
        // held up when it has looked for the node, until that is there.
        let after = format!("bus/pci/devices/{NIC}/sriov_totalvfs");
        world.sim.fault(Fault::never("sysfs").on(&after)).unwrap();
        let again = scope.spawn(|| world.acquire(1000, &want(&[NIC])));
        while world.stats().held == 0 {
            std::thread::yield_now();
        }
        bound(&world);
        world.sim.clear_faults().unwrap();
        assert_eq!(release.join().unwrap(), Ok(true));
        assert_eq!(again.join().unwrap().unwrap().reply.handout, Handout::Iommufd);
    });
}

#[test]
fn a_device_that_is_proved_already_is_not_bound_again() {
    let (world, rebinder) = world("rebind = true");
    let left = want_as(Handout::Iommufd, &["0000:01:00.0"]);
    let grant = world.acquire(1000, &left).unwrap();
    let id = grant.reply.lease.parse().unwrap();
    let registration =
        crate::host::registration(&*world.sim.kernel(), "0000:01:00.0".parse().unwrap());
    let left = [("0000:01:00.0".parse().unwrap(), registration.unwrap().unwrap())].into();
    let mut books = world.broker.books();
    books.ledger.apply(crate::ledger::Request::End { lease: id, at: 1 }).unwrap();
    books.ledger.apply(crate::ledger::Request::Unbound { group: 1, at: 1, left }).unwrap();
    drop(books);
    drop(grant);
    let mut grant = world.acquire(1000, &want_as(Handout::Iommufd, &["0000:01:00.1"])).unwrap();
    grant.fds.clear();
    // An administrator has bound it to the host's driver, which is none of the broker's business.
    world.sim.set_driver("0000:01:00.0", None).unwrap();
    world.sim.set_driver("0000:01:00.0", Some("nouveau")).unwrap();
    assert_eq!(world.release(1000, &grant.reply), Ok(true));
    assert_eq!(*rebinder.begun.lock().unwrap(), ["0000:01:00.1".parse().unwrap()]);
}
