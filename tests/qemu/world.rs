//! A real kernel, the daemon as root, and programs as an ordinary user.

use crate::brokerd::Brokerd;
pub use crate::guest::{EDU, MIB, NIC, qemu};
use crate::guest::{close_nodes, vfio_files};
pub use crate::until::until;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;
use vfio_broker::client::Client;
use vfio_broker::protocol::GroupState;

const POLICY: &str = r#"
version = 1

[[tenant]]
name = "user"
user = 2001
rights = ["acquire", "observe"]
devices = ["8086:10d3", "1234:11e8"]
handouts = ["container", "group", "devices", "iommufd"]
memlock = "1GiB"

[[tenant]]
name = "root"
user = 0
rights = ["observe"]
"#;

pub struct World {
    pub kernel: String,
    pub has_iommufd: bool,
    /// Whether it says which process has connected (SO_PEERPIDFD).
    pub names_peers: bool,
    daemon: Brokerd,
    daemons_files: usize,
}

impl World {
    pub fn start() -> Self {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        // What most distributions have: only an ancestor may look into a process.
        let yama = fs::write("/proc/sys/kernel/yama/ptrace_scope", "1").is_ok();
        println!(
            "Linux {}, Yama's ptrace_scope {}",
            release.trim(),
            if yama { "1" } else { "none" }
        );
        for program in [Path::new(env!("CARGO_BIN_EXE_vfio-broker")), &probe()] {
            let_all_run(program);
        }
        close_nodes();
        let daemon = Brokerd::on_host(POLICY);
        let has_iommufd = Path::new("/dev/iommu").exists();
        let kernel = format!("Linux {}", release.trim());
        let names_peers = !release.starts_with("6.1.");
        let mut world = Self { kernel, has_iommufd, names_peers, daemon, daemons_files: 0 };
        // What the daemon opens once and keeps is open after the first lease.
        assert!(world.exec(&["--inherit"], 8 * MIB).arg("true").status().unwrap().success());
        until("the first lease has ended", || world.leases().is_empty());
        world.daemons_files = usize::MAX;
        world.is_as_before();
        // Connections go a moment after they are closed here.
        for _ in 0..100 {
            world.daemons_files = world.daemons_files.min(world.daemon.brokers_files());
            std::thread::sleep(Duration::from_millis(5));
        }
        world
    }

    pub fn socket(&self) -> PathBuf {
        self.daemon.socket.clone()
    }

    /// The example with rust-vmm's crates.
    pub fn rust_vmm(&self) -> PathBuf {
        let name = self.daemon.directory().join("rust_vmm");
        if !name.exists() {
            let this = std::env::current_exe().unwrap();
            let_all_run(&this);
            std::os::unix::fs::symlink(this, &name).unwrap();
        }
        name
    }

    /// A directory of the user's own.
    pub fn runtime(&self) -> PathBuf {
        let path = self.daemon.directory().join("run");
        if !path.exists() {
            fs::create_dir(&path).unwrap();
            std::os::unix::fs::chown(&path, Some(2001), Some(2001)).unwrap();
        }
        path
    }

    pub fn leases(&self) -> Vec<vfio_broker::protocol::Lease> {
        Client::connect_to(self.socket()).unwrap().leases().unwrap()
    }

    /// Nothing is leased, all devices are free, and the daemon has no more files than at first.
    pub fn is_as_before(&self) {
        until("no lease is left", || self.leases().is_empty());
        until("every device is free", || {
            let groups = Client::connect_to(self.socket()).unwrap().topology().unwrap();
            // After iommufd a device is its last tenant's again, and not free for others.
            groups.iter().all(|group| group.state == GroupState::Free || group.unproved.is_some())
        });
        until("the daemon's files are back", || self.daemon.brokers_files() <= self.daemons_files);
    }

    /// A command as the user, without capabilities, who may lock so much memory.
    pub fn user(&self, program: impl AsRef<std::ffi::OsStr>, memlock: u64) -> Command {
        // Only root can raise it, so it is raised here and inherited.
        let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard).unwrap();
        let limit = format!("--memlock={memlock}:{memlock}");
        let mut command = Command::new("prlimit");
        command.arg(limit).arg("setpriv").args(["--reuid", "2001", "--regid", "2001"]);
        command
            .args(["--clear-groups", "--inh-caps=-all", "--bounding-set=-all"])
            .arg(program.as_ref());
        command.stdin(Stdio::null()).current_dir("/").process_group(0);
        command
    }

    /// `vfio-broker exec` as the user, for the network card; the program is to follow.
    pub fn exec(&self, options: &[&str], memlock: u64) -> Command {
        self.exec_for(NIC, options, memlock)
    }

    pub fn exec_for(&self, device: &str, options: &[&str], memlock: u64) -> Command {
        let mut command = self.user(env!("CARGO_BIN_EXE_vfio-broker"), memlock);
        command.arg("--socket").arg(self.socket());
        command.args(["exec", "--vm", "web1", "--device", device]).args(options).arg("--");
        command
    }
}

/// Lets everybody walk to a program: what is changed in the guest is forgotten with it.
pub fn let_all_run(program: &Path) {
    for directory in program.ancestors().skip(1) {
        let mode = fs::metadata(directory).unwrap().permissions().mode();
        if mode & 0o001 == 0 {
            fs::set_permissions(directory, fs::Permissions::from_mode(mode | 0o011)).unwrap();
        }
    }
}

/// `tests/exec/probe.c`, static.
pub fn probe() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/exec/probe.c");
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("probe-static");
    let made = |path: &Path| fs::metadata(path).and_then(|found| found.modified());
    // Compiling takes long in the guest: it is there if the tests were run outside before.
    if made(&path).is_ok_and(|made_at| made_at > made(&source).unwrap()) {
        return path;
    }
    let mut cc = Command::new("cc");
    cc.args(["-O1", "-pthread", "-static", "-o"]).arg(&path).arg(source);
    assert!(cc.status().unwrap().success());
    path
}

/// What the probe says of its steps, after each one's name.
pub fn steps(mut command: Command, steps: &[&str]) -> Vec<String> {
    let output = command.arg(probe()).args(steps).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    print!("{said}{error}");
    assert!(output.status.success());
    said.lines().map(|line| line.rsplit_once(": ").unwrap().1.to_owned()).collect()
}

/// A running QEMU, with its monitor on standard input and output.
pub struct Qemu {
    pub launcher: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Qemu {
    /// `command` is to be followed by the program's name.
    pub fn start(mut command: Command, memory: &str, more: &[&str]) -> Self {
        command.arg(qemu()).args(["-machine", "q35,accel=tcg", "-m", memory, "-S"]);
        command.args(["-display", "none", "-nodefaults", "-sandbox", "on", "-qmp", "stdio"]);
        let mut launcher =
            command.args(more).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = launcher.stdin.take().unwrap();
        let output = BufReader::new(launcher.stdout.take().unwrap()).lines();
        Self { launcher, input, output }
    }

    /// Whether it comes as far as answering its monitor; it greets before it has its devices.
    pub fn greets(&mut self) -> bool {
        self.output.next().is_some() && self.try_ask("qmp_capabilities").is_some()
    }

    /// A command's answer.
    pub fn ask(&mut self, command: &str) -> Value {
        self.try_ask(command).expect("QEMU has ended")
    }

    fn try_ask(&mut self, command: &str) -> Option<Value> {
        let message = serde_json::json!({ "execute": command });
        writeln!(self.input, "{message}").ok()?;
        loop {
            let answer: Value = serde_json::from_str(&self.output.next()?.unwrap()).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(answer) = answer.get("return") {
                return Some(answer.clone());
            }
        }
    }

    /// Vendor and device of what `query-pci` shows under these ids.
    pub fn device(&mut self, id: &str) -> (u64, u64) {
        let buses = self.ask("query-pci");
        let devices: Vec<_> = buses
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|b| b["devices"].as_array().unwrap())
            .collect();
        let found = devices.iter().find(|device| device["qdev_id"] == id);
        let found = found.unwrap_or_else(|| panic!("no {id} in {buses}"));
        (found["id"]["vendor"].as_u64().unwrap(), found["id"]["device"].as_u64().unwrap())
    }

    /// QEMU's own process, also where it has a supervisor.
    pub fn pid(&self) -> u32 {
        let mut pid = self.launcher.id();
        while let Ok(children) = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")) {
            match children.split_whitespace().next() {
                Some(child) => pid = child.parse().unwrap(),
                None => break,
            }
        }
        pid
    }

    /// Its effective capabilities and its VFIO files.
    pub fn shows(&self) -> (String, Vec<String>) {
        let pid = self.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line =
            |name| status.lines().find_map(|line: &str| line.strip_prefix(name)).unwrap().trim();
        let who =
            format!("uid {} CapEff {}", line("Uid:").split('\t').next().unwrap(), line("CapEff:"));
        let files = vfio_files(pid);
        println!("    qemu (pid {pid}): {who}, {files:?}");
        (who, files)
    }

    pub fn quit(mut self) -> ExitStatus {
        self.ask("quit");
        self.launcher.wait().unwrap()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}
