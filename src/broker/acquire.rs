//! Acquire: the whole of it, or nothing.

use super::access::quota;
use super::books::{Books, Entry, Files};
use super::fds::{Named, list};
use super::form::gives_container;
use super::given::Before;
use super::key::new_lease_id;
use super::open::Opened;
use super::plan::{Chosen, Plan};
use super::{
    Broker, Caller, Grant, container_name, devices, error, event, lifeline, no_such_lease, now,
    space,
};
use crate::host;
use crate::kernel::{Group, IommuType};
use crate::ledger::{self, Effect, GroupState, Lease, LeaseId, Refusal, Request, Space};
use crate::policy::{Tenant, Verb};
use crate::protocol::{Acquire, Acquired, DeviceSpec, Error, EventKind, FdKind, Handout};
use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

impl Broker {
    /// Gives devices to a new lease, or adds them to one; all or nothing.
    ///
    /// # Errors
    /// Nothing was changed: what had been done is undone.
    pub fn acquire(&self, caller: &Caller, request: &Acquire) -> Result<Grant, Error> {
        self.acquire_while(caller, request, &|| true)
    }

    /// The same for a caller who may lose patience: what nobody waits for any more is undone.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire).
    pub fn acquire_while(
        &self,
        caller: &Caller,
        request: &Acquire,
        awaited: &dyn Fn() -> bool,
    ) -> Result<Grant, Error> {
        let tenant = self.tenant(caller)?;
        self.policy.may(tenant, Verb::Acquire).ok()?;
        match (&request.lease, &request.key) {
            (Some(lease), Some(key)) => {
                let entry = self.authorize(caller, lease, key)?;
                self.extend(caller, tenant, request, &entry, awaited)
            }
            (None, None) => self.begin(caller, tenant, request, awaited),
            _ => Err(Error::bad("lease", "lease and key come together")),
        }
    }

    fn begin(
        &self,
        caller: &Caller,
        tenant: &Tenant,
        request: &Acquire,
        awaited: &dyn Fn() -> bool,
    ) -> Result<Grant, Error> {
        let plan = self.plan_patiently(tenant, request, None)?;
        let (id, at) = (new_lease_id()?, now());
        let entry = Entry::new(id, &tenant.name, self.space(&plan), self.contested())?;
        let (effects, chosen) = self.enter(caller, &entry, &plan, |chosen| {
            Request::Acquire(ledger::Acquire {
                lease: id,
                tenant: tenant.name.clone(),
                vm: request.vm.clone(),
                uid: caller.peer.uid,
                pid: caller.peer.pid,
                at,
                handout: plan.handout,
                space: plan.space.clone(),
                groups: chosen.groups.clone(),
                quota: quota(&tenant.limits),
            })
        })?;
        let entry = Arc::new(entry);
        self.carry_out(&entry, entry.files(), &effects, chosen, (EventKind::Acquired, awaited))
    }

    fn extend(
        &self,
        caller: &Caller,
        tenant: &Tenant,
        request: &Acquire,
        entry: &Arc<Entry>,
        awaited: &dyn Fn() -> bool,
    ) -> Result<Grant, Error> {
        if tenant.name != entry.tenant {
            return Err(error::another_tenants(entry.id));
        }
        let files = entry.files();
        let lease = self.books().ledger.live(entry.id).cloned();
        let lease = lease.ok_or_else(|| no_such_lease(entry.id))?;
        let plan = self.plan_patiently(tenant, request, Some(&lease))?;
        let (effects, chosen) = self.enter(caller, entry, &plan, |chosen| {
            let (groups, quota) = (chosen.groups.clone(), quota(&tenant.limits));
            Request::Extend(ledger::Extend { lease: entry.id, groups, quota })
        })?;
        self.carry_out(entry, files, &effects, chosen, (EventKind::Extended, awaited))
    }

    /// A plan, also where a device is without a driver or without its own node just now because it is
    /// being taken back.
    fn plan_patiently(
        &self,
        tenant: &Tenant,
        request: &Acquire,
        lease: Option<&Lease>,
    ) -> Result<Plan, Error> {
        let deadline = Instant::now() + self.patience.iter().sum();
        let mut seen_free = false;
        loop {
            let before = standing(&self.books());
            let result = self.plan(tenant, request, lease);
            let named = match &result {
                Ok(plan) => plan.named_groups(),
                Err(_) => self.named_groups(request)?,
            };
            let books = self.books();
            let left = deadline.saturating_duration_since(Instant::now());
            // While it is bound again a device looks as if this host had no cdevs.
            let doubtful =
                matches!(result, Ok(_) | Err(Error::NotViable { .. } | Error::Unsupported { .. }));
            let now = standing(&books);
            if doubtful && !left.is_zero() {
                if named.iter().any(|id| now.get(id) == Some(&Standing::Reclaiming)) {
                    drop(self.changed.wait_timeout(books, left));
                    continue;
                }
                // It came to an end while the machine was looked at.
                if named.iter().any(|id| now.get(id) != before.get(id)) {
                    continue;
                }
            }
            let error = match result {
                Err(error @ Error::NotViable { .. }) => error,
                done => return done,
            };
            let Error::NotViable { group, blockers } = &error else { return Err(error) };
            let over = match books.ledger.group(*group).map(|group| &group.state) {
                Some(GroupState::Quarantined { .. }) => true,
                Some(GroupState::Reclaiming { .. }) => false,
                // It may have come back between the two looks.
                None if !seen_free => {
                    seen_free = true;
                    continue;
                }
                _ => return Err(error),
            };
            if over || left.is_zero() {
                let device = blockers.first().map_or(format!("group {group}"), |b| b.bdf.clone());
                return Err(self.not_free(tenant, &books, device, *group).unwrap_or(error));
            }
            drop(self.changed.wait_timeout(books, left));
        }
    }

    /// The groups of the devices that are named by their addresses.
    fn named_groups(&self, request: &Acquire) -> Result<Vec<u32>, Error> {
        let all = request.devices.iter().chain(request.withhold.iter().flatten());
        let mut groups = Vec::new();
        for spec in all {
            let DeviceSpec::Bdf { bdf } = spec else { continue };
            if let host::Place::Group(id) = host::find(&*self.kernel, *bdf)? {
                groups.push(id);
            }
        }
        Ok(groups)
    }

    fn space(&self, plan: &Plan) -> Option<Arc<space::Space>> {
        match &plan.space {
            Space::None => None,
            Space::Own => Some(Arc::default()),
            Space::Shared { name, .. } => Some(self.books().shared_space(name)),
        }
    }

    /// Chooses the devices and enters them, in one go: from then on they are nobody else's.
    fn enter(
        &self,
        caller: &Caller,
        entry: &Entry,
        plan: &Plan,
        request: impl Fn(&Chosen) -> Request,
    ) -> Result<(Vec<Effect>, Chosen), Error> {
        self.look_for_proof(&entry.tenant, |group| plan.concerns(group));
        let mut books = self.books();
        // A VM that is started again finds its devices being taken back from its last run: that is
        // over soon, one way or the other.
        let deadline = Instant::now() + self.patience.iter().sum();
        loop {
            let chosen = self.choose(caller, &books, plan, entry)?;
            let kept = match plan.handout {
                Handout::Iommufd => 1,
                _ => chosen.groups.len() + 2, // a container and a lease pipe
            };
            self.check_kept(&books, &entry.tenant, kept as u64)?;
            let left = deadline.saturating_duration_since(Instant::now());
            let refusal = match books.ledger.apply(request(&chosen)) {
                Ok(effects) => return Ok((effects, chosen)),
                Err(refusal) => refusal,
            };
            let soon = match refusal {
                Refusal::NotYet { .. } => true,
                Refusal::Busy { holder, .. } => books.is_abandoned(holder),
                _ => false,
            };
            if !soon || left.is_zero() {
                return Err(self.refused(caller, &books, refusal));
            }
            let waited = self.changed.wait_timeout(books, left);
            books = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn carry_out(
        &self,
        entry: &Arc<Entry>,
        mut files: MutexGuard<'_, Files>,
        effects: &[Effect],
        chosen: Chosen,
        (kind, awaited): (EventKind, &dyn Fn() -> bool),
    ) -> Result<Grant, Error> {
        let (mut opened, mut before) = (Opened::default(), Before::new());
        let done = self
            .open(entry, &files, effects, &chosen, &mut opened)
            .and_then(|()| if awaited() { Ok(()) } else { Err(too_late(entry.id)) })
            .and_then(|()| self.remember(entry.id, &opened.registrations(&chosen)))
            .map(|was| before = was)
            .and_then(|()| self.hand_over(entry, &mut files, &chosen, &mut opened, kind));
        if done.is_err() {
            opened.undo(entry);
            self.forget(before);
            // The ledger knows this lease and that it is being acquired; it can't refuse.
            let _ = self.books().ledger.apply(Request::Abort { lease: entry.id });
        }
        done
    }

    /// Everything is open: what can still fail comes first, then the lease is its holder's.
    fn hand_over(
        &self,
        entry: &Arc<Entry>,
        files: &mut Files,
        chosen: &Chosen,
        opened: &mut Opened,
        kind: EventKind,
    ) -> Result<Grant, Error> {
        let lease = self.books().ledger.lease(entry.id).cloned();
        let lease = lease.ok_or_else(|| no_such_lease(entry.id))?;
        let mut fds = Vec::new();
        if kind == EventKind::Acquired && gives_container(&lease) {
            fds.extend(Named::container(&lease, entry).map(Named::copied).transpose()?);
        }
        if lease.handout == Handout::Container {
            for wanted in &chosen.groups {
                let fresh = opened.groups.iter().find(|(id, _)| *id == wanted.id);
                let group = fresh.map(|(_, group)| group).or_else(|| files.group(wanted.id));
                if let Some(group) = group {
                    fds.push(Named::group(wanted.id, lifeline::copy(group)?));
                }
            }
        }
        let is_shared = gives_container(&lease);
        if let Some(space) = entry.space.as_ref().filter(|_| is_shared) {
            space.share(&entry.contested)?;
        }
        let (theirs, lease) = self.open_lifeline(entry, |books| {
            books.ledger.apply(Request::Commit { lease: entry.id })?;
            books.entries.insert(entry.id, Arc::clone(entry));
            books.ledger.live(entry.id).cloned().ok_or(Refusal::NoSuchLease(entry.id))
        })?;
        if lease.handout == Handout::Group {
            let groups = opened.groups.drain(..);
            fds.extend(groups.map(|(id, group)| Named::group(id, group.into())));
        }
        let kept = |group: Group| match is_shared {
            true => group.through(&entry.contested),
            false => group,
        };
        files.groups.extend(opened.groups.drain(..).map(|(id, group)| (id, Arc::new(kept(group)))));
        files.names.extend(chosen.names.clone());
        let given = opened.devices.drain(..);
        fds.extend(given.map(|(bdf, device)| Named::device(bdf, device.into())));
        fds.extend(opened.iommufd.take().map(Named::iommufd));
        for (bdf, cdev) in opened.cdevs.drain(..) {
            files.registrations.insert(bdf, cdev.registration);
            fds.push(Named::cdev(bdf, cdev));
        }
        fds.push(Named { kind: FdKind::Lease, name: String::new(), fd: theirs });
        self.tell(&event(kind, &lease, devices(&lease, false)));
        let (described, fds) = list(fds);
        let reply = Acquired {
            lease: entry.id.to_string(),
            key: entry.key.to_hex(),
            tenant: lease.tenant.clone(),
            backend: lease.handout.backend(),
            handout: lease.handout,
            iommu: entry.space.as_ref().map_or("none", |space| iommu_name(space.iommu())).into(),
            container: container_name(&lease),
            devices: chosen.devices.iter().map(|(bdf, _)| bdf.to_string()).collect(),
            fds: described,
        };
        Ok(Grant { reply, fds })
    }
}

/// How a group that is not free stands, as far as that says whether what is seen of its devices can be
/// relied on.
#[derive(PartialEq, Eq)]
enum Standing {
    Reclaiming,
    Of(LeaseId),
}

fn standing(books: &Books) -> BTreeMap<u32, Standing> {
    let of = |group: &ledger::Group| match group.state {
        GroupState::Reclaiming { .. } => Standing::Reclaiming,
        _ => Standing::Of(group.lease),
    };
    books.ledger.groups().map(|(id, group)| (id, of(group))).collect()
}

/// Told to nobody: whoever asked has left.
fn too_late(id: LeaseId) -> Error {
    Error::Conflict { what: id.to_string(), why: "nobody waits for its devices any more".into() }
}

fn iommu_name(kind: Option<IommuType>) -> &'static str {
    match kind {
        Some(IommuType::Type1) => "type1",
        Some(IommuType::Type1v2) => "type1v2",
        Some(IommuType::NoIommu) => "noiommu",
        Some(IommuType::Other(_)) => "other",
        None => "none",
    }
}
