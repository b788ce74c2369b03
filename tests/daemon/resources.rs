//! What runs out: processes, files, address space, in each process by itself. An error
//! says so, nothing is lost, and all goes on when there is some again.

use crate::common::raw::{Raw, Reply};
use crate::common::{Daemon, Held, Setup, children, command, until};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

const ONE: &str = "0000:65:00.0";
const OTHER: &str = "0000:66:00.0";

/// A user of whom no other process is.
const NOBODY_S: u32 = 54_321;

/// Sets a soft limit of a process, as its own user: root may lack the right to set others'.
fn limit(pid: u32, what: &str, most: &str) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let id = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u32>().unwrap()
    };
    let mut command = Command::new("prlimit");
    command.arg(format!("--{what}={most}:")).args(["--pid", &pid.to_string()]);
    if nix::unistd::geteuid().is_root() {
        command.uid(id("Uid:")).gid(id("Gid:"));
    }
    assert!(command.status().unwrap().success());
}

fn acquire(client: &mut Raw, device: &str) -> Reply {
    client.call("Acquire", json!({ "vm": "v", "devices": [device], "handout": "container" }))
}

fn is_held(client: &mut Raw, held: &Held) -> bool {
    let (leases, _) = client.call("Leases", json!({})).ok();
    leases["leases"].as_array().unwrap().iter().any(|it| it["lease"] == held.reply["lease"])
}

/// Waits until it can be acquired again, and gives it back.
fn can_be_had(daemon: &Daemon, device: &str) {
    until("it can be acquired again", || {
        matches!(acquire(&mut daemon.connect(), device), Reply::Ok(..))
    });
}

#[test]
fn a_launcher_without_processes_or_files_says_so_and_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("run/broker.sock");
    let mut command = command(directory.path(), &Setup::default());
    if nix::unistd::geteuid().is_root() {
        // Root's processes have no limit.
        std::os::unix::fs::chown(directory.path(), Some(NOBODY_S), Some(NOBODY_S)).unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        command.uid(NOBODY_S).gid(NOBODY_S);
    }
    let daemon = Daemon::spawn(directory, socket, command);
    let mut client = daemon.connect_and_greet();
    let held = Held::acquire(&mut client, ONE, "devices");
    for (what, none, some, errno) in
        [("nproc", "0", "4096", "EAGAIN"), ("nofile", "3", "1024", "EMFILE")]
    {
        limit(daemon.launcher(), what, none);
        let error = acquire(&mut client, OTHER).error("Kernel");
        assert_eq!(error["name"], errno, "{error}");
        assert!(is_held(&mut client, &held));
        limit(daemon.launcher(), what, some);
        can_be_had(&daemon, OTHER);
    }
    assert!(is_held(&mut client, &held));
}

#[test]
fn a_broker_without_files_says_so_or_is_replaced_and_leases_go_on() {
    let daemon = Daemon::start();
    let mut client = daemon.connect_and_greet();
    let held = Held::acquire(&mut client, ONE, "container");
    let before = daemon.pid();
    limit(before, "nofile", "3");
    client.send(&crate::common::raw::call(
        "Acquire",
        &json!({ "vm": "v", "devices": [OTHER], "handout": "container" }),
    ));
    // An error, or the end of the connection with its broker.
    assert!(!matches!(client.try_reply(), Some(Reply::Ok(..))));
    if daemon.pid() == before {
        limit(before, "nofile", "1024");
    }
    can_be_had(&daemon, OTHER);
    assert!(is_held(&mut daemon.connect(), &held));
}

fn map(lease: &Held, iova: u64, size: u64) -> Value {
    lease.with(json!({
        "iova": iova, "size": size, "read": true, "write": true, "memory": 0, "offset": 0,
    }))
}

fn memory(size: u64) -> OwnedFd {
    let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, size as i64).unwrap();
    fd
}

/// Receivers begin with the launcher's limits.
#[test]
fn a_receiver_without_files_ends_its_connection_and_says_why() {
    let daemon = Daemon::start();
    let mut client = daemon.connect_and_greet();
    let held = Held::acquire(&mut client, ONE, "devices");
    let memory = memory(4096);
    let request = map(&held, 0, 4096);
    let sixteen = [memory.as_fd(); 16];
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.launcher())).unwrap();
    let open = open.map(|it| it.unwrap().file_name().to_str().unwrap().parse::<usize>().unwrap());
    let open: Vec<usize> = open.collect();
    // Enough for the launcher to start one, and not for what that is to receive: beside five files of its own.
    let is_enough = |some: &usize| some - open.iter().filter(|it| *it < some).count() >= 4;
    let some = (3..5 + 16).find(is_enough).unwrap();
    limit(daemon.launcher(), "nofile", &some.to_string());
    client.send_with(&crate::common::raw::call("MapDma", &request), &sixteen).unwrap();
    client.hangs_up();
    daemon.until_logged("not all fds could be received");
    // None can even be started.
    limit(daemon.launcher(), "nofile", "3");
    let mut client = daemon.connect_and_greet();
    client.send_with(&crate::common::raw::call("MapDma", &request), &sixteen).unwrap();
    client.hangs_up();
    daemon.until_logged("the process that receives fds");
    limit(daemon.launcher(), "nofile", "1024");
    let mut client = daemon.connect_and_greet();
    assert!(is_held(&mut client, &held));
    client.call_with("MapDma", request, &sixteen).ok();
}

#[test]
fn a_keeper_without_files_or_address_space_keeps_its_lease() {
    const GIB: u64 = 1 << 30;
    let daemon = Daemon::start();
    let mut client = daemon.connect_and_greet();
    let held = Held::acquire(&mut client, ONE, "devices");
    let keeper = children(daemon.launcher(), "vfiob-keeper")[0];
    let memory = memory(GIB);
    let mut map = |iova: u64| client.call_with("MapDma", map(&held, iova, GIB), &[memory.as_fd()]);
    let statm = std::fs::read_to_string(format!("/proc/{keeper}/statm")).unwrap();
    let pages: u64 = statm.split_whitespace().next().unwrap().parse().unwrap();
    limit(keeper, "as", &(pages * 4096 + (64 << 20)).to_string());
    let error = map(0).error("Kernel");
    assert_eq!((&error["call"], &error["name"]), (&json!("mmap"), &json!("ENOMEM")), "{error}");
    limit(keeper, "as", "unlimited");
    map(0).ok();
    limit(keeper, "nofile", "3");
    let refused = map(GIB);
    assert!(matches!(refused, Reply::Error(..)), "{refused:?}");
    limit(keeper, "nofile", "1024");
    until("its keeper is reached again", || matches!(map(GIB), Reply::Ok(..)));
    assert!(is_held(&mut client, &held));
    assert_eq!(children(daemon.launcher(), "vfiob-keeper"), [keeper]);
}
