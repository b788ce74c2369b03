//! The errors that clients are told of: each is made here, out of what the kernel, the policy and the
//! ledger say. They are data; what to do about them is [`advice`]'s.

mod advice;
mod refused;

pub use advice::advice;

use super::books::Books;
use super::keeper::NotDone;
use super::{Broker, Caller};
use crate::host;
use crate::host::NotAllowed;
use crate::kernel;
use crate::ledger::{GroupState, Lease, LeaseId, NotFree, Reclaimed, Refusal, Unproved};
use crate::policy::{self, Tenant};
use crate::process::keeper::{self, Failure, LeasedDevice};
use crate::protocol::{Bdf, Error, Holder, Until};
use nix::errno::Errno;
use tracing::warn;

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

/// A keeper has not come back from a call in time.
pub(super) fn no_answer(call: &str, object: &str) -> Error {
    let note = "the kernel has not answered in time; what it still does is undone when it is done";
    failed(call, object.into(), Errno::ETIMEDOUT, Some(note.into()))
}

/// A keeper has ended under a call.
pub(super) fn keeper_lost(object: &str) -> Error {
    let note = "the process that has it open has ended; what it had is being taken back";
    failed("keeper", object.into(), Errno::EIO, Some(note.into()))
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

impl From<NotAllowed> for Error {
    fn from(not: NotAllowed) -> Self {
        match not {
            NotAllowed::Denied(refusal) => refusal.into(),
            NotAllowed::Reaches { refusal, group, device } => {
                let reason = format!(
                    "{}; it is in group {group} with {device}, and whoever is handed the group reaches \
                     all of it; the handouts devices and iommufd, where the policy allows them, give the \
                     named devices alone",
                    refusal.reason
                );
                policy::Refusal { reason, ..refusal }.into()
            }
        }
    }
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

/// Why a lease that a keeper has can't be entered, in words.
pub(super) fn claimed(refusal: Refusal) -> String {
    match refusal {
        Refusal::Conflict(conflict) => Error::from(conflict).to_string(),
        other => other.to_string(),
    }
}

/// A quota would be passed.
pub(super) fn over(limit: &str, most: u64, asked: u64) -> Error {
    Error::OverLimit { limit: limit.into(), most, asked }
}

/// A failed open of a backend's node: a host without that backend is named as such.
pub(super) fn no_node(error: kernel::Error) -> Error {
    let kernel::Error { call, object, errno, note } = error;
    no_backend(&object, errno).unwrap_or_else(|| failed(call, object, errno, note))
}

/// What a host has not that answers so to an open of this node.
fn no_backend(object: &str, errno: Errno) -> Option<Error> {
    let (backend, why) = match object {
        "/dev/vfio/vfio" => (
            "backend type1",
            "this host has no /dev/vfio/vfio: modprobe vfio_iommu_type1, or run a kernel with \
             CONFIG_VFIO_GROUP",
        ),
        "/dev/iommu" => (
            "backend iommufd",
            "this host has no /dev/iommu: modprobe iommufd, or run a kernel with CONFIG_IOMMUFD \
             and CONFIG_VFIO_DEVICE_CDEV, Linux 6.6 or later",
        ),
        _ => return None,
    };
    let lacks = matches!(errno, Errno::ENOENT | Errno::ENODEV | Errno::ENXIO);
    lacks.then(|| Error::Unsupported { what: backend.into(), why: why.into() })
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

impl From<keeper::NotFree> for NotFree {
    fn from(why: keeper::NotFree) -> Self {
        match why {
            keeper::NotFree::GroupOpen(node) => Self::GroupOpen { node },
            keeper::NotFree::DeviceOpen(node) => Self::DeviceOpen { node },
            keeper::NotFree::DriverWaits(device) => Self::DriverWaits { device },
            keeper::NotFree::DriverBinds(device) => Self::DriverBinds { device },
            keeper::NotFree::Kernel(call, object, said) => {
                Self::Failed { error: format!("{call} on {object}: {said}") }
            }
        }
    }
}

/// What keeps a group, in words, and whom that waits for.
pub(super) fn told(why: &NotFree) -> (String, Until) {
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

/// Why a device is kept for its last tenant that was handed out by its own node.
pub(super) fn unproved_reason() -> &'static str {
    "its last holder was handed it by iommufd and may still have it open, which the kernel does not \
     show: only that holder's tenant can have it again until an administrator has taken it off its \
     driver and bound it again"
}

/// What is just being taken back is not to be had yet.
fn not_yet(device: String, since: u64, holder: Option<Box<Holder>>) -> Error {
    let reason = "its last lease has just ended and the kernel is being asked".into();
    let (until, unbind) = (Until::Kernel, Vec::new());
    Error::Quarantined { device, since, reason, until, holder, unbind, open_in: None }
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
                self.quarantined(books, device.to_string(), group, since, &why, seen)
            }
            Refusal::Unproved { device, group, since, left } => {
                let last = books.ledger.unproved_group(group).filter(|last| seen(&last.tenant));
                Error::Quarantined {
                    device: device.to_string(),
                    since,
                    reason: unproved_reason().into(),
                    until: Until::Administrator,
                    open_in: last.and_then(|_| self.open_in(books, group)).map(Box::new),
                    holder: last.map(last_holder),
                    unbind: left.iter().map(ToString::to_string).collect(),
                }
            }
            Refusal::NotYet { what, since } => {
                let what = match what {
                    Reclaimed::Device(device) => device.to_string(),
                    Reclaimed::Container(name) => format!("container {name:?}"),
                };
                not_yet(what, since, None)
            }
            Refusal::Conflict(conflict) => conflict.into(),
            Refusal::OverLimit { limit, most, asked } => over(limit, most, asked),
            Refusal::Bad(bad) => bad.into(),
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
                Some(self.quarantined(books, device, group, *since, why, seen))
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
        let (holder, since) = (seen.map(holder), seen.map(|lease| lease.since));
        Error::Busy { device, holder, since, open_in: None }
    }

    fn quarantined(
        &self,
        books: &Books,
        device: String,
        group: u32,
        since: u64,
        why: &NotFree,
        seen: impl Fn(&str) -> bool,
    ) -> Error {
        let (reason, until) = told(why);
        let (holder, unbind) = (holder_of(books, group, seen), Vec::new());
        let open_in = holder.as_ref().and_then(|_| self.open_in(books, group)).map(Box::new);
        Error::Quarantined { device, since, reason, until, holder, unbind, open_in }
    }

    /// Why a keeper did not do what was asked of it for a lease and these devices.
    pub(super) fn not_done(
        &self,
        why: NotDone,
        lease: LeaseId,
        devices: &[LeasedDevice],
        call: &str,
    ) -> Error {
        let failure = match why {
            NotDone::Failed(failure) => failure,
            NotDone::Lost(lost) => {
                warn!(%lost, call, "a keeper has ended under a call");
                return keeper_lost(call);
            }
        };
        match failure {
            Failure::Kernel { call, object, errno, note } => {
                let errno = Errno::from_raw(errno);
                self.last_by_iommufd(&call, &object, errno, devices)
                    .or_else(|| no_backend(&object, errno))
                    .unwrap_or_else(|| failed(&call, object, errno, note.map(Into::into)))
            }
            Failure::NotViable(id) => match host::Group::scan(&*self.kernel, id) {
                Ok(group) => {
                    let blockers = group.map_or(Vec::new(), |group| group.blockers(|_| false));
                    Error::NotViable { group: id, blockers }
                }
                Err(error) => error.into(),
            },
            Failure::Owned(id) => Error::Conflict {
                what: format!("group {id}"),
                why: "the kernel calls it not viable although no driver of the host has a device \
                      of it: something else owns its DMA"
                    .into(),
            },
            Failure::NoCdev(bdf) => no_cdev(bdf),
            Failure::NoIommuDriver { noiommu } => Error::Unsupported {
                what: if noiommu { "no-IOMMU" } else { "type1" }.into(),
                why:
                    "the kernel has no such IOMMU driver for VFIO: modprobe vfio_iommu_type1 (for \
                      no-IOMMU, vfio.enable_unsafe_noiommu_mode=1)"
                        .into(),
            },
            Failure::Moved { what, why } => Error::Conflict { what, why },
            Failure::Bad { field, reason } => Error::BadRequest { field, reason },
            Failure::Denied(refusal) => (*refusal).into(),
            Failure::UnknownPeer => Error::Unsupported {
                what: call.into(),
                why: "the kernel does not say for certain which process has connected: it has ended, \
                      or this is a kernel before Linux 6.5"
                    .into(),
            },
            Failure::NotDelivered(errno) => {
                failed("sendmsg", "the client's socket".into(), Errno::from_raw(errno), None)
            }
            // It has just ended.
            Failure::NoSuchLease => no_such_lease(lease),
        }
    }

    /// EBUSY of a group that nobody has: it is whoever had it last by iommufd, if there is one.
    fn last_by_iommufd(
        &self,
        call: &str,
        object: &str,
        errno: Errno,
        devices: &[LeasedDevice],
    ) -> Option<Error> {
        let id = object.strip_prefix("/dev/vfio/")?.trim_start_matches("noiommu-").parse().ok()?;
        if (call, errno) != ("open", Errno::EBUSY) {
            return None;
        }
        let books = self.books();
        let last = books.ledger.unproved_group(id)?;
        let device = devices.iter().find(|device| device.group == id);
        Some(Error::Busy {
            device: device.map_or(format!("group {id}"), |device| device.bdf.to_string()),
            // Only the tenant that had it gets here.
            holder: Some(last_holder(last)),
            since: Some(last.since),
            open_in: None,
        })
    }
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
