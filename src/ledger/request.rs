//! What the ledger is asked and told, and what it answers.

use super::{Handed, LeaseId, Member, NotFree, Space};
use crate::protocol::{Bdf, Handout};
use std::collections::BTreeMap;

/// Something to enter into the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A new lease is wanted. `Commit` or `Abort` follows.
    Acquire(Acquire),
    /// More devices are wanted for a lease. `Commit` or `Abort` follows.
    Extend(Extend),
    /// All effects of the acquisition in flight have been carried out.
    Commit {
        /// Which lease.
        lease: LeaseId,
    },
    /// The acquisition in flight failed, and what had been done is undone.
    Abort {
        /// Which lease.
        lease: LeaseId,
    },
    /// Memory is to be mapped. `MapDone` follows.
    Map {
        /// Which lease.
        lease: LeaseId,
        /// First address.
        iova: u64,
        /// Bytes.
        size: u64,
        /// What the lease's tenant may have.
        quota: Quota,
    },
    /// How mapping went.
    MapDone {
        /// Which lease.
        lease: LeaseId,
        /// The mapping's first address.
        iova: u64,
        /// It is there.
        made: bool,
    },
    /// Whole mappings are to be taken back. `UnmapDone` follows for each effect.
    Unmap {
        /// Which lease.
        lease: LeaseId,
        /// First address.
        iova: u64,
        /// Bytes.
        size: u64,
    },
    /// How unmapping one went.
    UnmapDone {
        /// Which lease.
        lease: LeaseId,
        /// The mapping's first address.
        iova: u64,
        /// It is gone.
        gone: bool,
    },
    /// Its holder is gone or gives it back.
    End {
        /// Which lease.
        lease: LeaseId,
        /// When, in seconds since 1970.
        at: u64,
    },
    /// A lease that was there before this ledger.
    Adopt(Adopted),
    /// What is mapped for a lease that was adopted.
    Mapped {
        /// Which lease.
        lease: LeaseId,
        /// First addresses and bytes.
        mappings: Vec<(u64, u64)>,
    },
    /// A lease, and what it left, is another tenant's than it was.
    Rename {
        /// Which lease.
        lease: LeaseId,
        /// Whose it is.
        tenant: String,
    },
    /// Nothing is mapped for an ended lease any more.
    NothingMapped {
        /// Which lease.
        lease: LeaseId,
    },
    /// What was just committed has not reached its holder and is undone.
    Retract {
        /// Which lease.
        lease: LeaseId,
        /// The devices that it does not get.
        devices: Vec<Bdf>,
        /// The groups that it does not get.
        groups: Vec<u32>,
    },
    /// A group of an ended lease is in no address space any more.
    Detached {
        /// Which group.
        group: u32,
    },
    /// The kernel has shown that nobody has anything of the group.
    Freed {
        /// Which group.
        group: u32,
    },
    /// The kernel has shown that no device of the group is bound to an iommufd; whether somebody has
    /// the node of one open and can bind it later, it does not show.
    Unbound {
        /// Which group.
        group: u32,
        /// When, in seconds since 1970.
        at: u64,
        /// The devices that were handed out by their nodes, each with the number of its
        /// registration with VFIO.
        left: BTreeMap<Bdf, u64>,
    },
    /// That registration of the device with VFIO has ended, which it does only when nobody has the
    /// device's node open any more.
    Proved {
        /// Its group.
        group: u32,
        /// Which device.
        device: Bdf,
        /// The registration.
        registration: u64,
    },
    /// The kernel has shown that somebody still does.
    Stuck {
        /// Which group.
        group: u32,
        /// By what.
        why: NotFree,
        /// When, in seconds since 1970.
        at: u64,
    },
}

/// A new lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acquire {
    /// Its public name, not used by any lease that is known.
    pub lease: LeaseId,
    /// Whose it is to be.
    pub tenant: String,
    /// What its holder calls the VM.
    pub vm: String,
    /// Who asks.
    pub uid: u32,
    /// Who asks.
    pub pid: i32,
    /// When, in seconds since 1970.
    pub at: u64,
    /// In which form the fds are to be given.
    pub handout: Handout,
    /// The address space.
    pub space: Space,
    /// The devices and their groups.
    pub groups: Vec<WantedGroup>,
    /// What the tenant may have.
    pub quota: Quota,
}

/// A lease as its keeper has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// Its public name, not used by any lease that is known.
    pub lease: LeaseId,
    /// Whose it is.
    pub tenant: String,
    /// What its holder calls the VM.
    pub vm: String,
    /// The uid that acquired it.
    pub uid: u32,
    /// The process that acquired it.
    pub pid: i32,
    /// When that was, in seconds since 1970.
    pub since: u64,
    /// In which form its fds are given.
    pub handout: Handout,
    /// The address space.
    pub space: Space,
    /// Its groups have no IOMMU behind them.
    pub noiommu: bool,
    /// Its holder has it; else it has ended.
    pub held: bool,
    /// Now, in seconds since 1970.
    pub at: u64,
    /// Its devices.
    pub devices: Vec<Handed>,
    /// Its groups.
    pub groups: Vec<AdoptedGroup>,
    /// Something is mapped for it. `Mapped` or `NothingMapped` follows.
    pub is_mapped: bool,
}

/// A group of such a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdoptedGroup {
    /// Its number.
    pub id: u32,
    /// It is attached to the lease's address space.
    pub attached: bool,
    /// Its devices on VFIO drivers, as they were when it was acquired.
    pub members: Vec<Member>,
    /// Nothing of it is bound; the nodes of these devices may be open, each with the number of its
    /// registration with VFIO. `None` where that has not been shown.
    pub unbound: Option<BTreeMap<Bdf, u64>>,
}

/// More devices for a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extend {
    /// Which lease.
    pub lease: LeaseId,
    /// The devices and their groups; groups that the lease has may be among them.
    pub groups: Vec<WantedGroup>,
    /// What the tenant may have.
    pub quota: Quota,
}

/// Devices wanted from one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedGroup {
    /// Its number.
    pub id: u32,
    /// No IOMMU is behind it.
    pub noiommu: bool,
    /// All its devices on VFIO drivers.
    pub members: Vec<Member>,
    /// The devices to use.
    pub devices: Vec<Bdf>,
    /// The devices that nobody is to use meanwhile.
    pub withhold: Vec<Bdf>,
}

/// What a tenant may have in all, what waits to be reclaimed included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quota {
    /// Leases.
    pub leases: u64,
    /// Devices, withheld ones included.
    pub devices: u64,
    /// Mappings that the broker makes.
    pub mappings: u64,
    /// Bytes in them.
    pub mapped_bytes: u64,
}

/// Something to carry out on the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Open the lease's container; a shared one only if it is not there yet.
    OpenSpace,
    /// Open a group and see that it is viable.
    OpenGroup(u32),
    /// Attach a group to the container; where it is the first one there, choose the IOMMU type.
    Attach(u32),
    /// Open a device of an attached group.
    OpenDevice(u32, Bdf),
    /// Open the lease's iommufd, and have it charge each process for itself.
    OpenIommufd,
    /// Open a group, see that it is viable, and close it: that nobody has it open, nor a device of
    /// it bound to an iommufd.
    CheckGroup(u32),
    /// Open a device by its own node.
    OpenCdev(u32, Bdf),
    /// Map this range.
    Map {
        /// First address.
        iova: u64,
        /// Bytes.
        size: u64,
    },
    /// Unmap this mapping.
    Unmap {
        /// First address.
        iova: u64,
        /// Bytes.
        size: u64,
    },
}
