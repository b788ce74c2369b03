//! Up to where the memlock limit of a caller may be raised.

use super::{Broker, Caller, error};
use crate::protocol::{Error, SetMemlock};

impl Broker {
    /// Whether the caller's limit may be raised as it asks; returns its tenant's name. Never blocks.
    ///
    /// # Errors
    /// [`Error::Denied`] the policy has no ceiling for its tenant, [`Error::OverLimit`] a lower one.
    pub fn may_lock(&self, caller: &Caller, request: &SetMemlock) -> Result<String, Error> {
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        let tenant = self.tenant(caller)?;
        if tenant.name != *entry.tenant.borrow() {
            return Err(error::another_tenants(entry.id));
        }
        let most = self.policy().memlock(&tenant)?;
        if request.bytes > most {
            return Err(error::over("memlock", most, request.bytes));
        }
        Ok(tenant.name.clone())
    }
}
