//! What the broker knows: the ledger, and which keeper has which lease.

use super::keeper::KeeperHandle;
use super::key::Key;
use super::reload::Owner;
use super::revoke::Revoking;
use crate::ledger::{Lease, LeaseId, Ledger, Request};
use crate::process::keeper::UnderWay;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::{Rc, Weak};

/// The ledger and what stands beside it.
#[derive(Default)]
pub(super) struct Books {
    pub(super) ledger: Ledger,
    pub(super) entries: HashMap<LeaseId, Rc<Entry>>,
    /// The keepers of shared containers, by the container's name.
    pub(super) shared: HashMap<String, Weak<KeeperHandle>>,
    /// Whose each lease is, those among them that have only left nodes open.
    pub(super) owners: HashMap<LeaseId, Owner>,
}

/// A lease's secret and its keeper.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: LeaseId,
    pub(super) tenant: RefCell<String>,
    pub(super) key: Key,
    pub(super) keeper: Rc<KeeperHandle>,
    /// The newest that its keeper has told of it.
    pub(super) revision: Cell<u64>,
    /// Its pipes that have not hung up.
    pub(super) lifelines: Cell<u64>,
    /// What its keeper is at for it.
    pub(super) call: RefCell<Option<UnderWay>>,
    /// Why the policy would not give it any more.
    pub(super) objection: RefCell<Option<String>>,
    /// That it is being revoked.
    pub(super) revoking: RefCell<Option<Revoking>>,
}

impl Entry {
    pub(super) fn new(id: LeaseId, tenant: &str, key: Key, keeper: Rc<KeeperHandle>) -> Self {
        let (tenant, lifelines) = (RefCell::new(tenant.to_owned()), Cell::new(0));
        keeper.has_seen(id);
        Self {
            id,
            tenant,
            key,
            keeper,
            revision: Cell::new(0),
            lifelines,
            call: RefCell::default(),
            objection: RefCell::default(),
            revoking: RefCell::default(),
        }
    }
}

impl Books {
    /// Enters reports on a lease; they can't be refused. Whoever is over by that has no entry any more.
    pub(super) fn report(&mut self, id: LeaseId, reports: impl IntoIterator<Item = Request>) {
        let before = self.ledger.leases().len();
        for report in reports {
            let _ = self.ledger.apply(report);
        }
        let gone = before.saturating_sub(self.ledger.leases().len());
        match self.ledger.lease(id).is_none() {
            true if gone <= 1 => self.forget(id),
            // The last group to leave a shared container settles other members' mappings too.
            true => self.forget_closed(),
            false if gone > 0 => self.forget_closed(),
            false => {}
        }
    }

    /// Forgets what stands beside the ledger of a lease that it does not know any more.
    fn forget(&mut self, id: LeaseId) {
        self.entries.remove(&id);
        if self.ledger.unproved().all(|(_, left)| left.lease != id) {
            self.owners.remove(&id);
        }
        // Those of leases that had left nodes open, which since were proved closed or were acquired anew.
        if self.owners.len() > self.ledger.leases().len() + self.ledger.unproved().count() {
            self.forget_closed();
        }
    }

    /// The same for all such leases.
    fn forget_closed(&mut self) {
        let Self { ledger, entries, owners, .. } = self;
        entries.retain(|id, _| ledger.lease(*id).is_some());
        let left: HashSet<LeaseId> = ledger.unproved().map(|(_, left)| left.lease).collect();
        owners.retain(|id, _| ledger.lease(*id).is_some() || left.contains(id));
    }

    /// Open files that are kept for a tenant's leases: groups, containers and lease pipes.
    pub(super) fn kept_for(&self, tenant: &str) -> u64 {
        let theirs = self.entries.values().filter(|entry| *entry.tenant.borrow() == tenant);
        let lifelines: u64 = theirs.map(|entry| entry.lifelines.get()).sum();
        let lease = |id| self.ledger.lease(id).filter(|lease| lease.tenant == tenant);
        let groups = self.ledger.groups();
        let groups = groups.filter(|(_, g)| g.attached && lease(g.lease).is_some()).count() as u64;
        let own = |l: &&Lease| l.tenant == tenant && l.space == crate::ledger::Space::Own;
        let containers = self.ledger.leases().filter(own).count() as u64;
        lifelines + groups + containers
    }
}
