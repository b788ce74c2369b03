//! The broker as root, and QEMU and `vfio-broker` as a user.

use crate::brokerd::Brokerd;
use crate::guest::close_nodes;
pub use crate::guest::{ALICE, EDU, NIC, qemu, vfio_files};
pub use crate::until::until;
use nix::sys::resource::{Resource, setrlimit};
use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use vfio_broker::client::Client;
use vfio_broker::protocol::{Group, GroupState};

/// What the user's QEMU may pin: its 64 MiB and some more.
const MEMLOCK: u64 = 256 << 20;

const POLICY: &str = r#"
version = 1

[[tenant]]
name = "alice"
user = 2001
devices = ["8086:10d3", "1234:11e8"]
handouts = ["container", "group", "iommufd"]

[[tenant]]
name = "root"
user = 0
rights = ["observe"]
"#;

pub struct World {
    daemon: Brokerd,
}

impl World {
    pub fn start() -> Self {
        close_nodes();
        setrlimit(Resource::RLIMIT_MEMLOCK, MEMLOCK, MEMLOCK).unwrap();
        let world = Self { daemon: Brokerd::on_host(POLICY) };
        fs::create_dir(world.own()).unwrap();
        chown(world.own(), Some(ALICE), Some(ALICE)).unwrap();
        world
    }

    pub fn socket(&self) -> PathBuf {
        self.daemon.socket.clone()
    }

    /// A directory of the user's.
    pub fn own(&self) -> PathBuf {
        self.daemon.directory().join("alice")
    }

    /// A program of the user's, without capabilities.
    pub fn user(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.uid(ALICE).gid(ALICE).env("VFIO_BROKER_SOCKET", self.socket());
        command.env("VFIO_BROKER", env!("CARGO_BIN_EXE_vfio-broker")).env("QEMU", qemu());
        command.stdin(Stdio::null());
        command
    }

    pub fn vfio_broker(&self, words: &[&str]) -> Command {
        let mut command = self.user(env!("CARGO_BIN_EXE_vfio-broker"));
        command.args(words);
        command
    }

    pub fn broker(&self) -> Client {
        Client::connect_to(self.socket()).unwrap()
    }

    pub fn leases(&self) -> usize {
        self.broker().leases().unwrap().len()
    }

    /// The daemon's open files once connections that have just been closed are gone.
    pub fn settled_files(&self) -> usize {
        let counts = (0..20).map(|_| {
            std::thread::sleep(Duration::from_millis(20));
            self.daemon_files()
        });
        counts.min().unwrap()
    }

    pub fn daemon_files(&self) -> usize {
        self.daemon.brokers_files()
    }

    /// No lease is left, and its tenant can have every device again.
    pub fn is_clean(&self) {
        until("no lease is left", || self.leases() == 0);
        until("the devices are free", || {
            let groups = self.broker().topology().unwrap();
            let busy = [GroupState::Held, GroupState::Reclaiming];
            let left = |group: &Group| busy.contains(&group.state) && group.unproved.is_none();
            !groups.iter().any(left)
        });
    }
}

/// A running QEMU of the user's, with no guest in it; killed when dropped.
pub struct Qemu {
    child: Child,
    pub monitor: PathBuf,
}

impl Qemu {
    pub fn start(world: &World) -> Self {
        Self::start_as(world, &qemu())
    }

    /// Another QEMU than the one that is tested.
    pub fn start_as(world: &World, program: &str) -> Self {
        let monitor = world.own().join("qmp");
        let _ = fs::remove_file(&monitor);
        let mut command = world.user(program);
        command.args(["-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none"]);
        command.args(["-m", "64", "-S"]);
        // With PCI Express's own hotplug a device can go without a guest's help, while no guest has
        // switched its port on.
        command.args(["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]);
        command.args(["-device", "pcie-root-port,id=port1,chassis=1"]);
        command.args(["-device", "pcie-root-port,id=port2,chassis=2"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        Self::of(command.spawn().unwrap(), monitor)
    }

    /// One that was started, with this monitor.
    pub fn of(child: Child, monitor: PathBuf) -> Self {
        until("QEMU listens on its monitor", || monitor.exists());
        Self { child, monitor }
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn vfio_files(&self) -> Vec<String> {
        vfio_files(self.child.id())
    }

    pub fn status(&self, field: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap().trim().to_owned()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program said, which must have ended well.
#[track_caller]
pub fn well(output: Output) -> String {
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success(), "{}: {said}", output.status);
    said
}
