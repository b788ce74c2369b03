//! What a process that runs as root keeps of root's rights.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;

/// Reads files and directories whoever may.
pub const DAC_READ_SEARCH: u32 = 2;
/// Reads all of a device's configuration space; and much else, most of which takes calls that no role
/// can make.
pub const SYS_ADMIN: u32 = 21;
/// Raises limits, its own and others'.
pub const SYS_RESOURCE: u32 = 24;
/// Locks memory whatever the limit.
pub const IPC_LOCK: u32 = 14;
/// Opens groups that no IOMMU is behind.
pub const SYS_RAWIO: u32 = 17;
/// Looks into other processes.
pub const SYS_PTRACE: u32 = 19;

/// `_LINUX_CAPABILITY_VERSION_3`: two words of each set.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Gives up all capabilities of this process but these, of the first 32, and of these those that it has
/// not. For a process with one thread: capabilities are a thread's.
///
/// # Errors
/// See capset(2).
pub fn keep_only(capabilities: &[u32]) -> Result<(), Errno> {
    let header = Header { version: VERSION, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: the kernel reads the header and writes two sets; all live through the call.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) };
    Errno::result(got)?;
    let wanted = capabilities.iter().fold(0, |all, capability| all | 1 << capability);
    let kept = sets[0].permitted & wanted;
    sets = [Sets { effective: kept, permitted: kept, inheritable: 0 }, Sets::default()];
    // SAFETY: the kernel reads the header and two sets, which live through the call.
    let set = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    Errno::result(set).map(drop)
}
