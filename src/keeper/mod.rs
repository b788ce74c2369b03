//! A keeper: the process that has one address space open, and makes every call on it that can hang.
//!
//! It holds containers, groups, lease pipes and mappings, which live exactly as long as it does. A
//! lease ends when its last pipe hangs up, whether a broker is there or not: the keeper then takes back
//! what the lease had, until the kernel shows that nobody has anything of it. It is one thread: while a
//! call hangs it answers nobody, and what it is at stands in its state file, written before the call.

mod bare_group;
mod container;
mod deliver;
mod dma;
mod memlock;
mod memory;
mod open;
mod permit;
mod process;
mod serve;
mod state_file;
mod take_back;
mod word;

pub use permit::{Judge, PolicyInForce};
pub use process::{Machine, keep, links, pair};
pub use serve::{Links, run, tell_why};
pub use state_file::Place;

use crate::kernel::{Group, Kernel};
use crate::process::keeper::{Changed, Failure, GroupState, LeaseState, Phase, Stage, UnderWay};
use crate::protocol::Bdf;
use crate::sys::process::now;
use container::Container;
use open::Pending;
use serve::Link;
use state_file::StateFile;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use take_back::Attempts;

pub use memory::check_memory;

/// How long a take-back waits between its attempts before it calls a group quarantined: a process that
/// is killed closes its files one after the other, the lease pipe may be the first of them, and closing
/// a device resets it. A second in all.
pub const PATIENCE: [Duration; 10] = {
    let ms = Duration::from_millis;
    [ms(1), ms(2), ms(4), ms(8), ms(16), ms(32), ms(64), ms(128), ms(256), ms(512)]
};

/// How often what has failed is tried again; tests have not so much time.
const AGAIN: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 500 });

/// All that one keeper has.
#[derive(Debug)]
pub struct Keeper {
    kernel: Arc<dyn Kernel>,
    file: StateFile,
    judge: Judge,
    patience: Vec<Duration>,
    container: Option<Container>,
    leases: BTreeMap<String, KeptLease>,
    /// The leases that have changed since those who watch were told.
    changed: BTreeSet<String>,
    /// What became of leases of which nothing is left, until that is told.
    gone: BTreeMap<String, LeaseState>,
    links: Vec<Link>,
    next_link: u64,
    revision: u64,
    /// When the state file is written again, which could not be written.
    save_at: Option<Instant>,
}

/// A lease and its open files.
#[derive(Debug)]
struct KeptLease {
    state: LeaseState,
    /// The files of its groups, attached to the container.
    groups: BTreeMap<u32, Group>,
    /// How the kernel is asked for devices for which it wants more than the address.
    names: BTreeMap<Bdf, String>,
    /// The write ends of its pipes.
    lifelines: Vec<OwnedFd>,
    /// First addresses and bytes.
    mappings: BTreeMap<u64, u64>,
    /// What was opened and not delivered.
    pending: Option<Pending>,
    /// The groups that no device was open of when they left the container, whoever has them.
    unset: BTreeSet<u32>,
    attempts: Attempts,
    /// When a revocation ends it.
    force_at: Option<Instant>,
}

impl Keeper {
    fn lease(&self, name: &str) -> Result<&KeptLease, Failure> {
        self.leases.get(name).ok_or(Failure::NoSuchLease)
    }

    fn lease_mut(&mut self, name: &str) -> Result<&mut KeptLease, Failure> {
        self.leases.get_mut(name).ok_or(Failure::NoSuchLease)
    }

    /// Notes that a lease is another one than those who watch were told.
    fn touch(&mut self, name: &str) {
        self.revision += 1;
        if let Some(lease) = self.leases.get_mut(name) {
            lease.state.revision = self.revision;
            lease.state.lifelines = lease.lifelines.len() as u64;
            lease.state.mappings = lease.mappings.len() as u64;
        }
        self.changed.insert(name.to_owned());
    }

    /// A lease as it is, or as it was when nothing was left of it.
    fn state(&self, name: &str) -> Option<&LeaseState> {
        self.leases.get(name).map(|lease| &lease.state).or_else(|| self.gone.get(name))
    }

    fn told(&self, name: &str) -> Result<Changed, Failure> {
        let state = self.state(name).cloned().ok_or(Failure::NoSuchLease)?;
        Ok(Changed { state })
    }

    /// Says what is begun for a lease before it is begun.
    fn begin(&mut self, name: &str, call: &str, object: impl Into<String>) {
        if let Some(lease) = self.leases.get_mut(name) {
            lease.state.call =
                Some(UnderWay { call: call.into(), object: object.into(), since: now() });
        }
        self.touch(name);
    }

    fn done(&mut self, name: &str) {
        if let Some(lease) = self.leases.get_mut(name) {
            lease.state.call = None;
        }
        self.touch(name);
    }

    /// Writes down what somebody else would have to know. What fails is tried again: until then the file
    /// says what was so before.
    fn save(&mut self) -> crate::kernel::Result<()> {
        self.save_but(None)
    }

    /// The same without a lease that is about to be forgotten.
    fn save_but(&mut self, gone: Option<&str>) -> crate::kernel::Result<()> {
        let kept = self.leases.iter().filter(|(name, _)| Some(name.as_str()) != gone);
        let written = self.file.write(kept.map(|(_, lease)| &lease.state));
        self.save_at = written.is_err().then(|| Instant::now() + AGAIN);
        written
    }

    /// Writes down what could not be, where it is time for that.
    fn save_again(&mut self, now: Instant) {
        if self.save_at.is_some_and(|at| at <= now) {
            let _ = self.save();
        }
    }

    /// Nothing is left of a lease.
    fn forget(&mut self, name: &str) {
        let Some(lease) = self.leases.remove(name) else { return };
        self.revision += 1;
        let state = LeaseState {
            revision: self.revision,
            phase: Phase::Gone,
            lifelines: 0,
            mappings: 0,
            groups: Vec::new(),
            call: None,
            ..lease.state
        };
        self.gone.insert(name.to_owned(), state);
        self.changed.insert(name.to_owned());
    }
}

impl KeptLease {
    fn group_state(&mut self, id: u32) -> Option<&mut GroupState> {
        self.state.groups.iter_mut().find(|group| group.group.id == id)
    }

    /// The group in which a device was handed out by its own node.
    fn group_of(&mut self, bdf: Bdf) -> Option<&mut GroupState> {
        self.state.groups.iter_mut().find(|group| group.registrations.contains_key(&bdf))
    }

    /// The name by which the kernel opens a device.
    fn name(&self, bdf: Bdf) -> String {
        self.names.get(&bdf).cloned().unwrap_or_else(|| bdf.to_string())
    }

    fn is_ending(&self) -> bool {
        self.state.phase == Phase::Ending
    }

    /// From here on nobody can use it, and its holder is told.
    fn end(&mut self) {
        self.state.phase = Phase::Ending;
        self.lifelines.clear();
        for group in &mut self.state.groups {
            if group.stage == Stage::Held {
                group.stage = Stage::Reclaiming;
            }
        }
    }
}

#[cfg(test)]
mod tests;
