//! Up to where the memlock limit of a caller may be raised.

use super::{Broker, Caller};
use crate::protocol::{Error, SetMemlock};

impl Broker {
    /// Whether the caller's limit may be raised as it asks; returns its tenant's name. Never blocks.
    ///
    /// # Errors
    /// [`Error::Denied`] the policy has no ceiling for its tenant, [`Error::OverLimit`] a lower one.
    pub fn may_lock(&self, caller: &Caller, request: &SetMemlock) -> Result<&str, Error> {
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        let tenant = self.tenant(caller)?;
        if tenant.name != entry.tenant {
            return Err(Error::Denied {
                rule: "a lease is one tenant's".into(),
                reason: format!("lease {} is another tenant's than the caller", entry.id),
            });
        }
        self.policy.may_lock(tenant, request.bytes)?;
        Ok(&tenant.name)
    }
}
