//! Who takes up how much: connections and requests in flight, by tenant; peers that belong to no
//! tenant, by uid.

use crate::policy::{Peer, Policy, Refusal, Tenant};
use crate::protocol::{Error, Handout};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Connections that a uid without a tenant may have: enough to ask what this is.
const STRANGER_CONNECTIONS: usize = 16;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Owner {
    Tenant(String),
    Stranger(u32),
}

/// All accounts, and all connections.
#[derive(Debug)]
pub(super) struct Accounts {
    by_owner: RefCell<HashMap<Owner, Rc<Account>>>,
    connections: Cell<usize>,
    most_connections: usize,
}

/// One tenant's, or one stranger's.
#[derive(Debug)]
pub(super) struct Account {
    owner: Owner,
    connections: Cell<usize>,
    most_connections: usize,
    /// Requests in flight that are not answered on the event loop.
    pub(super) requests: Arc<Semaphore>,
    pub(super) most_requests: usize,
    /// Whether its calls can need open files: only MapDma's do.
    pub(super) sends_fds: bool,
    /// What a stranger gets for every call but the introspection.
    pub(super) denied: Option<Error>,
}

/// A connection's place in its account; given back when dropped.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) account: Rc<Account>,
    accounts: Rc<Accounts>,
}

impl Accounts {
    pub(super) fn new(most_connections: usize) -> Self {
        Self { by_owner: RefCell::default(), connections: Cell::new(0), most_connections }
    }

    /// A place for one more connection of this peer.
    ///
    /// # Errors
    /// [`Error::OverLimit`].
    pub(super) fn seat(self: &Rc<Self>, policy: &Policy, peer: &Peer) -> Result<Seat, Error> {
        let over = |limit: &str, most: usize| Error::OverLimit {
            limit: limit.into(),
            most: most as u64,
            asked: most as u64 + 1,
        };
        if self.connections.get() >= self.most_connections {
            return Err(over("connections of all clients together", self.most_connections));
        }
        let account = self.account(policy, peer);
        if account.connections.get() >= account.most_connections {
            let what = match &account.owner {
                Owner::Tenant(name) => format!("connections of tenant {name}"),
                Owner::Stranger(uid) => format!("connections of uid {uid}, which has no tenant"),
            };
            return Err(over(&what, account.most_connections));
        }
        account.connections.update(|count| count + 1);
        self.connections.update(|count| count + 1);
        Ok(Seat { account, accounts: Rc::clone(self) })
    }

    /// A tenant's account stays; a stranger's goes with its last connection.
    fn account(&self, policy: &Policy, peer: &Peer) -> Rc<Account> {
        let tenant = policy.tenant(peer);
        let owner = match &tenant {
            Ok(tenant) => Owner::Tenant(tenant.name.clone()),
            Err(_) => Owner::Stranger(peer.uid),
        };
        let mut by_owner = self.by_owner.borrow_mut();
        let entry = by_owner.entry(owner.clone());
        Rc::clone(entry.or_insert_with(|| Rc::new(Account::new(owner, tenant))))
    }
}

impl Account {
    fn new(owner: Owner, tenant: Result<&Tenant, Refusal>) -> Self {
        let (connections, requests) = match &tenant {
            Ok(tenant) => (size(tenant.limits.connections), size(tenant.limits.requests)),
            Err(_) => (STRANGER_CONNECTIONS, 0),
        };
        let most_requests = requests.min(Semaphore::MAX_PERMITS);
        Self {
            owner,
            connections: Cell::new(0),
            most_connections: connections,
            requests: Arc::new(Semaphore::new(most_requests)),
            most_requests,
            sends_fds: tenant.as_ref().is_ok_and(|tenant| may_map(tenant)),
            denied: tenant.err().map(Error::from),
        }
    }
}

/// Whether a tenant has the broker map memory for it, which is what fds are sent for.
pub(super) fn may_map(tenant: &Tenant) -> bool {
    tenant.handouts().contains(&Handout::Devices)
}

fn size(limit: u64) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}

impl Drop for Seat {
    fn drop(&mut self) {
        let left = self.account.connections.get() - 1;
        self.account.connections.set(left);
        self.accounts.connections.update(|count| count - 1);
        if left == 0 && matches!(self.account.owner, Owner::Stranger(_)) {
            self.accounts.by_owner.borrow_mut().remove(&self.account.owner);
        }
    }
}
