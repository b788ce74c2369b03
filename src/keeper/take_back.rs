//! The end of a lease: taking back what it had until the kernel itself shows that nobody has anything
//! of it.

use super::open::node;
use super::permit::Client;
use super::{AGAIN, Keeper, KeptLease};
use crate::drivers::{self, RebindError};
use crate::host;
use crate::kernel::{Error, Group, Unmap, UnmapFlags};
use crate::log::LEASES;
use crate::process::keeper::{Changed, Check, End, Failure, LeaseRecord, NotFree, Phase, Stage};
use crate::protocol::{Bdf, Handout};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;
use tracing::info;

/// The attempts to take back one lease.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    made: usize,
    next: Option<Instant>,
}

/// What an attempt on a group came to.
enum Outcome {
    Free,
    /// Free for its last tenant: nodes of these devices may be open.
    Left(BTreeMap<Bdf, u64>),
}

impl Keeper {
    /// Ends a lease; of one that has ended, tries at once to take back what is left.
    pub(super) fn end(&mut self, call: &End, client: Option<Client>) -> Result<Changed, Failure> {
        let name = &call.lease;
        if let Some(lease) = self.leases.get(name) {
            self.permit_end(lease, client.as_ref())?;
        }
        // What follows may wait for this client to close a device, and the client for its connection to
        // end, where the broker has died.
        drop(client);
        self.force(Instant::now());
        self.undo_pending(name);
        if self.leases.contains_key(name) {
            self.end_lease(name);
            self.take_back(name);
        }
        self.told(name)
    }

    /// A lease as it is now: its holder may have gone just before.
    pub(super) fn check(&mut self, call: &Check) -> Result<Changed, Failure> {
        self.see_hang_ups(true);
        self.told(&call.lease)
    }

    /// Ends the leases whose holders have gone.
    pub(super) fn see_hang_ups(&mut self, have_any: bool) {
        let mut ended = Vec::new();
        for (name, lease) in &mut self.leases {
            let before = lease.lifelines.len();
            lease.lifelines.retain(|pipe| !(have_any && has_hung_up(pipe)));
            let is_over = lease.lifelines.is_empty() && lease.pending.is_none();
            if lease.state.phase == Phase::Held && (is_over || before != lease.lifelines.len()) {
                ended.push((name.clone(), is_over));
            }
        }
        for (name, is_over) in ended {
            match is_over {
                true => {
                    self.log_unseen_end(&name, "holder gone");
                    self.end_lease(&name);
                    self.take_back(&name);
                }
                false => self.touch(&name),
            }
        }
    }

    /// Logs the end of a lease, which is a broker's to log where there is one.
    pub(super) fn log_unseen_end(&self, name: &str, why: &str) {
        let Some(lease) = self.leases.get(name).filter(|_| self.links.is_empty()) else { return };
        let LeaseRecord { lease, vm, tenant, devices, .. } = &lease.state.record;
        let devices = devices.iter().filter(|device| !device.withheld);
        let devices = devices.map(|device| device.bdf.to_string()).collect::<Vec<_>>().join(" ");
        info!(target: LEASES, lease, vm, tenant, devices, "lease ends: {why}, with no broker there");
    }

    /// Tries again where it is time for that.
    pub(super) fn try_again(&mut self, now: Instant) {
        let due = |lease: &&KeptLease| lease.attempts.next.is_some_and(|next| next <= now);
        let due = self.leases.values().filter(|lease| lease.is_ending()).filter(due);
        for name in due.map(|lease| lease.state.record.lease.clone()).collect::<Vec<_>>() {
            self.take_back(&name);
        }
    }

    /// When it is time for that.
    pub(super) fn next_attempt(&self) -> Option<Instant> {
        let ending = self.leases.values().filter(|lease| lease.is_ending());
        ending.filter_map(|lease| lease.attempts.next).min()
    }

    pub(super) fn end_lease(&mut self, name: &str) {
        if let Some(lease) = self.leases.get_mut(name).filter(|lease| !lease.is_ending()) {
            lease.end();
            self.touch(name);
        }
    }

    /// One attempt, on each group by itself.
    pub(super) fn take_back(&mut self, name: &str) {
        let Some(lease) = self.leases.get(name) else { return };
        let is_first = lease.attempts.made == 0;
        let is_last = lease.attempts.made >= self.patience.len();
        let groups: Vec<u32> = lease.state.groups.iter().map(|group| group.group.id).collect();
        if is_first {
            let node = |id: &u32| node(*id, lease.state.record.noiommu).to_string();
            let object = groups.iter().map(node).collect::<Vec<_>>().join(" ");
            self.begin(name, "reclaim", object);
            // Nothing more can be told while a call hangs.
            self.tell();
            // What can't be written down now stands there from before.
            let _ = self.save();
        }
        let before = self.leases.get(name).map(|lease| lease.state.groups.clone());
        self.unmap_all(name);
        for id in groups {
            let outcome = self.free(name, id, is_last);
            let Some(lease) = self.leases.get_mut(name) else { return };
            let stage = match outcome {
                Ok(Outcome::Free) => {
                    lease.state.groups.retain(|group| group.group.id != id);
                    continue;
                }
                Ok(Outcome::Left(left)) => Stage::Unbound(left),
                Err(why) => Stage::Quarantined(why),
            };
            if let Some(group) = lease.group_state(id)
                && (is_last || !matches!(stage, Stage::Quarantined(_)))
            {
                group.stage = stage;
            }
        }
        self.settle(name, before);
    }

    /// What an attempt has changed is told, and what is left is tried again.
    fn settle(&mut self, name: &str, before: Option<Vec<crate::process::keeper::GroupState>>) {
        let pauses = self.patience.clone();
        let Some(lease) = self.leases.get_mut(name) else { return };
        let pause = pauses.get(lease.attempts.made).copied().unwrap_or(AGAIN);
        lease.attempts.made += 1;
        lease.attempts.next = Some(Instant::now() + pause);
        let is_over = lease.state.groups.is_empty() && lease.mappings.is_empty();
        let has_changed = lease.state.call.is_some()
            || before.as_ref() != Some(&lease.state.groups)
            || lease.state.mappings != lease.mappings.len() as u64;
        if is_over {
            self.forget(name);
        } else if has_changed {
            self.done(name);
        }
        if is_over || has_changed {
            let _ = self.save();
        }
    }

    /// Frees memory at once, where a holder that is still there could otherwise keep it pinned. What
    /// fails here is undone by the kernel when the last group leaves.
    fn unmap_all(&mut self, name: &str) {
        let others = self.leases.values().filter(|lease| lease.state.record.lease != name);
        let (mut with_others, mut with_live) = (false, false);
        for other in others {
            with_others |= other.state.groups.iter().any(|group| group.attached);
            with_live |= !other.is_ending();
        }
        let Some(lease) = self.leases.get_mut(name) else { return };
        let Some(container) = &self.container else {
            // With the last group in it the kernel has undone all mappings.
            lease.mappings.clear();
            return;
        };
        if lease.state.record.noiommu {
            return;
        }
        let alone = if lease.state.record.keeper_maps() { !with_others } else { !with_live };
        if alone {
            let all = Unmap { flags: UnmapFlags::ALL, iova: 0, size: 0 };
            if container.file.unmap(&all).is_ok() {
                lease.mappings.clear();
            }
        } else {
            // Where others live in the same container, only what is this lease's may go.
            lease.mappings.retain(|&iova, &mut size| {
                container.file.unmap(&Unmap { flags: 0, iova, size }).is_err()
            });
        }
    }

    /// Takes a group out of its container, and has the kernel show that nobody has it.
    fn free(&mut self, name: &str, id: u32, is_last: bool) -> Result<Outcome, NotFree> {
        let kernel = Arc::clone(&self.kernel);
        let Some(lease) = self.leases.get_mut(name) else { return Ok(Outcome::Free) };
        let noiommu = lease.state.record.noiommu;
        let handout = lease.state.record.handout;
        let rebind = lease.state.record.rebind;
        let Some(group) = lease.state.groups.iter_mut().find(|group| group.group.id == id) else {
            return Ok(Outcome::Free);
        };
        let has_let_go =
            // What can't be read shows nothing.
            |bdf: Bdf, since: u64| host::has_let_go(&*kernel, bdf, since) == Ok(true);
        if let Stage::Unbound(left) = &group.stage {
            // Its tenant may have it again: only the registrations are looked at.
            let mut left = left.clone();
            left.retain(|bdf, since| !has_let_go(*bdf, *since));
            return Ok(if left.is_empty() { Outcome::Free } else { Outcome::Left(left) });
        }
        if group.attached {
            if let Some(file) = lease.groups.get(&id) {
                detach(file)?;
                lease.unset.insert(id);
            }
            // While our own copy is open, opening it again shows nothing.
            lease.groups.remove(&id);
            group.attached = false;
            if let Some(container) = &mut self.container {
                container.leave(id);
            }
            self.close_empty_container();
            if self.container.is_none() {
                // With the last group the kernel forgets all mappings.
                self.leases.values_mut().for_each(|lease| lease.mappings.clear());
            }
        }
        match Group::open(Arc::clone(&kernel), node(id, noiommu)) {
            Ok(group) => drop(group),
            // Its holder has had time to end.
            Err(error) if error.errno == Errno::EBUSY && is_last => {
                if !self.end_bare_group(name, id)? {
                    return Err(not_free(error, NotFree::GroupOpen));
                }
                let again = Group::open(kernel.clone(), node(id, noiommu));
                drop(again.map_err(|error| not_free(error, NotFree::GroupOpen))?);
            }
            // No device of it is on a VFIO driver any more: whatever somebody had is dead.
            Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => {}
            Err(error) => return Err(not_free(error, NotFree::GroupOpen)),
        }
        if handout != Handout::Iommufd {
            self.bring_drivers_back(name, id)?;
            return Ok(Outcome::Free);
        }
        let Some(group) = self.leases.get_mut(name).and_then(|lease| lease.group_state(id)) else {
            return Ok(Outcome::Free);
        };
        let mut left = group.registrations.clone();
        left.retain(|bdf, since| !has_let_go(*bdf, *since));
        if left.is_empty() {
            return Ok(Outcome::Free);
        }
        match rebind {
            true => self.rebind(name, left),
            false => Ok(Outcome::Left(left)),
        }
    }

    /// Has each device's driver taken away, which goes only after the last close, and bound again.
    /// Nothing of this lease is open here any more: what the unbind waits for is somebody else's.
    fn rebind(&mut self, name: &str, left: BTreeMap<Bdf, u64>) -> Result<Outcome, NotFree> {
        let kernel = Arc::clone(&self.kernel);
        let failed = |error: Error| not_free(error, NotFree::GroupOpen);
        for bdf in left.keys() {
            // It would take the VFs away, from whoever has them.
            if host::has_vfs(&*kernel, *bdf).map_err(failed)? {
                return Ok(Outcome::Left(left));
            }
        }
        for (bdf, since) in &left {
            let driver = host::Device::scan(&*kernel, *bdf).map_err(failed)?.and_then(|d| d.driver);
            let mut before = None;
            let group = self.leases.get_mut(name).and_then(|lease| lease.group_of(*bdf));
            if let Some(group) = group {
                // Killed between unbind and bind, this keeper leaves a device with no driver.
                if let Some(driver) = &driver {
                    group.drivers.insert(*bdf, driver.clone());
                }
                before = group.drivers.get(bdf).cloned();
            }
            self.begin(name, "driver unbind", bdf.to_string());
            self.tell();
            // Nobody else could know which driver is to come back.
            self.save().map_err(|error| not_free(error, NotFree::GroupOpen))?;
            drivers::rebind(&*kernel, *bdf, *since, driver.as_deref(), before.as_deref())
                .map_err(not_rebound)?;
        }
        let waits =
            left.iter().find(|(bdf, since)| host::has_let_go(&*kernel, **bdf, **since) != Ok(true));
        match waits {
            None => Ok(Outcome::Free),
            Some((bdf, _)) => match host::registration(&*kernel, *bdf) {
                Ok(None) => Err(NotFree::DriverBinds(*bdf)),
                _ => Err(NotFree::DriverWaits(*bdf)),
            },
        }
    }
}

/// EBUSY as long as any process has a device of the group open.
fn detach(group: &Group) -> Result<(), NotFree> {
    match group.unset_container() {
        Ok(()) => Ok(()),
        // Its holder took it out already, or its devices have left VFIO.
        Err(error) if matches!(error.errno, Errno::EINVAL | Errno::ENODEV) => Ok(()),
        Err(error) => Err(not_free(error, NotFree::DeviceOpen)),
    }
}

pub(super) fn not_rebound(error: RebindError) -> NotFree {
    match error {
        RebindError::StillOpen(device) => NotFree::DriverWaits(device),
        error => NotFree::Kernel("driver unbind".into(), "sysfs".into(), error.to_string()),
    }
}

pub(super) fn not_free(error: Error, busy: fn(String) -> NotFree) -> NotFree {
    match error.errno {
        Errno::EBUSY => busy(error.object),
        errno => NotFree::Kernel(error.call.into(), error.object, errno.desc().into()),
    }
}

/// Whether all copies of the read end are closed, in whichever process.
fn has_hung_up(write_end: &OwnedFd) -> bool {
    let mut ask = [PollFd::new(write_end.as_fd(), PollFlags::empty())];
    let answered = poll(&mut ask, PollTimeout::ZERO);
    let events = ask[0].revents().unwrap_or(PollFlags::empty());
    answered.is_ok() && events.contains(PollFlags::POLLERR)
}
