//! The daemon is killed and started again while somebody has devices. The simulated kernel is this
//! process's, so it goes on.

use crate::DEVICE;
use crate::common::raw::{Raw, Reply, call};
use crate::common::{Daemon, Held, as_uid, read_all, until};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs::Permissions;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use vfio_broker::kernel::{Device, Iommufd, Mapped};
use vfio_broker::sim::{Fault, Sim, Topology, Wire};

/// How often the daemon is killed.
const ROUNDS: usize = 60;

/// Who else there is.
pub(super) const OTHER: u32 = 12345;

/// A kernel on which daemons come and go.
pub(super) struct Machine {
    pub(super) sim: Sim,
    pub(super) directory: tempfile::TempDir,
}

impl Machine {
    pub(super) fn start() -> Self {
        Self::of(crate::common::TOPOLOGY)
    }

    pub(super) fn of(topology: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Another uid is to get to the socket.
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        let topology = Topology::from_toml(topology).unwrap();
        let sim = Sim::start_in(topology, directory.path()).unwrap();
        let machine = Self { sim, directory };
        machine.write_policy(&format!("user = {}", nix::unistd::geteuid()));
        machine
    }

    /// The tenant that the test is, and the other one.
    fn write_policy(&self, mine: &str) {
        let rest = "devices = [\"8086:10d3\"]\nhandouts = [\"iommufd\", \"group\", \"container\", \"devices\"]\n";
        let text = format!(
            "version = 1\n[[tenant]]\nname = \"mine\"\n{mine}\n{rest}[[tenant]]\nname = \"other\"\n\
             user = {OTHER}\n{rest}"
        );
        std::fs::write(self.policy(), text).unwrap();
    }

    pub(super) fn policy(&self) -> PathBuf {
        self.directory.path().join("policy.toml")
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.path().join("run/broker.sock")
    }

    fn keepers(&self) -> PathBuf {
        self.directory.path().join("run/broker.sock.keepers")
    }

    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-brokerd"));
        command.arg("--sim-at").arg(self.sim.control_path()).arg("--policy").arg(self.policy());
        command.stdin(Stdio::null()).stdout(Stdio::null()).env("RUST_LOG", "debug");
        command
    }

    pub(super) fn daemon(&self) -> Daemon {
        let own = tempfile::tempdir().unwrap();
        let mut command = self.command();
        command.stderr(std::fs::File::create(own.path().join("log")).unwrap());
        Daemon::spawn(own, self.socket(), command)
    }

    /// What a daemon says that does not start.
    fn refusal(&self) -> String {
        let mut command = self.command();
        command.arg("--socket").arg(self.socket()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let said = read_all(child.stderr.take().unwrap());
        assert_eq!(child.wait().unwrap().code(), Some(1), "{said}");
        said
    }

    fn rebind(&self) {
        self.sim.set_driver(DEVICE, None).unwrap();
        self.sim.set_driver(DEVICE, Some("vfio-pci")).unwrap();
    }
}

fn acquire(client: &mut Raw) -> Reply {
    client.call("Acquire", json!({ "vm": "web1", "devices": [DEVICE], "backend": "iommufd" }))
}

/// Acquires it as soon as it has been taken back; iommufd and device, the lease's pipe closed.
fn acquired(daemon: &Daemon) -> (Iommufd, Device) {
    let mut got = None;
    until("it can be acquired", || match acquire(&mut daemon.connect()) {
        Reply::Ok(_, fds) => {
            got = Some(fds);
            true
        }
        Reply::Error(name, parameters) => {
            assert!(name.ends_with(".Quarantined"), "{name}: {parameters}");
            false
        }
    });
    let mut fds: Vec<OwnedFd> = got.unwrap();
    let wire = Arc::new(Wire::detached());
    let device = Device::from_fd(wire.clone(), DEVICE, fds.remove(1));
    (Iommufd::from_fd(wire, fds.remove(0)), device)
}

pub(super) fn end(mut daemon: Daemon, signal: Signal) {
    daemon.signal(signal);
    daemon.wait();
}

/// Why the other tenant can't have it, once the daemon has asked the kernel.
fn others_refusal(daemon: &Daemon) -> Option<String> {
    as_uid(OTHER, || {
        let mut reason = String::new();
        until("the kernel has been asked", || {
            let parameters = acquire(&mut daemon.connect()).error("Quarantined");
            reason = parameters["reason"].as_str().unwrap().to_owned();
            !reason.contains("just ended")
        });
        reason
    })
}

/// The keepers' state files, one each.
pub(super) fn states(machine: &Machine) -> Vec<PathBuf> {
    let Ok(keepers) = std::fs::read_dir(machine.keepers()) else { return Vec::new() };
    let states = keepers.map(|entry| entry.unwrap().path().join("state"));
    states.filter(|state| state.exists()).collect()
}

fn state(client: &mut Raw) -> Value {
    let (topology, _) = client.call("Topology", json!({})).ok();
    topology["groups"][0]["state"].clone()
}

/// The process of the only keeper there is.
fn keeper(machine: &Machine) -> Pid {
    let state = states(machine).remove(0);
    let saved: Value = serde_json::from_slice(&std::fs::read(state).unwrap()).unwrap();
    Pid::from_raw(saved["pid"].as_i64().unwrap() as i32)
}

#[test]
fn a_lease_outlives_the_daemon_whatever_ends_it() {
    for handout in ["container", "group", "devices", "iommufd"] {
        let machine = Machine::start();
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            let daemon = machine.daemon();
            let mut client = daemon.connect();
            let held = Held::acquire(&mut client, DEVICE, handout);
            let mut pipe = std::fs::File::from(held.fds.last().unwrap().try_clone().unwrap());
            end(daemon, signal);
            let daemon = machine.daemon();
            let mut client = daemon.connect();
            let (leases, _) = client.call("Leases", json!({})).ok();
            assert_eq!(leases["leases"][0]["lease"], held.reply["lease"], "{handout} {signal}");
            assert_eq!(state(&mut client), "held");
            acquire(&mut client).error("Busy");
            // The key is the key still.
            let wrong = held.with(json!({ "key": "0".repeat(32) }));
            client.call("Release", wrong).error("NoSuchLease");
            if handout == "container" {
                let (again, fds) = client.call("GetFds", held.key()).ok();
                assert_eq!((again["fds"].as_array().unwrap().len(), fds.len()), (3, 3));
            }
            if handout == "devices" {
                let memory = Mapped::memfd(8192).unwrap().0;
                let map = json!({ "iova": 0x1000, "size": 4096, "read": true, "write": true,
                                  "memory": 0, "offset": 0 });
                client.send_with(&call("MapDma", &held.with(map)), &[memory.as_fd()]).unwrap();
                client.reply().ok();
            }
            client.call("Release", held.key()).ok();
            assert_eq!(std::io::Read::read(&mut pipe, &mut [0]).unwrap(), 0, "its end is seen");
            drop((held, pipe));
            if handout == "iommufd" {
                machine.rebind();
            }
            until("it is free", || state(&mut client) == "free");
            end(daemon, Signal::SIGKILL);
            until("no keeper is left", || states(&machine).is_empty());
            assert!(machine.sim.stats().unwrap().is_idle(), "{:#?}", machine.sim.stats());
        }
    }
}

#[test]
fn a_lease_ends_with_its_holder_while_no_daemon_is_there() {
    let machine = Machine::start();
    let mut daemon = machine.daemon();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "container");
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    assert_eq!(machine.sim.stats().unwrap().groups, 1);
    drop(held);
    until("its keeper has ended", || states(&machine).is_empty());
    // The dead daemon's log has its end.
    daemon.until_logged("lease ends: holder gone, with no broker there");
    assert!(machine.sim.stats().unwrap().is_idle(), "{:#?}", machine.sim.stats());
    let daemon = machine.daemon();
    drop(acquired(&daemon));
}

#[test]
fn what_a_killed_keeper_leaves_is_taken_back() {
    for with_daemon in [true, false] {
        let machine = Machine::start();
        let mut daemon = Some(machine.daemon());
        let mut client = daemon.as_ref().unwrap().connect();
        let held = Held::acquire(&mut client, DEVICE, "group");
        let keeper = keeper(&machine);
        if !with_daemon {
            end(daemon.take().unwrap(), Signal::SIGKILL);
        }
        nix::sys::signal::kill(keeper, Signal::SIGKILL).unwrap();
        let mut pipe = std::fs::File::from(held.fds.last().unwrap().try_clone().unwrap());
        assert_eq!(std::io::Read::read(&mut pipe, &mut [0]).unwrap(), 0, "its holder is told");
        let daemon = daemon.unwrap_or_else(|| machine.daemon());
        let mut client = daemon.connect();
        until("the lease has ended", || {
            let (leases, _) = client.call("Leases", json!({})).ok();
            leases["leases"].as_array().unwrap().is_empty()
        });
        client.call("Release", held.key()).error("NoSuchLease");
        until("its group is in use", || state(&mut client) == "quarantined");
        acquire(&mut client).error("Quarantined");
        drop((held, pipe));
        until("it is free", || state(&mut client) == "free");
        until("no keeper is left", || states(&machine).is_empty());
        drop(acquired(&daemon));
    }
}

#[test]
fn a_keeper_that_hangs_is_known_to_the_next_daemon() {
    let machine = Machine::start();
    let daemon = machine.daemon();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "container");
    machine.sim.wire().fault(&Fault::never("VFIO_IOMMU_UNMAP_DMA")).unwrap();
    drop(held);
    until("its keeper hangs", || machine.sim.stats().unwrap().held == 1);
    end(daemon, Signal::SIGKILL);
    let daemon = machine.daemon();
    let mut client = daemon.connect();
    until("it is not given to anybody", || {
        let parameters = acquire(&mut client).error("Quarantined");
        parameters["reason"].as_str().unwrap().contains("does not answer")
    });
    machine.sim.wire().clear_faults().unwrap();
    until("it goes on by itself", || state(&mut client) == "free");
    drop(acquired(&daemon));
}

#[test]
fn an_open_node_is_remembered_whatever_ends_the_daemon() {
    let machine = Machine::start();
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let daemon = machine.daemon();
        let (iommufd, stale) = acquired(&daemon);
        drop(iommufd);
        let state = states(&machine).remove(0);
        assert_eq!(std::fs::metadata(state).unwrap().permissions().mode() & 0o777, 0o600);
        end(daemon, signal);
        let daemon = machine.daemon();
        if let Some(reason) = others_refusal(&daemon) {
            assert!(reason.contains("may still have it open"), "{reason}");
        }
        // The same tenant has it again; that is remembered too.
        drop(acquired(&daemon));
        end(daemon, Signal::SIGKILL);
        let daemon = machine.daemon();
        others_refusal(&daemon);
        drop(stale);
        machine.rebind();
        as_uid(OTHER, || drop(acquired(&daemon)));
        end(daemon, Signal::SIGKILL);
        machine.rebind();
    }
}

#[test]
fn a_tenant_that_means_somebody_else_has_nothing_of_it() {
    let machine = Machine::start();
    let daemon = machine.daemon();
    let stale = acquired(&daemon);
    end(daemon, Signal::SIGKILL);
    machine.write_policy(&format!("user = [{}, {}]", nix::unistd::geteuid(), OTHER + 1));
    let daemon = machine.daemon();
    let mut reason = Value::Null;
    until("the kernel has been asked", || {
        let parameters = acquire(&mut daemon.connect()).error("Quarantined");
        reason = parameters["reason"].clone();
        !reason.as_str().unwrap().contains("just ended")
    });
    assert!(reason.as_str().unwrap().contains("may still have it open"), "{reason}");
    drop(stale);
    machine.rebind();
    drop(acquired(&daemon));
}

#[test]
fn a_dead_keeper_s_state_that_can_not_be_read_is_no_reason_to_start() {
    let machine = Machine::start();
    let daemon = machine.daemon();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "group");
    let (file, keeper) = (states(&machine).remove(0), keeper(&machine));
    end(daemon, Signal::SIGKILL);
    let good = std::fs::read(&file).unwrap();
    let path = file.to_str().unwrap().to_owned();
    nix::sys::signal::kill(keeper, Signal::SIGKILL).unwrap();
    let mut pipe = std::fs::File::from(held.fds.last().unwrap().try_clone().unwrap());
    assert_eq!(std::io::Read::read(&mut pipe, &mut [0]).unwrap(), 0, "it has ended");
    let refused = |what: &str| {
        let said = machine.refusal();
        assert!(said.contains(&path) && said.contains("remove"), "{what}: {said}");
        assert!(!machine.socket().exists(), "nobody listens there");
    };
    for bad in [&b""[..], b"garbage", &good[..good.len() - 1]] {
        std::fs::write(&file, bad).unwrap();
        refused("bad content");
        assert_eq!(std::fs::read(&file).unwrap(), bad, "it is left for people to see");
    }
    std::fs::write(&file, &good).unwrap();
    std::fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
    refused("others can have written it");
    std::fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(&file, Some(OTHER), None).unwrap();
        refused("another user's");
        std::os::unix::fs::chown(&file, Some(0), None).unwrap();
    }
    let elsewhere = machine.directory.path().join("elsewhere");
    std::fs::rename(&file, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
    refused("a link");
    std::fs::remove_file(&file).unwrap();
    // Two that claim the same lease.
    std::fs::rename(&elsewhere, &file).unwrap();
    let second = machine.keepers().join("00000000000000ff");
    std::fs::create_dir(&second).unwrap();
    std::fs::copy(&file, second.join("state")).unwrap();
    let said = machine.refusal();
    assert!(said.contains(held.reply["lease"].as_str().unwrap()), "{said}");
    std::fs::remove_dir_all(&second).unwrap();
    // Another kernel's numbers mean nothing to this one.
    let text = String::from_utf8(good).unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    std::fs::write(&file, text.replace(boot.trim(), "another")).unwrap();
    drop((held, pipe));
    let daemon = machine.daemon();
    as_uid(OTHER, || drop(acquired(&daemon)));
}

#[test]
fn what_can_not_be_written_down_is_not_handed_out() {
    let machine = Machine::start();
    let daemon = machine.daemon();
    let mut client = daemon.connect();
    client.call("Leases", json!({})).ok();
    let fds = daemon.settled_fds();
    std::fs::rename(machine.keepers(), machine.directory.path().join("away")).unwrap();
    std::fs::write(machine.keepers(), "").unwrap();
    for _ in 0..3 {
        let error = acquire(&mut client).error("Kernel");
        assert_eq!(
            (&error["call"], &error["name"]),
            (&json!("mkdir"), &json!("ENOTDIR")),
            "{error}"
        );
    }
    daemon.settles_at(fds);
    assert!(machine.sim.stats().unwrap().is_idle(), "{:#?}", machine.sim.stats());
    std::fs::remove_file(machine.keepers()).unwrap();
    std::fs::rename(machine.directory.path().join("away"), machine.keepers()).unwrap();
    drop(acquired(&daemon));
    assert!(!states(&machine).is_empty());
}

/// What is delivered stays, and what is not undoes itself, wherever the daemon is killed in an Acquire.
#[test]
fn a_daemon_that_is_killed_at_any_moment_loses_nothing() {
    const DEVICES: [&str; 4] = [DEVICE, "0000:66:00.0", "0000:67:00.0", "0000:68:00.0"];
    const HANDOUTS: [&str; 4] = ["container", "group", "devices", "iommufd"];
    let machine = Machine::start();
    let mut daemon = machine.daemon();
    let mut held: Vec<(usize, Held)> = Vec::new();
    let (mut given, mut undone, mut window) = (0, 0, Duration::from_millis(8));
    for round in 0..ROUNDS {
        let free = (0..DEVICES.len()).find(|n| held.iter().all(|(at, _)| at != n)).unwrap();
        let mut client = daemon.connect();
        let handout = HANDOUTS[round % HANDOUTS.len()];
        let wanted = json!({ "vm": "v", "devices": [DEVICES[free]], "handout": handout });
        client.send(&call("Acquire", &wanted));
        // About when it is answered, which the rounds before have shown.
        std::thread::sleep(window.mul_f64((round * 7919 % 160) as f64 / 100.0));
        end(daemon, Signal::SIGKILL);
        match client.try_reply() {
            Some(Reply::Ok(reply, fds)) => {
                given += 1;
                window = window.mul_f64(0.8);
                held.push((free, Held { reply, fds }));
            }
            Some(Reply::Error(name, parameters)) => panic!("{name}: {parameters}"),
            None => {
                undone += 1;
                window = window.mul_f64(1.25);
            }
        }
        drop(client);
        daemon = machine.daemon();
        let mut client = daemon.connect();
        let mut known: Vec<_> = held.iter().map(|(_, held)| held.reply["lease"].clone()).collect();
        known.sort_by_key(Value::to_string);
        until("it has what was delivered, and nothing else", || {
            let (leases, _) = client.call("Leases", json!({})).ok();
            let leases = leases["leases"].as_array().unwrap().iter();
            let mut there: Vec<_> = leases.map(|lease| lease["lease"].clone()).collect();
            there.sort_by_key(Value::to_string);
            there == known
        });
        for (_, held) in &held {
            let pipe = held.fds.last().unwrap();
            let mut ask = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
            poll(&mut ask, PollTimeout::ZERO).unwrap();
            assert_eq!(ask[0].revents(), Some(PollFlags::empty()), "a lease has ended");
        }
        if held.len() == 3 {
            let (at, _) = held.remove(round % 3);
            let bdf = DEVICES[at];
            until("it can be had again by its tenant", || {
                let (topology, _) = client.call("Topology", json!({})).ok();
                let groups = topology["groups"].as_array().unwrap().iter();
                let mut its = groups.filter(|group| group["devices"][0]["bdf"] == bdf);
                its.next().unwrap()["state"] == "free"
            });
        }
    }
    assert!(given > 0 && undone > 0, "{given} were given, {undone} undone");
    held.clear();
    for bdf in DEVICES {
        until("its driver can go", || machine.sim.set_driver(bdf, None).is_ok());
        machine.sim.set_driver(bdf, Some("vfio-pci")).unwrap();
    }
    until("no keeper is left", || states(&machine).is_empty());
    end(daemon, Signal::SIGTERM);
    assert!(machine.sim.stats().unwrap().is_idle(), "{:#?}", machine.sim.stats());
}
