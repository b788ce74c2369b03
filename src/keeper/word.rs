//! What an administrator has told the broker, and the next broker is to know.

use super::Keeper;
use crate::process::keeper::{Changed, Confirm, Failure, Revoke, Revoking, Stage};

impl Keeper {
    /// Notes that a lease is being revoked. Its end is the broker's to ask for.
    pub(super) fn revoke(&mut self, call: &Revoke) -> Result<Changed, Failure> {
        let Revoke { lease: name, since, force } = call;
        self.lease_mut(name)?.state.revoking = Some(Revoking { since: *since, force: *force });
        self.touch(name);
        self.save()?;
        self.told(name)
    }

    /// Forgets that a device may be open, for its group has nobody who has it.
    pub(super) fn confirm(&mut self, call: &Confirm) -> Result<Changed, Failure> {
        let Confirm { lease: name, group: id, device } = call;
        let lease = self.lease_mut(name)?;
        let group = lease.group_state(*id).ok_or(Failure::NoSuchLease)?;
        let Stage::Unbound(left) = &mut group.stage else { return Err(Failure::NoSuchLease) };
        left.remove(device);
        if left.is_empty() {
            lease.state.groups.retain(|group| group.group.id != *id);
        }
        match lease.is_ending() && lease.state.groups.is_empty() && lease.mappings.is_empty() {
            true => self.forget(name),
            false => self.touch(name),
        }
        self.save()?;
        self.told(name)
    }
}
