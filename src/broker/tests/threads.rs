//! Keepers that are threads of the tests' process.

use super::super::Keepers;
use crate::keeper::{Found, Links, Place, run};
use crate::kernel::Kernel;
use crate::process::keeper::Saved;
use crate::sim::Wire;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::cell::Cell;
use std::io::Result;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// The kernel as the keeper of that name sees it.
pub(super) type KernelOf = Box<dyn Fn(&str) -> Arc<dyn Kernel>>;

/// Keepers on a simulated kernel, which end with it.
pub(super) struct Threads {
    pub(super) place: Place,
    /// No more can be started.
    pub(super) full: Cell<bool>,
    wire: Arc<Wire>,
    kernels: KernelOf,
    patience: Vec<Duration>,
    directory: Arc<TempDir>,
}

impl Threads {
    pub(super) fn new(wire: Arc<Wire>, kernels: KernelOf, patience: Vec<Duration>) -> Self {
        let directory = Arc::new(TempDir::new().unwrap());
        let place = Place::new(&directory.path().join("keepers")).unwrap();
        Self { place, full: Cell::new(false), wire, kernels, patience, directory }
    }

    fn begin(&self, name: &str, first: Vec<OwnedFd>, salvage: bool) {
        let links = Links { first, machine: self.wire.end(), salvage };
        let (place, patience) = (self.place.clone(), self.patience.clone());
        let (kernel, name) = ((self.kernels)(name), name.to_owned());
        // The last of them takes the directory away.
        let directory = Arc::clone(&self.directory);
        std::thread::spawn(move || {
            let _ = run(kernel, &place, &name, patience, links);
            drop(directory);
        });
    }
}

impl Keepers for Rc<Threads> {
    fn start(&self, name: &str) -> Result<[OwnedFd; 2]> {
        if self.full.get() {
            return Err(Errno::EAGAIN.into());
        }
        let (first, theirs) = pair()?;
        let (second, others) = pair()?;
        self.begin(name, vec![theirs, others], false);
        Ok([first, second])
    }

    fn connect(&self, name: &str) -> Result<[OwnedFd; 2]> {
        Ok([self.place.connect(name)?, self.place.connect(name)?])
    }

    fn exists(&self, name: &str) -> bool {
        self.place.path().join(name).exists()
    }

    fn has_files(&self, name: &str) -> bool {
        self.place.is_locked(name)
    }

    fn names(&self) -> Result<Vec<String>> {
        self.place.names().map_err(|error| std::io::Error::other(error.to_string()))
    }

    fn saved(&self, name: &str) -> Option<Saved> {
        match self.place.read(name) {
            Found::Saved(saved) => Some(saved),
            Found::Unusable(_) | Found::Nothing => None,
        }
    }

    fn salvage(&self, name: &str) -> Result<()> {
        self.begin(name, Vec::new(), true);
        Ok(())
    }

    fn all(&self) -> Result<Vec<(String, std::result::Result<Saved, String>)>> {
        let names = self.names()?;
        let found = names.into_iter().map(|name| {
            let found = self.place.read(&name);
            (name, found)
        });
        let told = found.filter_map(|(name, found)| match found {
            Found::Saved(saved) => Some((name, Ok(saved))),
            Found::Unusable(why) => Some((name, Err(why))),
            Found::Nothing => None,
        });
        Ok(told.collect())
    }
}

fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?)
}
