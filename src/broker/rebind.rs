//! Proving a device free by its driver: it goes only when nobody has the device open by its own node
//! any more. Only where the policy lets the broker do that.

use super::Broker;
use super::books::Files;
use crate::host;
use crate::ledger::{Lease, NotFree, Request};
use crate::protocol::Bdf;
use std::collections::BTreeMap;
use std::slice::Iter;
use std::sync::Arc;
use std::time::Duration;

/// Takes devices off their drivers and binds them again.
///
/// A driver that is told to go waits for the last close, and nothing can interrupt it: neither the
/// caller nor anything that has files of somebody else may wait for it.
pub trait Rebinder: Send + Sync {
    /// Begins with a device, and does not wait. `registration` is the one of it that is to end: where
    /// there is another one by now, somebody new may have the device, and it is let alone. `driver` is
    /// the one it is on and is to be on again; `None` where it has none: it gets the one that the kernel
    /// finds for it. Does nothing where a rebind of the device is under way.
    fn begin(&self, device: Bdf, registration: u64, driver: Option<&str>);
}

impl Broker {
    /// Has this rebind the devices of tenants that allow it; once, before anything is acquired.
    pub fn set_rebinder(&self, rebinder: Arc<dyn Rebinder>) {
        let _ = self.rebinder.set(rebinder);
    }

    /// Nobody has the group open, and no device of it bound: it is its tenant's again, and anybody's
    /// where all its devices are proved free.
    pub(super) fn settle(
        &self,
        group: u32,
        lease: &Lease,
        files: &Files,
        patience: &mut Iter<'_, Duration>,
    ) {
        let left = self.left(group, lease, files);
        let done = match self.rebinder_for(lease).filter(|_| !left.is_empty()) {
            Some(rebinder) => self.rebind(&**rebinder, group, left, patience),
            None => Ok(left),
        };
        match done {
            Ok(left) => {
                self.report(Request::Unbound { group, at: super::now(), left });
                self.look_for_proof(&lease.tenant, |_| false);
                self.forget_proved();
            }
            Err(why) => self.stuck(group, why),
        }
    }

    /// The devices of a group that were handed out by their nodes, and whose nodes may be open.
    fn left(&self, group: u32, lease: &Lease, files: &Files) -> BTreeMap<Bdf, u64> {
        let here = lease.devices.iter().filter(|handed| handed.group == group);
        let given = here.filter_map(|handed| files.registrations.get_key_value(&handed.bdf));
        let mut left: BTreeMap<_, _> = given.map(|(bdf, since)| (*bdf, *since)).collect();
        left.retain(|bdf, since| !self.has_let_go(*bdf, *since));
        left
    }

    pub(super) fn has_let_go(&self, device: Bdf, since: u64) -> bool {
        // What can't be read shows nothing.
        host::has_let_go(&*self.kernel, device, since) == Ok(true)
    }

    fn rebinder_for(&self, lease: &Lease) -> Option<&Arc<dyn Rebinder>> {
        let tenant = self.policy.tenants().iter().find(|tenant| tenant.name == lease.tenant)?;
        self.rebinder.get().filter(|_| tenant.rebind || tenant.managed)
    }

    /// Returns what can't be proved in this way.
    fn rebind(
        &self,
        rebinder: &dyn Rebinder,
        group: u32,
        mut left: BTreeMap<Bdf, u64>,
        patience: &mut Iter<'_, Duration>,
    ) -> Result<BTreeMap<Bdf, u64>, NotFree> {
        // What earlier leases left is to be proved with it.
        let earlier = self.books().ledger.unproved_group(group).map(|u| u.left.clone());
        let mut all = earlier.unwrap_or_default();
        // Of those nobody may have looked for a while; a device that is proved free is let alone.
        all.retain(|bdf, since| !self.has_let_go(*bdf, *since));
        all.append(&mut left);
        for bdf in all.keys() {
            // It would take the VFs away, from whoever has them.
            if host::has_vfs(&*self.kernel, *bdf)? {
                return Ok(all);
            }
        }
        for (bdf, since) in &all {
            let device = host::Device::scan(&*self.kernel, *bdf)?;
            rebinder.begin(*bdf, *since, device.and_then(|device| device.driver).as_deref());
        }
        loop {
            let waits = all.iter().find(|(bdf, since)| !self.has_let_go(**bdf, **since));
            match (waits, patience.next()) {
                (None, _) => return Ok(BTreeMap::new()),
                (Some(_), Some(pause)) => std::thread::sleep(*pause),
                (Some((bdf, _)), None) => {
                    let device = host::Device::scan(&*self.kernel, *bdf)?;
                    let binding = device.is_some_and(|device| device.driver.is_some());
                    let unregistered = host::registration(&*self.kernel, *bdf)?.is_none();
                    return Err(match binding && unregistered {
                        true => NotFree::DriverBinds { device: *bdf },
                        false => NotFree::DriverWaits { device: *bdf },
                    });
                }
            }
        }
    }
}
