//! Who is charged for pinned memory, and how much may be.

use super::{Caller, Capability, Machine, Mm};
use crate::sim::topology::Memlock;
use nix::errno::Errno;
use std::collections::BTreeMap;

/// Limits count whole pages.
pub(super) const PAGE: u64 = 4096;

/// Who is charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payer {
    /// Nobody: CAP_IPC_LOCK, as iommufd sees it.
    Nobody,
    /// A process: type1's way, and iommufd's in its per-process mode.
    Process(Mm),
    /// A user, all processes together: iommufd's way.
    User(u32),
}

/// What is pinned, by who is charged for it, in bytes.
#[derive(Debug)]
pub(super) struct Accounts {
    rule: Memlock,
    pub(super) processes: BTreeMap<Mm, u64>,
    pub(super) users: BTreeMap<u32, u64>,
}

impl Accounts {
    pub(super) fn new(rule: Memlock) -> Self {
        Self { rule, processes: BTreeMap::new(), users: BTreeMap::new() }
    }

    /// How much memory a process may lock, capabilities aside.
    pub(super) fn limit(&self, process: &dyn Caller) -> u64 {
        match self.rule {
            Memlock::Unlimited => u64::MAX,
            Memlock::Bytes(bytes) => bytes,
            Memlock::Rlimit => process.memlock() & !(PAGE - 1),
        }
    }

    /// Whether a caller is exempt from its limit.
    pub(super) fn is_exempt(&self, caller: &dyn Caller) -> bool {
        self.rule == Memlock::Rlimit && caller.capable(Capability::IpcLock)
    }

    /// Charges pinned bytes.
    ///
    /// # Errors
    /// ENOMEM: over the limit.
    pub(super) fn charge(&mut self, payer: Payer, limit: u64, bytes: u64) -> Result<(), Errno> {
        let before = match payer {
            Payer::Nobody => return Ok(()),
            Payer::Process(mm) => self.processes.get(&mm),
            Payer::User(uid) => self.users.get(&uid),
        };
        let locked = before.copied().unwrap_or(0).saturating_add(bytes);
        if locked > limit {
            return Err(Errno::ENOMEM);
        }
        if bytes > 0 {
            match payer {
                Payer::Nobody => None,
                Payer::Process(mm) => self.processes.insert(mm, locked),
                Payer::User(uid) => self.users.insert(uid, locked),
            };
        }
        Ok(())
    }

    pub(super) fn uncharge(&mut self, payer: Payer, bytes: u64) {
        match payer {
            Payer::Nobody => {}
            Payer::Process(mm) => take_off(&mut self.processes, &mm, bytes),
            Payer::User(uid) => take_off(&mut self.users, &uid, bytes),
        }
    }
}

fn take_off<K: Ord>(accounts: &mut BTreeMap<K, u64>, who: &K, bytes: u64) {
    if let Some(locked) = accounts.get_mut(who) {
        *locked = locked.saturating_sub(bytes);
        if *locked == 0 {
            accounts.remove(who);
        }
    }
}

impl Machine {
    /// Charges a caller for bytes that type1 pins.
    ///
    /// # Errors
    /// ENOMEM: over its limit.
    pub(super) fn charge(&mut self, caller: &dyn Caller, bytes: u64) -> Result<(), Errno> {
        let exempt = self.accounts.is_exempt(caller);
        let limit = if exempt { u64::MAX } else { self.accounts.limit(caller) };
        self.accounts.charge(Payer::Process(caller.mm()), limit, bytes)
    }

    pub(super) fn uncharge(&mut self, mm: Mm, bytes: u64) {
        self.accounts.uncharge(Payer::Process(mm), bytes);
    }
}
