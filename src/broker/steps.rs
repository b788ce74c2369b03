//! What takes long is done in steps, one at a time: whoever asks for something small waits for one of them,
//! and whoever asks for something large shares them with other tenants, not with their calls.

use super::{Broker, Caller};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::yield_now;

/// How many groups are read in a step.
pub(super) const GROUPS: usize = 8;

/// Whose turn it is.
#[derive(Default)]
pub(super) struct Steps {
    tenants: RefCell<HashMap<String, Arc<Mutex<()>>>>,
    all: Arc<Mutex<()>>,
}

/// The right to some milliseconds' work, in which nothing is waited for.
#[must_use = "the next step begins when this is dropped"]
pub struct Step {
    _all: OwnedMutexGuard<()>,
    _tenant: OwnedMutexGuard<()>,
}

impl Steps {
    /// The next step of a tenant. A tenant's calls wait for each other before one of them waits with those
    /// of others, so however many they are they have one part in all steps.
    async fn next(&self, tenant: &str) -> Step {
        let own = Arc::clone(self.tenants.borrow_mut().entry(tenant.to_owned()).or_default());
        let tenant = own.lock_owned().await;
        let all = Arc::clone(&self.all).lock_owned().await;
        // All who are ready have a turn between two steps, and what has come in is noticed. Before the first
        // one it lets whoever calls at the same time join in.
        yield_now().await;
        Step { _all: all, _tenant: tenant }
    }
}

impl Broker {
    /// Waits for the caller's turn to do what takes long: a step of a list, or of a look at the machine.
    pub async fn step(&self, caller: &Caller) -> Step {
        // Who is no tenant is an administrator, or refused in the step.
        let tenant = self.tenant(caller).map_or_else(|_| String::new(), |own| own.name.clone());
        self.steps.next(&tenant).await
    }
}
