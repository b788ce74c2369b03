//! Another policy while leases are held. They stay until they end; what the new policy would not give
//! is said of each.

use super::{Broker, Caller, error};
use crate::host::{Group, allows, allows_unsafe_interrupts};
use crate::ledger::{Lease, LeaseId, Request, Space, Trust};
use crate::policy::{self, Form, Policy, Tenant};
use crate::process::keeper::LeaseRecord;
use crate::protocol::Error;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use tokio::task::yield_now;
use tracing::{info, warn};

/// How many leases are judged before others have their turn.
const STEP: usize = 16;

/// Whose a lease is, as the policy had it when it was acquired.
#[derive(Clone, Debug, Default)]
pub(super) struct Owner {
    /// The tenant's name.
    pub(super) name: String,
    /// Whom that meant; see [`Policy::principals`].
    pub(super) principals: String,
}

impl Owner {
    pub(super) fn of(record: &LeaseRecord) -> Self {
        Self { name: record.tenant.clone(), principals: record.principals.clone() }
    }

    /// The tenant that it is by this policy; a name that no tenant can have where it is none.
    pub(super) fn tenant(&self, policy: &Policy) -> String {
        match policy.means(&self.name, &self.principals) {
            true => self.name.clone(),
            false => format!("{} (by an earlier policy)", self.name),
        }
    }
}

impl Broker {
    /// Goes by another policy from the next call on, and for whatever waits. Leases stay until they
    /// end; [`judge_leases`](Self::judge_leases) says which of them it would not give.
    pub fn replace_policy(&self, policy: Arc<Policy>) {
        let mut books = self.books();
        let owners: Vec<_> =
            books.owners.iter().map(|(id, owner)| (*id, owner.tenant(&policy))).collect();
        for (lease, tenant) in owners {
            if let Some(entry) = books.entries.get(&lease) {
                entry.tenant.replace(tenant.clone());
            }
            let _ = books.ledger.apply(Request::Rename { lease, tenant });
        }
        drop(books);
        self.policy.replace(policy);
        // What was read may lack the serial numbers that this one names.
        self.survey.take();
        self.has_changed();
    }

    /// Looks which leases the policy would not give, and says so of each. Reads sysfs.
    pub async fn judge_leases(self: &Rc<Self>) {
        let policy = self.policy();
        let ids: Vec<LeaseId> = self.books().entries.keys().copied().collect();
        for (at, id) in ids.into_iter().enumerate() {
            if !Arc::ptr_eq(&policy, &self.policy()) {
                return;
            }
            self.note_objection(id);
            if at % STEP == STEP - 1 {
                yield_now().await;
            }
        }
    }

    fn note_objection(&self, id: LeaseId) {
        let Some(entry) = self.books().entries.get(&id).cloned() else { return };
        let objection = match self.judge(id) {
            Err(Error::Denied { rule, reason, .. }) => Some(format!("{reason} ({rule})")),
            // What can't be read now can't be held against it.
            Ok(()) | Err(_) => None,
        };
        match (&*entry.objection.borrow(), &objection) {
            (before, Some(why)) if before.as_ref() != Some(why) => {
                warn!(lease = %id, why, "a lease goes on that is no longer allowed");
            }
            (Some(_), None) => info!(lease = %id, "a lease is allowed again"),
            _ => {}
        }
        entry.objection.replace(objection);
    }

    /// Whether the policy would give a lease as it is, and what is being added to it. Quotas aside,
    /// which are about all leases of a tenant.
    pub(super) fn judge(&self, id: LeaseId) -> Result<(), Error> {
        let (lease, owner) = {
            let books = self.books();
            let lease = books.ledger.lease(id).cloned();
            (lease.ok_or_else(|| error::no_such_lease(id))?, books.owners.get(&id).cloned())
        };
        let policy = self.policy();
        let owner = owner.unwrap_or_default();
        if !policy.means(&owner.name, &owner.principals) {
            return Err(policy.no_such_tenant(&owner.name).into());
        }
        let own = policy.tenants().iter().find(|tenant| tenant.name == owner.name);
        let tenant = own.ok_or_else(|| policy.no_such_tenant(&owner.name))?;
        let container = match &lease.space {
            Space::Shared { name, trust: Trust::Mutual } => Some((&**name, policy::Trust::Mutual)),
            Space::Shared { name, .. } => Some((&**name, policy::Trust::Enforced)),
            Space::None | Space::Own => None,
        };
        policy.permits(tenant, Form { handout: lease.handout, container })?;
        self.judge_devices(&policy, tenant, &lease)
    }

    /// Whether who has a lease's key may use it: its tenant, who could acquire it, and where the policy has
    /// come to know the caller no more, the user who acquired it.
    pub(super) fn judge_holder(&self, caller: &Caller, id: LeaseId) -> Result<(), Error> {
        let lease = self.books().ledger.lease(id).cloned();
        let lease = lease.ok_or_else(|| error::no_such_lease(id))?;
        let tenant = match self.tenant(caller) {
            Ok(tenant) => tenant,
            // Not before: tenants can share a user, and differ by group, unit or label.
            Err(_) if caller.peer.uid == lease.uid => return Ok(()),
            Err(refusal) => return Err(refusal),
        };
        match tenant.name == lease.tenant {
            true => Ok(()),
            false => self.judge_devices(&tenant.policy, &tenant, &lease),
        }
    }

    fn judge_devices(&self, policy: &Policy, tenant: &Tenant, lease: &Lease) -> Result<(), Error> {
        let unsafe_interrupts = allows_unsafe_interrupts(&*self.kernel)?;
        for (group, devices) in self.groups_of(lease)? {
            for device in &devices {
                let Some(device) = group.device(*device) else { continue };
                allows(policy, tenant, &group, device, lease.handout, unsafe_interrupts)?;
            }
        }
        Ok(())
    }

    /// The groups of a lease as they are now, each with the lease's devices in it.
    fn groups_of(&self, lease: &Lease) -> Result<Vec<(Group, Vec<crate::protocol::Bdf>)>, Error> {
        let all = || lease.devices.iter().chain(lease.adding());
        let ids: BTreeSet<u32> = all().map(|handed| handed.group).collect();
        let policy = self.policy();
        let mut groups = Vec::new();
        for id in ids {
            let Some(mut group) = Group::scan(&*self.kernel, id)? else { continue };
            if policy.names_serials() {
                group.read_serials(&*self.kernel, policy.serials())?;
            }
            let devices = all().filter(|handed| handed.group == id).map(|handed| handed.bdf);
            groups.push((group, devices.collect()));
        }
        Ok(groups)
    }
}
