//! Limits of control groups: no more processes, and no more memory, for one of the daemon's processes.

use crate::DEVICE;
use crate::common::raw::{Raw, Reply, call};
use crate::common::{Daemon, Held, SOON, children, skipped, until};
use crate::restart::Machine;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

const OTHER: &str = "0000:66:00.0";

/// A group of this test's own, by version 1 or 2. Its limit is lifted, and it is removed, when dropped.
struct Group {
    path: PathBuf,
    limit: PathBuf,
}

impl Group {
    /// One with a limit; `None`, with a word about it, where none can be made.
    fn new(controller: &str, limits: [&str; 2], limit: &str) -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let of_version_1 = root.join(controller);
        let (base, file) = match of_version_1.join("cgroup.procs").exists() {
            true => (of_version_1, limits[0]),
            false => (root.to_owned(), limits[1]),
        };
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::SeqCst);
        let path = base.join(format!("vfio-broker-test-{}-{number}", std::process::id()));
        let made = std::fs::create_dir(&path);
        let limited = made.and_then(|()| std::fs::write(path.join(file), limit));
        if let Err(error) = limited {
            let _ = std::fs::remove_dir(&path);
            skipped(&format!("no control group for {controller} can be made here: {error}"));
            return None;
        }
        Some(Self { limit: path.join(file), path })
    }

    fn take(&self, pid: u32) {
        std::fs::write(self.path.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// Waits until somebody has wanted more.
    fn until_hit(&self) {
        let of_version_1 = |text: String| text.trim() != "0";
        let of_version_2 = |text: String| !text.lines().any(|line| line == "max 0");
        until("the limit is felt", || {
            let read = |name: &str| std::fs::read_to_string(self.path.join(name));
            read("memory.failcnt")
                .map_or_else(|_| read("memory.events").is_ok_and(of_version_2), of_version_1)
        });
    }

    fn lift(&self) {
        // The word of version 2; version 1 has it for processes alone.
        let lifted = std::fs::write(&self.limit, "max");
        lifted.or_else(|_| std::fs::write(&self.limit, "-1")).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let all = std::fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for pid in all.lines() {
            let _ = std::fs::write(self.path.with_file_name("cgroup.procs"), pid);
        }
        let start = Instant::now();
        while std::fs::remove_dir(&self.path).is_err() && start.elapsed() < SOON {
            std::thread::yield_now();
        }
    }
}

fn acquire(client: &mut Raw, device: &str) -> Reply {
    client.call("Acquire", json!({ "vm": "v", "devices": [device], "handout": "container" }))
}

/// What comes of a call, if its connection does not end.
fn try_call(daemon: &Daemon, method: &str, parameters: &Value) -> Option<Reply> {
    let mut client = daemon.connect();
    client.send(&call(method, parameters));
    client.try_reply()
}

fn is_held(daemon: &Daemon, held: &Held) -> bool {
    match try_call(daemon, "Leases", &json!({})) {
        Some(Reply::Ok(leases, _)) => {
            let mut all = leases["leases"].as_array().unwrap().iter();
            all.any(|it| it["lease"] == held.reply["lease"])
        }
        _ => false,
    }
}

fn can_be_had(daemon: &Daemon, device: &str) {
    let wanted = json!({ "vm": "v", "devices": [device], "handout": "container" });
    until("it can be acquired again", || {
        matches!(try_call(daemon, "Acquire", &wanted), Some(Reply::Ok(..)))
    });
}

fn memory() -> OwnedFd {
    let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, 4096).unwrap();
    fd
}

fn range(held: &Held) -> Value {
    held.with(json!({
        "iova": 0, "size": 4096, "read": true, "write": true, "memory": 0, "offset": 0,
    }))
}

#[test]
fn with_no_more_processes_a_call_fails_and_leases_go_on() {
    let daemon = Daemon::start();
    let mut client = daemon.connect_and_greet();
    let held = Held::acquire(&mut client, DEVICE, "devices");
    let Some(group) = Group::new("pids", ["pids.max", "pids.max"], "1") else { return };
    group.take(daemon.launcher());
    for _ in 0..3 {
        // No keeper, no receiver, and nobody who reads the policy.
        let error = acquire(&mut client, OTHER).error("Kernel");
        assert_eq!((&error["call"], &error["name"]), (&json!("fork"), &json!("EAGAIN")), "{error}");
        let mut mapping = daemon.connect_and_greet();
        mapping.send_with(&call("MapDma", &range(&held)), &[memory().as_fd()]).unwrap();
        mapping.hangs_up();
        client.call("GetFds", held.key()).ok();
    }
    daemon.signal(Signal::SIGHUP);
    until("the policy is refused", || {
        let (status, _) = client.call("Status", json!({})).ok();
        status["policy"]["refused"]
            .as_str()
            .is_some_and(|why| why.contains("can't start a process"))
    });
    group.lift();
    can_be_had(&daemon, OTHER);
    let mut mapping = daemon.connect_and_greet();
    mapping.call_with("MapDma", range(&held), &[memory().as_fd()]).ok();
    assert!(is_held(&daemon, &held));
}

/// A group with no memory for what comes: whoever wants some is refused it, or killed.
fn without_memory() -> Option<Group> {
    Group::new("memory", ["memory.limit_in_bytes", "memory.max"], "0")
}

#[test]
fn a_keeper_without_memory_costs_its_own_lease_at_most() {
    let machine = Machine::start();
    let daemon = machine.daemon();
    let other = Held::acquire(&mut daemon.connect(), OTHER, "devices");
    let before = children(daemon.launcher(), "vfiob-keeper");
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "devices");
    let keepers = children(daemon.launcher(), "vfiob-keeper");
    let its = *keepers.iter().find(|pid| !before.contains(pid)).unwrap();
    let Some(group) = without_memory() else { return };
    group.take(its);
    for _ in 0..3 {
        let mut client = daemon.connect_and_greet();
        client.send_with(&call("MapDma", &range(&held)), &[memory().as_fd()]).unwrap();
        // Mapped, or an error.
        assert!(client.try_reply().is_some());
        let unmap = held.with(json!({ "iova": 0, "size": 4096 }));
        assert!(try_call(&daemon, "UnmapDma", &unmap).is_some());
    }
    group.lift();
    assert!(is_held(&daemon, &other));
    if children(daemon.launcher(), "vfiob-keeper").contains(&its) {
        assert!(is_held(&daemon, &held));
    }
    drop(held);
    can_be_had(&daemon, DEVICE);
    assert!(is_held(&daemon, &other));
}

#[test]
fn a_broker_without_memory_costs_no_lease() {
    let machine = Machine::start();
    let daemon = machine.daemon();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "devices");
    let Some(group) = without_memory() else { return };
    let before = daemon.pid();
    group.take(before);
    let mut crowd = Vec::new();
    for _ in 0..30 {
        // An answer, or the end of the connection with its broker.
        let client = daemon.connect();
        client.send(&call("Topology", &json!({})));
        crowd.push(client);
    }
    group.until_hit();
    group.lift();
    crowd.iter_mut().for_each(|client| drop(client.try_reply()));
    until("its lease is known", || is_held(&daemon, &held));
    can_be_had(&daemon, OTHER);
    client_has(&daemon, &held);
}

fn client_has(daemon: &Daemon, held: &Held) {
    daemon.connect().call("GetFds", held.key()).ok();
}

#[test]
fn a_launcher_without_memory_costs_no_lease() {
    let machine = Machine::start();
    let mut daemon = machine.daemon();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "devices");
    let Some(group) = without_memory() else { return };
    group.take(daemon.launcher());
    let wanted = json!({ "vm": "v", "devices": [OTHER], "handout": "container" });
    let mut client = daemon.connect();
    for _ in 0..3 {
        client.send(&call("Acquire", &wanted));
        // A keeper that begins has the launcher's group, and no more memory than that.
        match client.try_reply() {
            Some(Reply::Ok(..)) => panic!("its keeper had memory"),
            Some(Reply::Error(..)) => {}
            None => {
                // Without its launcher a broker ends.
                daemon.wait();
                daemon = machine.daemon();
                break;
            }
        }
    }
    group.lift();
    assert!(is_held(&daemon, &held));
    client_has(&daemon, &held);
    can_be_had(&daemon, OTHER);
}
