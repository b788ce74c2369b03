//! What the daemon's tests stand on: the daemon as a real child process on a simulated kernel, and
//! a client that sends exactly what it is told to.

// Each test binary uses a part of it; what goes wrong here fails the test.
#![allow(dead_code, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod brokerd;
mod children;
pub mod fuse;
pub mod raw;
mod until;

use brokerd::Brokerd;
#[allow(unused_imports)] // each program uses its part
pub use children::{children, status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use raw::Raw;
use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
pub use until::until;

/// How long something may take that is bound to happen: never a measure of speed.
pub const SOON: Duration = Duration::from_secs(60);

/// Four devices on VFIO, each in a group of its own.
pub const TOPOLOGY: &str = r#"
kernel = "6.12"
owner_rights = true
memlock = "unlimited"
[[group]]
id = 26
repeat = 4
step = "bus"
[[group.device]]
bdf = "0000:65:00.0"
vendor = 0x8086
device = 0x10d3
class = 0x020000
driver = "vfio-pci"
"#;

/// Everybody may have all four, in each form, within these limits.
pub fn policy(limits: &str) -> String {
    format!(
        r#"
version = 1
[[tenant]]
name = "everybody"
anyone = true
devices = ["8086:10d3"]
handouts = ["container", "group", "devices", "iommufd"]
[tenant.limits]
{limits}
"#
    )
}

/// The device that [`Neighbour`] uses; tests use the others.
pub const NEIGHBOURS_DEVICE: &str = "0000:68:00.0";

/// How a daemon is to be started.
pub struct Setup {
    pub topology: String,
    pub policy: String,
    pub arguments: Vec<String>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { topology: TOPOLOGY.into(), policy: policy(""), arguments: Vec::new() }
    }
}

impl Setup {
    pub fn policy(policy: impl Into<String>) -> Self {
        Self { policy: policy.into(), ..Self::default() }
    }

    #[must_use]
    pub fn argument(mut self, argument: &str, value: &str) -> Self {
        self.arguments.extend([argument.to_owned(), value.to_owned()]);
        self
    }
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    process: Brokerd,
    pub socket: PathBuf,
}

impl Daemon {
    /// Starts one with the usual topology and policy.
    pub fn start() -> Self {
        Self::with(Setup::default())
    }

    /// Starts one and waits until it says that it is ready.
    pub fn with(setup: Setup) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("run/broker.sock");
        Self::run(directory, socket, &setup)
    }

    /// Starts one whose socket is somewhere else than usual.
    pub fn at(socket: &Path) -> Self {
        Self::run(tempfile::tempdir().unwrap(), socket.to_owned(), &Setup::default())
    }

    fn run(directory: tempfile::TempDir, socket: PathBuf, setup: &Setup) -> Self {
        let command = command(directory.path(), setup);
        Self::spawn(directory, socket, command)
    }

    /// Starts what [`command`] gave, or a shell that ends up as it, in the same directory.
    pub fn spawn(directory: tempfile::TempDir, socket: PathBuf, command: Command) -> Self {
        Self { process: Brokerd::start(directory, socket.clone(), command), socket }
    }

    /// The process that talks to clients.
    pub fn pid(&self) -> u32 {
        self.process.broker()
    }

    /// The process that has started all others.
    pub fn launcher(&self) -> u32 {
        self.process.launcher()
    }

    /// How many keepers there are that this daemon has started.
    pub fn keepers(&self) -> usize {
        children(self.launcher(), "vfiob-keeper").len()
    }

    /// Where the simulated kernel can be reached, to inject faults and count.
    pub fn sim(&self) -> vfio_broker::sim::Wire {
        vfio_broker::sim::Wire::connect(&self.directory().join("control.sock")).unwrap()
    }

    /// Waits for a line of its log, which comes some time after what it is about.
    #[track_caller]
    pub fn until_logged(&self, what: &str) {
        until(&format!("it is logged: {what}"), || self.log().contains(what));
    }

    /// Ends it; all that it has logged.
    pub fn end_and_log(&mut self) -> String {
        self.signal(Signal::SIGTERM);
        self.wait();
        self.log()
    }

    /// What has come of its log so far.
    pub fn log(&self) -> String {
        self.process.log()
    }

    pub fn directory(&self) -> &Path {
        self.process.directory()
    }

    pub fn connect(&self) -> Raw {
        Raw::connect(&self.socket)
    }

    /// A connection that the daemon has let in: before that the kernel may refuse its fds.
    pub fn connect_and_greet(&self) -> Raw {
        let mut client = self.connect();
        client.call("org.varlink.service.GetInfo", json!({})).ok();
        client
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    pub fn signal_broker(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).unwrap();
    }

    /// Lets it go on after [`Daemon::pause`].
    pub fn go_on(&self) {
        self.signal_broker(Signal::SIGCONT);
    }

    /// Stops the broker.
    pub fn pause(&self) {
        self.signal_broker(Signal::SIGSTOP);
        until("the daemon has stopped", || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
            let stats =
                tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")));
            stats.into_iter().all(|stat| stat.is_ok_and(|stat| stat.contains(") T ")))
        });
    }

    /// Whether it has not ended.
    pub fn is_there(&mut self) -> bool {
        self.process.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let mut ended = None;
        until("the daemon ends", || {
            ended = self.process.child.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap()
    }

    /// How many processes that it started have ended, or were killed and can't end.
    pub fn dead_children(&self) -> usize {
        let parent = self.launcher().to_string();
        let is_dead_child = |stat: &str| {
            // Behind the name in parentheses: state, parent.
            let mut words = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
            words.next() == Some("Z") && words.next() == Some(&parent)
        };
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let stats = processes.flat_map(|it| std::fs::read_to_string(it.path().join("stat")));
        stats.filter(|stat| is_dead_child(stat)).count()
    }

    /// How many files the broker has open, but for those by which it knows processes that can't end.
    pub fn open_fds(&self) -> usize {
        let links = self.open_files();
        let pidfds = links.iter().filter(|link| link.as_os_str() == "anon_inode:[pidfd]").count();
        let helpers = ["vfiob-receiver", "vfiob-closer"].map(|it| children(self.launcher(), it));
        links.len() - pidfds.min(helpers.iter().map(Vec::len).sum())
    }

    fn open_files(&self) -> Vec<PathBuf> {
        let dir = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        // One that has just been closed has no link any more.
        dir.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok()).collect()
    }

    /// The open files once nothing is going on, for [`Daemon::settles_at`].
    pub fn settled_fds(&self) -> usize {
        // The first calls open what stays open: workers, the sim's connections.
        let keepers = self.keepers();
        cycle(&mut self.connect(), NEIGHBOURS_DEVICE);
        until("its keeper has ended", || self.keepers() <= keepers);
        let mut last = 0;
        let mut same = 0;
        until("the daemon's open files settle", || {
            let now = self.open_fds();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            same > 20
        });
        last
    }

    /// Waits until its open files are back to where they were.
    pub fn settles_at(&self, fds: usize) {
        let start = Instant::now();
        while self.open_fds() != fds {
            let now = self.open_fds();
            assert!(
                start.elapsed() < SOON,
                "{now} files open, not {fds}: {:#?}",
                self.open_files()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let last = log.lines().rev().take(30).collect::<Vec<_>>();
            eprintln!("--- the daemon's log ends so, last line first ---\n{}", last.join("\n"));
        }
    }
}

/// The daemon's command line for a setup, its log and its sim's control socket in `directory`.
pub fn command(directory: &Path, setup: &Setup) -> Command {
    let topology = directory.join("host.toml");
    std::fs::write(&topology, &setup.topology).unwrap();
    std::fs::write(topology.with_extension("policy.toml"), &setup.policy).unwrap();
    let log = std::fs::File::create(directory.join("log")).unwrap();
    let mut command = brokerd::program();
    command.arg("--sim").arg(&topology).arg("--sim-control").arg(directory);
    command.args(&setup.arguments).env("RUST_LOG", "debug");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command
}

/// Acquires a device, gets its fds again and releases it, checking each answer.
pub fn cycle(client: &mut Raw, device: &str) {
    let lease = Held::acquire(client, device, "container");
    let (again, fds) = client.call("GetFds", lease.key()).ok();
    let kinds = |reply: &Value| {
        let list = reply["fds"].as_array().unwrap().iter();
        let mut kinds: Vec<_> = list.map(|fd| fd["kind"].as_str().unwrap().to_owned()).collect();
        kinds.sort();
        kinds
    };
    assert_eq!(kinds(&again), ["container", "group", "lease"]);
    assert_eq!(fds.len(), 3);
    drop(fds);
    let key = lease.key();
    drop(lease);
    // Dropping the fds ends the lease too: either of the two may come first.
    match client.call("Release", key) {
        raw::Reply::Ok(..) => {}
        raw::Reply::Error(name, _) => assert!(name.ends_with(".NoSuchLease"), "{name}"),
    }
    until("the device is free again", || {
        let (topology, _) = client.call("Topology", json!({})).ok();
        let groups = topology["groups"].as_array().unwrap();
        let has = |group: &&Value| {
            group["devices"].as_array().unwrap().iter().any(|each| each["bdf"] == device)
        };
        groups.iter().find(has).unwrap()["state"] == "free"
    });
}

/// A lease, as a raw client has it.
pub struct Held {
    pub reply: Value,
    pub fds: Vec<std::os::fd::OwnedFd>,
}

impl Held {
    /// Asks again where the last lease of the device has just ended: on a busy machine the kernel may
    /// be asked for longer than a client waits.
    #[track_caller]
    pub fn acquire(client: &mut Raw, device: &str, handout: &str) -> Self {
        let request = json!({ "vm": "test", "devices": [device], "handout": handout });
        let mut reply = client.call("Acquire", request.clone());
        until("the device is not quarantined", || {
            let waits =
                matches!(&reply, raw::Reply::Error(name, _) if name.ends_with(".Quarantined"));
            if waits {
                reply = client.call("Acquire", request.clone());
            }
            !waits
        });
        let (reply, fds) = reply.ok();
        Self { reply, fds }
    }

    /// Lease and key, as parameters.
    pub fn key(&self) -> Value {
        json!({ "lease": self.reply["lease"], "key": self.reply["key"] })
    }

    /// Lease, key and more parameters.
    pub fn with(&self, more: Value) -> Value {
        let mut all = self.key();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    }
}

/// Runs something with a well-behaved client beside it, which does whole cycles all the time on
/// one connection; then checks that the client noticed nothing and that the daemon's open files
/// are back to where they were.
pub fn beside<T>(daemon: &Daemon, something: impl FnOnce() -> T) -> T {
    let fds = daemon.settled_fds();
    let mut client = daemon.connect();
    let (stop, cycles) = (AtomicBool::new(false), AtomicUsize::new(0));
    let result = std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                cycle(&mut client, NEIGHBOURS_DEVICE);
                cycles.fetch_add(1, Ordering::SeqCst);
            }
        });
        // However the test ends, the neighbour is stopped.
        let stopper = Stopper(&stop);
        let a_whole_cycle = |what: &str| {
            let before = cycles.load(Ordering::SeqCst);
            until(what, || {
                assert!(!neighbour.is_finished(), "the neighbour noticed something");
                cycles.load(Ordering::SeqCst) > before + 1
            });
        };
        a_whole_cycle("the neighbour is served before");
        let result = something();
        a_whole_cycle("the neighbour is served during and after");
        drop(stopper);
        neighbour.join().expect("the neighbour noticed something");
        result
    });
    drop(client);
    daemon.settles_at(fds);
    result
}

struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Says that the test can't run here, past the test harness, which hides what passing tests print.
pub fn skipped(why: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("\nSKIPPED: {name}: {why}\n");
    std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).unwrap();
}

/// Reads everything until the end.
pub fn read_all(mut from: impl Read) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    text
}

/// Does something on a thread that has another effective uid, which is what the daemon sees of
/// those who connect there; `None`, with a word about it, where only root could.
pub fn as_uid<T: Send>(uid: u32, something: impl FnOnce() -> T + Send) -> Option<T> {
    if !nix::unistd::geteuid().is_root() {
        skipped("only root can be somebody else");
        return None;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            #[allow(unsafe_code)]
            // SAFETY: the bare system call changes this thread alone, which ends soon; the C
            // library's function would change them all.
            let result = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, -1, uid, -1) };
            assert_eq!(result, 0);
            something()
        });
        Some(thread.join().unwrap())
    })
}
