//! The memlock limit of a caller: up to where it may be raised, which its lease's keeper then does.

use super::{Broker, Caller, error};
use crate::process::keeper;
use crate::protocol::{Error, SetMemlock};
use std::os::fd::AsFd;
use std::rc::Rc;
use tokio::time::Instant;

impl Broker {
    /// Has the limit of the process raised that made the connection `client`; returns what it is then.
    ///
    /// # Errors
    /// [`Error::Denied`] the policy has no ceiling for its tenant, [`Error::OverLimit`] a lower one.
    pub async fn set_memlock(
        self: &Rc<Self>,
        caller: &Caller,
        client: impl AsFd + 'static,
        request: &SetMemlock,
    ) -> Result<u64, Error> {
        let until = Instant::now() + self.deadline;
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        let tenant = self.tenant(caller)?;
        if tenant.name != *entry.tenant.borrow() {
            return Err(error::another_tenants(entry.id));
        }
        let most = self.policy().memlock(&tenant)?;
        if request.bytes > most {
            return Err(error::over("memlock", most, request.bytes));
        }
        let mut turn = entry.keeper.turn_until("SetMemlock", until).await?;
        let (broker, id) = (Rc::clone(self), entry.id);
        let call = keeper::Memlock { lease: entry.id.to_string(), bytes: request.bytes };
        let work = async move {
            let raised = turn.ask(&call, &[client.as_fd()]).await;
            raised.map_err(|why| broker.not_done(why, id, &[], "SetMemlock"))
        };
        // A limit stays raised, however late that was.
        let late = |_| async {};
        let raised = self.in_time(("SetMemlock", &request.lease), until, work, late).await?;
        Ok(raised.bytes)
    }
}
