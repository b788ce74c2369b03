//! The errors that clients are told of: each is made here, out of what the kernel, the policy and the
//! ledger say. They are data; what to do about them is [`advice`]'s.

mod advice;

pub use advice::advice;

use super::books::Books;
use super::plan::Chosen;
use super::{Broker, Caller};
use crate::kernel;
use crate::ledger::{GroupState, Lease, LeaseId, NotFree, Refusal, Unproved};
use crate::policy::{self, Tenant};
use crate::protocol::{Bdf, Error, Holder, Until};
use nix::errno::Errno;
use std::time::Duration;

impl From<kernel::Error> for Error {
    fn from(error: kernel::Error) -> Self {
        let kernel::Error { call, object, errno, note } = error;
        failed(call, object, errno, note)
    }
}

fn failed(call: &str, object: String, errno: Errno, note: Option<Box<str>>) -> Error {
    let name = format!("{errno:?}");
    Error::Kernel { call: call.into(), object, errno: errno as i32, name, note }
}

/// An error of a system call of ours that is not about VFIO.
pub(super) fn system(call: &'static str, object: &str, errno: Errno) -> Error {
    kernel::Error::new(call, object, errno).into()
}

/// The kernel has not come back from a client's call in time.
pub(crate) fn unanswered(call: &str, object: String, deadline: Duration) -> Error {
    let note = format!(
        "the kernel has not answered within {} s; what it still does is undone when it is done",
        deadline.as_secs_f32()
    );
    failed(call, object, Errno::ETIMEDOUT, Some(note.into()))
}

/// A client's call ended without an answer.
pub(crate) fn bug(call: &str, object: String) -> Error {
    failed(call, object, Errno::EIO, Some("a bug of the broker".into()))
}

/// There are no random numbers.
pub(super) fn no_random(error: &getrandom::Error) -> Error {
    Error::Kernel {
        call: "getrandom".into(),
        object: "the kernel's random numbers".into(),
        errno: error.raw_os_error().unwrap_or(0),
        name: error.to_string(),
        note: Some("without them no key can be made".into()),
    }
}

impl From<policy::Refusal> for Error {
    fn from(refusal: policy::Refusal) -> Self {
        let policy::Refusal { rule, file, line, device, reason } = refusal;
        Self::Denied {
            rule,
            reason,
            file: (file != policy::BUILT_IN).then_some(file),
            line: line.and_then(|line| line.try_into().ok()),
            device: device.map(|device| device.to_string().into()),
        }
    }
}

/// A device is denied that is not asked for, and would come with the group of one that is.
pub(super) fn reaches_all(refusal: policy::Refusal, group: u32, device: Bdf) -> Error {
    let reason = format!(
        "{}; it is in group {group} with {device}, and whoever is handed the group reaches all of it; \
         handout devices gives the named devices alone",
        refusal.reason
    );
    policy::Refusal { reason, ..refusal }.into()
}

/// The caller has the key of a lease and is another tenant.
pub(super) fn another_tenants(lease: LeaseId) -> Error {
    Error::Denied {
        rule: "a lease is one tenant's".into(),
        reason: format!("lease {lease} is another tenant's than the caller"),
        file: None,
        line: None,
        device: None,
    }
}

/// The error for a lease that is not there, and for one whose key is another.
pub(super) fn no_such_lease(lease: LeaseId) -> Error {
    Error::NoSuchLease { lease: lease.to_string() }
}

/// A quota would be passed.
pub(super) fn over(limit: &str, most: u64, asked: u64) -> Error {
    Error::OverLimit { limit: limit.into(), most, asked }
}

/// A failed open of `/dev/vfio/vfio`: a host without type1 is named as such.
pub(super) fn no_type1(error: kernel::Error) -> Error {
    let why = "this host has no /dev/vfio/vfio: modprobe vfio_iommu_type1, or run a kernel with \
               CONFIG_VFIO_GROUP";
    no_backend("backend type1", error, why)
}

/// A failed open of `/dev/iommu`: a host without iommufd is named as such.
pub(super) fn no_iommufd(error: kernel::Error) -> Error {
    let why = "this host has no /dev/iommu: modprobe iommufd, or run a kernel with CONFIG_IOMMUFD \
               and CONFIG_VFIO_DEVICE_CDEV, Linux 6.6 or later";
    no_backend("backend iommufd", error, why)
}

fn no_backend(what: &str, error: kernel::Error, why: &str) -> Error {
    match error.errno {
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
            Error::Unsupported { what: what.into(), why: why.into() }
        }
        _ => error.into(),
    }
}

/// A device can't be opened without its group.
pub(super) fn no_cdev(bdf: Bdf) -> Error {
    Error::Unsupported {
        what: "backend iommufd".into(),
        why: format!(
            "{bdf} has no node of its own under /dev/vfio/devices: the kernel is built without \
             CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or later), or no IOMMU is behind the device"
        ),
    }
}

impl From<kernel::Error> for NotFree {
    fn from(error: kernel::Error) -> Self {
        match error.errno {
            Errno::ETIMEDOUT => Self::Unanswered { object: error.object },
            _ => Self::Failed { error: error.to_string() },
        }
    }
}

/// A group could not be taken out of its container.
pub(super) fn not_detached(error: kernel::Error) -> NotFree {
    match error.errno {
        Errno::EBUSY => NotFree::DeviceOpen { node: error.object },
        _ => error.into(),
    }
}

/// A group could not be opened afresh.
pub(super) fn not_proved(error: kernel::Error) -> NotFree {
    match error.errno {
        Errno::EBUSY => NotFree::GroupOpen { node: error.object },
        _ => error.into(),
    }
}

/// What keeps a group, in words, and whom that waits for.
fn told(why: &NotFree) -> (String, Until) {
    match why {
        NotFree::GroupOpen { node } => {
            (format!("some process still has {node} open"), Until::Holder)
        }
        NotFree::DeviceOpen { node } => {
            (format!("some process still has a device of {node} open"), Until::Holder)
        }
        NotFree::DriverWaits { device } => (
            format!(
                "some process still has {device} open by its own node, and its driver waits for the \
                 last close"
            ),
            Until::Holder,
        ),
        NotFree::DriverBinds { device } => (
            format!("{device} was let go of, and its driver is still binding it again"),
            Until::Kernel,
        ),
        NotFree::Unanswered { object } => (
            format!(
                "the kernel does not answer for {object}: some process of the holder's is in the \
                 middle of a call on it, such as mapping memory"
            ),
            Until::Holder,
        ),
        NotFree::Failed { error } => (error.clone(), Until::Kernel),
    }
}

/// What is just being taken back is not to be had yet.
fn not_yet(device: String, since: u64, holder: Option<Box<Holder>>) -> Error {
    let reason = "its last lease has just ended and the kernel is being asked".into();
    let (until, unbind) = (Until::Kernel, Vec::new());
    Error::Quarantined { device, since, reason, until, holder, unbind }
}

impl Broker {
    /// The ledger's refusal as the caller may know it.
    pub(super) fn refused(&self, caller: &Caller, books: &Books, refusal: Refusal) -> Error {
        let seen = |tenant: &str| self.may_see(caller, tenant);
        match refusal {
            Refusal::NoSuchLease(lease) => no_such_lease(lease),
            Refusal::InFlight(lease) => Error::Conflict {
                what: lease.to_string(),
                why: "another call on this lease is under way".into(),
            },
            Refusal::Busy { device, holder, .. } => {
                let lease = books.ledger.lease(holder);
                self.busy(caller, device.to_string(), lease)
            }
            Refusal::Quarantined { device, group, since, why } => {
                quarantined(books, device.to_string(), group, since, &why, seen)
            }
            Refusal::Unproved { device, group, since, left } => {
                let last = books.ledger.unproved_group(group);
                Error::Quarantined {
                    device: device.to_string(),
                    since,
                    reason: "its last holder was handed it by iommufd and may still have it open, \
                             which the kernel does not show: only that holder's tenant can have it \
                             again until an administrator has taken it off its driver and bound it \
                             again"
                        .into(),
                    until: Until::Administrator,
                    holder: last.filter(|last| seen(&last.tenant)).map(last_holder),
                    unbind: left.iter().map(ToString::to_string).collect(),
                }
            }
            Refusal::NotYet { what, since } => not_yet(what, since, None),
            Refusal::Conflict { what, why } => Error::Conflict { what, why },
            Refusal::OverLimit { limit, most, asked } => over(limit, most, asked),
            Refusal::Bad { field, reason } => Error::bad(field, reason),
        }
    }

    /// That a device of a group is not known to be free; `None` where the group is not being taken
    /// back.
    pub(super) fn not_free(
        &self,
        tenant: &Tenant,
        books: &Books,
        device: String,
        group: u32,
    ) -> Option<Error> {
        let seen = |other: &str| self.sees(tenant, other);
        match &books.ledger.group(group)?.state {
            GroupState::Quarantined { since, why } => {
                Some(quarantined(books, device, group, *since, why, seen))
            }
            GroupState::Reclaiming { since } => {
                Some(not_yet(device, *since, holder_of(books, group, seen)))
            }
            GroupState::Acquiring | GroupState::Held => None,
        }
    }

    /// That a device is busy; with the holder where the caller may know it.
    pub(super) fn busy(&self, caller: &Caller, device: String, lease: Option<&Lease>) -> Error {
        let seen = lease.filter(|lease| self.may_see(caller, &lease.tenant));
        Error::Busy { device, holder: seen.map(holder), since: seen.map(|lease| lease.since) }
    }

    /// EBUSY of a group that nobody has: it is whoever had it last by iommufd, if there is one.
    pub(super) fn group_error(&self, id: u32, chosen: &Chosen, error: kernel::Error) -> Error {
        if error.errno != Errno::EBUSY {
            return error.into();
        }
        let books = self.books();
        let Some(last) = books.ledger.unproved_group(id) else { return error.into() };
        let device = chosen.devices.iter().find(|(_, group)| *group == id);
        Error::Busy {
            device: device.map_or(format!("group {id}"), |(bdf, _)| bdf.to_string()),
            // Only the tenant that had it gets here.
            holder: Some(last_holder(last)),
            since: Some(last.since),
        }
    }
}

fn quarantined(
    books: &Books,
    device: String,
    group: u32,
    since: u64,
    why: &NotFree,
    seen: impl Fn(&str) -> bool,
) -> Error {
    let (reason, until) = told(why);
    let (holder, unbind) = (holder_of(books, group, seen), Vec::new());
    Error::Quarantined { device, since, reason, until, holder, unbind }
}

/// Who had a group that is being taken back, where that may be seen.
fn holder_of(books: &Books, group: u32, seen: impl Fn(&str) -> bool) -> Option<Box<Holder>> {
    let lease = books.ledger.lease(books.ledger.group(group)?.lease)?;
    seen(&lease.tenant).then(|| holder(lease))
}

fn holder(lease: &Lease) -> Box<Holder> {
    let Lease { id, vm, tenant, uid, pid, .. } = lease;
    let (vm, tenant) = (vm.clone(), tenant.clone());
    Box::new(Holder { lease: id.to_string(), vm, tenant, uid: *uid, pid: *pid })
}

fn last_holder(last: &Unproved) -> Box<Holder> {
    let Unproved { lease, vm, tenant, uid, pid, .. } = last;
    let (vm, tenant) = (vm.clone(), tenant.clone());
    Box::new(Holder { lease: lease.to_string(), vm, tenant, uid: *uid, pid: *pid })
}
