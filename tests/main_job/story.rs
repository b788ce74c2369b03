//! The story, step by step. Each step starts with nothing leased and ends so.

use crate::fuse::Fuse;
use crate::role::Role;
use crate::world::*;
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use nix::unistd::Pid;
use std::fs;
use std::time::{Duration, Instant};
use vfio_broker::protocol::GroupState;

const MIB: u64 = 1 << 20;
/// What a login gives: systemd's and the kernel's default RLIMIT_MEMLOCK.
const DEFAULT_MEMLOCK: u64 = 8 * MIB;

type Step = fn(&World);

pub const STEPS: [(&str, Step); 14] = [
    ("an ordinary user does what a VMM does", a_vmm_without_rights),
    ("the default memlock is too small, and the error says so", too_little_memlock),
    ("others are refused, and are told what they may know", others_are_refused),
    ("two share an enforced container", |world| two_share(world, "enforced")),
    ("two share a mutual container", |world| two_share(world, "mutual")),
    ("memory of huge pages is mapped whole", huge_pages),
    ("an iommufd and cdevs, again for one tenant and for no other", by_iommufd),
    ("a device is proved free by its driver, once nobody has it open", rebound),
    ("a daemon that was killed and started again knows what may be open", restarted),
    ("a file that a former holder's process keeps", |world| kept_files(world, "process")),
    ("a file that lies in a socket nobody reads", |world| kept_files(world, "queue")),
    ("a holder that keeps the kernel busy holds up nobody else", busy),
    ("a clock that is set back puts nothing off", clock_set_back),
    ("everything is as it was", nothing_is_left),
];

fn a_vmm_without_rights(world: &World) {
    // One lease before counting: what the daemon opens once and keeps is open then.
    let mut first = world.client(CAROL, DEFAULT_MEMLOCK, Role::Ask, &[NIC]);
    first.expect(&["got lease"]);
    first.ends();
    free_again(world);
    let before = settled(world);
    let mut alice = world.client(ALICE, 80 * MIB, Role::Vmm, &[NIC, &(64 * MIB).to_string()]);
    alice.expect(&["uid 2001", "CapEff: 0000000000000000"]);
    alice.expect(&["got lease", "container and /dev/vfio/"]);
    alice.expect(&["viable true, attached true"]);
    alice.expect(&["mapped 64 MiB"]);
    let said = alice.says();
    let ids = if world.real { sysfs_ids(NIC) } else { "8086:10d3".to_owned() };
    assert!(said.contains(&ids), "sysfs says {ids}");
    alice.expect(&["reset"]);
    alice.go_on();
    alice.expect(&["unmapped 64 MiB"]);
    alice.expect(&["proved: true"]);
    alice.ends();
    until("the daemon's files are as before", || open_files(world) == before);
    println!("    the daemon has {before} open files, as before");
}

fn too_little_memlock(world: &World) {
    // The simulated kernel has a limit of its own, see `world`.
    let bytes = if world.real { 64 * MIB } else { 128 * MIB };
    let words = [NIC, &bytes.to_string()];
    let mut alice = world.client(ALICE, DEFAULT_MEMLOCK, Role::Vmm, &words);
    for _ in 0..3 {
        alice.says();
    }
    let bytes = bytes.to_string();
    alice.expect(&["not mapped", "VFIO_IOMMU_MAP_DMA", "ENOMEM", &bytes, "RLIMIT_MEMLOCK"]);
    alice.ends();
    free_again(world);
}

fn others_are_refused(world: &World) {
    let mut alice = world.client(ALICE, 80 * MIB, Role::Vmm, &[NIC, &(64 * MIB).to_string()]);
    for _ in 0..6 {
        alice.says();
    }
    let mut mallory = world.client(MALLORY, DEFAULT_MEMLOCK, Role::Ask, &[NIC]);
    mallory.expect(&["refused", "denied"]);
    mallory.ends();
    let mut carol = world.client(CAROL, DEFAULT_MEMLOCK, Role::Ask, &[NIC]);
    let said = carol.expect(&["refused", "busy"]);
    assert!(!said.contains(&alice.pid().to_string()), "carol may not observe");
    carol.ends();
    let mut bob = world.client(BOB, DEFAULT_MEMLOCK, Role::Ask, &[NIC]);
    bob.expect(&["refused", "busy", &format!("pid {}", alice.pid()), "web1"]);
    bob.ends();
    // Killed with the 64 MiB mapped.
    alice.kill();
    free_again(world);
    let mut carol = world.client(CAROL, DEFAULT_MEMLOCK, Role::Ask, &[NIC]);
    carol.expect(&["got lease"]);
    carol.ends();
    free_again(world);
}

fn two_share(world: &World, container: &str) {
    let (low, high) = (16 * MIB, 32 * MIB);
    let (low_word, high_word) = (low.to_string(), high.to_string());
    let refusal = if container == "enforced" { "overlap" } else { "EEXIST" };
    let own = [container, EDU0, &low_word, &high_word];
    let mut left = world.client(LEFT, DEFAULT_MEMLOCK, Role::Member, &own);
    left.expect(&["joined"]);
    left.expect(&["mapped"]);
    let own = [container, EDU1, &high_word, &low_word];
    let mut right = world.client(RIGHT, DEFAULT_MEMLOCK, Role::Member, &own);
    right.expect(&["joined"]);
    right.expect(&["mapped"]);
    show_leases(world);

    for member in [&mut left, &mut right] {
        member.go_on();
        member.expect(&["; the foreign range", refusal]);
    }

    let before = world.observer().leases().unwrap();
    right.kill();
    until("the lease has ended", || world.observer().leases().unwrap().len() == 1);
    until("its group is free", || group_is_free(world, EDU1));
    let after = world.observer().leases().unwrap();
    let mapped = |leases: &[vfio_broker::protocol::Lease]| -> Option<u64> {
        leases.iter().map(|lease| lease.mapped_bytes).sum()
    };
    println!(
        "    killed one with SIGKILL: mapped bytes {:?} before, {:?} after",
        mapped(&before),
        mapped(&after)
    );
    left.go_on();
    if container == "enforced" {
        assert_eq!((mapped(&before), mapped(&after)), (Some(2 * MIB), Some(MIB)));
        // The kernel itself has forgotten the range: it can be mapped anew.
        left.expect(&["; mapped the foreign range"]);
    } else {
        assert_eq!((mapped(&before), mapped(&after)), (None, None));
        // Mappings made with the container's fd belong to nobody, and so they stay.
        left.expect(&["; the foreign range", "EEXIST"]);
    }
    let third = (64 * MIB).to_string();
    let own = [container, EDU1, &third, &low_word];
    let mut again = world.client(RIGHT, DEFAULT_MEMLOCK, Role::Member, &own);
    again.expect(&["joined"]);
    again.expect(&["mapped"]);
    again.go_on();
    again.expect(&["; the foreign range", refusal]);
    left.go_on();
    left.expect(&["; the foreign range"]);
    left.kill();
    again.kill();
    free_again(world);
}

fn huge_pages(world: &World) {
    if !world.real {
        println!("    of a real kernel alone: a simulated one pins nothing");
        return;
    }
    let mut left = world.client(LEFT, DEFAULT_MEMLOCK, Role::Huge, &["enforced", EDU0]);
    left.expect(&["joined"]);
    left.expect(&["half a page", "0x100000 is no multiple of the file's page, 0x200000"]);
    left.expect(&["more than the kernel has", "ENOMEM"]);
    left.expect(&["mapped", &(4 * MIB).to_string()]);
    left.expect(&["DMA done"]);
    left.expect(&["DMA goes on"]);
    left.expect(&["proved: true"]);
    left.ends();
    until("its group is free", || group_is_free(world, EDU0));
}

fn by_iommufd(world: &World) {
    let words = [NIC, PAIR[0], PAIR[1]];
    let mut erin = world.client(ERIN, DEFAULT_MEMLOCK, Role::Iommufd, &words);
    erin.expect(&["uid 2007", "CapEff: 0000000000000000", "/dev/iommu: E"]);
    if !world.has_iommufd() {
        erin.expect(&["refused", "backend iommufd is not supported", "no /dev/iommu"]);
        // Not asked for by name it is the policy's next, and the reply says so.
        erin.expect(&["got lease", "by type1"]);
        erin.ends();
        free_again(world);
        return;
    }
    does_what_a_vmm_does(&mut erin);
    let leases = world.observer().leases().unwrap();
    assert_eq!((leases.len(), leases[0].devices.len()), (1, 3));
    is_refused(world, CAROL, NIC, "busy");
    // Killed with devices bound and memory mapped.
    erin.kill();
    until("no lease is left", || world.observer().leases().unwrap().is_empty());
    for device in words {
        until("its group is for its tenant alone", || only_for(world, device) == ["erin"]);
    }
    is_refused(world, CAROL, NIC, "may still have it open");
    is_refused(world, FRANK, PAIR[1], "until an administrator");
    let mut erin = world.client(ERIN, DEFAULT_MEMLOCK, Role::Iommufd, &words);
    erin.says();
    does_what_a_vmm_does(&mut erin);
    erin.go_on();
    erin.expect(&["released, proved: false"]);
    erin.ends();
    for device in words {
        world.rebind(device);
    }
    for (uid, device) in [(CAROL, NIC), (FRANK, PAIR[1])] {
        let mut other = world.client(uid, DEFAULT_MEMLOCK, Role::Ask, &[device]);
        other.expect(&["got lease"]);
        other.ends();
        until("its group is free", || group_is_free(world, device));
    }
    println!("    off their drivers and on them again, the groups are anybody's");
}

fn does_what_a_vmm_does(erin: &mut Actor) {
    erin.expect(&["got lease", "by iommufd: Iommufd Cdev"]);
    erin.expect(&["charged by process: true"]);
    erin.expect(&["bound, attached, mapped"]);
    erin.expect(&["device 0000:00:02.0", "reset"]);
    erin.expect(&["added 0000:00:07.0"]);
    erin.expect(&["added 0000:00:07.1"]);
}

fn rebound(world: &World) {
    if !world.has_iommufd() {
        println!("    of a kernel with iommufd alone");
        return;
    }
    let words = [NIC, PAIR[0], PAIR[1]];
    let mut gina = world.client(GINA, DEFAULT_MEMLOCK, Role::Iommufd, &words);
    gina.says();
    does_what_a_vmm_does(&mut gina);
    gina.go_on();
    // Three devices at once, on a machine that may have much else to do, can take longer than a Release
    // waits.
    gina.expect(&["released"]);
    gina.ends();
    for device in words {
        until("it is proved by its driver", || group_is_free(world, device));
    }
    is_had(world, CAROL, NIC);
    is_had(world, FRANK, PAIR[1]);
    // Somebody who keeps a device that is not bound: its driver waits, the daemon does not.
    let mut gina = world.client(GINA, DEFAULT_MEMLOCK, Role::Stale, &[NIC]);
    let keeper = gina.expect(&["kept by"]).rsplit(' ').next().unwrap().parse().unwrap();
    gina.kill();
    until("no lease is left", || world.observer().leases().unwrap().is_empty());
    until("the device is quarantined", || state(world, NIC) == GroupState::Quarantined);
    is_refused(world, CAROL, NIC, "waits for the last close");
    is_had(world, FRANK, PAIR[1]);
    kill(Pid::from_raw(keeper), Signal::SIGKILL).unwrap();
    until("its group is free", || group_is_free(world, NIC));
    is_had(world, CAROL, NIC);
}

fn restarted(world: &World) {
    if !world.has_iommufd() || !world.real {
        println!("    of a real kernel with iommufd alone: a simulated one ends with its daemon");
        return;
    }
    // One whose devices are bound, and somebody who keeps a device that is not.
    let bound = [NIC, PAIR[0], PAIR[1]];
    let mut erin = world.client(ERIN, DEFAULT_MEMLOCK, Role::Iommufd, &bound);
    erin.says();
    does_what_a_vmm_does(&mut erin);
    let mut stale = world.client(ERIN, DEFAULT_MEMLOCK, Role::Stale, &[EDU0]);
    let keeper = stale.expect(&["kept by"]).rsplit(' ').next().unwrap().parse().unwrap();
    world.restart();
    stale.kill();
    until("its group is for its tenant alone", || only_for(world, EDU0) == ["erin"]);
    is_refused(world, FRANK, EDU0, "may still have it open");
    until("the others are held", || state(world, NIC) == GroupState::Held);
    is_refused(world, CAROL, NIC, "busy");
    println!("    the holder notices nothing: {:?}", world.observer().leases().unwrap().len());
    erin.kill();
    for device in bound {
        until("the others are for their tenant alone", || only_for(world, device) == ["erin"]);
    }
    let mut again = world.client(ERIN, DEFAULT_MEMLOCK, Role::Ask, &[EDU0]);
    again.expect(&["got lease"]);
    again.ends();
    kill(Pid::from_raw(keeper), Signal::SIGKILL).unwrap();
    for device in [EDU0, NIC, PAIR[0], PAIR[1]] {
        world.rebind(device);
    }
    for (uid, device) in [(FRANK, EDU0), (CAROL, NIC), (FRANK, PAIR[1])] {
        is_had(world, uid, device);
    }
}

/// Nobody else gets the device, whatever of it is kept and whether the daemon is the one that gave it, until
/// the last close.
fn kept_files(world: &World, at: &str) {
    if !world.real {
        println!("    of a real kernel alone: a simulated one ends with its daemon");
        return;
    }
    let mut group = vec![(FRANK, "group", EDU0), (FRANK, "device", EDU1)];
    // A mapping is a process's.
    if at == "process" {
        group.push((FRANK, "mapping", PAIR[0]));
    }
    are_kept(world, at, &group);
    if world.has_iommufd() {
        are_kept(world, at, &[(GINA, "cdev", EDU0), (GINA, "bound cdev", EDU1)]);
        gives_nothing(world, at);
    }
}

fn are_kept(world: &World, at: &str, files: &[(u32, &str, &str)]) {
    let keepers: Vec<_> = files.iter().map(|file| leaves(world, at, file)).collect();
    let nobody_gets_them = || {
        for (_, what, device) in files {
            until(&format!("{what} quarantines {device}"), || {
                state(world, device) == GroupState::Quarantined
            });
            is_refused(world, LEFT, device, "");
        }
    };
    nobody_gets_them();
    world.restart();
    nobody_gets_them();
    for ((_, what, device), keeper) in files.iter().zip(keepers) {
        kill(keeper, Signal::SIGKILL).unwrap();
        let closed = Instant::now();
        until(&format!("{device} is free without its {what}"), || group_is_free(world, device));
        println!("    {what}: free {} ms after the last close", closed.elapsed().as_millis());
        is_had(world, LEFT, device);
    }
}

/// An iommufd whose device is closed reaches nothing any more: the kernel itself has taken it back.
fn gives_nothing(world: &World, at: &str) {
    let keeper = leaves(world, at, &(GINA, "iommufd", EDU0));
    until("its device is free", || group_is_free(world, EDU0));
    world.restart();
    is_had(world, LEFT, EDU0);
    kill(keeper, Signal::SIGKILL).unwrap();
    println!("    iommufd: its device is free while it is kept");
}

/// A holder that has ended, and the process that has what it left.
fn leaves(world: &World, at: &str, &(uid, what, device): &(u32, &str, &str)) -> Pid {
    let words = [device, what, at];
    let mut holder = world.client(uid, DEFAULT_MEMLOCK, Role::Leaves, &words);
    let keeper = holder.expect(&["kept by"]).rsplit(' ').next().unwrap().parse().unwrap();
    holder.kill();
    Pid::from_raw(keeper)
}

/// While a page is waited for that never comes, the kernel answers no call on that container, and who
/// makes one can't even be killed.
fn busy(world: &World) {
    if !world.real {
        println!("    a simulated kernel pins nothing: tests/daemon has one that does not answer");
        return;
    }
    let _ = std::process::Command::new("modprobe").arg("fuse").status();
    let fuse = Fuse::mount().unwrap();
    let file = fuse.file();
    let mut frank =
        world.client(FRANK, DEFAULT_MEMLOCK, Role::Busy, &[EDU0, file.to_str().unwrap()]);
    frank.expect(&["got lease"]);
    // Somebody else's lease ends when the daemon does, and must not be stuck with it.
    let mut carol = world.client(CAROL, 80 * MIB, Role::Vmm, &[NIC, &MIB.to_string()]);
    carol.expect(&["uid 2003"]);
    carol.expect(&["got lease"]);
    fuse.stop_answering(frank.pid() as u32);
    frank.go_on();
    println!("    a page is waited for by {:?}", fuse.waiting());
    frank.go_on();
    frank.expect(&["closed all"]);
    until("it can't be taken back", || state(world, EDU0) == GroupState::Quarantined);
    is_refused(world, FRANK, EDU0, "the kernel does not answer for");
    is_had(world, FRANK, EDU1);
    world.end();
    println!("    the daemon has ended");
    carol.kill();
    world.start_again();
    is_had(world, CAROL, NIC);
    until("it is known to hang", || state(world, EDU0) == GroupState::Quarantined);
    is_refused(world, FRANK, EDU0, "the kernel does not answer for");
    fuse.end();
    println!("    {}", frank.says());
    frank.kill();
    until("the kernel has let go of it", || {
        let mut other = world.client(FRANK, DEFAULT_MEMLOCK, Role::Ask, &[EDU0]);
        let said = other.says();
        other.ends();
        said.contains("got lease")
    });
    until("its group is free", || group_is_free(world, EDU0));
}

/// By the clock of the day, what is due would be so a day later.
fn clock_set_back(world: &World) {
    if !world.real {
        println!("    the clock is not this test's own here");
        return;
    }
    let grace = Duration::from_secs(3);
    for is_restarted in [false, true] {
        let mut alice = world.client(ALICE, 80 * MIB, Role::Vmm, &[NIC, &MIB.to_string()]);
        for _ in 0..6 {
            alice.says();
        }
        let lease = world.observer().leases().unwrap().remove(0).lease;
        let begun = Instant::now();
        std::thread::scope(|threads| {
            let mut administrator = world.observer();
            let revoked = threads.spawn(move || administrator.revoke(&lease, grace));
            let is_revoked = || world.observer().leases().unwrap()[0].revoked.is_some();
            until("it is being revoked", is_revoked);
            put_clock(-DAY);
            if is_restarted {
                world.restart();
            }
            // Who asked may have lost its connection, and it goes on without.
            let _ = revoked.join().unwrap();
        });
        let is_forced = || {
            let all = world.observer().leases().unwrap();
            all.iter().all(|lease| lease.revoked.as_ref().is_some_and(|revoked| revoked.forced))
        };
        until("it is taken", is_forced);
        assert!(begun.elapsed() >= grace, "it is taken before its time");
        println!("    restarted {is_restarted}: taken after {:?}", begun.elapsed());
        // What is tried again, and how long a call may take, goes by no clock of the day either.
        alice.kill();
        free_again(world);
        is_had(world, CAROL, NIC);
        put_clock(DAY);
    }
}

const DAY: i64 = 24 * 3600;

/// Sets the clock by so many seconds.
fn put_clock(seconds: i64) {
    let clock = ClockId::CLOCK_REALTIME;
    let now = clock_gettime(clock).unwrap();
    clock_settime(clock, TimeSpec::new(now.tv_sec() + seconds, now.tv_nsec())).unwrap();
}

fn is_had(world: &World, uid: u32, device: &str) {
    let mut other = world.client(uid, DEFAULT_MEMLOCK, Role::Ask, &[device]);
    other.expect(&["got lease"]);
    other.ends();
    until("its group is free", || group_is_free(world, device));
}

fn is_refused(world: &World, uid: u32, bdf: &str, why: &str) {
    let mut other = world.client(uid, DEFAULT_MEMLOCK, Role::Ask, &[bdf]);
    other.expect(&["refused", why]);
    other.ends();
}

/// Whom a group is for alone.
fn only_for(world: &World, bdf: &str) -> Vec<String> {
    let groups = world.observer().topology().unwrap();
    let here = groups.iter().filter(|group| group.devices.iter().any(|device| device.bdf == bdf));
    here.filter_map(|group| group.unproved.clone()).map(|unproved| unproved.tenant).collect()
}

fn nothing_is_left(world: &World) {
    free_again(world);
    for device in [NIC, EDU0, EDU1] {
        until("every group is free", || group_is_free(world, device));
    }
    println!("    no leases, groups free, the daemon has {} open files", open_files(world));
}

fn free_again(world: &World) {
    until("no lease is left", || world.observer().leases().unwrap().is_empty());
    until("the device is free", || group_is_free(world, NIC));
}

fn group_is_free(world: &World, bdf: &str) -> bool {
    state(world, bdf) == GroupState::Free
}

fn state(world: &World, bdf: &str) -> GroupState {
    let groups = world.observer().topology().unwrap();
    let group = groups.iter().find(|group| group.devices.iter().any(|device| device.bdf == bdf));
    group.unwrap().state
}

fn show_leases(world: &World) {
    for lease in world.observer().leases().unwrap() {
        println!(
            "    lease {} of {} (pid {}): {} in {:?}, mapped {:?}",
            lease.lease,
            lease.tenant,
            lease.pid,
            lease.devices.join(" "),
            lease.container,
            lease.mapped_bytes
        );
    }
}

/// The daemon's open files once connections that have just been closed are gone.
fn settled(world: &World) -> usize {
    let mut lowest = usize::MAX;
    for _ in 0..20 {
        std::thread::sleep(std::time::Duration::from_millis(10));
        lowest = lowest.min(open_files(world));
    }
    lowest
}

fn open_files(world: &World) -> usize {
    fs::read_dir(format!("/proc/{}/fd", world.broker_pid())).unwrap().count()
}

fn sysfs_ids(bdf: &str) -> String {
    let read = |name: &str| {
        let text = fs::read_to_string(format!("/sys/bus/pci/devices/{bdf}/{name}")).unwrap();
        text.trim().trim_start_matches("0x").to_owned()
    };
    format!("{}:{}", read("vendor"), read("device"))
}
