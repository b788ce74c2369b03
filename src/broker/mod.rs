//! Decides who gets what, and has keepers carry it out. The only writer of the ledger.
//!
//! One thread, no lock, no device open: whatever can hang in the kernel is a keeper's to do, and waited
//! for with a deadline. The books are never borrowed across an await.

mod access;
mod acquire;
mod adopt;
mod api;
mod attend;
mod books;
mod candidates;
mod confirm;
mod dma;
mod ending;
pub(crate) mod error;
mod fds;
mod form;
mod holders;
mod keeper;
mod kept;
mod key;
mod memlock;
mod oversight;
mod plan;
mod proof;
mod queries;
mod reload;
mod revoke;
mod steps;

pub use api::{Caller, Delivery, Keepers, Observer, Waiting};
pub use error::advice;
pub use kept::KeptKeepers;
pub use oversight::Oversight;
pub use queries::Tour;
pub use revoke::Begun;
pub use steps::Step;

use crate::host::Survey;
use crate::kernel::Kernel;
use crate::ledger::Lease;
use crate::policy::Policy;
use crate::protocol::{Event, EventKind};
use crate::sys::process::now;
use books::Books;
use error::no_such_lease;
use std::cell::{Cell, RefCell, RefMut};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, timeout_at};

/// What a broker is made of.
pub struct Parts {
    /// Whose sysfs is read.
    pub kernel: Arc<dyn Kernel>,
    /// Who may have what.
    pub policy: Arc<Policy>,
    /// Who is told of leases.
    pub observer: Rc<dyn Observer>,
    /// The processes that have address spaces open.
    pub keepers: Box<dyn Keepers>,
    /// How long an Acquire waits for what is just being taken back.
    pub patience: Duration,
    /// How long a keeper is waited for.
    pub deadline: Duration,
}

/// The broker. Lives on one thread, within a [`LocalSet`](tokio::task::LocalSet).
pub struct Broker {
    kernel: Arc<dyn Kernel>,
    policy: RefCell<Arc<Policy>>,
    observer: Rc<dyn Observer>,
    keepers: Box<dyn Keepers>,
    patience: Duration,
    deadline: Duration,
    books: RefCell<Books>,
    /// What those who read the machine at the moment share.
    survey: RefCell<Weak<Survey>>,
    /// Whose turn it is to do what takes long.
    steps: steps::Steps,
    /// Grows with each change of the books.
    generation: Cell<u64>,
    changed: Notify,
    /// Whose turn it is to look for a way to a keeper: after a restart all do, and who acquires would have
    /// the launcher asked behind them.
    finding: Mutex<()>,
    /// Whose turn it is to take a lease by force.
    forcing: Mutex<()>,
    /// Who has what leases have left open.
    looks: holders::Looks,
}

impl Broker {
    /// A broker with no leases.
    pub fn new(parts: Parts) -> Rc<Self> {
        let Parts { kernel, policy, observer, keepers, patience, deadline } = parts;
        Rc::new(Self {
            kernel,
            policy: RefCell::new(policy),
            observer,
            keepers,
            patience,
            deadline,
            books: RefCell::default(),
            survey: RefCell::default(),
            steps: steps::Steps::default(),
            generation: Cell::default(),
            changed: Notify::new(),
            finding: Mutex::default(),
            forcing: Mutex::default(),
            looks: holders::Looks::default(),
        })
    }

    /// The policy it goes by now.
    pub fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.borrow())
    }

    /// The kernel whose sysfs it reads.
    pub fn kernel(&self) -> &Arc<dyn Kernel> {
        &self.kernel
    }

    fn books(&self) -> RefMut<'_, Books> {
        self.books.borrow_mut()
    }

    fn tell(&self, event: &Event) {
        self.observer.event(event);
    }

    /// Whoever waits for a change looks again.
    fn has_changed(&self) {
        self.generation.update(|generation| generation + 1);
        self.changed.notify_waiters();
    }

    /// Waits until the books are others than those of that generation; false where they are not by
    /// `until`.
    async fn changes(&self, seen: u64, until: Instant) -> bool {
        while self.generation.get() == seen {
            if timeout_at(until, self.changed.notified()).await.is_err() {
                return false;
            }
        }
        true
    }
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
        until: None,
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

#[cfg(test)]
mod tests;
