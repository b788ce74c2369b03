//! The kernel that is served: this machine's, or a simulated one in a process of its own.

use super::StartError;
use super::options::Options;
use crate::keeper::Machine;
use crate::kernel::{Kernel, Linux};
use crate::process::role::Role;
use crate::sim::{Sim, Topology, Wire};
use crate::sys::child;
use nix::fcntl::OFlag;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A simulation in a process of its own, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Simulation {
    pub(super) pid: Pid,
    pub(super) control: PathBuf,
    /// Its process ends with the last copy of this.
    wanted: Option<OwnedFd>,
}

impl Simulation {
    /// Starts one of the machine that a file describes.
    fn start(file: &Path, control: Option<&Path>) -> Result<Self, StartError> {
        let failed = StartError::set_up::<nix::Error>;
        let pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC);
        let (told, tell) = pipe().map_err(failed("the simulation"))?;
        let (end, wanted) = pipe().map_err(failed("the simulation"))?;
        let play = |[tell, end]: [OwnedFd; 2]| play(file, control, tell.into(), end.into());
        let pid = child::fork(Role::Simulation.name(), [tell, end], play);
        let pid = pid.map_err(failed("the simulation's process"))?;
        let mut said = Vec::new();
        let read = File::from(told).read_to_end(&mut said);
        read.map_err(StartError::set_up("the simulation"))?;
        match said.split_first() {
            Some((b'+', path)) => {
                let control = PathBuf::from(std::ffi::OsString::from_vec(path.to_vec()));
                Ok(Self { pid, control, wanted: Some(wanted) })
            }
            Some((_, why)) => Err(StartError::Sim(String::from_utf8_lossy(why).into_owned())),
            None => Err(StartError::Sim(format!("{}: its process has died", file.display()))),
        }
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        drop(self.wanted.take());
        // It takes its directory away first.
        let _ = waitpid(self.pid, None);
    }
}

/// The life of a simulation's process.
fn play(file: &Path, control: Option<&Path>, mut tell: File, mut end: File) -> u8 {
    let sim = match simulated(file, control) {
        Ok(sim) => sim,
        Err(why) => {
            let _ = tell.write_all(&[b"-", why.as_bytes()].concat());
            return 1;
        }
    };
    let path = sim.control_path().as_os_str().as_bytes();
    if tell.write_all(&[b"+", path].concat()).is_err() {
        return 1;
    }
    drop(tell);
    let _ = end.read(&mut [0]);
    0
}

fn simulated(file: &Path, control: Option<&Path>) -> Result<Sim, String> {
    let at = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
    let text = std::fs::read_to_string(file).map_err(|error| {
        format!(
            "can't read the topology {}: {error}; --sim takes a file that describes a machine, see \
             docs/sim.md",
            file.display()
        )
    })?;
    let topology = Topology::from_toml(&text).map_err(|error| at(&error))?;
    let started = match control {
        Some(directory) => Sim::start_in(topology, directory),
        None => Sim::start(topology),
    };
    started.map_err(|error| at(&error))
}

/// Where a keeper finds the kernel, and the simulation if it is ours.
pub(super) fn machine(options: &Options) -> Result<(Machine, Option<Simulation>), StartError> {
    if let Some(topology) = &options.sim {
        let simulation = Simulation::start(topology, options.sim_control.as_deref())?;
        return Ok((Machine::Simulated(simulation.control.clone()), Some(simulation)));
    }
    if let Some(socket) = &options.sim_at {
        return Ok((Machine::Simulated(socket.clone()), None));
    }
    match Path::new("/dev/vfio/vfio").exists() {
        true => Ok((Machine::Linux, None)),
        false => Err(StartError::NoVfio),
    }
}

/// That kernel, for the calls of this process.
pub(super) fn kernel(machine: &Machine) -> Result<Arc<dyn Kernel>, StartError> {
    match machine {
        Machine::Linux => Ok(Arc::new(Linux)),
        Machine::Simulated(control) => match Wire::connect(control) {
            Ok(wire) => Ok(Arc::new(wire)),
            Err(error) => Err(StartError::Sim(format!("{}: {error}", control.display()))),
        },
    }
}
