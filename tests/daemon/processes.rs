//! The daemon's processes: who may what, and what becomes of the others when one dies.

use crate::DEVICE;
use crate::common::raw::{Raw, call};
use crate::common::{Daemon, Held, Setup, children, policy, status, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::os::fd::AsFd;

fn leases(daemon: &Daemon) -> usize {
    let (reply, _) = daemon.connect().call("Leases", json!({})).ok();
    reply["leases"].as_array().unwrap().len()
}

/// Kills the broker; waits for the next.
fn kill_broker(daemon: &Daemon) {
    let killed = daemon.pid();
    daemon.signal_broker(Signal::SIGKILL);
    until("there is another broker", || {
        let brokers = children(daemon.launcher(), "vfiob-broker");
        brokers.iter().any(|pid| *pid != killed)
    });
}

#[test]
fn a_broker_that_is_killed_is_replaced_and_leases_go_on() {
    let mut daemon = Daemon::start();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "container");
    for _ in 0..3 {
        kill_broker(&daemon);
        // Who connects meanwhile waits for it.
        assert_eq!(leases(&daemon), 1);
    }
    daemon.connect().call("GetFds", held.key()).ok();
    daemon.connect().call("Acquire", json!({ "vm": "v", "devices": [DEVICE] })).error("Busy");
    drop(held);
    until("its lease has ended", || leases(&daemon) == 0);
    drop(Held::acquire(&mut daemon.connect(), DEVICE, "container"));
    let log = daemon.end_and_log();
    assert_eq!(log.matches("is started again").count(), 3, "{log}");
}

/// The way to a lease's keeper is there a moment after the first client.
#[test]
fn what_is_asked_of_a_lease_right_after_a_restart_reaches_its_keeper() {
    let daemon = Daemon::start();
    for call in ["GetFds", "Release", "Release"] {
        let mut held = Held::acquire(&mut daemon.connect(), DEVICE, "container");
        // The pipe stays: its end would end the lease too.
        held.fds.drain(..2);
        kill_broker(&daemon);
        daemon.connect().call(call, held.key()).ok();
        daemon.connect().call("Release", held.key());
        until("it is taken back", || leases(&daemon) == 0);
        drop(Held::acquire(&mut daemon.connect(), DEVICE, "container"));
        until("that one too", || leases(&daemon) == 0);
    }
}

/// A keeper that had the client's connection until its device is closed would wait for whom it keeps waiting.
#[test]
fn a_release_whose_broker_dies_ends_while_its_keeper_waits_for_the_holder() {
    let policy = policy("").replace("[tenant.limits]", "rebind = true\n[tenant.limits]");
    let daemon = Daemon::with(Setup::policy(policy));
    let mut client = daemon.connect();
    let held = Held::acquire(&mut client, DEVICE, "iommufd");
    client.send(&call("Release", &held.key()));
    until("the driver waits for the last close", || daemon.sim().stats().unwrap().held == 1);
    daemon.signal_broker(Signal::SIGKILL);
    assert!(client.try_reply().is_none());
    drop(held);
    until("its lease has ended", || leases(&daemon) == 0);
}

/// A keeper tells its mappings a moment after the first client can ask.
#[test]
fn a_mapping_from_before_a_restart_can_be_undone_right_after_it() {
    let daemon = Daemon::start();
    let (memory, _) = vfio_broker::kernel::Mapped::memfd(4096).unwrap();
    for _ in 0..4 {
        let lease = Held::acquire(&mut daemon.connect(), DEVICE, "devices");
        let map = |client: &mut Raw, iova: u64| {
            let request = lease.with(json!({
                "iova": iova, "size": 4096, "read": true, "write": true, "memory": 0, "offset": 0,
            }));
            client.call_with("MapDma", request, &[memory.as_fd()]).ok();
        };
        map(&mut daemon.connect_and_greet(), 0);
        kill_broker(&daemon);
        let mut client = daemon.connect_and_greet();
        map(&mut client, 4096);
        for iova in [0, 4096] {
            let request = lease.with(json!({ "iova": iova, "size": 4096 }));
            assert_eq!(client.call("UnmapDma", request).ok().0["unmapped"], 4096, "at {iova}");
        }
        drop(lease);
        until("it is taken back", || leases(&daemon) == 0);
    }
}

#[test]
fn brokers_that_die_again_and_again_end_the_daemon() {
    let mut daemon = Daemon::start();
    let mut kills = 0;
    until("it gives up", || {
        if let Some(broker) = children(daemon.launcher(), "vfiob-broker").into_iter().next() {
            kills += i32::from(kill(Pid::from_raw(broker as i32), Signal::SIGKILL).is_ok());
        }
        !daemon.is_there()
    });
    assert_eq!(daemon.wait().code(), Some(1));
    assert!(daemon.log().contains("can't go on: the broker has ended"), "{}", daemon.log());
}

#[test]
fn a_broker_ends_with_its_launcher() {
    let mut daemon = Daemon::start();
    let broker = format!("/proc/{}", daemon.pid());
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    until("it has ended too", || !std::path::Path::new(&broker).exists());
}

#[test]
fn each_process_may_what_it_is_for() {
    let daemon = Daemon::start();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "container");
    let broker = daemon.pid();
    let keeper = children(daemon.launcher(), "vfiob-keeper")[0];
    let log = children(daemon.launcher(), "vfiob-log")[0];
    let field = |pid, name| status(pid, name).unwrap();
    for pid in [broker, keeper, log] {
        assert_eq!(field(pid, "NoNewPrivs"), "1");
        assert_eq!(field(pid, "Threads"), "1");
        assert_eq!(
            (field(pid, "Seccomp").as_str(), field(pid, "Seccomp_filters").as_str()),
            ("2", "2")
        );
    }
    if nix::unistd::geteuid().is_root() {
        assert!(!field(broker, "Uid").split_whitespace().any(|uid| uid == "0"));
        assert!(!field(broker, "Gid").split_whitespace().any(|gid| gid == "0"));
        assert_eq!(field(broker, "Groups").trim(), "");
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert_eq!(field(broker, set), "0000000000000000", "{set}");
        }
        let set = |pid| u64::from_str_radix(&field(pid, "CapPrm"), 16).unwrap();
        let (sys_resource, ipc_lock, sys_rawio) = (1 << 24, 1 << 14, 1 << 17);
        // As much of it as root has here; without it, what goes beyond a limit that can't be raised.
        let own = set(std::process::id());
        let wanted = if own & sys_resource == 0 { own & ipc_lock } else { sys_resource };
        assert_eq!(set(keeper) & !sys_rawio, wanted);
    }
    drop(held);
}

/// A broker that was taken over could write where it has a file open to write.
#[test]
fn the_broker_has_no_file_open_to_write_but_the_log_s_pipe() {
    let daemon = Daemon::start();
    daemon.signal(Signal::SIGHUP);
    daemon.until_logged("another policy is in force");
    let proc = format!("/proc/{}", daemon.pid());
    for entry in std::fs::read_dir(format!("{proc}/fd")).unwrap() {
        let (number, path) = {
            let entry = entry.unwrap();
            (entry.file_name(), std::fs::read_link(entry.path()).unwrap_or_default())
        };
        let number = number.into_string().unwrap();
        let info = std::fs::read_to_string(format!("{proc}/fdinfo/{number}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:\t")).unwrap_or("0");
        let mode = u32::from_str_radix(flags, 8).unwrap() & 0o3;
        let is_file = path.is_absolute() && path != std::path::Path::new("/dev/null");
        let is_lock = path.extension().is_some_and(|extension| extension == "lock");
        assert!(!is_file || is_lock || mode == 0, "{}: {flags}", path.display());
    }
}
