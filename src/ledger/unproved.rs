//! What ended iommufd leases may have left. A device's own node can be open without being bound, and
//! the kernel shows that to nobody; whoever has it so can bind the device as soon as its next holder
//! lets go of it. So a device that was handed out by its node goes to its last tenant again, and to
//! another one only when its driver has gone meanwhile: that waits for the last open file.

use super::{Effect, Lease, LeaseId, Ledger, Member, Phase, Refusal, WantedGroup};
use crate::protocol::Bdf;
use std::collections::{BTreeMap, BTreeSet};

/// A group of which somebody may still have devices open by their own nodes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Unproved {
    /// Whose it was; nobody else can have the group.
    pub tenant: String,
    /// The last lease that had devices of it in that way.
    pub lease: LeaseId,
    /// What its holder called the VM.
    pub vm: String,
    /// The uid that acquired it.
    pub uid: u32,
    /// The process that acquired it.
    pub pid: i32,
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// The devices that are not proved yet, each with the number of its registration with VFIO.
    pub left: BTreeMap<Bdf, u64>,
    /// The group's devices on VFIO drivers, as they were when it was acquired.
    pub(super) members: Vec<Member>,
}

impl Ledger {
    /// The groups that their last tenant alone can have, with their numbers. Such a group can be in
    /// a lease of that tenant.
    pub fn unproved(&self) -> impl Iterator<Item = (u32, &Unproved)> {
        self.unproved.iter().map(|(id, unproved)| (*id, unproved))
    }

    /// Why a group is for its last tenant alone; `None` where it is not.
    pub fn unproved_group(&self, id: u32) -> Option<&Unproved> {
        self.unproved.get(&id)
    }

    /// Whether nothing that an ended lease left keeps a group from a tenant.
    pub fn is_open_to(&self, number: u32, tenant: &str) -> bool {
        self.unproved.get(&number).is_none_or(|unproved| unproved.tenant == tenant)
    }

    /// The group is free, but only for the tenant that had it.
    pub(super) fn unbound(
        &mut self,
        number: u32,
        at: u64,
        left: BTreeMap<Bdf, u64>,
    ) -> Result<Vec<Effect>, Refusal> {
        let Some(group) = self.groups.get(&number) else { return Ok(Vec::new()) };
        let lease = self.leases.get(&group.lease).filter(|lease| lease.phase == Phase::Ending);
        let Some(lease) = lease else { return Ok(Vec::new()) };
        if !left.is_empty() {
            let fresh = || Unproved {
                tenant: lease.tenant.clone(),
                lease: lease.id,
                vm: String::new(),
                uid: lease.uid,
                pid: lease.pid,
                since: at,
                left: BTreeMap::new(),
                members: Vec::new(),
            };
            let unproved = self.unproved.entry(number).or_insert_with(fresh);
            (unproved.lease, unproved.uid, unproved.pid) = (lease.id, lease.uid, lease.pid);
            unproved.vm.clone_from(&lease.vm);
            unproved.members.clone_from(&group.members);
            unproved.left.extend(left);
        }
        self.freed(number)
    }

    /// A device's node is closed everywhere. What was handed out of a later registration is not
    /// meant.
    pub(super) fn proved(
        &mut self,
        number: u32,
        device: Bdf,
        registration: u64,
    ) -> Result<Vec<Effect>, Refusal> {
        if let Some(unproved) = self.unproved.get_mut(&number) {
            unproved.left.retain(|bdf, from| (*bdf, *from) != (device, registration));
            if unproved.left.is_empty() {
                self.unproved.remove(&number);
            }
        }
        Ok(Vec::new())
    }

    pub(super) fn check_unproved(
        &self,
        lease: &Lease,
        group: u32,
        device: Bdf,
    ) -> Result<(), Refusal> {
        let foreign = !self.is_open_to(group, &lease.tenant);
        let Some(unproved) = self.unproved.get(&group).filter(|_| foreign) else { return Ok(()) };
        let left = unproved.left.keys().copied().collect();
        Err(Refusal::Unproved { device, group, since: unproved.since, left })
    }

    /// How many devices a tenant keeps from others without having them, beside those it wants now.
    pub(super) fn unproved_devices(&self, tenant: &str, wanted: &[WantedGroup]) -> usize {
        let theirs = || self.leases.values().filter(|lease| lease.tenant == tenant);
        let held = theirs().flat_map(|lease| &lease.devices);
        let adding = theirs().filter_map(|lease| lease.adding.as_ref());
        let held = held.chain(adding.flat_map(|adding| &adding.devices)).map(|handed| handed.bdf);
        let wanted = wanted.iter().flat_map(|group| group.devices.iter().chain(&group.withhold));
        let used: BTreeSet<Bdf> = held.chain(wanted.copied()).collect();
        let unproved = self.unproved.values().filter(|unproved| unproved.tenant == tenant);
        unproved.flat_map(|unproved| unproved.left.keys()).filter(|bdf| !used.contains(bdf)).count()
    }
}
