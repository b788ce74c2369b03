//! Two tenants with functions of one bus: the kernel has them wait for each other's locks. One lets a page
//! never come that a map of its iommufd waits for, and detaches its device meanwhile: what the other's keeper
//! asks of its own function is not answered any more.

use crate::common::raw::{Raw, Reply};
use crate::common::{Daemon, Held, as_uid, children, until};
use crate::restart::{Machine, OTHER, end};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use vfio_broker::kernel::{Device, IoasMap, Iommufd, MapFlags, Mapped};
use vfio_broker::sim::{Fault, Wire};

const MACHINE: &str = r#"
kernel = "6.12"
owner_rights = true
memlock = "unlimited"
[[group]]
id = 26
device = [{ bdf = "0000:65:00.0", vendor = 0x8086, device = 0x10d3, driver = "vfio-pci" }]
[[group]]
id = 27
device = [{ bdf = "0000:65:00.1", vendor = 0x8086, device = 0x10d3, driver = "vfio-pci" }]
[[group]]
id = 28
device = [{ bdf = "0000:66:00.0", vendor = 0x8086, device = 0x10d3, driver = "vfio-pci" }]
[[group]]
id = 29
device = [{ bdf = "0000:67:00.0", vendor = 0x8086, device = 0x10d3, driver = "vfio-pci" }]
"#;

const ATTACKERS: &str = "0000:65:00.0";
const NEIGHBOUR: &str = "0000:65:00.1";
const ELSEWHERE: &str = "0000:66:00.0";
const FREE: &str = "0000:67:00.0";

/// A tenant's VMM, with threads in the kernel that come back when the page does.
struct Attack {
    threads: Vec<JoinHandle<()>>,
    _lease: OwnedFd,
}

impl Attack {
    /// Has the device of it ready; `begin` makes the calls.
    fn prepare(daemon: &Daemon) -> Option<(Arc<Iommufd>, Arc<Device>, u32, OwnedFd)> {
        let mut client = as_uid(OTHER, || daemon.connect())?;
        let mut held = Held::acquire(&mut client, ATTACKERS, "iommufd");
        let wire = Arc::new(Wire::detached());
        let lease = held.fds.pop().unwrap();
        let device = Device::from_fd(wire.clone(), ATTACKERS, held.fds.pop().unwrap());
        let iommufd = Iommufd::from_fd(wire, held.fds.pop().unwrap());
        device.bind_iommufd(&iommufd).unwrap();
        let ioas = iommufd.ioas_alloc().unwrap();
        device.attach_iommufd_pt(ioas).unwrap();
        Some((Arc::new(iommufd), Arc::new(device), ioas, lease))
    }

    fn begin(machine: &Machine, daemon: &Daemon) -> Option<Self> {
        let (iommufd, device, ioas, lease) = Self::prepare(daemon)?;
        machine.sim.fault(Fault::never("IOMMU_IOAS_MAP")).unwrap();
        let map = std::thread::spawn(move || {
            let (_, memory) = Mapped::memfd(4096).unwrap();
            let flags = MapFlags::FIXED_IOVA | MapFlags::READ;
            let map = IoasMap { flags, vaddr: memory.vaddr(), size: 4096, iova: 0 };
            iommufd.ioas_map(ioas, &map).unwrap();
        });
        until("its page is waited for", || machine.sim.stats().unwrap().held == 1);
        let detach = std::thread::spawn(move || device.detach_iommufd_pt().unwrap());
        until("its bus is locked", || machine.sim.stats().unwrap().held == 2);
        Some(Self { threads: vec![map, detach], _lease: lease })
    }

    /// The page comes.
    fn end(self, machine: &Machine) {
        machine.sim.clear_faults().unwrap();
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

fn daemon(machine: &Machine) -> Daemon {
    let own = tempfile::tempdir().unwrap();
    let mut command = machine.command();
    command.args(["--call-deadline", "2000"]);
    command.stderr(std::fs::File::create(own.path().join("log")).unwrap());
    Daemon::spawn(own, machine.socket(), command)
}

fn acquire(client: &mut Raw, device: &str) -> Reply {
    client.call("Acquire", json!({ "vm": "v", "devices": [device], "handout": "devices" }))
}

/// What status says of the keeper that hangs.
fn hanging(daemon: &Daemon) -> Option<Value> {
    let (status, _) = daemon.connect().call("Status", json!({})).ok();
    let keepers = status["keepers"].as_array().unwrap().iter();
    let mut hanging = keepers.filter(|keeper| keeper["call_since"].is_u64());
    hanging.next().cloned()
}

fn state(daemon: &Daemon, device: &str) -> Value {
    let (topology, _) = daemon.connect().call("Topology", json!({})).ok();
    let groups = topology["groups"].as_array().unwrap().iter();
    let mut its = groups.filter(|group| group["devices"][0]["bdf"] == device);
    its.next().unwrap()["state"].clone()
}

/// Everybody else is served: who has a lease, and who wants one.
fn others_go_on(daemon: &Daemon, held: &Held) {
    let mut client = daemon.connect();
    client.call("org.varlink.service.GetInfo", json!({})).ok();
    client.call("GetFds", held.key()).ok();
    assert_eq!(state(daemon, ELSEWHERE), "held");
    drop(acquire(&mut client, FREE).ok());
    until("it is free again", || state(daemon, FREE) == "free");
}

#[test]
fn a_neighbour_that_locks_a_bus_stops_one_keeper_and_nobody_else() {
    let machine = Machine::of(MACHINE);
    let mut daemon = daemon(&machine);
    let held = Held::acquire(&mut daemon.connect(), ELSEWHERE, "devices");
    let Some(attack) = Attack::begin(&machine, &daemon) else { return };
    let error = acquire(&mut daemon.connect(), NEIGHBOUR).error("Kernel");
    assert_eq!(error["errno"], nix::libc::ETIMEDOUT, "{error}");
    until("it is shown where it hangs", || {
        hanging(&daemon)
            .is_some_and(|keeper| keeper["call"] == "open" && keeper["object"] == NEIGHBOUR)
    });
    let stuck = hanging(&daemon).unwrap();
    let is_stuck = |daemon: &Daemon| {
        let now = hanging(daemon).unwrap();
        assert_eq!((&now["pid"], &now["call_since"]), (&stuck["pid"], &stuck["call_since"]));
        assert!(!matches!(acquire(&mut daemon.connect(), NEIGHBOUR), Reply::Ok(..)));
    };
    is_stuck(&daemon);
    others_go_on(&daemon, &held);
    // The broker dies, and then all of the daemon, and each is there again at once.
    let broker = daemon.pid();
    daemon.signal_broker(Signal::SIGKILL);
    until("there is another broker", || {
        children(daemon.launcher(), "vfiob-broker").iter().any(|pid| *pid != broker)
    });
    is_stuck(&daemon);
    others_go_on(&daemon, &held);
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        end(daemon, signal);
        daemon = self::daemon(&machine);
        is_stuck(&daemon);
        others_go_on(&daemon, &held);
    }
    // The page comes, and what was asked for is undone: it was never delivered.
    attack.end(&machine);
    until("it goes on by itself", || state(&daemon, NEIGHBOUR) == "free");
    drop(acquire(&mut daemon.connect(), NEIGHBOUR).ok());
    assert_eq!(state(&daemon, ELSEWHERE), "held");
}

#[test]
fn a_lease_that_ends_while_its_bus_is_locked_is_taken_back_afterwards() {
    let machine = Machine::of(MACHINE);
    let daemon = daemon(&machine);
    let held = Held::acquire(&mut daemon.connect(), ELSEWHERE, "devices");
    let neighbour = Held::acquire(&mut daemon.connect(), NEIGHBOUR, "devices");
    let Some(attack) = Attack::begin(&machine, &daemon) else { return };
    // Its device's close waits, so the kernel says that it is open.
    drop(neighbour);
    until("it can't be taken back", || state(&daemon, NEIGHBOUR) == "quarantined");
    others_go_on(&daemon, &held);
    attack.end(&machine);
    until("it is taken back", || state(&daemon, NEIGHBOUR) == "free");
    drop(acquire(&mut daemon.connect(), NEIGHBOUR).ok());
}
