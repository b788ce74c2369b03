//! Opening what a lease gets, and closing it again where it is not delivered.

use super::container::Container;
use super::permit::Client;
use super::{Keeper, KeptLease};
use crate::host;
use crate::kernel::{self, Device, Group, Iommufd, Kernel, Node};
use crate::ledger::LeaseId;
use crate::process::keeper::{
    Changed, Failure, GroupState, LeaseRecord, LeaseState, LeasedGroup, Open, Opened, Phase,
    Reopen, Stage, Step, Undo,
};
use crate::protocol::{Bdf, FdKind, Handout};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What was opened and is nobody's yet.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// The link on which it was asked for: its end is the end of this.
    pub(super) link: u64,
    pub(super) container: Option<kernel::Container>,
    pub(super) groups: Vec<(u32, Group)>,
    pub(super) devices: Vec<(Bdf, Device)>,
    pub(super) iommufd: Option<Iommufd>,
    pub(super) cdevs: Vec<Cdev>,
    /// The groups whose files go to the holder.
    pub(super) deliver_groups: Vec<u32>,
    /// The lease as it was before, if it was there.
    before: Option<LeaseState>,
    /// The groups that are new to it.
    fresh: BTreeSet<u32>,
}

/// A device that was opened by its own node.
#[derive(Debug)]
pub(super) struct Cdev {
    pub(super) bdf: Bdf,
    pub(super) device: Device,
    /// Which registration of the device with VFIO that node is of.
    registration: u64,
}

impl Keeper {
    /// Opens what an acquisition gets. On an error nothing of it is left.
    pub(super) fn open(
        &mut self,
        link: u64,
        mut call: Open,
        client: &Client,
    ) -> Result<Opened, Failure> {
        self.permit(&mut call, client)?;
        let name = call.record.lease.clone();
        let before = self.admit(&call)?;
        let fresh = call.groups.iter().map(|group| group.id).collect();
        let deliver_groups = call.deliver_groups.clone();
        let mut pending = Pending { link, before, fresh, deliver_groups, ..Pending::default() };
        self.begin(&name, "open", describe(&call));
        let saved = self.save().map_err(Failure::from);
        let opened = saved.and_then(|()| self.carry_out(&call, &mut pending));
        let noted = opened.and_then(|()| self.note_registrations(&name, &pending));
        let lease = self.lease_mut(&name)?;
        lease.pending = Some(pending);
        match noted {
            Ok(()) => {
                lease.names.extend(call.names);
                self.done(&name);
                let iommu = self.container.as_ref().map_or("none", Container::iommu).into();
                Ok(Opened { iommu, state: self.told(&name)?.state })
            }
            Err(failure) => {
                self.undo_pending(&name);
                Err(failure)
            }
        }
    }

    /// Opens anew what a lease has and the keeper has not.
    pub(super) fn reopen(&mut self, link: u64, call: Reopen) -> Result<Changed, Failure> {
        let Reopen { lease: name, wanted } = call;
        let lease = self.lease(&name)?;
        if lease.state.phase != Phase::Held || lease.pending.is_some() {
            return Err(Failure::NoSuchLease);
        }
        let before = Some(lease.state.clone());
        let mut pending = Pending { link, before, ..Pending::default() };
        self.begin(&name, "open", name.clone());
        let opened = self
            .reopen_wanted(&name, &|kind, which| wanted.includes(kind, which), &mut pending)
            .and_then(|()| self.note_registrations(&name, &pending));
        self.lease_mut(&name)?.pending = Some(pending);
        match opened {
            Ok(()) => {
                self.done(&name);
                self.told(&name)
            }
            Err(failure) => {
                self.undo_pending(&name);
                Err(failure)
            }
        }
    }

    /// Closes what was opened for a lease and not delivered.
    pub(super) fn undo(&mut self, call: &Undo) -> Result<Changed, Failure> {
        self.lease(&call.lease)?;
        self.undo_pending(&call.lease);
        self.told(&call.lease)
    }

    /// Closes what was asked for on a link that has ended.
    pub(super) fn undo_of_link(&mut self, link: u64) {
        let is_its = |lease: &&KeptLease| lease.pending.as_ref().is_some_and(|p| p.link == link);
        let those = self.leases.values().filter(is_its).map(|l| l.state.record.lease.clone());
        for name in those.collect::<Vec<_>>() {
            self.undo_pending(&name);
        }
    }

    /// Enters a lease, or its new groups. Returns what it was before.
    fn admit(&mut self, call: &Open) -> Result<Option<LeaseState>, Failure> {
        let name = &call.record.lease;
        let known = self.leases.get(name);
        let is_other = known.is_some() != call.extends;
        if is_other
            || known
                .is_some_and(|lease| lease.state.phase != Phase::Held || lease.pending.is_some())
        {
            return Err(Failure::NoSuchLease);
        }
        check_record(call, known.map(|lease| &lease.state.record))?;
        self.check_space(&call.record)?;
        let before = known.map(|lease| lease.state.clone());
        let fresh = call.groups.iter().cloned().map(group_state);
        match self.leases.get_mut(name) {
            Some(lease) => {
                lease.state.record = call.record.clone();
                lease.state.groups.extend(fresh);
            }
            None => {
                let state = new_state(call.record.clone(), fresh.collect());
                self.leases.insert(name.clone(), KeptLease::new(state));
            }
        }
        Ok(before)
    }

    /// Whoever has the files of an address space reaches all of it: it is one lease's, or one shared
    /// container's.
    fn check_space(&self, record: &LeaseRecord) -> Result<(), Failure> {
        let mut others = self.leases.values().map(|lease| &lease.state.record);
        let is_shared =
            |other: &LeaseRecord| other.container.is_some() && other.container == record.container;
        match others.all(|other| other.lease == record.lease || is_shared(other)) {
            true => Ok(()),
            false => Err(bad("container", "this address space is another lease's")),
        }
    }

    fn carry_out(&mut self, call: &Open, pending: &mut Pending) -> Result<(), Failure> {
        let node = |id: u32| {
            let group = call.groups.iter().find(|group| group.id == id);
            node(id, group.is_some_and(|group| group.noiommu))
        };
        for step in &call.steps {
            match *step {
                Step::OpenContainer => {
                    if self.container.is_none() {
                        self.container = Some(Container::open(&self.kernel)?);
                    }
                }
                Step::OpenIommufd => pending.iommufd = Some(open_iommufd(&self.kernel)?),
                // An open group would keep its devices from being bound.
                Step::CheckGroup(id) => drop(self.open_group(node(id), id)?),
                Step::OpenGroup(id) => {
                    let group = self.open_group(node(id), id)?;
                    pending.groups.push((id, group));
                }
                Step::Attach(id) => {
                    let group = pending.groups.iter().find(|(number, _)| *number == id);
                    let noiommu = call.record.noiommu;
                    if let (Some(container), Some((_, group))) = (&mut self.container, group) {
                        container.enter(id, group, noiommu)?;
                        if let Some(group) = self.lease_mut(&call.record.lease)?.group_state(id) {
                            group.attached = true;
                        }
                    }
                }
                Step::OpenDevice(id, bdf) => {
                    let kept = &self.lease(&call.record.lease)?.groups;
                    let fresh = pending.groups.iter().find(|(number, _)| *number == id);
                    if let Some(group) = fresh.map(|(_, group)| group).or_else(|| kept.get(&id)) {
                        let name = call.names.get(&bdf).cloned();
                        let name = name.unwrap_or_else(|| bdf.to_string());
                        pending.devices.push((bdf, group.device(&name)?));
                    }
                }
                Step::OpenCdev(_, bdf) => pending.cdevs.push(open_cdev(&self.kernel, bdf)?),
            }
        }
        // Plan and open are two looks: what has come between them is seen by this one, and while these
        // files are open nothing else can come.
        for group in &call.groups {
            check_members(&*self.kernel, &call.record, group.id)?;
        }
        Ok(())
    }

    fn open_group(&self, node: Node, id: u32) -> Result<Group, Failure> {
        let group = Group::open(Arc::clone(&self.kernel), node)?;
        if group.status()?.viable {
            return Ok(group);
        }
        let now = host::Group::scan(&*self.kernel, id)?;
        let blocked = now.is_some_and(|group| !group.blockers(|_| false).is_empty());
        Err(if blocked { Failure::NotViable(id) } else { Failure::Owned(id) })
    }

    fn reopen_wanted(
        &mut self,
        name: &str,
        wants: &dyn Fn(FdKind, &str) -> bool,
        pending: &mut Pending,
    ) -> Result<(), Failure> {
        let lease = self.lease(name)?;
        let LeaseState { record, groups, .. } = &lease.state;
        let used = record.devices.iter().filter(|device| !device.withheld);
        match record.handout {
            Handout::Group => {
                for GroupState { group, .. } in groups {
                    if wants(FdKind::Group, &group.id.to_string()) {
                        let node = node(group.id, group.noiommu);
                        let file = Group::open(Arc::clone(&self.kernel), node)?;
                        check_members(&*self.kernel, record, group.id)?;
                        pending.groups.push((group.id, file));
                        pending.deliver_groups.push(group.id);
                    }
                }
                // Whoever opens nodes by itself asks for one by kind; to all others it means nothing.
                if wants(FdKind::Container, "") && !wants(FdKind::Group, "") {
                    let container = kernel::Container::open(Arc::clone(&self.kernel))?;
                    pending.container = Some(container);
                }
            }
            Handout::Devices => {
                for device in used.filter(|d| wants(FdKind::Device, &d.bdf.to_string())) {
                    if let Some(group) = lease.groups.get(&device.group) {
                        let file = group.device(&lease.name(device.bdf))?;
                        pending.devices.push((device.bdf, file));
                    }
                }
            }
            Handout::Iommufd => {
                if wants(FdKind::Iommufd, "") {
                    pending.iommufd = Some(open_iommufd(&self.kernel)?);
                }
                for device in used.filter(|d| wants(FdKind::Cdev, &d.bdf.to_string())) {
                    let cdev = open_cdev(&self.kernel, device.bdf)?;
                    check_members(&*self.kernel, record, device.group)?;
                    pending.cdevs.push(cdev);
                }
            }
            Handout::Container => {}
        }
        Ok(())
    }

    /// Writes down which registrations somebody may have open from now on.
    fn note_registrations(&mut self, name: &str, pending: &Pending) -> Result<(), Failure> {
        let lease = self.lease_mut(name)?;
        for cdev in &pending.cdevs {
            let devices = &lease.state.record.devices;
            let group = devices.iter().find(|device| device.bdf == cdev.bdf).map(|d| d.group);
            if let Some(group) = group.and_then(|id| lease.group_state(id)) {
                group.registrations.insert(cdev.bdf, cdev.registration);
            }
        }
        if !pending.cdevs.is_empty() {
            self.save()?;
        }
        Ok(())
    }

    /// Closes what is pending, the last first. Nobody else has a copy yet, so closing a group takes it
    /// out of its container too, and nothing of this can fail.
    pub(super) fn undo_pending(&mut self, name: &str) {
        let Some(pending) = self.leases.get_mut(name).and_then(|l| l.pending.take()) else {
            return;
        };
        let Pending { container, groups, devices, iommufd, cdevs, before, fresh, .. } = pending;
        cdevs.into_iter().rev().for_each(drop);
        drop(iommufd);
        devices.into_iter().rev().for_each(drop);
        for (id, group) in groups.into_iter().rev() {
            // Where it shares the container with others it may not be the last copy that detaches it.
            let _ = group.unset_container();
            drop(group);
            if let Some(container) = &mut self.container {
                container.leave(id);
            }
        }
        drop(container);
        self.close_empty_container();
        match before {
            None => self.forget(name),
            Some(before) => {
                if let Some(lease) = self.leases.get_mut(name) {
                    lease.state.record = before.record;
                    lease.state.groups.retain(|group| !fresh.contains(&group.group.id));
                    // What was never delivered is in no registration that somebody may have.
                    for group in &mut lease.state.groups {
                        let was = before.groups.iter().find(|w| w.group.id == group.group.id);
                        group.registrations =
                            was.map_or(BTreeMap::new(), |was| was.registrations.clone());
                    }
                }
                self.done(name);
            }
        }
        // What stands there too much keeps a device from others until it is proved free, no more.
        let _ = self.save();
    }

    pub(super) fn close_empty_container(&mut self) {
        if self.container.as_ref().is_some_and(Container::is_empty) {
            self.container = None;
        }
    }
}

impl KeptLease {
    pub(super) fn new(state: LeaseState) -> Self {
        Self {
            state,
            groups: BTreeMap::new(),
            names: BTreeMap::new(),
            lifelines: Vec::new(),
            mappings: BTreeMap::new(),
            pending: None,
            unset: BTreeSet::new(),
            attempts: super::Attempts::default(),
            force_at: None,
        }
    }
}

fn new_state(record: LeaseRecord, groups: Vec<GroupState>) -> LeaseState {
    let (revision, phase) = (0, Phase::Opening);
    let (call, revoking) = (None, None);
    LeaseState { revision, record, phase, lifelines: 0, mappings: 0, groups, call, revoking }
}

fn group_state(group: LeasedGroup) -> GroupState {
    let (registrations, drivers) = Default::default();
    GroupState { group, attached: false, registrations, drivers, stage: Stage::Held }
}

pub(super) fn node(id: u32, noiommu: bool) -> Node {
    if noiommu { Node::NoIommuGroup(id) } else { Node::Group(id) }
}

/// A lease that is there stays as it is, but for devices that are added. A new one is called what the next
/// broker understands: it could not begin otherwise.
fn check_record(call: &Open, known: Option<&LeaseRecord>) -> Result<(), Failure> {
    let Some(known) = known else {
        let LeaseRecord { lease, key, .. } = &call.record;
        let is_key = key.len() == 32 && key.bytes().all(|byte| byte.is_ascii_hexdigit());
        return match lease.parse::<LeaseId>().is_ok() && is_key {
            true => Ok(()),
            false => Err(bad("record", "its lease or key is none")),
        };
    };
    let LeaseRecord { rebind, devices, .. } = known.clone();
    let as_known = LeaseRecord { rebind, devices, ..call.record.clone() };
    let keeps_all = known.devices.iter().all(|device| call.record.devices.contains(device));
    match as_known == *known && keeps_all {
        true => Ok(()),
        false => Err(bad("record", "the lease is another one than the broker says")),
    }
}

fn bad(field: &str, reason: &str) -> Failure {
    Failure::Bad { field: field.into(), reason: reason.into() }
}

fn describe(call: &Open) -> String {
    let each = call.record.devices.iter().map(|device| device.bdf.to_string());
    each.collect::<Vec<_>>().join(" ")
}

/// Whether the devices of a lease are where it has them: numbers and addresses pass to others as a
/// host's devices come and go, but not while one has the file open.
fn check_members(kernel: &dyn Kernel, record: &LeaseRecord, group: u32) -> Result<(), Failure> {
    for device in record.devices.iter().filter(|device| device.group == group) {
        if host::find(kernel, device.bdf)? != host::Place::Group(group) {
            let why = format!("it is no longer in group {group}, which the lease has");
            return Err(Failure::Moved { what: device.bdf.to_string(), why });
        }
    }
    Ok(())
}

/// A new iommufd that charges each process for what it pins itself, not all of a user's together.
fn open_iommufd(kernel: &Arc<dyn Kernel>) -> Result<Iommufd, Failure> {
    let iommufd = Iommufd::open(Arc::clone(kernel))?;
    match iommufd.set_rlimit_mode(true) {
        // A kernel that has no such option.
        Err(error) if matches!(error.errno, Errno::EOPNOTSUPP | Errno::ENOTTY) => {}
        done => done?,
    }
    Ok(iommufd)
}

/// Opens a device by its own node, unbound.
fn open_cdev(kernel: &Arc<dyn Kernel>, bdf: Bdf) -> Result<Cdev, Failure> {
    let number = host::cdev(&**kernel, bdf)?.ok_or(Failure::NoCdev(bdf))?;
    let device = Device::open_cdev(Arc::clone(kernel), number, &bdf.to_string())?;
    // A node's number can be another device's by now. From here on this one has its own, and its driver
    // can't go.
    let registration = host::registration(&**kernel, bdf)?;
    match (registration, host::cdev(&**kernel, bdf)?) {
        (Some(registration), Some(now)) if now == number => Ok(Cdev { bdf, device, registration }),
        _ => {
            let why = "its driver was just taken away; try again".into();
            Err(Failure::Moved { what: bdf.to_string(), why })
        }
    }
}
