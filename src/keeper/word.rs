//! What an administrator or a manager says of a lease.

use super::permit::Client;
use super::{Keeper, KeptLease};
use crate::process::keeper::{Changed, Confirm, Failure, Phase, Revoke, Revoking, Stage};
use std::time::{Duration, Instant};

impl Keeper {
    /// Notes that a lease is to be ended, and when.
    pub(super) fn revoke(&mut self, call: &Revoke, client: &Client) -> Result<Changed, Failure> {
        let Revoke { lease: name, since, force, left } = call;
        self.permit_revocation(&self.lease(name)?.state.record, client)?;
        let at = Instant::now() + Duration::from_millis(*left);
        let lease = self.lease_mut(name)?;
        lease.force_at = Some(lease.force_at.map_or(at, |before| before.min(at)));
        lease.state.revoking = Some(Revoking { since: *since, force: *force, forced: false });
        self.touch(name);
        // With the keeper's process the lease ends as well: what counts is that it knows.
        let _ = self.save();
        self.told(name)
    }

    /// Ends the leases whose revocation's time has come, whether a broker is there or not.
    pub(super) fn force(&mut self, now: Instant) {
        let due = self.leases.values().filter(|lease| lease.is_forced(now));
        for name in due.map(|lease| lease.state.record.lease.clone()).collect::<Vec<_>>() {
            self.log_unseen_end(&name, "revoked");
            self.undo_pending(&name);
            let revoking = self.leases.get_mut(&name).and_then(|it| it.state.revoking.as_mut());
            revoking.into_iter().for_each(|revoking| revoking.forced = true);
            self.end_lease(&name);
            self.take_back(&name);
        }
    }

    /// When the first of them is to end.
    pub(super) fn next_force(&self) -> Option<Instant> {
        let held = self.leases.values().filter(|lease| lease.state.phase == Phase::Held);
        held.filter_map(|lease| lease.force_at).min()
    }

    /// Forgets that a device may be open, for its group has nobody who has it.
    pub(super) fn confirm(&mut self, call: &Confirm, client: &Client) -> Result<Changed, Failure> {
        self.permit_administrator(client)?;
        let Confirm { lease: name, group: id, device } = call;
        let lease = self.lease_mut(name)?;
        let before = lease.state.groups.clone();
        let group = lease.group_state(*id).ok_or(Failure::NoSuchLease)?;
        let Stage::Unbound(left) = &mut group.stage else { return Err(Failure::NoSuchLease) };
        left.remove(device);
        if left.is_empty() {
            lease.state.groups.retain(|group| group.group.id != *id);
        }
        let is_over =
            lease.is_ending() && lease.state.groups.is_empty() && lease.mappings.is_empty();
        self.touch(name);
        // Whoever salvages has nothing else to know it from.
        if let Err(error) = self.save_but(is_over.then_some(name.as_str())) {
            self.lease_mut(name)?.state.groups = before;
            return Err(error.into());
        }
        if is_over {
            self.forget(name);
        }
        self.told(name)
    }
}

impl KeptLease {
    /// Whether a revocation is to have ended it by now, and nothing has.
    pub(super) fn is_forced(&self, now: Instant) -> bool {
        self.state.phase == Phase::Held && self.force_at.is_some_and(|at| at <= now)
    }
}
