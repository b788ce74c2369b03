//! What administrators see of the broker and its keepers.

use super::{Broker, Caller, now};
use crate::policy::{Verb, administers};
use crate::process::keeper::{LeaseState, Phase};
use crate::process::kept::{KeptKeeper, SavedKeeper};
use crate::protocol::{Keeper, KeptLease};

/// How much of the broker a caller sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Oversight {
    /// All of it.
    Whole,
    /// The broker, and the keepers that have leases of this tenant.
    Tenant(String),
    /// Its version.
    Version,
}

impl Oversight {
    fn includes(&self, tenant: &str) -> bool {
        match self {
            Self::Whole => true,
            Self::Tenant(own) => own == tenant,
            Self::Version => false,
        }
    }
}

impl Broker {
    /// Whether the caller is an administrator: root, or whoever the broker runs as, who could end it.
    /// An administrator has no devices by that, which is the policy's to give.
    pub fn administers(&self, caller: &Caller) -> bool {
        administers(caller.peer.uid, nix::unistd::geteuid().as_raw())
    }

    /// How much the caller sees. Never blocks.
    pub fn oversight(&self, caller: &Caller) -> Oversight {
        if self.administers(caller) {
            return Oversight::Whole;
        }
        let policy = self.policy();
        let Ok(tenant) = policy.tenant(&caller.peer) else { return Oversight::Version };
        if policy.may(tenant, Verb::Observe).allowed {
            return Oversight::Whole;
        }
        match policy.may(tenant, Verb::Manage).allowed {
            true => Oversight::Tenant(tenant.name.clone()),
            false => Oversight::Version,
        }
    }

    /// A keeper, by what it has written down and told; what only its process shows is left out. `None`
    /// where nothing is to be seen of it.
    pub fn keeper(&self, oversight: &Oversight, kept: &KeptKeeper) -> Option<Keeper> {
        let saved = kept.saved().ok()?;
        let leases: Vec<KeptLease> =
            saved.leases.iter().map(|state| self.kept_lease(state)).collect();
        let leases: Vec<_> =
            leases.into_iter().filter(|lease| oversight.includes(&lease.tenant)).collect();
        if leases.is_empty() && *oversight != Oversight::Whole {
            return None;
        }
        let mut keeper = Keeper {
            name: kept.name.clone(),
            pid: saved.pid,
            alive: kept.is_alive,
            since: None,
            memory: None,
            shared: None,
            leases,
            call: None,
            object: None,
            call_since: None,
        };
        self.add_call(&mut keeper, saved);
        Some(keeper)
    }

    fn kept_lease(&self, state: &LeaseState) -> KeptLease {
        let record = &state.record;
        let books = self.books();
        let id = record.lease.parse().ok();
        let owner = id.and_then(|id| books.owners.get(&id));
        let ended = matches!(state.phase, Phase::Ending | Phase::Gone);
        let left = id.filter(|_| ended).map_or(Vec::new(), |id| self.left(&books, id));
        KeptLease {
            left,
            lease: record.lease.clone(),
            vm: record.vm.clone(),
            tenant: owner.map_or(record.tenant.clone(), |owner| owner.tenant(&self.policy())),
            ended,
        }
    }

    /// What it has been in for longer than a second: as it told last, or else wrote down.
    fn add_call(&self, keeper: &mut Keeper, saved: SavedKeeper) {
        let books = self.books();
        let told = saved.leases.iter().find_map(|state| {
            let entry = books.entries.get(&state.record.lease.parse().ok()?)?;
            entry.call.borrow().clone()
        });
        let written = saved.leases.into_iter().find_map(|state| state.call);
        // Of what seems to begin later the clock was set back: nobody knows how long it has been.
        let long = told.or(written).filter(|call| now().abs_diff(call.since) > 1);
        if let Some(call) = long.filter(|_| keeper.alive) {
            keeper.call = Some(call.call);
            keeper.object = Some(call.object);
            keeper.call_since = Some(call.since);
        }
    }
}
