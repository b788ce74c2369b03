//! What the broker knows: the ledger, and which keeper has which lease.

use super::keeper::KeeperHandle;
use super::key::Key;
use crate::ledger::{Lease, LeaseId, Ledger, Request};
use crate::process::keeper::UnderWay;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};

/// The ledger and what stands beside it.
#[derive(Default)]
pub(super) struct Books {
    pub(super) ledger: Ledger,
    pub(super) entries: HashMap<LeaseId, Rc<Entry>>,
    /// The keepers of shared containers, by the container's name.
    pub(super) shared: HashMap<String, Weak<KeeperHandle>>,
}

/// A lease's secret and its keeper.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: LeaseId,
    pub(super) tenant: String,
    pub(super) key: Key,
    pub(super) keeper: Rc<KeeperHandle>,
    /// The newest that its keeper has told of it.
    pub(super) revision: Cell<u64>,
    /// Its pipes that have not hung up.
    pub(super) lifelines: Cell<u64>,
    /// What its keeper is at for it.
    pub(super) call: RefCell<Option<UnderWay>>,
}

impl Entry {
    pub(super) fn new(id: LeaseId, tenant: &str, key: Key, keeper: Rc<KeeperHandle>) -> Self {
        let (tenant, lifelines) = (tenant.to_owned(), Cell::new(0));
        keeper.has_seen(id);
        Self {
            id,
            tenant,
            key,
            keeper,
            revision: Cell::new(0),
            lifelines,
            call: RefCell::default(),
        }
    }
}

impl Books {
    /// Enters reports on a lease; they can't be refused. Whoever is over by that has no entry any more.
    pub(super) fn report(&mut self, id: LeaseId, reports: impl IntoIterator<Item = Request>) {
        let Self { ledger, entries, .. } = self;
        let before = ledger.leases().len();
        for report in reports {
            let _ = ledger.apply(report);
        }
        let is_over = ledger.lease(id).is_none();
        if is_over {
            entries.remove(&id);
        }
        // The last group to leave a shared container settles other members' mappings too.
        if before.saturating_sub(ledger.leases().len()) > usize::from(is_over) {
            entries.retain(|id, _| ledger.lease(*id).is_some());
        }
    }

    /// Open files that are kept for a tenant's leases: groups, containers and lease pipes.
    pub(super) fn kept_for(&self, tenant: &str) -> u64 {
        let theirs = self.entries.values().filter(|entry| entry.tenant == tenant);
        let lifelines: u64 = theirs.map(|entry| entry.lifelines.get()).sum();
        let lease = |id| self.ledger.lease(id).filter(|lease| lease.tenant == tenant);
        let groups = self.ledger.groups();
        let groups = groups.filter(|(_, g)| g.attached && lease(g.lease).is_some()).count() as u64;
        let own = |l: &&Lease| l.tenant == tenant && l.space == crate::ledger::Space::Own;
        let containers = self.ledger.leases().filter(own).count() as u64;
        lifelines + groups + containers
    }
}
