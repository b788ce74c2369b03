//! Watch: who sees what happens.

use crate::DEVICE;
use crate::common::raw::{Raw, bytes, call};
use crate::common::{Daemon, Held, Setup, as_uid, cycle, until};
use serde_json::{Value, json};
use std::os::fd::AsFd;

fn watch(client: &Raw, parameters: &Value) {
    let method = "org.vfiobroker.Broker.Watch";
    client.send(&bytes(&json!({ "method": method, "parameters": parameters, "more": true })));
}

/// A call's answer shows that what was sent before on other connections has been read: the loop
/// takes them as they come.
fn settle(daemon: &Daemon) {
    let mut client = daemon.connect();
    for _ in 0..3 {
        client.call("Leases", json!({})).ok();
    }
}

#[test]
fn one_lease_alone() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let lease = Held::acquire(&mut client, DEVICE, "container");
    let mut watcher = daemon.connect();
    watch(&watcher, &json!({ "lease": lease.reply["lease"] }));
    settle(&daemon);
    cycle(&mut client, "0000:66:00.0");
    client.call("Release", lease.key()).ok();
    assert_eq!(watcher.reply().ok().0["event"], "released");
}

#[test]
fn a_watcher_that_closes_is_gone() {
    let daemon = Daemon::start();
    let fds = daemon.settled_fds();
    for more in [&b""[..], b"half a message", b"whole messages\0\0\0"] {
        let watcher = daemon.connect();
        watch(&watcher, &json!({}));
        watcher.send(more);
        settle(&daemon);
        drop(watcher);
        daemon.settles_at(fds);
    }
}

#[test]
fn a_watcher_that_speaks_is_hung_up_on() {
    let daemon = Daemon::start();
    let fds = daemon.settled_fds();
    for more in [&b"x"[..], b"{}\0"] {
        let mut watcher = daemon.connect();
        watch(&watcher, &json!({}));
        settle(&daemon);
        watcher.send(more);
        watcher.hangs_up();
    }
    daemon.settles_at(fds);
}

/// A socket's end that waits unread at the other end never hangs up, although no process has it;
/// neither does a lease fd that waits unread at that end.
#[test]
fn no_lease_outlives_its_holder_in_a_socket_sent_over_itself() {
    let daemon = Daemon::start();
    let fds = daemon.settled_fds();
    let client = daemon.connect();
    let acquire = json!({ "vm": "ghost", "devices": [DEVICE], "handout": "devices" });
    client.send(&call("Acquire", &acquire));
    let mut other = daemon.connect();
    until("the lease is there", || {
        let (leases, _) = other.call("Leases", json!({})).ok();
        leases["leases"].as_array().is_some_and(|leases| leases.len() == 1)
    });
    watch(&client, &json!({}));
    settle(&daemon);
    // The daemon may have hung up already, if it takes the fd for a message of its own.
    let _ = client.send_with(b"x", &[client.stream.as_fd()]);
    drop((client, other));
    daemon.settles_at(fds);
}

#[test]
fn others_are_seen_only_with_observe() {
    let policy = |right: &str| {
        format!(
            "version = 1\n[[tenant]]\nname = \"a\"\nuser = 0\ndevices = [\"{DEVICE}\"]\n\
             [[tenant]]\nname = \"b\"\nuser = 12345\ndevices = [\"0000:66:00.0\"]\n{right}\n"
        )
    };
    for (right, sees) in [("", false), ("rights = [\"acquire\", \"observe\"]", true)] {
        let daemon = Daemon::with(Setup::policy(policy(right)));
        let Some(mut watcher) = as_uid(12345, || daemon.connect()) else { return };
        watch(&watcher, &json!({}));
        settle(&daemon);
        drop(Held::acquire(&mut daemon.connect(), DEVICE, "container"));
        cycle(&mut daemon.connect(), DEVICE);
        let mut own = as_uid(12345, || daemon.connect()).unwrap();
        let _lease = Held::acquire(&mut own, "0000:66:00.0", "container");
        let (first, _) = watcher.reply().ok();
        assert_eq!(first["tenant"], if sees { "a" } else { "b" });
    }
}
