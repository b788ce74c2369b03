//! Who makes a call, as far as a kernel would want to know.

use std::fmt::Debug;
use std::sync::Arc;

/// An address space, for as long as the machine lives: the process and when it started, so that a
/// pid that is used again is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mm {
    /// The process.
    pub pid: i32,
    /// When it started, in the kernel's own ticks.
    pub started: u64,
}

/// The capabilities that VFIO asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// CAP_DAC_OVERRIDE: opening nodes of others.
    DacOverride,
    /// CAP_IPC_LOCK: no limit of pinned memory.
    IpcLock,
    /// CAP_SYS_RAWIO: groups without an IOMMU.
    SysRawio,
    /// CAP_SYS_RESOURCE: who is charged for an iommufd's memory.
    SysResource,
}

/// What a kernel knows of a caller. Asked for only when a call depends on it.
pub trait Caller: Debug {
    /// The same process, to be asked later; dead or replaced by then, its [`Caller::mm`] is another.
    fn keep(&self) -> Arc<dyn Caller + Send + Sync>;

    /// Its address space.
    fn mm(&self) -> Mm;

    /// Its user id.
    fn uid(&self) -> u32;

    /// Whether it has a capability.
    fn capable(&self, capability: Capability) -> bool;

    /// Its RLIMIT_MEMLOCK in bytes, u64::MAX for none.
    fn memlock(&self) -> u64;

    /// How many bytes from `start` on it has mapped without a gap, readable, and writable where
    /// `write` says so; at most `len`.
    fn accessible(&self, start: u64, len: u64, write: bool) -> u64;
}
