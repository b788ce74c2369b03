//! A simulated machine, and the service on it, which can be killed and started again.

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vfio_broker::sim::{Sim, Topology};

use crate::common::TOPOLOGY;
use crate::common::raw::{Raw, Reply};

pub const DEVICES: [&str; 3] = ["0000:65:00.0", "0000:66:00.0", "0000:67:00.0"];

const POLICY: &str = r#"
version = 1
[[tenant]]
name = "everybody"
anyone = true
devices = ["8086:10d3"]
handouts = ["container", "group", "devices", "iommufd"]
rebind = true
memlock = "128GiB"
[[container]]
name = "enforced"
members = ["everybody"]
[[container]]
name = "mutual"
trust = "mutual"
members = ["everybody"]
"#;

/// How long what is bound to happen may take before it counts as never.
const SOON: Duration = Duration::from_secs(20);

pub struct World {
    pub sim: Sim,
    directory: tempfile::TempDir,
    pub launcher: Pid,
}

impl World {
    pub fn start(rebinds: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let sim = Sim::start_in(Topology::from_toml(TOPOLOGY).unwrap(), directory.path()).unwrap();
        let policy = POLICY.replace("rebind = true", &format!("rebind = {rebinds}"));
        std::fs::write(directory.path().join("policy.toml"), policy).unwrap();
        let mut world = Self { sim, directory, launcher: Pid::from_raw(0) };
        world.start_service().unwrap();
        world
    }

    /// Starts the service, as a service manager does: at once, whatever is there of the one before.
    pub fn start_service(&mut self) -> Result<(), String> {
        let at = |name: &str| self.directory.path().join(name);
        let _ = std::fs::remove_file(at("notify"));
        let ready = UnixDatagram::bind(at("notify")).unwrap();
        ready.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-brokerd"));
        command.arg("--sim-at").arg(self.sim.control_path()).arg("--policy").arg(at("policy.toml"));
        command.arg("--socket").arg(self.socket()).env("NOTIFY_SOCKET", at("notify"));
        let log = std::fs::File::options().create(true).append(true).open(at("log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).env("RUST_LOG", "debug");
        // Its end is waited for by number: the thread that traces it may be told of it.
        self.launcher = Pid::from_raw(command.spawn().unwrap().id() as i32);
        let (start, mut text) = (Instant::now(), [0; 256]);
        while start.elapsed() < SOON {
            match ready.recv(&mut text) {
                Ok(len) if text[..len].starts_with(b"READY=1") => return Ok(()),
                Ok(_) => {}
                Err(_) if !self.is_running() => {
                    return Err(format!("the service did not start: {}", self.log()));
                }
                Err(_) => {}
            }
        }
        Err("the service was not ready".into())
    }

    pub fn is_running(&self) -> bool {
        let _ = waitpid(self.launcher, Some(WaitPidFlag::WNOHANG));
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.launcher));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("run/broker.sock")
    }

    pub fn connect(&self) -> Option<Raw> {
        UnixStream::connect(self.socket()).ok().map(Raw::of)
    }

    pub fn call(&self, method: &str, parameters: Value) -> Option<Reply> {
        let mut client = self.connect()?;
        client.send(&crate::common::raw::call(method, &parameters));
        client.try_reply()
    }

    /// The state of each device's group.
    pub fn groups(&self) -> Option<Vec<String>> {
        let Some(Reply::Ok(topology, _)) = self.call("Topology", json!({})) else { return None };
        let groups = topology["groups"].as_array()?;
        Some(groups.iter().map(|group| group["state"].as_str().unwrap_or("").to_owned()).collect())
    }

    pub fn leases(&self) -> Option<Vec<Value>> {
        let Some(Reply::Ok(leases, _)) = self.call("Leases", json!({})) else { return None };
        leases["leases"].as_array().cloned()
    }

    /// The keepers' directories.
    pub fn keepers(&self) -> Vec<PathBuf> {
        let all = std::fs::read_dir(self.directory.path().join("run/broker.sock.keepers"));
        let all = all.into_iter().flatten().flatten().map(|entry| entry.path());
        all.filter(|path| path.is_dir()).collect()
    }

    /// The keepers' directories, but for those of killed keepers that had let go of everything: the next
    /// broker takes them away.
    pub fn keepers_with_leases(&self) -> Vec<PathBuf> {
        let alive = self.processes().iter().any(|(_, name)| name == "vfiob-keeper");
        let has_leases = |path: &PathBuf| {
            let state = std::fs::read_to_string(path.join("state"));
            state.is_ok_and(|state| !state.contains("\"leases\":[]"))
        };
        self.keepers().into_iter().filter(|path| alive || has_leases(path)).collect()
    }

    /// What the keepers wrote down last.
    pub fn states(&self) -> Vec<String> {
        let read = |path: PathBuf| std::fs::read_to_string(path.join("state")).ok();
        self.keepers().into_iter().filter_map(read).collect()
    }

    /// All processes of this service, by name.
    pub fn processes(&self) -> Vec<(Pid, String)> {
        let mark = self.directory.path().to_string_lossy().into_owned();
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let all = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let is_ours = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&mark)
        };
        let name = |pid| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            (Pid::from_raw(pid), name.trim_end().to_owned())
        };
        all.filter(is_ours).map(name).collect()
    }

    pub fn named(&self, name: &str) -> Option<Pid> {
        self.processes().into_iter().find(|(_, its)| its == name).map(|(pid, _)| pid)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// How many files the launcher and the broker have open.
    pub fn open_files(&self) -> [usize; 2] {
        let broker = self.named("vfiob-broker").unwrap_or(self.launcher);
        [self.launcher, broker].map(|pid| {
            std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |entries| entries.count())
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        let _ = waitpid(self.launcher, None);
    }
}

/// Waits for what is bound to happen; what it was instead, where it does not.
pub fn soon(what: &str, mut wrong: impl FnMut() -> Option<String>) -> Result<(), String> {
    let start = Instant::now();
    loop {
        match wrong() {
            None => return Ok(()),
            Some(why) if start.elapsed() > SOON => return Err(format!("{what}: {why}")),
            Some(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}
