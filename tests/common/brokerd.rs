//! vfio-brokerd as a child process: started, waited for until it is ready, and killed when dropped.

#![allow(dead_code)] // each program uses its part

use super::children;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running one, with a directory of its own: its socket is there, and `log` where it has one.
pub struct Brokerd {
    pub child: Child,
    directory: tempfile::TempDir,
    pub socket: PathBuf,
}

impl Brokerd {
    /// Starts what `command` gives, or a shell that ends up as it.
    pub fn start(directory: tempfile::TempDir, socket: PathBuf, mut command: Command) -> Self {
        let notify = directory.path().join("notify");
        let ready = UnixDatagram::bind(&notify).unwrap();
        // The daemon can be another user's.
        std::fs::set_permissions(&notify, PermissionsExt::from_mode(0o777)).unwrap();
        command.arg("--socket").arg(&socket).env("NOTIFY_SOCKET", &notify);
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let mut this = Self { child, directory, socket };
        this.wait_until_ready(&ready);
        this
    }

    /// Starts one as root on this machine's own kernel. All users may connect.
    pub fn on_host(policy: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let file = directory.path().join("policy.toml");
        std::fs::write(&file, policy).unwrap();
        let socket = directory.path().join("broker.sock");
        let mut command = program();
        command.arg("--policy").arg(file);
        Self::start(directory, socket, command)
    }

    fn wait_until_ready(&mut self, socket: &UnixDatagram) {
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let start = Instant::now();
        let mut text = [0; 256];
        while start.elapsed() < Duration::from_secs(120) {
            match socket.recv(&mut text) {
                Ok(len) if text[..len].starts_with(b"READY=1") => return,
                Err(error) if error.kind() != ErrorKind::WouldBlock => panic!("{error}"),
                _ => {}
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "ended at its start: {ended:?}\n{}", self.log());
        }
        panic!("the daemon is not ready\n{}", self.log());
    }

    /// What has come of its log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory().join("log")).unwrap_or_default()
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The process that has started all others.
    pub fn launcher(&self) -> u32 {
        self.child.id()
    }

    /// The process that talks to clients.
    pub fn broker(&self) -> u32 {
        children::broker(self.launcher()).unwrap()
    }

    /// How many files that one has open.
    pub fn brokers_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.broker())).unwrap().count()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.launcher() as i32), signal).unwrap();
    }
}

impl Drop for Brokerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program, which the tests were built with.
pub fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vfio-brokerd"))
}
