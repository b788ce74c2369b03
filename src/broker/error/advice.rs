//! What to do about each error, as far as its data tells. It is sent beside them.

use crate::protocol::{Blocker, Error, Until};
use nix::errno::Errno;

/// What to do about an error; none where its own words say it, or nothing can be done.
pub fn advice(error: &Error) -> Option<String> {
    match error {
        // Without a file there is nothing that could be looked into.
        Error::Denied { file, device, .. } => file.as_ref().map(|_| {
            let device = device.as_ref().map_or(String::new(), |bdf| format!(" for {bdf}"));
            format!("`vfio-broker policy explain` shows how the policy decides{device}")
        }),
        Error::NotViable { blockers, .. } => not_viable(blockers),
        Error::Unnamed { companions, .. } => Some(format!(
            "withhold {}, or name it among the devices; the handouts devices and iommufd, where the policy \
             allows them, give the named devices alone",
            companions.join(" and ")
        )),
        Error::Busy { holder: Some(holder), .. } => {
            Some(format!("`vfio-broker watch {}` tells when it is given back", holder.lease))
        }
        // Only who may know the holder is told of its leases' ends.
        Error::Busy { holder: None, open_in: None, .. } => Some("try again later".into()),
        Error::Busy { holder: None, open_in: Some(_), .. } => {
            Some("no lease has it: whoever has it open must close it; then try again".into())
        }
        Error::Quarantined { until, unbind, .. } => Some(match until {
            Until::Holder => "whoever still has it open must close it; then try again".into(),
            Until::Administrator => taken_off(unbind),
            Until::Kernel => "try again later: the broker asks again by itself".into(),
        }),
        Error::OverLimit { limit, .. } => over(limit),
        Error::NoSuchDevice { .. } => {
            Some("`vfio-broker topology` shows those that there are".into())
        }
        Error::NoSuchLease { .. } => Some("`vfio-broker leases` shows those that there are".into()),
        Error::Kernel { call, object, errno, .. } => {
            Some(kernel(call, object, Errno::from_raw(*errno)))
        }
        Error::Conflict { .. }
        | Error::BadRequest { .. }
        | Error::Unsupported { .. }
        | Error::InterfaceNotFound { .. }
        | Error::MethodNotFound { .. }
        | Error::ExpectedMore {} => None,
    }
}

/// What to do about blockers, beside what each says itself.
fn not_viable(blockers: &[Blocker]) -> Option<String> {
    // One without a driver is in the way of its own use alone.
    if let Some(first) = blockers.first()
        && blockers.iter().all(|blocker| blocker.driver.is_none())
    {
        let bdf = &first.bdf;
        return Some(format!(
            "where another function of the group is wanted, withhold {bdf} instead of using it"
        ));
    }
    let kept = blockers.iter().any(|blocker| blocker.fix.is_none());
    let ask = "a function without a command is not yours to take: ask who looks after this host";
    kept.then(|| ask.into())
}

/// Taking devices off their drivers and putting them back; root alone can.
fn taken_off(devices: &[String]) -> String {
    let each = devices.iter().map(|bdf| {
        format!(
            "echo {bdf} > /sys/bus/pci/devices/{bdf}/driver/unbind, which waits for the last close, \
             and then echo {bdf} > /sys/bus/pci/drivers_probe"
        )
    });
    let commands = each.collect::<Vec<_>>().join(", ");
    let words = devices.iter().map(|bdf| format!("`vfio-broker confirm {bdf}`"));
    let words = words.collect::<Vec<_>>().join(", ");
    format!(
        "whoever looks after this host can do that ({commands}; a simulated machine has no such files), or \
         look that nobody has it open and say so ({words}); then try again"
    )
}

/// What to do about a limit that the policy sets.
fn over(limit: &str) -> Option<String> {
    let less = match limit {
        "memlock" | "mapped_bytes" => "ask for less",
        "leases" | "devices" | "mappings" | "fds" => "give something back",
        _ => return None,
    };
    Some(format!("{less}, or have {limit} of the tenant raised in the policy"))
}

/// What to do about a failed call; the errno alone says too little.
fn kernel(call: &str, object: &str, errno: Errno) -> String {
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
    use crate::kernel::Error as KernelError;

    #[test]
    fn a_kernel_error_says_what_to_do_next() {
        let says = |call, object: &str, errno| {
            advice(&KernelError::new(call, object, errno).into()).unwrap()
        };
        assert!(says("open", "/dev/vfio/vfio", Errno::ENOENT).contains("modprobe vfio"));
        assert!(says("open", "/dev/vfio/26", Errno::EBUSY).contains("fuser -v /dev/vfio/26"));
        let unsafe_interrupts = says("VFIO_SET_IOMMU", "container", Errno::EPERM);
        assert!(unsafe_interrupts.contains("allow_unsafe_interrupts"));
        assert!(says("VFIO_IOMMU_MAP_DMA", "container", Errno::ENOMEM).contains("RLIMIT_MEMLOCK"));
    }

    #[test]
    fn what_a_device_waits_for_decides_what_is_advised() {
        let says = |until, unbind: &[&str]| {
            let unbind = unbind.iter().map(|bdf| (*bdf).to_owned()).collect();
            let (device, reason) = ("d".to_owned(), "r".to_owned());
            advice(&Error::Quarantined {
                device,
                since: 0,
                reason,
                until,
                holder: None,
                unbind,
                open_in: None,
            })
            .unwrap()
        };
        assert!(says(Until::Holder, &[]).contains("must close it"));
        let administrator = says(Until::Administrator, &["0000:01:00.0", "0000:01:00.1"]);
        for said in ["looks after this host", "0000:01:00.0/driver/unbind", "0000:01:00.1/driver"] {
            assert!(administrator.contains(said), "{administrator}");
        }
        assert!(!says(Until::Kernel, &[]).contains("close"));
    }

    #[test]
    fn withholding_is_told_of_only_where_it_helps() {
        let blocker = |driver: Option<&str>| Blocker {
            bdf: "0000:05:00.1".into(),
            driver: driver.map(str::to_owned),
            fix: None,
        };
        let says = |blockers| advice(&Error::NotViable { group: 17, blockers }).unwrap();
        assert!(says(vec![blocker(None)]).contains("withhold 0000:05:00.1"));
        assert!(!says(vec![blocker(None), blocker(Some("ahci"))]).contains("withhold"));
    }

    #[test]
    fn a_limit_of_the_policy_can_be_raised_there_and_another_cannot() {
        let says =
            |limit: &str| advice(&Error::OverLimit { limit: limit.into(), most: 1, asked: 2 });
        assert!(says("memlock").unwrap().starts_with("ask for less, or have memlock"));
        assert!(says("leases").unwrap().starts_with("give something back"));
        assert_eq!(says("devices of one lease"), None);
    }

    #[test]
    fn a_denial_points_to_the_policy_only_where_it_is_a_file() {
        let says = |file: Option<&str>, device: Option<&str>| {
            advice(&Error::Denied {
                rule: "r".into(),
                reason: "why".into(),
                file: file.map(str::to_owned),
                line: None,
                device: device.map(Into::into),
            })
        };
        assert_eq!(says(None, Some("0000:01:00.0")), None);
        assert!(says(Some("policy.toml"), Some("0000:01:00.0")).unwrap().contains("0000:01:00.0"));
        assert!(says(Some("policy.toml"), None).unwrap().ends_with("decides"));
    }
}
