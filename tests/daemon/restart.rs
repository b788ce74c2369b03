//! The daemon is killed and started again while somebody has a device by its own node. The simulated
//! kernel is this process's, so it goes on.

use crate::DEVICE;
use crate::common::raw::{Raw, Reply};
use crate::common::{Daemon, as_uid, read_all, until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs::Permissions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use vfio_broker::kernel::{Device, Iommufd};
use vfio_broker::sim::{Sim, Topology, Wire};

/// Who else there is.
const OTHER: u32 = 12345;

/// A kernel on which daemons come and go.
struct Machine {
    sim: Sim,
    directory: tempfile::TempDir,
}

impl Machine {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Another uid is to get to the socket.
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        let topology = Topology::from_toml(crate::common::TOPOLOGY).unwrap();
        let sim = Sim::start_in(topology, directory.path()).unwrap();
        let machine = Self { sim, directory };
        machine.write_policy(&format!("user = {}", nix::unistd::geteuid()));
        machine
    }

    /// The tenant that the test is, and the other one.
    fn write_policy(&self, mine: &str) {
        let rest = "devices = [\"8086:10d3\"]\nhandouts = [\"iommufd\", \"group\"]\n";
        let text = format!(
            "version = 1\n[[tenant]]\nname = \"mine\"\n{mine}\n{rest}[[tenant]]\nname = \"other\"\n\
             user = {OTHER}\n{rest}"
        );
        std::fs::write(self.policy(), text).unwrap();
    }

    fn policy(&self) -> PathBuf {
        self.directory.path().join("policy.toml")
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("run/broker.sock")
    }

    fn record(&self) -> PathBuf {
        self.directory.path().join("run/broker.sock.given")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-brokerd"));
        command.arg("--sim-at").arg(self.sim.control_path()).arg("--policy").arg(self.policy());
        command.stdin(Stdio::null()).stdout(Stdio::null()).env("RUST_LOG", "debug");
        command
    }

    fn daemon(&self) -> Daemon {
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

fn end(mut daemon: Daemon, signal: Signal) {
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

#[test]
fn an_open_node_is_remembered_whatever_ends_the_daemon() {
    let machine = Machine::start();
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let daemon = machine.daemon();
        let (iommufd, stale) = acquired(&daemon);
        drop(iommufd);
        end(daemon, signal);
        assert_eq!(
            std::fs::metadata(machine.record()).unwrap().permissions().mode() & 0o777,
            0o600
        );
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
fn a_lease_that_is_alive_is_taken_back_by_the_next_daemon() {
    let machine = Machine::start();
    let daemon = machine.daemon();
    let (iommufd, device) = acquired(&daemon);
    device.bind_iommufd(&iommufd).unwrap();
    end(daemon, Signal::SIGKILL);
    let daemon = machine.daemon();
    if let Some(reason) = others_refusal(&daemon) {
        assert!(reason.contains("open"), "{reason}");
    }
    let mut client = daemon.connect();
    let mut state = || {
        let (topology, _) = client.call("Topology", json!({})).ok();
        topology["groups"][0]["state"].clone()
    };
    until("it is seen to be in use", || state() == "quarantined");
    acquire(&mut daemon.connect()).error("Quarantined");
    drop((iommufd, device));
    drop(acquired(&daemon));
    until("it is its tenant's alone", || state() == "free");
    assert!(daemon.log().contains("may be open since before the restart"), "{}", daemon.log());
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
fn a_record_that_can_not_be_read_is_no_reason_to_start() {
    let machine = Machine::start();
    let daemon = machine.daemon();
    drop(acquired(&daemon));
    end(daemon, Signal::SIGKILL);
    let good = std::fs::read(machine.record()).unwrap();
    let path = machine.record();
    let path = path.to_str().unwrap();
    for bad in [&b""[..], b"garbage", &good[..good.len() - 1]] {
        std::fs::write(machine.record(), bad).unwrap();
        let said = machine.refusal();
        assert!(said.contains(path) && said.contains("remove it"), "{said}");
        assert!(!machine.socket().exists(), "nobody listens there");
        assert_eq!(std::fs::read(machine.record()).unwrap(), bad, "it is left for people to see");
    }
    // Another kernel's numbers mean nothing to this one.
    let text = String::from_utf8(good).unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    std::fs::write(machine.record(), text.replace(boot.trim(), "another")).unwrap();
    let daemon = machine.daemon();
    as_uid(OTHER, || drop(acquired(&daemon)));
}

#[test]
fn what_can_not_be_written_down_is_not_handed_out() {
    let machine = Machine::start();
    let daemon = machine.daemon();
    let mut client = daemon.connect();
    let mut in_the_way = machine.record().into_os_string();
    in_the_way.push(".new");
    std::fs::create_dir(&in_the_way).unwrap();
    acquire(&mut client).error("Kernel");
    let fds = daemon.open_fds();
    for _ in 0..3 {
        let error = acquire(&mut client).error("Kernel");
        assert_eq!((&error["call"], &error["name"]), (&json!("create"), &json!("EEXIST")));
    }
    daemon.settles_at(fds);
    assert!(machine.sim.stats().unwrap().is_idle(), "{:#?}", machine.sim.stats());
    assert!(!machine.record().exists());
    let group = json!({ "vm": "web1", "devices": [DEVICE], "handout": "group" });
    drop(client.call("Acquire", group).ok());
    std::fs::remove_dir(&in_the_way).unwrap();
    drop(acquired(&daemon));
    assert!(machine.record().exists());
}
