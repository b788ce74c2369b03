//! Holders that keep the kernel from answering calls on what they have open.

use crate::DEVICE;
use crate::common::raw::Raw;
use crate::common::{Daemon, Held, Setup, beside, cycle, until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vfio_broker::sim::Fault;

/// A third device, beside the neighbour's and [`DEVICE`].
const OTHER: &str = "0000:66:00.0";

fn daemon() -> Daemon {
    Daemon::with(Setup::default().argument("--call-deadline", "3000"))
}

fn state(client: &mut Raw, device: &str) -> Value {
    let (topology, _) = client.call("Topology", json!({})).ok();
    let groups = topology["groups"].as_array().unwrap();
    groups.iter().find(|group| group["devices"][0]["bdf"] == device).unwrap()["state"].clone()
}

/// Ends a lease of which the kernel never answers this call.
fn hang(daemon: &Daemon, client: &mut Raw, call: &str, object: Option<&str>) {
    let lease = Held::acquire(client, DEVICE, "container");
    let never = Fault::never(call);
    daemon.sim().fault(&object.map_or(never.clone(), |object| never.on(object))).unwrap();
    drop(lease);
    until("it can't be taken back", || state(client, DEVICE) == "quarantined");
}

const CALLS: [(&str, Option<&str>); 3] = [
    ("VFIO_IOMMU_UNMAP_DMA", None),
    ("VFIO_GROUP_UNSET_CONTAINER", None),
    ("open", Some("/dev/vfio/26")),
];

#[test]
fn a_lease_that_the_kernel_does_not_answer_for_holds_up_nobody_else() {
    for (call, object) in CALLS {
        let daemon = daemon();
        let mut client = daemon.connect();
        cycle(&mut client, DEVICE);
        hang(&daemon, &mut client, call, object);
        beside(&daemon, || {
            let wanted = json!({ "vm": "test", "devices": [DEVICE], "handout": "container" });
            let why = client.call("Acquire", wanted).error("Quarantined")["reason"].to_string();
            assert!(why.contains("the kernel does not answer for"), "{call}: {why}");
            // One whose holder is late is tried again and again.
            let mut late = Held::acquire(&mut client, OTHER, "container");
            let list = late.reply["fds"].as_array().unwrap();
            let at = list.iter().position(|fd| fd["kind"] == "group").unwrap();
            let group = late.fds.swap_remove(at);
            drop(late);
            until("it is waited for", || state(&mut client, OTHER) == "quarantined");
            drop(group);
            until("it is free", || state(&mut client, OTHER) == "free");
            assert_eq!(state(&mut client, DEVICE), "quarantined", "{call}");
        });
        // The kernel answers at last.
        daemon.sim().clear_faults().unwrap();
        until("it is free too", || state(&mut client, DEVICE) == "free");
        cycle(&mut client, DEVICE);
    }
}

/// While the kernel is asked, what the lease has is with who asks.
#[test]
fn a_daemon_ends_in_the_middle_of_a_call_that_is_not_answered() {
    for (call, object) in CALLS {
        let mut daemon = daemon();
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        let never = Fault::never(call);
        daemon.sim().fault(&object.map_or(never.clone(), |object| never.on(object))).unwrap();
        drop(lease);
        until("its lease has ended", || state(&mut client, DEVICE) != "held");
        daemon.signal(Signal::SIGTERM);
        assert!(daemon.wait().success(), "{call}");
    }
}

/// A group whose open is not answered is being acquired until it is.
#[test]
fn an_open_that_is_not_answered_is_not_made_again() {
    let daemon = daemon();
    let mut client = daemon.connect();
    cycle(&mut client, DEVICE);
    daemon.sim().fault(&Fault::never("open").on("/dev/vfio/26").times(1)).unwrap();
    let wanted = json!({ "vm": "test", "devices": [DEVICE], "handout": "container" });
    let parameters = client.call("Acquire", wanted.clone()).error("Kernel");
    assert_eq!(parameters["errno"], nix::libc::ETIMEDOUT, "{parameters}");
    for _ in 0..5 {
        client.call("Acquire", wanted.clone()).error("Busy");
    }
    assert_eq!(daemon.sim().stats().unwrap().held, 1);
    daemon.sim().clear_faults().unwrap();
    until("it can be had", || {
        let answer = client.call("Acquire", wanted.clone());
        matches!(answer, crate::common::raw::Reply::Ok(..))
    });
}

/// Of one tenant, some calls never come back from the kernel.
#[test]
fn what_hangs_costs_its_tenant_that_lease_and_no_other() {
    let daemon = daemon();
    let mut client = daemon.connect();
    let other = Held::acquire(&mut client, OTHER, "devices");
    daemon.sim().fault(&Fault::never("VFIO_SET_IOMMU").times(1)).unwrap();
    let wanted = json!({ "vm": "test", "devices": [DEVICE], "handout": "container" });
    client.call("Acquire", wanted.clone()).error("Kernel");
    beside(&daemon, || {
        client.call("GetFds", other.key()).ok();
        let (leases, _) = client.call("Leases", json!({})).ok();
        assert!(!leases["leases"].as_array().unwrap().is_empty());
        client.call("Release", other.key()).ok();
    });
    daemon.sim().clear_faults().unwrap();
    until("it can be had", || {
        let answer = client.call("Acquire", wanted.clone());
        matches!(answer, crate::common::raw::Reply::Ok(..))
    });
}

#[test]
fn a_daemon_ends_whatever_the_kernel_does_not_answer() {
    for (call, object) in CALLS {
        let mut daemon = daemon();
        let mut client = daemon.connect();
        hang(&daemon, &mut client, call, object);
        let _held = Held::acquire(&mut client, OTHER, "container");
        daemon.signal(Signal::SIGTERM);
        assert!(daemon.wait().success(), "{call}");
    }
}
