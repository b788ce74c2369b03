//! What the story happens in: a kernel, its devices, a policy, and the daemon.

use crate::role::Role;
pub use crate::until::until;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use vfio_broker::client::Client;
use vfio_broker::sim::Wire;

pub const NIC: &str = "0000:00:02.0";
pub const EDU0: &str = "0000:00:03.0";
pub const EDU1: &str = "0000:00:04.0";
/// Two functions in one group.
pub const PAIR: [&str; 2] = ["0000:00:07.0", "0000:00:07.1"];

/// The users, as the policy below knows them.
pub const ALICE: u32 = 2001;
pub const BOB: u32 = 2002;
pub const CAROL: u32 = 2003;
pub const MALLORY: u32 = 2004;
pub const LEFT: u32 = 2005;
pub const RIGHT: u32 = 2006;
pub const ERIN: u32 = 2007;
pub const FRANK: u32 = 2008;
pub const GINA: u32 = 2009;

const POLICY: &str = r#"
version = 1

[[tenant]]
name = "alice"
user = 2001
devices = [{ bdf = "0000:00:02.0", id = "8086:10d3" }]
handouts = ["container", "group"]

[[tenant]]
name = "bob"
user = 2002
rights = ["acquire", "observe"]
devices = ["8086:10d3"]

[[tenant]]
name = "carol"
user = 2003
devices = ["8086:10d3"]

[[tenant]]
name = "left"
user = 2005
devices = ["1234:11e8"]
handouts = ["devices"]

[[tenant]]
name = "right"
user = 2006
devices = ["1234:11e8"]
handouts = ["devices"]

[[tenant]]
name = "erin"
user = 2007
devices = ["8086:10d3", "1234:11e8"]
handouts = ["iommufd", "container"]

[[tenant]]
name = "frank"
user = 2008
devices = ["1234:11e8"]
handouts = ["devices", "container"]

[[tenant]]
name = "gina"
user = 2009
devices = ["8086:10d3", "1234:11e8"]
backends = ["iommufd"]
rebind = true

[[tenant]]
name = "root"
user = 0
rights = ["observe"]

[[container]]
name = "enforced"
members = ["left", "right"]

[[container]]
name = "mutual"
trust = "mutual"
members = ["left", "right"]
"#;

/// How much a client may pin in the simulated kernel, where the test may not raise limits.
const SIMULATED_MEMLOCK: u64 = 72 << 20;

pub struct World {
    /// For people: which kernel this is.
    pub kernel: String,
    /// Whether it is a real one.
    pub real: bool,
    dir: tempfile::TempDir,
    daemon: RefCell<Child>,
    command: RefCell<Command>,
}

impl World {
    pub fn start() -> Self {
        let real = std::env::var_os("LAB_KERNEL").is_some();
        let kernel = if real { real_kernel() } else { "the simulated kernel".to_owned() };
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let policy = dir.path().join("policy.toml");
        fs::write(&policy, POLICY).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-brokerd"));
        command.arg("--policy").arg(&policy).arg("--socket").arg(dir.path().join("broker.sock"));
        if !real {
            let topology = dir.path().join("lab.toml");
            fs::write(&topology, simulated_topology()).unwrap();
            fs::create_dir(dir.path().join("sim")).unwrap();
            command.arg("--sim").arg(&topology).arg("--sim-control").arg(dir.path().join("sim"));
        }
        let daemon = RefCell::new(command.stdin(Stdio::null()).spawn().unwrap());
        let world = Self { kernel, real, dir, daemon, command: RefCell::new(command) };
        world.wait_for_the_daemon();
        world
    }

    fn wait_for_the_daemon(&self) {
        until("the daemon answers", || UnixStream::connect(self.socket()).is_ok());
    }

    /// Kills the daemon and starts it again. A simulated kernel would end with it.
    pub fn restart(&self) {
        assert!(self.real);
        let mut daemon = self.daemon.borrow_mut();
        let broker = format!("/proc/{}", crate::children::broker(daemon.id()).unwrap());
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        drop(daemon);
        // It ends when it has no launcher any more.
        until("the broker has ended too", || !Path::new(&broker).exists());
        self.start_again();
    }

    /// Starts it after it has ended.
    pub fn start_again(&self) {
        let daemon = self.command.borrow_mut().spawn().unwrap();
        drop(self.daemon.replace(daemon));
        self.wait_for_the_daemon();
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("broker.sock")
    }

    /// The process that talks to clients.
    pub fn broker_pid(&self) -> u32 {
        crate::children::broker(self.daemon.borrow().id()).unwrap()
    }

    /// Whether the kernel can do iommufd and cdevs.
    pub fn has_iommufd(&self) -> bool {
        !self.real || Path::new("/dev/iommu").exists()
    }

    /// What an administrator does to show that nobody has a device open any more.
    pub fn rebind(&self, bdf: &str) {
        if self.real {
            fs::write(format!("/sys/bus/pci/devices/{bdf}/driver/unbind"), bdf).unwrap();
            fs::write("/sys/bus/pci/drivers/vfio-pci/bind", bdf).unwrap();
            return;
        }
        let sim = Wire::connect(&self.dir.path().join("sim/control.sock")).unwrap();
        sim.set_driver(bdf, None).unwrap();
        sim.set_driver(bdf, Some("vfio-pci")).unwrap();
    }

    /// A connection of this test itself, which is root and may observe.
    pub fn observer(&self) -> Client {
        Client::connect_to(self.socket()).unwrap()
    }

    /// A client as `uid`, which may pin `memlock` bytes.
    pub fn client(&self, uid: u32, memlock: u64, role: Role, words: &[&str]) -> Actor {
        let mut command = Command::new("/proc/self/exe");
        command.arg(crate::role::FLAG).arg(role.name()).args(words);
        command.env("VFIO_BROKER_SOCKET", self.socket());
        let root = nix::unistd::geteuid().is_root();
        assert!(root, "the main job starts clients as several users: run it as root");
        command.uid(uid).gid(uid).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        if self.real {
            setrlimit(Resource::RLIMIT_MEMLOCK, memlock, hard.max(memlock)).unwrap();
        }
        let child = command.spawn().unwrap();
        if self.real {
            setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard.max(memlock)).unwrap();
        }
        Actor::new(child)
    }

    /// SIGTERM ends the daemon cleanly.
    pub fn end(&self) {
        kill(Pid::from_raw(self.daemon.borrow().id() as i32), Signal::SIGTERM).unwrap();
        until("the daemon ends", || {
            nix::sys::wait::waitpid(
                Pid::from_raw(self.daemon.borrow().id() as i32),
                Some(nix::sys::wait::WaitPidFlag::WNOHANG),
            )
            .is_ok_and(|status| matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)))
        });
        assert!(!self.socket().exists(), "the socket is left behind");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.daemon.get_mut().kill();
    }
}

/// A client process, talked to a line at a time: it says what it did, we say when to go on.
pub struct Actor {
    child: Child,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
}

impl Actor {
    fn new(mut child: Child) -> Self {
        let stdout = child.stdout.take().unwrap();
        let lines = std::io::BufRead::lines(std::io::BufReader::new(stdout));
        Self { child, lines }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The next line that the client says; shown in the transcript.
    pub fn says(&mut self) -> String {
        let Some(line) = self.lines.next() else { panic!("client {} ended early", self.pid()) };
        let line = line.unwrap();
        println!("    {line}");
        line
    }

    /// The next line, which must hold all of `words`.
    #[track_caller]
    pub fn expect(&mut self, words: &[&str]) -> String {
        let line = self.says();
        for word in words {
            assert!(line.contains(word), "{word:?} is not in {line:?}");
        }
        line
    }

    /// Lets the client go on.
    pub fn go_on(&mut self) {
        use std::io::Write;
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(b"\n").unwrap();
    }

    /// Waits for the client's own end, which must be a good one.
    pub fn ends(mut self) {
        drop(self.child.stdin.take());
        for line in self.lines.by_ref() {
            println!("    {}", line.unwrap());
        }
        assert!(self.child.wait().unwrap().success());
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn simulated_topology() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/topologies/lab.toml");
    let text = fs::read_to_string(path).unwrap();
    assert!(!text.contains("\nmemlock"), "lab.toml sets memlock, as this test does");
    format!("memlock = {SIMULATED_MEMLOCK}\nowner_rights = true\n{text}")
}

fn real_kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    format!("Linux {}", release.trim())
}
