//! vfio-brokerd as a child process on a simulated kernel.

#![allow(dead_code)] // each test binary uses a part of it

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running broker; killed when dropped.
pub struct Broker {
    child: Child,
    directory: tempfile::TempDir,
}

impl Broker {
    /// Starts one with a topology of `tests/topologies`, and waits until it is ready.
    pub fn start(topology: &str) -> Self {
        Self::start_in(topology, &std::env::temp_dir())
    }

    /// The same with its temporary files in this directory.
    pub fn start_in(topology: &str, temporary: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let ready = UnixDatagram::bind(at("notify")).unwrap();
        ready.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vfio-brokerd"))
            .arg("--sim")
            .arg(Path::new("tests/topologies").join(topology))
            .arg("--socket")
            .arg(at("broker.sock"))
            .env("NOTIFY_SOCKET", at("notify"))
            .env("TMPDIR", temporary)
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(at("log")).unwrap())
            .spawn()
            .unwrap();
        let mut broker = Self { child, directory };
        broker.wait(&ready);
        broker
    }

    fn wait(&mut self, ready: &UnixDatagram) {
        let start = Instant::now();
        let mut text = [0; 256];
        while start.elapsed() < Duration::from_secs(60) {
            match ready.recv(&mut text) {
                Ok(len) if text[..len].starts_with(b"READY=1") => return,
                Err(error) if error.kind() != ErrorKind::WouldBlock => panic!("{error}"),
                _ => {}
            }
            let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap();
            assert!(self.child.try_wait().unwrap().is_none(), "it ended at its start:\n{log}");
        }
        panic!("the broker does not start");
    }

    /// Ends it with a signal; returns its log.
    pub fn end(&mut self, signal: Signal) -> String {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        self.child.wait().unwrap();
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("broker.sock")
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
