//! The keepers' processes, as the broker has to do with them.

use crate::broker::Keepers;
use crate::keeper::{Found, Machine, Place, start, start_salvage};
use crate::process::keeper::{Saved, VERSION};
use std::cell::RefCell;
use std::io::Result;
use std::os::fd::OwnedFd;
use std::process::Child;
use std::rc::Rc;

/// Keepers that are processes of this program.
#[derive(Debug)]
pub(super) struct Processes {
    machine: Machine,
    place: Place,
    children: Children,
}

/// Those that were started here and are not known to have ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Children(Rc<RefCell<Vec<Child>>>);

impl Processes {
    pub(super) fn new(machine: Machine, place: Place) -> Self {
        Self { machine, place, children: Children::default() }
    }

    pub(super) fn children(&self) -> &Children {
        &self.children
    }
}

impl Children {
    /// Forgets those that have ended, and lets the kernel do so.
    pub(super) fn reap(&self) {
        self.0.borrow_mut().retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }

    fn add(&self, child: Child) {
        self.0.borrow_mut().push(child);
    }
}

impl Keepers for Processes {
    fn start(&self, name: &str) -> Result<[OwnedFd; 2]> {
        let (child, links) = start(&self.machine, &self.place, name)?;
        self.children.add(child);
        Ok(links)
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
        self.children.add(start_salvage(&self.machine, &self.place, name)?);
        Ok(())
    }

    fn all(&self) -> Result<Vec<(String, std::result::Result<Saved, String>)>> {
        let mut all = Vec::new();
        for name in self.names()? {
            match self.place.read(&name) {
                Found::Saved(saved) if saved.version > VERSION => {
                    let why = format!(
                        "{name}: it is of version {}, and this daemon understands {VERSION}",
                        saved.version
                    );
                    all.push((name, Err(why)));
                }
                Found::Saved(saved) => all.push((name, Ok(saved))),
                Found::Unusable(why) => all.push((name, Err(why))),
                Found::Nothing if self.place.is_locked(&name) => {
                    let (version, boot, pid) = (VERSION, String::new(), 0);
                    all.push((name, Ok(Saved { version, boot, pid, leases: Vec::new() })));
                }
                // Of another start of the kernel, or of one that never had anything.
                Found::Nothing => self.place.remove(&name),
            }
        }
        Ok(all)
    }
}
