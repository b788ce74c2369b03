//! A simulated kernel: VFIO groups, containers, type1, iommufd and vfio-pci devices, and their
//! sysfs, without hardware, without a hypervisor and without root.
//!
//! A [`Sim`] is a thread that plays the kernel of a [`Topology`]. Its open files are real fds: they
//! travel over Unix sockets, they are inherited, and the last close in any process releases them.
//! An ioctl is a message on the fd, so any process that holds one can make it, through [`Wire`] or
//! in any other language. `docs/sim.md` has the format of both, and what is not simulated.
//!
//! ```
//! use std::sync::Arc;
//! use vfio_broker::kernel::{Container, Group, IommuType, Node};
//! use vfio_broker::sim::{Sim, Topology};
//!
//! let topology = Topology::from_toml(
//!     r#"
//!     kernel = "6.12"
//!     [[group]]
//!     id = 26
//!     [[group.device]]
//!     bdf = "0000:65:00.0"
//!     vendor = 0x8086
//!     device = 0x10d3
//!     driver = "vfio-pci"
//!     "#,
//! )?;
//! let sim = Sim::start(topology)?;
//! let group = Group::open(sim.kernel(), Node::Group(26))?;
//! let container = Container::open(sim.kernel())?;
//! group.set_container(&container)?;
//! container.set_iommu(IommuType::Type1v2)?;
//! let device = group.device("0000:65:00.0")?;
//! assert_eq!(device.pci_ids()?, (0x8086, 0x10d3));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod answer;
mod client;
mod fault;
mod incoming;
pub mod machine;
mod process;
mod profile;
mod server;
mod stats;
mod sysfs;
pub mod topology;
mod wire;

#[cfg(test)]
mod tests;

pub use crate::bdf::Bdf;
pub use client::Wire;
pub use fault::{Effect, Fault};
pub use profile::Profile;
pub use stats::{IommufdState, Space, Stats};
pub use topology::{Topology, TopologyError};

use crate::kernel::Kernel;
use crate::sys::table;
use machine::Machine;
use nix::errno::Errno;
use nix::unistd::Uid;
use server::Server;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

/// A running simulation. Dropping it ends the thread; fds that are still about then fail with EIO.
#[derive(Debug)]
pub struct Sim {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    wire: Arc<Wire>,
    control: PathBuf,
    _directory: Option<tempfile::TempDir>,
}

impl Sim {
    /// Starts a simulation with its control socket in a new directory that only this user can
    /// reach, and that is removed with it.
    ///
    /// # Errors
    /// What making the directory, the socket or the thread said.
    pub fn start(topology: Topology) -> io::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("vfio-sim.")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()?;
        let mut sim = Self::start_in(topology, directory.path())?;
        sim._directory = Some(directory);
        Ok(sim)
    }

    /// Starts a simulation with its control socket, `control.sock`, in a directory that exists.
    /// Whoever can connect to it rules the simulation.
    ///
    /// # Errors
    /// EADDRINUSE there is one already; what making the socket or the thread said.
    pub fn start_in(topology: Topology, directory: &Path) -> io::Result<Self> {
        let control = directory.join("control.sock");
        let machine = Machine::new(topology, Uid::current().as_raw());
        let (stop, path) = (Arc::<AtomicBool>::default(), control.clone());
        let stopped = Arc::clone(&stop);
        let socket = client::unconnected()?;
        let (started, start) = channel();
        let thread = std::thread::Builder::new().name("vfio-sim".into()).spawn(move || {
            // So that processes which this one forks have no copies of simulated open files, as
            // they would have none of a kernel's. Where it can't be had, theirs close at exec.
            let _ = table::have_own();
            match Server::new(machine, &path, stopped) {
                Ok(server) => {
                    let _ = started.send(Ok(()));
                    server.run();
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
        start.recv().map_err(io::Error::other)??;
        let wire = Arc::new(Wire::connect_with(socket, &control)?);
        Ok(Self { stop, thread: Some(thread), wire, control, _directory: None })
    }

    /// The simulated kernel, for this process.
    pub fn kernel(&self) -> Arc<dyn Kernel> {
        Arc::clone(&self.wire) as Arc<dyn Kernel>
    }

    /// The same, with the simulation's own calls.
    pub fn wire(&self) -> Arc<Wire> {
        Arc::clone(&self.wire)
    }

    /// Where other processes connect to ([`Wire::connect`]).
    pub fn control_path(&self) -> &Path {
        &self.control
    }

    /// Adds a fault.
    ///
    /// # Errors
    /// EINVAL: it could never hit.
    pub fn fault(&self, fault: Fault) -> Result<(), Errno> {
        self.wire.fault(&fault)
    }

    /// Forgets all faults; what was held back is answered.
    ///
    /// # Errors
    /// EIO: the simulation is gone.
    pub fn clear_faults(&self) -> Result<(), Errno> {
        self.wire.clear_faults()
    }

    /// What is open and mapped.
    ///
    /// # Errors
    /// EIO: the simulation is gone.
    pub fn stats(&self) -> Result<Stats, Errno> {
        self.wire.stats()
    }

    /// Binds a device to a driver, or to none.
    ///
    /// # Errors
    /// See [`Machine::set_driver`].
    pub fn set_driver(&self, bdf: &str, driver: Option<&str>) -> Result<(), Errno> {
        self.wire.set_driver(bdf, driver)
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Any call wakes the thread.
        let _ = self.wire.stats();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.control);
    }
}
