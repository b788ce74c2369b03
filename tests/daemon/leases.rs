//! What keeps a lease and what does not.

use crate::DEVICE;
use crate::common::raw::{Raw, call};
use crate::common::{Daemon, Held, beside, until};
use serde_json::{Value, json};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use vfio_broker::sim::Fault;

fn is_held(client: &mut Raw, lease: &Value) -> bool {
    let (leases, _) = client.call("Leases", json!({})).ok();
    leases["leases"].as_array().unwrap().iter().any(|each| each["lease"] == *lease)
}

fn is_free(client: &mut Raw, device: &str) -> bool {
    let (topology, _) = client.call("Topology", json!({})).ok();
    let groups = topology["groups"].as_array().unwrap();
    let group = groups.iter().find(|group| group["devices"][0]["bdf"] == device).unwrap();
    group["state"] == "free"
}

/// The lease fd of a reply with fds.
fn lease_fd(reply: &Value, fds: Vec<OwnedFd>) -> OwnedFd {
    let list = reply["fds"].as_array().unwrap();
    let at = list.iter().position(|fd| fd["kind"] == "lease").unwrap();
    fds.into_iter().nth(at).unwrap()
}

#[test]
fn what_its_holder_has_closed_is_opened_anew_at_once() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let mut lease = Held::acquire(&mut client, DEVICE, "group");
        let list = lease.reply["fds"].as_array().unwrap();
        let at = list.iter().position(|fd| fd["kind"] == "group").unwrap();
        drop(lease.fds.remove(at));
        let again = lease.with(json!({ "lifeline": false, "kind": "group" }));
        // The daemon's own copies of what it sent must not stand in the way.
        for _ in 0..200 {
            let (_, fds) = client.call("GetFds", again.clone()).ok();
            assert_eq!(fds.len(), 1);
        }
        let (_, held) = client.call("GetFds", again.clone()).ok();
        assert_eq!(client.call("GetFds", again.clone()).error("Kernel")["errno"], 16);
        drop((held, lease));
    });
}

#[test]
fn connections_mean_nothing_to_a_lease() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        drop(client);
        let mut other = daemon.connect();
        // Calls on both sides of the other's end being noticed.
        for _ in 0..100 {
            assert!(is_held(&mut other, &lease.reply["lease"]));
        }
        other.call("GetFds", lease.key()).ok();
        drop(lease);
        until("the device is free", || is_free(&mut other, DEVICE));
    });
}

#[test]
fn a_child_that_inherits_the_lease_fd_keeps_the_lease() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        let id = lease.reply["lease"].clone();
        // It has the lease fd as its standard input, and nothing else of the lease.
        let fd = lease_fd(&lease.reply, lease.fds);
        let mut child =
            Command::new("cat").stdin(Stdio::from(fd)).stdout(Stdio::null()).spawn().unwrap();
        for _ in 0..100 {
            assert!(is_held(&mut client, &id));
        }
        assert!(child.try_wait().unwrap().is_none(), "cat reads until the lease ends");
        child.kill().unwrap();
        child.wait().unwrap();
        until("the device is free", || is_free(&mut client, DEVICE));
    });
}

#[test]
fn the_holder_sees_the_end_of_its_lease() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        let key = lease.key();
        let fd = lease_fd(&lease.reply, lease.fds);
        let mut child =
            Command::new("cat").stdin(Stdio::from(fd)).stdout(Stdio::null()).spawn().unwrap();
        client.call("Release", key).ok();
        assert!(child.wait().unwrap().success(), "it read end-of-file");
        until("the device is free", || is_free(&mut client, DEVICE));
    });
}

#[test]
fn either_lease_fd_keeps_the_lease() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        for first_goes in [true, false] {
            let lease = Held::acquire(&mut client, DEVICE, "container");
            let id = lease.reply["lease"].clone();
            let (again, fds) = client.call("GetFds", lease.key()).ok();
            let second = lease_fd(&again, fds);
            let first = lease_fd(&lease.reply, lease.fds);
            let (goes, stays) = if first_goes { (first, second) } else { (second, first) };
            drop(goes);
            for _ in 0..100 {
                assert!(is_held(&mut client, &id));
            }
            drop(stays);
            until("the device is free", || is_free(&mut client, DEVICE));
        }
    });
}

#[test]
fn a_client_that_goes_at_any_moment_of_an_acquire_leaves_nothing() {
    let calls = [
        "open",
        "VFIO_GROUP_GET_STATUS",
        "VFIO_GROUP_SET_CONTAINER",
        "VFIO_CHECK_EXTENSION",
        "VFIO_SET_IOMMU",
        "VFIO_GROUP_GET_DEVICE_FD",
    ];
    let daemon = Daemon::start();
    let sim = daemon.sim();
    let fds = daemon.settled_fds();
    let idle = sim.stats().unwrap();
    let mut other = daemon.connect();
    let request = json!({ "vm": "a", "devices": [DEVICE], "handout": "devices" });
    let mut reached = Vec::new();
    for name in calls {
        for nth in 1..3 {
            sim.fault(&Fault::never(name).nth(nth)).unwrap();
            let mut client = daemon.connect();
            client.send(&call("Acquire", &request));
            // Either the call is reached and hangs, or the acquire gets through without it.
            let mut answered = false;
            let stream = client.stream.try_clone().unwrap();
            until("the acquire hangs or is answered", || {
                let mut poll =
                    [nix::poll::PollFd::new(stream.as_fd(), nix::poll::PollFlags::POLLIN)];
                answered = nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO).unwrap() == 1;
                answered || sim.stats().unwrap().held == 1
            });
            if answered {
                client.reply().ok();
            } else {
                reached.push((name, nth));
            }
            drop((client, stream));
            // Others are served while it hangs.
            other.call("Leases", json!({})).ok();
            sim.clear_faults().unwrap();
            until("the device is free", || is_free(&mut other, DEVICE));
        }
    }
    // The moments were there: before, amid and after the kernel's part.
    for name in ["open", "VFIO_GROUP_SET_CONTAINER", "VFIO_SET_IOMMU", "VFIO_GROUP_GET_DEVICE_FD"] {
        assert!(reached.contains(&(name, 1)), "{name}: {reached:?}");
    }
    drop(other);
    daemon.settles_at(fds);
    until("nothing is open in the kernel", || {
        let now = sim.stats().unwrap();
        (now.containers, now.groups, now.devices) == (idle.containers, idle.groups, idle.devices)
    });
}

#[test]
fn a_client_that_goes_with_its_reply_unread_leaves_nothing() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut other = daemon.connect();
        for _ in 0..20 {
            let client = daemon.connect();
            let request = json!({ "vm": "a", "devices": [DEVICE] });
            client.send(&call("Acquire", &request));
            // Its own cycle says that the daemon has gone on meanwhile, however far.
            is_free(&mut other, DEVICE);
            drop(client);
            until("the device is free", || is_free(&mut other, DEVICE));
        }
    });
}

#[test]
fn a_keeper_that_has_ended_leaves_no_dead_process() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let before = daemon.keepers();
    let held = Held::acquire(&mut client, DEVICE, "container");
    assert_eq!(daemon.keepers(), before + 1);
    drop(held);
    until("its process is forgotten", || daemon.keepers() == before);
}
