//! Who may do what to which lease, and who may know of it.

use super::books::{Books, Entry};
use super::{Broker, Caller, error, said};
use crate::ledger::{LeaseId, Quota};
use crate::policy::{Limits, Policy, Tenant, Verb};
use crate::protocol::Error;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

impl Broker {
    /// The tenant the caller is by the policy of now.
    pub(super) fn tenant(&self, caller: &Caller) -> Result<CallersTenant, Error> {
        let policy = self.policy();
        let found = policy.tenant(&caller.peer)?;
        let at = policy.tenants().iter().position(|tenant| std::ptr::eq(tenant, found));
        Ok(CallersTenant { at: at.unwrap_or_default(), policy })
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
            "" => self.manages(caller, &entry.tenant.borrow()),
            key => entry.key.is(key),
        };
        if allowed { Ok(entry) } else { Err(refused()) }
    }

    fn manages(&self, caller: &Caller, tenant: &str) -> bool {
        let policy = self.policy();
        let own = policy.tenant(&caller.peer).ok().filter(|own| own.name == tenant);
        own.is_some_and(|own| policy.may(own, Verb::Manage).allowed)
    }

    /// Whether the caller may see what leases of `tenant` do: an administrator sees all. Never blocks.
    pub fn may_see(&self, caller: &Caller, tenant: &str) -> bool {
        self.administers(caller)
            || self.policy().tenant(&caller.peer).is_ok_and(|own| self.sees(own, tenant))
    }

    /// Whether `own` may see what leases of `tenant` do.
    pub(super) fn sees(&self, own: &Tenant, tenant: &str) -> bool {
        own.name == tenant || self.policy().may(own, Verb::Observe).allowed
    }

    /// What the tenant of a lease may have, whoever calls.
    pub(super) fn limits_of(&self, tenant: &str) -> Limits {
        let policy = self.policy();
        let found = policy.tenants().iter().find(|known| known.name == tenant);
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

/// A tenant, and the policy that it is of: another one may be in force by the time that it is used.
pub(super) struct CallersTenant {
    pub(super) policy: Arc<Policy>,
    at: usize,
}

impl Deref for CallersTenant {
    type Target = Tenant;

    fn deref(&self) -> &Tenant {
        &self.policy.tenants()[self.at]
    }
}

pub(super) fn quota(limits: &Limits) -> Quota {
    let Limits { leases, devices, mappings, mapped_bytes, .. } = *limits;
    Quota { leases, devices, mappings, mapped_bytes }
}
