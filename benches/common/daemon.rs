//! A daemon to measure, in a process of its own.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use vfio_broker::client::{Acquire, Client, Lease};
use vfio_broker::protocol::Handout;

/// The machine of a simulated kernel: the lab's network card, alone.
pub const TOPOLOGY: &str = r#"
kernel = "6.12"
[[group]]
id = 1
[[group.device]]
bdf = "0000:00:02.0"
vendor = 0x8086
device = 0x10d3
driver = "vfio-pci"
"#;

/// Whoever runs the bench has the card, and as many connections as it can open.
pub fn policy() -> String {
    let uid = nix::unistd::geteuid();
    format!(
        r#"
version = 1
[[tenant]]
name = "bench"
user = {uid}
devices = [{{ bdf = "{}", id = "8086:10d3" }}]
handouts = ["container", "group", "devices", "iommufd"]
accept = ["unsafe-interrupts"]
limits = {{ connections = 1000000 }}
"#,
        super::NIC
    )
}

/// Whether this runs on a real VFIO: in the lab's guest.
pub fn on_real_kernel() -> bool {
    std::env::var_os("LAB_KERNEL").is_some()
}

/// Which kernel this is, for people.
pub fn kernel_name() -> String {
    if !on_real_kernel() {
        return "the simulated kernel".into();
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    format!("Linux {}", release.trim())
}

/// A running daemon; ends when dropped.
pub struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    pub const PROGRAM: &str = env!("CARGO_BIN_EXE_vfio-brokerd");

    pub fn start() -> Self {
        let dir = super::directory();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("policy.toml"), policy()).unwrap();
        let mut command = super::placement::server(Self::PROGRAM);
        command.arg("--policy").arg(path("policy.toml")).arg("--socket").arg(path("broker.sock"));
        // Where the simulation has its directory, and keepers theirs.
        command.env("TMPDIR", dir.path());
        if !on_real_kernel() {
            fs::write(path("topology.toml"), TOPOLOGY).unwrap();
            command.arg("--sim").arg(path("topology.toml"));
        }
        let log = fs::File::create(path("log")).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let daemon = Self { child, dir };
        // The socket is there before the broker is: once it answers, both are.
        let mut client = super::raw::RawClient::new(super::raw::connect_soon(&daemon.socket()));
        client.call(b"{\"method\":\"org.varlink.service.GetInfo\",\"parameters\":{}}\0");
        daemon
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("broker.sock")
    }

    pub fn client(&self) -> Client {
        Client::connect_to(self.socket()).unwrap()
    }

    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).unwrap()
    }

    pub fn acquire(&self, handout: Handout) -> Lease {
        let wanted = Acquire::new("bench").device(super::NIC).handout(handout);
        self.client().acquire(wanted).unwrap()
    }

    fn broker(&self) -> u32 {
        super::children::broker(self.child.id()).unwrap()
    }

    /// Resident bytes, counted page by page.
    pub fn resident(&self) -> u64 {
        let path = format!("/proc/{}/smaps_rollup", self.broker());
        let text = fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
    }

    /// Its open files.
    pub fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.broker())).unwrap().count()
    }

    /// Its open files once those of connections and calls that have just ended are closed.
    pub fn settled_files(&self) -> usize {
        let each = (0..20).map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            self.open_files()
        });
        each.min().unwrap_or_default()
    }

    /// Waits until it has that many open files, or fewer with `at_most`.
    pub fn settle(&self, done: impl Fn(usize) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done(self.open_files()) {
            assert!(Instant::now() < deadline, "the daemon has {} files open", self.open_files());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
