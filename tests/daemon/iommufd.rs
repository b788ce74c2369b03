//! Leases by iommufd, over the socket.

use crate::DEVICE;
use crate::common::raw::{Raw, Reply};
use crate::common::{Daemon, Setup, beside, until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use vfio_broker::kernel::{Device, IoasMap, Iommufd, MapFlags, Mapped};
use vfio_broker::sim::Wire;

const SECOND: &str = "0000:66:00.0";

fn acquire(client: &mut Raw, more: Value) -> (Value, Vec<OwnedFd>) {
    let mut request = json!({ "vm": "web1", "devices": [DEVICE], "backend": "iommufd" });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    client.call("Acquire", request).ok()
}

fn kinds(reply: &Value) -> Vec<(u64, String, String)> {
    let list = reply["fds"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    list.map(|fd| (fd["index"].as_u64().unwrap(), text(&fd["kind"]), text(&fd["name"]))).collect()
}

fn kind(index: u64, kind: &str, name: &str) -> (u64, String, String) {
    (index, kind.into(), name.into())
}

fn wire() -> Arc<Wire> {
    Arc::new(Wire::detached())
}

#[test]
fn the_holder_binds_attaches_maps_and_dies() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        // The second time it is the same tenant's again.
        for _ in 0..2 {
            let (reply, mut fds) = acquire(&mut client, json!({}));
            let expected = [kind(0, "iommufd", ""), kind(1, "cdev", DEVICE), kind(2, "lease", "")];
            assert_eq!(kinds(&reply), expected);
            assert_eq!(
                (&reply["backend"], &reply["handout"]),
                (&json!("iommufd"), &json!("iommufd"))
            );
            let lease = fds.pop().unwrap();
            let device = Device::from_fd(wire(), DEVICE, fds.pop().unwrap());
            let iommufd = Iommufd::from_fd(wire(), fds.pop().unwrap());
            assert!(iommufd.rlimit_mode().unwrap());
            device.bind_iommufd(&iommufd).unwrap();
            let ioas = iommufd.ioas_alloc().unwrap();
            device.attach_iommufd_pt(ioas).unwrap();
            let (_, memory) = Mapped::memfd(1 << 20).unwrap();
            let flags = MapFlags::FIXED_IOVA | MapFlags::READ | MapFlags::WRITE;
            let map = IoasMap { flags, vaddr: memory.vaddr(), size: 1 << 20, iova: 0 };
            iommufd.ioas_map(ioas, &map).unwrap();
            assert_eq!(device.pci_ids().unwrap(), (0x8086, 0x10d3));
            // Hotplug, for the same iommufd.
            let key = json!({ "lease": reply["lease"], "key": reply["key"], "devices": [SECOND] });
            let (more, mut fds) = acquire(&mut client, key);
            assert_eq!(kinds(&more), [kind(0, "cdev", SECOND), kind(1, "lease", "")]);
            let lifeline = fds.pop().unwrap();
            let second = Device::from_fd(wire(), SECOND, fds.pop().unwrap());
            second.bind_iommufd(&iommufd).unwrap();
            let (leases, _) = client.call("Leases", json!({})).ok();
            let lease_of = |each: &&Value| each["lease"] == reply["lease"];
            let mine = leases["leases"].as_array().unwrap().iter().find(lease_of).unwrap();
            assert_eq!(mine["backend"], "iommufd");
            drop((lease, lifeline, device, second, iommufd));
            until("the lease is over", || {
                let (leases, _) = client.call("Leases", json!({})).ok();
                leases["leases"].as_array().unwrap().iter().find(lease_of).is_none()
            });
        }
        let mut group = serde_json::Value::Null;
        until("it is taken back", || {
            let (topology, _) = client.call("Topology", json!({})).ok();
            group = topology["groups"][0].clone();
            group["state"] != "reclaiming"
        });
        assert_eq!(
            (&group["state"], &group["unproved"]["tenant"]),
            (&json!("free"), &json!("everybody"))
        );
        assert_eq!(group["devices"][0]["cdev"], "/dev/vfio/devices/vfio0");
    });
    assert!(daemon.sim().stats().unwrap().is_idle(), "{:#?}", daemon.sim().stats());
}

#[test]
fn a_host_without_iommufd_says_so() {
    let setup = Setup::default();
    let topology = setup.topology.replace("kernel = \"6.12\"", "kernel = \"6.1\"");
    let daemon = Daemon::with(Setup { topology, ..setup });
    let mut client = daemon.connect();
    let request = json!({ "vm": "web1", "devices": [DEVICE], "backend": "iommufd" });
    let Reply::Error(name, parameters) = client.call("Acquire", request) else {
        panic!("6.1 has no cdevs")
    };
    assert!(name.ends_with(".Unsupported"), "{name}");
    assert_eq!(parameters["what"], "backend iommufd");
    assert!(parameters["why"].as_str().unwrap().contains("/dev/iommu"), "{parameters}");
}

#[test]
fn the_command_line_asks_for_it_by_name() {
    let daemon = Daemon::start();
    let program = env!("CARGO_BIN_EXE_vfio-broker");
    let words = ["--json", "acquire", "--vm", "web1", "--device", DEVICE, "--backend", "iommufd"];
    let mut command = Command::new(program);
    command.arg("--socket").arg(&daemon.socket).args(words);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let held = next();
    assert_eq!((&held["backend"], &held["handout"]), (&json!("iommufd"), &json!("iommufd")));
    let kinds: Vec<_> = held["fds"].as_array().unwrap().iter().map(|fd| &fd["kind"]).collect();
    assert_eq!(kinds, ["iommufd", "cdev", "lease"]);
    drop(child.stdin.take());
    // Proved it is not: somebody might have the node open.
    assert_eq!(next()["proved"], false);
    assert!(child.wait().unwrap().success());
}
