//! What kind of node a path leads to, without asking the file system that it is in.

#![allow(unsafe_code)]

use nix::NixPath;
use nix::libc;
use std::path::Path;

/// The number of the character device that a path leads to; `None` where it leads to none, or that can't be
/// told without asking its file system: the server of a FUSE file could keep whoever asks.
pub fn device_number(path: &Path) -> Option<(u32, u32)> {
    // SAFETY: all zeros is a valid statx.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    // SAFETY: the path ends with a NUL, and the kernel writes one statx; both live through the call.
    let asked = path.with_nix_path(|path| unsafe {
        let (path, mask) = (path.as_ptr(), libc::STATX_TYPE);
        libc::syscall(libc::SYS_statx, libc::AT_FDCWD, path, flags, mask, &raw mut found)
    });
    let is_character = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFCHR;
    (asked == Ok(0) && is_character).then_some((found.stx_rdev_major, found.stx_rdev_minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_character_devices_have_a_number() {
        assert_eq!(device_number(Path::new("/dev/null")), Some((1, 3)));
        for other in ["/", "/proc/self/status", "/no such"] {
            assert_eq!(device_number(Path::new(other)), None, "{other}");
        }
    }
}
