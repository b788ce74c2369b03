//! A broker that ends while somebody has devices by their own nodes, and the next one on the same
//! kernel.

use super::*;
use crate::broker::rebind::Rebinder;
use crate::host;
use crate::kernel;
use crate::protocol::{Bdf, GroupState};
use crate::sim::Wire;
use nix::errno::Errno;
use std::sync::atomic::{AtomicBool, Ordering};

const NIC: &str = "0000:02:00.0";
const PAIR: [&str; 2] = ["0000:01:00.0", "0000:01:00.1"];

/// A record in memory, which can be full.
#[derive(Default)]
struct Kept {
    given: Mutex<Vec<Given>>,
    full: AtomicBool,
}

impl Record for Kept {
    fn write(&self, given: &[Given]) -> kernel::Result<()> {
        if self.full.load(Ordering::SeqCst) {
            return Err(kernel::Error::new("write", "the record", Errno::ENOSPC));
        }
        *self.given.lock().unwrap() = given.to_vec();
        Ok(())
    }
}

impl Kept {
    fn devices(&self) -> Vec<String> {
        self.given.lock().unwrap().iter().map(|given| given.device.to_string()).collect()
    }
}

fn world() -> (World, Arc<Kept>) {
    let (world, kept) = (World::new(), Arc::new(Kept::default()));
    world.broker.set_record(Arc::clone(&kept) as Arc<dyn Record>, Vec::new()).unwrap();
    (world, kept)
}

/// The broker and its lifelines are gone; the kernel is not. Another one starts, with this policy.
fn restarted_with(world: World, kept: &Arc<Kept>, policy: &str) -> World {
    let World { sim, .. } = world;
    started_on(sim, kept, policy)
}

fn started_on(sim: Sim, kept: &Arc<Kept>, policy: &str) -> World {
    let witness = Arc::new(Witness::default());
    let policy = Arc::new(Policy::parse("policy.toml", policy, &NoNames).unwrap());
    let observer = Arc::clone(&witness) as Arc<dyn Observer>;
    let broker = Broker::with_patience(sim.kernel(), policy, observer, Vec::new());
    let given = kept.given.lock().unwrap().clone();
    broker.set_record(Arc::clone(kept) as Arc<dyn Record>, given).unwrap();
    World { sim, broker, witness }
}

/// The same, and it has looked at what it took over, as the daemon does at once.
fn restarted(world: World, kept: &Arc<Kept>) -> World {
    let world = restarted_with(world, kept, POLICY);
    world.broker.retry_reclaims();
    world
}

fn by_iommufd(devices: &[&str]) -> Acquire {
    want_as(Handout::Iommufd, devices)
}

/// What is left of a lease when all but one device's node is closed.
fn stale(grant: Grant, bdf: &str) -> OwnedFd {
    let Grant { reply, fds } = grant;
    let at = reply.fds.iter().position(|fd| fd.kind == FdKind::Cdev && fd.name == bdf).unwrap();
    fds.into_iter().nth(at).unwrap()
}

fn is_quarantined(world: &World, uid: u32, devices: &[&str]) -> Until {
    let error = world.acquire(uid, &want(devices)).unwrap_err();
    let Error::Quarantined { until, .. } = error else { panic!("{error}") };
    until
}

#[test]
fn a_node_that_was_open_then_keeps_its_device_for_its_tenant() {
    for ended_before in [false, true] {
        let (world, kept) = world();
        let grant = world.acquire(1000, &by_iommufd(&[NIC, PAIR[0]])).unwrap();
        let lease = grant.reply.lease.clone();
        let stale = stale(grant, NIC);
        if ended_before {
            world.serve_hang_ups();
        }
        let world = restarted(world, &kept);
        assert!(!world.broker.has_pending_reclaims());
        for device in [NIC, PAIR[1]] {
            assert_eq!(is_quarantined(&world, 1001, &[device]), Until::Administrator);
        }
        let groups = world.broker.topology(&caller(1001)).unwrap().groups;
        let unproved = groups.into_iter().find(|group| group.id == 2).unwrap().unproved.unwrap();
        assert_eq!((unproved.lease, &*unproved.tenant, &*unproved.vm), (lease, "a", "web1"));
        // The same tenant has it again, and loses it to another restart.
        drop(world.acquire(1000, &by_iommufd(&[NIC])).unwrap());
        let world = restarted(world, &kept);
        is_quarantined(&world, 1001, &[NIC]);
        assert_eq!(world.sim.set_driver(NIC, None), Err(Errno::EBUSY));
        drop(stale);
        world.rebind(NIC);
        assert_eq!(kept.devices(), [PAIR[0]], "what is proved is forgotten");
        world.rebind(PAIR[0]);
        drop(world.acquire(1001, &want(&[NIC, PAIR[1]])).unwrap());
        world.serve_hang_ups();
        world.assert_idle();
        assert_eq!(kept.devices(), [""; 0]);
    }
}

#[test]
fn a_bound_device_is_waited_for() {
    let (world, kept) = world();
    let grant = world.acquire(1000, &by_iommufd(&[NIC])).unwrap();
    let iommufd = kernel::Iommufd::from_fd(world.sim.kernel(), grant.fds[0].try_clone().unwrap());
    let cdev = kernel::Device::from_fd(world.sim.kernel(), NIC, stale(grant, NIC));
    cdev.bind_iommufd(&iommufd).unwrap();
    let world = restarted(world, &kept);
    assert!(world.broker.has_pending_reclaims());
    for uid in [1000, 1001] {
        is_quarantined(&world, uid, &[NIC]);
    }
    drop((cdev, iommufd));
    world.broker.retry_reclaims();
    assert!(!world.broker.has_pending_reclaims());
    is_quarantined(&world, 1001, &[NIC]);
    drop(world.acquire(1000, &want(&[NIC])).unwrap());
}

/// Of two leases that a tenant had of a group, one after the other.
#[test]
fn what_several_leases_left_of_a_group_comes_back_as_one() {
    let (world, kept) = world();
    drop(world.acquire(1000, &by_iommufd(&[PAIR[0]])).unwrap());
    world.serve_hang_ups();
    drop(world.acquire(1000, &by_iommufd(&[PAIR[1]])).unwrap());
    let world = restarted(world, &kept);
    is_quarantined(&world, 1001, &[PAIR[0]]);
    world.rebind(PAIR[0]);
    is_quarantined(&world, 1001, &[PAIR[0]]);
    world.rebind(PAIR[1]);
    drop(world.acquire(1001, &want(&[PAIR[0]])).unwrap());
}

#[test]
fn a_device_that_was_bound_anew_meanwhile_is_anybodys() {
    let (world, kept) = world();
    drop(world.acquire(1000, &by_iommufd(&[NIC])).unwrap());
    let World { sim, .. } = world;
    sim.set_driver(NIC, None).unwrap();
    sim.set_driver(NIC, Some("vfio-pci")).unwrap();
    let world = started_on(sim, &kept, POLICY);
    world.broker.retry_reclaims();
    drop(world.acquire(1001, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
    assert_eq!(kept.devices(), [""; 0]);
}

#[test]
fn a_tenant_that_means_others_now_has_nothing_of_it() {
    let elsewhere =
        "version = 1\n[[tenant]]\nname = \"z\"\nuser = 1000\ndevices = [\"8086:10d3\"]\n";
    let policies = [
        // Others by that name, others before it, and nobody.
        POLICY.replace("name = \"a\"\nuser = 1000", "name = \"a\"\nuser = [1000, 1004]"),
        POLICY.replacen(
            "[[tenant]]",
            "[[tenant]]\nname = \"first\"\nuser = 1004\ndevices = [\"8086:10d3\"]\n[[tenant]]",
            1,
        ),
        elsewhere.to_owned(),
    ];
    for policy in policies {
        let (world, kept) = world();
        drop(world.acquire(1000, &by_iommufd(&[NIC])).unwrap());
        let world = restarted_with(world, &kept, &policy);
        world.broker.retry_reclaims();
        assert!(!world.broker.has_pending_reclaims());
        is_quarantined(&world, 1000, &[NIC]);
        world.sim.set_driver(NIC, None).unwrap();
        world.sim.set_driver(NIC, Some("vfio-pci")).unwrap();
        drop(world.acquire(1000, &want(&[NIC])).unwrap());
    }
    // Whom nobody asks about can come and go.
    let (world, kept) = world();
    drop(world.acquire(1000, &by_iommufd(&[NIC])).unwrap());
    let world = restarted_with(world, &kept, &POLICY.replace("user = 1003", "user = 1005"));
    world.broker.retry_reclaims();
    drop(world.acquire(1000, &want(&[NIC])).unwrap());
}

/// Takes the device off its driver and binds it again.
struct AtOnce(Arc<Wire>);

impl Rebinder for AtOnce {
    fn begin(&self, device: Bdf, _registration: u64, driver: Option<&str>) {
        self.0.set_driver(&device.to_string(), None).unwrap();
        self.0.set_driver(&device.to_string(), driver).unwrap();
    }
}

#[test]
fn where_that_is_allowed_it_is_proved_by_its_driver() {
    let (world, kept) = world();
    drop(world.acquire(1000, &by_iommufd(&[NIC])).unwrap());
    let policy = POLICY.replace("user = 1000\n", "user = 1000\nrebind = true\n");
    let world = restarted_with(world, &kept, &policy);
    world.broker.set_rebinder(Arc::new(AtOnce(world.sim.wire())));
    world.broker.retry_reclaims();
    drop(world.acquire(1001, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
    assert_eq!(kept.devices(), [""; 0]);
}

#[test]
fn what_can_not_be_written_down_is_not_handed_out() {
    let (world, kept) = world();
    let first = world.acquire(1000, &by_iommufd(&[NIC])).unwrap();
    let before = (world.stats(), world.broker.books().ledger.clone());
    kept.full.store(true, Ordering::SeqCst);
    let add = more(&first.reply, &PAIR);
    for request in [by_iommufd(&PAIR), add.clone()] {
        let error = world.acquire(1000, &request).unwrap_err();
        assert!(advice(&error).unwrap().contains("--socket"), "{error}");
        let Error::Kernel { call, name, .. } = error else { panic!("{error}") };
        assert_eq!((&*call, &*name), ("write", "ENOSPC"));
        assert_eq!((world.stats(), world.broker.books().ledger.clone()), before);
    }
    // What is in the record already can be had again, and what has no node of its own is not in it.
    let one = GetFds { lifeline: Some(false), kind: Some(FdKind::Cdev), ..get_fds(&first.reply) };
    world.broker.get_fds(&caller(1000), &one).unwrap();
    drop(world.acquire(1000, &want_as(Handout::Group, &PAIR)).unwrap());
    world.serve_hang_ups();
    kept.full.store(false, Ordering::SeqCst);
    let second = world.acquire(1000, &add).unwrap();
    assert_eq!(kept.devices(), [PAIR[0], PAIR[1], NIC]);
    drop((first, second));
}

#[test]
fn what_was_undone_is_not_remembered() {
    let (world, kept) = world();
    let answers = std::cell::Cell::new(0);
    let lost = || {
        answers.set(answers.get() + 1);
        false
    };
    world.broker.acquire_while(&caller(1000), &by_iommufd(&[NIC]), &lost).unwrap_err();
    assert_eq!((answers.get(), kept.devices()), (1, Vec::new()));
    // A limit that is met last of all: lease pipes.
    let policy = POLICY.replace("leases = 5,", "leases = 5, fds = 1,");
    let world = restarted_with(world, &kept, &policy);
    let first = world.acquire(1000, &by_iommufd(&[NIC])).unwrap();
    assert_eq!(kept.devices(), [NIC]);
    world.acquire(1000, &more(&first.reply, &PAIR)).unwrap_err();
    assert_eq!(kept.devices(), [NIC]);
}

#[test]
fn a_record_that_contradicts_itself_is_refused() {
    let (world, kept) = world();
    drop(world.acquire(1000, &by_iommufd(&[NIC])).unwrap());
    let World { sim, .. } = world;
    let mut given = kept.given.lock().unwrap().clone();
    given[0].lease = "no lease".into();
    let policy = Arc::new(Policy::parse("policy.toml", POLICY, &NoNames).unwrap());
    let broker = Broker::new(sim.kernel(), policy, Arc::new(Witness::default()));
    let error = broker.set_record(Arc::clone(&kept) as Arc<dyn Record>, given).unwrap_err();
    assert!(error.to_string().contains("no lease"), "{error}");
    assert!(host::registration(&*sim.kernel(), NIC.parse().unwrap()).unwrap().is_some());
}

#[test]
fn a_lease_of_another_form_is_not_in_the_record() {
    let (world, kept) = world();
    for handout in [Handout::Container, Handout::Group, Handout::Devices] {
        drop(world.acquire(1000, &want_as(handout, &[NIC])).unwrap());
        world.serve_hang_ups();
        assert_eq!(kept.devices(), [""; 0]);
    }
    let groups = world.broker.topology(&caller(1000)).unwrap().groups;
    assert!(groups.iter().all(|group| group.state == GroupState::Free));
}
