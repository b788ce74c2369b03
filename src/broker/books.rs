//! What the broker keeps: the ledger and the open files that go with it. One lock is around all of
//! it, and is never held during a kernel call.

use super::LifelineId;
use super::key::Key;
use super::lifeline::has_hung_up;
use super::space::Space;
use crate::kernel::{Group, Kernel};
use crate::ledger::{Lease, LeaseId, Ledger};
use crate::protocol::{Bdf, Error};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// The ledger and what stands beside it.
#[derive(Default)]
pub(super) struct Books {
    pub(super) ledger: Ledger,
    pub(super) entries: HashMap<LeaseId, Arc<Entry>>,
    pub(super) lifelines: HashMap<LifelineId, Lifeline>,
    /// The shared containers that were ever used; the policy has few.
    pub(super) shared: HashMap<String, Arc<Space>>,
    next_lifeline: u64,
}

/// The broker's end of a lease pipe.
pub(super) struct Lifeline {
    pub(super) lease: LeaseId,
    pub(super) write_end: Arc<OwnedFd>,
}

/// A lease's secret and its open files.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: LeaseId,
    pub(super) tenant: String,
    pub(super) key: Key,
    /// `None` where its holder brings a container.
    pub(super) space: Option<Arc<Space>>,
    /// For calls on what the holder can have open too.
    pub(super) contested: Arc<dyn Kernel>,
    files: Mutex<Files>,
}

/// What the broker keeps open for a lease. Its lock is held through the kernel calls on them, so
/// what is done to one lease is done one thing after the other.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// Attached groups. A reply that is being sent can share one for a moment.
    pub(super) groups: BTreeMap<u32, Arc<Group>>,
    /// How the kernel is asked for a device where it wants more than the address.
    pub(super) names: BTreeMap<Bdf, String>,
    /// The devices that were handed out by their own nodes, and of which of their registrations with
    /// VFIO that was.
    pub(super) registrations: BTreeMap<Bdf, u64>,
}

impl Entry {
    pub(super) fn new(
        id: LeaseId,
        tenant: &str,
        space: Option<Arc<Space>>,
        contested: Arc<dyn Kernel>,
    ) -> Result<Self, Error> {
        let (tenant, files) = (tenant.to_owned(), Mutex::default());
        Ok(Self { id, tenant, key: Key::new()?, space, contested, files })
    }

    pub(super) fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The files, unless a call on them is under way.
    pub(super) fn files_now(&self) -> Option<MutexGuard<'_, Files>> {
        match self.files.try_lock() {
            Ok(files) => Some(files),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl Files {
    pub(super) fn group(&self, id: u32) -> Option<&Group> {
        self.groups.get(&id).map(Arc::as_ref)
    }

    /// The name by which the kernel opens a device.
    pub(super) fn name(&self, bdf: Bdf) -> String {
        self.names.get(&bdf).cloned().unwrap_or_else(|| bdf.to_string())
    }
}

impl Books {
    pub(super) fn new_lifeline(&mut self) -> LifelineId {
        self.next_lifeline += 1;
        LifelineId(self.next_lifeline)
    }

    pub(super) fn shared_space(&mut self, name: &str) -> Arc<Space> {
        Arc::clone(self.shared.entry(name.to_owned()).or_default())
    }

    /// Takes a lease's lifelines out; the holder's ends see the end when they are dropped.
    pub(super) fn take_lifelines(&mut self, lease: LeaseId) -> Vec<(LifelineId, Lifeline)> {
        self.lifelines.extract_if(|_, lifeline| lifeline.lease == lease).collect()
    }

    /// Whether all lifelines of a granted lease have hung up, so that it is about to end.
    pub(super) fn is_abandoned(&self, lease: LeaseId) -> bool {
        let mut own = self.lifelines.values().filter(|lifeline| lifeline.lease == lease);
        let granted = self.ledger.live(lease).is_some();
        granted && own.all(|lifeline| has_hung_up(&lifeline.write_end))
    }

    /// Open files that are kept for a tenant's leases: groups, containers and lease pipes.
    pub(super) fn kept_for(&self, tenant: &str) -> u64 {
        let lease = |id| self.ledger.lease(id).filter(|lease| lease.tenant == tenant);
        let lifelines = self.lifelines.values().filter(|l| lease(l.lease).is_some()).count();
        let groups = self.ledger.groups();
        let groups = groups.filter(|(_, g)| g.attached && lease(g.lease).is_some()).count();
        let own = |l: &&Lease| l.tenant == tenant && l.space == crate::ledger::Space::Own;
        let containers = self.ledger.leases().filter(own).count();
        (lifelines + groups + containers) as u64
    }
}
