//! Keepers that are threads of the tests' process.

use super::super::{Keepers, Waiting};
use crate::keeper::{Links, Place, links, run};
use crate::kernel::Kernel;
use crate::process::holders::{Report, Search};
use crate::process::keeper::LeaseState;
use crate::process::kept::KeptKeeper;
use crate::process::launcher::Standing;
use crate::sim::Wire;
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::future::ready;
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
    /// What was looked for, and what is found of the first group.
    pub(super) searches: RefCell<Vec<Search>>,
    pub(super) report: RefCell<Report>,
    wire: Arc<Wire>,
    kernels: KernelOf,
    patience: Vec<Duration>,
    directory: Arc<TempDir>,
}

impl Threads {
    pub(super) fn new(wire: Arc<Wire>, kernels: KernelOf, patience: Vec<Duration>) -> Self {
        let directory = Arc::new(TempDir::new().unwrap());
        let place = Place::new(&directory.path().join("keepers")).unwrap();
        let (searches, report) = (RefCell::default(), RefCell::default());
        Self { place, full: Cell::new(false), searches, report, wire, kernels, patience, directory }
    }

    /// What each has written down.
    pub(super) fn saved(&self) -> Vec<(String, Result<Vec<LeaseState>, String>)> {
        let names = self.place.names().unwrap().into_iter();
        let saved = names.map(|name| (name.clone(), self.place.kept(name).saved()));
        saved.map(|(name, saved)| (name, saved.map(|saved| saved.leases))).collect()
    }

    fn begin(&self, name: &str, first: Vec<OwnedFd>, salvage: bool) {
        let links = Links { first, machine: self.wire.end(), salvage, judge: None };
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
    fn start<'a>(&'a self, name: &'a str) -> Waiting<'a, [OwnedFd; 2]> {
        let start = || {
            if self.full.get() {
                return Err(Errno::EAGAIN.into());
            }
            let (ours, theirs) = links()?;
            self.begin(name, theirs.into(), false);
            Ok(ours)
        };
        Box::pin(ready(start()))
    }

    fn find<'a>(&'a self, name: &'a str) -> Waiting<'a, (Standing, Option<[OwnedFd; 2]>)> {
        Box::pin(ready(Ok(self.place.find(name).unwrap())))
    }

    fn salvage<'a>(&'a self, name: &'a str) -> Waiting<'a, ()> {
        self.begin(name, Vec::new(), true);
        Box::pin(ready(Ok(())))
    }

    fn kept<'a>(&'a self, after: &'a str) -> Waiting<'a, Vec<KeptKeeper>> {
        let names = self.place.names().unwrap().into_iter();
        let behind = names.filter(|name| name.as_str() > after);
        Box::pin(ready(Ok(behind.map(|name| self.place.kept(name)).collect())))
    }

    fn look<'a>(&'a self, search: &'a Search) -> Waiting<'a, Report> {
        self.searches.borrow_mut().push(search.clone());
        Box::pin(ready(Ok(self.report.borrow().clone())))
    }
}
