//! Who may do what to which lease, and who may know of it.

use super::books::{Books, Entry};
use super::{Broker, Caller, said};
use crate::ledger::{Lease, LeaseId, Quota, Refusal};
use crate::policy::{Limits, Tenant, Verb};
use crate::protocol::{Error, Holder};
use std::rc::Rc;

/// Why something is not to be had that is just being taken back.
pub(super) const JUST_ENDED: &str = "its last lease has just ended and the kernel is being asked";

impl Broker {
    /// The tenant the caller is.
    pub(super) fn tenant(&self, caller: &Caller) -> Result<&Tenant, Error> {
        Ok(self.policy.tenant(&caller.peer)?)
    }

    /// The lease, if `key` is its key; or if it is empty, and the caller manages its tenant's leases.
    /// Who gives a key means that one, which may be from somebody who is not to have a manager's
    /// rights by it. A wrong key and a lease that is not there are told apart by nobody.
    pub(super) fn authorize(
        &self,
        caller: &Caller,
        lease: &str,
        key: &str,
    ) -> Result<Rc<Entry>, Error> {
        let refused = || Error::NoSuchLease { lease: said(lease) };
        let id: LeaseId = lease.parse().map_err(|_| refused())?;
        let entry = {
            let books = self.books();
            books.ledger.live(id).and(books.entries.get(&id)).map(Rc::clone).ok_or_else(refused)?
        };
        let allowed = match key {
            "" => self.manages(caller, &entry.tenant),
            key => entry.key.is(key),
        };
        if allowed { Ok(entry) } else { Err(refused()) }
    }

    fn manages(&self, caller: &Caller, tenant: &str) -> bool {
        let own = self.policy.tenant(&caller.peer).ok().filter(|own| own.name == tenant);
        own.is_some_and(|own| self.policy.may(own, Verb::Manage).allowed)
    }

    /// Whether the caller may see what leases of `tenant` do. Never blocks.
    pub fn may_see(&self, caller: &Caller, tenant: &str) -> bool {
        self.policy
            .tenant(&caller.peer)
            .is_ok_and(|own| own.name == tenant || self.policy.may(own, Verb::Observe).allowed)
    }

    /// The ledger's refusal as the caller may know it.
    pub(super) fn refused(&self, caller: &Caller, books: &Books, refusal: Refusal) -> Error {
        match refusal {
            Refusal::NoSuchLease(lease) => Error::NoSuchLease { lease: lease.to_string() },
            Refusal::InFlight(lease) => Error::Conflict {
                what: lease.to_string(),
                why: "another call on this lease is under way".into(),
            },
            Refusal::Busy { device, holder, .. } => {
                let lease = books.ledger.lease(holder);
                self.busy(caller, device.to_string(), lease)
            }
            Refusal::Quarantined { device, since, reason, .. } => {
                Error::Quarantined { device: device.to_string(), since, reason }
            }
            Refusal::NotYet { what, since } => {
                Error::Quarantined { device: what, since, reason: JUST_ENDED.into() }
            }
            Refusal::Conflict { what, why } => Error::Conflict { what, why },
            Refusal::OverLimit { limit, most, asked } => {
                Error::OverLimit { limit: limit.into(), most, asked }
            }
            Refusal::Bad { field, reason } => Error::bad(field, reason),
        }
    }

    /// That a device is busy; with the holder where the caller may know it.
    pub(super) fn busy(&self, caller: &Caller, device: String, lease: Option<&Lease>) -> Error {
        let seen = lease.filter(|lease| self.may_see(caller, &lease.tenant));
        let holder = seen.map(|lease| Holder {
            lease: lease.id.to_string(),
            vm: lease.vm.clone(),
            tenant: lease.tenant.clone(),
            uid: lease.uid,
            pid: lease.pid,
        });
        Error::Busy { device, holder, since: seen.map(|lease| lease.since) }
    }

    /// What the tenant of a lease may have, whoever calls.
    pub(super) fn limits_of(&self, tenant: &str) -> Limits {
        let found = self.policy.tenants().iter().find(|known| known.name == tenant);
        found.map(|known| known.limits.clone()).unwrap_or_default()
    }

    /// Whether `more` open files can be kept for a tenant.
    pub(super) fn check_kept(&self, books: &Books, tenant: &str, more: u64) -> Result<(), Error> {
        let most = self.limits_of(tenant).fds;
        let asked = books.kept_for(tenant) + more;
        if asked <= most {
            return Ok(());
        }
        Err(Error::OverLimit { limit: "fds".into(), most, asked })
    }
}

pub(super) fn quota(limits: &Limits) -> Quota {
    let Limits { leases, devices, mappings, mapped_bytes, .. } = *limits;
    Quota { leases, devices, mappings, mapped_bytes }
}
