//! Carries the ledger's decisions out on a kernel and puts back what failed half way. The only
//! writer of the ledger.
//!
//! Three kinds of locks, always taken in this order: a lease's files, then its address space,
//! then the books. The first two are held through kernel calls and only by calls on the same lease
//! or container; the books never are, so nobody waits there for a kernel. Beside them is the lock of
//! the record of what was given ([`given`]), under which no other one is taken.

mod acquire;
mod api;
mod authority;
mod books;
mod cdev;
mod dma;
mod fds;
mod form;
mod given;
mod hint;
mod key;
mod lacks;
mod lifeline;
mod memlock;
mod memory;
mod open;
mod plan;
mod queries;
mod rebind;
mod reclaim;
mod space;

pub use api::{Caller, Contested, Ended, Grant, LifelineId, Nobody, Observer, SentFd};
pub use given::{Given, Record};
pub use memory::check_memory;
pub use queries::Tour;
pub use rebind::Rebinder;

use crate::host::Survey;
use crate::kernel::Kernel;
use crate::ledger::{Lease, LeaseId};
use crate::policy::Policy;
use crate::protocol::{Event, EventKind};
use books::Books;
use given::AllGiven;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long a reclaim waits for what is still open, in steps: a process that is killed closes its
/// files one after the other, the lease pipe may be the first of them, and closing a device resets
/// it. A second in all.
const PATIENCE: [Duration; 10] = {
    let ms = Duration::from_millis;
    [ms(1), ms(2), ms(4), ms(8), ms(16), ms(32), ms(64), ms(128), ms(256), ms(512)]
};

/// The broker. Every call may block in the kernel unless it says otherwise.
pub struct Broker {
    kernel: Arc<dyn Kernel>,
    policy: Arc<Policy>,
    observer: Arc<dyn Observer>,
    patience: Vec<Duration>,
    rebinder: OnceLock<Arc<dyn Rebinder>>,
    contested: OnceLock<Box<dyn Contested>>,
    given: Mutex<AllGiven>,
    books: Mutex<Books>,
    /// What those who list the machine at the moment share.
    survey: Mutex<Weak<Survey>>,
    /// Something has been reclaimed, or can't be yet.
    changed: Condvar,
}

impl Broker {
    /// A broker with no leases.
    pub fn new(
        kernel: Arc<dyn Kernel>,
        policy: Arc<Policy>,
        observer: Arc<dyn Observer>,
    ) -> Arc<Self> {
        Self::with_patience(kernel, policy, observer, PATIENCE.to_vec())
    }

    /// A broker whose reclaims wait this long between their attempts before they call a group
    /// quarantined.
    pub fn with_patience(
        kernel: Arc<dyn Kernel>,
        policy: Arc<Policy>,
        observer: Arc<dyn Observer>,
        patience: Vec<Duration>,
    ) -> Arc<Self> {
        Arc::new(Self {
            kernel,
            policy,
            observer,
            patience,
            rebinder: OnceLock::new(),
            contested: OnceLock::new(),
            given: Mutex::default(),
            books: Mutex::default(),
            survey: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Has calls on what holders have open too made through these kernels; once, before anything is
    /// acquired. Without it they are made as all others.
    pub fn set_contested(&self, kernels: Box<dyn Contested>) {
        let _ = self.contested.set(kernels);
    }

    /// A kernel for what the holder of one lease has open too.
    fn contested(&self) -> Arc<dyn Kernel> {
        let kernels = self.contested.get();
        kernels.map_or_else(|| Arc::clone(&self.kernel), |kernels| kernels.kernel())
    }

    /// The policy it goes by.
    pub fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// The kernel it works on.
    pub fn kernel(&self) -> &Arc<dyn Kernel> {
        &self.kernel
    }

    /// The books; whoever has them makes no kernel call.
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: &Event) {
        self.observer.event(event);
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What happened to these devices of a lease.
fn event(kind: EventKind, lease: &Lease, devices: Vec<String>) -> Event {
    Event {
        event: kind,
        lease: lease.id.to_string(),
        vm: lease.vm.clone(),
        tenant: lease.tenant.clone(),
        devices,
        at: now(),
    }
}

/// A lease's devices that are in use, or those withheld.
fn devices(lease: &Lease, withheld: bool) -> Vec<String> {
    let those = lease.devices.iter().filter(|handed| handed.withheld == withheld);
    those.map(|handed| handed.bdf.to_string()).collect()
}

/// What the container of a lease is called: as in the policy, or for one of its own as the lease.
fn container_name(lease: &Lease) -> String {
    use crate::ledger::Space;
    match &lease.space {
        Space::None => String::new(),
        Space::Own => lease.id.to_string(),
        Space::Shared { name, .. } => name.clone(),
    }
}

/// The text of a lease id, short enough to be said back.
fn said(lease: &str) -> String {
    lease.chars().take(64).collect()
}

/// The error for a lease that is not there, and for one whose key is another.
fn no_such_lease(lease: LeaseId) -> crate::protocol::Error {
    crate::protocol::Error::NoSuchLease { lease: lease.to_string() }
}

#[cfg(test)]
mod tests;
