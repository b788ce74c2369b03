//! Failed kernel calls as the client is told of them: with what to do next.

use super::keeper::NotDone;
use super::{Broker, lacks};
use crate::host;
use crate::kernel;
use crate::process::keeper::{Failure, LeasedDevice};
use crate::protocol::{Error, Holder};
use nix::errno::Errno;
use tracing::warn;

impl From<kernel::Error> for Error {
    fn from(error: kernel::Error) -> Self {
        let kernel::Error { call, object, errno, note } = error;
        failed(call, &object, errno, note.as_deref())
    }
}

fn failed(call: &str, object: &str, errno: Errno, note: Option<&str>) -> Error {
    let mut hint = hint(call, object, errno);
    if let Some(note) = note {
        hint = format!("{note}; {hint}");
    }
    let (call, object, name) = (call.into(), object.into(), format!("{errno:?}"));
    Error::Kernel { call, object, errno: errno as i32, name, hint }
}

/// A keeper has not come back from a call.
pub(super) fn no_answer(call: &str, object: &str) -> Error {
    let hint = "the kernel has not answered in time; what it still does is undone when it is done: try \
                again later";
    let (call, object, name) = (call.into(), object.into(), "ETIMEDOUT".into());
    Error::Kernel { call, object, errno: Errno::ETIMEDOUT as i32, name, hint: hint.into() }
}

/// A keeper has ended under a call.
pub(super) fn keeper_lost(object: &str) -> Error {
    let hint = "the process that has it open has ended; what it had is being taken back: see the log of \
                vfio-brokerd";
    let (call, object, name) = ("keeper".into(), object.into(), "EIO".into());
    Error::Kernel { call, object, errno: Errno::EIO as i32, name, hint: hint.into() }
}

impl Broker {
    /// Why a keeper did not do what was asked of it for these devices.
    pub(super) fn not_done(&self, why: NotDone, devices: &[LeasedDevice], call: &str) -> Error {
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
                match self.last_by_iommufd(&call, &object, errno, devices) {
                    Some(error) => error,
                    None => lacks::node(&object, errno)
                        .unwrap_or_else(|| failed(&call, &object, errno, note.as_deref())),
                }
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
                why:
                    "the kernel calls it not viable although no driver of the host has a device of \
                      it: something else owns its DMA"
                        .into(),
            },
            Failure::NoCdev(bdf) => lacks::cdev(bdf),
            Failure::NoIommuDriver { noiommu } => Error::Unsupported {
                what: if noiommu { "no-IOMMU" } else { "type1" }.into(),
                why:
                    "the kernel has no such IOMMU driver for VFIO: modprobe vfio_iommu_type1 (for \
                      no-IOMMU, vfio.enable_unsafe_noiommu_mode=1)"
                        .into(),
            },
            Failure::Moved { what, why } => Error::Conflict { what, why },
            Failure::Bad { field, reason } => Error::BadRequest { field, reason },
            Failure::NotDelivered(errno) => {
                failed("sendmsg", "the client's socket", Errno::from_raw(errno), None)
            }
            Failure::NoSuchLease => Error::Conflict {
                what: call.into(),
                why: "its lease has just ended, or another call on it is under way".into(),
            },
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
        // Only the tenant that had it gets here.
        Some(Error::Busy {
            device: device.map_or(format!("group {id}"), |device| device.bdf.to_string()),
            holder: Some(Holder {
                lease: last.lease.to_string(),
                vm: last.vm.clone(),
                tenant: last.tenant.clone(),
                uid: last.uid,
                pid: last.pid,
            }),
            since: Some(last.since),
        })
    }
}

/// What to do about it; the errno alone says too little.
fn hint(call: &str, object: &str, errno: Errno) -> String {
    let group = object.starts_with("/dev/vfio/") && object != "/dev/vfio/vfio";
    match (call, errno) {
        (_, Errno::EMFILE | Errno::ENFILE) => {
            "the broker has no open files left: raise LimitNOFILE= of its service".into()
        }
        (_, Errno::ETIMEDOUT) => {
            "whoever has it open is in the middle of a call that does not end, such as mapping memory: \
             try again later, or see who that is (fuser -v /dev/vfio/*)"
                .into()
        }
        ("create" | "write" | "fsync" | "rename", _) => {
            "who may have devices open by their own nodes is written there before they are handed \
             out: give the broker room and rights in that directory, or name another --socket"
                .into()
        }
        ("open", Errno::ENOENT | Errno::ENODEV) if object.starts_with("/dev/vfio/devices/") => {
            "the device has just left its driver: see Topology".into()
        }
        ("open", Errno::ENOENT) if !group => {
            "VFIO is not loaded: modprobe vfio vfio_iommu_type1 vfio-pci".into()
        }
        ("open", Errno::ENOENT) => format!(
            "no device of the group is on a VFIO driver any more, or {object} is not in the \
             broker's /dev"
        ),
        ("open", Errno::EBUSY) => format!(
            "a process has the group open already, or a device of it by iommufd: fuser -v {object}"
        ),
        ("open", Errno::ENODEV) => {
            "the group's devices have just left their VFIO drivers: see Topology".into()
        }
        ("open", Errno::EACCES | Errno::EPERM) if group && object.contains("noiommu") => {
            "a group without an IOMMU wants CAP_SYS_RAWIO: the broker must have it".into()
        }
        ("open", Errno::EACCES | Errno::EPERM) => {
            format!("the broker may not open {object}: it must run as root, with that node allowed")
        }
        ("IOMMU_OPTION", Errno::EPERM) => {
            "having each process charged for what it pins wants CAP_SYS_RESOURCE: the broker must \
             have it (CapabilityBoundingSet= of its service), and on a simulated machine \
             `owner_rights = true` in its topology"
                .into()
        }
        ("VFIO_SET_IOMMU", Errno::EPERM) => {
            "the host can't remap interrupts, so a guest could raise any interrupt of the host: \
             enable interrupt remapping in firmware and kernel, or accept that with \
             vfio_iommu_type1.allow_unsafe_interrupts=1 and the risk unsafe-interrupts in the \
             policy"
                .into()
        }
        ("VFIO_SET_IOMMU", Errno::ENODEV) => {
            "no driver for this kind of IOMMU: modprobe vfio_iommu_type1".into()
        }
        ("VFIO_GROUP_SET_CONTAINER", Errno::EPERM) => {
            "the group is not viable, the host can't remap interrupts, or groups with and without \
             an IOMMU would be mixed: see Topology"
                .into()
        }
        ("VFIO_GROUP_SET_CONTAINER", Errno::EINVAL | Errno::EBUSY) => {
            "the group's reserved addresses overlap what is mapped in the container, or somebody \
             else has attached it"
                .into()
        }
        ("VFIO_GROUP_GET_DEVICE_FD", Errno::EACCES) => {
            "the device's PF has a token: give it as vf_token".into()
        }
        ("VFIO_GROUP_GET_DEVICE_FD", Errno::EINVAL) => {
            "the device takes no vf_token, or its group has lost its container".into()
        }
        ("VFIO_GROUP_GET_DEVICE_FD", Errno::ENODEV) => {
            "the device is not on a VFIO driver any more: see Topology".into()
        }
        ("VFIO_GROUP_GET_DEVICE_FD", Errno::EPERM) => {
            "a device without an IOMMU wants CAP_SYS_RAWIO: the broker must have it".into()
        }
        ("prlimit", Errno::EPERM) => {
            "the broker may not raise limits: it wants CAP_SYS_RESOURCE (LimitMEMLOCK= and \
             CapabilityBoundingSet= of its service)"
                .into()
        }
        ("prlimit", Errno::ESRCH) => {
            "the process that connected has ended, or is in a pid namespace that the broker can't \
             see: raise the limit where it is started"
                .into()
        }
        ("VFIO_IOMMU_MAP_DMA", Errno::ENOMEM) => {
            "the memory can't be pinned: the broker's RLIMIT_MEMLOCK (LimitMEMLOCK=infinity in \
             its service), its memory cgroup, or the host's memory is used up"
                .into()
        }
        ("VFIO_IOMMU_MAP_DMA", Errno::EFAULT) => {
            "the file has no such page: it was made shorter after it was handed over, or its huge \
             pages are used up"
                .into()
        }
        ("VFIO_IOMMU_MAP_DMA", Errno::ENOSPC) => {
            "too many mappings in this container: map larger ranges, or raise \
             vfio_iommu_type1.dma_entry_limit"
                .into()
        }
        ("VFIO_IOMMU_MAP_DMA", Errno::EINVAL) => {
            "the range is misaligned or outside of what the IOMMU can address".into()
        }
        ("VFIO_IOMMU_MAP_DMA", Errno::EEXIST) => {
            "something that the broker does not know of is mapped there".into()
        }
        ("mmap", Errno::EACCES | Errno::EPERM) => {
            "the file is not open for writing, or is sealed: open it read-write, or map with \
             write = false"
                .into()
        }
        ("mmap", Errno::ENOMEM) => "no huge pages are left, or no address space".into(),
        (_, Errno::ENODEV) => "the device or its group is gone: see Topology".into(),
        _ => "the broker's log has what came before; see Topology for the state of things".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_error_says_what_to_do_next() {
        let says = |call, object: &str, errno| {
            let Error::Kernel { hint, name, .. } =
                crate::kernel::Error::new(call, object, errno).into()
            else {
                panic!("another error")
            };
            assert_eq!(name, format!("{errno:?}"));
            hint
        };
        assert!(says("open", "/dev/vfio/vfio", Errno::ENOENT).contains("modprobe vfio"));
        assert!(says("open", "/dev/vfio/26", Errno::EBUSY).contains("fuser -v /dev/vfio/26"));
        let unsafe_interrupts = says("VFIO_SET_IOMMU", "container", Errno::EPERM);
        assert!(unsafe_interrupts.contains("allow_unsafe_interrupts"));
        assert!(says("VFIO_IOMMU_MAP_DMA", "container", Errno::ENOMEM).contains("RLIMIT_MEMLOCK"));
    }
}
