//! The lab's guest: its devices, who its user is, and its QEMU.

#![allow(dead_code)] // each program uses its part

use std::fs;
use std::os::unix::fs::PermissionsExt;

/// An e1000e and an edu, each alone in its group.
pub const NIC: &str = "0000:00:02.0";
pub const EDU: &str = "0000:00:03.0";
/// The user who has no right but what the broker gives.
pub const ALICE: u32 = 2001;
pub const MIB: u64 = 1 << 20;

/// Has only root open VFIO's nodes, as udev does on most hosts.
pub fn close_nodes() {
    for node in ["/dev/vfio/vfio", "/dev/iommu"] {
        if fs::exists(node).unwrap() {
            fs::set_permissions(node, fs::Permissions::from_mode(0o600)).unwrap();
        }
    }
}

/// Which QEMU; another one than the machine's can be named.
pub fn qemu() -> String {
    std::env::var("VFIO_QEMU").unwrap_or("/usr/bin/qemu-system-x86_64".into())
}

/// A process's open files that have to do with VFIO.
pub fn vfio_files(pid: u32) -> Vec<String> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    let names = links.map(|link| link.to_string_lossy().into_owned());
    let mut names: Vec<String> =
        names.filter(|name| name.contains("vfio") || name.contains("/dev/iommu")).collect();
    names.sort();
    names
}
