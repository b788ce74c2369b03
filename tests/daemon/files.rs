//! Where a client's memory is on its way to the keeper that maps it: never in the daemon.

use crate::DEVICE;
use crate::common::raw::call;
use crate::common::{Daemon, Held, Setup, policy, until};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs::{File, read_dir};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use vfio_broker::sys::peer::unread;

const SIZE: u64 = 1 << 16;

/// Memory of both kinds.
fn memory() -> [File; 2] {
    let files = [
        File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap()),
        tempfile::tempfile_in("/dev/shm").unwrap(),
    ];
    files.iter().for_each(|file| file.set_len(SIZE).unwrap());
    files
}

/// Whether a process has one of these files open.
fn has_open(pid: u32, files: &[File]) -> bool {
    let identity = |file: &std::fs::Metadata| (file.dev(), file.ino());
    let those: Vec<_> = files.iter().map(|file| identity(&file.metadata().unwrap())).collect();
    let open = read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let open = open.filter_map(|entry| std::fs::metadata(entry.path()).ok());
    open.into_iter().any(|file| those.contains(&identity(&file)))
}

/// The process of the only keeper there is.
fn keeper(daemon: &Daemon) -> Pid {
    let keepers = read_dir(daemon.directory().join("keepers")).unwrap().flatten();
    let states = keepers.filter_map(|keeper| std::fs::read(keeper.path().join("state")).ok());
    let states: Vec<Value> = states.map(|state| serde_json::from_slice(&state).unwrap()).collect();
    assert_eq!(states.len(), 1);
    Pid::from_raw(states[0]["pid"].as_i64().unwrap() as i32)
}

fn map(lease: &Held, memory: usize, iova: u64) -> Value {
    let range = json!({ "iova": iova, "size": SIZE, "read": true, "write": true });
    let mut map = lease.with(range);
    (map["memory"], map["offset"]) = (json!(memory), json!(0));
    map
}

/// Waits until the daemon has so many more files open than before and nothing else of this goes on; it
/// never has one of the memory's.
fn settles_with(more: usize, daemon: &Daemon, before: usize, memory: &[File]) {
    let mut same = 0;
    until("the daemon's open files settle", || {
        assert!(!has_open(daemon.pid(), memory), "the daemon has a client's file open");
        same = if daemon.open_fds() == before + more { same + 1 } else { 0 };
        same > 20
    });
}

#[test]
fn a_client_s_memory_is_never_open_in_the_daemon() {
    let daemon = Daemon::start();
    let mut client = daemon.connect_and_greet();
    let lease = Held::acquire(&mut client, DEVICE, "devices");
    let memory = memory();
    assert!(has_open(std::process::id(), &memory), "one that has it open is seen to");
    let both = [memory[0].as_fd(), memory[1].as_fd()];
    let keeper = keeper(&daemon);
    let open = daemon.settled_fds();
    for index in [0, 1] {
        // It waits for a keeper, and that can't take it.
        kill(keeper, Signal::SIGSTOP).unwrap();
        let request = map(&lease, index, index as u64 * SIZE);
        client.send_with(&call("MapDma", &request), &both).unwrap();
        settles_with(1, &daemon, open, &memory);
        kill(keeper, Signal::SIGCONT).unwrap();
        client.reply().ok();
        settles_with(0, &daemon, open, &memory);
        assert!(!has_open(keeper.as_raw() as u32, &memory), "what is pinned need not be open");
    }
    let mapped: u64 = daemon.sim().stats().unwrap().spaces.iter().map(|it| it.mapped_bytes).sum();
    assert_eq!(mapped, 2 * SIZE);
}

#[test]
fn memory_that_nobody_maps_is_never_open_in_the_daemon() {
    let daemon = Daemon::start();
    let mut client = daemon.connect_and_greet();
    let lease = Held::acquire(&mut client, DEVICE, "devices");
    let memory = memory();
    let both = [memory[0].as_fd(), memory[1].as_fd()];
    let open = daemon.settled_fds();
    // Half a message, which the rest makes one of a lease that is not there.
    let mut request = map(&lease, 0, 0);
    request["lease"] = json!("0000000000000000");
    let message = call("MapDma", &request);
    let (head, tail) = message.split_at(20);
    client.send_with(head, &both).unwrap();
    settles_with(1, &daemon, open, &memory);
    client.send(tail);
    client.reply().error("NoSuchLease");
    settles_with(0, &daemon, open, &memory);
    // A call that takes no files, and one that names none of those that came.
    client.call_with("Leases", json!({}), &both).bad("fds");
    let absent = client.call_with("MapDma", map(&lease, 2, 0), &both).bad("memory");
    assert_eq!(absent, "fd 2 is not there: 2 came with the call");
    settles_with(0, &daemon, open, &memory);
    // A connection that ends in the midst of a message.
    client.send_with(head, &both).unwrap();
    settles_with(1, &daemon, open, &memory);
    drop(client);
    settles_with(0, &daemon, open - 1, &memory);
}

#[test]
fn a_memlock_limit_is_the_keeper_s_to_raise() {
    let policy = policy("").replace("anyone = true", "anyone = true\nmemlock = \"1 MiB\"");
    let daemon = Daemon::with(Setup::policy(policy));
    let mut client = daemon.connect();
    let lease = Held::acquire(&mut client, DEVICE, "container");
    let keeper = keeper(&daemon);
    let request = lease.with(json!({ "bytes": 0 }));
    client.call("SetMemlock", request.clone()).ok();
    // Without the keeper it is not done.
    kill(keeper, Signal::SIGSTOP).unwrap();
    client.send(&call("SetMemlock", &request));
    until("the daemon has the call", || unread(client.stream.as_fd()) == Ok(0));
    kill(keeper, Signal::SIGKILL).unwrap();
    let error = client.reply().error("Kernel");
    assert_eq!((&error["call"], &error["name"]), (&json!("keeper"), &json!("EIO")));
}
