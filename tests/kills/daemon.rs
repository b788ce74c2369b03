//! The daemon, which is killed and started again as a service manager would.

use crate::dice::Dice;
use crate::qemu::let_all_run;
use crate::until::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use vfio_broker::client::Client;
use vfio_broker::protocol::{Group, GroupState};

/// Holders are of 2001, and those who come and go of 2002 and 2003.
const POLICY: &str = r#"
version = 1

[[tenant]]
name = "vms"
user = 2001
devices = ["8086:10d3", "1234:11e8"]
handouts = ["container", "iommufd"]
memlock = "1GiB"
rebind = true

[[tenant]]
name = "left"
user = 2002
devices = ["1234:11e8", "8086:10ca"]
handouts = ["container", "group", "devices", "iommufd"]
rebind = true

[[tenant]]
name = "right"
user = 2003
devices = ["1234:11e8", "8086:10ca"]
handouts = ["container", "group", "devices", "iommufd"]
rebind = true

[[tenant]]
name = "root"
user = 0
rights = ["acquire", "observe"]
devices = ["8086:10d3", "1234:11e8", "8086:10ca"]
handouts = ["container", "group", "devices", "iommufd"]
rebind = true

[[container]]
name = "enforced"
members = ["left", "right"]
"#;

/// So many brokers of one launcher can die: with more it gives up.
const MOST: usize = 4;

pub struct Daemon {
    dir: tempfile::TempDir,
    launcher: Child,
    /// How often a launcher was started.
    pub starts: usize,
    /// How often something of this launcher was killed.
    kills: usize,
    pub has_iommufd: bool,
}

impl Daemon {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("policy.toml"), POLICY).unwrap();
        let_all_run(Path::new(env!("CARGO_BIN_EXE_vfio-broker")));
        let launcher = command(dir.path()).spawn().unwrap();
        let has_iommufd = Path::new("/dev/iommu").exists();
        let mut daemon = Self { dir, launcher, starts: 1, kills: 0, has_iommufd };
        daemon.answers();
        daemon
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("broker.sock")
    }

    /// A directory for those who come and go.
    pub fn directory(&self) -> &Path {
        self.dir.path()
    }

    pub fn client(&self) -> Client {
        Client::connect_to(self.socket()).unwrap()
    }

    /// Kills the broker, the launcher, or both, whatever they are at.
    pub fn kill(&mut self, dice: &mut Dice) {
        let broker = crate::children::broker(self.launcher.id());
        let (launcher, alone) = (dice.below(3) > 0, dice.below(2) > 0);
        if let Some(broker) = broker.filter(|_| !launcher || !alone) {
            let _ = kill(Pid::from_raw(broker as i32), Signal::SIGKILL);
        }
        self.kills += 1;
        if launcher || self.kills > MOST {
            let _ = self.launcher.kill();
        }
    }

    /// Starts it where it has ended, also because its predecessor's broker had not.
    pub fn start_if_gone(&mut self) {
        if self.launcher.try_wait().unwrap().is_some() {
            self.launcher = command(self.dir.path()).spawn().unwrap();
            self.starts += 1;
            self.kills = 0;
        }
    }

    /// Waits until it serves.
    pub fn answers(&mut self) {
        until("the daemon answers", || {
            self.start_if_gone();
            Client::connect_to(self.socket()).is_ok_and(|mut client| client.leases().is_ok())
        });
    }

    pub fn is_free(&self, device: &str) {
        until(&format!("{device} is free"), || {
            let groups = self.client().topology().unwrap();
            let has = |group: &&Group| group.devices.iter().any(|it| it.bdf == device);
            let group = groups.iter().find(has).unwrap();
            group.state == GroupState::Free && group.unproved.is_none()
        });
    }

    /// The names of the processes that daemons have started.
    pub fn processes(&self) -> Vec<String> {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let names = all.flat_map(|it| fs::read_to_string(it.path().join("comm")));
        let mut names: Vec<_> =
            names.map(|it| it.trim().to_owned()).filter(|it| it.starts_with("vfiob-")).collect();
        names.sort();
        names.dedup();
        names
    }

    /// A command as the holders' user, without any capability.
    pub fn user(&self) -> Command {
        let memlock = 256 << 20;
        let mut command = Command::new("prlimit");
        command.arg(format!("--memlock={memlock}:{memlock}")).arg("setpriv");
        command.args(["--reuid", "2001", "--regid", "2001", "--clear-groups"]);
        command.args(["--inh-caps=-all", "--bounding-set=-all"]);
        command.stdin(Stdio::null()).current_dir("/").process_group(0);
        command
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

fn command(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-brokerd"));
    command.arg("--policy").arg(directory.join("policy.toml"));
    command.arg("--socket").arg(directory.join("broker.sock"));
    command.stdin(Stdio::null());
    command
}
