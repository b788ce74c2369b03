//! A keeper's process, from its fork on.

use super::serve::{Links, run};
use super::{PATIENCE, Place, PolicyInForce};
use crate::kernel::{Kernel, Linux};
use crate::sim::Wire;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socketpair};
use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

/// Whose kernel.
#[derive(Clone, Debug)]
pub enum Machine {
    /// This machine's.
    Linux,
    /// A simulated one's, at this control socket.
    Simulated(PathBuf),
}

/// Two links: first the ends of who asks, then the keeper's. All are in non-blocking mode.
///
/// # Errors
/// See socketpair(2) and bind(2).
pub fn links() -> nix::Result<([OwnedFd; 2], [OwnedFd; 2])> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let ((ask, answer), (watch, tell)) =
        (pair(SockType::Stream, flags)?, pair(SockType::Stream, flags)?);
    Ok(([ask, watch], [answer, tell]))
}

/// Two connected sockets. The second one has a name, which the kernel chooses: a client's other end has none,
/// so the first one can't be passed off as a client's connection.
///
/// # Errors
/// See socketpair(2) and bind(2).
pub fn pair(kind: SockType, flags: SockFlag) -> nix::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags)?;
    bind(theirs.as_raw_fd(), &UnixAddr::new_unnamed())?;
    Ok((ours, theirs))
}

/// Keeps until there is nothing to keep. Without links it takes back what a dead keeper of that name
/// has left.
///
/// # Errors
/// It could not begin: its links' end says so.
pub fn keep(
    machine: &Machine,
    place: &Place,
    name: &str,
    links: Option<[OwnedFd; 2]>,
    policy: PolicyInForce,
) -> std::io::Result<()> {
    // Whoever ends a service ends what it is at as well, and that is not to be left half done.
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
        .into_iter()
        .collect::<SigSet>()
        .thread_block()?;
    let (kernel, end): (Arc<dyn Kernel>, Option<OwnedFd>) = match machine {
        Machine::Linux => (Arc::new(Linux), None),
        Machine::Simulated(control) => {
            let wire = Wire::connect(control)?;
            let end = wire.end();
            (Arc::new(wire), end)
        }
    };
    let judge = Some(RefCell::new(policy));
    let salvage = links.is_none();
    let first = links.map(Vec::from).unwrap_or_default();
    run(kernel, place, name, PATIENCE.to_vec(), Links { first, machine: end, salvage, judge })
        .map_err(|error| std::io::Error::other(error.to_string()))
}
