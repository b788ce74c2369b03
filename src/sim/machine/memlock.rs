//! Who is charged for pinned memory, and how much may be.

use super::{Caller, Capability, Machine, Mm};
use crate::sim::topology::Memlock;
use nix::errno::Errno;

/// Limits count whole pages.
pub(super) const PAGE: u64 = 4096;

impl Machine {
    /// Charges a caller for pinned bytes.
    ///
    /// # Errors
    /// ENOMEM: over its limit.
    pub(super) fn charge(&mut self, caller: &dyn Caller, bytes: u64) -> Result<(), Errno> {
        let limit = match self.topology.memlock {
            Memlock::Unlimited => u64::MAX,
            Memlock::Bytes(bytes) => bytes,
            Memlock::Rlimit if caller.capable(Capability::IpcLock) => u64::MAX,
            Memlock::Rlimit => caller.memlock() & !(PAGE - 1),
        };
        let mm = caller.mm();
        let locked = self.locked.get(&mm).copied().unwrap_or(0).saturating_add(bytes);
        if locked > limit {
            return Err(Errno::ENOMEM);
        }
        if bytes > 0 {
            self.locked.insert(mm, locked);
        }
        Ok(())
    }

    pub(super) fn uncharge(&mut self, mm: Mm, bytes: u64) {
        if let Some(locked) = self.locked.get_mut(&mm) {
            *locked = locked.saturating_sub(bytes);
            if *locked == 0 {
                self.locked.remove(&mm);
            }
        }
    }
}
