//! What is to be told of an open file by what `/proc` says of it.

use crate::protocol::Bdf;

/// Files that have no name of their own.
const DEVICE: &str = "anon_inode:[vfio-device]";
const KVM: &str = "anon_inode:kvm-vfio";

/// Where devices' own nodes are.
const CDEVS: &str = "/dev/vfio/devices/";
/// What stands behind the name of a file that is no more.
const DELETED: &str = " (deleted)";

/// An open file that may be VFIO's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum OpenFile {
    /// A node, by its device number.
    Node((u32, u32)),
    /// A device's own node that is no more, since its driver has let go of it; of which, where the kernel
    /// says that.
    Deleted(Option<Bdf>),
    /// A device that was got from its group; which, where the kernel says that.
    Device(Option<Bdf>),
    /// KVM's device that has VFIO's files.
    Kvm,
}

impl OpenFile {
    /// What a link in `fd/` leads to; `number` asks for the number of the device that it is.
    pub(super) fn new(link: &str, number: impl FnOnce() -> Option<(u32, u32)>) -> Option<Self> {
        match link {
            DEVICE => Some(Self::Device(None)),
            KVM => Some(Self::Kvm),
            // Of all other files nothing is asked.
            _ if !link.starts_with("/dev/") && !link.contains("vfio") => None,
            _ if link.starts_with(CDEVS) && link.ends_with(DELETED) => Some(Self::Deleted(None)),
            _ => number().map(Self::Node),
        }
    }

    /// The same, with what its `fdinfo` says of it.
    pub(super) fn with_info(self, info: impl FnOnce() -> String) -> Self {
        match self {
            Self::Device(_) => Self::Device(device(&info())),
            Self::Deleted(_) => Self::Deleted(device(&info())),
            other => other,
        }
    }
}

/// The device that an `fdinfo` names, as kernels since Linux 6.17 or so do.
fn device(info: &str) -> Option<Bdf> {
    let path = info.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
    path.trim().rsplit('/').next()?.parse().ok()
}

/// Whether files are in the queue of the socket that an `fdinfo` is of.
pub(super) fn has_queued(info: &str) -> bool {
    let count = info.lines().find_map(|line| line.strip_prefix("scm_fds:"));
    count.is_some_and(|count| count.trim() != "0")
}

/// A mapping of a device's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// By a device that was got from its group; `maps` does not say which.
    Device,
    /// By a device's own node of this path.
    Node(String),
}

impl Mapping {
    /// What a line of `maps` says, which has the file's name behind five fields.
    pub(super) fn read(line: &str) -> Option<Self> {
        let mut rest = line;
        for _ in 0..5 {
            rest = rest.trim_start().split_once(' ')?.1;
        }
        match rest.trim_start() {
            DEVICE => Some(Self::Device),
            path if path.starts_with(CDEVS) => Some(Self::Node(path.to_owned())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_a_vfio_file_is_not_asked_about() {
        for link in ["socket:[7]", "pipe:[8]", "anon_inode:[eventfd]", "/home/a", "/mnt/fuse/dev/x"]
        {
            assert_eq!(OpenFile::new(link, || panic!("{link} is asked about")), None);
        }
        assert_eq!(OpenFile::new("/dev/vfio/26", || None), None, "no device");
        let renamed = OpenFile::new("/dev/renamed", || Some((244, 7)));
        assert_eq!(renamed, Some(OpenFile::Node((244, 7))), "a node is what its number says");
    }

    #[test]
    fn a_device_is_named_where_the_kernel_names_it() {
        let of =
            |link, info: &str| OpenFile::new(link, || None).unwrap().with_info(|| info.to_owned());
        let info =
            "pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:64/0000:64:00.0/0000:65:00.1\n";
        let bdf = "0000:65:00.1".parse().ok();
        assert_eq!(of(DEVICE, info), OpenFile::Device(bdf));
        assert_eq!(of("/dev/vfio/devices/vfio3 (deleted)", info), OpenFile::Deleted(bdf));
        assert_eq!(of(DEVICE, "pos:\t0\nflags:\t02\n"), OpenFile::Device(None));
        assert_eq!(
            of(DEVICE, "vfio-device-syspath: /sys/devices/mdev/x\n"),
            OpenFile::Device(None)
        );
    }

    #[test]
    fn mappings_are_told_by_the_name_behind_five_fields() {
        let line = |name| format!("7f1c2a000000-7f1c2a004000 rw-s 10000000000 00:0e 1049   {name}");
        assert_eq!(Mapping::read(&line(DEVICE)), Some(Mapping::Device));
        let node = "/dev/vfio/devices/vfio3";
        assert_eq!(Mapping::read(&line(node)), Some(Mapping::Node(node.into())));
        assert_eq!(Mapping::read(&line("/a b/anon_inode:[vfio-device]")), None);
        for other in ["", "x", "7f-80 rw-p 0 00:00 0", "7f-80 rw-p 0 00:00 0 [heap]"] {
            assert_eq!(Mapping::read(other), None, "{other}");
        }
    }

    #[test]
    fn files_in_a_sockets_queue_are_seen() {
        assert!(has_queued("pos:\t0\nscm_fds: 3\n"));
        assert!(!has_queued("pos:\t0\nscm_fds: 0\n"));
        assert!(!has_queued("pos:\t0\n"));
    }
}
