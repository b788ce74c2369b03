//! The daemon's processes: who may what, and what becomes of the others when one dies.

use crate::DEVICE;
use crate::common::{Daemon, Held, children, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

fn status(pid: u32, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{field}:\t")));
    line.unwrap().to_owned()
}

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
    for pid in [broker, keeper] {
        assert_eq!(status(pid, "NoNewPrivs"), "1");
        assert_eq!(status(pid, "Threads"), "1");
    }
    if nix::unistd::geteuid().is_root() {
        assert!(!status(broker, "Uid").split_whitespace().any(|uid| uid == "0"));
        assert!(!status(broker, "Gid").split_whitespace().any(|gid| gid == "0"));
        assert_eq!(status(broker, "Groups").trim(), "");
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert_eq!(status(broker, set), "0000000000000000", "{set}");
        }
        let set = |pid| u64::from_str_radix(&status(pid, "CapPrm"), 16).unwrap();
        let (sys_resource, sys_rawio) = (1 << 24, 1 << 17);
        // As much of it as root has here.
        assert_eq!(set(keeper) & !sys_rawio, set(std::process::id()) & sys_resource);
    }
    drop(held);
}
