//! A broker that ends while its keepers go on, and the next one.

use super::*;
use crate::broker::keeper::NotDone;
use crate::process::keeper::{LeaseState, Phase, Saved, VERSION};
use crate::protocol::GroupState;
use nix::errno::Errno;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};

const NIC: &str = "0000:02:00.0";
const PAIR: [&str; 2] = ["0000:01:00.0", "0000:01:00.1"];

/// The broker and its links are gone; kernel and keepers are not. Another one starts, with this policy.
fn restarted_with(world: World, policy: &str) -> Result<World, Error> {
    let World { local, broker, keepers, sim, runtime, .. } = world;
    drop((local, broker));
    drop(runtime);
    let kernel = sim.kernel();
    let world = World::on(sim, keepers, policy, Duration::ZERO, kernel);
    world.run(async { world.broker.adopt().await })?;
    Ok(world)
}

fn restarted(world: World) -> World {
    restarted_with(world, POLICY).unwrap()
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

/// What each keeper has written down.
fn written(world: &World) -> Vec<(String, Vec<LeaseState>)> {
    world.keepers.saved().into_iter().map(|(name, leases)| (name, leases.unwrap())).collect()
}

/// Writes what a keeper wrote that is no more.
fn write_down(world: &World, name: &str, leases: Vec<LeaseState>) {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let (version, boot, pid) = (VERSION, boot.trim().to_owned(), 1);
    let saved = Saved { version, boot, pid, leases };
    write_text(world, name, &serde_json::to_string(&saved).unwrap());
}

fn write_text(world: &World, name: &str, text: &str) {
    let directory = world.keepers.place.path().join(name);
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(&directory).unwrap();
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(directory.join("state")).unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
}

#[test]
fn live_leases_go_on() {
    let world = World::new();
    let requests = [
        (1000, want(&[NIC])),
        (1001, want_as(Handout::Group, &["0000:08:00.0"])),
        (1000, want_in("pool", &[PAIR[0]])),
        (1001, want_in("pool", &["0000:03:00.0"])),
    ];
    let grants: Vec<_> =
        requests.iter().map(|(uid, request)| world.acquire(*uid, request).unwrap()).collect();
    world.map(1000, &grants[2].reply, 0, 8192).unwrap();
    let (before, stats) = (world.ledger(), world.stats());
    let mut world = world;
    for _ in 0..2 {
        world = restarted(world);
        world.until(|| world.ledger() == before);
        assert_eq!(world.stats(), stats);
    }
    // Keys and names mean what they did, and nobody else gets anything.
    let list = world.broker.leases(&caller(1000)).unwrap().leases;
    assert_eq!(list.len(), 4 - usize::from(!world.broker.may_see(&caller(1000), "b")) * 2);
    for (uid, request) in &requests {
        assert!(matches!(world.acquire(*uid, request).unwrap_err(), Error::Busy { .. }));
    }
    let wrong = GetFds { key: "0".repeat(32), ..get_fds(&grants[0].reply) };
    assert!(matches!(world.get_fds(1000, &wrong), Err(Error::NoSuchLease { .. })));
    let (fds, files) = world.get_fds(1000, &get_fds(&grants[0].reply)).unwrap();
    assert_eq!((fds.fds.len(), files.len()), (3, 3));
    drop(files);
    // A member's mappings are known, and so is that the container is the same one.
    let overlap = world.map(1001, &grants[3].reply, 4096, 4096).unwrap_err();
    assert!(matches!(&overlap, Error::Conflict { why, .. } if why.contains("another member")));
    world.map(1001, &grants[3].reply, 8192, 4096).unwrap();
    assert_eq!(world.unmap(1000, &grants[2].reply, 0, 8192), Ok(8192));
    let joined = world.acquire(1000, &want_in("pool", &["0000:05:00.0"])).unwrap();
    assert_eq!(world.stats().spaces.iter().filter(|space| space.groups.len() == 3).count(), 1);
    let added = world.acquire(1000, &more(&grants[2].reply, &[PAIR[1]])).unwrap();
    drop((joined, added));
    let mut first = grants;
    let last = first.split_off(1);
    let held = first[0].reply.clone();
    drop(first);
    world.serve_hang_ups();
    assert!(matches!(world.release(1000, &held), Err(Error::NoSuchLease { .. })));
    let held: Vec<_> = last.iter().map(|grant| grant.reply.clone()).collect();
    drop(last);
    world.serve_hang_ups();
    assert!(held.iter().all(|held| !world.broker.shows(&caller(1001), &held.lease)));
    world.assert_idle();
}

/// A broker that dies in an extension leaves it in the keeper's state file; the keeper undoes it, perhaps
/// after the next broker has read that.
#[test]
fn an_extension_that_is_undone_after_a_restart_leaves_its_devices_to_others() {
    const OTHER: &str = "0000:08:00.0";
    let world = World::new();
    let other = world.acquire(1000, &want(&[OTHER])).unwrap();
    let of_other = written(&world).remove(0).1.remove(0);
    drop(other);
    world.serve_hang_ups();
    let held = world.acquire(1000, &want(&[NIC])).unwrap();
    let before = world.ledger();
    let (name, mut leases) = written(&world).remove(0);
    leases[0].record.devices.extend(of_other.record.devices);
    leases[0].groups.extend(of_other.groups);
    write_down(&world, &name, leases);
    let world = restarted(world);
    world.until(|| world.ledger() == before);
    drop(world.acquire(1001, &want_as(Handout::Group, &[OTHER])).unwrap());
    drop(held);
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn quotas_and_the_rules_of_functions_still_hold() {
    let world = World::new();
    let pf = world.acquire(1000, &want_as(Handout::Devices, &["0000:05:00.0"])).unwrap();
    let nic = world.acquire(1000, &want_as(Handout::Devices, &[NIC])).unwrap();
    for page in 0..5 {
        world.map(1000, &nic.reply, page << 12, 4096).unwrap();
    }
    let before = world.ledger();
    let world = restarted(world);
    world.until(|| world.ledger() == before);
    let conflict = world.acquire(1001, &want(&["0000:05:00.1"])).unwrap_err();
    assert!(matches!(conflict, Error::Conflict { .. }), "{conflict}");
    world.map(1000, &pf.reply, 0, 4096).unwrap();
    let over = world.map(1000, &pf.reply, 4096, 4096).unwrap_err();
    assert!(matches!(over, Error::OverLimit { most: 6, .. }), "{over}");
    let more: Vec<_> = [PAIR[0], "0000:03:00.0", "0000:08:00.0"]
        .iter()
        .map(|bdf| world.acquire(1000, &want_as(Handout::Devices, &[bdf])).unwrap())
        .collect();
    let over = world.acquire(1000, &want_as(Handout::Devices, &["0000:05:00.1"])).unwrap_err();
    assert!(matches!(over, Error::OverLimit { most: 5, .. }), "{over}");
    drop((pf, nic, more));
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_lease_that_ends_while_no_broker_is_there_is_known_to_have_ended() {
    let world = World::new();
    let mut grant = world.acquire(1000, &want(&[NIC])).unwrap();
    let stale = grant.fds.remove(1);
    let other = world.acquire(1000, &want(&["0000:08:00.0"])).unwrap();
    let World { local, broker, witness, keepers, sim, runtime } = world;
    drop((local, broker, runtime));
    drop((grant, other));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(until(|| {
        let all = keepers.saved();
        let ended = |state: &LeaseState| state.phase == Phase::Ending && state.call.is_none();
        all.len() == 1 && all[0].1.as_ref().is_ok_and(|leases| leases.iter().all(ended))
    }));
    drop(witness);
    let kernel = sim.kernel();
    let world = World::on(sim, keepers, POLICY, Duration::ZERO, kernel);
    world.run(async { world.broker.adopt().await }).unwrap();
    drop(world.acquire(1001, &want(&["0000:08:00.0"])).unwrap());
    is_quarantined(&world, 1000, &[NIC]);
    drop(stale);
    world.until(|| !world.has_pending_reclaims());
    drop(world.acquire(1001, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_node_that_was_open_then_keeps_its_device_for_its_tenant() {
    for ended_before in [false, true] {
        let world = World::new();
        let grant = world.acquire(1000, &by_iommufd(&[NIC, PAIR[0]])).unwrap();
        let lease = grant.reply.lease.clone();
        let stale = stale(grant, NIC);
        if ended_before {
            world.serve_hang_ups();
        }
        let world = restarted(world);
        world.until(|| !world.has_pending_reclaims() && world.broker.held().is_empty());
        for devices in [&[NIC][..], &PAIR] {
            assert_eq!(is_quarantined(&world, 1001, devices), Until::Administrator);
        }
        let groups = world.broker.topology(&caller(1001)).unwrap().groups;
        let unproved = groups.into_iter().find(|group| group.id == 2).unwrap().unproved.unwrap();
        assert_eq!((unproved.lease, &*unproved.tenant, &*unproved.vm), (lease, "a", "web1"));
        // The same tenant has it again, and loses it to another restart.
        drop(world.acquire(1000, &by_iommufd(&[NIC])).unwrap());
        let world = restarted(world);
        world.until(|| !world.has_pending_reclaims() && world.broker.held().is_empty());
        is_quarantined(&world, 1001, &[NIC]);
        assert_eq!(world.sim.set_driver(NIC, None), Err(Errno::EBUSY));
        drop(stale);
        world.rebind(NIC);
        world.rebind(PAIR[0]);
        drop(world.acquire(1001, &want(&[NIC, PAIR[0], PAIR[1]])).unwrap());
        world.serve_hang_ups();
        world.assert_idle();
    }
}

/// Of two leases that a tenant had of a group, one after the other.
#[test]
fn what_several_leases_left_of_a_group_comes_back_as_one() {
    let world = World::new();
    for device in PAIR {
        drop(world.acquire(1000, &by_iommufd(&[device])).unwrap());
        world.serve_hang_ups();
    }
    let world = restarted(world);
    is_quarantined(&world, 1001, &PAIR);
    world.rebind(PAIR[0]);
    is_quarantined(&world, 1001, &PAIR);
    world.rebind(PAIR[1]);
    drop(world.acquire(1001, &want(&PAIR)).unwrap());
}

#[test]
fn a_tenant_that_means_others_now_has_nothing_of_it() {
    let elsewhere =
        "version = 1\n[[tenant]]\nname = \"z\"\nuser = 1000\ndevices = [\"8086:10d3\"]\n";
    let policies = [
        // Others by that name, and nobody.
        POLICY.replace("name = \"a\"\nuser = 1000", "name = \"a\"\nuser = [1000, 1004]"),
        elsewhere.to_owned(),
    ];
    for policy in policies {
        let world = World::new();
        drop(world.acquire(1000, &by_iommufd(&[NIC])).unwrap());
        world.serve_hang_ups();
        let world = restarted_with(world, &policy).unwrap();
        is_quarantined(&world, 1000, &[NIC]);
        world.sim.set_driver(NIC, None).unwrap();
        world.sim.set_driver(NIC, Some("vfio-pci")).unwrap();
        drop(world.acquire(1000, &want(&[NIC])).unwrap());
    }
    // Whom nobody asks about can come and go; one that comes before it only takes some away.
    let before = "[[tenant]]\nname = \"first\"\nuser = 1004\ndevices = [\"8086:10d3\"]\n[[tenant]]";
    let policies =
        [POLICY.replace("user = 1003", "user = 1005"), POLICY.replacen("[[tenant]]", before, 1)];
    for policy in policies {
        let world = World::new();
        drop(world.acquire(1000, &by_iommufd(&[NIC])).unwrap());
        world.serve_hang_ups();
        let world = restarted_with(world, &policy).unwrap();
        drop(world.acquire(1000, &want(&[NIC])).unwrap());
    }
}

/// The states of leases whose keepers' processes are no more.
fn killed(handout: Handout) -> (World, LeaseState) {
    let world = World::new();
    let grant = world.acquire(1000, &want_as(handout, &[NIC])).unwrap();
    let (_, saved) = written(&world).remove(0);
    drop(grant);
    world.serve_hang_ups();
    world.rebind(NIC);
    world.assert_idle();
    (world, saved.into_iter().next().unwrap())
}

#[test]
fn what_a_dead_keeper_had_is_taken_back() {
    for handout in [Handout::Container, Handout::Group, Handout::Devices, Handout::Iommufd] {
        let (world, state) = killed(handout);
        write_down(&world, "0123456789abcdef", vec![state.clone()]);
        let world = restarted(world);
        // Known before anything is asked for, to everybody.
        assert!(world.broker.shows(&caller(1000), &state.record.lease));
        world.until(|| world.broker.held().is_empty() && !world.has_pending_reclaims());
        drop(world.acquire(1000, &want(&[NIC])).unwrap());
        world.serve_hang_ups();
        world.assert_idle();
    }
}

#[test]
fn what_cant_be_relied_on_ends_the_start() {
    let (world, state) = killed(Handout::Iommufd);
    let (one, other) = ("0123456789abcdef", "fedcba9876543210");
    let mut keyless = state.clone();
    keyless.record.key = "none".into();
    let mut nameless = state.clone();
    nameless.record.lease = "no lease".into();
    let mut world = world;
    for bad in [keyless, nameless] {
        write_down(&world, one, vec![bad]);
        world = refused(world);
    }
    write_text(&world, one, "{");
    world = refused(world);
    // The same lease, and the same group, in two places.
    let mut second = state.clone();
    for lease in [state.record.lease.clone(), other.into()] {
        write_down(&world, one, vec![state.clone()]);
        second.record.lease = lease;
        write_down(&world, other, vec![second.clone()]);
        world = refused(world);
    }
    std::fs::remove_dir_all(world.keepers.place.path().join(other)).unwrap();
    let world = restarted(world);
    assert!(world.broker.shows(&caller(1000), &state.record.lease));
}

/// A start fails, and no keeper was asked for anything.
fn refused(world: World) -> World {
    let World { local, broker, keepers, sim, runtime, witness } = world;
    drop((local, broker, runtime, witness));
    let kernel = sim.kernel();
    let world = World::on(sim, keepers, POLICY, Duration::ZERO, kernel);
    let error = world.broker_adopts().unwrap_err();
    assert!(matches!(error, Error::BadRequest { .. }), "{error}");
    world
}

impl World {
    fn broker_adopts(&self) -> Result<(), Error> {
        // What it has spawned goes with the world, before it runs.
        self.run(async { self.broker.adopt().await })
    }
}

#[test]
fn a_lease_of_another_form_leaves_no_node_to_prove() {
    let world = World::new();
    for handout in [Handout::Container, Handout::Group, Handout::Devices] {
        drop(world.acquire(1000, &want_as(handout, &[NIC])).unwrap());
        world.serve_hang_ups();
        world.assert_idle();
    }
    let groups = world.broker.topology(&caller(1000)).unwrap().groups;
    assert!(groups.iter().all(|group| group.state == GroupState::Free));
}

#[test]
fn a_lease_of_which_only_a_mapping_is_left_is_known_until_that_is_gone() {
    let (world, mut state) = killed(Handout::Devices);
    (state.phase, state.mappings) = (Phase::Ending, 1);
    state.groups.clear();
    write_down(&world, "0123456789abcdef", vec![state.clone()]);
    let world = restarted(world);
    assert!(world.broker.shows(&caller(1000), &state.record.lease));
    // Its keeper's process is no more: the kernel has undone what it had mapped.
    world.until(|| world.ledger() == crate::ledger::Ledger::default());
    world.assert_idle();
}

#[test]
fn what_a_keeper_has_no_lease_for_is_no_lease_to_the_client_either() {
    let world = World::new();
    let grant = world.acquire(1000, &want(&[NIC])).unwrap();
    let lease = grant.reply.lease.parse().unwrap();
    let why = || NotDone::Failed(crate::process::keeper::Failure::NoSuchLease);
    let error = world.broker.not_done(why(), lease, &[], "GetFds");
    assert_eq!(error, Error::NoSuchLease { lease: grant.reply.lease.clone() });
}
