//! What an administrator does by hand (docs/install.md), and who has devices meanwhile.

use crate::copies::Copies;
use crate::guest::{EDU, MIB, NIC};
use crate::qemu::Qemu;
pub use crate::until::until;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use vfio_broker::client::{Acquire, Client};
use vfio_broker::protocol::{self, GroupState, Handout};

pub const SERVICE: &str = "vfio-broker.service";
pub const SOCKET: &str = "vfio-broker.socket";
pub const PROGRAMS: &str = "/usr/local/bin";
/// Where units stand that no package has brought.
pub const UNITS: &str = "/etc/systemd/system";
pub const POLICY: &str = "/etc/vfio-broker/policy.toml";
/// A device of which nobody has anything but for the moment.
pub const SPARE: &str = "0000:00:04.0";

const RULES: &str = r#"
version = 1

[[tenant]]
name = "root"
user = 0
rights = ["acquire", "observe"]
devices = ["1234:11e8"]
handouts = ["container", "devices", "iommufd"]
rebind = true

[[tenant]]
name = "vms"
user = 2001
rights = ["acquire", "observe"]
devices = ["8086:10d3"]
handouts = ["container"]
memlock = "1GiB"
"#;

pub struct World {
    holders: Option<(Qemu, Copies)>,
}

impl World {
    /// Installs everything; nothing is started.
    pub fn install() -> Self {
        let programs = std::env::var_os("VFIO_PROGRAMS").map(PathBuf::from);
        let built = Path::new(env!("CARGO_BIN_EXE_vfio-brokerd")).parent().unwrap();
        let programs = programs.as_deref().unwrap_or(built);
        for name in ["vfio-broker", "vfio-brokerd"] {
            put(&programs.join(name), &Path::new(PROGRAMS).join(name), 0o755);
        }
        let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist");
        for unit in [SERVICE, SOCKET] {
            put(&dist.join("systemd").join(unit), &Path::new(UNITS).join(unit), 0o644);
        }
        for of in ["sysusers", "tmpfiles"] {
            let directory = format!("{of}.d");
            let name = dist.join(&directory).join("vfio-broker.conf");
            put(&name, &Path::new("/etc").join(directory).join("vfio-broker.conf"), 0o644);
        }
        run("systemd-sysusers", &[]);
        run("systemd-tmpfiles", &["--create", "vfio-broker.conf"]);
        fs::write(POLICY, RULES).unwrap();
        run("systemctl", &["daemon-reload"]);
        Self { holders: None }
    }

    /// Has QEMU take the network card, and this process another device.
    pub fn acquire(&mut self) {
        let card = format!("vfio-pci,id=hd0,host={NIC}");
        let mut qemu = Qemu::start(exec(), "64", &["-device", &card]);
        assert!(qemu.greets(), "QEMU did not start");
        let copies = Copies::acquire(&mut Client::connect().unwrap(), EDU);
        self.holders = Some((qemu, copies));
        self.holders_have_all();
    }

    /// Nobody has lost anything, whether there is a daemon or not.
    pub fn holders_have_all(&mut self) {
        let (qemu, copies) = self.holders.as_mut().expect("nobody has anything yet");
        assert_eq!(qemu.device("hd0"), (0x8086, 0x10d3));
        assert_eq!(qemu.shows().1.len(), 3, "container, group and device");
        copies.copy();
    }

    /// The daemon knows of all leases, by the names that they had before.
    pub fn leases_are_known(&mut self) {
        self.holders_have_all();
        let (_, copies) = self.holders.as_ref().unwrap();
        let all = leases();
        assert_eq!(all.len(), 2, "{all:?}");
        let own = all.iter().find(|lease| lease.lease == copies.lease.id()).unwrap();
        assert_eq!(own.devices, [EDU]);
        let other = all.iter().find(|lease| lease.uid == 2001).unwrap();
        assert_eq!(other.devices, [NIC]);
        // How much is mapped is known when the keeper has answered.
        until("the mapping is known", || leases().iter().any(|lease| lease.mappings == Some(1)));
    }

    /// Everybody gives back what they have.
    pub fn release(&mut self) {
        let (qemu, copies) = self.holders.take().unwrap();
        assert_eq!(qemu.quit().code(), Some(0));
        drop(copies);
    }
}

/// Takes a device and gives it back, drivers and all.
pub fn takes_and_gives_back(handout: Handout) {
    let mut broker = Client::connect().unwrap();
    let order = Acquire::new("spare").device(SPARE).handout(handout);
    let lease = broker.acquire(order).unwrap();
    broker.release(lease).unwrap();
    is_free(SPARE);
}

/// A device goes back to being anybody's.
pub fn is_free(device: &str) {
    until(&format!("{device} is free"), || {
        let groups = Client::connect().unwrap().topology().unwrap();
        let has = |group: &&protocol::Group| group.devices.iter().any(|d| d.bdf == device);
        let group = groups.iter().find(has).unwrap();
        group.state == GroupState::Free && group.unproved.is_none()
    });
}

pub fn leases() -> Vec<protocol::Lease> {
    Client::connect().unwrap().leases().unwrap()
}

/// A user who may connect, or one who may not, and a program of theirs.
pub fn user(groups: &str) -> Command {
    let mut command = Command::new("prlimit");
    command.arg(format!("--memlock={0}:{0}", 256 * MIB)).arg("setpriv");
    command.args(["--reuid", "2001", "--regid", "2001", "--groups", groups]);
    command.args(["--inh-caps=-all", "--bounding-set=-all"]);
    command.stdin(Stdio::null()).current_dir("/").process_group(0);
    command
}

fn exec() -> Command {
    let mut command = user("vfio-clients");
    command.args(["vfio-broker", "exec", "--vm", "web1", "--device", NIC]);
    command.args(["--handout", "container", "--"]);
    command
}

/// What systemd says of the service.
pub fn property(name: &str) -> String {
    let output = run("systemctl", &["show", "--value", "-p", name, SERVICE]);
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub fn main_pid() -> i32 {
    property("MainPID").parse().unwrap()
}

/// Waits for the daemon after that one.
pub fn is_another_than(daemon: i32) {
    until("there is another daemon", || ![0, daemon].contains(&main_pid()));
}

/// The process of the user that the units' broker runs as.
pub fn broker() -> Option<i32> {
    let uid = nix::unistd::User::from_name("vfio-broker").unwrap().expect("no user").uid;
    let pids = fs::read_to_string(format!("/sys/fs/cgroup/system.slice/{SERVICE}/cgroup.procs"));
    let mut pids = pids.as_deref().unwrap_or_default().lines();
    let its = |pid: &&str| {
        let found = fs::metadata(format!("/proc/{pid}"));
        found.is_ok_and(|found| found.uid() == uid.as_raw())
    };
    pids.find(its).map(|pid| pid.parse().unwrap())
}

/// Every keeper's process, which the daemon's restarts are to leave alone.
pub fn keepers() -> Vec<u64> {
    let names = fs::read_dir("/run/vfio-broker/keepers").unwrap();
    let states = names.filter_map(|name| fs::read(name.unwrap().path().join("state")).ok());
    let mut pids: Vec<_> = states
        .map(|state| serde_json::from_slice::<Value>(&state).unwrap()["pid"].as_u64().unwrap())
        .collect();
    pids.sort_unstable();
    for pid in &pids {
        let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(group.contains(SERVICE), "{group}");
    }
    pids
}

/// Copies a file, in place of the one that may run.
pub fn put(from: &Path, to: &Path, mode: u32) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    let new = to.with_extension("new");
    fs::copy(from, &new).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    fs::set_permissions(&new, fs::Permissions::from_mode(mode)).unwrap();
    fs::rename(new, to).unwrap();
}

/// Runs a program that must succeed.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    if !output.status.success() {
        print!("{}", String::from_utf8_lossy(&output.stdout));
        print!("{}", journal());
        panic!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    output
}

/// What the service, and systemd about it, has said.
pub fn journal() -> String {
    let _ = Command::new("journalctl").arg("--sync").status();
    let mut command = Command::new("journalctl");
    let output = command.args(["-q", "--no-pager", "-o", "short-monotonic", "-u", SERVICE]);
    String::from_utf8_lossy(&output.output().unwrap().stdout).into_owned()
}
