//! Who takes up how much: connections and requests in flight, by tenant; peers that belong to no
//! tenant, by uid.

use super::launcher_link::LauncherLink;
use super::rate_limit::RateLimit;
use super::receiver::{MOST_OF_OWNER, SocketCloser, Unkillable};
use crate::policy::{Peer, Policy, Refusal, Tenant, administers};
use crate::protocol::{Error, Handout, MAX_MESSAGE};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Semaphore;
use tracing::warn;

/// Connections that a uid without a tenant may have: enough to ask what this is.
const STRANGER_CONNECTIONS: usize = 16;

/// How many denials, and how many raised limits, get into the log: an account's, and the denials of all
/// strangers together.
const DENIALS: u32 = 20;
const RAISES: u32 = 20;
const STRANGERS_DENIALS: u32 = 10 * DENIALS;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Owner {
    Tenant(String),
    Stranger(u32),
}

/// The part of all connections that strangers may have together, and the most: a user can have very
/// many uids, and each connection can hold half a message.
const STRANGERS_PART: usize = 8;
const MOST_STRANGERS: usize = 100;

/// The longest message of a stranger, in bytes: its calls are short.
const STRANGER_MESSAGE: usize = 4 << 10;

/// Room for replies that a client does not read, in bytes: the kernel charges them to this process.
const STRANGER_UNREAD: usize = 16 << 10;
const TENANT_UNREAD: usize = 64 << 10;

/// All accounts, and all connections.
#[derive(Debug)]
pub(super) struct Accounts {
    launcher: Rc<LauncherLink>,
    /// One for all strangers: with their own, many uids could have any number of processes.
    strangers_socket_closer: Rc<SocketCloser>,
    strangers_denials: Rc<RefCell<RateLimit>>,
    strangers: Cell<usize>,
    by_owner: RefCell<HashMap<Owner, Rc<Account>>>,
    connections: Cell<usize>,
    most_connections: usize,
}

/// One tenant's, or one stranger's.
#[derive(Debug)]
pub(super) struct Account {
    owner: Owner,
    connections: Cell<usize>,
    /// Where its connections end, and the files that it sent and nobody has taken.
    pub(super) socket_closer: Rc<SocketCloser>,
    /// Messages of its that receivers take, at a time.
    pub(super) receivers: Semaphore,
    /// Those that could not be ended.
    pub(super) unkillable: Unkillable,
    /// The longest message that is taken from it, and the room for replies that it leaves unread.
    pub(super) most_message: usize,
    pub(super) most_unread: usize,
    terms: RefCell<Rc<Terms>>,
    /// What is denied it and gets into the log.
    denials: RefCell<RateLimit>,
    /// The limits of its processes that were raised and get into the log.
    raises: RefCell<RateLimit>,
    /// The same of all strangers together, if it is one: a user can have very many uids.
    strangers_denials: Option<Rc<RefCell<RateLimit>>>,
}

/// What an account has by a policy.
#[derive(Debug)]
pub(super) struct Terms {
    policy: Arc<Policy>,
    most_connections: usize,
    /// Requests in flight that are not answered on the event loop.
    pub(super) requests: Arc<Semaphore>,
    pub(super) most_requests: usize,
    /// Whether its calls can need open files: only MapDma's do.
    pub(super) sends_fds: bool,
    /// What a stranger gets for every call but the introspection.
    pub(super) denied: Option<Error>,
}

/// One connection, charged to its account; given back when dropped.
#[derive(Debug)]
pub(super) struct ConnectionCharge {
    pub(super) account: Rc<Account>,
    accounts: Rc<Accounts>,
}

impl Accounts {
    pub(super) fn new(launcher: Rc<LauncherLink>, most_connections: usize) -> Self {
        Self {
            strangers_socket_closer: SocketCloser::new(Rc::clone(&launcher)),
            launcher,
            strangers_denials: Rc::new(RefCell::new(RateLimit::new(STRANGERS_DENIALS))),
            strangers: Cell::new(0),
            by_owner: RefCell::default(),
            connections: Cell::new(0),
            most_connections,
        }
    }

    /// How many connections there are.
    pub(super) fn connections(&self) -> usize {
        self.connections.get()
    }

    /// Where the connections of those end who belong to no tenant.
    pub(super) fn strangers_socket_closer(&self) -> &Rc<SocketCloser> {
        &self.strangers_socket_closer
    }

    /// Charges this account for one more connection.
    ///
    /// # Errors
    /// [`Error::OverLimit`].
    pub(super) fn charge(
        self: &Rc<Self>,
        account: Rc<Account>,
    ) -> Result<Rc<ConnectionCharge>, Error> {
        let over = |limit: &str, most: usize| Error::OverLimit {
            limit: limit.into(),
            most: most as u64,
            asked: most as u64 + 1,
        };
        if self.connections.get() >= self.most_connections {
            return Err(over("connections of all clients together", self.most_connections));
        }
        let most_strangers = (self.most_connections / STRANGERS_PART).min(MOST_STRANGERS);
        // Strangers can't keep an administrator out.
        let is_one_of_many = account.is_stranger() && !account.is_administrator();
        if is_one_of_many && self.strangers.get() >= most_strangers {
            return Err(over("connections of all who have no tenant", most_strangers));
        }
        if account.socket_closer.is_overloaded() {
            return Err(over("connections of this client that can't be closed", 0));
        }
        let most = account.terms().most_connections;
        if account.connections.get() >= most {
            let what = match &account.owner {
                Owner::Tenant(name) => format!("connections of tenant {name}"),
                Owner::Stranger(uid) => format!("connections of uid {uid}, which has no tenant"),
            };
            return Err(over(&what, most));
        }
        account.connections.update(|count| count + 1);
        self.connections.update(|count| count + 1);
        self.strangers.update(|count| count + usize::from(account.is_stranger()));
        Ok(Rc::new(ConnectionCharge { account, accounts: Rc::clone(self) }))
    }

    /// No socket closer starts anything any more.
    pub(super) fn end(&self) {
        self.socket_closers().iter().for_each(|closer| closer.end());
    }

    /// Hands all connections that are left, once nobody serves them, to processes that close them.
    pub(super) async fn hand_over_connections(&self) {
        for closer in self.socket_closers() {
            if let Err(error) = closer.hand_over_the_rest().await {
                warn!(%error, "can't hand over connections: their close may hold up the end");
            }
        }
    }

    fn socket_closers(&self) -> Vec<Rc<SocketCloser>> {
        let by_owner = self.by_owner.borrow();
        let all = by_owner.values().map(|account| &account.socket_closer);
        all.chain([&self.strangers_socket_closer]).map(Rc::clone).collect()
    }

    /// The account of a peer. A tenant's stays; a stranger's goes some time after its last
    /// connection.
    pub(super) fn account(&self, policy: &Arc<Policy>, peer: &Peer) -> Rc<Account> {
        let tenant = policy.tenant(peer);
        let owner = match &tenant {
            Ok(tenant) => Owner::Tenant(tenant.name.clone()),
            Err(_) => Owner::Stranger(peer.uid),
        };
        let mut by_owner = self.by_owner.borrow_mut();
        if let Some(account) = by_owner.get(&owner) {
            account.renew(policy, tenant);
            return Rc::clone(account);
        }
        by_owner.retain(|_, account| !account.is_forgettable());
        let socket_closer = match &tenant {
            Ok(_) => SocketCloser::new(Rc::clone(&self.launcher)),
            Err(_) => Rc::clone(&self.strangers_socket_closer),
        };
        let mut account = Account::new(owner.clone(), Terms::new(policy, tenant), socket_closer);
        account.strangers_denials =
            account.is_stranger().then(|| Rc::clone(&self.strangers_denials));
        let account = Rc::new(account);
        by_owner.insert(owner, Rc::clone(&account));
        account
    }
}

impl Account {
    fn new(owner: Owner, terms: Terms, socket_closer: Rc<SocketCloser>) -> Self {
        let (most_message, most_unread) = match owner {
            Owner::Tenant(_) => (MAX_MESSAGE, TENANT_UNREAD),
            Owner::Stranger(_) => (STRANGER_MESSAGE, STRANGER_UNREAD),
        };
        Self {
            owner,
            connections: Cell::new(0),
            most_message,
            most_unread,
            terms: RefCell::new(Rc::new(terms)),
            socket_closer,
            receivers: Semaphore::new(MOST_OF_OWNER),
            unkillable: Unkillable::default(),
            denials: RefCell::new(RateLimit::new(DENIALS)),
            raises: RefCell::new(RateLimit::new(RAISES)),
            strangers_denials: None,
        }
    }

    /// What it has by the policy that it was last asked for with.
    pub(super) fn terms(&self) -> Rc<Terms> {
        Rc::clone(&self.terms.borrow())
    }

    /// Has it go by this policy. Requests that are in flight by another one are counted no more.
    fn renew(&self, policy: &Arc<Policy>, tenant: Result<&Tenant, Refusal>) {
        let before = self.terms();
        if Arc::ptr_eq(&before.policy, policy) {
            return;
        }
        let mut terms = Terms::new(policy, tenant);
        if terms.most_requests == before.most_requests {
            terms.requests = Arc::clone(&before.requests);
        }
        self.terms.replace(Rc::new(terms));
    }

    /// Whether a denial may be logged; if so, how many were held back before it.
    pub(super) fn may_log_denial(&self, now: Instant) -> Option<u64> {
        let own = self.denials.borrow_mut().pass(now)?;
        match &self.strangers_denials {
            None => Some(own),
            Some(all) => all.borrow_mut().pass(now).map(|others| own + others),
        }
    }

    /// The same of a limit that was raised.
    pub(super) fn may_log_raise(&self, now: Instant) -> Option<u64> {
        self.raises.borrow_mut().pass(now)
    }

    fn is_stranger(&self) -> bool {
        matches!(self.owner, Owner::Stranger(_))
    }

    fn is_administrator(&self) -> bool {
        let own = nix::unistd::geteuid().as_raw();
        matches!(self.owner, Owner::Stranger(uid) if administers(uid, own))
    }

    fn is_forgettable(&self) -> bool {
        self.is_stranger() && self.connections.get() == 0
    }
}

impl Terms {
    fn new(policy: &Arc<Policy>, tenant: Result<&Tenant, Refusal>) -> Self {
        let (connections, requests) = match &tenant {
            Ok(tenant) => (size(tenant.limits.connections), size(tenant.limits.requests)),
            Err(_) => (STRANGER_CONNECTIONS, 0),
        };
        let most_requests = requests.min(Semaphore::MAX_PERMITS);
        Self {
            policy: Arc::clone(policy),
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

impl Drop for ConnectionCharge {
    fn drop(&mut self) {
        self.account.connections.update(|count| count - 1);
        self.accounts.connections.update(|count| count - 1);
        self.accounts.strangers.update(|count| count - usize::from(self.account.is_stranger()));
    }
}
