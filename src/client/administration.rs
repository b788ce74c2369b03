//! What administrators ask for.

use super::{Client, Result};
use crate::protocol::{self, BrokerStatus, Confirmed, Revoked};
use std::time::Duration;

impl Client {
    /// What the broker is at, and each of its keepers, as far as one may see it.
    ///
    /// # Errors
    /// See [`Error`](super::Error).
    pub fn status(&mut self) -> Result<BrokerStatus> {
        let mut replies = self.call_more(&protocol::Status {})?;
        let mut whole = replies.next().transpose()?.unwrap_or_default();
        for some in replies {
            whole.keepers.extend(some?.keepers);
        }
        Ok(whole)
    }
    /// Ends a lease against its holder's will, who is told and has so long to give it back; waits for that,
    /// and says what can't be taken back. It goes on without this client.
    ///
    /// # Errors
    /// [`Error::Broker`](super::Error::Broker): no such lease, or it is not one's own to end.
    pub fn revoke(&mut self, lease: &str, grace: Duration) -> Result<Revoked> {
        let call = protocol::Revoke { lease: lease.to_owned(), grace: grace.as_secs() };
        self.patiently(grace, |client| Ok(client.call(&call, &[])?.0))
    }

    /// Ends all leases that one may end, as [`revoke`](Client::revoke) does; `tell` is told of each as soon
    /// as it is over.
    ///
    /// # Errors
    /// [`Error::Broker`](super::Error::Broker): none is one's own to end.
    pub fn drain(
        &mut self,
        grace: Duration,
        mut tell: impl FnMut(&Revoked),
    ) -> Result<Vec<Revoked>> {
        let call = protocol::Drain { grace: grace.as_secs() };
        self.patiently(grace, |client| {
            let mut all = Vec::new();
            for some in client.call_more(&call)? {
                let some = some?.leases;
                some.iter().for_each(&mut tell);
                all.extend(some);
            }
            Ok(all)
        })
    }

    /// Says that nobody has a device open any more.
    ///
    /// # Errors
    /// [`Error::Broker`](super::Error::Broker): it is not one's own to say, or the kernel says something
    /// itself.
    pub fn confirm(&mut self, device: &str) -> Result<Confirmed> {
        Ok(self.call(&protocol::Confirm { device: device.to_owned() }, &[])?.0)
    }

    /// With a timeout that is so much longer.
    fn patiently<T>(
        &mut self,
        longer: Duration,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let timeout = self.timeout;
        self.timeout = timeout.map(|timeout| timeout + longer);
        let done = work(self);
        self.timeout = timeout;
        done
    }
}
