//! Who may do what to which lease, and who may know of it.

use super::books::{Books, Entry};
use super::{Broker, Caller, error, said};
use crate::ledger::{LeaseId, Quota};
use crate::policy::{Limits, Tenant, Verb};
use crate::protocol::Error;
use std::rc::Rc;

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
        self.policy.tenant(&caller.peer).is_ok_and(|own| self.sees(own, tenant))
    }

    /// Whether `own` may see what leases of `tenant` do.
    pub(super) fn sees(&self, own: &Tenant, tenant: &str) -> bool {
        own.name == tenant || self.policy.may(own, Verb::Observe).allowed
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
        Err(error::over("fds", most, asked))
    }
}

pub(super) fn quota(limits: &Limits) -> Quota {
    let Limits { leases, devices, mappings, mapped_bytes, .. } = *limits;
    Quota { leases, devices, mappings, mapped_bytes }
}
