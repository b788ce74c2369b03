//! A group that somebody keeps open although no device of it is: with the last device off its driver the kernel
//! ends the group, and that file finds nothing any more. Seen on Linux 6.1 and 6.12
//! (`tests/conformance/cases/drivers.rs`); where it does not help, the group is still busy afterwards.

use super::Keeper;
use super::take_back::{not_free, not_rebound};
use crate::drivers;
use crate::host;
use crate::process::keeper::{LeaseRecord, NotFree};
use crate::protocol::Bdf;
use std::sync::Arc;

impl Keeper {
    /// Ends a group that was taken out of its container here, so that no device of it was open, and that
    /// is open nevertheless. Once: what somebody has opened since would be waited for. True where it was done.
    pub(super) fn end_bare_group(&mut self, name: &str, id: u32) -> Result<bool, NotFree> {
        let Some(lease) = self.leases.get_mut(name) else { return Ok(false) };
        if !lease.state.record.rebind || !lease.unset.contains(&id) {
            return Ok(false);
        }
        let Some(devices) = self.all_named(name, id) else { return Ok(false) };
        if let Some(group) = self.leases.get_mut(name).and_then(|lease| lease.group_state(id)) {
            group.drivers.extend(devices.iter().cloned());
        }
        let object = devices.iter().map(|(bdf, _)| bdf.to_string()).collect::<Vec<_>>().join(" ");
        self.begin(name, "driver unbind", object);
        self.tell();
        self.save().map_err(|error| not_free(error, NotFree::GroupOpen))?;
        if let Some(lease) = self.leases.get_mut(name) {
            lease.unset.remove(&id);
        }
        drivers::rebind_all(&*self.kernel, &devices)
            .map_err(|failed| not_rebound(failed.into()))?;
        Ok(true)
    }

    /// Gives devices of a group the drivers back that a keeper took away which was killed before it could.
    pub(super) fn bring_drivers_back(&mut self, name: &str, id: u32) -> Result<(), NotFree> {
        let kernel = Arc::clone(&self.kernel);
        let group = self.leases.get_mut(name).and_then(|lease| lease.group_state(id));
        let taken = group.map(|group| group.drivers.clone()).unwrap_or_default();
        for (bdf, before) in taken {
            let device = host::Device::scan(&*kernel, bdf);
            if device.is_ok_and(|device| device.is_some_and(|device| device.driver.is_none())) {
                drivers::rebind(&*kernel, bdf, 0, None, Some(&before)).map_err(not_rebound)?;
            }
        }
        Ok(())
    }

    /// The devices of a group that are on VFIO drivers, with these; `None` where one of them was not named
    /// for the lease, has VFs, which would go with its driver, or can't be read.
    fn all_named(&self, name: &str, id: u32) -> Option<Vec<(Bdf, String)>> {
        let kernel = Arc::clone(&self.kernel);
        let LeaseRecord { devices: named, .. } = &self.leases.get(name)?.state.record;
        let group = host::Group::scan(&*kernel, id).ok()??;
        let on_vfio = group.devices.iter().filter(|device| device.on_vfio);
        let each = on_vfio.map(|device| {
            let bdf = device.bdf();
            let is_named = named.iter().any(|it| it.bdf == bdf);
            let may_go = is_named && host::has_vfs(&*kernel, bdf) == Ok(false);
            Some((bdf, device.driver.clone().filter(|_| may_go)?))
        });
        each.collect()
    }
}
