//! The daemon on a simulated kernel, for those who talk to it with programs.

#![allow(dead_code)] // each test binary uses a part of it

use crate::brokerd::{self, Brokerd};
use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};

/// A running broker; killed when dropped.
pub struct Broker(Brokerd);

impl Broker {
    /// Starts one with a topology of `tests/topologies`, and waits until it is ready.
    pub fn start(topology: &str) -> Self {
        Self::start_in(topology, &std::env::temp_dir())
    }

    /// The same with its temporary files in this directory.
    pub fn start_in(topology: &str, temporary: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mut command = brokerd::program();
        command.arg("--sim").arg(Path::new("tests/topologies").join(topology));
        command.env("TMPDIR", temporary).stderr(std::fs::File::create(at("log")).unwrap());
        let socket = at("broker.sock");
        Self(Brokerd::start(directory, socket, command))
    }

    /// Ends it with a signal; returns its log.
    pub fn end(&mut self, signal: Signal) -> String {
        self.0.signal(signal);
        self.0.child.wait().unwrap();
        self.0.log()
    }

    pub fn socket(&self) -> PathBuf {
        self.0.socket.clone()
    }
}
