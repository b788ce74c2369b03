//! The memlock limit of a client's process.

use super::Keeper;
use super::permit::Client;
use crate::kernel::Error;
use crate::process::keeper::{Failure, Memlock, Phase, Raised};
use crate::sys::memlock::raise_memlock;
use crate::sys::peer::pidfd;
use nix::sys::socket::{getsockopt, sockopt};
use std::os::fd::AsFd;

impl Keeper {
    /// Raises the limit of the process that made this connection, as the kernel names it.
    pub(super) fn raise_memlock(&self, call: &Memlock, client: &Client) -> Result<Raised, Failure> {
        if self.lease(&call.lease)?.state.phase != Phase::Held {
            return Err(Failure::NoSuchLease);
        }
        self.permit_memlock(call.bytes, client)?;
        let asked = |call: &'static str| {
            move |errno| Failure::from(Error::new(call, "the peer's socket", errno))
        };
        let credentials = getsockopt(client, sockopt::PeerCredentials)
            .map_err(asked("getsockopt SO_PEERCRED"))?;
        let pidfd = pidfd(client.as_fd()).map_err(asked("getsockopt SO_PEERPIDFD"))?;
        let pidfd = pidfd.ok_or(Failure::UnknownPeer)?;
        let bytes = raise_memlock(pidfd.as_fd(), credentials.pid(), call.bytes)?;
        Ok(Raised { bytes })
    }
}
