//! Directories of keepers that have nothing any more.

use crate::DEVICE;
use crate::common::{Held, until};
use crate::restart::{Machine, end, states};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A keeper's directory that was left so, with this state file or none; its lock.
fn left(keepers: &Path, name: &str, state: Option<&str>) -> (PathBuf, File) {
    let directory = keepers.join(name);
    std::fs::DirBuilder::new().mode(0o700).create(&directory).unwrap();
    let create = |name: &str| {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.open(directory.join(name)).unwrap()
    };
    if let Some(state) = state {
        create("state").write_all(state.as_bytes()).unwrap();
    }
    let lock = create("lock");
    (directory, lock)
}

#[test]
fn a_directory_of_a_dead_keeper_that_had_nothing_is_removed() {
    let machine = Machine::start();
    let daemon = machine.daemon();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "container");
    let keepers = states(&machine)[0].parent().unwrap().parent().unwrap().to_owned();
    end(daemon, Signal::SIGKILL);
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let saved =
        |boot: &str| json!({ "version": 1, "boot": boot, "pid": 1, "leases": [] }).to_string();
    let dead = [
        // Killed after it had let go of everything, before it had anything, and with another kernel.
        left(&keepers, "00000000000000a0", Some(&saved(boot.trim()))).0,
        left(&keepers, "00000000000000a1", None).0,
        left(&keepers, "00000000000000a2", Some(&saved("another"))).0,
    ];
    // One that lives has nothing yet, or is just ending.
    let (alive, lock) = left(&keepers, "00000000000000a3", Some(&saved(boot.trim())));
    let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
    let daemon = machine.daemon();
    until("those are removed", || dead.iter().all(|directory| !directory.exists()));
    assert!(alive.exists() && states(&machine).len() == 2);
    let mut client = daemon.connect();
    client.call("GetFds", held.key()).ok();
    client.call("Release", held.key()).ok();
    drop(lock);
}
