//! Leases and Topology: who has what, as far as the caller may know.

use super::access::CallersTenant;
use super::books::Books;
use super::steps::GROUPS;
use super::{Broker, Caller, container_name, devices};
use crate::host::{self, Survey, group_ids};
use crate::kernel::Node;
use crate::ledger::{self, GroupState as Stage, LeaseId, Phase};
use crate::policy::{Tenant, Verb};
use crate::protocol::{Device, Error, Group, GroupState, Groups, Lease, LeaseList, Unproved};
use std::rc::Rc;
use std::time::Instant;

/// How many leases are looked at in one step of a list.
const LEASES: usize = 32;

/// Groups that are still to be listed for one caller.
#[derive(Debug)]
pub struct Tour {
    ids: std::vec::IntoIter<u32>,
    since: Instant,
    survey: Rc<Survey>,
}

impl Tour {
    /// Whether nothing is left.
    pub fn is_over(&self) -> bool {
        self.ids.as_slice().is_empty()
    }
}

impl Broker {
    /// The leases the caller may see. Never blocks.
    ///
    /// # Errors
    /// The caller is no tenant.
    pub fn leases(&self, caller: &Caller) -> Result<LeaseList, Error> {
        let (mut leases, mut after) = (Vec::new(), None);
        loop {
            leases.extend(self.leases_after(caller, &mut after)?);
            if after.is_none() {
                return Ok(LeaseList { leases });
            }
        }
    }

    /// Some of the leases the caller may see: those behind `after`, which becomes the last one looked
    /// at, or `None` at the end. Never blocks.
    ///
    /// # Errors
    /// The caller is no tenant.
    pub fn leases_after(
        &self,
        caller: &Caller,
        after: &mut Option<LeaseId>,
    ) -> Result<Vec<Lease>, Error> {
        if !self.administers(caller) {
            self.tenant(caller)?;
        }
        let books = self.books();
        let some: Vec<_> = books.ledger.leases_after(*after).take(LEASES).collect();
        *after = some.last().filter(|_| some.len() == LEASES).map(|lease| lease.id);
        let live = some.into_iter().filter(|lease| {
            lease.phase == Phase::Held
                || self.shown_revocation(&books, lease.id).is_some_and(|it| it.forced)
        });
        let seen = live.filter(|lease| self.may_see(caller, &lease.tenant));
        Ok(seen.map(|lease| self.describe(&books, lease)).collect())
    }

    /// Whether there is such a lease, live or being taken back, that the caller may see. Never
    /// blocks.
    pub fn shows(&self, caller: &Caller, lease: &str) -> bool {
        let Ok(id) = lease.parse() else { return false };
        let tenant = self.books().ledger.lease(id).map(|lease| lease.tenant.clone());
        tenant.is_some_and(|tenant| self.may_see(caller, &tenant))
    }

    /// All leases that are held. Never blocks.
    pub fn held(&self) -> Vec<Lease> {
        let books = self.books();
        let held = books.ledger.leases().filter(|lease| lease.phase == Phase::Held);
        held.map(|lease| self.describe(&books, lease)).collect()
    }

    /// The groups the caller may see: those with a device it may have; all of them with the right to
    /// observe, and for an administrator. Reads sysfs.
    ///
    /// # Errors
    /// The caller is no tenant and no administrator, or sysfs can't be read.
    pub fn topology(&self, caller: &Caller) -> Result<Groups, Error> {
        let mut tour = self.tour(caller)?;
        let mut groups = Vec::new();
        while !tour.is_over() {
            groups.extend(self.next_groups(caller, &mut tour)?);
        }
        Ok(Groups { groups })
    }

    /// Begins to list the groups the caller may see. Reads sysfs.
    ///
    /// # Errors
    /// As [`topology`](Self::topology).
    pub fn tour(&self, caller: &Caller) -> Result<Tour, Error> {
        self.viewer(caller)?;
        let since = Instant::now();
        self.look_for_proof("", |_| true);
        let ids = group_ids(&*self.kernel)?.into_iter();
        Ok(Tour { ids, since, survey: self.shared_survey() })
    }

    /// Some of the groups that are left; there may be none among those that were read. Reads sysfs.
    ///
    /// # Errors
    /// As [`topology`](Self::topology).
    pub fn next_groups(&self, caller: &Caller, tour: &mut Tour) -> Result<Vec<Group>, Error> {
        let viewer = self.viewer(caller)?;
        let viewer = viewer.as_deref();
        let policy = self.policy();
        let observes = self.administers(caller)
            || viewer.is_some_and(|tenant| policy.may(tenant, Verb::Observe).allowed);
        let serials = policy.names_serials().then(|| policy.serials());
        let books = self.books();
        let mut seen = Vec::new();
        for id in tour.ids.by_ref().take(GROUPS) {
            let is_taken = books.ledger.group(id).is_some();
            let group = tour.survey.group(&*self.kernel, id, tour.since, is_taken, serials)?;
            seen.extend(group.filter(|group| observes || self.any_allowed(viewer, group)));
        }
        let groups = seen.iter();
        Ok(groups.map(|group| self.describe_group(caller, viewer, group, &books)).collect())
    }

    /// The tenant that looks; `None` for an administrator that the policy has no tenant for.
    fn viewer(&self, caller: &Caller) -> Result<Option<CallersTenant>, Error> {
        match self.tenant(caller) {
            Err(_) if self.administers(caller) => Ok(None),
            tenant => tenant.map(Some),
        }
    }

    fn any_allowed(&self, viewer: Option<&Tenant>, group: &host::Group) -> bool {
        group.devices.iter().any(|device| self.allows(viewer, device))
    }

    fn allows(&self, viewer: Option<&Tenant>, device: &host::Device) -> bool {
        viewer.is_some_and(|tenant| self.policy().device(tenant, &device.facts).allowed)
    }

    fn describe_group(
        &self,
        caller: &Caller,
        viewer: Option<&Tenant>,
        group: &host::Group,
        books: &Books,
    ) -> Group {
        let ledger = &books.ledger;
        let known = ledger.group(group.id);
        let lease = known.and_then(|known| ledger.lease(known.lease));
        let lease = lease.filter(|lease| self.may_see(caller, &lease.tenant));
        let is_open = match viewer {
            Some(tenant) => ledger.is_open_to(group.id, &tenant.name),
            None => ledger.unproved_group(group.id).is_none(),
        };
        let state = match known.map(|known| &known.state) {
            None if !is_open => GroupState::Quarantined,
            None => GroupState::Free,
            Some(Stage::Acquiring | Stage::Held) => GroupState::Held,
            Some(Stage::Reclaiming { .. }) => GroupState::Reclaiming,
            Some(Stage::Quarantined { .. }) => GroupState::Quarantined,
        };
        let device = |device: &host::Device| {
            let bdf = device.bdf();
            let has = |lease: &&ledger::Lease| lease.devices.iter().any(|h| h.bdf == bdf);
            Device {
                bdf: bdf.to_string(),
                vendor: format!("{:04x}", device.facts.vendor),
                device: format!("{:04x}", device.facts.device),
                class: format!("{:06x}", device.facts.class),
                driver: device.driver.clone(),
                vfio: device.on_vfio,
                cdev: device.cdev.map(|number| Node::Cdev(number).to_string()),
                lease: lease.filter(has).map(|lease| lease.id.to_string()),
            }
        };
        // A tenant is not shown how to take what the policy does not give it: the host may need that. Who only
        // looks after the host is.
        let may_take = |device: &_| viewer.is_none() || self.allows(viewer, device);
        let blockers = group.blockers(may_take);
        let unproved = ledger.unproved_group(group.id);
        let unproved = unproved.filter(|left| self.may_see(caller, &left.tenant));
        let is_seen = lease.is_some() || unproved.is_some();
        Group {
            open_in: is_seen.then(|| self.open_in(books, group.id)).flatten(),
            id: group.id,
            viable: blockers.is_empty(),
            state,
            blockers,
            unproved: unproved.map(|left| Unproved {
                tenant: left.tenant.clone(),
                lease: left.lease.to_string(),
                vm: left.vm.clone(),
                since: left.since,
                devices: left.left.keys().map(ToString::to_string).collect(),
            }),
            devices: group.devices.iter().map(device).collect(),
        }
    }

    fn describe(&self, books: &Books, lease: &ledger::Lease) -> Lease {
        let entry = books.entries.get(&lease.id);
        let mapped = lease.mapped();
        Lease {
            lease: lease.id.to_string(),
            vm: lease.vm.clone(),
            tenant: lease.tenant.clone(),
            uid: lease.uid,
            pid: lease.pid,
            backend: lease.handout.backend(),
            handout: lease.handout,
            container: container_name(lease),
            devices: devices(lease, false),
            withheld: devices(lease, true),
            mappings: mapped.map(|(count, _)| count),
            mapped_bytes: mapped.map(|(_, bytes)| bytes),
            since: lease.since,
            policy: entry.and_then(|entry| entry.objection.borrow().clone()),
            revoked: self.shown_revocation(books, lease.id),
        }
    }
}
