//! Calls: one after the other, all at once, without a reply, with a kernel that never answers.

use crate::DEVICE;
use crate::common::raw::{Raw, Reply, bytes, call};
use crate::common::{Daemon, Held, Setup, beside, cycle, until};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde_json::{Value, json};
use std::os::fd::{AsFd, OwnedFd};
use vfio_broker::sim::Fault;

#[test]
fn pipelined_calls_are_answered_in_order() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        // Quick ones behind slow ones, errors between.
        let mut all = Vec::new();
        for _ in 0..50 {
            all.extend(call("Topology", &json!({})));
            all.extend(call("Nonsense", &json!({})));
            all.extend(call("Leases", &json!({})));
            all.extend(call("org.varlink.service.GetInfo", &json!({})));
        }
        std::thread::scope(|scope| {
            let stream = client.stream.try_clone().unwrap();
            scope.spawn(move || std::io::Write::write_all(&mut &stream, &all).unwrap());
            for _ in 0..50 {
                assert!(client.reply().ok().0["groups"].is_array());
                client.reply().error("org.varlink.service.MethodNotFound");
                assert!(client.reply().ok().0["leases"].is_array());
                assert!(client.reply().ok().0["interfaces"].is_array());
            }
        });
    });
}

#[test]
fn a_release_that_is_pipelined_behind_others_comes_after_them() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        let calls = ["GetFds", "Release", "GetFds"].map(|method| call(method, &lease.key()));
        client.send(&calls.concat());
        assert_eq!(client.reply().ok().1.len(), 3);
        client.reply().ok();
        client.reply().error("NoSuchLease");
    });
}

#[test]
fn oneway_calls_get_no_reply() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        let oneway = |method: &str, parameters: Value| {
            let method = format!("org.vfiobroker.Broker.{method}");
            bytes(&json!({ "method": method, "parameters": parameters, "oneway": true }))
        };
        client.send(&oneway("Topology", json!({})));
        client.send(&oneway("Nonsense", json!({})));
        // Whoever wants no reply gets no fds: it has no effect.
        client.send(&oneway("Acquire", json!({ "vm": "a", "devices": ["0000:66:00.0"] })));
        client.send(&oneway("GetFds", lease.key()));
        // The next reply is the next call's.
        let (leases, fds) = client.call("Leases", json!({})).ok();
        assert!(fds.is_empty());
        let mine = |each: &&Value| each["devices"] == json!(["0000:66:00.0"]);
        assert!(!leases["leases"].as_array().unwrap().iter().any(|each| mine(&each)));
        // One that has an effect has it.
        client.send(&oneway("Release", lease.key()));
        let gone = client.call("GetFds", lease.key());
        gone.error("NoSuchLease");
    });
}

#[test]
fn nothing_is_upgraded() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let method = "org.vfiobroker.Broker.Leases";
        client.send(&bytes(&json!({ "method": method, "parameters": {}, "upgrade": true })));
        client.reply().bad("upgrade");
        client.call("Leases", json!({})).ok();
    });
}

#[test]
fn watch_needs_more() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        client.call("Watch", json!({})).error("org.varlink.service.ExpectedMore");
    });
}

fn watch(daemon: &Daemon, parameters: Value) -> Raw {
    let watcher = daemon.connect();
    let method = "org.vfiobroker.Broker.Watch";
    watcher.send(&bytes(&json!({ "method": method, "parameters": parameters, "more": true })));
    watcher
}

/// Begins to watch, and makes sure that it has begun: an event that it caused came.
fn watching(daemon: &Daemon, client: &mut Raw) -> Raw {
    let watcher = watch(daemon, json!({}));
    until("the watcher gets events", || {
        cycle(client, DEVICE);
        let mut poll = [PollFd::new(watcher.stream.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut poll, PollTimeout::ZERO).unwrap() == 1
    });
    watcher
}

/// The events of these leases, until each of them is reclaimed.
fn events<const N: usize>(watcher: &mut Raw, leases: [&Value; N]) -> [Vec<String>; N] {
    let mut kinds = leases.map(|_| Vec::new());
    while kinds.iter().any(|kinds| kinds.last().is_none_or(|last| last != "reclaimed")) {
        let (event, _) = watcher.reply().ok();
        // Whether a reclaim had to be tried more than once is a matter of speed.
        let at = leases.iter().position(|lease| **lease == event["lease"]);
        if let Some(at) = at.filter(|_| event["event"] != "quarantined") {
            kinds[at].push(event["event"].as_str().unwrap().to_owned());
        }
    }
    kinds
}

#[test]
fn several_watchers_see_the_same() {
    let daemon = Daemon::start();
    let fds = daemon.settled_fds();
    let mut client = daemon.connect();
    let mut watchers: Vec<_> = (0..5).map(|_| watching(&daemon, &mut client)).collect();
    let lease = Held::acquire(&mut client, DEVICE, "container");
    let id = lease.reply["lease"].clone();
    client.call("Release", lease.key()).ok();
    let other = Held::acquire(&mut client, "0000:66:00.0", "container");
    let other_id = other.reply["lease"].clone();
    drop(lease);
    drop(other);
    for watcher in &mut watchers {
        let [released, gone] = events(watcher, [&id, &other_id]);
        assert_eq!(released, ["acquired", "released", "reclaimed"]);
        assert_eq!(gone, ["acquired", "gone", "reclaimed"]);
    }
    // One that goes away, in whatever state, is nobody's trouble.
    drop(watchers);
    drop(client);
    daemon.settles_at(fds);
}

#[test]
fn a_kernel_that_never_answers_is_waited_for_until_the_deadline() {
    let daemon = Daemon::with(Setup::default().argument("--call-deadline", "3000"));
    // The neighbour's calls are short, but the deadline holds for it too: so it does not take part.
    let mut client = daemon.connect();
    cycle(&mut client, DEVICE);
    let sim = daemon.sim();
    sim.fault(&Fault::never("VFIO_SET_IOMMU")).unwrap();
    let request = json!({ "vm": "a", "devices": [DEVICE] });
    client.send(&call("Acquire", &request));
    until("the call is in the kernel", || sim.stats().unwrap().held == 1);
    // Meanwhile others are served.
    let mut other = daemon.connect();
    let (leases, _) = other.call("Leases", json!({})).ok();
    assert!(leases["leases"].is_array());
    let parameters = client.reply().error("Kernel");
    assert_eq!(parameters["name"], "ETIMEDOUT");
    assert!(parameters["note"].as_str().unwrap().contains("undone"), "{parameters}");
    // The connection goes on, and the device is nobody else's while the call is in the kernel.
    let again = client.call("Acquire", request.clone());
    assert!(matches!(again, Reply::Error(..)), "{again:?}");
    // What it did in the end is undone, since nobody waits for it.
    sim.clear_faults().unwrap();
    until("the device can be had again", || {
        matches!(client.call("Acquire", request.clone()), Reply::Ok(..))
    });
}

#[test]
fn it_tells_what_it_is() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let (info, _) = client.call("org.varlink.service.GetInfo", json!({})).ok();
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    for interface in ["org.varlink.service", "org.vfiobroker.Broker"] {
        assert!(info["interfaces"].as_array().unwrap().contains(&json!(interface)));
        let name = "org.varlink.service.GetInterfaceDescription";
        let (reply, _) = client.call(name, json!({ "interface": interface })).ok();
        let description = reply["description"].as_str().unwrap();
        assert!(description.contains(&format!("interface {interface}\n")), "{description}");
    }
    // Without parameters, as some clients send it.
    client.send(&bytes(&json!({ "method": "org.varlink.service.GetInfo" })));
    client.reply().ok();
    client.send(&bytes(&json!({ "method": "org.varlink.service.GetInfo", "parameters": null })));
    client.reply().ok();
}

#[test]
fn pipelined_fds_are_each_with_their_call() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let lease = Held::acquire(&mut client, DEVICE, "devices");
    let memory = |pages: usize| vfio_broker::kernel::Mapped::memfd(pages * 4096).unwrap().0;
    let map = |page: u64, size: u64| {
        let parameters = lease.with(json!({
            "iova": page * 4096, "size": size * 4096, "read": true, "write": true,
            "memory": 0, "offset": 0,
        }));
        call("MapDma", &parameters)
    };
    // Only with its own memory does each of them fit exactly.
    client.send_with(&map(0, 1), &[memory(1).as_fd()]).unwrap();
    client.send(&call("Leases", &json!({})));
    client.send_with(&map(1, 3), &[memory(3).as_fd()]).unwrap();
    client.send_with(&map(4, 2), &[memory(1).as_fd()]).unwrap();
    client.send_with(&map(4, 2), &[memory(2).as_fd()]).unwrap();
    client.send(&call("Leases", &json!({})));
    client.reply().ok();
    client.reply().ok();
    client.reply().ok();
    client.reply().bad("memory");
    client.reply().ok();
    assert_eq!(client.reply().ok().0["leases"][0]["mapped_bytes"], 6 * 4096);
}

#[test]
fn a_device_that_is_added_too_late_is_given_back() {
    let daemon = Daemon::with(Setup::default().argument("--call-deadline", "3000"));
    let sim = daemon.sim();
    let mut client = daemon.connect();
    let lease = Held::acquire(&mut client, DEVICE, "container");
    sim.fault(&Fault::never("VFIO_GROUP_SET_CONTAINER")).unwrap();
    let more = lease.with(json!({ "vm": "test", "devices": ["0000:66:00.0"] }));
    let error = client.call("Acquire", more.clone()).error("Kernel");
    assert_eq!(error["name"], "ETIMEDOUT");
    sim.clear_faults().unwrap();
    // Somebody else gets it, and the lease never had it.
    let other = json!({ "vm": "b", "devices": ["0000:66:00.0"] });
    let other = eventually_gets(&mut client, &other);
    let (leases, _) = client.call("Leases", json!({})).ok();
    let own = leases["leases"].as_array().unwrap().iter().find(|it| it["vm"] != "b").unwrap();
    assert_eq!(own["devices"], json!([DEVICE]));
    drop(other);
    eventually_gets(&mut client, &more);
}

/// Acquires as soon as that works.
fn eventually_gets(client: &mut Raw, request: &Value) -> Vec<OwnedFd> {
    let mut files = Vec::new();
    until("it can be had", || match client.call("Acquire", request.clone()) {
        Reply::Ok(_, fds) => {
            files = fds;
            true
        }
        Reply::Error(..) => false,
    });
    files
}

#[test]
fn a_mapping_that_comes_too_late_is_undone() {
    let daemon = Daemon::with(Setup::default().argument("--call-deadline", "3000"));
    let sim = daemon.sim();
    let mut client = daemon.connect();
    let lease = Held::acquire(&mut client, DEVICE, "devices");
    sim.fault(&Fault::never("VFIO_IOMMU_MAP_DMA")).unwrap();
    let (memory, _) = vfio_broker::kernel::Mapped::memfd(4096).unwrap();
    let map = lease.with(json!({
        "iova": 0, "size": 4096, "read": true, "write": true, "memory": 0, "offset": 0,
    }));
    let error = client.call_with("MapDma", map, &[memory.as_fd()]).error("Kernel");
    assert_eq!(error["name"], "ETIMEDOUT");
    sim.clear_faults().unwrap();
    until("the mapping is gone", || {
        let (leases, _) = client.call("Leases", json!({})).ok();
        leases["leases"][0]["mappings"] == 0
    });
    assert!(sim.stats().unwrap().spaces.iter().all(|space| space.mapped_bytes == 0));
}
